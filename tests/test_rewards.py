"""Rewards: malformed < wrong < right whatever else changes, and the penalty is graded."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from npr_jax.base.config import load_config
from npr_jax.train.papo import PapoConfig
from npr_jax.train.rewards import (
    add_structure,
    alternating_reward,
    annealed,
    format_penalty,
    papo_reward,
    zero_reward,
)
from npr_jax.tree.format import Violation

KINDS = ("tree", "no_block", "stray_text", "plan_number", "empty_step", "no_boxed", "many_boxed")
PROMPT = 10


@st.composite
def cases(draw):
    """(violations, number of tokens) of a response to a prompt of 10 tokens."""
    length = draw(st.integers(1, 300))
    one = st.builds(
        Violation, st.sampled_from(KINDS), st.integers(PROMPT, PROMPT + length), st.just("why")
    )
    return draw(st.lists(one, max_size=12)), PROMPT + length


SHAPING = st.fixed_dictionaries(
    {
        "max_tokens": st.integers(1, 300),
        "overlong_buffer": st.integers(0, 300),
        "overlong_penalty": st.floats(0, 5),
    }
)


@given(cases(), cases(), cases(), SHAPING, SHAPING, SHAPING)
def test_malformed_is_below_wrong_is_below_right(bad, wrong, right, a, b, c):
    violations, num_tokens = bad
    low = zero_reward([], False, PROMPT, wrong[1], **b)
    high = zero_reward([], True, PROMPT, right[1], **c)
    assert -2 < low < high <= 1
    for correct in (False, True):
        reward = zero_reward(violations, correct, PROMPT, num_tokens, **a)
        if violations:
            assert -2 <= reward < low


@given(cases())
def test_penalty_is_graded_within_its_range(case):
    violations, num_tokens = case
    penalty = format_penalty(violations, PROMPT, num_tokens)
    if not violations:
        assert penalty == 0
        return
    assert -2 <= penalty < -1
    # Without one of its defects a response is never worse.
    for i in range(len(violations)):
        rest = violations[:i] + violations[i + 1 :]
        if rest:
            assert format_penalty(rest, PROMPT, num_tokens) >= penalty


def penalty(*kinds, index=60):
    return format_penalty([Violation(kind, index, "") for kind in kinds], PROMPT, 110)


def test_grades():
    """Fewer defects beat more, any tree beats none, a later break beats an early one."""
    assert penalty("no_boxed") > penalty("no_boxed", "stray_text") > penalty("tree", index=110)
    assert penalty(*["empty_step"] * 20) > penalty("tree", index=110)
    assert penalty("tree", index=110) > penalty("tree", index=60) > penalty("tree", index=10)
    assert penalty("tree", index=10) > penalty("no_block") == -2


def test_unshaped_rewards_are_plus_and_minus_one():
    assert zero_reward([], True, 5, 50) == papo_reward(True) == 1
    assert zero_reward([], False, 5, 50) == papo_reward(False) == -1


def test_acceleration_pays_right_answers_alone_and_up_to_its_cap():
    assert papo_reward(True, 100, 60, acceleration=0.5) == pytest.approx(1 + 0.5 * 0.4)
    assert papo_reward(True, 100, 20, 0.5, acceleration_cap=0.3) == pytest.approx(1 + 0.5 * 0.3)
    assert papo_reward(True, 100, 100, acceleration=0.5) == 1  # one line of text
    assert papo_reward(True, 100, 60) == 1  # off, as in the paper
    assert papo_reward(False, 100, 20, acceleration=0.5) == -1


@given(st.integers(1, 400), st.integers(1, 400), st.floats(0.1, 1), st.floats(0.01, 1))
def test_a_cap_before_the_weight_is_any_cap_behind_it(tokens, path, weight, most):
    """ThreadWeaver's paper caps the weighted share, its code the share, and one setting has both:
    min(w x, c) = w min(x, c / w)."""
    share = 1 - min(path, tokens) / tokens
    ours = papo_reward(True, tokens, min(path, tokens), weight, most / weight)
    assert ours == pytest.approx(1 + min(weight * share, most))


def test_the_weight_of_acceleration_ends():
    """By hand: 0.8 over four steps, then nothing; and without an end it stays."""
    assert [annealed(0.8, step, 4) for step in range(1, 8)] == pytest.approx(
        [0.8, 0.6, 0.4, 0.2, 0, 0, 0]
    )
    assert [annealed(0.8, step, 0) for step in (1, 10**6)] == [0.8, 0.8]


# Steps 1 to 12 of Parallel-R1's alternation, by hand (RIGHT and WRONG are 1 and -1 there too).
BY_STEP = {
    ("right", "formed", "block"): [1, 1, 1, 1, 1, 1, 1, 1, 1.2, 1.2, 1, 1],
    ("right", "malformed", "none"): [1] * 12,
    ("right", "malformed", "block"): [1, 1, 1, 1, 1, 1, 1, 1, -1, -1, 1, 1],
    ("wrong", "formed", "block"): [-1] * 12,
    ("wrong", "malformed", "none"): [-1] * 12,
    ("wrong", "malformed", "block"): [-1] * 12,
}


@pytest.mark.parametrize("case", BY_STEP, ids=" ".join)
def test_two_of_ten_steps_are_tiered(case):
    right, formed, block = case[0] == "right", case[1] == "formed", case[2] == "block"
    steps = range(1, 13)
    assert [alternating_reward(n, right, formed, block) for n in steps] == BY_STEP[case]
    later = [alternating_reward(n + 10 * k, right, formed, block) for k in (1, 7) for n in steps]
    assert later == 2 * BY_STEP[case]
    accuracy = 1 if right else -1
    expected = [*BY_STEP[case][:9], accuracy, accuracy, accuracy]
    assert [alternating_reward(n, right, formed, block, 9) for n in steps] == expected


def test_structure_bonuses_are_z_scores_of_the_group_for_right_answers():
    """By hand: the shares 0, 1, 2, 1 of the first group have the mean 1 and the std 1 / sqrt(2)."""
    groups, root = ["a", "b", "a", "a", "a", "b"], 2**0.5
    rewards = [1.0, 1.0, -1.0, 1.0, -2.0, 1.0]
    shares = [(0, 5), (0.3, 1), (1, 5), (2, 5), (1, 5), (0.3 + 1e-9, 3)]
    found = add_structure(rewards, groups, shares, (0.1, 0.2))
    # In the second group the first share is as good as the same, the second has the std 1.
    assert found == pytest.approx([1 - 0.1 * root, 0.8, -1, 1 + 0.1 * root, -2, 1.2])
    assert add_structure(rewards, groups, shares, (0.0, 0.0)) == rewards
    assert rewards[0] == 1  # its arguments stay as they are


@given(
    st.lists(
        st.tuples(st.sampled_from([1.0, 1.4, -1.0, -2.0]), st.sampled_from("ab"), st.floats(0, 1)),
        min_size=1,
        max_size=16,
    )
)
def test_a_bonus_never_makes_right_worse_than_wrong(answers):
    """As far as a config allows it: below the gap by the root of n - 1."""
    rewards, groups, shares = (list(column) for column in zip(*answers, strict=True))
    weight = 1.999 / 15**0.5
    found = add_structure(rewards, groups, [(share,) for share in shares], (weight,))
    for before, after in zip(rewards, found, strict=True):
        assert after == before if before <= -1 else after > -1
    assert np.isfinite(found).all()


@pytest.mark.parametrize(
    "changes, words",
    [
        (
            ["schedule=alternating", "acceleration=0.5"],
            "acceleration 0.5, needed is acceleration=0",
        ),
        (["schedule=alternating", "parallel_bonus=0.1"], "needed is parallel_bonus=0"),
        (["schedule=alternating", "acceleration_bonus=0.1"], "needed is acceleration_bonus=0"),
        (["schedule_until=9"], "schedule_until is 9, .* set schedule to 'alternating'"),
        (["acceleration_until=9"], "acceleration_until is 9, .* set acceleration above 0"),
        (
            ["parallel_bonus=0.3", "acceleration_bonus=0.25", "samples=16"],
            "needed is a sum below 0.516 for samples=16",
        ),
        (["schedule=alternating", "train.keep_best=1"], "keep_best is 1 .* set evaluate"),
        (["acceleration=1", "acceleration_until=9", "train.keep_best=1"], "keep_best is 1"),
        (["schedule=cosine"], "schedule is 'cosine', needed is 'accuracy' or 'alternating'"),
    ],
)
def test_rewards_that_do_not_go_together_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        load_config(PapoConfig, "tiny_papo", changes)


def test_overlong_shaping_is_linear_over_the_buffer():
    shaped = [
        zero_reward([], True, 0, n, max_tokens=100, overlong_buffer=10) for n in (90, 95, 100)
    ]
    assert shaped == [1.0, 0.5, 0.0]
    malformed = [Violation("no_boxed", 3, "")]
    assert zero_reward(malformed, True, 0, 100, max_tokens=100, overlong_buffer=10) == -1.1


def test_paper_rule_is_literal():
    """It pays a mild defect more than a wrong answer: why it is not the default."""
    mild = [Violation("no_boxed", 3, "")]
    assert zero_reward(mild, False, 0, 50, rule="paper") == pytest.approx(-0.2)
    assert zero_reward([Violation("no_block", 0, "")], True, 0, 50, rule="paper") == -2
    assert zero_reward([], False, 0, 50, rule="paper") == -1
    assert zero_reward([], True, 0, 50, rule="paper") == 1
    assert zero_reward(
        [], True, 0, 100, rule="paper", max_tokens=100, overlong_buffer=10
    ) == pytest.approx(0.0)
    with pytest.raises(ValueError, match="reward rule is 'other'"):
        zero_reward([], True, 0, 50, rule="other")
