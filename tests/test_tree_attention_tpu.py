"""The TPU kernels of tree attention: numbers in interpret mode, and the real TPU compiler."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import spread
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import SingleDeviceSharding
from tree_attention_checks import check, check_skips, problem, rows

from npr_jax.kernels import tree_tpu as attention_tpu
from npr_jax.kernels.blocks import ALL, NONE, SOME
from npr_jax.kernels.tree_tpu import _COLUMN, _COLUMN_MASK, _FIRST, _LAST, _ROW, _pairs

CHIPS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
flash = functools.partial(attention_tpu.flash, interpret=True)


@pytest.mark.parametrize(
    ("length", "block_q", "block_k", "kv_heads", "dtype"),
    [
        (64, 16, 16, 2, "float32"),
        pytest.param(75, 16, 32, 1, "float32", marks=pytest.mark.slow),
        pytest.param(71, 16, 16, 4, "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_kernels_are_the_reference_forward_and_backward(length, block_q, block_k, kv_heads, dtype):
    hidden = rows(length, seed=length)
    attend = functools.partial(flash, block_q=block_q, block_k=block_k)
    check(attend, *problem(hidden, kv_heads=kv_heads, dtype=dtype), hidden)


@pytest.mark.slow
def test_kernels_at_the_shapes_of_a_model_and_their_own_blocks():
    hidden = rows(200)[1:2]
    check(flash, *problem(hidden, heads=8, dim=128, dtype="bfloat16"), hidden)


@pytest.mark.slow
def test_queries_that_start_elsewhere():
    """With 60 there are queries after the last key."""
    hidden = rows(70)
    attend = functools.partial(flash, block_q=16, block_k=16)
    check(attend, *problem(hidden, num_queries=35), hidden, offsets=(0, 13, 32, 60))


def test_queries_that_see_nothing_get_0():
    hidden = np.zeros((1, 48, 1, 2), np.int32)
    hidden[:, :21, 0] = 5, 21  # in a block that others see, and in one that nobody sees
    hidden[:, 5:40, 0] = 5, 40
    attend = functools.partial(flash, block_q=8, block_k=8)
    out, *_ = check(attend, *problem(hidden), hidden)
    assert not out[:, 5:21].any()
    assert out[:, :5].all()


@pytest.mark.slow
def test_blocks_that_nobody_sees_are_skipped():
    check_skips(flash, length=64, block=16)


@pytest.mark.slow
def test_copies_of_blocks_are_waited_for():
    """In the interpreter that has memories and copies, with memory full of NaN."""
    hidden = rows(40)[1:2]
    params = pltpu.InterpretParams(dma_execution_mode="on_wait", uninitialized_memory="nan")
    attend = functools.partial(attention_tpu.flash, block_q=16, block_k=16, interpret=params)
    check(attend, *problem(hidden), hidden)


def test_each_visible_pair_is_gone_through_once():
    kinds = np.random.default_rng(0).choice([NONE, NONE, SOME, ALL], (3, 5, 7))
    kinds[0, 2] = kinds[2] = NONE
    words, steps = (np.asarray(x) for x in _pairs(jnp.asarray(kinds, jnp.int32)))
    sizes = []
    for of, line in zip(kinds, words, strict=True):
        row, column, kind = line >> _ROW, (line >> _COLUMN) & _COLUMN_MASK, line & 3
        pairs = [tuple(map(int, x)) for x in zip(row, column, kind, strict=True) if x[2] != NONE]
        assert pairs == [(i, j, of[i, j]) for i, j in np.argwhere(of != NONE)]
        for i in range(5):  # each row begins once and ends once, at its first and last pair
            mine = np.flatnonzero(row == i)
            begun, ended = (np.flatnonzero((line & flag != 0) & (row == i)) for flag in (4, 8))
            assert begun.tolist() == mine[:1].tolist()
            assert len(ended) == 1
            assert not kind[ended[0] + 1 :][row[ended[0] + 1 :] == i].any()
        size = np.flatnonzero(line & _LAST)[-1] + 1
        assert np.all(line[size:] == line[size - 1] >> _COLUMN << _COLUMN)
        sizes.append(size)
    assert (_FIRST, _LAST) == (4, 8)
    assert steps == max(sizes)


def test_what_the_kernel_does_not_take():
    hidden = rows(16)
    with pytest.raises(ValueError, match=r"head_dim is 64.*multiple of 128.*attention"):
        attention_tpu.flash(*problem(hidden, dim=64), hidden)
    long = jax.eval_shape(lambda: jnp.zeros((1, 8 * 1024, 1, 2), jnp.int32))
    q = jax.eval_shape(lambda: jnp.zeros((1, 8 * 1024, 1, 128)))
    with pytest.raises(ValueError, match="1024 x 1024 blocks are 1048576 pairs"):
        jax.eval_shape(functools.partial(flash, block_q=8, block_k=8), q, q, q, long)


@pytest.mark.parametrize("chip", spread(CHIPS, test=1))
def test_tpu_compiler_takes_qwen3_4b_at_32k(tpu_compiler, chip):
    device = topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[chip]).devices[0]
    array = functools.partial(jax.ShapeDtypeStruct, sharding=SingleDeviceSharding(device))
    length = 32768
    q = array((1, length, 32, 128), jnp.bfloat16)
    kv = array((1, length, 8, 128), jnp.bfloat16)
    hidden = array((1, length, 4, 2), jnp.int32)

    def gradient(q, k, v, hidden, offset, d_out):
        out, pull = jax.vjp(lambda *x: attention_tpu.flash(*x, hidden, offset), q, k, v)
        return out, pull(d_out)

    lowered = jax.jit(gradient).lower(q, kv, kv, hidden, array((), jnp.int32), q)
    assert lowered.as_text().count("@tpu_custom_call") == 3
    # out and d_q, k and v as the kernels have them; the intervals; and nothing else of any size
    temp = lowered.compile().memory_analysis().temp_size_in_bytes
    assert temp < 2**31
