"""Whether a curriculum teaches the hard level of the demo's task.

    python bench/curriculum.py run --seeds 0 1 2       # minutes a seed; resumable
    python bench/curriculum.py table                   # in docs/recipe.md

Two levels: sums of two groups and of four. The recipe's seed model, which is made where it is not
there, learns the format from some scripted right answers to the easy level alone (a cold start; of
more it forgets how four groups are written). PAPO goes on from there, as many batches in each arm:
with a curriculum from easy to hard, with both levels drawn alike, and with the hard level alone.
Measured on 512 fresh problems of each level, one answer each at temperature 1. Writes
bench/results/curriculum.json.
"""

import json
from pathlib import Path

import jax
import numpy as np
import study
from recipe import DOCS, ROOT, begin, spread
from study import add_result, results
from table import markdown, replace_between

from npr_jax.base.compile_cache import use_cache
from npr_jax.base.config import load_config
from npr_jax.data.problems import Problem, read_problems
from npr_jax.demo import measure
from npr_jax.demo.sums import draw, ideal
from npr_jax.model.pretrained import load
from npr_jax.train import beta, papo

RESULTS = ROOT / "bench" / "results" / "curriculum.json"
BEGIN, END = "<!-- made by bench/curriculum.py -->", "<!-- end of curriculum -->"
EASY, HARD = 2, 4
PROBLEMS, STEPS, MEASURED = 1024, 64, 512
MOVING = STEPS * 16 // 2  # of the problems that are asked, over which the draws move
COLD = ("fit.steps=12", "fit.train.optimizer.warmup=3")
ARMS = {  # (levels, settings)
    "curriculum": ((EASY, HARD), (f"curriculum.problems={MOVING}",)),
    "alike": ((EASY, HARD), ()),
    "hard": ((HARD,), ()),
}


def run_seed(seed: int, runs: Path) -> dict[str, dict[str, float]]:
    """Right answers to each level before PAPO and after each arm."""
    source, home = runs / str(seed), runs / str(seed) / "curriculum_study"
    begin(seed, source)
    home.mkdir(exist_ok=True)
    asked = read_problems(source / "problems.jsonl")
    # So many that there are enough of a level, which is a third of them.
    taught = draw(4 * PROBLEMS, np.random.default_rng((seed, 7)))
    fresh = draw(4 * MEASURED, np.random.default_rng((seed, 8)), [*asked, *taught])
    levels = {n: [one for one in taught if one.level == n][:PROBLEMS] for n in (EASY, HARD)}
    held_out = {n: [one for one in fresh if one.level == n][:MEASURED] for n in (EASY, HARD)}

    def lines(name: str, chosen: tuple[int, ...]) -> str:
        rows = [
            {"problem": one.problem, "answer": one.answer, "level": one.level}
            | {"response": ideal(one)}
            for level in chosen
            for one in levels[level]
        ]
        path = home / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    def settings(**values) -> list[str]:
        return [f"{key}={json.dumps(value)}" for key, value in {"seed": seed, **values}.items()]

    model, easy = str(source / "seed" / "final"), lines("easy.jsonl", (EASY,))
    own = settings(model=model, problems=easy, output=str(home / "start"))
    start = beta.run(load_config(beta.BetaConfig, "tiny_cold", [*own, *COLD]))
    rows = {}
    for name, (chosen, more) in {"start": ((EASY, HARD), ()), **ARMS}.items():
        paths = {"model": str(start), "output": str(home / name)}
        problems = lines(f"{name}.jsonl", chosen)
        own = settings(problems=problems, steps=STEPS, **paths)
        config = load_config(papo.PapoConfig, "tiny_papo", [*own, *more])
        model = load(start if name == "start" else papo.run(config))
        rows[name] = {}
        for level, some in held_out.items():
            posed = [Problem(one.problem, one.answer) for one in some]
            row, _ = measure(model, "parallel", posed, config, seed)
            rows[name][str(level)] = round(row["both"], 4)
        print(f"seed {seed}, {name}: {rows[name]}", flush=True)
    return rows


def run(args) -> None:
    use_cache(args.runs / "compiled")
    for seed in args.seeds:
        if str(seed) not in results(RESULTS):
            rows = run_seed(seed, args.runs)
            jax.clear_caches()  # or the programs of many runs come to the system's limit of maps
            add_result(RESULTS, seed, rows)


def table(args) -> None:
    """Writes the table into docs/recipe.md."""
    found = list(results(RESULTS).values())
    if not found:
        raise SystemExit(f"{RESULTS} has no seed: run first")
    titles = {
        "start": "before PAPO",
        "curriculum": "from easy to hard",
        "alike": "both levels alike",
        "hard": "the hard level alone",
    }
    rows = [
        [title, *(spread([seed[name][level] for seed in found], 3) for level in ("2", "4"))]
        for name, title in titles.items()
    ]
    head = [f"seeds: {len(found)}", "right, two groups", "right, four groups"]
    replace_between(DOCS, BEGIN, END, "\n".join(markdown(head, rows)))


def main() -> None:
    """The command line."""
    study.main(__doc__, run, table, range(3))


if __name__ == "__main__":
    main()
