"""Advantages: the golden values, and what must hold for any rewards and groups."""

import numpy as np
import pytest
from conftest import read_golden
from hypothesis import given, settings
from hypothesis import strategies as st

from npr_jax.train.advantages import batch_std, group_std, mean
from npr_jax.train.rewards import papo_reward

ALL = pytest.mark.parametrize("function", [group_std, batch_std, mean])


EIGHTHS = st.integers(-40, 40).map(lambda n: n / 8)  # their sums are exact


@st.composite
def batches(draw, values=EIGHTHS):
    size = draw(st.integers(0, 12))
    rewards = draw(st.lists(values, min_size=size, max_size=size))
    groups = draw(st.lists(st.sampled_from("abc"), min_size=size, max_size=size))
    return np.array(rewards, float), np.array(groups, "U1")


def members(groups):
    return [groups == label for label in np.unique(groups)]


@pytest.fixture(scope="module")
def golden():
    return read_golden("advantages_losses")["advantages"]


def test_group_std_matches_the_golden_values(golden):
    for case in golden:
        # The reference does not centre a group of one; here it is 0.
        groups = case["groups"]
        expected = [
            0.0 if groups.count(label) == 1 else value
            for label, value in zip(groups, case["grpo_group_std"], strict=True)
        ]
        # Its means are float32: they move the numerator by 1e-7 of the largest reward.
        np.testing.assert_allclose(
            group_std(case["rewards"], groups), expected, rtol=1e-6, atol=1e-12, err_msg=case["id"]
        )


def test_batch_std_matches_the_golden_values(golden):
    for case in golden:
        np.testing.assert_allclose(
            batch_std(case["rewards"], case["groups"]),
            case["batch_std"],
            rtol=1e-6,
            atol=1e-12,
            err_msg=case["id"],
        )


@settings(deadline=None)
@given(batches())
def test_group_std_has_unit_std_in_each_group_with_variance(batch):
    rewards, groups = batch
    advantages = group_std(rewards, groups)
    for group in members(groups):
        if group.sum() > 1 and np.ptp(rewards[group]) > 0:
            assert np.std(advantages[group], ddof=1) == pytest.approx(1, abs=1e-4)


@settings(deadline=None)
@given(batches())
def test_batch_std_is_the_centred_reward_in_units_of_the_batch_std(batch):
    rewards, groups = batch
    advantages = batch_std(rewards, groups)
    if len(rewards) > 1:
        for group in members(groups):
            centered = rewards[group] - rewards[group].mean()
            unit = np.std(rewards, ddof=1) + 1e-6
            np.testing.assert_allclose(advantages[group] * unit, centered, atol=1e-12)


@ALL
@settings(deadline=None)
@given(batch=batches())
def test_groups_sum_to_zero_in_the_order_of_rewards(function, batch):
    rewards, groups = batch
    advantages = function(rewards, groups)
    assert advantages.dtype == np.float64 and advantages.shape == rewards.shape
    for group in members(groups):
        assert abs(advantages[group].sum()) < 1e-9
        order = np.argsort(rewards[group])
        assert (np.diff(advantages[group][order]) >= 0).all()


@ALL
@settings(deadline=None)
@given(batch=batches(), shift=st.integers(-80, 80).map(lambda n: n / 8))
def test_shift_invariant(function, batch, shift):
    rewards, groups = batch
    np.testing.assert_allclose(function(rewards + shift, groups), function(*batch), atol=1e-9)


@ALL
@settings(deadline=None)
@given(batch=batches(), seed=st.integers(0, 99))
def test_permutation_equivariant_and_blind_to_labels(function, batch, seed):
    rewards, groups = batch
    order = np.random.default_rng(seed).permutation(len(rewards))
    names = {"a": 7, "b": -1, "c": 3}
    renamed = np.array([names[label] for label in groups], int)
    np.testing.assert_allclose(
        function(rewards[order], renamed[order]), function(rewards, groups)[order], atol=1e-12
    )


