"""Tree attention on a TPU: Pallas kernels, forward and backward.

A program goes through the pairs of a query block and a key block of which something is visible,
and only those: their list is made before, and the grid is as long as the list. A step takes all
query heads of one key head, so keys and values are read, and the mask is made, once for the group.
Heads lie side by side in the lanes, [B, T, H * K], as the products with the weights have them.

Forward and the gradient of q go through the pairs query block by query block, with scores
[queries, keys]; the gradients of k and v go key block by key block, with scores [keys, queries].
"""

import functools
from typing import cast

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from npr_jax.kernels.blocks import (
    ALL,
    EMPTY,
    LANES,
    NONE,
    SAVED,
    SOME,
    check_head_dim,
    dot,
    pad_keys,
    pad_queries,
    pair_kinds,
    widen,
)

_BLOCK = 512  # queries, and keys
_BLOCK_BYTES = 2**20  # of a block of queries with the heads of a group; the block is halved above
_VMEM = 64 * 2**20  # bytes that a kernel may take
_MAX_PAIRS = 250_000  # that the scalar memory holds
# A pair is one word: row << _ROW | column << _COLUMN | flags | kind.
_FIRST, _LAST = 4, 8  # of its row
_COLUMN, _ROW, _COLUMN_MASK = 4, 18, 2**14 - 1


def flash(q, k, v, hidden, offset=0, block_q=None, block_k=None, interpret=False) -> jax.Array:
    """Tree attention of queries offset, offset + 1, ... over all keys; differentiable in q, k, v.

    Args:
      q: [B, T, H, K]; on a TPU K is a multiple of 128.
      k, v: [B, S, KV, K].
      hidden: i32[B, S, D, 2]; key k is hidden from the queries in [hidden[k, d, 0],
        hidden[k, d, 1]) and from those below k.
      offset: i32[].
      block_q, block_k: queries and keys of a block, on a TPU multiples of 128; None: what suits.
      interpret: True or pltpu.InterpretParams(), to run on a CPU.

    Returns:
      [B, T, H, K]; a query that sees nothing gets 0.
    """
    batch, length, heads, dim = q.shape
    if not interpret:
        check_head_dim("tpu", dim)
    best = _BLOCK
    while best > LANES and best * heads // k.shape[2] * dim * q.dtype.itemsize > _BLOCK_BYTES:
        best //= 2
    block_q = block_q or min(best, pl.cdiv(length, LANES) * LANES)
    block_k = block_k or min(best, pl.cdiv(k.shape[1], LANES) * LANES)
    q = pad_queries(q, block_q)
    k, v, hidden = pad_keys(k, v, hidden, block_k)
    kinds = pair_kinds(hidden, offset, length, block_q, block_k)
    if kinds.size > _MAX_PAIRS:
        raise ValueError(
            f"{batch} rows with {kinds.shape[1]} x {kinds.shape[2]} blocks are {kinds.size} pairs, "
            f"the TPU kernel takes {_MAX_PAIRS}: give a device fewer or shorter rows"
        )
    offset = jnp.reshape(jnp.asarray(offset, jnp.int32), 1)
    hidden = hidden.reshape(*hidden.shape[:2], -1)
    q, k, v = (x.reshape(*x.shape[:2], -1) for x in (q, k, v))
    out = cast(jax.Array, _flash((dim, interpret), q, k, v, hidden, kinds, offset))
    return out[:, :length].reshape(batch, length, heads, dim)


# From here on T and S are multiples of the blocks; q, out and their gradients are [B, T, H * K],
# k, v and theirs [B, S, KV * K], hidden i32[B, S, 2D], kinds i32[B, N, M], offset i32[1]; norm (the
# logarithm of a query's sum of exponentials) and delta (out * its gradient) f32[B, KV, G, T].


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _flash(static, q, k, v, hidden, kinds, offset):
    return _flash_forward(static, q, k, v, hidden, kinds, offset)[0]


