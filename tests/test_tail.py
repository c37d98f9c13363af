"""The simulation of long tails agrees with what can be worked out by hand."""

import json
import runpy
from pathlib import Path

import numpy as np
import pytest

TAIL = runpy.run_path(str(Path(__file__).parents[1] / "bench/tail.py"))
Setting, decode, simulate, VISIT = (TAIL[x] for x in ("Setting", "decode", "simulate", "VISIT"))
SETTING = Setting(4, 3, 2, 64, 5.0, 1.0, 0.5, 900, 0.0)
LENGTHS = SETTING.lengths(8, np.random.default_rng(1))


@pytest.mark.parametrize("dealt", ["prompts", "answers", "spread"])
def test_with_a_lane_for_each_answer_the_longest_is_waited_for(dealt):
    batch = decode(SETTING, LENGTHS, dealt)
    assert batch.steps == LENGTHS.max() and batch.busy == LENGTHS.sum() and batch.whole.all()
    np.testing.assert_array_equal(batch.drawn, LENGTHS)


def test_with_one_lane_a_replica_takes_one_after_another():
    one = SETTING._replace(lanes=1)
    assert decode(one, LENGTHS[:2], "prompts").steps == LENGTHS[:2].sum(axis=1).max()
    # Four answers on two replicas, of one prompt: dealt by prompts one replica has nothing.
    alike = np.full((1, 4), 100)
    assert decode(one, alike, "prompts").steps == 400
    assert decode(one, alike, "answers").steps == 200
    assert decode(SETTING._replace(row=0.5), alike, "prompts").steps == 100 * (1 + 3 * 0.5)


def test_the_race_is_over_when_the_winners_are_known():
    longest = np.sort(LENGTHS.max(axis=1))
    batch = decode(SETTING, LENGTHS, "answers", wanted=3)
    assert longest[2] <= batch.steps <= longest[2] + VISIT < longest[-1]
    assert sorted(LENGTHS[batch.whole.all(axis=1)].max(axis=1)) == longest[:3].tolist()


def test_what_is_carried_over_loses_no_token():
    whole = TAIL["carried"](SETTING, SETTING.most, 5, np.random.default_rng(2))
    assert all(one["aged"] == 0 and one["groups"] == SETTING.prompts for one in whole)
    parts = TAIL["carried"](SETTING, 100, 200, np.random.default_rng(2))
    assert max(one["steps"] for one in parts) == 100
    groups, trained, drawn = (sum(x[key] for x in parts) for key in ("groups", "trained", "busy"))
    assert groups == pytest.approx(200 * SETTING.prompts, rel=0.02)
    assert trained == pytest.approx(drawn, rel=0.05)  # but for what is still there at the end
    assert sum(one["aged"] > 0 for one in parts) > 180


def test_every_way_is_compared_with_the_first():
    lines = simulate(SETTING, [0.5], [100], 5, 0)
    assert [one["decode"] for one in lines] == [
        "prompts",
        "answers",
        "spread",
        "oversample",
        "carry",
    ]
    assert lines[0]["saved"] == 0 and lines[3]["saved"] > 0.2 and lines[4]["saved"] > 0.2
    assert lines[3]["wasted"] > 0 == lines[0]["wasted"]
    assert lines[3]["trained_length"] < lines[0]["trained_length"]


def test_lengths_are_fitted_to_a_run(tmp_path):
    many = SETTING._replace(samples=1).lengths(200_000, np.random.default_rng(3))
    row = {"critical_path": float(many.mean()), "truncated": float((many == 900).mean())}
    lines = [json.dumps(row | {"step": step}) + "\n" for step in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    (tmp_path / "config.yaml").write_text("prompts: 4\nsamples: 3\nmax_tokens: 900\n")
    found = TAIL["read_run"](tmp_path)
    assert (found["prompts"], found["samples"], found["most"]) == (4, 3, 900)
    assert found["mu"] == pytest.approx(5.0, abs=0.05)
    assert found["sigma"] == pytest.approx(1.0, abs=0.05)
    with pytest.raises(ValueError, match=r"truncated is 0\.0, needed is more than 0"):
        TAIL["fit"](100.0, 0.0, 900)
