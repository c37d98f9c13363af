"""Real branches of a real model on this machine: SmolLM2-135M, one answer at a time.

    make build/smollm2/model.safetensors     # once; its own virtual environment
    python bench/laptop.py [--repeats N] [--widths 2 3 4 5] [--tokens 128]

As bench/speedup.py: the ids are given, and the same ones are decoded with one lane per branch and,
by turns, as one line of text, float32 on both sides; the texts are random ids. One token at a time
is bound by the memory's bandwidth: a step reads every weight, and five rows read them once. So the
bound is n t(1) / t(n), of a step of 1 and of n rows with hardly any keys to see, measured in the
same turns: what would be gained if nothing but that step were done. `ideal` is total tokens over
the critical path. Writes bench/results/laptop.json.
"""

import argparse
import dataclasses
import datetime
import json
import os
import platform
import statistics
import time
from pathlib import Path

import jax
from speedup import PROMPT, engine_of, trace

import npr_jax
from npr_jax import Engine, SamplingParams
from npr_jax.base.compile_cache import use_cache

ROOT = Path(__file__).parents[1]
WORDS = range(1000, 40_000)  # ids of the model's own text
STEPS = 64  # decode steps of which the time of one is the mean


def replay(engine: Engine, ids: list[int], parallel: bool) -> float:
    engine.drop_prefix_cache()
    begun = time.perf_counter()
    (answer,) = engine.replay([(ids, PROMPT)], parallel=parallel)
    seconds = time.perf_counter() - begun
    assert answer.token_ids[-1] == ids[-1]
    return seconds


def step(engine: Engine, rows: int) -> float:
    """Seconds of a decode step of that many lines, as the difference of two lengths."""
    seconds = []
    for tokens in (STEPS // 2, STEPS + STEPS // 2):
        engine.drop_prefix_cache()
        prompts = [[1000 + row, 1001, 1002] for row in range(rows)]
        sampling = SamplingParams(temperature=0, parallel=False, max_tokens=tokens)
        begun = time.perf_counter()
        answers = engine.generate(prompts, sampling)
        seconds.append(time.perf_counter() - begun)
        assert all(len(a.token_ids) == len(prompts[0]) + tokens for a in answers)
    return (seconds[1] - seconds[0]) / STEPS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, default=ROOT / "build" / "smollm2")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--widths", type=int, nargs="+", default=[2, 3, 4, 5])
    parser.add_argument("--tokens", type=int, default=128, help="of a branch")
    args = parser.parse_args()
    use_cache(ROOT / "build" / "compiled")
    model = npr_jax.load(args.model, tags=True)
    # No end of text, so that every line is as long as it is asked to be.
    config = dataclasses.replace(model.config, eos_token_ids=())
    model = dataclasses.replace(model, config=config)
    longest = trace(model.tags, WORDS, max(args.widths), args.tokens)
    one = engine_of(model, 1, len(longest))
    rows = []
    for width in args.widths:
        ids = trace(model.tags, WORDS, width, args.tokens)
        several = engine_of(model, width, len(ids))
        (answer,) = several.replay([(ids, PROMPT)])
        tree = answer.layout
        assert tree.num_branches == width
        times: dict[str, list[float]] = {n: [] for n in ("text", "branches", "step_1", "step_n")}
        for number in range(args.repeats + 1):  # by turns; the first does not count
            found = {
                "text": replay(one, ids, False),
                "branches": replay(several, ids, True),
                "step_1": step(one, 1),
                "step_n": step(several, width),
            }
            if number:
                for name, seconds in found.items():
                    times[name].append(seconds)
        median = {name: statistics.median(seconds) for name, seconds in times.items()}
        gain = median["text"] / median["branches"]
        bound = width * median["step_1"] / median["step_n"]
        rows.append(
            {
                "width": width,
                "tokens": tree.total_len,
                "critical_path": tree.critical_path_len,
                "text_s": round(median["text"], 3),
                "branches_s": round(median["branches"], 3),
                "speedup": round(gain, 2),
                "step_1_ms": round(1e3 * median["step_1"], 2),
                "step_n_ms": round(1e3 * median["step_n"], 2),
                "bound": round(bound, 2),
                "share_of_bound": round(gain / bound, 3),
                "ideal": round(tree.total_len / tree.critical_path_len, 2),
                "spread": {n: [round(min(s), 4), round(max(s), 4)] for n, s in times.items()},
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    record = {
        "date": datetime.date.today().isoformat(),
        "model": "SmolLM2-135M",
        "branch_tokens": args.tokens,
        "repeats": args.repeats,
        "device": jax.devices()[0].device_kind,
        "machine": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "jax": jax.__version__,
        "rows": rows,
    }
    path = ROOT / "bench" / "results" / "laptop.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