def _flash_forward(static, q, k, v, hidden, kinds, offset):
    call = functools.partial(_call, static, q, k, hidden, kinds, offset)
    out, norm = call(
        _forward_kernel, {"queries": [q], "keys": [k, v]}, ["queries", "norms"], _query_scratch
    )
    out, norm = checkpoint_name(out, SAVED), checkpoint_name(norm, SAVED)
    return out, (q, k, v, hidden, kinds, offset, out, norm)


def _flash_backward(static, saved, d_out):
    q, k, v, hidden, kinds, offset, out, norm = saved
    batch, kv_heads, group, length = norm.shape
    d_out = d_out.astype(q.dtype)
    delta = d_out.astype(jnp.float32) * out.astype(jnp.float32)
    delta = jnp.sum(delta.reshape(batch, length, kv_heads, group, -1), axis=-1)
    inputs = {"queries": [q, d_out], "keys": [k, v], "norms": [norm, jnp.moveaxis(delta, 1, 3)]}

    call = functools.partial(_call, static, q, k, hidden, kinds, offset)
    (d_q,) = call(_query_kernel, inputs, ["queries"], _query_scratch)
    d_k, d_v = call(_key_kernel, inputs, ["keys", "keys"], _key_scratch, by_key=True)
    return d_q, d_k, d_v, None, None, None


_flash.defvjp(_flash_forward, _flash_backward)


def _query_scratch(group, dim, block_q, block_k):
    lines = pltpu.VMEM((group, block_q, LANES), jnp.float32)
    return [lines, lines, pltpu.VMEM((group, block_q, dim), jnp.float32)]


def _key_scratch(group, dim, block_q, block_k):
    return [pltpu.VMEM((block_k, dim), jnp.float32)] * 2


def _call(static, q, k, hidden, kinds, offset, kernel, inputs, outputs, scratch, by_key=False):
    """Runs a kernel over the visible pairs of blocks, all those of a query (or key) block in turn.

    Inputs and outputs come in blocks, named after what they hold.
    """
    dim, interpret = static
    batch, num_q, num_k = kinds.shape
    block_q, block_k = q.shape[1] // num_q, k.shape[1] // num_k
    kv_heads, group = k.shape[2] // dim, q.shape[2] // k.shape[2]
    pairs, steps = _pairs(kinds.swapaxes(1, 2) if by_key else kinds)

    def spec(shape, index):
        def at(b, n, step, pairs, offset):
            pair = pairs[b * (num_q * num_k) + step]
            row, column = pair >> _ROW, (pair >> _COLUMN) & _COLUMN_MASK
            return index(b, n, column, row) if by_key else index(b, n, row, column)

        return pl.BlockSpec(shape, at)

    specs = {
        "hidden": spec((None, hidden.shape[2], block_k), lambda b, n, i, j: (b, 0, j)),
        "hidden_by_key": spec((None, block_k, hidden.shape[2]), lambda b, n, i, j: (b, j, 0)),
        "queries": spec((None, block_q, group * dim), lambda b, n, i, j: (b, i, n)),
        "keys": spec((None, block_k, dim), lambda b, n, i, j: (b, j, n)),
        "norms": spec((None, None, group, block_q), lambda b, n, i, j: (b, n, 0, i)),
    }
    shapes = {
        "queries": jax.ShapeDtypeStruct(q.shape, q.dtype),
        "keys": jax.ShapeDtypeStruct(k.shape, k.dtype),
        "norms": jax.ShapeDtypeStruct((batch, kv_heads, group, q.shape[1]), jnp.float32),
    }
    hidden = {"hidden_by_key": [hidden]} if by_key else {"hidden": [hidden.swapaxes(1, 2)]}
    inputs = [(name, x) for name, arrays in (hidden | inputs).items() for x in arrays]
    return pl.pallas_call(
        functools.partial(kernel, width=num_q * num_k),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, kv_heads, steps),
            in_specs=[specs[name] for name, _ in inputs],
            out_specs=[specs[name] for name in outputs],
            scratch_shapes=scratch(group, dim, block_q, block_k),
        ),
        out_shape=[shapes[name] for name in outputs],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=_VMEM
        ),
        name=f"npr_tree_attention{kernel.__name__.removesuffix('_kernel')}",
        interpret=interpret,
    )(pairs.reshape(-1), offset, *(x for _, x in inputs))


