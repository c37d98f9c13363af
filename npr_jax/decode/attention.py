"""Paged attention: every row's queries attend over the pages that the row's table lists.

All implementations have one face:

    q      [R, C, H, K]      queries, normed and rotated
    pool   [L, P, Z, 2KV, K] layers, pages, entries; keys and values of a head side by side
    layer  i32[]
    table  i32[R, M]         pages in order
    base   i32[R, M + 1]     entries before each page: entry z of page m has the rank base[m] + z if
                             that is below base[m + 1]; a page may be filled in part
    ranks  i32[R, C]         a query sees the ranks up to its own; -1 is padding
    out    [R, C, H, K]

`gather` is the oracle. `blockwise` is the same with work and memory that follow what a table holds:
the choice on a CPU. `pallas` are the kernels for TPU and GPU. Softmax and sums are float32.
"""

import functools

import jax
import jax.numpy as jnp

IMPLEMENTATIONS = ("gather", "blockwise", "pallas")
_NEGATIVE = -1e30  # finite, so that a row that sees nothing stays finite
_BLOCK = 256  # entries that `blockwise` takes at a time


def paged_attention(implementation: str):
    """The function of that name; "pallas" is the kernel of the platform that compiles."""
    if implementation == "gather":
        return gather
    if implementation == "blockwise":
        return blockwise
    if implementation != "pallas":
        raise ValueError(
            f"attention is {implementation!r}, needed is one of {', '.join(IMPLEMENTATIONS)}"
        )
    if jax.default_backend() == "gpu":
        from npr_jax.decode.attention_gpu import paged_attention as kernel
    else:  # a TPU, or its compiler on another machine
        from npr_jax.decode.attention_tpu import paged_attention as kernel
    return kernel


def default_implementation() -> str:
    """What suits the platform that JAX runs on."""
    return "blockwise" if jax.default_backend() == "cpu" else "pallas"


def gather(q, pool, layer, table, base, ranks) -> jax.Array:
    """The oracle: gathers whole tables, masks what is not there."""
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
    weights = jax.nn.softmax(jnp.where(seen[:, None, None], scores, _NEGATIVE), axis=-1)
    out = jnp.einsum("rngcs,rsnd->rcngd", weights.astype(q.dtype), kv[:, :, :, 1])
    return out.reshape(num_rows, chunk, heads, dim)


def blockwise(q, pool, layer, table, base, ranks) -> jax.Array:
    """Row by row, a block of pages at a time, up to the last page that the row sees.

    One row's keys fit into a CPU's cache, where their transposition costs little: several times
    faster there than `gather`, and a row's result does not depend on the other rows.
    """
    _, chunk, heads, dim = q.shape
    size, kv_heads = pool.shape[2], pool.shape[3] // 2
    width = table.shape[1]
    pages = min(max(1, _BLOCK // size), width)
    pad = -width % pages
    table = jnp.pad(table, ((0, 0), (0, pad)))
    base = jnp.pad(base, ((0, 0), (0, pad)), mode="edge")
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

    def row(inputs):
        q, table, base, ranks = inputs
        q = q.reshape(chunk, kv_heads, -1, dim).swapaxes(0, 1)  # [KV, C, G, K]
        used = jnp.sum(base[:-1] <= jnp.max(ranks))  # pages that begin where a query still sees

        def block(j, carry):
            top, total, acc = carry
            here = jax.lax.dynamic_slice_in_dim(table, j * pages, pages)
            edges = jax.lax.dynamic_slice_in_dim(base, j * pages, pages + 1)
            entry = edges[:-1, None] + jnp.arange(size)
            seen = (entry < edges[1:, None]) & (entry <= ranks[:, None, None])
            kv = pool[layer, here].reshape(-1, kv_heads, 2, dim).astype(q.dtype)  # [S, KV, 2, K]
            k, v = kv[:, :, 0].swapaxes(0, 1), kv[:, :, 1].swapaxes(0, 1)
            scores = product("ncgd,nsd->ncgs", q, k) * dim**-0.5
            seen = seen.reshape(chunk, 1, -1)
            scores = jnp.where(seen, scores, _NEGATIVE)
            new = jnp.maximum(top, jnp.max(scores, axis=-1))
            p = jnp.where(seen, jnp.exp(scores - new[..., None]), 0.0)
            scale = jnp.exp(top - new)
            out = product("ncgs,nsd->ncgd", p.astype(q.dtype), v)
            return new, total * scale + jnp.sum(p, axis=-1), acc * scale[..., None] + out

        start = (
            jnp.full(q.shape[:-1], _NEGATIVE, jnp.float32),
            jnp.zeros(q.shape[:-1], jnp.float32),
            jnp.zeros(q.shape, jnp.float32),
        )
        _, total, acc = jax.lax.fori_loop(0, -(-used // pages), block, start)
        out = acc / jnp.maximum(total, 1e-30)[..., None]  # padding has seen nothing
        return out.swapaxes(0, 1).reshape(chunk, heads, dim).astype(q.dtype)

    return jax.lax.map(row, (q, table, base, ranks))
