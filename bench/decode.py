"""Times greedy decoding: a prompt of 128 tokens each, 128 new ones, at some batch sizes.

    python bench/decode.py --model tiny --batch 1 16 64

Prints one JSON line per batch: tokens/s of the whole call (prefill and decoding) after warm-up,
median, best and worst of the runs; the same without the prefill; seconds of compilation; peak
memory; and what the host cost. The prefix cache is emptied before every run.
"""

import argparse
import datetime
import json
import os
import platform
import resource
import statistics
import time

import jax
import numpy as np
from models import SHAPES, make_model

from npr_jax import Engine, EngineConfig, SamplingParams

PROMPT, NEW, PAGE = 128, 128, 16


def run(name: str, batch: int, dtype: str, repeats: int, steps: int) -> dict:
    """One line of results."""
    model = make_model(name, dtype, max_position=1024)
    table = (PROMPT + NEW) // PAGE + 2
    engine = Engine(
        model,
        EngineConfig(
            lanes=batch,
            pages=1 + batch * table,
            page_size=PAGE,
            table_pages=table,
            steps=steps,
            prefill_rows=min(batch, 8),
            prefill_chunk=PROMPT,
        ),
    )
    prompts = np.random.default_rng(0).integers(20, SHAPES[name]["vocab"], (batch, PROMPT))
    compiled = engine.warmup()["seconds"]

    def timed(tokens: int) -> float:
        sampling = SamplingParams(temperature=0, max_tokens=tokens, parallel=False)
        engine.drop_prefix_cache()
        begun = time.perf_counter()
        answers = engine.generate(prompts, sampling)
        seconds = time.perf_counter() - begun
        assert all(len(answer.response_ids) == tokens for answer in answers)
        return seconds

    timed(NEW)
    before = engine.stats()
    whole = [timed(NEW) for _ in range(repeats)]
    after = engine.stats()
    first = statistics.median(timed(1) for _ in range(min(repeats, 3)))
    visits = after["visits"] - before["visits"]
    seconds = after["seconds"] - before["seconds"]
    middle = statistics.median(whole)

    def per_visit(figure: str, weight: str) -> float:
        total = [stats[figure] * stats[weight] for stats in (before, after)]
        return total[1] - total[0]

    return {
        "peer": "npr_jax",
        "model": name,
        "dtype": dtype,
        "batch": batch,
        "tokens_per_s": {
            "median": round(batch * NEW / middle, 1),
            "best": round(batch * NEW / min(whole), 1),
            "worst": round(batch * NEW / max(whole), 1),
            "n": len(whole),
        },
        "decode_tokens_per_s": round(batch * (NEW - 1) / (middle - first), 1),
        "prefill_s": round(first, 4),
        "compile_s": round(compiled, 2),
        "peak_rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "visits_per_token": round(visits / (repeats * batch * NEW), 6),
        "host_us_per_visit": round(per_visit("host_us_per_visit", "visits") / visits, 1),
        "device_wait_share": round(per_visit("device_wait_share", "seconds") / seconds, 4),
        "steps": steps,
        "device": jax.devices()[0].device_kind,
        "machine": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "jax": jax.__version__,
        "date": datetime.date.today().isoformat(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=SHAPES, default="tiny")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=64, help="decode steps per host visit")
    args = parser.parse_args()
    for batch in args.batch:
        print(json.dumps(run(args.model, batch, args.dtype, args.repeats, args.steps)), flush=True)


if __name__ == "__main__":
    main()
