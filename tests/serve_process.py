"""`npr-jax serve` as a process, and the blocks of docs/serving.md for what is at its address."""

import contextlib
import re
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs/serving.md"


@contextlib.contextmanager
def started(model, cache, *more, sets=()):
    """A server of a model: the process, its port, and what it had said by then. `sets` are values
    of keys of its config, `more` other arguments."""
    command = [sys.executable, "-m", "npr_jax", "serve", "--model", str(model), "--port", "0"]
    command += [f"--set={key}={value}" for key, value in dict(sets).items()]
    command += [f"--set=compilation_cache={cache}", *more]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    said = []
    try:
        assert process.stderr is not None
        for line in process.stderr:
            said.append(line)
            if found := re.search(r"serving \S+ at http://127\.0\.0\.1:(\d+)", line):
                break
        else:
            raise AssertionError("".join(said))
        yield process, int(found[1]), "".join(said)
    finally:
        process.kill()
        process.wait(30)
        process.stderr.close()


def block(language: str, holds: str, port: int, model: str = "final") -> str:
    """The one block of the page in that language that holds a text, for a server at that port."""
    found = re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    (text,) = (text for text in found if holds in text)
    return text.replace("127.0.0.1:8000", f"127.0.0.1:{port}").replace("=final", f"={model}")
