"""Tests the tests: each line of tests/mutants.yaml breaks the code, and a named test must notice.

    python scripts/mutants.py [--jobs 2] [--only TEXT] [--new]

Every fault is put into a copy of the repository, of which only the named test file runs. Without a
fault these tests must pass. Each fault's outcome goes into bench/results/mutants.json as it is
known, and all of them into docs/mutants.md; exit code 1 if any fault went unnoticed.
"""

import argparse
import concurrent.futures
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
RESULTS, PAGE = ROOT / "bench/results/mutants.json", ROOT / "docs/mutants.md"
PARTS = ("npr_jax", "configs", "tests", "bench", "docs", "scripts")
FILES = ("README.md", "pyproject.toml", "setup.py", "Makefile")
KEYS = ("file", "old", "new", "test")
SECONDS = 900  # a fault that makes a test hang is noticed too
MARKS = "not nightly and not real and not clients"  # as `make test`


def read_mutants() -> list[dict]:
    """The faults: file, old and new text, test."""
    return yaml.safe_load((ROOT / "tests/mutants.yaml").read_text(encoding="utf-8"))


def key(mutant: dict) -> tuple:
    """What tells a fault from others."""
    return tuple(map(mutant.get, KEYS))


def fault_of(mutant: dict) -> str:
    """The text of a fault's file with the fault in it; ValueError if it has no place there."""
    text = (ROOT / mutant["file"]).read_text(encoding="utf-8")
    found = text.count(mutant["old"])
    if found != 1:
        raise ValueError(f"{mutant['file']} holds {mutant['old']!r} {found} times, needed is once")
    return text.replace(mutant["old"], mutant["new"])


def run(test: str, mutant: dict | None = None) -> dict:
    """Runs a test file on a copy of the repository: which test failed first, if any; seconds."""
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="mutant_") as folder:
        copy = Path(folder)
        for part in PARTS:
            skipped = shutil.ignore_patterns("__pycache__", "results", "images")
            shutil.copytree(ROOT / part, copy / part, ignore=skipped)
        for name in FILES:
            shutil.copy(ROOT / name, copy / name)
        if mutant:
            (copy / mutant["file"]).write_text(fault_of(mutant), encoding="utf-8")
        options = ("-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist")
        try:
            found = subprocess.run(
                [sys.executable, "-m", "pytest", *options, "-m", MARKS, test],
                cwd=copy,
                env={**os.environ, "PYTHONPATH": folder},
                capture_output=True,
                text=True,
                timeout=SECONDS,
            )
        except subprocess.TimeoutExpired:
            return {"failed": f"no end within {SECONDS} s", "seconds": float(SECONDS)}
    failed = re.search(r"^(?:FAILED|ERROR) (?:\S*?::)?(\S+)", found.stdout, re.M)
    if found.returncode and not failed:
        raise RuntimeError(f"{test} did not run:\n{found.stdout[-2000:]}{found.stderr[-2000:]}")
    name = failed[1] if failed and found.returncode else None
    return {"failed": name, "seconds": round(time.perf_counter() - begun, 1)}


def table(results: list[dict], known: int) -> str:
    """docs/mutants.md, of the faults that were tried, of those that are `known`."""
    unnoticed = sum(not x["failed"] for x in results)
    lines = [
        "# Faults that the tests must notice",
        "",
        "Made by `make mutants`. Each line was replaced in a copy of the repository, and the test",
        "named last failed. Where such a line changes, tests/mutants.yaml changes with it.",
        "",
        f"{len(results)} of {known} faults were tried, {unnoticed} of them not noticed.",
        "",
        "| file | line | broken | noticed by |",
        "| --- | --- | --- | --- |",
    ]
    code = "`{}`".format
    for x in results:
        cells = (x["file"].removeprefix("npr_jax/"), code(x["old"]), code(x["new"]))
        cells = (*cells, f"{Path(x['test']).stem}: {x['failed']}" if x["failed"] else "NOBODY")
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def outcomes() -> list[dict]:
    """Those that are known."""
    return json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else []


def write(result: dict) -> None:
    """Puts the outcome of one fault beside those of the others that are still in the list."""
    known = {key(x): x for x in [*outcomes(), result]}
    faults = [key(x) for x in read_mutants()]
    results = [known[fault] for fault in faults if fault in known]
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(table(results, len(faults)), encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=2, help="at one time")
    parser.add_argument("--only", default="", help="faults whose file or line holds this text")
    parser.add_argument("--new", action="store_true", help="faults without an outcome alone")
    args = parser.parse_args()
    mutants = [x for x in read_mutants() if args.only in x["file"] + x["old"]]
    if args.new:
        known = {key(x) for x in outcomes()}
        mutants = [x for x in mutants if key(x) not in known]
    for mutant in mutants:
        fault_of(mutant)
    with (
        concurrent.futures.ThreadPoolExecutor(args.jobs) as pool,
        tempfile.TemporaryDirectory(prefix="mutants_compiled_") as compiled,
    ):
        # Most faults leave most programs as they are.
        os.environ["JAX_COMPILATION_CACHE_DIR"] = compiled
        unnoticed = 0
        tests = sorted({x["test"] for x in mutants})
        for test, found in zip(tests, pool.map(run, tests), strict=True):
            if found["failed"]:
                sys.exit(f"{test} fails without a fault: {found['failed']}")
            print(f"{found['seconds']:6.1f} s  passes without a fault: {test}", flush=True)
        for mutant, found in zip(
            mutants, pool.map(lambda x: run(x["test"], x), mutants), strict=True
        ):
            unnoticed += not found["failed"]
            said = found["failed"] or "NOT NOTICED"
            print(
                f"{found['seconds']:6.1f} s  {said}: {mutant['file']}: {mutant['new']}", flush=True
            )
            write({**mutant, **found})
    print(f"{len(mutants)} faults, {unnoticed} not noticed")
    return bool(unnoticed)


if __name__ == "__main__":
    sys.exit(main())
