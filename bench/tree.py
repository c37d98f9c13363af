"""Times the parser on 32,768 tokens: plain text, 1,000 blocks, 4,096 blocks, nothing but tags.

    python bench/tree.py

Writes bench/results/tree.json: the median of 21 runs in milliseconds, and the slowest.
"""

import datetime
import json
import platform
import statistics
import time
from pathlib import Path

from npr_jax.model.tokenizer import demo_tokenizer
from npr_jax.tree import TagIds, TraceError, parse

LENGTH, RUNS = 32768, 21


def main() -> None:
    tokenizer = demo_tokenizer()
    tags = TagIds.from_tokenizer(tokenizer)
    text = tokenizer.convert_tokens_to_ids("S")
    plan = [tags.plan_open, text, tags.plan_close]
    step = [tags.step_open, text, tags.step_close]
    block = [tags.guideline_open, *plan, tags.guideline_close, *step]
    block += [tags.takeaway_open, text, tags.takeaway_close]
    wide = [tags.guideline_open, *plan * 3, tags.guideline_close, *step * 3]
    wide += [tags.takeaway_open, text, tags.takeaway_close]
    many = LENGTH // len(block)
    cases = {  # name: (tokens, what fills the rest)
        "plain text": ([], text),
        "1,000 blocks of 3 steps": (wide * 1000, text),
        f"{many:,} blocks of 1 step": (block * many, text),
        "nothing but <guideline>": ([], tags.guideline_open),
        "nothing but plans": ([tags.guideline_open, *plan[::2] * (LENGTH // 2 - 1)], plan[0]),
    }
    results = {}
    for name, (tokens, filler) in cases.items():
        tokens = tokens + [filler] * (LENGTH - len(tokens))
        times = []
        for _ in range(RUNS):
            begun = time.perf_counter()
            try:
                found = f"{parse(tokens, 0, tags).num_branches} branches"
            except TraceError as error:
                found = f"malformed at token {error.index}"
            times.append(1e3 * (time.perf_counter() - begun))
        results[name] = {
            "median_ms": round(statistics.median(times), 2),
            "slowest_ms": round(max(times), 2),
            "found": found,
        }
        print(name, results[name], flush=True)
    record = {
        "date": datetime.date.today().isoformat(),
        "platform": platform.platform(),
        "tokens": LENGTH,
        "results": results,
    }
    path = Path(__file__).parent / "results" / "tree.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
