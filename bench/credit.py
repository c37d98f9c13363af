"""How many steps PAPO needs to an accuracy of 0.9, with credit for branches and without.

    python bench/credit.py run --seeds 0 1 2 3 4     # about ten minutes a seed; resumable
    python bench/credit.py table                     # in docs/recipe.md

PAPO goes on from the recipe's Beta model, which is made where it is not there, on the recipe's
problems. The accuracy at a step is that of its batch's answers, 256 to 16 problems; reached is 0.9
where its mean over eight batches in a row is that. Writes bench/results/credit.json.
"""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path

import jax
import study
from recipe import DOCS, ROOT, RUN, begin, config_of, spread
from study import add_result, results
from table import markdown, replace_between

from npr_jax.base.compile_cache import use_cache
from npr_jax.base.config import load_config
from npr_jax.runs.metrics import read_metrics
from npr_jax.train import papo

RESULTS = ROOT / "bench" / "results" / "credit.json"
BEGIN, END = "<!-- made by bench/credit.py -->", "<!-- end of credit -->"
STEPS, GOAL, BATCHES = 96, 0.9, 8
ARMS = {0.0: "the answer alone", 0.5: "`branch_credit` 0.5", 1.0: "`branch_credit` 1"}


def run_arm(seed: int, credit: float, runs: Path, steps: int) -> list[float]:
    """The accuracy at each step of PAPO; what is missing is trained."""
    home = runs / str(seed)
    if not (home / "base" / "beta" / "final").exists():
        begin(seed, home)
        for stage in ("zero", "beta"):
            RUN[stage](config_of(seed, "base", home, stage))
    values = {
        "model": str(home / "base" / "beta" / "final"),
        "problems": str(home / "problems.jsonl"),
        "output": str(home / "credit" / str(credit)),
        "seed": seed,
        "steps": steps,
        "branch_labels": "npr_jax.demo.steps",
        "branch_credit": credit,
    }
    changes = [f"{key}={json.dumps(value)}" for key, value in values.items()]
    papo.run(load_config(papo.PapoConfig, "tiny_papo", changes))
    return [round(float(line["accuracy"]), 4) for line in read_metrics(Path(values["output"]))]


def steps_to(accuracy: Sequence[float], goal: float = GOAL, batches: int = BATCHES) -> int | None:
    """The first step at which the mean over so many batches is at least the goal, or None."""
    ends = range(batches, len(accuracy) + 1)
    means = {end: statistics.mean(accuracy[end - batches : end]) for end in ends}
    return next((end for end, mean in means.items() if mean >= goal), None)


def run(args) -> None:
    use_cache(args.runs / "compiled")
    for seed in args.seeds:  # seed by seed: a study that is cut off is paired
        for credit in ARMS:
            if str(credit) in results(RESULTS).get(str(seed), {}):
                continue
            accuracy = run_arm(seed, credit, args.runs, args.steps)
            print(f"seed {seed}, {credit}: {steps_to(accuracy)} steps", flush=True)
            jax.clear_caches()  # or the programs of many runs come to the system's limit of maps
            arms = results(RESULTS).get(str(seed), {}) | {str(credit): accuracy}
            add_result(RESULTS, seed, arms, indent=None)


def table(args) -> None:
    """Writes the table into docs/recipe.md. A seed that has not reached the goal counts with all of
    its steps, and is told."""
    whole = [seed for seed in results(RESULTS).values() if len(seed) == len(ARMS)]
    if not whole:
        raise SystemExit(f"{RESULTS} has no seed with all arms: run first")
    rows = []
    for credit, title in ARMS.items():
        runs = [seed[str(credit)] for seed in whole]
        found = [steps_to(accuracy) for accuracy in runs]
        steps = [len(a) if x is None else x for a, x in zip(runs, found, strict=True)]
        base = [steps_to(seed["0.0"]) or len(seed["0.0"]) for seed in whole]
        change = spread([x - y for x, y in zip(steps, base, strict=True)], 1, "+") if credit else ""
        last = spread([statistics.mean(accuracy[-BATCHES:]) for accuracy in runs], 3)
        reached = f"{sum(x is not None for x in found)} of {len(found)}"
        rows.append([title, spread(steps, 1), reached, change, last])
    head = [f"{len(whole)} seeds", f"steps to {GOAL}", "reached by", "against without"]
    lines = markdown([*head, f"accuracy in the last {BATCHES} batches"], rows)
    replace_between(DOCS, BEGIN, END, "\n".join(lines))


def main() -> None:
    """The command line."""
    steps = lambda parser: parser.add_argument("--steps", type=int, default=STEPS)  # noqa: E731
    study.main(__doc__, run, table, range(5), steps)


if __name__ == "__main__":
    main()
