"""Paged attention on a GPU: a Pallas kernel with the face of attention.py.

One program works on a tile of queries of one row, one key head, and one share of the pages that the
row sees; a small sum over the shares follows (split-K, as in flash-decoding), so that one row with
a long table fills the GPU too. Work follows what a table holds, not how long it may be.

Written for Pallas' Triton backend: what its interpreter and its lowering show on a machine without a
GPU is what runs. Mosaic GPU, its successor, multiplies tiles of 64 rows at least, where a decode
step has the 2 to 8 queries of one key head.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

_NEGATIVE = -1e30  # finite, so that a query that sees nothing stays finite
_ENTRIES = 64  # that a program takes at a time
_QUERIES = 64  # lines of a tile at most: queries times their group
_LEAST = 16  # lines that a product needs
_PROGRAMS = 512  # that keep a GPU busy


def paged_attention(q, pool, layer, table, base, ranks, interpret=False) -> jax.Array:
    """Attends over the pages of each row; see attention.py.

    Args:
      q: [R, C, H, K], K a power of two from 16.
      pool: [L, P, Z, 2KV, K], Z a power of two; read where it lies.
      layer, table, base, ranks: see attention.py.
      interpret: runs on a CPU.

    Returns:
      [R, C, H, K]
    """
    num_rows, chunk, heads, dim = q.shape
    layers, num_pages, size, double, _ = pool.shape
    kv_heads = double // 2
    group = heads // kv_heads
    for name, value in (("head_dim", dim), ("page_size", size)):
        least = _LEAST if name == "head_dim" else 1
        if value < least or value & (value - 1):
            raise ValueError(f"{name} is {value}, needed is a power of two from {least}")

    tile = min(chunk, max(1, _QUERIES // group))
    tiles = -(-chunk // tile)
    lines = max(_LEAST, pl.next_power_of_2(tile * group))
    pages = max(1, _ENTRIES // size)
    steps = -(-table.shape[1] // pages)
    splits = max(1, min(steps, _PROGRAMS // (num_rows * tiles * kv_heads)))

    # [R * tiles, KV, N, K]: the queries of one key head, and the rank that each line sees up to
    pad = tiles * tile - chunk
    q = jnp.pad(q, ((0, 0), (0, pad), (0, 0), (0, 0)))
    q = q.reshape(num_rows * tiles, tile, kv_heads, group, dim).swapaxes(1, 2)
    q = q.reshape(num_rows * tiles, kv_heads, tile * group, dim)
    q = jnp.pad(q, ((0, 0), (0, 0), (0, lines - tile * group), (0, 0)))
    limit = jnp.pad(ranks, ((0, 0), (0, pad)), constant_values=-1).reshape(-1, tile)
    last = jnp.max(limit, axis=1)
    limit = jnp.repeat(limit, group, axis=1)
    limit = jnp.pad(limit, ((0, 0), (0, lines - tile * group)), constant_values=-1)
    used = jnp.sum(jnp.repeat(base[:, :-1], tiles, axis=0) <= last[:, None], axis=1)
    # A program reads whole groups of columns: past the last there is nothing, in page 0.
    short = -table.shape[1] % pages + pages
    start = jnp.pad(base[:, :-1], ((0, 0), (0, short)), mode="edge")
    stop = jnp.pad(base[:, 1:], ((0, 0), (0, short)), mode="edge")
    stop = stop.at[:, table.shape[1] :].set(0)
    table = jnp.pad(table, ((0, 0), (0, short))) + layer * num_pages

    out = jax.ShapeDtypeStruct((num_rows * tiles, kv_heads, splits, lines, dim), jnp.float32)
    sums = jax.ShapeDtypeStruct(out.shape[:-1], jnp.float32)
    row = pl.BlockSpec((None, table.shape[1]), lambda i, h, s: (i // tiles, 0))
    acc, top, total = pl.pallas_call(
        functools.partial(_kernel, pages=pages, splits=splits),
        grid=(num_rows * tiles, kv_heads, splits),
        in_specs=[
            pl.BlockSpec((None, None, lines, dim), lambda i, h, s: (i, h, 0, 0)),
            pl.BlockSpec((None, lines), lambda i, h, s: (i, 0)),
            pl.BlockSpec((None,), lambda i, h, s: (i,)),
            row,
            row,
            row,
            pl.BlockSpec(memory_space=pl.ANY) if interpret else pl.no_block_spec,
        ],
        out_specs=[
            pl.BlockSpec((None, None, None, lines, dim), lambda i, h, s: (i, h, s, 0, 0)),
            pl.BlockSpec((None, None, None, lines), lambda i, h, s: (i, h, s, 0)),
            pl.BlockSpec((None, None, None, lines), lambda i, h, s: (i, h, s, 0)),
        ],
        out_shape=[out, sums, sums],
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=2),
        name="npr_paged_attention",
        interpret=interpret,
    )(q, limit, used.astype(jnp.int32), table, start, stop, pool.reshape(-1, *pool.shape[2:]))

    best = jnp.max(top, axis=2, keepdims=True)
    scale = jnp.exp(top - best)
    total = jnp.sum(total * scale, axis=2)
    out = jnp.sum(acc * scale[..., None], axis=2) / jnp.maximum(total, 1e-30)[..., None]
    out = out[:, :, : tile * group].reshape(num_rows, tiles, kv_heads, tile, group, dim)
    out = out.swapaxes(2, 3).reshape(num_rows, tiles * tile, heads, dim)
    return out[:, :chunk].astype(q.dtype)


def _kernel(q, limit, used, table, start, stop, pool, acc, top, total, *, pages, splits):
    """One tile of queries q [N, K] over its share of the pages.

    limit i32[N], used i32[], table, start, stop i32[M]: what lines see, how many pages any of them
    does, the pages and their first and last ranks; acc [N, K], top, total [N]: its softmax.
    """
    head, split = pl.program_id(1), pl.program_id(2)
    lines, dim = q.shape
    size = pool.shape[1]
    queries, upto = q[...], limit[...]
    precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    product = functools.partial(triton.dot, precision=precision)
    count = pl.cdiv(used[...], pages)
    share = pl.cdiv(count, splits)

    def step(i, carry):
        top, total, acc = carry
        here = pl.ds(i * pages, pages)
        listed = table[here]
        entry = start[here][:, None] + jnp.arange(size)[None, :]
        inside = entry < stop[here][:, None]
        entry = jnp.where(inside, entry, jnp.iinfo(jnp.int32).max).reshape(1, pages * size)
        k = pool[listed, :, 2 * head, :].reshape(pages * size, dim)
        v = pool[listed, :, 2 * head + 1, :].reshape(pages * size, dim)
        scores = product(queries, k.astype(q.dtype).T) * dim**-0.5
        seen = entry <= upto[:, None]
        scores = jnp.where(seen, scores, _NEGATIVE)
        new = jnp.maximum(top, jnp.max(scores, axis=1))
        p = jnp.where(seen, jnp.exp(scores - new[:, None]), 0.0)
        scale = jnp.exp(top - new)
        out = product(p.astype(q.dtype), v.astype(q.dtype))
        return new, total * scale + jnp.sum(p, axis=1), acc * scale[:, None] + out

    empty = (
        jnp.full((lines,), _NEGATIVE, jnp.float32),
        jnp.zeros((lines,), jnp.float32),
        jnp.zeros((lines, dim), jnp.float32),
    )
    first = split * share
    end = jnp.minimum(first + share, count)
    top[...], total[...], acc[...] = jax.lax.fori_loop(first, end, step, empty)
