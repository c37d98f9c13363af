"""Checks and times the attention kernels on a GPU, against XLA: the paged one, and that of trees.

    python bench/gpu.py

Writes bench/results/gpu.json. The times are of one layer in decoding: of several steps in one
program, each over another layer of the pool, the median of seven runs. `gb_per_s` counts the keys
and values that the rows see, `copy_gb_per_s` what a copy on this GPU reads and writes. The times
of tree attention are of one layer in training, forward and with the backward pass; `tflops` counts
the products of the visible pairs of a query and a key, 2 forward and 5 more backward.
Exits with 1 if a check fails.
"""

import datetime
import functools
import json
import statistics
import sys
import time
from importlib.metadata import distributions
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from npr_jax.decode.attention import gather
from npr_jax.kernels.paged_gpu import paged_attention
from npr_jax.kernels.tree_gpu import flash
from npr_jax.model import PRESETS, attention

MODEL = "qwen3-4b"
CONTEXTS, BATCHES, PAGE_SIZES = (1024, 4096, 16384), (1, 16, 64), (16, 64)
POOL_BYTES, STEPS, RUNS = 9 * 2**30, 36, 7
COPY_BYTES = 2**30
# Rows, queries of a row, entries of a row, page size, heads, KV heads, head_dim, dtype, layers. The
# pool of the second is larger than 4 GiB.
CHECKS = (
    (4, 1, 16384, 16, 32, 8, 128, "bfloat16", 2),
    (32, 1, 2048, 64, 32, 8, 128, "bfloat16", 12),
    (1, 1, 16384, 16, 32, 8, 128, "bfloat16", 2),
    (4, 128, 4096, 16, 32, 8, 128, "bfloat16", 2),
    (4, 256, 4096, 64, 32, 8, 128, "bfloat16", 2),
    (4, 8, 1024, 32, 32, 8, 128, "bfloat16", 2),
    (4, 32, 1024, 16, 16, 8, 64, "bfloat16", 2),
    (8, 1, 4096, 16, 32, 8, 128, "float32", 2),
    (4, 128, 1024, 16, 32, 8, 128, "float32", 2),
    (4, 5, 200, 4, 4, 2, 32, "float32", 2),
)
# Rows, tokens, heads, KV heads, head_dim, dtype of tree attention; the last is not a multiple of a
# block.
TREE_CHECKS = (
    (2, 1024, 32, 8, 128, "bfloat16"),
    (2, 1024, 8, 8, 64, "bfloat16"),
    (1, 1024, 8, 1, 256, "bfloat16"),
    (2, 512, 8, 2, 128, "float32"),
    (3, 333, 4, 2, 32, "float32"),
    (2, 777, 32, 8, 128, "bfloat16"),
)
TREE_TOKENS, TREE_DOCUMENTS = (4096, 16384, 32768), (1, 16)
# What a query's result may be off by, as a part of its length.
TOLERANCE = {"bfloat16": 1e-2, "float32": 5e-5}


def main() -> None:
    if jax.default_backend() != "gpu":
        sys.exit(f"bench/gpu.py needs a GPU that JAX can use; it found {jax.default_backend()}")
    copy = _copy_speed()
    record = {
        "date": datetime.date.today().isoformat(),
        "device": jax.devices()[0].device_kind,
        "versions": {
            d.name: d.version
            for d in distributions()
            if d.name.lower().startswith(("jax", "numpy"))
        },
        "model": MODEL,
        "copy_gb_per_s": round(copy / 1e9),
        "checks": [],
        "times": [],
        "tree_checks": [],
        "tree_times": [],
    }
    print(json.dumps({k: v for k, v in record.items() if v != []}), flush=True)
    for case in CHECKS:
        record["checks"].append(_check(*case))
        print(json.dumps(record["checks"][-1]), flush=True)
    for case in TREE_CHECKS:
        record["tree_checks"].append(_check_tree(*case))
        print(json.dumps(record["tree_checks"][-1]), flush=True)
    for tokens in TREE_TOKENS:
        for documents in TREE_DOCUMENTS:
            record["tree_times"].append(_time_tree(tokens, documents))
            print(json.dumps(record["tree_times"][-1]), flush=True)
    for size in PAGE_SIZES:
        for context in CONTEXTS:
            for batch in BATCHES:
                record["times"].append(_time(batch, context, size, copy))
                print(json.dumps(record["times"][-1]), flush=True)
    path = Path(__file__).parent / "results" / "gpu.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    _print_table(record)
    failed = sum(not check["ok"] for check in record["checks"] + record["tree_checks"])
    sys.exit(f"{failed} of {len(CHECKS) + len(TREE_CHECKS)} checks failed" if failed else 0)


