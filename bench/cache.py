"""What smaller pages cost: the demo's accuracy, and the log-probs of given tokens.

    npr-jax demo --output runs/demo
    python bench/cache.py --run runs/demo

Answers the demo's problems in parallel with pages of each `cache_dtype`, and replays the answers of
float32 pages with the others. Prints one JSON line for each, and writes bench/results/cache.json.
"""

import argparse
import dataclasses
import datetime
import json
from pathlib import Path

import jax
import numpy as np

from npr_jax import Engine, EngineConfig, load
from npr_jax.data.problems import Problem
from npr_jax.data.prompts import prompt_ids
from npr_jax.demo import EVAL_PROBLEMS
from npr_jax.demo.sums import draw
from npr_jax.demo.table import evaluate

DTYPES = ("float32", "bfloat16", "int8")
SIZES = EngineConfig(lanes=64, pages=4096, page_size=16, table_pages=64)
REPLAYED, SEED, TOKENS = 64, 0, 320


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--run", type=Path, required=True, help="of the demo, seed 0")
    parser.add_argument("--stage", default="papo", choices=["seed", "zero", "beta", "papo"])
    args = parser.parse_args()
    model = load(args.run / args.stage / "final")
    tasks = draw(EVAL_PROBLEMS, np.random.default_rng((SEED, 2)))
    problems = [Problem(task.problem, task.answer) for task in tasks]
    prompts = [prompt_ids(model.tokenizer, problem.problem) for problem in problems]
    rows, answers, raw = [], [], None
    for dtype in DTYPES:
        engine = Engine(model, dataclasses.replace(SIZES, cache_dtype=dtype))
        row, found = evaluate(engine, problems, prompts, True, TOKENS, SEED)
        answers = answers or [answer.trajectory for answer in found[:REPLAYED]]
        replayed = engine.replay(answers)
        drawn = [~a.forced & (np.arange(len(a.token_ids)) >= a.prompt_len) for a in replayed]
        logp = np.concatenate([a.logp[d] for a, d in zip(replayed, drawn, strict=True)])
        raw = logp if raw is None else raw
        pool = jax.tree.leaves(engine.runner._pool)
        rows.append(
            {
                "cache_dtype": dtype,
                "bytes_per_token": sum(x.nbytes for x in pool) // (SIZES.pages * SIZES.page_size),
                "accuracy": round(row["accuracy"], 4),
                "format": round(row["format"], 4),
                "tokens_replayed": len(logp),
                "logp_mean_abs": float(f"{np.abs(logp - raw).mean():.2e}"),
                "logp_max_abs": float(f"{np.abs(logp - raw).max():.2e}"),
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    record = {
        "date": datetime.date.today().isoformat(),
        "stage": args.stage,
        "problems": EVAL_PROBLEMS,
        "jax": jax.__version__,
        "rows": rows,
    }
    path = Path(__file__).parent / "results" / "cache.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
