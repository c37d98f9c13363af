"""Tree attention: dense against numpy, blockwise against dense, forward and backward."""

import dataclasses
import functools
import re
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from npr_jax.base.mesh import MeshConfig, make_mesh
from npr_jax.model import PRESETS
from npr_jax.model.attention import (
    _skip,
    blockwise,
    chunk_order,
    dense,
    take_chunks,
    tree_attend,
)


def inputs(length, batch=2, heads=4, kv_heads=2, dim=8, depth=3, seed=0, dtype=np.float32):
    """q, k, v and random nested intervals, the last column as in packed rows (never joined)."""
    rng = np.random.default_rng(seed)
    q, k, v = (
        rng.normal(size=(batch, length, n, dim)).astype(dtype) for n in (heads, kv_heads, kv_heads)
    )
    hidden = np.zeros((batch, length, depth, 2), np.int32)
    for b in range(batch):
        for d in range(depth - 1):
            for start in range(0, length - 6, 17 + 5 * d):
                end = start + int(rng.integers(2, 12))
                join = min(length, end + int(rng.integers(0, 30)))
                hidden[b, start:end, d] = end, join
        cut = length // 3
        hidden[b, :cut, depth - 1] = cut, length
    return q, k, v, hidden


def brute_force(q, k, v, hidden):
    batch, length, heads, dim = q.shape
    out = np.zeros(q.shape)
    for b in range(batch):
        for t in range(length):
            keys = [s for s in range(t + 1) if not any(lo <= t < hi for lo, hi in hidden[b, s])]
            for h in range(heads):
                kv = h * k.shape[2] // heads
                scores = k[b, keys, kv] @ q[b, t, h] / np.sqrt(dim)
                weights = np.exp(scores - scores.max())
                out[b, t, h] = weights @ v[b, keys, kv] / weights.sum()
    return out


def test_dense_is_the_definition():
    args = inputs(50)
    np.testing.assert_allclose(dense(*args), brute_force(*args), atol=1e-5)


@pytest.mark.parametrize(("length", "block"), [(50, 16), (64, 16), (33, 32), (20, 64), (97, 8)])
def test_blockwise_is_dense_forward_and_backward(length, block):
    q, k, v, hidden = inputs(length, seed=length)
    weight = np.random.default_rng(1).normal(size=q.shape).astype(np.float32)

    def value_and_grads(attention):
        def loss(q, k, v):
            out = attention(q, k, v, hidden)
            return jnp.sum(out * weight), out

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)

    (_, expected), expected_grads = value_and_grads(dense)
    (_, out), grads = value_and_grads(functools.partial(blockwise, block=block))
    np.testing.assert_allclose(out, expected, atol=1e-5)
    for ours, theirs in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("first, last", [(0, 20), (20, 45), (69, 70)])
def test_some_queries_of_a_row_see_what_they_see_in_the_whole(first, last):
    q, k, v, hidden = inputs(70)

    def value_and_grads(function):
        def loss(q, k, v):
            return jnp.sum(jnp.sin(function(q, k, v)))

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(q, k, v)

    expected = value_and_grads(lambda q, k, v: dense(q, k, v, hidden)[:, first:last])
    found = value_and_grads(
        lambda q, k, v: blockwise(q[:, first:last], k, v, hidden, 16, jnp.int32(first))
    )
    chex.assert_trees_all_close(found, expected, atol=1e-4, rtol=1e-5)


def test_blockwise_in_bfloat16():
    args = [jnp.asarray(x, jnp.bfloat16) if x.dtype != np.int32 else x for x in inputs(70)]
    expected = brute_force(*(np.asarray(x, np.float64) for x in args[:3]), args[3])
    out = blockwise(*args, block=16)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, atol=3e-2)


def test_skipped_blocks_are_those_that_nobody_sees():
    length, size = 64, 8
    hidden = np.zeros((1, length, 2, 2), np.int32)
    hidden[:, :16, 0] = 20, 44  # two blocks, hidden from all queries of the blocks 3 and 4 only
    hidden[:, 16:20, 1] = 20, 64  # half a block
    skipped = [
        [
            bool(_skip(hidden[:, j * size : (j + 1) * size], i * size, size))
            for j in range(length // size)
        ]
        for i in range(length // size)
    ]
    assert np.argwhere(skipped).tolist() == [[i, j] for i in range(3, 5) for j in range(2)]


@pytest.fixture(scope="module")
def backward_text():
    """The compiled backward pass of eight blocks of 128 tokens, two heads of 8."""
    q, k, v, hidden = inputs(1024, batch=1, heads=2, kv_heads=1)
    grad = jax.grad(
        lambda q, k, v: jnp.sum(blockwise(q, k, v, hidden, 128) ** 2), argnums=(0, 1, 2)
    )
    return jax.jit(grad).lower(q, k, v).compile().as_text()


def test_no_array_of_length_squared(backward_text):
    assert "1024,1024" not in backward_text
    assert "128,128" in backward_text


def test_the_loops_copy_no_gradient_of_all_queries(backward_text):
    whole = "f32[8,1,1,2,128,8]"
    assert whole in backward_text
    assert not re.search(rf"{re.escape(whole)}\S* copy\(%get-tuple-element", backward_text)


@pytest.mark.parametrize("length", [64, 68])  # eight equal chunks, and none
def test_parts_of_a_row_attend_as_the_whole_row(length):
    mesh, (q, k, v, hidden) = make_mesh(MeshConfig(sequence=4)), inputs(length)
    order = chunk_order(mesh, length)
    assert bool(order) == (length == 64)

    def stand(x):
        return take_chunks(jnp.asarray(x), order) if order else jnp.asarray(x)

    config = dataclasses.replace(PRESETS["tiny"], attention="blockwise", attention_block=8)
    attend = tree_attend(config, jnp.asarray(hidden), mesh)
    out, _ = jax.jit(lambda *x: attend(*x, 0, None))(stand(q), stand(k), stand(v))
    np.testing.assert_allclose(out, stand(dense(q, k, v, hidden)), atol=1e-5)


@pytest.mark.parametrize("parts", [2, 4, 16])
def test_parts_of_a_row_see_as_many_keys(parts):
    """Under a causal mask; in one piece the last part would see nearly twice the mean."""
    length = 64 * parts
    order = chunk_order(SimpleNamespace(shape={"sequence": parts}), length)
    place = take_chunks(jnp.arange(length)[None], order)[0]
    assert sorted(place.tolist()) == list(range(length))
    seen = np.asarray(place + 1).reshape(parts, -1).sum(axis=1)  # of every part's queries
    assert seen.max() == seen.min()
