"""Of more groups than are wanted those win that are finished first, whoever decodes them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_roll_out import ENDING, engine_on
from train_toy import encode

from npr_jax.train import race as module
from npr_jax.train.race import Race, losers
from npr_jax.train.rollout import roll_out

GROUPS = st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=4), min_size=1, max_size=8)


@given(GROUPS, st.integers(1, 8), st.data())
def test_nobody_is_given_up_who_could_win(groups, wanted, data):
    order = sorted(range(len(groups)), key=lambda group: (max(groups[group]), group))
    winners = set(order[:wanted])
    # However far each answer has come:
    reached = [[data.draw(st.integers(0, x)) for x in lengths] for lengths in groups]
    pairs = zip(reached, groups, strict=True)
    left = [sum(a < b for a, b in zip(*pair, strict=True)) for pair in pairs]
    assert not winners & losers(list(map(max, reached)), left, wanted)
    # At the end of all:
    last = max(max(groups[group]) for group in winners)
    slower = {group for group, lengths in enumerate(groups) if max(lengths) > last}
    assert losers(list(map(max, groups)), [0] * len(groups), wanted) == slower


def test_a_race_says_whom_to_give_up_and_who_has_won():
    race = Race([(0, 0), (0, 1), (1, 0), (2, 0)], 3, 1)
    assert race.watch([5, 5, 5, 5], [False] * 4) == []
    assert race.watch([6, 9, 7, 9], [True, False, True, False]) == [1, 3]
    assert race.winners([6, 9, 7, 9]) == [1]
    assert Race([(0, 0), (1, 0), (2, 0)], 3, 2).winners([7, 7, 7]) == [0, 1]


def test_nobody_has_won_before_all_processes_have_ended(monkeypatch):
    others = iter([([0, 5], [0, 1], False), ([0, 9], [0, 1], False), ([0, 12], [0, 0], True)])
    monkeypatch.setattr(module, "gather", lambda mine: [mine, next(others)])
    assert Race([(0, 0)], 2, 1).winners([10]) == [0]
    assert next(others, None) is None


@pytest.mark.slow
def test_the_groups_that_are_finished_first_are_what_they_are_without_the_others():
    counts = []
    for lanes in (32, 2):
        engine = engine_on(None, lanes=lanes)
        prompts = [encode(engine, f"A:{i}+2?", "")[0][:-1].tolist() for i in range(6)]
        arguments = engine, prompts, ["1"] * 6, ENDING, (1, 2)
        every = roll_out(*arguments)
        before = engine.stats()["sampled_tokens"]
        some = roll_out(*arguments, 2)
        counts.append((before, engine.stats()["sampled_tokens"] - before))
        longest = [max(every[p, i].figures.critical_path for i in range(3)) for p in range(6)]
        assert len(set(longest)) > 3
        first = sorted(sorted(range(6), key=lambda p: (longest[p], p))[:2])
        assert list(some) == [(p, i) for p in first for i in range(3)]
        for key, answer in some.items():
            whole = every[key].trajectory
            np.testing.assert_array_equal(answer.trajectory.token_ids, whole.token_ids)
            assert answer.trajectory.finish_reason == whole.finish_reason != "aborted"
    assert counts[0][0] == counts[1][0] and all(some < every for every, some in counts)
