"""Kinds of pairs of blocks against brute force, and which attention is chosen."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from tree_attention_checks import rows, tree_row

from npr_jax.kernels import choose_attention
from npr_jax.kernels.blocks import ALL, NONE, SOME, pad_keys, pair_kinds
from npr_jax.model import PRESETS, attention

_visible = jax.jit(attention._visible)


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _kinds(hidden, offset, num_queries, block_q, block_k):
    zero = jnp.zeros((*hidden.shape[:2], 1, 1))
    *_, hidden = pad_keys(zero, zero, hidden, block_k)
    return pair_kinds(hidden, offset, num_queries, block_q, block_k)


def kinds_and_truth(hidden, offset, num_queries, block_q, block_k):
    """pair_kinds, and what is visible: the least and the most of each pair, [B, N, M]."""
    batch, size = hidden.shape[:2]
    kinds = np.asarray(_kinds(hidden, offset, num_queries, block_q, block_k))
    seen = _visible(offset + np.arange(num_queries), np.arange(size), hidden)
    seen = np.pad(seen, ((0, 0), (0, 0), (0, -size % block_k)))  # padding is not seen
    blocks = [seen[:, i : i + block_q] for i in range(0, num_queries, block_q)]
    blocks = [b.reshape(batch, b.shape[1], -1, block_k).transpose(0, 2, 1, 3) for b in blocks]
    least, most = (np.stack([f(b, axis=(2, 3)) for b in blocks], 1) for f in (np.all, np.any))
    assert kinds.shape == least.shape
    return kinds, least, most


@settings(max_examples=examples(60), deadline=None)
@given(st.data())
def test_kinds_are_never_wrong(data):
    """Whatever the intervals: NONE is not seen at all, ALL is seen whole."""
    size, depth = data.draw(st.sampled_from([24, 37])), 2
    rng = np.random.default_rng(data.draw(st.integers(0, 2**31)))
    hidden = rng.integers(0, size + 9, (2, size, depth, 2)).astype(np.int32)
    if data.draw(st.booleans()):  # runs of keys with the same interval, so that blocks are covered
        hidden = np.repeat(hidden[:, ::7], 7, axis=1)[:, :size]
    num_queries, offset = data.draw(st.sampled_from([24, 13])), data.draw(st.integers(0, 30))
    blocks = data.draw(st.sampled_from([(8, 4), (4, 8)]))
    kinds, least, most = kinds_and_truth(hidden, offset, num_queries, *blocks)
    assert not most[kinds == NONE].any()
    assert least[kinds == ALL].all()


@pytest.mark.parametrize("offset", [0, 16, 21])
def test_in_a_tree_little_is_called_seen_that_is_not(offset):
    wrong = total = 0
    for seed in range(30):
        hidden = rows(96, seed)
        kinds, least, most = kinds_and_truth(hidden, offset, 96 - offset, 8, 8)
        assert not most[kinds == NONE].any()
        assert least[kinds == ALL].all()
        wrong += np.sum(~most & (kinds != NONE)) + np.sum(least & (kinds == SOME))
        total += kinds.size
        assert set(np.unique(kinds)) == {NONE, SOME, ALL}
    assert wrong < 0.03 * total


def test_kinds_of_one_tree_are_exact_where_nothing_is_hidden():
    hidden = np.zeros((1, 40, 1, 2), np.int32)
    kinds, *_ = kinds_and_truth(hidden, 0, 40, 8, 8)
    i, j = np.indices((5, 5))
    assert np.array_equal(kinds[0], np.where(j < i, ALL, np.where(j == i, SOME, NONE)))


def test_no_array_of_length_squared():
    length, block = 4096, 128
    hidden = jax.ShapeDtypeStruct((1, length, 3, 2), jnp.int32)
    shapes = jax.make_jaxpr(lambda h: pair_kinds(h, 0, length, block, block))(hidden)
    assert max(v.aval.size for e in shapes.jaxpr.eqns for v in e.outvars) <= length * 6


@pytest.mark.parametrize(
    ("platform", "head_dim", "name"),
    [
        ("cpu", 128, "blockwise"),
        ("tpu", 128, "pallas"),
        ("tpu", 64, "blockwise"),
        ("gpu", 64, "pallas"),
        ("gpu", 24, "blockwise"),
    ],
)
def test_each_platform_has_its_attention(platform, head_dim, name):
    assert choose_attention(None, head_dim, platform) == name


@pytest.mark.parametrize(
    ("name", "chosen"), [("", "blockwise"), ("dense", "dense"), ("pallas", "flash")]
)
def test_the_config_names_the_attention(monkeypatch, name, chosen):
    called = []

    def spy(which):
        def attend(q, *_):
            called.append(which)
            return q

        return attend

    monkeypatch.setattr(attention, "dense", spy("dense"))
    monkeypatch.setattr(attention, "blockwise", spy("blockwise"))
    monkeypatch.setattr(attention, "kernel", lambda: spy("flash"))
    config = dataclasses.replace(PRESETS["tiny"], attention=name)
    q = jnp.zeros((1, 8, 4, 24))
    attention.tree_attend(config, jnp.zeros((1, 8, 1, 2), jnp.int32))(q, q, q, 0, None)
    assert called == [chosen]


def test_trees_of_the_checks_have_what_is_to_be_checked():
    hidden = [tree_row(75, seed) for seed in range(20)]
    assert max(h.shape[1] for h in hidden) == 2  # nested blocks
    joined = [h for h in hidden if ((h[:, 0, 0] < h[:, 0, 1]) & (h[:, 0, 1] < 75)).any()]
    assert len(joined) > 10
