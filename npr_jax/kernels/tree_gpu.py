"""Tree attention on a GPU: Pallas kernels for its Triton backend, forward and backward.

A program takes a block of queries of one head over the blocks of keys of which it sees something,
or, for the gradients of k and v, a block of keys of one key head over the blocks of queries that
see it, of all query heads that share it. The lists of blocks are made before: first those that are
seen whole, for which there is no mask, then those that are seen in part.

kernels/paged_gpu.py says why Triton.
"""

import functools
from typing import cast

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from npr_jax.kernels.blocks import (
    ALL,
    EMPTY,
    SAVED,
    check_head_dim,
    dot,
    pad_keys,
    pad_queries,
    pair_kinds,
)

# What a program holds, so that it fits into the registers and shared memory of GPUs from Ampere on.
_QUERIES, _QUERY_BYTES = 128, 2**15
_KEYS, _KEY_BYTES = 64, 2**14
_LEAST = 16


def flash(q, k, v, hidden, offset=0, block_q=None, block_k=None, interpret=False) -> jax.Array:
    """Tree attention of queries offset, offset + 1, ... over all keys; differentiable in q, k, v.

    Args:
      q: [B, T, H, K]; K is 16, 32, 64, 128 or 256.
      k, v: [B, S, KV, K].
      hidden: i32[B, S, D, 2]; key k is hidden from the queries in [hidden[k, d, 0],
        hidden[k, d, 1]) and from those below k.
      offset: i32[].
      block_q, block_k: queries and keys of a block, powers of two from 16 on, block_q a multiple of
        block_k; the backward kernels work on block_k of both. None: what suits.
      interpret: True to run on a CPU.

    Returns:
      [B, T, H, K]; a query that sees nothing gets 0.
    """
    length, dim = q.shape[1], q.shape[3]
    check_head_dim("gpu", dim)
    line = dim * q.dtype.itemsize
    block_q = block_q or max(_LEAST, min(_QUERIES, _QUERY_BYTES // line))
    block_k = block_k or max(_LEAST, min(_KEYS, _KEY_BYTES // line))
    q = pad_queries(q, block_q)
    k, v, hidden = pad_keys(k, v, hidden, block_k)
    kinds = pair_kinds(hidden, offset, length, block_q, block_k)
    # As many blocks as the padded queries have: what is added sees nothing.
    square = pair_kinds(hidden, offset, length, block_k, block_k)
    square = jnp.pad(square, ((0, 0), (0, q.shape[1] // block_k - square.shape[1]), (0, 0)))
    hidden = hidden.reshape(*hidden.shape[:2], -1).swapaxes(1, 2)
    offset = jnp.reshape(jnp.asarray(offset, jnp.int32), 1)
    out = cast(jax.Array, _flash(interpret, q, k, v, hidden, kinds, square, offset))
    return out[:, :length]


# From here on T and S are multiples of the blocks; hidden is i32[B, 2D, S]. norm (the logarithm of
# a query's sum of exponentials) and delta (out * its gradient) are f32[B, H, T].


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _flash(interpret, q, k, v, hidden, kinds, square, offset):
    return _flash_forward(interpret, q, k, v, hidden, kinds, square, offset)[0]


def _flash_forward(interpret, q, k, v, hidden, kinds, square, offset):
    out, norm = _call(
        *(interpret, _forward_kernel, kinds, q, k, hidden, offset),
        inputs={"query": [q], "keys": [k, v]},
        outputs=["query", "norm"],
    )
    out, norm = checkpoint_name(out, SAVED), checkpoint_name(norm, SAVED)
    return out, (q, k, v, hidden, square, offset, out, norm)


def _flash_backward(interpret, saved, d_out):
    q, k, v, hidden, kinds, offset, out, norm = saved
    d_out = d_out.astype(q.dtype)
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1).swapaxes(1, 2)
    (d_q,) = _call(
        *(interpret, _query_kernel, kinds, q, k, hidden, offset),
        inputs={"query": [q, d_out], "keys": [k, v], "norm": [norm, delta]},
        outputs=["query"],
    )
    d_k, d_v = _call(
        *(interpret, _key_kernel, kinds.swapaxes(1, 2), q, k, hidden, offset),
        inputs={"queries": [q, d_out], "key": [k, v], "norms": [norm, delta]},
        outputs=["key", "key"],
    )
    return d_q, d_k, d_v, None, None, None, None


_flash.defvjp(_flash_forward, _flash_backward)


def _call(interpret, kernel, kinds, q, k, hidden, offset, inputs, outputs):
    """Runs a kernel with a program for each of a head's blocks, the rows of kinds i32[B, N, M].

    Inputs and outputs are named after what a program has of them: its block ("query", "key",
    "norm"), or all of a head or of a key head ("keys", "queries", "norms").
    """
    batch, num_rows, num_columns = kinds.shape
    length, heads, dim = q.shape[1:]
    size, kv_heads = k.shape[1:3]
    group = heads // kv_heads
    by_key = kernel is _key_kernel
    block = (size if by_key else length) // num_rows
    order = jnp.argsort(-kinds, axis=2, stable=True).astype(jnp.int32)  # ALL, SOME, NONE
    ends = jnp.stack([jnp.sum(kinds == ALL, 2), jnp.sum(kinds != 0, 2)], axis=2, dtype=jnp.int32)

    def row(i):  # those with the longest lists first, as causal order has them
        return i if by_key else num_rows - 1 - i

    def spec(shape, index):
        return pl.BlockSpec(shape, lambda h, i, b: index(b, h, row(i)))

    def kv(h):
        return h if by_key else jax.lax.div(h, group)

    specs = {
        "query": spec((None, block, None, dim), lambda b, h, i: (b, i, h, 0)),
        "key": spec((None, block, None, dim), lambda b, h, i: (b, i, h, 0)),
        "norm": spec((None, None, block), lambda b, h, i: (b, h, i)),
        "keys": spec((None, size, None, dim), lambda b, h, i: (b, 0, kv(h), 0)),
        "queries": spec((None, length, group, dim), lambda b, h, i: (b, 0, h, 0)),
        "norms": spec((None, group, length), lambda b, h, i: (b, h, 0)),
    }
    shapes = {
        "query": jax.ShapeDtypeStruct(q.shape, q.dtype),
        "key": jax.ShapeDtypeStruct(k.shape, k.dtype),
        "norm": jax.ShapeDtypeStruct((batch, heads, length), jnp.float32),
    }
    named = [(name, x) for name, arrays in inputs.items() for x in arrays]
    return pl.pallas_call(
        functools.partial(kernel, other=(length if by_key else size) // num_columns),
        grid=(kv_heads if by_key else heads, num_rows, batch),
        in_specs=[
            spec((None, None, num_columns), lambda b, h, i: (b, i, 0)),
            spec((None, None, 2), lambda b, h, i: (b, i, 0)),
            pl.BlockSpec(offset.shape, lambda *_: (0,)),
            spec((None, *hidden.shape[1:]), lambda b, h, i: (b, 0, 0)),
            *(specs[name] for name, _ in named),
        ],
        out_specs=[specs[name] for name in outputs],
        out_shape=[shapes[name] for name in outputs],
        compiler_params=plgpu.CompilerParams(
            num_warps=8 if block * dim > 2**13 else 4, num_stages=3 if "norm" in outputs else 2
        ),
        name=f"npr_tree_attention{kernel.__name__.removesuffix('_kernel')}",
        interpret=interpret,
    )(order, ends, offset, hidden, *(x for _, x in named))


def _each_block(order, ends, body, carry):
    """body(block, is_partly_seen, carry) for each block of the list."""
    for partly, first, last in ((False, 0, ends[0]), (True, ends[0], ends[1])):
        step = functools.partial(lambda partly, t, carry: body(order[t], partly, carry), partly)
        carry = jax.lax.fori_loop(first, last, step, carry)
    return carry


def _scores(a, b, query, key, hidden, begin, partly):
    """Scores of the lines of a and b; query and key are indices that broadcast to their shape, and
    the keys are those from `begin` on."""
    scores = dot(a, b, 1) * a.shape[1] ** -0.5
    if not partly:
        return scores
    seen = key <= query
    for d in range(0, hidden.shape[0], 2):
        start, stop = (
            plgpu.load(hidden.at[pl.ds(x, 1), pl.ds(begin, key.size)]).reshape(key.shape)
            for x in (d, d + 1)
        )
        seen &= (query < start) | (query >= stop)
    return jnp.where(seen, scores, EMPTY)


def _row():
    """The block that a program of a block of queries has."""
    return pl.num_programs(1) - 1 - pl.program_id(1)


def _forward_kernel(order, ends, offset, hidden, q, k, v, out, norm, *, other: int):
    """out [block, K] and norm [block] of a block of queries.

    order [M] and ends [2]: the blocks of `other` keys, those seen whole up to ends[0], those seen
    in part up to ends[1]. offset [1], hidden [2D, S], q [block, K], k and v [S, K].
    """
    block, dim = q.shape
    queries = plgpu.load(q)
    query = (offset[0] + _row() * block + jnp.arange(block))[:, None]

    def body(j, partly, carry):
        top, total, acc = carry
        at = pl.ds(j * other, other)
        key = (j * other + jnp.arange(other))[None]
        scores = _scores(queries, plgpu.load(k.at[at]), query, key, hidden, j * other, partly)
        new = jnp.maximum(top, jnp.max(scores, axis=1))
        p = jnp.exp(scores - new[:, None])  # 1 until a query sees something
        scale = jnp.exp(top - new)
        told = dot(p.astype(v.dtype), plgpu.load(v.at[at]), 0)
        return new, total * scale + jnp.sum(p, axis=1), acc * scale[:, None] + told

    start = (
        jnp.full(block, EMPTY, jnp.float32),
        jnp.zeros(block, jnp.float32),
        jnp.zeros((block, dim), jnp.float32),
    )
    top, total, acc = _each_block(order, ends, body, start)
    empty = top < 0.5 * EMPTY
    total = jnp.where(empty, 1.0, total)
    told = jnp.where(empty[:, None], 0.0, acc / total[:, None])
    plgpu.store(out, told.astype(out.dtype))
    plgpu.store(norm, jnp.where(empty, 0.0, top + jnp.log(total)))


def _query_kernel(order, ends, offset, hidden, q, d_out, k, v, norm, delta, d_q, *, other: int):
    """d_q [block, K] of a block of queries; d_out is like q, norm and delta are [block]."""
    block, dim = q.shape
    queries, d_outs = plgpu.load(q), plgpu.load(d_out)
    norms, deltas = plgpu.load(norm)[:, None], plgpu.load(delta)[:, None]
    query = (offset[0] + _row() * block + jnp.arange(block))[:, None]

    def body(j, partly, acc):
        at = pl.ds(j * other, other)
        keys = plgpu.load(k.at[at])
        key = (j * other + jnp.arange(other))[None]
        scores = _scores(queries, keys, query, key, hidden, j * other, partly)
        d_s = jnp.exp(scores - norms) * (dot(d_outs, plgpu.load(v.at[at]), 1) - deltas)
        return acc + dot(d_s.astype(keys.dtype), keys, 0)

    acc = _each_block(order, ends, body, jnp.zeros((block, dim), jnp.float32))
    plgpu.store(d_q, (acc * dim**-0.5).astype(d_q.dtype))


def _key_kernel(order, ends, offset, hidden, q, d_out, k, v, norm, delta, d_k, d_v, *, other: int):
    """d_k and d_v [block, K] of a block of keys.

    order and ends: of blocks of `other` queries. q and d_out [T, G, K], k and v [block, K], norm
    and delta [G, T].
    """
    block, dim = k.shape
    keys, values = plgpu.load(k), plgpu.load(v)
    begin = pl.program_id(1) * block
    key = (begin + jnp.arange(block))[:, None]

    def head(g, carry):
        def body(i, partly, carry):
            d_k, d_v = carry
            at = pl.ds(i * other, other)
            queries, d_outs = plgpu.load(q.at[at, g]), plgpu.load(d_out.at[at, g])
            query = (offset[0] + i * other + jnp.arange(other))[None]
            scores = _scores(keys, queries, query, key, hidden, begin, partly)
            p = jnp.exp(scores - plgpu.load(norm.at[g, at])[None])
            d_s = p * (dot(values, d_outs, 1) - plgpu.load(delta.at[g, at])[None])
            return (
                d_k + dot(d_s.astype(queries.dtype), queries, 0),
                d_v + dot(p.astype(queries.dtype), d_outs, 0),
            )

        return _each_block(order, ends, body, carry)

    zero = jnp.zeros((block, dim), jnp.float32)
    acc_k, acc_v = jax.lax.fori_loop(0, q.shape[1], head, (zero, zero))
    plgpu.store(d_k, (acc_k * dim**-0.5).astype(d_k.dtype))
    plgpu.store(d_v, acc_v.astype(d_v.dtype))
