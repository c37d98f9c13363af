"""Paged attention: every row's queries attend over the pages that the row's table lists.

All implementations have one face:

    q      [R, C, H, K]      queries, normed and rotated
    pool   [L, P, Z, 2KV, K] layers, pages, entries; keys and values of a head side by side
    layer  i32[]
    table  i32[R, M]         pages in order
    base   i32[R, M + 1]     entries before each page: entry z of page m has the rank base[m] + z if
                             that is below base[m + 1]; a page may be filled in part. After the
                             last page come FAR or the row's number of entries
    ranks  i32[R, C]         a query sees the ranks up to its own; -1 is padding
    out    [R, C, H, K]

What no query of a row sees may hold anything, NaN included, and changes nothing.

`gather` is the reference. `blockwise` is the same with work and memory that follow what a table
holds: the choice on a CPU. `pallas` are the kernels for TPU and GPU. Softmax and sums are float32.
"""

import functools
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from npr_jax.kernels.blocks import EMPTY

Implementation = Literal["gather", "blockwise", "pallas"]
IMPLEMENTATIONS = get_args(Implementation)
FAR = 1 << 30  # more than any rank
# What `blockwise` takes at a time: entries of a row, and bytes of several rows' entries.
_BLOCK = 256
_CACHE_BYTES = 1 << 20


def paged_attention(implementation: str):
    """The function of that name; "pallas" is the kernel of the platform that compiles."""
    if implementation == "gather":
        return gather
    if implementation == "plain":  # the runner's, for prompts on a TPU
        from npr_jax.kernels.paged_tpu import plain_attention

        return plain_attention
    if implementation == "blockwise":
        return blockwise
    if implementation != "pallas":
        raise ValueError(
            f"attention is {implementation!r}, needed is one of {', '.join(IMPLEMENTATIONS)}"
        )
    if jax.default_backend() == "gpu":
        from npr_jax.kernels.paged_gpu import paged_attention as kernel
    else:  # a TPU, or its compiler on another machine
        from npr_jax.kernels.paged_tpu import paged_attention as kernel
    return kernel


def gather(q, pool, layer, table, base, ranks) -> jax.Array:
    """The reference: gathers whole tables, masks what is not there."""
    num_rows, chunk, heads, dim = q.shape
    entry = base[:, :-1, None] + jnp.arange(pool.shape[2])  # [R, M, Z]
    listed = entry < base[:, 1:, None]
    seen = listed[:, None] & (entry[:, None] <= ranks[:, :, None, None])  # [R, C, M, Z]
    seen = seen.reshape(num_rows, chunk, -1)
    kv = pool[layer, table]  # [R, M, Z, 2KV, K]
    kv = kv.reshape(num_rows, -1, kv.shape[3] // 2, 2, dim).astype(q.dtype)
    q = q.reshape(num_rows, chunk, kv.shape[2], -1, dim)
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    scores = product("rcngd,rsnd->rngcs", q, kv[:, :, :, 0]) * dim**-0.5
    weights = jax.nn.softmax(jnp.where(seen[:, None, None], scores, EMPTY), axis=-1)
    # What no query of a row sees weighs 0, but may be anything, and 0 * NaN is NaN.
    values = jnp.where(jnp.any(seen, axis=1)[:, :, None, None], kv[:, :, :, 1], 0)
    out = jnp.einsum("rngcs,rsnd->rcngd", weights.astype(q.dtype), values)
    return out.reshape(num_rows, chunk, heads, dim)


def blockwise(q, pool, layer, table, base, ranks) -> jax.Array:
    """A few rows at a time, a block of pages at a time, up to the last page that these rows see.

    What is taken at a time fits into a CPU's cache, where transposing it costs little.
    """
    num_rows, chunk, heads, dim = q.shape
    size, kv_heads = pool.shape[2], pool.shape[3] // 2
    group = heads // kv_heads
    pages = min(max(1, _BLOCK // size), table.shape[1])
    entry_bytes = 2 * kv_heads * dim * pool.dtype.itemsize
    rows = min(max(1, _CACHE_BYTES // (pages * size * entry_bytes)), num_rows)
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

    def some_rows(inputs):
        q, row, blocks, ranks = inputs
        # [r, KV, C * G, K]: one matrix per row and key head
        q = q.reshape(rows, chunk, kv_heads, group, dim).swapaxes(1, 2)
        q = q.reshape(rows, kv_heads, -1, dim)
        limit = jnp.repeat(ranks, group, axis=1)[:, None, :, None]

        def block(j, carry):
            top, total, acc = carry
            column = j * pages + jnp.arange(pages + 1)
            here = table.at[row[:, None], column[:-1]].get(mode="clip")
            edges = base.at[row[:, None], column].get(mode="clip")
            entry = edges[:, :-1, None] + jnp.arange(size)
            entry = jnp.where(entry < edges[:, 1:, None], entry, FAR).reshape(rows, -1)
            seen = entry[:, None, None] <= limit
            kv = pool[layer, here].reshape(rows, -1, kv_heads, 2, dim).astype(q.dtype)
            # What no query of a row sees weighs 0, but may be anything, and 0 * NaN is NaN.
            some = entry <= jnp.max(ranks, axis=1, keepdims=True)
            v = jnp.where(some[:, :, None, None], kv[:, :, :, 1], 0).swapaxes(1, 2)
            k = kv[:, :, :, 0].swapaxes(1, 2)
            scores = product("rnqd,rnsd->rnqs", q, k) * dim**-0.5
            scores = jnp.where(seen, scores, EMPTY)
            new = jnp.maximum(top, jnp.max(scores, axis=-1))
            p = jnp.exp(scores - new[..., None])  # 1 while a row sees nothing: scaled away later
            scale = jnp.exp(top - new)
            out = product("rnqs,rnsd->rnqd", p.astype(q.dtype), v)
            return new, total * scale + jnp.sum(p, axis=-1), acc * scale[..., None] + out

        start = (
            jnp.full(q.shape[:-1], EMPTY, jnp.float32),
            jnp.zeros(q.shape[:-1], jnp.float32),
            jnp.zeros(q.shape, jnp.float32),
        )
        _, total, acc = jax.lax.fori_loop(0, jnp.max(blocks), block, start)
        out = acc / jnp.maximum(total, 1e-30)[..., None]
        out = out.reshape(rows, kv_heads, chunk, group, dim).swapaxes(1, 2)
        return out.reshape(rows, chunk, heads, dim).astype(q.dtype)

    def cut(x, fill=0):
        pad = [(0, -num_rows % rows)] + [(0, 0)] * (x.ndim - 1)
        return jnp.pad(x, pad, constant_values=fill).reshape(-1, rows, *x.shape[1:])

    # In which a row still sees something: of the rest of a table one number a block is looked at.
    blocks = jnp.sum(base[:, :-1:pages] <= jnp.max(ranks, axis=1, keepdims=True), axis=1)
    inputs = cut(q), cut(jnp.arange(num_rows)), cut(blocks), cut(ranks, -1)
    out = jax.lax.map(some_rows, inputs)
    return out.reshape(-1, chunk, heads, dim)[:num_rows]
