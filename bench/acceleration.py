"""Whether PAPO's acceleration reward shortens the critical path, on the demo's task.

    python bench/recipe.py run --runs runs/recipe --seeds 0 1 2 --arms base
    python bench/acceleration.py run --runs runs/recipe --seeds 0 1 2     # minutes; resumable
    python bench/acceleration.py table                                    # in docs/recipe.md

The recipe's own model has nothing to shorten: after Zero hardly an answer has two blocks where one
would do. So the recipe's Beta model is first trained on right answers, half of which (of those that
can be) are in two blocks, and PAPO goes on from there: without the reward, and with it. All three
models are measured on the same 2,048 fresh problems of their seed, one answer each at temperature
1. Writes bench/results/acceleration.json.
"""

import argparse
import dataclasses
import json
import statistics
from pathlib import Path

import numpy as np
from recipe import DOCS, ROOT, spread
from table import markdown, replace_between

from npr_jax.base.compile_cache import use_cache
from npr_jax.base.config import load_config
from npr_jax.data.problems import Problem, read_problems
from npr_jax.data.prompts import prompt_ids
from npr_jax.demo import measure
from npr_jax.demo.sums import FIT, Sum, draw, ideal
from npr_jax.model.pretrained import load, save
from npr_jax.train import papo
from npr_jax.train.beta import make_examples
from npr_jax.train.fit import fit

RESULTS = ROOT / "bench" / "results" / "acceleration.json"
BEGIN, END = "<!-- made by bench/acceleration.py -->", "<!-- end of acceleration -->"
PROBLEMS, STEPS, RATE = 2048, 120, 1e-3
ARMS = {"off": 0.0, "on": 0.5}  # weight of the reward; its cap is half of the tokens


def two_blocks(tasks: list[Sum], rng: np.random.Generator) -> list[Sum]:
    """The tasks, half of those with three or more groups to be answered in two blocks."""
    return [
        dataclasses.replace(
            task,
            split=int(rng.integers(2, len(task.groups)))
            if len(task.groups) > 2 and rng.random() < 0.5
            else 0,
        )
        for task in tasks
    ]


def make_start(home: Path, model_dir: Path, seed: int, held_out: list[Problem]) -> None:
    """Trains the Beta model on right answers in one block and in two."""
    rng = np.random.default_rng((seed, 5))
    config = dataclasses.replace(
        FIT,
        steps=STEPS,
        train=dataclasses.replace(
            FIT.train,
            optimizer=dataclasses.replace(
                FIT.train.optimizer, learning_rate=RATE, final_learning_rate=RATE / 10
            ),
        ),
    )
    model = load(model_dir, seed=seed, tags=True)
    records = []
    for task in two_blocks(draw(STEPS * config.batch, rng, held_out), rng):
        prompt = prompt_ids(model.tokenizer, task.problem)
        answer = [*model.tokenizer.encode(ideal(task)), model.tokenizer.eos_token_id]
        records.append({"prompt_len": len(prompt), "accepted": [[*prompt, *answer]]})
    trained = fit(model, make_examples(records, model.tags), config, home / "start", seed, "start")
    save(trained, home / "start" / "final")


def run_seed(seed: int, runs: Path) -> dict[str, dict[str, float]]:
    """A row for the model that both arms start from, and for each arm."""
    home, source = runs / str(seed) / "acceleration_study", runs / str(seed)
    trained_on = read_problems(source / "problems.jsonl")
    tasks = draw(PROBLEMS, np.random.default_rng((seed, 4)), trained_on)
    problems = [Problem(task.problem, task.answer) for task in tasks]
    if not (home / "start" / "final" / "config.json").exists():
        make_start(home, source / "base" / "beta" / "final", seed, problems)
    rows = {}
    for name, weight in {"start": None, **ARMS}.items():
        values = {
            "model": str(home / "start" / "final"),
            "problems": str(source / "problems.jsonl"),
            "output": str(home / name),
            "seed": seed,
            "acceleration": weight or 0.0,
        }
        changes = [f"{key}={json.dumps(value)}" for key, value in values.items()]
        config = load_config(papo.PapoConfig, "tiny_papo", changes)
        if weight is not None:
            papo.run(config)
        row, _ = measure(load(home / name / "final"), "parallel", problems, config, seed)
        rows[name] = {key: round(value, 4) for key, value in row.items()}
        print(f"seed {seed}, {name}: {rows[name]}", flush=True)
    return rows


def run(args) -> None:
    use_cache(args.runs / "compiled")
    for seed in args.seeds:
        if str(seed) not in results():
            rows = run_seed(seed, args.runs)
            record = results() | {str(seed): rows}
            RESULTS.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def results() -> dict:
    """{seed: {start, off or on: {column: value}}} of what was measured so far."""
    return json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}


def table(args) -> None:
    """Writes the table, and how the arms differ seed by seed, into docs/recipe.md."""
    found = list(results().values())
    titles = {"start": "before PAPO", "off": "PAPO", "on": "PAPO with the acceleration reward"}
    rows = []
    for name, title in titles.items():
        seeds = [seed[name] for seed in found]
        columns = (("both", 3), ("tokens", 1), ("critical_path", 1))
        rows.append([title, *(spread([row[key] for row in seeds], n) for key, n in columns)])
    paths, right = (
        [(seed["on"][key], seed["off"][key]) for seed in found] for key in ("critical_path", "both")
    )
    shorter = statistics.mean(1 - on / off for on, off in paths)
    points = 100 * statistics.mean(on - off for on, off in right)
    lines = markdown(["", "right", "tokens", "critical path"], rows)
    lines += [
        "",
        f"With the reward the critical path is {shorter:.1%} shorter than without (mean of "
        f"{len(found)} seeds), and the share of right answers differs by {points:+.1f} points.",
    ]
    replace_between(DOCS, BEGIN, END, "\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    work = verbs.add_parser("run", help="train and measure what is missing")
    work.add_argument("--runs", type=Path, default=Path("runs/recipe"))
    work.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    work.set_defaults(run=run)
    verbs.add_parser("table", help="rewrite the table in docs/recipe.md").set_defaults(run=table)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
