"""Times the engine where it has less to do than it was made for, by turns with one made to measure.

    python bench/loads.py --case narrow table prompt shared occupancy host sampling

narrow: one request on an engine of 64 lanes, against an engine of 1.
table: the default `table_pages` with a pool of 8,000 pages, against a table as long as needed.
prompt: a lone prompt of 2,049 tokens at the default shape of prefill, against several others.
shared: n answers to one long prompt, which is cached: 65 tokens each, the prompt's pages read once
for up to eight of them, against each answer reading all of its own.
occupancy: the part of the computed rows that drew a token, on a load of short lines.
host: the host's microseconds a visit with 16 and 64 lanes.
sampling: a draw from the logits of 16 lanes over 151,936 tokens, with filters against without.

Every engine is warmed up, and one round goes uncounted. Prints one JSON line per case, with seconds
where nothing else is said, and writes bench/results/loads.json; ratios are of medians.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import time
from pathlib import Path

import jax
import numpy as np
from models import SHAPES, make_model

from npr_jax import Engine, EngineConfig, SamplingParams
from npr_jax.decode import tables
from npr_jax.decode.sampling import LaneSampling, sample

MODEL = "tiny"
PAGE = 16
GREEDY = dict(temperature=0, parallel=False)


def prompts_of(count: int, length: int) -> list[list[int]]:
    """Random ids, no tags."""
    rng = np.random.default_rng(0)
    return rng.integers(20, SHAPES[MODEL]["vocab"], (count, length)).tolist()


def engine_of(**sizes) -> Engine:
    """An engine whose programs are compiled."""
    engine = Engine(make_model(MODEL), EngineConfig(page_size=PAGE, **sizes))
    engine.warmup()
    return engine


def seconds_of(engine: Engine, prompts, tokens: int) -> float:
    """Of one greedy answer of `tokens` tokens to each prompt, with nothing cached."""
    engine.drop_prefix_cache()
    begun = time.perf_counter()
    engine.generate(prompts, SamplingParams(max_tokens=tokens, **GREEDY))
    return time.perf_counter() - begun


def by_turns(engines: dict[str, Engine], prompts, tokens: int, rounds: int) -> dict:
    """Median seconds of each engine, and best and worst as `spread`."""
    found = {name: [] for name in engines}
    for number in range(rounds + 1):
        for name, engine in engines.items():
            seconds = seconds_of(engine, prompts, tokens)
            if number:
                found[name].append(seconds)
    spread = {name: [round(min(s), 4), round(max(s), 4)] for name, s in found.items()}
    medians = {name: round(statistics.median(seconds), 4) for name, seconds in found.items()}
    return medians | {"spread": spread}


def narrow(rounds: int) -> dict:
    """One prompt of 32 tokens, 200 new ones."""
    sizes = dict(pages=64 * 20, table_pages=20)
    engines = {"64 lanes": engine_of(lanes=64, **sizes), "1 lane": engine_of(lanes=1, **sizes)}
    found = by_turns(engines, prompts_of(1, 32), 200, rounds)
    return found | {"ratio": round(found["64 lanes"] / found["1 lane"], 3)}


def table(rounds: int) -> dict:
    """64 prompts of 32 tokens, 128 new ones each."""
    engines = {
        "default": engine_of(lanes=64, pages=8000),
        "as needed": engine_of(lanes=64, pages=8000, table_pages=12),
    }
    found = by_turns(engines, prompts_of(64, 32), 128, rounds)
    return found | {"ratio": round(found["default"] / found["as needed"], 3)}


def prompt(rounds: int) -> dict:
    """Prefill alone: one new token."""
    sizes = dict(lanes=16, pages=512)
    shapes = [(4, 128), (1, 512), (2, 256), (1, 256), (1, 1024)]
    engines = {
        f"{rows} x {chunk}": engine_of(**sizes, prefill_rows=rows, prefill_chunk=chunk)
        for rows, chunk in shapes
    }
    found = by_turns(engines, prompts_of(1, 2049), 1, rounds)
    return found | {"ratio": round(found["4 x 128"] / min(found[name] for name in engines), 3)}


def shared(rounds: int) -> dict:
    """Five answers behind 8,192 tokens, 16 behind 4,096."""
    found = {}
    for count, length in ((5, 8192), (16, 4096)):
        prompt, sampling = prompts_of(1, length), SamplingParams(n=count, max_tokens=65, **GREEDY)
        pages = length // PAGE + 8 * count
        engines = {
            name: engine_of(lanes=count, pages=pages, table_pages=pages - 1)
            for name in ("together", "alone")
        }
        times = {name: [] for name in engines}
        for number in range(rounds + 1):
            for name, engine in engines.items():
                worth, tables._WORTH = tables._WORTH, 1 << 30 if name == "alone" else tables._WORTH
                begun = time.perf_counter()
                engine.generate(prompt, sampling)
                tables._WORTH = worth
                if number:
                    times[name].append(time.perf_counter() - begun)
        medians = {name: statistics.median(some) for name, some in times.items()}
        found[f"{count} behind {length}"] = {n: round(s, 4) for n, s in medians.items()} | {
            "ratio": round(medians["alone"] / medians["together"], 2)
        }
    return found


def occupancy(rounds: int) -> dict:
    """240 lines of 3 to 24 tokens on 16 lanes, which says the same in every round."""
    found = {}
    for steps in (1, 16, 64):
        engine = engine_of(lanes=16, pages=512, table_pages=8, steps=steps)
        lengths = np.random.default_rng(0).integers(3, 25, 240).tolist()
        for prompt, tokens in zip(prompts_of(240, 12), lengths, strict=True):
            engine.submit([prompt], SamplingParams(max_tokens=tokens, **GREEDY))
        list(engine.stream(tokens=False))
        found[f"{steps} steps"] = round(engine.stats()["occupancy"], 3)
    return found


def host(rounds: int) -> dict:
    """As many prompts of 32 tokens as lanes, 128 new ones each."""
    found = {}
    for lanes in (16, 64):
        engine = engine_of(lanes=lanes, pages=lanes * 20, table_pages=20)
        prompts = prompts_of(lanes, 32)
        seconds_of(engine, prompts, 128)
        times = []
        for _ in range(rounds):
            before = engine.stats()
            seconds_of(engine, prompts, 128)
            after = engine.stats()
            totals = [s["host_us_per_visit"] * s["visits"] for s in (before, after)]
            times.append((totals[1] - totals[0]) / (after["visits"] - before["visits"]))
        found[f"{lanes} lanes, us a visit"] = round(statistics.median(times))
    return found


def sampling(rounds: int) -> dict:
    """Filters against a draw without any."""
    num, vocab = 16, 151_936
    rng = np.random.default_rng(0)
    logits = jax.numpy.asarray(3 * rng.standard_normal((num, vocab), np.float32))
    positions = jax.numpy.arange(num, dtype=np.int32)
    given = jax.numpy.full(num, -1, np.int32)
    key = rng.integers(0, 2**32, (num, 2), dtype=np.uint32)

    def knobs(top_p: float = 1, top_k: int = 0) -> LaneSampling:
        ones, none = np.ones(num, np.float32), np.zeros(num, np.int32)
        return LaneSampling(
            key=key,
            temperature=ones,
            top_p=ones * np.float32(top_p),
            top_k=none + np.int32(top_k),
            min_p=0 * ones,
            penalty=ones,
            presence=0 * ones,
            frequency=0 * ones,
            stops=np.full((num, 1), -1, np.int32),
            ends=none,
            ends_from=none,
        )

    def seen():
        return jax.numpy.zeros((num, vocab), np.uint16)

    draw = jax.jit(lambda logits, lanes: sample(logits, positions, given, lanes, seen))
    cases = {"plain": knobs(), "top_p": knobs(0.95), "top_k": knobs(1, 50), "both": knobs(0.95, 50)}
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(rounds + 1):
        for name, lanes in cases.items():
            begun = time.perf_counter()
            jax.block_until_ready(draw(logits, lanes))
            if number:
                seconds[name].append(time.perf_counter() - begun)
    median = {name: statistics.median(some) for name, some in seconds.items()}
    return {
        "ms": {name: round(1e3 * some, 1) for name, some in median.items()},
        "ratio": {name: round(some / median["plain"], 2) for name, some in median.items()},
    }


CASES = {f.__name__: f for f in (narrow, table, prompt, shared, occupancy, host, sampling)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", default="loads.json", help="in bench/results")
    args = parser.parse_args()
    path = Path(__file__).parent / "results" / args.output
    record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for case in args.case:
        found = {"case": case, "rounds": args.rounds} | CASES[case](args.rounds)
        found |= {
            "model": MODEL,
            "device": jax.devices()[0].device_kind,
            "machine": platform.machine(),
            "cores": len(os.sched_getaffinity(0)),
            "jax": jax.__version__,
            "date": datetime.date.today().isoformat(),
        }
        print(json.dumps(found), flush=True)
        record[case] = found
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
