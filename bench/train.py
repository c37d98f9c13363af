"""Times train steps: against other libraries, with prompts shared or not, and by row length.

    python bench/train.py step --row-len 512 --batch 8            # one step, as one JSON line
    python bench/train.py step --group                            # 16 responses behind one prompt
    python bench/train.py all --part peers --scripts DIR --peer hf=PYTHON --peer tunix=PYTHON
    python bench/train.py all --part groups
    python bench/train.py all --part lengths

`all` runs the others as processes by turns on one core, and writes its part of
bench/results/train.json as it goes. DIR holds bench_hf_sft_step.py and bench_tunix_sft_step.py,
which print one JSON line for the same model, batch and row length; PYTHON is the interpreter of the
library's own environment. Nothing else should run on the machine meanwhile.

A step is supervised, in float32, with AdamW, and keeps its products (remat "dots"); all tokens
count in the loss, or all of the responses. Its FLOPs are those of the products, three times the
forward pass, and of attention only over the keys that a token sees.
"""

import argparse
import dataclasses
import datetime
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import optax
import roofline
from against import last_line
from models import SHAPES, make_model

from npr_jax import tree
from npr_jax.model.config import REMAT
from npr_jax.train.objective import Objective
from npr_jax.train.optimizer import OptimizerConfig, new_state
from npr_jax.train.packing import Example, Row, count_loss_tokens, make_rows, stack
from npr_jax.train.step import compiled_step

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "train.json"
OPTIMIZER = OptimizerConfig(learning_rate=0.0, b2=0.999, weight_decay=0.01)  # rate: an argument
SFT, RATE = Objective("sft"), 1e-4
LENGTHS = [1024, 4096, 16384, 32768]
LENGTHS_MODEL = "tiny"


def documents(args) -> tuple[list[Row], int]:
    """`batch` rows of `row_len` tokens, of `documents` documents each, and rows per micro-batch."""
    length, rng = args.row_len // args.documents, np.random.default_rng(0)
    examples = [
        Example(
            rng.integers(20, SHAPES[args.model]["vocab"], length),
            tree.layout(length),
            np.ones(length, bool),
        )
        for _ in range(args.batch * args.documents)
    ]
    return make_rows([[example] for example in examples], args.row_len, depth=2), args.batch


def responses(args, shared: bool) -> tuple[list[Row], int]:
    """One row of a prompt and its responses, or a row for each response with the prompt again; and
    rows of a micro-batch, such that both have as many tokens."""
    rng, alone = np.random.default_rng(0), args.prompt + args.response
    prompt, *answers = np.split(
        rng.integers(20, SHAPES[args.model]["vocab"], args.prompt + args.count * args.response),
        args.prompt + args.response * np.arange(args.count),
    )
    group = [
        Example(
            np.concatenate([prompt, answer]),
            tree.layout(alone, prompt_len=args.prompt),
            np.arange(alone) >= args.prompt,
        )
        for answer in answers
    ]
    together = args.prompt + args.count * args.response
    if shared:
        return make_rows([group], together, depth=2), 1
    return make_rows([[example] for example in group], alone, depth=2), together // alone


def laid_out(args) -> tuple[list[Row], int]:
    if args.group or args.unshared:
        return responses(args, args.group)
    return documents(args)


