"""Every implementation of paged attention against numpy: on a CPU the kernels are interpreted."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import spread
from paged_attention_checks import ENTRIES, FILLS, REST, check, problem, reference

from npr_jax.decode import attention
from npr_jax.decode.tables import shared_runs
from npr_jax.kernels import paged_gpu, paged_tpu

IMPLEMENTATIONS = {
    "gather": attention.gather,
    "blockwise": lambda q, pool, *rest: attention.blockwise(q, pool.swapaxes(2, 3), *rest),
    "tpu": functools.partial(paged_tpu.paged_attention, interpret=True),
    "gpu": functools.partial(paged_gpu.paged_attention, interpret=True),
}
each = pytest.mark.parametrize("attend", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)


@pytest.fixture
def small(monkeypatch):
    """Blocks of 16 slots, tiles of 8 or 16 queries, one row at a time: so there are several."""
    monkeypatch.setattr(attention, "_BLOCK", 16)
    monkeypatch.setattr(attention, "_RUN", 12)
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


# Two answers to a prompt, each with a block of branches, one of which has a block of its own.
TREE = [(1, 0, 9), (2, 1, 6), (3, 2, 9), (4, 3, 9), (5, 0, 6), (6, 5, 8), (7, 0, 2)]


@each
@pytest.mark.parametrize("chunk", [1, 3])
@pytest.mark.parametrize("heads", [(2, 2), (1, 4)])
def test_rows_that_list_the_same_pages(small, attend, chunk, heads):
    rng = np.random.default_rng(chunk)
    fills = [[int(n) for n in rng.integers(1, 5, 12)] for _ in range(10)]
    entries = [sum(fill) - 1 for fill in fills]
    kv_heads, group = heads
    arguments = problem(entries, fills, chunk, kv_heads=kv_heads, group=group, same=TREE)
    base = np.asarray(arguments[4])
    entries = [int(row[12]) - number % 2 for number, row in enumerate(base)]
    entries[4] = REST
    arguments = problem(entries, fills, chunk, kv_heads=kv_heads, group=group, same=TREE)
    shared = found(arguments)
    assert len(set(shared.own.tolist())) > 3, "there are runs in runs"
    check(attend, arguments, shared)


def test_more_rows_than_read_together(small):
    same = [(r, 0, 9) for r in range(1, 19)]
    arguments = problem([36] * 20, [[4] * 10 for _ in range(20)], same=same)
    shared = found(arguments)
    assert (shared.runs[:, 1] > 0).sum() > 2
    for name in ("blockwise", "tpu", "gpu"):
        check(IMPLEMENTATIONS[name], arguments, shared)


def found(arguments):
    """What `shared_runs` finds in the tables of a problem."""
    _, _, _, table, base, _, _ = (np.asarray(x) for x in arguments)
    used = (np.diff(base) > 0).sum(axis=1)
    tables = [
        np.stack([pages[:n], start[:n]], axis=1)
        for pages, start, n in zip(table, base, used, strict=True)
    ]
    names = [rows[:, 0].astype(">i4").tobytes() for rows in tables]
    return shared_runs(names, tables, worth=1)


@pytest.mark.parametrize("name", ["gather", "blockwise"])
def test_pages_of_int8_are_read_as_what_they_stand_for(small, name):
    q, pool, *rest = problem(ENTRIES, FILLS, 3)
    small_pool = attention.Int8.of(pool)
    read = jnp.where(jnp.isnan(pool), pool, small_pool.whole * small_pool.scale[..., None])
    error = jnp.abs(read - pool) / jnp.max(jnp.abs(pool), axis=-1, keepdims=True)
    assert 0 < jnp.nanmax(error) < 0.51 / 127

    def attend(q, pool, *rest):  # the scale of what nobody sees is NaN too
        if name == "blockwise":
            return attention.blockwise(q, jax.tree.map(lambda x: x.swapaxes(2, 3), pool), *rest)
        return attention.gather(q, pool, *rest)

    out = np.asarray(jax.jit(attend)(q, small_pool, *rest))
    expected, real = reference(q, read, *rest), np.asarray(rest[3]) >= 0
    np.testing.assert_allclose(out[real], expected[real], rtol=1e-5, atol=1e-5)


def test_pages_of_zeros_are_zeros_in_int8():
    packed = attention.Int8.of(jnp.zeros((3, 4)))
    assert not packed.whole.any() and not packed.scale.any()
    pool = attention.empty_pool((2, 3, 4, 6, 16), jnp.int8)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), pool) == jax.tree.map(
        lambda x: (x.shape, x.dtype), attention.Int8.of(jnp.zeros((2, 3, 4, 6, 16)))
    )
    assert sum(x.nbytes for x in jax.tree.leaves(pool)) == 2 * 3 * 4 * 6 * (16 + 4)


def test_pages_that_an_implementation_does_not_read_are_refused():
    with pytest.raises(ValueError, match=r"cache_dtype is 'int8'.*set attention to 'blockwise'"):
        attention.check_pool("pallas", jnp.int8)
    attention.check_pool("pallas", jnp.bfloat16)


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
