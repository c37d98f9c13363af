"""Times what the host does for a fork and for a join, behind a prefix of 1k and of 16k tokens.

    python bench/fork.py

A fork: the branches' lines are made and seated, and their tables written; a join: the trunk's line
goes on with all that it sees. Writes bench/results/fork.json: medians in microseconds.
"""

import datetime
import json
import statistics
import time
from pathlib import Path

import numpy as np
from models import make_model
from speedup import trace

from npr_jax import Engine, EngineConfig

PREFIXES, WIDTH, ROUNDS = (1024, 16384), 4, 40


def measure(prefix: int) -> dict[str, float]:
    """Median microseconds of a fork and a join, over answers one after another."""
    ids = trace("tiny", WIDTH, 16)
    prompt = np.random.default_rng(1).integers(20, 500, prefix).tolist()
    config = EngineConfig(
        lanes=WIDTH, pages=prefix // 16 + 200, page_size=16, steps=16, prefill_chunk=512
    )
    engine = Engine(make_model("tiny"), config)
    spent: dict[str, float] = {}

    def timed(owner, name: str, kind):
        """Adds what a method takes to `spent[kind(its arguments)]`."""
        method = getattr(owner, name)

        def wrapped(*args):
            begun = time.perf_counter()
            result = method(*args)
            key = kind(*args)
            spent[key] = spent.get(key, 0.0) + time.perf_counter() - begun
            return result

        setattr(owner, name, wrapped)

    timed(engine._replay, "_wait", lambda *_: "fork_us")
    timed(engine._replay, "_join", lambda *_: "join_us")
    # A branch is bound after a fork, the trunk after a join; before that it is a new request.
    timed(
        engine.runner._lanes,
        "_bind",
        lambda _, s: "fork_us" if s.depth else "join_us" if len(s.items) > 2 else "new_us",
    )
    rounds: list[dict[str, float]] = []
    for _ in range(ROUNDS):
        spent.clear()
        engine.replay([(prompt + ids, len(prompt) + 64)])
        rounds.append(dict(spent))
    return {
        kind: round(1e6 * statistics.median(one[kind] for one in rounds), 1)
        for kind in ("fork_us", "join_us")
    }


def main() -> None:
    found = {str(prefix): measure(prefix) for prefix in PREFIXES}
    short, long = (found[str(prefix)] for prefix in PREFIXES)
    ratios = {name: round(long[name] / short[name], 2) for name in short}
    record = {
        "date": datetime.date.today().isoformat(),
        "width": WIDTH,
        "prefix_tokens": found,
        "ratio": ratios,
    }
    path = Path(__file__).parent / "results" / "fork.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
