"""The metrics of an evaluation against cases worked out by hand, and against brute force."""

import itertools
import json
import math

import numpy as np
import pytest

from npr_jax.evaluate.judge import Figures
from npr_jax.evaluate.statistics import (
    Timing,
    bootstrap,
    majority,
    pass_at_k,
    speeds,
    summarize,
)


def test_pass_at_k_is_the_mean_over_all_choices_of_k():
    for samples in range(1, 7):
        for correct in range(samples + 1):
            answers = [True] * correct + [False] * (samples - correct)
            for k in range(1, samples + 1):
                brute = np.mean([any(some) for some in itertools.combinations(answers, k)])
                assert math.isclose(pass_at_k(samples, correct, k), brute, abs_tol=1e-12)


@pytest.mark.parametrize("k", [0, 5])
def test_pass_at_k_needs_k_answers(k):
    with pytest.raises(ValueError, match=f"k is {k}, needed is 1 to 4"):
        pass_at_k(4, 2, k)


@pytest.mark.parametrize(
    "predictions, right, expected",
    [
        (["1", "2", "2"], "2", 1),
        (["1", "2", "2"], "1", 0),
        (["1", "2", "2", "1"], "2", 1 / 2),  # a tie of two
        (["1", "2", "3"], "2", 1 / 3),
        (["1", "2", "3"], "4", 0),
        ([None, None, "7"], "7", 1),  # no answer is no vote
        ([None, None], "7", 0),
        ([r"\frac12", "3", "0.5", r"\boxed{1/2}", "3"], "0.5", 1),  # three ways to write a half
        ([r"\frac12", "3", "0.5", r"\boxed{1/2}", "3"], "3", 0),
    ],
)
def test_majority(predictions, right, expected):
    from npr_jax.answers import equal

    correct = [equal(prediction, right) for prediction in predictions]
    assert majority(predictions, correct) == pytest.approx(expected)


def answer(correct, prediction="1", **figures):
    plain = {
        "formed": True,
        "truncated": False,
        "tokens": 10,
        "critical_path": 10,
        "parallel_tokens": 0,
        "blocks": 0,
        "branches": 0,
        "depth": 0,
        "width": 1,
    }
    return Figures(prediction=prediction, correct=correct, **(plain | figures))


def test_a_summary_worked_out_by_hand():
    split = {"parallel_tokens": 12, "blocks": 1, "branches": 3, "depth": 1, "width": 3}
    problems = [
        [answer(True, tokens=30, critical_path=20, **split), answer(False, "2"),
         answer(True), answer(True)],
        [answer(False, None, truncated=True, formed=False), answer(False, "3", formed=False),
         answer(True, "4", tokens=50, critical_path=20, **split), answer(False, "3")],
    ]  # fmt: skip
    found = summarize(problems)
    expected = {
        "avg@4": 4 / 8,
        "pass@1": 4 / 8,
        "pass@2": (1 + 1 / 2) / 2,  # of the second problem's six pairs three have the right one
        "pass@4": 1,
        "best@4": 1,
        "maj@4": 1 / 2,
        "format_rate": 6 / 8,
        "parallel_rate": 2 / 8,
        "parallel_token_share": 24 / 140,
        "blocks": 2 / 8,
        "branches": 6 / 8,
        "depth": 2 / 8,
        "width": (6 + 6) / 8,
        "tokens": 140 / 8,
        "critical_path": 100 / 8,
        "truncated_rate": 1 / 8,
        "speedup_critical_path": 140 / 100,
    }
    assert {name: metric["value"] for name, metric in found.items()} == pytest.approx(expected)
    # Of two problems a resample has the first only, both, or the second only.
    bounds = {name: (metric["low"], metric["high"]) for name, metric in found.items()}
    assert bounds["avg@4"] == pytest.approx((1 / 4, 3 / 4))
    assert bounds["parallel_token_share"] == pytest.approx((12 / 80, 12 / 60))
    assert bounds["speedup_critical_path"] == pytest.approx((60 / 50, 80 / 50))
    json.dumps(found)


def test_a_summary_of_three_answers_has_pass_at_1_and_2():
    found = summarize([[answer(True), answer(False), answer(False)]])
    assert [name for name in found if name.startswith("pass")] == ["pass@1", "pass@2"]
    assert found["pass@2"] == {"value": pytest.approx(2 / 3)}  # one problem: no interval
    with pytest.raises(ValueError, match=r"\[1, 2\] answers"):
        summarize([[answer(True)], [answer(True)] * 2])


def test_the_bootstrap_covers_what_it_should():
    """Its interval of a mean is that of the normal distribution, with the seed fixed."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=(400, 3))
    low, high = bootstrap(values, np.ones_like(values))
    error = 1.96 * values.std(0) / 20
    np.testing.assert_allclose(low, values.mean(0) - error, atol=0.01)
    np.testing.assert_allclose(high, values.mean(0) + error, atol=0.01)
    again = bootstrap(values, np.ones_like(values))
    assert np.array_equal(low, again[0]) and np.array_equal(high, again[1])
    assert not np.array_equal(low, bootstrap(values, np.ones_like(values), seed=1)[0])


def test_speeds():
    own = Timing(2.0, 10, 600) + Timing(3.0, 10, 400)  # cut off once
    assert own == Timing(5.0, 20, 1000)
    assert speeds(own) == {"tokens_per_s": {"value": 200.0}}
    found = speeds(own, Timing(20.0, 40, 2000))  # more samples: seconds per answer count
    assert {name: metric["value"] for name, metric in found.items()} == {
        "tokens_per_s": 200.0,
        "speedup_tokens_per_s": 2.0,
        "speedup_wall_clock": 2.0,
    }
    assert speeds(Timing()) == {}
