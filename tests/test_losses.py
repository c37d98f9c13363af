"""Losses: golden values and gradients, and what a sum over masked tokens must satisfy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import read_golden

from npr_jax.train.losses import dapo, papo, sft


@pytest.fixture(scope="module")
def golden():
    return read_golden("advantages_losses")["losses"]


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def arrays(case):
    names = ("log_prob", "old_log_prob", "advantages")
    return *(jnp.array(case[n], jnp.float64) for n in names), jnp.array(case["response_mask"], bool)


def mean_and_grad(loss_fn):
    """Mean loss, its gradient and the metrics, by the reference's mean over count + 1e-8."""

    def mean(logp, *others):
        total, count, metrics = loss_fn(logp, *others)
        return total / (count + 1e-8), (count, metrics)

    return jax.jit(jax.value_and_grad(mean, has_aux=True))


def check(expected, function, logp, *others, name):
    (loss, (count, metrics)), grad = function(logp, *others)
    mask = others[-1]
    assert count == mask.sum()
    np.testing.assert_allclose(loss, expected["loss"], rtol=1e-6, atol=1e-12, err_msg=name)
    np.testing.assert_allclose(grad, expected["grad_log_prob"], rtol=1e-6, atol=1e-12, err_msg=name)
    return {key: value / (count + 1e-8) for key, value in metrics.items()}


@pytest.mark.parametrize(
    "key, clip_low, clip_high",
    [("dapo_0.2_0.28_c10", 0.2, 0.28), ("rl_script_0.2_0.2_c10", 0.2, 0.2)],
)
def test_dapo_matches_the_golden_values(golden, x64, key, clip_low, clip_high):
    function = mean_and_grad(lambda *arrays: dapo(*arrays, clip_low, clip_high, 10.0))
    for case in golden:
        metrics = check(case[key], function, *arrays(case), name=case["id"])
        names = {
            "clip_fraction": "clipfrac",
            "dual_clip_fraction": "clipfrac_lower",
            "approx_kl": "approx_kl",
        }
        assert metrics.keys() == names.keys()
        for name, golden_name in names.items():
            np.testing.assert_allclose(
                metrics[name], case[key][golden_name], rtol=1e-6, atol=1e-9, err_msg=case["id"]
            )


def test_papo_matches_the_golden_on_policy_values(golden, x64):
    function = mean_and_grad(papo)
    for case in golden:
        logp, _, advantages, mask = arrays(case)
        check(case["on_policy"], function, logp, advantages, mask, name=case["id"])


def random_batch(seed=0, shape=(3, 7)):
    rng = np.random.default_rng(seed)
    logp, old = -rng.exponential(size=(2, *shape))
    return (
        jnp.array(logp, jnp.float32),
        jnp.array(old, jnp.float32),
        jnp.array(rng.normal(size=shape), jnp.float32),
        jnp.array(rng.random(shape) < 0.6),
    )


CALLS = {
    "sft": lambda logp, old, advantages, mask: sft(logp, mask),
    "dapo": dapo,
    "papo": lambda logp, old, advantages, mask: papo(logp, advantages, mask),
}
EACH = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


def test_sft_is_the_negative_log_likelihood_of_masked_tokens():
    logp, _, _, mask = random_batch()
    total, count, _ = sft(logp, mask)
    np.testing.assert_allclose(total, -np.sum(np.asarray(logp)[np.asarray(mask)]), rtol=1e-6)
    assert count == np.sum(mask)
    np.testing.assert_array_equal(jax.grad(lambda x: sft(x, mask)[0])(logp), -1.0 * mask)


def test_dapo_formula_token_by_token():
    """One token at a time against the definition, on both sides of each bound."""
    for advantage in (2.0, -2.0):
        for ratio in (0.1, 0.79, 0.81, 1.0, 1.27, 1.29, 9.0, 11.0, 50.0):
            total, _, metrics = dapo(
                jnp.full((1, 1), np.log(ratio)),
                jnp.zeros((1, 1)),
                jnp.full((1, 1), advantage),
                jnp.ones((1, 1), bool),
            )
            clipped = min(max(ratio, 0.8), 1.28)
            if advantage > 0:
                expected = -advantage * min(ratio, clipped)
            else:
                expected = -advantage * min(max(ratio, clipped), 10.0)
            np.testing.assert_allclose(total, expected, rtol=1e-6)
            assert metrics["dual_clip_fraction"] == (advantage < 0 and ratio > 10)
            at_clip = ratio > 1.28 if advantage > 0 else ratio < 0.8
            assert metrics["clip_fraction"] == at_clip


def test_dapo_and_papo_have_the_same_gradient_on_policy():
    logp, _, advantages, mask = random_batch()
    np.testing.assert_allclose(
        jax.grad(lambda x: dapo(x, logp, advantages, mask)[0])(logp),
        jax.grad(lambda x: papo(x, advantages, mask)[0])(logp),
        rtol=1e-6,
    )


@EACH
def test_sums_of_micro_batches_add_up(call):
    batch = random_batch(shape=(6, 5))
    whole = call(*batch)
    parts = [call(*(array[rows] for array in batch)) for rows in (slice(0, 1), slice(1, 6))]
    added = jax.tree.map(lambda a, b: a + b, *parts)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), whole, added)


@EACH
@pytest.mark.parametrize("junk", [np.nan, np.inf, -np.inf, 1e30])
def test_tokens_outside_the_mask_reach_neither_sums_nor_gradients(call, junk):
    logp, old, advantages, mask = random_batch()
    dirty = [jnp.where(mask, array, junk) for array in (logp, old, advantages)]

    def run(logp, old, advantages):
        total, count, metrics = call(logp, old, advantages, mask)
        return total, (count, metrics)

    clean = jax.value_and_grad(run, has_aux=True)(logp, old, advantages)
    same = jax.value_and_grad(run, has_aux=True)(*dirty)
    jax.tree.map(np.testing.assert_array_equal, clean, same)


@EACH
def test_an_empty_mask_counts_nothing(call):
    logp, old, advantages, mask = random_batch()
    total, count, metrics = call(logp, old, advantages, jnp.zeros_like(mask))
    assert total == 0 and count == 0 and all(value == 0 for value in metrics.values())


def test_shapes_that_would_broadcast_are_refused():
    logp, old, advantages, mask = random_batch()
    with pytest.raises(ValueError, match=r"advantages has shape \(3, 1\), needs the mask's"):
        papo(logp, advantages[:, :1], mask)
    with pytest.raises(ValueError, match="old_logp"):
        dapo(logp, old[:1], advantages, mask)
    with pytest.raises(ValueError, match="logp"):
        sft(logp[0], mask)