def step(args) -> dict:
    """Times one process's train steps."""
    rows, micro_rows = laid_out(args)
    used, count = -(-len(rows) // micro_rows), count_loss_tokens(rows)
    model = make_model(args.model)
    state, batch = new_state(model.params, OPTIMIZER), stack(rows, micro_rows, used)
    operands = (batch, np.int32(used), np.float32(count), np.float32(RATE))
    begun = time.perf_counter()
    compiled = (
        compiled_step(
            dataclasses.replace(model.config, remat=args.remat), OPTIMIZER, SFT, "float32", None
        )
        .lower(state, *operands)
        .compile()
    )
    compile_s = time.perf_counter() - begun
    # One micro-batch, untimed, touches all of the memory; the state is used up.
    jax.block_until_ready(compiled(state, batch, np.int32(1), *operands[2:]))
    state = new_state(model.params, OPTIMIZER)
    del model
    wall, cpu, losses = [], [], []
    for _ in range(args.repeats):
        begun, worked = time.perf_counter(), time.process_time()
        state, sums, _, _ = jax.block_until_ready(compiled(state, *operands))
        wall.append(time.perf_counter() - begun)
        cpu.append(time.process_time() - worked)
        losses.append(float(sums["loss"]) / count)
        if args.gradient and len(wall) == 1:
            moment = optax.tree.get(state.opt_state, "mu")
            np.savez(args.gradient, *jax.tree.leaves(moment))
    seconds, rss = statistics.median(wall), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tokens = sum(row["tokens"].size for row in rows)
    # In plain text a token sees as many keys as its position says, and itself.
    pairs = sum(int(row["positions"].sum()) for row in rows) + tokens
    flops = 3 * roofline.step(args.model, tokens, pairs / tokens)["flops"]
    peak = args.peak or roofline.measure()["gflop_per_s"]
    return {
        "peer": "npr_jax",
        "model": args.model,
        "rows": len(rows),
        "row_len": rows[0]["tokens"].size,
        "micro_rows": micro_rows,
        "remat": args.remat,
        "tokens": tokens,
        "loss_tokens": count,
        "run_s": {
            "median": round(seconds, 4),
            "best": round(min(wall), 4),
            "cpu_s": round(statistics.median(cpu), 4),
            "n": args.repeats,
        },
        "tokens_per_s": {
            "median": round(tokens / seconds, 1),
            "best": round(tokens / min(wall), 1),
            "per_cpu_s": round(tokens / statistics.median(cpu), 1),
        },
        "compile_s": round(compile_s, 2),
        "peak_rss_mb": round(rss / 1024),
        "temp_mb": round(compiled.memory_analysis().temp_size_in_bytes / 2**20, 1),
        "gflops_per_s": round(flops / seconds / 1e9, 1),
        "share_of_peak": round(flops / seconds / 1e9 / peak, 3),
        "loss_first": round(losses[0], 4),
        "loss_last": round(losses[-1], 4),
        "cores": len(os.sched_getaffinity(0)),
        "jax": jax.__version__,
    }


def difference(group: Path, unshared: Path) -> dict:
    """How much two sides' first gradients differ: AdamW's first moments, which one step on makes a
    multiple of them that is the same for both."""
    with np.load(group) as ours, np.load(unshared) as theirs:
        pairs = [
            (np.abs(ours[name] - theirs[name]).max(), np.abs(theirs[name]).max()) for name in theirs
        ]
    return {
        "difference": float(max(d for d, _ in pairs) / max(size for _, size in pairs)),
        "difference_worst_weight": float(max(d / size for d, size in pairs)),  # by its own largest
    }


def ours(verb: str, *options) -> dict:
    line = last_line([sys.executable, str(HERE / "train.py"), verb, *map(str, options)], HERE)
    print(json.dumps(line), flush=True)
    return line


def peers(args, limits: dict) -> Iterator[dict]:
    """MID, supervised, 8 rows of 512: every library by turns."""
    others = dict(peer.split("=", 1) for peer in args.peer)
    runs: dict[str, list[dict]] = {"npr_jax": []} | {name: [] for name in others}
    work = ["--batch", "8", "--repeats", str(args.repeats)]
    for _ in range(args.rounds):
        runs["npr_jax"].append(
            ours("step", *work, "--row-len", 512, "--peak", limits["gflop_per_s"])
        )
        for name, python in others.items():
            theirs = [python, f"bench_{name}_sft_step.py", "--preset", "mid", "--seq-len", "512"]
            runs[name].append(last_line([*theirs, *work], args.scripts.resolve()))
            print(json.dumps(runs[name][-1]), flush=True)
        yield compare(runs, limits)


def compare(runs: dict[str, list[dict]], limits: dict) -> dict:
    """What the rounds of every library come to: {name: [a line per round]}, npr_jax among them."""
    sides = {}
    for name, lines in runs.items():
        medians = [line["tokens_per_s"]["median"] for line in lines]
        flop = statistics.median(line["gflops_per_s"] for line in lines)
        sides[name] = {
            "step_s": round(statistics.median(line["run_s"]["median"] for line in lines), 2),
            "tokens_per_s": round(statistics.median(medians), 1),
            "tokens_per_cpu_s": max(line["tokens_per_s"]["per_cpu_s"] for line in lines),
            "best": max(line["tokens_per_s"]["best"] for line in lines),
            "rounds": medians,
            "gflops_per_s": flop,
            "share_of_peak": round(flop / limits["gflop_per_s"], 3),
            "compile_s": lines[-1]["compile_s"],
            "peak_rss_mb": max(line["peak_rss_mb"] for line in lines),
            "version": lines[-1].get("peer_version") or lines[-1]["jax"],
        }
    sides["npr_jax"]["temp_mb"] = runs["npr_jax"][-1]["temp_mb"]
    found = {"model": "mid", "batch": 8, "row_len": 512, "sides": sides}
    others = [side["tokens_per_s"] for name, side in sides.items() if name != "npr_jax"]
    if others:
        found["ratio"] = round(sides["npr_jax"]["tokens_per_s"] / max(others), 2)
    return found


def groups(args, limits: dict) -> Iterator[dict]:
    """MID, prompt 1024 and 16 responses of 256: the prompt once, or once per response."""
    work, sides = ["--repeats", args.repeats, "--peak", limits["gflop_per_s"]], {}
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder, f"{name}.npz") for name in ("group", "unshared")}
        for name, path in files.items():
            sides[name] = ours("step", f"--{name}", *work, "--gradient", path)
        gradients = difference(**files)
    seconds = {name: line["run_s"]["median"] for name, line in sides.items()}
    tokens = {name: line["tokens"] for name, line in sides.items()}
    yield {
        "sides": sides,
        "time_ratio": round(seconds["group"] / seconds["unshared"], 3),
        "token_ratio": round(tokens["group"] / tokens["unshared"], 3),
        "gradients": gradients,
    }


