"""Runs the demo on several seeds and writes bench/results/demo.json: every row of every table.

    python bench/demo.py --runs runs/bench 5 6 7

A seed's run goes to RUNS/SEED; one that is there already is gone on with, or only read.
"""

import argparse
import datetime
import json
import platform
from importlib.metadata import version
from pathlib import Path

from npr_jax.demo import run, sums
from npr_jax.demo.table import shortfalls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=Path("runs/bench"))
    parser.add_argument("seeds", type=int, nargs="+")
    args = parser.parse_args()
    record = {
        "date": datetime.date.today().isoformat(),
        "platform": platform.platform(),
        "versions": {name: version(name) for name in ("jax", "optax", "numpy")},
        "seeds": {},
    }
    for seed in args.seeds:
        run("sums", seed, args.runs / str(seed))
        results = json.loads((args.runs / str(seed) / "results.json").read_text(encoding="utf-8"))
        record["seeds"][seed] = {
            "falls_short": shortfalls(results["rows"], sums.CHECKS),
            "stage_seconds": {name: round(x, 1) for name, x in results["seconds"].items()},
            "rows": {
                name: {column: round(x, 4) for column, x in row.items()}
                for name, row in results["rows"].items()
            },
        }
    path = Path(__file__).parent / "results" / "demo.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
