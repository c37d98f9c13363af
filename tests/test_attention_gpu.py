"""The GPU kernel: how it cuts its work (numbers: test_paged_attention.py), and its lowering."""

import functools

import jax
import jax.numpy as jnp
import pytest
from conftest import lowered_for_cuda
from paged_attention_checks import ENTRIES, FILLS, REST, check, problem

from npr_jax.decode.attention import Shared
from npr_jax.kernels import paged_gpu as attention_gpu
from npr_jax.kernels.paged_gpu import paged_attention

attend = functools.partial(paged_attention, interpret=True)


@pytest.mark.parametrize(("chunk", "group"), [(1, 1), (20, 1)])
@pytest.mark.parametrize("all_lines", [1, 2**15], ids=["one stretch", "five stretches"])
def test_stretches_are_merged(monkeypatch, all_lines, chunk, group):
    """With blocks of 16 slots, tiles of 16 queries and stretches of 16 slots or of a whole row."""
    for name in ("_BLOCK", "_LINES", "_STRETCH"):
        monkeypatch.setattr(attention_gpu, name, 16)
    monkeypatch.setattr(attention_gpu, "_ALL_LINES", all_lines)
    check(attend, problem(ENTRIES, FILLS, chunk, group=group))


def test_blocks_that_nobody_sees_are_not_worked_on(monkeypatch):
    """Of the 16 blocks of 16 slots in a row: 3 of the first row, none of the second."""
    blocks = []
    original = attention_gpu.dot

    def dot(a, b, axis):
        jax.debug.callback(lambda: blocks.append(axis))
        return original(a, b, axis)

    monkeypatch.setattr(attention_gpu, "dot", dot)
    monkeypatch.setattr(attention_gpu, "_BLOCK", 16)
    check(attend, problem([40, REST], [[4] * 62] * 2, kv_heads=1))
    jax.effects_barrier()
    assert len(blocks) == 2 * 3


@pytest.mark.parametrize("dim", [8, 24])
def test_head_dim_that_the_kernel_does_not_take(dim):
    with pytest.raises(ValueError, match=f"head_dim is {dim}, .* one of 16, 32, .*attention"):
        paged_attention(*problem([5], [[4, 4]], dim=dim))


@pytest.mark.parametrize("size", [16, 64])
@pytest.mark.parametrize(("num_rows", "chunk"), [(64, 1), (1, 1), (4, 128)])
def test_lowering_for_cuda_at_qwen3_4b_and_16k(num_rows, chunk, size):
    width = 16384 // size + 4
    pool = jax.ShapeDtypeStruct((36, 4 * width, size, 16, 128), jnp.bfloat16)
    arguments = (
        jax.ShapeDtypeStruct((num_rows, chunk, 32, 128), jnp.bfloat16),
        pool,
        jax.ShapeDtypeStruct((), jnp.int32),
        jax.ShapeDtypeStruct((num_rows, width), jnp.int32),
        jax.ShapeDtypeStruct((num_rows, width + 1), jnp.int32),
        *[jax.ShapeDtypeStruct((num_rows, chunk), jnp.int32)] * 2,
        jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), Shared.nothing(num_rows)),
    )
    text = lowered_for_cuda(paged_attention, *arguments)
    calls = [line for line in text.splitlines() if "__gpu$xla.gpu.triton" in line]
    assert len(calls) == (2 if chunk == 1 < num_rows else 1)  # of runs, and of each row's own
    assert all("npr_paged_attention" in call for call in calls)
    # The pool is an argument of the function and of the kernels, and of nothing else.
    name = "x".join(map(str, pool.shape)) + "xbf16"
    assert all(name in call for call in calls)
    assert text.count(name) == 1 + len(calls)
