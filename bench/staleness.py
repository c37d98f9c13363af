"""What rollouts ahead of training cost in accuracy: PAPO of the tiny task at staleness 0, 1, 2.

    npr-jax demo && python bench/staleness.py runs/demo --seeds 5 --write

Every run begins with the demo's Beta model, and differs from the others of its staleness by the
seed of its problems and answers. Prints a JSON line per run: `staleness`, `seed`, `accuracy` (mean
over the last `--last` batches, of problems that were drawn for them) and `logp_gap` (mean of all
steps); then one for each staleness with mean, lowest and highest, and whether the mean lies within
the spread of staleness 0. `--write`: to bench/results/staleness.json, and docs/recipe.md.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

from table import markdown, replace_between

from npr_jax.base.config import load_config
from npr_jax.runs.metrics import read_metrics
from npr_jax.train import papo

ROOT = Path(__file__).parents[1]
RESULTS, DOCS = ROOT / "bench/results/staleness.json", ROOT / "docs/recipe.md"
BEGIN, END = "<!-- made by bench/staleness.py -->", "<!-- end of staleness -->"


def measure(demo: Path, staleness: int, seed: int, last: int, more: list[str]) -> dict:
    """One run of PAPO."""
    with tempfile.TemporaryDirectory() as home:
        places = {
            "model": demo / "beta/final",
            "problems": demo / "problems.jsonl",
            "output": Path(home) / "run",
        }
        sets = [f"{key}={json.dumps(str(path.resolve()))}" for key, path in places.items()]
        sets += [f"staleness={staleness}", f"seed={seed}", "train.row_lengths=1", *more]
        papo.run(load_config(papo.PapoConfig, "tiny_papo", sets), lambda metrics: None)
        lines = read_metrics(Path(home) / "run")
    gaps = [line["logp_gap"] for line in lines if "logp_gap" in line]
    return {
        "staleness": staleness,
        "seed": seed,
        "accuracy": round(statistics.fmean(line["accuracy"] for line in lines[-last:]), 4),
        "logp_gap": round(statistics.fmean(gaps), 6),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("demo", type=Path, help="directory of a finished demo")
    parser.add_argument("--seeds", type=int, default=5, help="runs of each staleness")
    parser.add_argument("--staleness", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--last", type=int, default=8, help="batches that count")
    parser.add_argument("--set", action="append", default=[], help="KEY=VALUE of the config")
    parser.add_argument("--write", action="store_true", help="the results, and their table")
    given = parser.parse_args()
    runs = []
    for seed in range(given.seeds):
        for staleness in given.staleness:
            runs.append(measure(given.demo, staleness, seed, given.last, given.set))
            print(json.dumps(runs[-1]), flush=True)
    sums = []
    for staleness in given.staleness:
        some = [run for run in runs if run["staleness"] == staleness]
        found = [run["accuracy"] for run in some]
        sums.append(
            {
                "staleness": staleness,
                "mean": round(statistics.fmean(found), 4),
                "lowest": min(found),
                "highest": max(found),
                "logp_gap": round(statistics.fmean(run["logp_gap"] for run in some), 6),
            }
        )
        low, high = sums[0]["lowest"], sums[0]["highest"]
        sums[-1]["within"] = low <= sums[-1]["mean"] <= high
        print(json.dumps(sums[-1]), flush=True)
    if given.write:
        RESULTS.write_text(json.dumps({"runs": runs, "of": sums}, indent=1) + "\n")
        write_table()


def write_table() -> None:
    """Rewrites the table of docs/recipe.md from the results."""
    found = json.loads(RESULTS.read_text())
    rows = [
        [
            some["staleness"],
            sum(run["staleness"] == some["staleness"] for run in found["runs"]),
            f"{some['mean']:.3f}",
            f"{some['lowest']:.3f} to {some['highest']:.3f}",
            f"{some['logp_gap']:.4f}",
        ]
        for some in found["of"]
    ]
    head = ["batches ahead", "seeds", "right", "lowest to highest", "gap of log-probs"]
    replace_between(DOCS, BEGIN, END, "\n".join(markdown(head, rows)))


if __name__ == "__main__":
    main()