def _check(rows, chunk, context, size, heads, kv_heads, dim, dtype, layers) -> dict:
    """Random rows: pages filled in part, one shared page, a row at rest, fewer queries than C."""
    rng = np.random.default_rng(rows)
    table, base = _tables(rng, rows, context, size, least=1)
    table[:, 0] = table[0, 0]
    ranks = np.full((rows, chunk), -1, np.int32)
    for r in range(rows):
        count = chunk if r == 0 else int(rng.integers(1, chunk + 1))
        first = base[r, -1] - count if r == 0 else int(rng.integers(0, base[r, -1] - count + 1))
        if r != 1:
            ranks[r, :count] = np.arange(first, first + count)
    pages = int(table.max()) + 1
    pool = _numbers((layers, pages, size, 2 * kv_heads, dim), dtype)
    q = 3 * _numbers((rows, chunk, heads, dim), dtype)
    used = np.sum(base[:, None, :-1] <= ranks[:, :, None], axis=2, dtype=np.int32)
    args = (pool, jnp.int32(layers - 1), *map(jnp.asarray, (table, base, ranks, used)))
    out = jax.jit(paged_attention)(q, *args)
    with jax.default_matmul_precision("highest"):
        expected = jax.jit(gather)(q.astype(jnp.float32), *args)
    out, expected = (np.asarray(x, np.float32)[ranks >= 0] for x in (out, expected))
    error = np.linalg.norm(out - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
    return {
        "rows": rows,
        "queries": chunk,
        "context": context,
        "page_size": size,
        "heads": [heads, kv_heads, dim],
        "dtype": dtype,
        "pool_gib": round(pool.nbytes / 2**30, 1),
        "error": float(error.max()),
        "ok": bool(error.max() < TOLERANCE[dtype]),  # NaN is not
    }


def _time(batch, context, size, copy) -> dict:
    """Seconds of one layer of a decode step, by the kernel and by gather."""
    config = PRESETS[MODEL]
    table, base = _tables(np.random.default_rng(0), batch, context, size, least=size)
    seen = batch * context * 4 * config.num_kv_heads * config.head_dim  # bytes of a layer
    layers = int(np.clip(POOL_BYTES // seen, 2, STEPS))  # so many that no cache holds them
    kv = (2 * config.num_kv_heads, config.head_dim)
    result = {"batch": batch, "context": context, "page_size": size, "kv_mib": seen / 2**20}
    try:
        pool = _numbers((layers, int(table.max()) + 1, size, *kv), "bfloat16")
        q = _numbers((batch, 1, config.num_heads, config.head_dim), "bfloat16")
        ranks = jnp.asarray(base[:, -1:] - 1)
        used = jnp.full_like(ranks, table.shape[1])
        args = (q, pool, jnp.asarray(table), jnp.asarray(base), ranks, used)
        for name, attend in (("kernel", paged_attention), ("gather", gather)):
            seconds = _seconds(functools.partial(_steps, attend, layers), *args) / STEPS
            result[f"{name}_us"] = round(seconds * 1e6, 1)
            result[f"{name}_gb_per_s"] = round(seen / seconds / 1e9)
            result[f"{name}_of_copy"] = round(seen / seconds / copy, 2)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        result["out_of_memory"] = True
    return result


def _check_tree(rows, tokens, heads, kv_heads, dim, dtype) -> dict:
    """Out and gradients against the reference in float32."""
    hidden = jnp.asarray(np.stack([_forest(tokens, 1 + 2 * row) for row in range(rows)]))
    shapes = (rows, tokens, heads, dim), *[(rows, tokens, kv_heads, dim)] * 2
    q, k, v, d_out = (
        _shifted(shape, dtype, n) for n, shape in enumerate((*shapes, (rows, tokens, heads, dim)))
    )
    ours = jax.jit(functools.partial(_backward, flash))(3 * q, k, v, hidden, d_out)
    exact = (x.astype(jnp.float32) for x in (3 * q, k, v))
    with jax.default_matmul_precision("highest"):
        reference = jax.jit(functools.partial(_backward, attention.dense))
        theirs = reference(*exact, hidden, d_out.astype(jnp.float32))
    errors = {}
    for name, a, b in zip(("out", "d_q", "d_k", "d_v"), ours, theirs, strict=True):
        a, b = (np.asarray(x, np.float32) for x in (a, b))
        errors[name] = float(np.linalg.norm(a - b) / np.linalg.norm(b))
    return {
        "kernel": "tree",
        "rows": rows,
        "tokens": tokens,
        "heads": [heads, kv_heads, dim],
        "dtype": dtype,
        "errors": errors,
        "ok": bool(max(errors.values()) < TOLERANCE[dtype])
        and all(map(np.isfinite, errors.values())),
    }


def _time_tree(tokens, documents) -> dict:
    """Seconds of one layer over a row of packed documents, by the kernels and by blockwise."""
    config = PRESETS[MODEL]
    kv = (1, tokens, config.num_kv_heads, config.head_dim)
    q = _shifted((1, tokens, config.num_heads, config.head_dim), "bfloat16", 0)
    k, v = (_shifted(kv, "bfloat16", n) for n in (1, 2))
    hidden = _forest(tokens, documents)
    ends, branches = hidden[:, 0, 0], hidden[:, 1]
    visible = np.sum(ends - np.arange(tokens)) - np.sum(branches[:, 1] - branches[:, 0])
    product = 2 * config.num_heads * config.head_dim * float(visible)
    args = (q, k, v, jnp.asarray(hidden)[None])
    result = {"kernel": "tree", "tokens": tokens, "documents": documents}
    blockwise = functools.partial(attention.blockwise, block=256)
    for name, attend in (("kernel", flash), ("blockwise", blockwise)):
        seconds = _seconds(attend, *args)
        result[f"{name}_forward_ms"] = round(seconds * 1e3, 2)
        result[f"{name}_forward_tflops"] = round(2 * product / seconds / 1e12, 1)
        seconds = _seconds(functools.partial(_backward, attend), *args, q)
        result[f"{name}_both_ms"] = round(seconds * 1e3, 2)
        result[f"{name}_both_tflops"] = round(7 * product / seconds / 1e12, 1)
    return result


def _backward(attend, q, k, v, hidden, d_out):
    """out, d_q, d_k, d_v."""
    out, pull = jax.vjp(lambda *x: attend(*x, hidden), q, k, v)
    return out, *pull(d_out)


def _forest(tokens, documents) -> np.ndarray:
    """i32[T, 2, 2]: documents of one length in a row, each with four branches that join."""
    hidden = np.zeros((tokens, 2, 2), np.int32)
    for at in range(0, tokens, -(-tokens // documents)):
        end = min(tokens, at - (-tokens // documents))
        hidden[at:end, 0] = end, tokens
        branch = (end - at) // 6
        for start in range(at + branch, at + 5 * branch, max(branch, 1)):
            hidden[start : start + branch, 1] = start + branch, at + 5 * branch
    return hidden


def _shifted(shape, dtype, n) -> jax.Array:
    """Numbers as of _numbers, others for each n."""
    return _numbers((n + 1, *shape), dtype)[n]


def _steps(attend, layers, q, pool, *tables):
    """STEPS times attention, as in the layers of a model: each step waits for the last."""

    def step(i, q):
        return attend(q, pool, i % layers, *tables)

    return jax.lax.fori_loop(0, STEPS, step, q)


def _copy_speed() -> float:
    """Bytes per second that an elementwise operation reads and writes."""

    def copies(x):
        return jax.lax.fori_loop(0, STEPS, lambda i, x: x + i.astype(x.dtype), x)

    x = jnp.zeros(COPY_BYTES // 4, jnp.float32)
    return 2 * COPY_BYTES * STEPS / _seconds(copies, x)


def _seconds(function, *args) -> float:
    function = jax.jit(function)
    for _ in range(2):
        jax.block_until_ready(function(*args))
    runs = []
    for _ in range(RUNS):
        begun = time.perf_counter()
        jax.block_until_ready(function(*args))
        runs.append(time.perf_counter() - begun)
    return statistics.median(runs)


def _tables(rng, rows, context, size, least):
    """Tables and bases of rows that hold `context` entries, `least` or more of them in a page."""
    fills = []
    for _ in range(rows):
        fill = rng.integers(least, size + 1, -(-context // least))
        ends = np.minimum(np.cumsum(fill), context)
        fills.append(np.diff(ends[: 1 + np.argmax(ends == context)], prepend=0))
    width = max(map(len, fills)) + 2
    base = np.zeros((rows, width + 1), np.int32)
    base[:, 1:] = np.cumsum([np.pad(fill, (0, width - len(fill))) for fill in fills], axis=1)
    table = 1 + rng.permutation(rows * width).reshape(rows, width).astype(np.int32)
    return np.where(np.diff(base, axis=1) > 0, table, 0), base


@functools.partial(jax.jit, static_argnums=(0, 1))
def _numbers(shape, dtype) -> jax.Array:
    """Numbers in -1..1 that look random, made where they lie: a pool may take most of a GPU."""
    n = jnp.uint32(len(shape))
    for axis in range(len(shape)):
        n = (n ^ jax.lax.broadcasted_iota(jnp.uint32, shape, axis)) * jnp.uint32(2654435761)
        n = n ^ (n >> 15)
    return (n.astype(jnp.int32).astype(jnp.float32) / 2.0**31).astype(dtype)


def _print_table(record) -> None:
    passed = sum(check["ok"] for check in record["checks"])
    print(f"\n{record['device']}: copy {record['copy_gb_per_s']} GB/s")
    print(f"{passed} of {len(record['checks'])} checks passed")
    passed = sum(check["ok"] for check in record["tree_checks"])
    print(f"{passed} of {len(record['tree_checks'])} checks of tree attention passed")
    for t in record["tree_times"]:
        print(
            f"{t['tokens']:6} tokens, {t['documents']:2} documents: forward "
            f"{t['kernel_forward_ms']} ms ({t['kernel_forward_tflops']} TFLOP/s; blockwise "
            f"{t['blockwise_forward_ms']} ms), with backward {t['kernel_both_ms']} ms "
            f"({t['kernel_both_tflops']} TFLOP/s; blockwise {t['blockwise_both_ms']} ms)"
        )
    print("page  context  batch   kernel us    GB/s  of copy   gather us  speed-up")
    for t in record["times"]:
        line = f"{t['page_size']:4}  {t['context']:7}  {t['batch']:5}"
        if "kernel_us" in t:
            line += f"  {t['kernel_us']:10}  {t['kernel_gb_per_s']:6}  {t['kernel_of_copy']:7}"
        if "gather_us" in t:
            line += f"  {t['gather_us']:10}  {t['gather_us'] / t['kernel_us']:8.1f}"
        if "out_of_memory" in t:
            line += "  out of memory"
        print(line)


if __name__ == "__main__":
    main()
