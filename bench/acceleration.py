"""Whether PAPO's acceleration reward shortens the critical path, on the demo's task.

    python bench/acceleration.py run --seeds 0 1 2       # minutes; resumable
    python bench/acceleration.py run --study advantages --seeds 0 1 2 3 4
    python bench/acceleration.py table                   # both tables, in docs/recipe.md

The recipe's own model has nothing to shorten: after Zero hardly an answer has two blocks where one
would do. So the recipe's Beta model, which is made where it is not there, is first trained on right
answers, half of which (of those that can be) are in two blocks, and PAPO goes on from there. Study
`acceleration`: without the reward, and with it. Study `advantages`: with ThreadWeaver's reward, and
each of PAPO's advantages. All models of a seed are measured on the same 2,048 fresh problems, one
answer each at temperature 1. Writes bench/results/STUDY.json.
"""

import dataclasses
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
import study
from recipe import DOCS, ROOT, RUN, begin, config_of, spread
from study import add_result, results
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
ADVANTAGES = ROOT / "bench" / "results" / "advantages.json"
BEGIN, END = "<!-- made by bench/acceleration.py -->", "<!-- end of acceleration -->"
BEGIN_ADVANTAGES, END_ADVANTAGES = BEGIN.replace("made", "also made"), "<!-- end of advantages -->"
PROBLEMS, STEPS, RATE = 2048, 120, 1e-3
THREADWEAVER = ("acceleration=1.0", "acceleration_cap=0.4")  # the paper's
STUDIES = {  # settings of PAPO by arm
    "acceleration": {"off": ("acceleration=0.0",), "on": ("acceleration=0.5",)},
    "advantages": {
        name: (f"advantage={name}", *THREADWEAVER) for name in ("batch_std", "mean", "group_std")
    },
}


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


def run_seed(
    seed: int, runs: Path, arms: Mapping[str, Sequence[str]]
) -> dict[str, dict[str, float]]:
    """A row for the model that all arms start from, and for each arm."""
    home, source = runs / str(seed) / "acceleration_study", runs / str(seed)
    if not (source / "base" / "beta" / "final").exists():
        begin(seed, source)
        for stage in ("zero", "beta"):
            RUN[stage](config_of(seed, "base", source, stage))
    trained_on = read_problems(source / "problems.jsonl")
    tasks = draw(PROBLEMS, np.random.default_rng((seed, 4)), trained_on)
    problems = [Problem(task.problem, task.answer) for task in tasks]
    if not (home / "start" / "final" / "config.json").exists():
        make_start(home, source / "base" / "beta" / "final", seed, problems)
    rows = {}
    for name, settings in {"start": (), **arms}.items():
        values = {
            "model": str(home / "start" / "final"),
            "problems": str(source / "problems.jsonl"),
            "output": str(home / name),
            "seed": seed,
        }
        changes = [f"{key}={json.dumps(value)}" for key, value in values.items()]
        config = load_config(papo.PapoConfig, "tiny_papo", [*changes, *settings])
        if settings:
            papo.run(config)
        row, _ = measure(load(home / name / "final"), "parallel", problems, config, seed)
        rows[name] = {key: round(value, 4) for key, value in row.items()}
        print(f"seed {seed}, {name}: {rows[name]}", flush=True)
    return rows


def run(args) -> None:
    use_cache(args.runs / "compiled")
    path = {"acceleration": RESULTS, "advantages": ADVANTAGES}[args.study]
    for seed in args.seeds:
        if str(seed) not in results(path):
            rows = run_seed(seed, args.runs, STUDIES[args.study])
            jax.clear_caches()  # or the programs of many runs come to the system's limit of maps
            add_result(path, seed, rows)


def rows_of(found: list[dict], titles: Mapping[str, str]) -> list[list[str]]:
    """The rows of a study's table, means over seeds."""
    columns = (("both", 3), ("tokens", 1), ("critical_path", 1))
    return [
        [title, *(spread([seed[name][key] for seed in found], n) for key, n in columns)]
        for name, title in titles.items()
    ]


def table(args) -> None:
    """Writes the table, and how the arms differ seed by seed, into docs/recipe.md."""
    found = list(results(RESULTS).values())
    titles = {"start": "before PAPO", "off": "PAPO", "on": "PAPO with the acceleration reward"}
    paths, right = (
        [(seed["on"][key], seed["off"][key]) for seed in found] for key in ("critical_path", "both")
    )
    shorter = statistics.mean(1 - on / off for on, off in paths)
    points = 100 * statistics.mean(on - off for on, off in right)
    lines = [
        *markdown(["", "right", "tokens", "critical path"], rows_of(found, titles)),
        "",
        f"With the reward the critical path is {shorter:.1%} shorter than without (mean of "
        f"{len(found)} seeds), and the share of right answers differs by {points:+.1f} points.",
    ]
    replace_between(DOCS, BEGIN, END, "\n".join(lines))


def advantages_table(args) -> None:
    """Writes the table of the other study, where it was made, with what its arms differ by from the
    batch's std seed by seed."""
    found = list(results(ADVANTAGES).values())
    if not found:
        return
    titles = {
        "start": "before PAPO",
        "batch_std": "the batch's std, as PAPO",
        "mean": "no std, as ThreadWeaver",
        "group_std": "each group's std, as DAPO",
    }
    rows = rows_of(found, titles)
    for name, row in zip(titles, rows, strict=True):
        pairs = [(seed[name], seed["batch_std"]) for seed in found]
        changes = (
            spread([own[key] - base[key] for own, base in pairs], n, sign="+")
            for key, n in (("both", 3), ("critical_path", 1))
        )
        row += changes if name in ("mean", "group_std") else ["", ""]
    head = [f"{len(found)} seeds", "right", "tokens", "critical path"]
    lines = markdown([*head, "right, against PAPO's", "critical path, against it"], rows)
    replace_between(DOCS, BEGIN_ADVANTAGES, END_ADVANTAGES, "\n".join(lines))


def tables(args) -> None:
    """Writes the tables of both studies."""
    table(args)
    advantages_table(args)


def main() -> None:
    """The command line."""
    studies = lambda parser: parser.add_argument(  # noqa: E731
        "--study", choices=STUDIES, default="acceleration"
    )
    study.main(__doc__, run, tables, range(3), studies)


if __name__ == "__main__":
    main()
