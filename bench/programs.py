"""Runs many random programs of the engine's host side on a device in plain Python.

    python bench/programs.py --programs 100000

The same programs as tests/test_engine_programs.py: submit, visit, abort (from callbacks too),
preempt, forget in random order, with penalties, forks, joins and evictions as they come; every
count recounted from the tables after each operation, every answer checked against its own layout.
Writes bench/results/programs.json.
"""

import argparse
import datetime
import json
import multiprocessing
import os
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

COUNTED = ("visits", "forks", "joins", "preemptions", "evictions", "cached_tokens")
COUNTED += ("aborts_by_callbacks",)


def _some(seed: int, count: int) -> Counter:
    """`count` programs from one seed: how much happened in them."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import bigram
    from fake_device import CONFIGS, OPERATIONS, run_program

    from npr_jax.decode import fork_join

    fork_join.check_block = bigram.check_block_without_numbers
    rng, happened = np.random.default_rng(seed), Counter()
    for number in range(count):
        length = int(rng.integers(8, 31))
        program = [
            (OPERATIONS[int(rng.integers(len(OPERATIONS)))], int(rng.integers(256)))
            for _ in range(length)
        ]
        try:
            stats = run_program(CONFIGS[number % len(CONFIGS)], [("submit", 77), *program])
        except Exception as error:
            raise SystemExit(f"seed {seed}, program {number} {program}: {error!r}") from error
        ends = {name: n for name, n in stats.items() if name.startswith("ends_")}
        happened.update({"operations": length + 1} | {k: int(stats[k]) for k in COUNTED} | ends)
    return happened


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--programs", type=int, default=1000)
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    begun, happened, size = time.perf_counter(), Counter(), 250
    pieces = [(seed, size) for seed in range(-(-args.programs // size))]
    with multiprocessing.get_context("spawn").Pool(args.processes) as pool:
        for done, found in enumerate(pool.imap_unordered(_star, pieces), 1):
            happened.update(found)
            print(f"{done * size} programs, {time.perf_counter() - begun:.0f} s", flush=True)
    record = {
        "date": datetime.date.today().isoformat(),
        "programs": len(pieces) * size,
        "failures": 0,
        "seconds": round(time.perf_counter() - begun),
        "happened": dict(sorted(happened.items())),
    }
    path = Path(__file__).parent / "results" / "programs.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(record))


def _star(piece: tuple[int, int]) -> Counter:
    return _some(*piece)


if __name__ == "__main__":
    main()