def _pairs(kinds):
    """The pairs to go through, row by row, from kinds i32[B, N, M].

    Each row has one pair at least, so that its result is written: of kind NONE where it sees
    nothing. What follows the pairs of a batch entry repeats the last block, and does nothing.

    Returns:
      (words i32[B, N * M], steps i32[]: pairs of the batch entry that has most).
    """
    column = jax.lax.broadcasted_iota(jnp.int32, kinds.shape, 2)
    row = jax.lax.broadcasted_iota(jnp.int32, kinds.shape, 1)
    listed = (kinds != NONE) | ((column == 0) & jnp.all(kinds == NONE, axis=2, keepdims=True))
    rank = jnp.cumsum(listed, axis=2)
    word = row << _ROW | column << _COLUMN | kinds
    word |= jnp.where(rank == 1, _FIRST, 0) | jnp.where(rank == rank[:, :, -1:], _LAST, 0)

    listed, word = (x.reshape(len(kinds), -1) for x in (listed, word))
    order = jnp.argsort(~listed, axis=1, stable=True)
    word = jnp.take_along_axis(word, order, axis=1)
    count = jnp.sum(listed, axis=1, dtype=jnp.int32, keepdims=True)
    final = jnp.take_along_axis(word, count - 1, axis=1) >> _COLUMN << _COLUMN
    word = jnp.where(jnp.arange(word.shape[1]) < count, word, final)
    return word, jnp.max(count)


def _each_pair(pairs, offset, width, block_q, block_k, by_key, hidden, begin, see, end):
    """One step: `see(mask)` if something is visible, after `begin` and before `end` of a row.

    The mask is bool [queries, keys], or [keys, queries] if `by_key`; None where all is visible.
    """
    pair = pairs[pl.program_id(0) * width + pl.program_id(2)]
    kind = pair & 3

    @pl.when(pair & _FIRST != 0)
    def _():
        begin()

    @pl.when(kind == ALL)
    def _():
        see(None)

    @pl.when(kind == SOME)
    def _():
        i, j = pair >> _ROW, (pair >> _COLUMN) & _COLUMN_MASK
        shape = (block_q, block_k)
        if by_key:
            i, j, shape = j, i, shape[::-1]
        query = offset[0] + i * block_q + jax.lax.broadcasted_iota(jnp.int32, shape, int(by_key))
        key = j * block_k + jax.lax.broadcasted_iota(jnp.int32, shape, 1 - int(by_key))
        seen = key <= query
        for d in range(0, hidden.shape[1 if by_key else 0], 2):
            bounds = (slice(d, d + 1), slice(d + 1, d + 2))
            start, stop = (hidden[:, x] if by_key else hidden[x, :] for x in bounds)
            seen &= (query < start) | (query >= stop)
        see(seen)

    @pl.when(pair & _LAST != 0)
    def _():
        end()


