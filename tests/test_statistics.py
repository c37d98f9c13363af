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
from npr_jax.train.rewards import off_path


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


def test_what_some_answers_have_is_the_mean_of_these():
    """By hand; without any such answer there is no metric."""
    problems = [
        [answer(True, block_place=0.25, path_overlap=0.5), answer(False, block_place=0.5)],
        [answer(True), answer(True, block_place=0.0)],
        [answer(True), answer(False)],
    ]
    found = summarize(problems)
    assert found["block_place"]["value"] == pytest.approx(0.75 / 3)
    assert found["path_overlap"] == {"value": 0.5, "low": 0.5, "high": 0.5}
    assert found["block_place"]["low"] == 0 and found["block_place"]["high"] == 0.375
    assert not {"block_place", "path_overlap"} & summarize(problems[2:]).keys()
    assert not any(name.startswith("speedup_token") for name in found)


def random_answers(rng, problems, k):
    """Figures of a parallel run: every second problem is mostly answered wrong."""
    return [
        [
            answer(bool(rng.random() < (0.7, 0.2)[p % 2]), tokens=t, critical_path=c)
            for t, c in zip(
                rng.integers(40, 90, k).tolist(), rng.integers(5, 40, k).tolist(), strict=True
            )
        ]
        for p in range(problems)
    ]


def test_token_latency_against_the_sequential_run_answer_by_answer():
    rng, dropped = np.random.default_rng(0), 0
    for k in (1, 2, 4):
        own, sequential = (random_answers(rng, 40, k) for _ in range(2))
        ratios, of_right = [], []
        for ours, theirs in zip(own, sequential, strict=True):
            sums = [0, 0, 0, 0]  # critical path of ours, of theirs; the same of right ones
            right = [0, 0]
            for side, group in enumerate((ours, theirs)):
                for one in group:
                    sums[side] += one.critical_path
                    if one.correct:
                        sums[2 + side] += one.critical_path
                        right[side] += 1
            ratios.append((sums[1] / k) / (sums[0] / k))
            if right[0] and right[1]:
                of_right.append((sums[3] / right[1]) / (sums[2] / right[0]))
            else:
                dropped += 1
        found = summarize(own, sequential)
        every, correct = (found[f"speedup_token_latency{x}"] for x in ("", "_correct"))
        assert every["value"] == pytest.approx(np.mean(ratios))
        assert correct["value"] == pytest.approx(np.mean(of_right))
        for metric, values in ((every, ratios), (correct, of_right)):
            error = 1.96 * np.std(values) / len(values) ** 0.5
            assert metric["value"] - metric["low"] == pytest.approx(error, rel=0.35)
            assert metric["high"] - metric["value"] == pytest.approx(error, rel=0.35)
        # What needs no sequential run is what it was.
        alone = summarize(own)
        assert alone == {name: found[name] for name in alone}
        for group in own:
            for one in group:
                off = off_path(one.tokens, one.critical_path)
                assert 1 / (1 - off) == pytest.approx(one.tokens / one.critical_path)
    assert dropped > 20


def test_a_run_is_as_fast_as_itself():
    own = random_answers(np.random.default_rng(1), 12, 4)
    found = summarize(own, own)
    for name in ("speedup_token_latency", "speedup_token_latency_correct"):
        assert set(found[name].values()) == {1.0}
    wrong = [[answer(False)], [answer(True)]]
    found = summarize(wrong, wrong[::-1])  # no problem has a right one in both
    assert found["speedup_token_latency"]["value"] == 1
    assert "speedup_token_latency_correct" not in found
    with pytest.raises(ValueError, match="shorter"):
        summarize(own, own[:-1])


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
