"""Compares the trainer's log-probs of exact mode with the engine's, bit by bit, and times the mode.

    python bench/exact.py --tokens 100000

branches, lines: random answers, with nested blocks and without, replayed by engines of several
shapes (lanes, chunks, pages and too few of them) and scored in packed rows of groups, until there
are `--tokens` of each dtype. The default mode does the same, for comparison.
decode: seconds of greedy decoding at 1, 16 and 64 lanes, over those of the default.
train: seconds of an optimizer step, forward and backward, over those of the default.

Timed are both modes by turns, and one round goes uncounted. Prints one JSON line per case (`case`,
`tokens`, how many are `equal`, `max_abs`, the largest difference, and `slowdown`, of medians), and
writes bench/results/exact.json.
"""

import argparse
import datetime
import functools
import itertools
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
from models import SHAPES, TAGS, make_model

from npr_jax import Engine, EngineConfig, SamplingParams
from npr_jax.decode import Trajectory
from npr_jax.model import token_logp
from npr_jax.train.objective import Objective
from npr_jax.train.optimizer import OptimizerConfig, new_state
from npr_jax.train.packing import Example, Row, loss_mask, make_rows
from npr_jax.train.step import TrainConfig, optimize

ENGINES = (
    dict(lanes=16),
    dict(lanes=64, steps=64),
    dict(lanes=5, prefill_rows=2, prefill_chunk=32),
    dict(lanes=16, page_size=8, pages=180),
    dict(lanes=1, header_rows=1, header_chunk=1),
)
ROW_LEN, DEPTH, SAMPLES = 1024, 6, 3
EXACT, DEFAULT = "exact", "default"


def words(rng: np.random.Generator, most: int) -> list[int]:
    """Up to `most` ids, no tags."""
    return rng.integers(20, SHAPES["tiny"]["vocab"], rng.integers(0, most + 1)).tolist()


def block(rng: np.random.Generator, deeper: int) -> list[int]:
    """A block of 1 to 4 branches, with blocks inside for `deeper` levels."""
    num = int(rng.integers(1, 5))
    plans = [[TAGS.plan_open, 8 + i, *words(rng, 6), TAGS.plan_close] for i in range(num)]
    steps = []
    for i in range(num):
        inner = block(rng, deeper - 1) if deeper and rng.random() < 0.4 else []
        steps += [*TAGS.step_headers[i], *words(rng, 40), *inner, *words(rng, 10), TAGS.step_close]
    takeaway = [*TAGS.takeaway_header, *words(rng, 30), TAGS.takeaway_close]
    return [TAGS.guideline_open, *itertools.chain(*plans), TAGS.guideline_close, *steps, *takeaway]


def answer(rng: np.random.Generator, branches: bool) -> list[int]:
    """A random response of one token or more."""
    while True:
        ids = [20, *words(rng, 20)]
        for _ in range(rng.integers(1, 4)):
            ids += (block(rng, 2) if branches else words(rng, 150)) + words(rng, 20)
        if len(ids) < ROW_LEN - 200:
            return ids


def groups(rng: np.random.Generator, branches: bool, number: int) -> list[tuple[list[int], int]]:
    """(ids, prompt length) of `SAMPLES` answers to each of `number` prompts."""
    prompts = [[20, *words(rng, 180)] for _ in range(number)]
    every = itertools.product(prompts, range(SAMPLES))
    return [([*prompt, *answer(rng, branches)], len(prompt)) for prompt, _ in every]


def rows_of(answers: list[Trajectory]) -> list[Row]:
    """Packed rows of answers, groups behind their prompt."""
    examples = [
        Example(a.token_ids, a.layout, loss_mask(a.layout), float(i % SAMPLES), a.logp)
        for i, a in enumerate(answers)
    ]
    found = [examples[i : i + SAMPLES] for i in range(0, len(examples), SAMPLES)]
    return make_rows(found, ROW_LEN, DEPTH)


@functools.partial(jax.jit, static_argnums=(0, 3))
def score(config, params, rows: dict, exact: bool):
    """Log-probs f32[B, T] of rows."""
    layout = (rows[name] for name in ("tokens", "positions", "hidden", "pred"))
    return token_logp(config, params, *layout, exact=exact)


def equality(model, mode: str, branches: bool, tokens: int) -> dict:
    """Bits of `tokens` tokens at least."""
    rng, total, equal, most = np.random.default_rng(0), 0, 0, 0.0
    engines: list[Engine] = []
    for sizes in ENGINES:
        config = EngineConfig(**{"pages": 4000, **sizes}, exact=mode == EXACT)
        engines.append(Engine(model, config))
    turn: Iterator[Engine] = itertools.cycle(engines)
    while total < tokens:
        rows = rows_of(next(turn).replay(groups(rng, branches, 12), parallel=branches))
        rows += [rows[0]] * (len(rows) % 2)
        for first in range(0, len(rows), 2):
            some = {
                name: np.stack([row[name] for row in rows[first : first + 2]]) for name in rows[0]
            }
            logp = np.asarray(score(model.config, model.params, some, mode == EXACT))
            got, wanted = logp[some["loss_mask"]], some["old_logp"][some["loss_mask"]]
            total, equal = total + len(got), equal + int((got == wanted).sum())
            most = max(most, float(np.abs(got - wanted).max(initial=0)))
    preempted = sum(engine.stats()["preemptions"] for engine in engines)
    return {
        "tokens": total,
        "equal": equal,
        "max_abs": most,
        "slowdown": None,
        "preempted": preempted,
    }