def lengths(args, limits: dict) -> Iterator[dict]:
    """A step of one row by its length, in four layouts; a prompt is as long as 4 responses."""
    rows = []
    cache = tempfile.TemporaryDirectory()  # layouts of the same size are one program
    os.environ["JAX_COMPILATION_CACHE_DIR"] = cache.name
    for length in LENGTHS:
        work = ["--model", LENGTHS_MODEL, "--peak", limits["gflop_per_s"]]
        work += ["--repeats", args.repeats, "--batch", 1, "--row-len", length]
        response = length // 20
        group = ["--prompt", 4 * response, "--response", response]
        layouts = {
            "one": ["--documents", 1],
            "packed": ["--documents", 16],
            "group": ["--group", *group],
            "unshared": ["--unshared", *group],
        }
        sides = {name: ours("step", *work, *options) for name, options in layouts.items()}
        for side in sides.values():
            del side["compile_s"]  # most come from the cache
        rows.append({"row_len": length, "sides": sides})
        yield {"model": LENGTHS_MODEL, "rows": rows}


def everything(args) -> None:
    limits = last_line([sys.executable, str(HERE / "roofline.py"), "--measure"], HERE)
    about = {
        "date": datetime.date.today().isoformat(),
        "jax": jax.__version__,
        "cores": 1,
        "limits": limits,
    }
    for found in {"peers": peers, "groups": groups, "lengths": lengths}[args.part](args, limits):
        record = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
        record[args.part] = about | found  # as soon as there is something: all of it takes long
        RESULTS.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    one, all_ = (verbs.add_parser(name) for name in ("step", "all"))
    one.add_argument("--model", choices=SHAPES, default="mid")
    one.add_argument("--prompt", type=int, default=1024)
    one.add_argument("--response", type=int, default=256)
    one.add_argument("--count", type=int, default=16, help="responses to the prompt")
    one.add_argument("--batch", type=int, default=8, help="rows of documents")
    one.add_argument("--row-len", type=int, default=512)
    one.add_argument("--documents", type=int, default=1, help="in a row")
    one.add_argument("--group", action="store_true", help="responses behind their prompt")
    one.add_argument("--unshared", action="store_true", help="a row per response, with the prompt")
    one.add_argument("--remat", choices=REMAT, default="dots", help="what is computed again")
    one.add_argument("--repeats", type=int, default=3, help="timed steps")
    one.add_argument("--gradient", type=Path, help="npz file for a multiple of the first gradient")
    one.add_argument("--peak", type=float, help="GFLOP/s of the machine; default: measured here")
    all_.add_argument("--part", choices=("peers", "groups", "lengths"), required=True)
    all_.add_argument("--scripts", type=Path, help="folder of the other libraries' scripts")
    all_.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON")
    all_.add_argument("--rounds", type=int, default=2, help="of all libraries, by turns")
    all_.add_argument("--repeats", type=int, default=3, help="timed steps per round")
    args = parser.parse_args()
    if args.verb == "all":
        if args.peer and args.scripts is None:
            parser.error("--peer needs --scripts, the folder of that library's script")
        everything(args)
    else:
        print(json.dumps(step(args)))


if __name__ == "__main__":
    main()
