"""The GPU kernels of tree attention: numbers in interpret mode, and their lowering for CUDA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import lowered_for_cuda
from tree_attention_checks import check, check_skips, problem, rows

from npr_jax.kernels import tree_gpu as attention_gpu

flash = functools.partial(attention_gpu.flash, interpret=True)


@pytest.mark.parametrize(
    ("length", "block_q", "block_k", "kv_heads", "dtype"),
    [
        (64, 16, 16, 2, "float32"),
        pytest.param(75, 32, 16, 1, "float32", marks=pytest.mark.slow),
        pytest.param(71, 16, 16, 4, "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_kernels_are_the_reference_forward_and_backward(length, block_q, block_k, kv_heads, dtype):
    hidden = rows(length, seed=length)
    attend = functools.partial(flash, block_q=block_q, block_k=block_k)
    check(attend, *problem(hidden, kv_heads=kv_heads, dtype=dtype), hidden)


@pytest.mark.slow
@pytest.mark.parametrize(("heads", "dim", "dtype"), [(8, 128, "bfloat16"), (4, 64, "float32")])
def test_kernels_at_the_shapes_of_models_and_their_own_blocks(heads, dim, dtype):
    hidden = rows(200)[1:2]
    check(flash, *problem(hidden, heads=heads, dim=dim, dtype=dtype), hidden)


@pytest.mark.slow
def test_queries_that_start_elsewhere():
    """With 60 there are queries after the last key."""
    hidden = rows(70)
    attend = functools.partial(flash, block_q=16, block_k=16)
    check(attend, *problem(hidden, num_queries=35), hidden, offsets=(0, 13, 32, 60))


@pytest.mark.slow
def test_queries_that_see_nothing_get_0():
    hidden = np.zeros((1, 48, 1, 2), np.int32)
    hidden[:, :21, 0] = 5, 21
    hidden[:, 5:40, 0] = 5, 40
    attend = functools.partial(flash, block_q=8, block_k=8)
    out, *_ = check(attend, *problem(hidden), hidden)
    assert not out[:, 5:21].any()
    assert out[:, :5].all()


@pytest.mark.slow
def test_blocks_that_nobody_sees_are_skipped():
    check_skips(flash, length=64, block=16)


@pytest.mark.parametrize("dim", [8, 24])
def test_head_dim_that_the_kernel_does_not_take(dim):
    hidden = rows(16)
    with pytest.raises(ValueError, match=f"head_dim is {dim}, .* one of 16, 32, .*attention"):
        flash(*problem(hidden, dim=dim), hidden)


@pytest.mark.parametrize(
    ("length", "heads", "kv_heads", "dim", "dtype"),
    [
        (32768, 32, 8, 128, "bfloat16"),
        (1000, 4, 2, 32, "float32"),
        (4096, 8, 1, 256, "bfloat16"),
    ],
)
def test_lowering_for_cuda(length, heads, kv_heads, dim, dtype):
    q = jax.ShapeDtypeStruct((1, length, heads, dim), dtype)
    kv = jax.ShapeDtypeStruct((1, length, kv_heads, dim), dtype)
    hidden = jax.ShapeDtypeStruct((1, length, 4, 2), jnp.int32)

    def gradient(q, k, v, hidden, offset, d_out):
        out, pull = jax.vjp(lambda *x: attention_gpu.flash(*x, hidden, offset), q, k, v)
        return out, pull(d_out)

    offset = jax.ShapeDtypeStruct((), jnp.int32)
    text = lowered_for_cuda(gradient, q, kv, kv, hidden, offset, q)
    calls = [line for line in text.splitlines() if "__gpu$xla.gpu.triton" in line]
    for name, call in zip(("forward", "query", "key"), calls, strict=True):
        assert f"npr_tree_attention_{name}" in call
    assert f"x{heads}x{length}x{length}x" not in text