def by_turns(calls: dict[str, Callable[[], object]], rounds: int) -> dict:
    """Median seconds of both, best and worst as `spread`, and their ratio as `slowdown`; that of
    the best, and that of the processors' time, on which neighbours tell less."""
    found, busy = ({name: [] for name in calls} for _ in range(2))
    for number in range(rounds + 1):
        for name, call in calls.items():
            begun, used = time.perf_counter(), time.process_time()
            call()
            if number:
                found[name].append(time.perf_counter() - begun)
                busy[name].append(time.process_time() - used)
    medians = {name: statistics.median(seconds) for name, seconds in found.items()}
    cpu = {name: statistics.median(seconds) for name, seconds in busy.items()}
    best = {name: min(seconds) for name, seconds in found.items()}
    return {
        "slowdown": round(medians[EXACT] / medians[DEFAULT], 3),
        "slowdown_of_best": round(best[EXACT] / best[DEFAULT], 3),
        "slowdown_of_cpu": round(cpu[EXACT] / cpu[DEFAULT], 3),
        "seconds": {name: round(seconds, 4) for name, seconds in medians.items()},
        "spread": {name: [round(min(s), 4), round(max(s), 4)] for name, s in found.items()},
    }


def decode(model, lanes: int, rounds: int) -> dict:
    """As many prompts of 256 tokens as lanes, 128 new ones each."""
    rng = np.random.default_rng(0)
    prompts = rng.integers(20, SHAPES["tiny"]["vocab"], (lanes, 256)).tolist()
    knobs = SamplingParams(temperature=0, parallel=False, max_tokens=128)

    def call(mode: str) -> Callable[[], object]:
        sizes = dict(lanes=lanes, pages=64 * 26, table_pages=26)
        engine = Engine(model, EngineConfig(**sizes, exact=mode == EXACT))
        engine.warmup()

        def run():
            engine.drop_prefix_cache()
            engine.generate(prompts, knobs)

        return run

    found = by_turns({mode: call(mode) for mode in (DEFAULT, EXACT)}, rounds)
    return {"tokens": 128 * lanes, "equal": None, "max_abs": None, **found}


def train(model, dtype: str, rounds: int) -> dict:
    """A step over four rows of answers with branches."""
    engine = Engine(model, EngineConfig(lanes=16, pages=2000, exact=True))
    rows = rows_of(engine.replay(groups(np.random.default_rng(0), True, 8)))[:4]
    mask = sum(int(row["loss_mask"].sum()) for row in rows)
    gaps = {}

    def call(mode: str) -> Callable[[], object]:
        config = TrainConfig(
            OptimizerConfig(1e-9), ROW_LEN, compute_dtype=dtype, exact=mode == EXACT
        )
        copy = jax.tree.map(lambda x: np.asarray(x, np.float32), model.params)
        state = [new_state(copy, config.optimizer, None)]

        def run():
            arch = config.model(model.config)
            state[0], found = optimize(state[0], rows, arch, config, Objective("papo"), 0.0)
            gaps[mode] = found["logp_gap_max"]

        return run

    found = by_turns({mode: call(mode) for mode in (DEFAULT, EXACT)}, rounds)
    equal = mask if gaps[EXACT] == 0 else None
    return {"tokens": mask, "equal": equal, "max_abs": gaps[EXACT], **found, "gaps": gaps}


CASES = ("branches", "lines", "decode", "train")


def cases(args: argparse.Namespace) -> Iterator[tuple[str, dict]]:
    """Every case that is wanted by its name, and what was found."""
    for dtype, case in itertools.product(args.dtype, args.case):
        model = make_model("tiny", dtype)
        if case == "decode":
            for lanes in (1, 16, 64):
                yield f"decode {lanes}, {dtype}", decode(model, lanes, args.rounds)
        elif case == "train":
            yield f"train, {dtype}", train(model, dtype, args.rounds)
        else:
            for mode, most in ((EXACT, args.tokens), (DEFAULT, min(args.tokens, 5000))):
                yield f"{case}, {dtype}, {mode}", equality(model, mode, case == "branches", most)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    args = parser.parse_args()
    path = Path(__file__).parent / "results" / "exact.json"
    for case, found in cases(args):
        line = (
            {"case": case}
            | found
            | {
                "rounds": args.rounds,
                "device": jax.devices()[0].device_kind,
                "machine": platform.machine(),
                "cores": len(os.sched_getaffinity(0)),
                "jax": jax.__version__,
                "date": datetime.date.today().isoformat(),
            }
        )
        print(json.dumps(line), flush=True)
        record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        record[case] = line
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