@settings(deadline=None)
@given(batches())
def test_group_std_sees_one_group_at_a_time(batch):
    rewards, groups = batch
    for group in members(groups):
        np.testing.assert_array_equal(
            group_std(rewards, groups)[group], group_std(rewards[group], groups[group])
        )


@ALL
@settings(deadline=None)
@given(batch=batches(st.floats(-1e99, 1e99) | st.sampled_from([0.1, 1e-300, 0.3])))
def test_never_nan_and_exactly_zero_without_variance(function, batch):
    rewards, groups = batch
    advantages = function(rewards, groups)
    assert np.isfinite(advantages).all()
    for group in members(groups):
        if np.ptp(rewards[group]) == 0:
            assert (advantages[group] == 0).all()


@ALL
def test_equal_rewards_whose_mean_is_rounded_give_exactly_zero(function):
    rewards = [0.1] * 3 + [1.0, -1.0]
    assert sum(rewards[:3]) / 3 != 0.1
    assert (function(rewards, [0, 0, 0, 1, 1])[:3] == 0).all()


@ALL
def test_few_rewards_give_zeros(function):
    assert function([], []).shape == (0,)
    np.testing.assert_array_equal(function([3.0], ["a"]), [0.0])
    np.testing.assert_array_equal(function([3.0, 1.0], ["a", "b"]), [0.0, 0.0])


@ALL
@pytest.mark.parametrize(
    "rewards, groups, words",
    [
        ([1.0, 2.0], [0], r"\(2,\) and \(1,\)"),
        ([[1.0]], [[0]], r"\[B\], got \(1, 1\)"),
        ([1.0, float("nan")], [0, 0], "nan at index 1"),
        ([float("inf"), 1.0], [0, 0], "inf at index 0"),
    ],
)
def test_bad_input_is_named(function, rewards, groups, words):
    with pytest.raises(ValueError, match=words):
        function(rewards, groups)


# ThreadWeaver's rewards and advantages, by hand from arXiv 2512.07843: a group of right answers
# with these shares off the critical path, and one of which two are wrong.
SHARES = (0.1, 0.3, 0.5, 0.0)
BY_HAND = {
    0.4: ([1.05, 1.15, 1.20, 1.00], [-0.05, 0.05, 0.10, -0.10]),  # the paper's cap
    0.2: ([1.05, 1.10, 1.10, 1.00], [-0.0125, 0.0375, 0.0375, -0.0625]),  # the released code's
}


@pytest.mark.parametrize("cap", BY_HAND)
def test_the_mean_alone_leaves_a_small_term_small(cap):
    ours = [papo_reward(True, 1000, round(1000 * (1 - x)), 1.0, cap) for x in SHARES]
    rewards, advantages = BY_HAND[cap]  # of 0 and 1; ours are of -1 and 1, so twice as far apart
    np.testing.assert_allclose((np.array(ours) + 1) / 2, rewards, atol=1e-9)
    others = [1.2, 1.05, 0.0, 0.0]
    found = mean([*rewards, *others], [1] * 4 + [2] * 4)
    np.testing.assert_allclose(found[:4], advantages, atol=1e-9)
    np.testing.assert_allclose(found[4:], [0.6375, 0.4875, -0.5625, -0.5625], atol=1e-9)


def test_a_groups_own_std_makes_a_small_term_loud_and_the_batchs_does_not():
    rewards = [*BY_HAND[0.4][0], 1.2, 1.05, 0.0, 0.0]
    groups = [1] * 4 + [2] * 4
    loud, between = group_std(rewards, groups)[:4], batch_std(rewards, groups)[:4]
    np.testing.assert_allclose(loud, [-0.5477, 0.5477, 1.0954, -1.0954], atol=1e-4)
    np.testing.assert_allclose(between, [-0.0965, 0.0965, 0.1930, -0.1930], atol=1e-4)
    np.testing.assert_allclose(between / mean(rewards, groups)[:4], 1 / 0.518196, rtol=1e-4)
