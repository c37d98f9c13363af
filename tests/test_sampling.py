"""The knobs of sampling against a plain oracle in float64, lanes with other knobs beside them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import examples
from hypothesis import example, given, settings
from hypothesis import strategies as st

from npr_jax.decode.sampling import LaneSampling, sample

OFF = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
VOCAB, LANES = 8, 3
SAMPLE = jax.jit(lambda x, *args: sample(x, *args, lambda: jnp.zeros(x.shape, jnp.uint16)))


def oracle(logits, temperature, top_k, top_p, min_p):
    """Log-probs of one lane, -inf where a token is cut: the words of SamplingParams, one by one."""
    x = np.asarray(logits, np.float64) / temperature
    ranked = sorted(range(len(x)), key=lambda i: (-x[i], i))
    kept = ranked[:top_k] if top_k else ranked
    p = np.exp(x - x.max())
    if top_p < 1:
        total, some = sum(p[i] for i in kept), []
        for i in kept:
            some.append(i)
            if sum(p[j] for j in some) / total >= top_p - 1e-6:
                break
        kept = some
    kept = [i for i in kept if p[i] >= min_p * p[kept[0]] * (1 - 1e-6)]
    out = np.full(len(x), -np.inf)
    out[kept] = np.log(p[kept] / p[kept].sum())
    return out


def lanes_of(knobs):
    def column(name, dtype):
        return jnp.array([(OFF | lane)[name] for lane in knobs], dtype)

    return LaneSampling(
        key=jnp.stack([jnp.arange(len(knobs)), jnp.ones(len(knobs))], axis=1).astype(jnp.uint32),
        temperature=column("temperature", jnp.float32),
        top_p=column("top_p", jnp.float32),
        top_k=column("top_k", jnp.int32),
        min_p=column("min_p", jnp.float32),
        penalty=jnp.ones(len(knobs)),
        presence=jnp.zeros(len(knobs)),
        frequency=jnp.zeros(len(knobs)),
        stops=jnp.full((len(knobs), 1), -1),
        ends=jnp.zeros(len(knobs), int),
        ends_from=jnp.zeros(len(knobs), int),
    )


def logps(logits, knobs):
    """Log-probs of all tokens f32[lanes, vocabulary] under the knobs of each lane."""
    vocab = len(logits[0])
    tokens = jnp.tile(jnp.arange(vocab), len(knobs))
    rows = jnp.repeat(jnp.asarray(logits, jnp.float32), vocab, axis=0)
    lanes = lanes_of([lane for lane in knobs for _ in range(vocab)])
    return np.asarray(SAMPLE(rows, tokens * 0, tokens, lanes)[2]).reshape(len(knobs), vocab)


@pytest.mark.parametrize(
    ("probabilities", "knobs", "kept"),
    [
        ([0.5, 0.3, 0.1, 0.1], {"top_p": 0.8}, [0, 1]),
        ([0.25] * 4, {"top_p": 0.5}, [0, 1]),
        ([0.1] * 10, {"top_p": 0.7}, range(7)),
        ([0.4, 0.1, 0.4, 0.1], {"top_k": 1}, [0]),
        ([0.1, 0.2, 0.2, 0.2, 0.3], {"top_k": 3}, [1, 2, 4]),
        ([0.3, 0.25, 0.2, 0.15, 0.1], {"top_k": 2, "top_p": 0.5}, [0]),
        ([0.3, 0.25, 0.2, 0.15, 0.1], {"top_k": 2, "top_p": 0.6}, [0, 1]),
        ([0.5, 0.25, 0.15, 0.1], {"min_p": 0.5}, [0, 1]),
        ([0.5, 0.25, 0.15, 0.1], {"top_p": 1e-9}, [0]),
        ([0.5, 0.25, 0.15, 0.1], {"top_k": 99}, range(4)),
        ([0.5, 0.25, 0.15, 0.1], {"min_p": 1e-9}, range(4)),
        ([1 - 1e-8, 1e-8], {"top_k": 9}, range(2)),
    ],
)
def test_what_the_filters_keep(probabilities, knobs, kept):
    found = logps(np.log([probabilities]), [knobs])[0]
    assert np.flatnonzero(np.isfinite(found)).tolist() == list(kept)
    np.testing.assert_allclose(np.exp(found).sum(), 1, atol=1e-6)


lane = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([1.0, 0.5, 2.0]),
        "top_k": st.integers(0, VOCAB + 1),
        "top_p": st.sampled_from([1.0, *(i / 20 for i in range(1, 20)), 1e-9, 0.999999]),
        "min_p": st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.999]),
    }
)
rows = st.lists(st.integers(0, 5), min_size=VOCAB, max_size=VOCAB).filter(any)


@settings(deadline=None, max_examples=examples(200))
@example([[1] * VOCAB] * LANES, [{}, {"top_k": 3, "top_p": 0.5}, {"top_p": 0.5}])
@given(
    st.lists(rows, min_size=LANES, max_size=LANES), st.lists(lane, min_size=LANES, max_size=LANES)
)
def test_every_lane_is_what_the_oracle_says(weights, knobs):
    with np.errstate(divide="ignore"):  # weight 0: a token that is never sampled
        logits = np.log(np.array(weights, np.float32))
    found = logps(logits, knobs)
    for row, some, x in zip(found, knobs, logits, strict=True):
        with np.errstate(divide="ignore"):
            right = oracle(x, **(OFF | some))
        np.testing.assert_allclose(row, right, atol=2e-6)


@pytest.mark.slow
def test_a_lane_without_filters_is_untouched_by_those_of_another():
    logits = jnp.asarray(np.random.default_rng(0).normal(0, 3, (2, 151_936)), jnp.float32)
    rare = int(np.argmin(logits[1]))
    right = float(logits[1, rare] - jax.nn.logsumexp(logits[1].astype(jnp.float32)))
    given = jnp.array([-1, rare])
    for knobs in ({"top_p": 0.9}, {"top_k": 40}, {"min_p": 0.1}):
        _, raw, logp, *_ = SAMPLE(logits, given * 0, given, lanes_of([knobs, {}]))
        assert logp[1] == raw[1] and float(logp[1]) == pytest.approx(right, abs=1e-4)


def test_a_greedy_lane_is_untouched_by_its_own_filters_whatever_is_beside_it():
    logits = jnp.asarray(np.random.default_rng(0).normal(0, 3, (2, VOCAB)), jnp.float32)
    greedy = {"temperature": 0.0, "top_k": 1}
    at = jnp.zeros(2, jnp.int32)
    alone = [x[0] for x in SAMPLE(logits, at, at - 1, lanes_of([greedy, greedy]))]
    beside = [x[0] for x in SAMPLE(logits, at, at - 1, lanes_of([greedy, {"top_p": 0.5}]))]
    assert alone == beside and np.isfinite(alone[3])


def test_draws_have_the_frequencies_of_what_is_left():
    count = 4000
    logits = jnp.log(jnp.array([[0.3, 0.25, 0.25, 0.1, 0.1]] * count))
    at = jnp.arange(count, dtype=jnp.int32)
    tokens, _, logp, *_ = SAMPLE(
        logits, at, at * 0 - 1, lanes_of([{"top_k": 4, "top_p": 0.7}] * count)
    )
    shares = np.bincount(tokens, minlength=5) / count
    right = np.array([0.3, 0.25, 0.25, 0, 0]) / 0.8
    np.testing.assert_allclose(shares, right, atol=4 * np.sqrt(0.25 / count))
    np.testing.assert_allclose(logp, np.log(right[np.asarray(tokens)]), atol=1e-6)
