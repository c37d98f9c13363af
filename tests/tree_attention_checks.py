"""What both kernels of tree attention are checked with: rows of every kind, and their gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from npr_jax.kernels.blocks import EMPTY
from npr_jax.model.attention import _visible
from npr_jax.tree import Block, layout


def nested(length, rng, start=0, depth=0):
    """Blocks of two to four steps in tokens [start, length), some steps with blocks inside."""
    blocks = []
    at = start + int(rng.integers(1, 4))
    while length - at > 8:
        steps, close = [], at + 1
        end = close + 1
        for _ in range(int(rng.integers(2, 5))):
            size = int(rng.integers(2, max(3, (length - at) // 3)))
            if end + size + 2 > length:
                break
            if depth < 1 and size > 12:
                blocks += nested(end + size - 1, rng, end + 1, depth + 1)
            steps.append((end, end + size))
            end += size
        if not steps:
            break
        blocks.append(Block(at, close, (), tuple(steps), end, None, end, depth))
        at = end + int(rng.integers(1, 9))
    return blocks


def tree_row(length, seed):
    return layout(length, nested(length, np.random.default_rng(seed))).hidden


def wide(hidden, depth=4):
    """hidden i32[T, D, 2] with empty intervals up to `depth` columns."""
    return np.pad(hidden, ((0, 0), (0, depth - hidden.shape[1]), (0, 0)))


def packed_row(length, seed):
    """Trees one after another that never see each other."""
    rng = np.random.default_rng(seed)
    hidden, at = np.zeros((length, 4, 2), np.int32), 0
    while at < length:
        end = min(length, at + int(rng.integers(5, length // 2 + 6)))
        inside = tree_row(end - at, seed + at)
        hidden[at:end, : inside.shape[1]] = np.where(inside > 0, inside + at, 0)
        hidden[at:end, 3] = end, length
        at = end
    return hidden


def grouped_row(length, seed):
    """A prompt and responses that see it, and not each other."""
    rng = np.random.default_rng(seed)
    hidden, at = np.zeros((length, 4, 2), np.int32), length // 4
    while at < length:
        end = min(length, at + int(rng.integers(4, length // 3 + 5)))
        hidden[at:end, 3] = end, length
        at = end
    return hidden


def rows(length, seed=0):
    """hidden i32[3, T, 4, 2]: nested blocks, packed documents, grouped responses."""
    return np.stack(
        [
            wide(tree_row(length, seed)),
            packed_row(length, seed + 1),
            grouped_row(length, seed + 2),
        ]
    )


def problem(hidden, num_queries=None, heads=4, kv_heads=2, dim=16, dtype="float32", seed=0):
    rng = np.random.default_rng(seed)
    batch, length = hidden.shape[:2]
    shapes = [(batch, num_queries or length, heads, dim), *[(batch, length, kv_heads, dim)] * 2]
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def reference(q, k, v, hidden, offset=0):
    """Like `dense`, for queries from `offset` on; 0 for those that see nothing."""
    batch, length, _, dim = q.shape
    queries, keys = offset + jnp.arange(length), jnp.arange(k.shape[1])
    seen = _visible(queries, keys, jnp.asarray(hidden))[:, None, None]
    grouped = q.reshape(batch, length, k.shape[2], -1, dim)
    scores = jnp.einsum("bqngd,bknd->bngqk", grouped, k) * dim**-0.5
    weights = jax.nn.softmax(jnp.where(seen, scores, EMPTY), axis=-1)
    weights = jnp.where(jnp.any(seen, axis=-1, keepdims=True), weights, 0)
    return jnp.einsum("bngqk,bknd->bqngd", weights, v).reshape(q.shape)


def value_and_grads(attend):
    """A compiled function for the output, and for the gradients of a random projection of it."""

    def run(q, k, v, hidden, offset):
        weight = np.random.default_rng(9).normal(size=q.shape).astype(np.float32)

        def loss(q, k, v):
            out = attend(q, k, v, hidden, offset)
            assert out.shape == q.shape
            assert out.dtype == q.dtype
            return jnp.sum(out.astype(jnp.float32) * weight), out

        (_, out), grads = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(q, k, v)
        return [x.astype(jnp.float32) for x in (out, *grads)]

    compiled = jax.jit(run)
    return lambda *args: [np.asarray(x) for x in compiled(*args)]


_reference = value_and_grads(reference)


def check(flash, q, k, v, hidden, offsets=(0,)):
    """Numbers of a kernel against the reference, which gets the same in float32."""
    kernel = value_and_grads(flash)
    for offset in offsets:
        ours = kernel(q, k, v, hidden, offset)
        theirs = _reference(*(x.astype(jnp.float32) for x in (q, k, v)), hidden, offset)
        for name, a, b in zip(("out", "d_q", "d_k", "d_v"), ours, theirs, strict=True):
            assert np.isfinite(a).all(), name
            if q.dtype == jnp.float32:
                np.testing.assert_allclose(a, b, atol=1e-5, err_msg=name)
            else:  # a sum of a few numbers that are rounded to 8 bits
                off = np.linalg.norm(a - b) / np.linalg.norm(b)
                assert off < 0.01, (name, off)
                np.testing.assert_allclose(a, b, atol=0.02 * np.abs(b).max(), err_msg=name)
    return ours


def check_skips(flash, length, block):
    """Keys that are in no visible pair of blocks may be NaN, and change nothing."""
    hidden = np.zeros((1, length, 1, 2), np.int32)
    middle = slice(block, 2 * block)
    hidden[:, middle, 0] = 2 * block, length  # a block of keys that the later queries do not see
    q, k, v = problem(hidden)
    later = slice(2 * block, None)
    poisoned = [x.at[:, middle].set(jnp.nan) for x in (k, v)]
    kernel = value_and_grads(functools.partial(flash, block_q=block, block_k=block))
    ours = kernel(q[:, later], *poisoned, hidden, 2 * block)
    for a, b in zip(ours, _reference(q[:, later], k, v, hidden, 2 * block), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
