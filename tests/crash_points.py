"""A run that is killed at each system call with which it changes its files, and then goes on.

    python tests/crash_points.py [STAGE ...]     writes bench/results/crash_points.json

A stage runs as a process in which every such call first asks (crash_points.c). While it waits, its
directory is what a kill at this moment leaves: a copy of it is gone on with, in this process, which
has all programs compiled, and must end as a run that nobody has touched. Then the call is made, and
the next one asks. Writes are stopped in their middle too.

Calls are counted before they are made: write, pwrite and writev (with "/half" for their middle),
pwritev, rename, fsync, fdatasync, ftruncate, link, unlink and rmdir, of all threads. Not covered:
mkdir and open (what they leave is seen at the next call), writes through mapped memory, calls that
pass by the C library (one is made: safetensors renames a file of `final` before that is whole), and
a loss of power, after which what was not synced may be missing.
"""

import argparse
import collections
import contextlib
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from npr_jax.runs.metrics import is_measured, read_metrics

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results" / "crash_points.json"
RL = {
    "steps": 2,
    "prompts": 4,
    "samples": 4,
    "max_prompt_tokens": 16,
    "max_tokens": 64,
    "train.row_len": 256,
    "train.checkpoint_every": 1,
    "train.keep_checkpoints": 1,
}
SETTINGS = {
    "zero": {"model": "seed", **RL},
    "papo": {"model": "tree", "malformed": "penalty", **RL},
    "beta": {
        "model": "seed",
        "sampler_model": "seed",
        "sample.num_problems": 12,
        "sample.batch": 4,
        "sample.tries": 4,
        "sample.max_tokens": 64,
        "fit.steps": 3,
        "fit.batch": 4,
        "fit.train.row_len": 256,
        "fit.train.checkpoint_every": 1,
        "fit.train.keep_checkpoints": 1,
    },
}


class Point(NamedTuple):
    """A call that is about to be made: its number from 1, its name, and the file."""

    number: int
    call: str
    path: str

    def __str__(self) -> str:
        return f"point {self.number}, {self.call} {self.path}"


def why_not() -> str | None:
    """Why runs cannot be stopped at their calls here; None if they can."""
    if sys.platform != "linux":
        return "stopping at system calls needs Linux"
    return None if shutil.which("cc") else "stopping at system calls needs a C compiler (cc)"


def build(folder: Path) -> Path:
    """The library that is preloaded."""
    library = folder / "crash_points.so"
    source = Path(__file__).with_suffix(".c")
    command = ["cc", "-O1", "-Wall", "-shared", "-fPIC", "-o", library, source, "-ldl", "-lpthread"]
    subprocess.run(command, check=True)
    return library


class Tiny:
    """One stage, as small as it can be, on the files of `train_toy.make_home`."""

    def __init__(self, home: Path, stage: str, library: Path):
        self.stage, self.library = stage, library
        values = {"seed": 3, "engine.lanes": 16, "engine.pages": 256, **SETTINGS[stage]}
        for key in ("model", "sampler_model"):
            if key in values:
                values[key] = str(home / values[key])
        self._values = values | {"problems": str(home / "problems.jsonl")}

    def arguments(self, output: Path) -> list[str]:
        """Of `npr-jax`."""
        values = self._values | {"output": str(output)}
        changes = [f"--set={key}={json.dumps(value)}" for key, value in values.items()]
        return [self.stage, f"tiny_{self.stage}", *changes]

    def command(self, output: Path) -> list[str]:
        """The run as a process."""
        return [sys.executable, "-m", "npr_jax", *self.arguments(output)]

    def go_on(self, output: Path) -> None:
        """Begins the run, or goes on with it, in this process."""
        from npr_jax.cli import app

        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            app(self.arguments(output), standalone_mode=False)

    def result(self, output: Path) -> dict[str, object]:
        """What must be the same in the end: the names of all files, metrics without times, what
        was sampled, and the trained model. Of checkpoints the last counts: a run that was killed
        while it removed the one before, after its last step, leaves what is left of that."""
        files = [path for path in output.rglob("*") if path.is_file()]
        found: dict[str, object] = {
            str(path.relative_to(output)): path.read_bytes()
            for path in files
            if path.suffix in (".jsonl", ".safetensors") and path.name != "metrics.jsonl"
        }
        for path in files:
            if path.name == "metrics.jsonl":
                found[str(path.relative_to(output))] = [
                    {k: v for k, v in line.items() if not is_measured(k)}
                    for line in read_metrics(path.parent)
                ]
        names = {_plain(path.relative_to(output)) for path in files}
        last = max((_checkpoint(name) for name in names), default=0)
        # A run that was begun twice has two of TensorBoard's files.
        return found | {
            "the names of all files": {
                name for name in names if "tfevents" not in name and _checkpoint(name) in (0, last)
            }
        }

    @contextlib.contextmanager
    def stopping(self, output: Path) -> Iterator[tuple[subprocess.Popen, Iterator[Point]]]:
        """The run as a process, and its points; it goes past one when the next is asked for."""
        output.parent.mkdir(parents=True, exist_ok=True)
        (ask, asks), (goes, go) = os.pipe(), os.pipe()
        env = os.environ | {
            "LD_PRELOAD": str(self.library),
            "CRASH_POINTS_UNDER": str(output),
            "CRASH_POINTS_ASK": str(asks),
            "CRASH_POINTS_GO": str(goes),
            "JAX_DEFAULT_MATMUL_PRECISION": "highest",  # as in this process
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        }
        with (output.parent / f"{output.name}.log").open("wb") as log:
            process = subprocess.Popen(
                self.command(output),
                env=env,
                pass_fds=(asks, goes),
                stdout=log,
                stderr=log,
            )
        os.close(asks)
        os.close(goes)

        def points(lines) -> Iterator[Point]:
            for number, line in enumerate(lines, 1):
                call, _, path = line.rstrip("\n").partition(" ")
                yield Point(number, call, os.path.relpath(path, output))
                os.write(go, b"g")

        try:
            with open(ask, encoding="utf-8") as lines:
                yield process, points(lines)
        finally:
            process.kill()
            process.wait()
            os.close(go)


