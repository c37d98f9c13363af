"""Rewards: malformed < wrong < right whatever else changes, and the penalty is graded."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from npr_jax.train.rewards import format_penalty, papo_reward, zero_reward
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