def _forward_kernel(pairs, offset, hidden, q, k, v, out, norm, top, total, acc, *, width: int):
    """out and norm of a block of queries.

    Blocks: hidden [2D, block_k], q and out [block_q, G * K], k and v [block_k, K], norm
    [G, block_q]. Of the softmax so far: top and total [G, block_q, 128], acc [G, block_q, K].
    """
    group, block_q, dim = acc.shape
    block_k = k.shape[0]

    def begin():
        top[...] = jnp.full(top.shape, EMPTY, top.dtype)
        total[...] = jnp.zeros(total.shape, total.dtype)
        acc[...] = jnp.zeros(acc.shape, acc.dtype)

    def see(seen):
        for g in range(group):
            scores = _scores(q[:, _head(g, dim)], k[...], seen)
            old = top[g]
            new = jnp.maximum(old, jnp.max(scores, axis=1, keepdims=True))
            p = jnp.exp(scores - widen(new, block_k))  # 1 until a query sees something
            scale = jnp.exp(old - new)
            top[g] = new
            total[g] = total[g] * scale + jnp.sum(p, axis=1, keepdims=True)
            acc[g] = acc[g] * widen(scale, dim) + dot(p.astype(v.dtype), v[...], 0)

    def end():
        for g in range(group):
            empty = top[g] < 0.5 * EMPTY
            sums = jnp.where(empty, 1.0, total[g])
            told = jnp.where(widen(empty, dim), 0.0, acc[g] / widen(sums, dim))
            out[:, _head(g, dim)] = told.astype(out.dtype)
            norm[g : g + 1] = jnp.where(empty, 0.0, top[g] + jnp.log(sums)).T[:1]

    _each_pair(pairs, offset, width, block_q, block_k, False, hidden, begin, see, end)


def _query_kernel(
    pairs, offset, hidden, q, d_out, k, v, norm, delta, d_q, norms, deltas, acc, *, width: int
):
    """d_q of a block of queries.

    Blocks as in the forward kernel, d_out and d_q like q, delta like norm. norms and deltas
    [G, block_q, 128] have these as columns.
    """
    group, block_q, dim = acc.shape
    block_k = k.shape[0]

    def begin():
        for g in range(group):
            norms[g] = jnp.broadcast_to(norm[g : g + 1], (LANES, block_q)).T
            deltas[g] = jnp.broadcast_to(delta[g : g + 1], (LANES, block_q)).T
        acc[...] = jnp.zeros(acc.shape, acc.dtype)

    def see(seen):
        for g in range(group):
            scores = _scores(q[:, _head(g, dim)], k[...], seen)
            p = jnp.exp(scores - widen(norms[g], block_k))
            d_p = dot(d_out[:, _head(g, dim)], v[...], 1)
            d_s = p * (d_p - widen(deltas[g], block_k))
            acc[g] += dot(d_s.astype(k.dtype), k[...], 0)

    def end():
        for g in range(group):
            d_q[:, _head(g, dim)] = (acc[g] * dim**-0.5).astype(d_q.dtype)

    _each_pair(pairs, offset, width, block_q, block_k, False, hidden, begin, see, end)


def _key_kernel(
    pairs, offset, hidden, q, d_out, k, v, norm, delta, d_k, d_v, acc_k, acc_v, *, width: int
):
    """d_k and d_v of a block of keys, from all query heads that share them.

    Blocks as in the query kernel, hidden [block_k, 2D], d_k and d_v like k; the sums are
    [block_k, K].
    """
    block_k, dim = k.shape
    group, block_q = norm.shape

    def begin():
        acc_k[...] = jnp.zeros(acc_k.shape, acc_k.dtype)
        acc_v[...] = jnp.zeros(acc_v.shape, acc_v.dtype)

    def see(seen):
        for g in range(group):
            q_g, d_out_g = q[:, _head(g, dim)], d_out[:, _head(g, dim)]
            p = jnp.exp(_scores(k[...], q_g, seen) - norm[g : g + 1])
            d_s = p * (dot(v[...], d_out_g, 1) - delta[g : g + 1])
            acc_v[...] += dot(p.astype(q.dtype), d_out_g, 0)
            acc_k[...] += dot(d_s.astype(q.dtype), q_g, 0)

    def end():
        d_k[...] = (acc_k[...] * dim**-0.5).astype(d_k.dtype)
        d_v[...] = acc_v[...].astype(d_v.dtype)

    _each_pair(pairs, offset, width, block_q, block_k, True, hidden, begin, see, end)


def _scores(a, b, seen):
    scores = dot(a, b, 1) * a.shape[1] ** -0.5
    return scores if seen is None else jnp.where(seen, scores, EMPTY)


def _head(g: int, dim: int):
    """Lanes of query head g of the group."""
    return slice(g * dim, (g + 1) * dim)
