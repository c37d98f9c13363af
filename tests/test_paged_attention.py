"""Every implementation of paged attention against numpy: on a CPU the kernels are interpreted."""

import functools

import numpy as np
import pytest
from conftest import spread
from paged_attention_checks import ENTRIES, FILLS, REST, check, problem

from npr_jax.decode import attention
from npr_jax.kernels import paged_gpu, paged_tpu

IMPLEMENTATIONS = {
    "gather": attention.gather,
    "blockwise": attention.blockwise,
    "tpu": functools.partial(paged_tpu.paged_attention, interpret=True),
    "gpu": functools.partial(paged_gpu.paged_attention, interpret=True),
}
each = pytest.mark.parametrize("attend", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)


@pytest.fixture
def small(monkeypatch):
    """Blocks of 16 slots, tiles of 8 or 16 queries, one row at a time: so there are several."""
    monkeypatch.setattr(attention, "_BLOCK", 16)
    monkeypatch.setattr(attention, "_CACHE_BYTES", 1)
    monkeypatch.setattr(paged_tpu, "_SLOTS", 16)
    monkeypatch.setattr(paged_tpu, "_QUERIES", 8)
    for name in ("_BLOCK", "_LINES", "_STRETCH"):
        monkeypatch.setattr(paged_gpu, name, 16)


@each
@pytest.mark.parametrize("dtype", spread(["float32", "bfloat16"], check=1))
@pytest.mark.parametrize(("chunk", "group"), [(1, 4), (8, 2), (7, 3)])
def test_rows_of_every_kind(small, attend, chunk, group, dtype):
    check(attend, problem(ENTRIES, FILLS, chunk, group=group, dtype=dtype))


@each
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_other_numbers_of_heads_and_an_even_number_of_rows(small, attend, kv_heads):
    check(attend, problem([49, REST, 8, 22], [FILLS[i] for i in (0, 2, 2, 1)], kv_heads=kv_heads))


@each
def test_rows_that_are_all_at_rest(small, attend):
    check(attend, problem([REST] * 4, FILLS[:4]))


@pytest.mark.slow
@each
@pytest.mark.parametrize(
    ("chunk", "size", "kv_heads", "group", "dim"), [(60, 16, 8, 4, 128), (1, 64, 2, 8, 64)]
)
def test_the_shapes_of_models(attend, chunk, size, kv_heads, group, dim):
    rng = np.random.default_rng(0)
    fills = [[size, *rng.integers(1, size + 1, 700 // size)] for _ in range(2)]
    sizes = {"size": size, "kv_heads": kv_heads, "group": group, "dim": dim}
    check(attend, problem([sum(fills[0]) - 3, 70], fills, chunk, dtype="bfloat16", **sizes))
