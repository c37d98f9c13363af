"""Checks the GPU kernel of paged attention on a GPU, and times it against the oracle.

    python bench/gpu.py

Every shape is first compared with `gather` (exit code 1 if one differs), then both are timed.
Prints a JSON line per shape and a table, and writes bench/results/gpu.json. Bandwidth counts the
keys and values that the rows see, once.
"""

import datetime
import functools
import json
import statistics
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from npr_jax.decode.attention import gather
from npr_jax.decode.attention_gpu import paged_attention

HEADS, KV_HEADS, DIM, LAYERS = 32, 8, 128, 4  # a layer of Qwen3-4B
RUNS = 7
CHECKS = [  # rows, chunk, page size, context, dtype
    (5, 1, 16, 700, "float32"),
    (5, 1, 64, 3000, "bfloat16"),
    (1, 1, 16, 16000, "bfloat16"),
    (4, 5, 16, 900, "bfloat16"),
    (4, 128, 16, 1500, "bfloat16"),
    (2, 256, 64, 4000, "bfloat16"),
]
TIMED = [(rows, 1, 16, context) for context in (1024, 4096, 16384) for rows in (1, 16, 64)]
TIMED += [(4, 128, 16, context) for context in (1024, 4096, 16384)]


def make_case(rows, chunk, size, context, dtype, layers=LAYERS, seed=0):
    """Tables of about `context` entries, every fourth page filled in part, last queries last."""
    rng = np.random.default_rng(seed)
    width = -(-context // size) + 8
    table = 1 + rng.permutation(rows * width).reshape(rows, width)
    fills = np.full((rows, width), size)
    fills[:, 3::4] = rng.integers(1, size + 1, fills[:, 3::4].shape)
    base = np.concatenate([np.zeros((rows, 1), int), np.cumsum(fills, axis=1)], axis=1)
    ranks = base[:, -1:] - size - chunk + np.arange(chunk)
    keys = jax.random.split(jax.random.key(seed))
    pool = jax.random.normal(keys[0], (layers, rows * width + 1, size, 2 * KV_HEADS, DIM), dtype)
    q = jax.random.normal(keys[1], (rows, chunk, HEADS, DIM), dtype)
    i32 = functools.partial(jnp.asarray, dtype=jnp.int32)
    return (q, pool, i32(layers - 1), i32(table), i32(base), i32(ranks)), int(ranks.max(1).sum())


def seconds(function, *args) -> float:
    """Median of some runs, each of several calls behind each other."""
    function(*args).block_until_ready()
    begun = time.perf_counter()
    function(*args).block_until_ready()
    calls = max(1, int(0.02 / (time.perf_counter() - begun)))
    times = []
    for _ in range(RUNS):
        begun = time.perf_counter()
        for _ in range(calls):
            out = function(*args)
        out.block_until_ready()
        times.append((time.perf_counter() - begun) / calls)
    return statistics.median(times)


def main() -> None:
    if jax.default_backend() != "gpu":
        raise SystemExit(f"this needs a GPU; JAX runs on {jax.default_backend()!r} here")
    kernel, oracle = jax.jit(paged_attention), jax.jit(gather)
    failed = 0
    for rows, chunk, size, context, dtype in CHECKS:
        case, _ = make_case(rows, chunk, size, context, dtype)
        with jax.default_matmul_precision("highest"):
            out, expected = (np.asarray(f(*case), np.float32) for f in (kernel, oracle))
        error = float(np.abs(out - expected).max())
        good = error < (1e-4 if dtype == "float32" else 2e-2)
        failed += not good
        what = dict(rows=rows, chunk=chunk, page_size=size, context=context, dtype=dtype)
        print(json.dumps({"check": what, "error": error, "good": good}), flush=True)
    words = jnp.ones(1 << 28, jnp.float32)
    copy = 2 * words.nbytes / seconds(jax.jit(lambda x: x + 1), words) / 1e9
    del words
    results = []
    for rows, chunk, size, context in TIMED:
        case, seen = make_case(rows, chunk, size, context, "bfloat16", layers=1)
        bytes_read = seen * 2 * KV_HEADS * DIM * 2
        ours, theirs = seconds(kernel, *case), seconds(oracle, *case)
        results.append(
            {
                "rows": rows,
                "chunk": chunk,
                "context": context,
                "kernel_us": round(1e6 * ours, 1),
                "gather_us": round(1e6 * theirs, 1),
                "speedup": round(theirs / ours, 2),
                "gb_per_s": round(bytes_read / ours / 1e9, 1),
                "share_of_copy": round(bytes_read / ours / 1e9 / copy, 3),
            }
        )
        print(json.dumps(results[-1]), flush=True)
    record = {
        "date": datetime.date.today().isoformat(),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "copy_gb_per_s": round(copy, 1),
        "failed_checks": failed,
        "results": results,
    }
    path = Path(__file__).parent / "results" / "gpu.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(" | ".join(results[0]))
    for row in results:
        print(" | ".join(str(value) for value in row.values()))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
