"""Replays one trace with real branches and as one line of text: what parallel decoding gains.

    python bench/speedup.py

The ids are given, so both sides compute exactly the same tokens, one step each. The ideal is total
tokens over critical path. Batch 1: one answer at a time, in an engine with one lane per branch
against an engine with one lane. Writes bench/results/speedup.json.
"""

import argparse
import datetime
import json
import os
import statistics
import time
from pathlib import Path

import jax
import numpy as np
from models import SHAPES, TAGS, make_model

from npr_jax import Engine, EngineConfig
from npr_jax.tree import TagIds

PROMPT, PLAN, TAKEAWAY, PAGE = 64, 7, 17, 16
CASES = [("tiny", width, length) for length in (256, 1024) for width in (1, 2, 3, 4, 5)]
CASES += [("mid", width, 256) for width in (3,)]


def trace(tags: TagIds, words: range, width: int, length: int) -> list[int]:
    """A prompt, and a block of `width` steps of `length` tokens each, of random ids of `words`."""
    rng = np.random.default_rng(0)
    text = iter(rng.integers(words.start, words.stop, 100_000).tolist())

    def some(count: int) -> list[int]:
        return [next(text) for _ in range(count)]

    ids = [*some(PROMPT), tags.guideline_open]
    for _ in range(width):
        ids += [tags.plan_open, *some(PLAN), tags.plan_close]
    ids.append(tags.guideline_close)
    for number in range(width):
        head = tags.step_headers[number]
        ids += [*head, *some(length - len(head) - 1), tags.step_close]
    return [*ids, *tags.takeaway_header, *some(TAKEAWAY), tags.takeaway_close]


def engine_of(model, lanes: int, entries: int) -> Engine:
    pages = entries // PAGE + 8 * lanes + 8
    config = EngineConfig(
        lanes=lanes, pages=pages + 1, page_size=PAGE, table_pages=pages, steps=32, header_rows=8
    )
    made = Engine(model, config)
    made.warmup()
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    repeats, rows = parser.parse_args().repeats, []
    for name, width, length in CASES:
        words = range(20, SHAPES[name]["vocab"])
        model, ids = make_model(name), trace(TAGS, words, width, length)
        sides = {
            "parallel": engine_of(model, width, len(ids)),
            "sequential": engine_of(model, 1, len(ids)),
        }
        times: dict[str, list[float]] = {side: [] for side in sides}
        for number in range((1 if name == "mid" else repeats) + 1):
            for side, made in sides.items():  # by turns
                made.drop_prefix_cache()
                begun = time.perf_counter()
                (answer,) = made.replay([(ids, PROMPT)], parallel=side == "parallel")
                if number:
                    times[side].append(time.perf_counter() - begun)
                if side == "parallel":
                    tree = answer.layout
        parallel, sequential = (statistics.median(times[side]) for side in sides)
        ideal = tree.total_len / tree.critical_path_len
        rows.append(
            {
                "model": name,
                "width": width,
                "branch_tokens": length,
                "tokens": tree.total_len,
                "critical_path": tree.critical_path_len,
                "parallel_s": round(parallel, 3),
                "sequential_s": round(sequential, 3),
                "parallel_tokens_per_s": round(tree.total_len / parallel, 1),
                "sequential_tokens_per_s": round(tree.total_len / sequential, 1),
                "speedup": round(sequential / parallel, 2),
                "ideal": round(ideal, 2),
                "share_of_ideal": round(sequential / parallel / ideal, 2),
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    record = {
        "date": datetime.date.today().isoformat(),
        "device": jax.devices()[0].device_kind,
        "cores": len(os.sched_getaffinity(0)),
        "jax": jax.__version__,
        "rows": rows,
    }
    path = Path(__file__).parent / "results" / "speedup.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