def walk(tiny: Tiny, folder: Path, chosen: Callable[[Point], bool] = lambda _: True) -> dict:
    """Stops the run at every point, and goes on from a copy at the chosen ones.

    Returns figures, and `failures`: a sentence for each continuation that ended differently.
    Copies that equal one that has been gone on with are not gone on with again.
    """
    begun = time.monotonic()
    whole, output, state = folder / "whole", folder / "stopped" / "run", folder / "state"
    tiny.go_on(whole)
    expected = tiny.result(whole)
    counts, seen, tried, failures = collections.Counter(), set(), 0, []
    with tiny.stopping(output) as (process, points):
        for point in points:
            counts[point.call] += 1
            if not chosen(point):
                continue
            tried += 1
            shutil.copytree(output, state)
            digest = _digest(state)
            if digest not in seen:
                seen.add(digest)
                if fault := _continue(tiny, state, expected):
                    failures.append(f"{point}: {fault}")
            shutil.rmtree(state)
        if process.wait():
            log = (output.parent / "run.log").read_text(errors="replace")
            raise RuntimeError(f"the stopped run failed:\n{log[-3000:]}")
    if fault := _differs(expected, tiny.result(output)):
        failures.append(f"the run that was only stopped: {fault}")
    return {
        "points": counts.total(),
        "by_call": dict(sorted(counts.items())),
        "tried": tried,
        "different_states": len(seen),
        "failures": failures,
        "seconds": round(time.monotonic() - begun),
    }


def kill(tiny: Tiny, folder: Path, chosen: Callable[[Point], bool]) -> tuple[Point, str | None]:
    """Kills the run, by SIGKILL, at the first chosen point, and goes on: (the point, what was
    different in the end)."""
    whole, output = folder / "whole", folder / "killed" / "run"
    tiny.go_on(whole)
    with tiny.stopping(output) as (process, points):
        point = next(filter(chosen, points))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    return point, _continue(tiny, output, tiny.result(whole))


def _continue(tiny: Tiny, output: Path, expected: dict) -> str | None:
    try:
        tiny.go_on(output)
    except (Exception, SystemExit) as error:
        return f"it cannot go on: {type(error).__name__}: {error}"
    return _differs(expected, tiny.result(output))


def _differs(expected: dict, found: dict) -> str | None:
    if expected == found:
        return None
    names = expected["the names of all files"], found["the names of all files"]
    if names[0] != names[1]:
        return f"missing {sorted(names[0] - names[1])}, additional {sorted(names[1] - names[0])}"
    wrong = [name for name in expected if expected[name] != found.get(name)]
    return f"{', '.join(wrong)} is not what it was"


def _plain(path: Path) -> str:
    """The array store names some files at random."""
    return "/".join("*" if len(part) == 32 else part for part in path.parts)


def _checkpoint(name: str) -> int:
    """The step of the checkpoint that a file belongs to; 0 if to none."""
    _, found, rest = name.partition("checkpoints/")
    step = rest.split("/")[0] if found else ""
    return int(step) if step.isdigit() else 0


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        digest.update(str(path.relative_to(folder)).encode() + b"\0")
        if path.is_file():
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stages", nargs="*", default=list(SETTINGS), metavar="STAGE")
    stages = parser.parse_args().stages
    if reason := why_not():
        print(reason, file=sys.stderr)
        return 2
    import jax
    from train_toy import make_home

    jax.config.update("jax_default_matmul_precision", "highest")
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        raise SystemExit("set JAX_COMPILATION_CACHE_DIR, or each process compiles for itself")
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "home").mkdir()
        home, library = make_home(folder / "home"), build(folder)
        for stage in stages:
            results[stage] = walk(Tiny(home, stage, library), folder / stage)
            print(stage, json.dumps(results[stage], indent=1))
            RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return int(any(results[stage]["failures"] for stage in stages))


if __name__ == "__main__":
    sys.exit(main())
