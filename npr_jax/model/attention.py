"""Tree attention: causal attention in which every key is hidden from a few intervals of queries.

`hidden` i32[B, T, D, 2]: key k is hidden from query q where hidden[k, d, 0] <= q < hidden[k, d, 1]
for any d. `dense` is the reference; `blockwise` is the same in O(T) memory (online softmax forward,
recomputation backward, as FlashAttention), and skips what no query of a block can see. "pallas"
are kernels for TPU and GPU that do so too (kernels/tree_tpu.py, kernels/tree_gpu.py).

On a mesh every device attends with its own rows, heads and queries; keys and values are gathered
over `sequence` (context parallelism). Of N parts each has two of the 2N chunks of a row's queries,
the i-th and the i-th from the end: late queries see most keys, so parts in one piece would wait for
the last (`chunk_order`).
"""

import functools
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from npr_jax.base.mesh import BATCH, activations
from npr_jax.kernels import choose_attention, exact
from npr_jax.kernels.blocks import EMPTY, SAVED
from npr_jax.model.config import ModelConfig


def kernel():
    """The `flash` of the platform that compiles: GPU, or else TPU (also for its compiler alone)."""
    if jax.default_backend() == "gpu":
        from npr_jax.kernels.tree_gpu import flash
    else:
        from npr_jax.kernels.tree_tpu import flash
    return flash


def chunk_order(mesh: Mesh | None, length: int) -> list[int]:
    """Which of a row's equal chunks stands at each place of rows of `length` tokens, so that the
    parts of `sequence` attend alike; [] where rows stand as they are."""
    parts = mesh.shape["sequence"] if mesh else 1
    if parts == 1 or length % (2 * parts):
        return []
    return [chunk for part in range(parts) for chunk in (part, 2 * parts - 1 - part)]


def take_chunks(x: jax.Array, order: list[int]) -> jax.Array:
    """x [B, T, ...] in equal chunks, in this order."""
    chunks = x.reshape(x.shape[0], len(order), -1, *x.shape[2:])
    return chunks[:, np.array(order)].reshape(x.shape)


def tree_attend(config: ModelConfig, hidden: jax.Array, mesh: Mesh | None = None):
    """The model's `attend` for whole rows, under `hidden` i32[B, T, D, 2]; on a mesh the tokens of
    q, k and v stand in `chunk_order`, those of `hidden` as they are."""
    if mesh is None:
        return lambda q, k, v, layer, state: (_one_device(config, q, k, v, hidden, 0), state)
    order = chunk_order(mesh, hidden.shape[1])

    def part(q, k, v, hidden):
        number, size = jax.lax.axis_index("sequence"), q.shape[1]
        k, v, hidden = (
            jax.lax.all_gather(x, "sequence", axis=1, tiled=True) for x in (k, v, hidden)
        )
        if not order:
            return _one_device(config, q, k, v, hidden, number * size)
        k, v = (take_chunks(x, np.argsort(order).tolist()) for x in (k, v))
        first, last = number * size // 2, (len(order) - 1 - number) * size // 2
        halves = zip(jnp.split(q, 2, axis=1), (first, last), strict=True)
        found = [_one_device(config, half, k, v, hidden, offset) for half, offset in halves]
        return jnp.concatenate(cast(list[jax.Array], found), axis=1)

    heads, tokens = P(BATCH, "sequence", "tensor"), activations(mesh)
    whole = jax.shard_map(
        part, mesh=mesh, in_specs=(heads, heads, heads, tokens), out_specs=heads, check_vma=False
    )
    return lambda q, k, v, layer, state: (whole(q, k, v, hidden), state)


def _one_device(config: ModelConfig, q, k, v, hidden, offset):
    """Attention of queries that start at index `offset` of the row whose keys these are."""
    implementation = choose_attention(config.attention, config.head_dim)
    if implementation == "dense":
        return dense(q, k, v, hidden, offset)
    if implementation == "pallas":
        return kernel()(q, k, v, hidden, offset)
    if implementation == "exact":
        return _exact(q, k, v, hidden, config.attention_block)
    return blockwise(q, k, v, hidden, config.attention_block, offset)


def _visible(queries: jax.Array, keys: jax.Array, hidden: jax.Array) -> jax.Array:
    """bool[B, Q, K]: whether query index sees key index; hidden i32[B, K, D, 2] is of the keys."""
    q = queries[None, :, None, None]
    inside = (hidden[:, None, :, :, 0] <= q) & (q < hidden[:, None, :, :, 1])
    return (keys[None, None, :] <= queries[None, :, None]) & ~jnp.any(inside, axis=-1)


