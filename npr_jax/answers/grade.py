"""Final answers: find the last `\\boxed{...}` of a text, and compare it with a reference answer.

`answers.read` reads an answer, `answers.match` compares two; formulas by math-verify, which may
loop or exhaust memory on hostile input, and whose own time limit works in a main thread only. So
that runs in one worker process that is limited in CPU time and memory, and started again after a
limit has killed it. The worker does not import JAX.
"""

import atexit
import contextlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

from npr_jax.answers.read import clean, fold, plain_number, read, words

MAX_LENGTH = 2000  # characters; a longer answer equals only the same string

# A run of backslashes with what it applies to, or a brace. Linear in the text, whatever it holds.
_TOKEN = re.compile(r"(\\++)(boxed\s*+\{|[{}])?+|[{}]")
_SCRIPT = (
    "import sys; sys.path.append(sys.argv[1]); from npr_jax.answers.match import serve; serve()"
)


def find_boxed(text: str) -> list[str]:
    """Contents of every `\\boxed{...}` that is closed, in the order in which they start.

    Braces are matched; escaped ones (`\\{`) do not count. Time is linear in the text.
    """
    open_braces: list[tuple[int, bool]] = []  # (where the content starts, whether it is a box)
    found: list[tuple[int, int]] = []
    for match in _TOKEN.finditer(text):
        slashes, token = match.group(1) or "", match.group(2) or match.group(0)
        if token.startswith("boxed"):
            open_braces.append((match.end(), True))
        elif token == "{" and len(slashes) % 2 == 0:
            open_braces.append((match.end(), False))
        elif token == "}" and len(slashes) % 2 == 0 and open_braces:
            start, is_box = open_braces.pop()
            if is_box:
                found.append((start, match.end() - 1))
    return [text[start:end].strip() for start, end in sorted(found)]


def extract(text: str) -> str | None:
    """Content of the last complete `\\boxed{...}`, or None.

    If there is a `</takeaway>`, only what follows the last one counts.
    """
    boxes = find_boxed(text[text.rfind("</takeaway>") + 1 :])
    return boxes[-1] if boxes else None


def equal(prediction: str | None, reference: str) -> bool:
    """Whether two answers (LaTeX or plain, without `\\boxed`) are the same value.

    No answer makes it raise or hang: one that cannot be parsed, or that reaches a limit of this
    module, is not equal. None (no answer) equals nothing. Text and plain numbers are compared here;
    forms with formulas in them by the worker. What counts as the same: docs/answers.md.
    Safe to call from several threads, which then wait for each other. Raises RuntimeError only if
    the worker process cannot start at all (math-verify is not installed, say).
    """
    if prediction is None or not (prediction := prediction.strip()):
        return False
    reference = reference.strip()
    if prediction == reference:
        return True
    if max(len(prediction), len(reference)) > MAX_LENGTH:
        return False
    p, r = plain_number(prediction), plain_number(reference)
    if p is not None and r is not None:
        return p == r
    p_words, r_words = words(clean(prediction)), words(clean(reference))
    if p_words == r_words != "":
        return True
    p, r = read(prediction), read(reference)
    if "text" in (p[0], r[0]):
        return fold(p_words) == fold(r_words) != ""
    return _worker.ask(p, r)


def equal_many(pairs: Iterable[tuple[str | None, str]]) -> list[bool]:
    """`equal` of each (prediction, reference); equal pairs are compared once."""
    return check_many(pairs, equal)


def check_many(
    pairs: Iterable[tuple[str | None, str]], check: Callable[[str, str], bool]
) -> list[bool]:
    """`check` of each (prediction, reference), False without a prediction; equal pairs are asked
    about once."""
    pairs = list(pairs)
    verdicts = {(p, r): p is not None and check(p, r) for p, r in dict.fromkeys(pairs)}
    return [verdicts[pair] for pair in pairs]


class _Worker:
    """The process that runs npr_jax.answers.match: one JSON line in, one JSON line out."""

    def __init__(self):
        self._lock = threading.Lock()
        self._process: subprocess.Popen | None = None

    def ask(self, prediction: list, reference: list) -> bool:
        with self._lock:
            process = self._process or self._start()
            assert process.stdin and process.stdout  # pipes, as _start asks for
            with contextlib.suppress(BrokenPipeError):  # it died; reading then finds the end
                process.stdin.write(json.dumps([prediction, reference]) + "\n")
                process.stdin.flush()
            answer = process.stdout.readline()
            if not answer:
                self._stop()
            return answer == "true\n"

    def _start(self) -> subprocess.Popen:
        root = str(Path(__file__).parents[2])
        self._process = process = subprocess.Popen(
            # -P: the working directory is not searched.
            [sys.executable, "-P", "-c", _SCRIPT, root],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stdout and process.stderr  # pipes
        if process.stdout.readline() != "ready\n":
            detail = process.stderr.read()
            self._stop()
            raise RuntimeError(f"the answer-checking process did not start:\n{detail}")
        return process

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            with contextlib.suppress(BrokenPipeError):
                process.communicate()

    def close(self) -> None:
        with self._lock:
            self._stop()


_worker = _Worker()
atexit.register(lambda: _worker.close())


def _forget_worker() -> None:
    """A forked child starts a worker of its own: two readers of one pipe would mix answers."""
    global _worker
    _worker = _Worker()


os.register_at_fork(after_in_child=_forget_worker)