def dense(q: jax.Array, k: jax.Array, v: jax.Array, hidden: jax.Array, offset=0) -> jax.Array:
    """The reference: q [B, T, H, K], k and v [B, S, KV, K] -> [B, T, H, K], through a [T, S] mask.
    Query t has index `offset + t`."""
    batch, length, heads, dim = q.shape
    seen = _visible(offset + jnp.arange(length), jnp.arange(k.shape[1]), hidden)[:, None, None]
    grouped = q.reshape(batch, length, k.shape[2], -1, dim)
    scores = jnp.einsum("bqngd,bknd->bngqk", grouped, k, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(jnp.where(seen, scores * dim**-0.5, EMPTY), axis=-1)
    out = jnp.einsum("bngqk,bknd->bqngd", weights.astype(v.dtype), v)
    return out.reshape(batch, length, heads, dim)


def blockwise(
    q: jax.Array, k: jax.Array, v: jax.Array, hidden: jax.Array, block: int, offset=0
) -> jax.Array:
    """Like `dense`, without any [T, S] array, in blocks of `block` queries and keys."""
    batch, length, heads, dim = q.shape
    keys, kv_heads = k.shape[1:3]
    if keys <= block:
        return dense(q, k, v, hidden, offset)

    def cut(x, groups):  # [B, T, KV * G, K] -> [T / block, B, KV, G, block, K]
        x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % block), (0, 0), (0, 0)))
        x = x.reshape(batch, -1, block, kv_heads, groups, dim)
        return x.transpose(1, 0, 3, 4, 2, 5)

    hidden = jnp.pad(hidden, ((0, 0), (0, -keys % block), (0, 0), (0, 0)))
    hidden = hidden.reshape(batch, -1, block, *hidden.shape[2:]).swapaxes(0, 1)
    k, v = cut(k, 1)[:, :, :, 0], cut(v, 1)[:, :, :, 0]
    out = _flash(cut(q, heads // kv_heads), k, v, hidden, jnp.int32(offset))
    out = out.transpose(1, 0, 4, 2, 3, 5).reshape(batch, -1, heads, dim)
    return out[:, :length]


# Inside, N blocks of S queries and M blocks of S keys: q, out [N, B, KV, G, S, K];
# k, v [M, B, KV, S, K]; hidden i32[M, B, S, D, 2]; `first`, the index of a block's first query;
# sums of exponentials and their gradients are float32.


def _scores(q, k, hidden, first, j):
    """Scaled scores f32[B, KV, G, S, S] of a query block and key block j, masked."""
    size, dim = q.shape[-2:]
    seen = _visible(first + jnp.arange(size), j * size + jnp.arange(size), hidden)
    scores = jnp.einsum("bngqd,bnkd->bngqk", q, k, preferred_element_type=jnp.float32)
    return jnp.where(seen[:, None, None], scores * dim**-0.5, EMPTY)


def _skip(hidden, first, size):
    """Whether every key of a block has an interval that covers all of a query block."""
    covered = (hidden[..., 0] <= first) & (first + size <= hidden[..., 1])
    return jnp.all(jnp.any(covered, axis=-1))


@jax.custom_vjp
def _flash(q, k, v, hidden, offset):
    return _flash_forward(q, k, v, hidden, offset)[0]


def _flash_forward(q, k, v, hidden, offset):
    num, size = k.shape[0], q.shape[-2]

    def row(_, inputs):
        i, q_i = inputs
        first = offset + i * size

        def block(j, carry):
            def see(carry):
                top, total, acc = carry
                s = _scores(q_i, k[j], hidden[j], first, j)
                new = jnp.maximum(top, jnp.max(s, axis=-1))
                p = jnp.where(s > 0.5 * EMPTY, jnp.exp(s - new[..., None]), 0.0)
                scale = jnp.exp(top - new)
                product = jnp.einsum(
                    "bngqk,bnkd->bngqd", p.astype(v.dtype), v[j], preferred_element_type=jnp.float32
                )
                return new, total * scale + jnp.sum(p, axis=-1), acc * scale[..., None] + product

            return jax.lax.cond(_skip(hidden[j], first, size), lambda carry: carry, see, carry)

        start = (
            jnp.full(q_i.shape[:-1], EMPTY, jnp.float32),
            jnp.zeros(q_i.shape[:-1], jnp.float32),
            jnp.zeros(q_i.shape, jnp.float32),
        )
        last = jnp.minimum(num, (first + size - 1) // size + 1)  # no key block after it is causal
        top, total, acc = jax.lax.fori_loop(0, last, block, start)
        some = total > 0  # a query that only fills up a block may see nothing
        total = jnp.where(some, total, 1.0)
        norm = jnp.where(some, top + jnp.log(total), 0.0)
        return None, ((acc / total[..., None]).astype(q.dtype), norm)

    _, (out, norm) = jax.lax.scan(row, None, (jnp.arange(q.shape[0]), q))
    out, norm = checkpoint_name(out, SAVED), checkpoint_name(norm, SAVED)
    return out, (q, k, v, hidden, offset, out, norm)


def _flash_backward(saved, d_out):
    q, k, v, hidden, offset, out, norm = saved
    num, size, dim = q.shape[0], q.shape[-2], q.shape[-1]
    d_out = d_out.astype(q.dtype)
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

    def column(d_q, inputs):
        j, k_j, v_j, hidden_j = inputs

        def block(i, carry):
            d_q, *sums = carry
            first = offset + i * size

            def see(d_k, d_v):
                p = jnp.exp(_scores(q[i], k_j, hidden_j, first, j) - norm[i][..., None])
                d_p = product("bngqd,bnkd->bngqk", d_out[i], v_j)
                d_s = (p * (d_p - delta[i][..., None]) * dim**-0.5).astype(q.dtype)
                return (
                    product("bngqk,bnkd->bngqd", d_s, k_j),
                    d_k + product("bngqk,bngqd->bnkd", d_s, q[i]),
                    d_v + product("bngqk,bngqd->bnkd", p.astype(q.dtype), d_out[i]),
                )

            def skip(d_k, d_v):
                return jnp.zeros(d_q.shape[1:], d_q.dtype), d_k, d_v

            # Not d_q itself: XLA on a CPU copies all that goes through a branch, for every block.
            part, *sums = jax.lax.cond(_skip(hidden_j, first, size), skip, see, *sums)
            return d_q.at[i].add(part), *sums

        zero = jnp.zeros(k_j.shape, jnp.float32)
        start = jnp.clip((j * size - offset) // size, 0, num)  # the block before it sees no key
        d_q, d_k, d_v = jax.lax.fori_loop(start, num, block, (d_q, zero, zero))
        return d_q, (d_k.astype(k.dtype), d_v.astype(v.dtype))

    d_q = jnp.zeros(q.shape, jnp.float32)
    d_q, (d_k, d_v) = jax.lax.scan(column, d_q, (jnp.arange(k.shape[0]), k, v, hidden))
    return d_q.astype(q.dtype), d_k, d_v, None, None


_flash.defvjp(_flash_forward, _flash_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _exact(q, k, v, hidden, block: int):
    """Like `blockwise`, with the bits of an engine's attention; only its gradient has `block`s."""
    return exact.rows(q, k, v, hidden)[0]


def _exact_forward(q, k, v, hidden, block):
    out, norm = exact.rows(q, k, v, hidden)
    out, norm = checkpoint_name(out, SAVED), checkpoint_name(norm, SAVED)
    return out, (q, k, v, hidden, out, norm)


def _exact_backward(block, saved, d_out):
    q, k, v, hidden, out, norm = saved
    batch, length, heads, _ = q.shape
    kv_heads = k.shape[2]

    def cut(x):  # [B, T, H, ...] -> [T / block, B, KV, G, block, ...]
        x = jnp.pad(x, ((0, 0), (0, -length % block), *((0, 0),) * (x.ndim - 2)))
        x = x.reshape(batch, -1, block, kv_heads, x.shape[2] // kv_heads, *x.shape[3:])
        return jnp.moveaxis(x, (0, 2), (1, 4))

    def whole(x, heads):
        x = jnp.moveaxis(x, (1, 4), (0, 2))
        return x.reshape(batch, -1, heads, x.shape[-1])[:, :length]

    hidden = jnp.pad(hidden, ((0, 0), (0, -length % block), (0, 0), (0, 0)))
    hidden = hidden.reshape(batch, -1, block, *hidden.shape[2:]).swapaxes(0, 1)
    inputs = cut(q), cut(k)[:, :, :, 0], cut(v)[:, :, :, 0], hidden, jnp.int32(0)
    d_q, d_k, d_v, *_ = _flash_backward((*inputs, cut(out), cut(norm)), cut(d_out))
    d_k, d_v = (whole(x[:, :, :, None], kv_heads) for x in (d_k, d_v))
    return whole(d_q, heads), d_k, d_v, None


_exact.defvjp(_exact_forward, _exact_backward)
