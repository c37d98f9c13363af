"""Answers that are carried over to the next batch: what they become, and that a run goes on."""

import dataclasses
import json
import logging

import bigram
import numpy as np
import pytest
from engine_checks import CONFIG, same
from train_toy import write_problems

from npr_jax.base.config import load_config
from npr_jax.data.problems import Problem
from npr_jax.decode import Engine, SamplingParams, fork_join
from npr_jax.runs import loop
from npr_jax.runs.metrics import is_measured, read_metrics
from npr_jax.train import papo, policy, zero
from npr_jax.train.ask import ask
from npr_jax.train.carry import Carried, UnderWay, from_arrays, to_arrays
from npr_jax.train.rl import Collected, Feed
from npr_jax.train.rollout import roll_out
from npr_jax.train.rollout_cache import Pending
from npr_jax.train.sampler import Queue, Sampled, Sampler
from npr_jax.tree import Rules

SAMPLING = SamplingParams(n=3, max_tokens=60)


@pytest.fixture(scope="module")
def model():
    return bigram.model()


@pytest.fixture
def feed(monkeypatch):
    monkeypatch.setattr(fork_join, "check_block", bigram.check_block_without_numbers)
    prompts = [[12, 13, 20, 9, 15, 11, 10, 14, 21, 9 + n] for n in range(8)]
    return Feed([Problem(str(n), "0") for n in range(8)], prompts, 0)


def config_of(*changes):
    more = ["model=tiny", "problems=none", "output=none", "prompts=4", *changes]
    return load_config(papo.PapoConfig, "tiny_papo", more)


def engine_of(model, **changes):
    return Engine(model, dataclasses.replace(CONFIG, **changes))


def batches(engine, feed, carry, number):
    """(step, what `ask` gives, what is carried) of so many batches under the same weights."""
    config = config_of(f"carry={carry}")
    for step in range(1, number + 1):
        found = ask(engine, feed, config, SAMPLING, (5, step), step, config.prompts)
        yield step, found, feed.carried


def test_carried_answers_become_what_they_would_have_been(model, feed):
    first, ends, ties = {}, {}, 0
    for step, found, carried in batches(engine_of(model), feed, 7, 14):
        for (number, sample), answer in found.answers.items():
            first.setdefault(found.places[number], {})[sample] = answer.trajectory
            ends[found.places[number]] = step
        under_way = {group.place for group in carried.groups}
        assert not under_way & first.keys()
        assert len(under_way) == found.late == found.metrics["carried_groups"]
        open_ = [key for key, answer in carried.answers.items() if key[0] in under_way]
        assert len(open_) == 3 * len(under_way) and found.metrics["carried"] <= len(open_)
    # The groups of the first batch, which asked the first problems with these seeds.
    other = Feed(feed._problems, feed._prompts, 0)
    prompts, references = other.take(4)
    whole = roll_out(engine_of(model), prompts, references, SAMPLING, (5, 1))
    assert {0, 1, 2, 3} <= first.keys() and max(ends[i] for i in range(4)) > 3
    for (place, sample), answer in whole.items():
        ties += same(answer.trajectory, first[place][sample])
        longest = max(whole[place, i].trajectory.stats["critical_path"] for i in range(3))
        if not ties:
            assert ends[place] == -(-longest // 7)  # the batch in which its longest has ended
    assert ties <= 2


def test_lanes_change_nothing(model, feed):
    other = Feed(feed._problems, feed._prompts, 0)
    ours = batches(engine_of(model), feed, 7, 6)
    theirs = batches(engine_of(model, lanes=3, steps=1), other, 7, 6)
    for (_, one, left), (_, another, right) in zip(ours, theirs, strict=True):
        assert one.places == another.places and left.groups == right.groups
        assert one.answers.keys() == another.answers.keys()
        for key, answer in one.answers.items():
            tokens = another.answers[key].trajectory.token_ids
            np.testing.assert_array_equal(answer.trajectory.token_ids, tokens)


@pytest.mark.parametrize("rules", [Rules(), Rules("last", "fresh", "sum", 13)])
def test_what_is_carried_is_kept_as_it_is(model, feed, rules):
    *_, (_, _, carried) = batches(engine_of(model, rules=rules), feed, 12, 3)
    facts, arrays = to_arrays(carried)
    found = from_arrays(json.loads(json.dumps(facts)), arrays)
    assert found.keys() == carried.answers.keys() and len(found) > 3
    assert any(answer.layout.blocks for answer in found.values())
    for key, answer in carried.answers.items():
        for field in dataclasses.fields(answer):
            ours, theirs = getattr(found[key], field.name), getattr(answer, field.name)
            if field.name == "layout":
                assert (ours.blocks, ours.rules) == (theirs.blocks, theirs.rules)
                names = ("positions", "hidden", "pred", "forced")
                pairs = [(getattr(ours, n), getattr(theirs, n)) for n in names]
            else:
                pairs = [(ours, theirs)]
            for a, b in pairs:
                np.testing.assert_array_equal(a, b)


def test_answers_that_are_lost_are_begun_anew(model, feed):
    engine, config = engine_of(model), config_of("carry=3")
    *_, (_, _, carried) = batches(engine, feed, 3, 1)
    assert carried.groups
    feed.carried = Carried(carried.groups, {})
    places = {group.place for group in carried.groups}
    seen = set()
    for step in range(2, 24):
        found = ask(engine, feed, config, SAMPLING, (5, step), step, config.prompts)
        seen |= {found.places[number] for number, _ in found.answers}
    assert places <= seen


def test_shares_are_of_the_groups_that_have_ended(model, feed):
    engine, config = engine_of(model), config_of("carry=7", "samples=3", "max_tokens=60")
    shares = []
    for step in range(1, 9):
        asked = config.prompts  # groups, with those that went on
        metrics = papo.collect_groups(engine, feed, step, config).metrics
        ended = asked - metrics["carried_groups"]
        assert ("equal_share" in metrics) == (ended > 0)
        if ended:
            assert metrics["equal_share"] == metrics["groups_equal"] / ended
            shares.append((metrics["carried_groups"], metrics["groups_equal"]))
    assert any(left and equal for left, equal in shares)


@pytest.fixture
def run(tmp_path):
    """(name, changes, end) -> the metrics of a run of Zero that carries over; `end(number)` is
    called before each batch is collected."""
    write_problems(tmp_path / "problems.jsonl", 16)
    sizes = (
        "steps=6 prompts=3 samples=3 max_refills=0 max_prompt_tokens=16 max_tokens=20 carry=6 "
        "minibatches=1 train.row_len=64 train.row_lengths=1 train.micro_rows=2 seed=1 "
        "train.checkpoint_every=2 engine.lanes=4 engine.pages=64 engine.steps=4 "
        "train.gap_stop=99 train.gap_warn=99"
    )

    def go(name, *changes, end=lambda number: None):
        paths = {"problems": tmp_path / "problems.jsonl", "output": tmp_path / name}
        sets = [f"{key}={json.dumps(str(value))}" for key, value in paths.items()]
        fixed = ["model=tiny", *sets, *sizes.split(), *changes]
        config = load_config(zero.ZeroConfig, "tiny_zero", fixed)

        def collect(engine, feed, step, config):
            end(step)
            return zero.collect_groups(engine, feed, step, config)

        loop.run(policy.Policy(config, collect), lambda metrics: None)
        lines = read_metrics(tmp_path / name)
        return [{k: v for k, v in line.items() if not is_measured(k)} for line in lines]

    return go


@pytest.mark.slow
@pytest.mark.parametrize("staleness", [0, 1])
def test_a_run_that_was_killed_goes_on_with_what_it_carried(run, staleness):
    whole = run("whole", f"staleness={staleness}")
    assert sum(line["carried"] > 0 for line in whole) > 3
    assert any("skipped_because" in line for line in whole)  # the first: all go on
    assert any(line.get("carried_batches", 0) > 1 for line in whole)
    for at in (3, 4, 5):

        def end(number, at=at):
            if number == at:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run(f"ended{at}", f"staleness={staleness}", end=end)
        assert run(f"ended{at}", f"staleness={staleness}") == whole


@pytest.mark.slow
def test_lost_answers_are_named(run, tmp_path, caplog):
    def end(number):
        if number == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run("run", end=end)
    (tmp_path / "run/checkpoints/rollouts/3.carried").write_bytes(b"nothing")
    with caplog.at_level(logging.WARNING):
        assert len(run("run")) == 6
    assert "the answers that step 3 left unfinished are not in" in caplog.text


@pytest.mark.parametrize("lost", [3, 4])
def test_a_batch_that_is_lost_goes_on_with_what_the_one_before_left(tmp_path, lost):
    """Not with what it left itself: of these its own problems are a part, and would be twice in it.
    The batch behind it, which is on disk, went on with what it had left."""
    config, weights = config_of("carry=5"), 8
    pending, nothing = Pending(tmp_path, "{}"), Collected([], [], {})
    sampler = Sampler(config, lambda *_: nothing, Feed([], [], 0), pending, tmp_path)
    left = {
        2: [UnderWay(3, 3, 1)],
        3: [UnderWay(4, 0, 3)],
        4: [UnderWay(4, 0, 3), UnderWay(6, 1, 4)],
        5: [UnderWay(8, 2, 5)],
    }
    for number, groups in left.items():
        position = {"problem": 2 * number, "places": [], "under_way": [[*g] for g in groups]}
        if number != lost:
            pending.save(number, weights, [], {}, position)
            pending.save_carried(number, weights, Carried(groups, {}))
    queue = Queue()
    for number, groups in left.items():
        queue.put(number, Sampled(nothing, 2 * number - 2, 2 * number, 2, weights, groups))
    queue.drop(2)
    position, queue = json.loads(json.dumps(queue.position())), Queue()
    assert position["problem"] == 10 and position["carried"] == [5, weights, [[8, 2, 5]]]
    pending.drop(2)
    queue.move(position)
    assert queue.position() == position
    assert queue.bring_back(sampler) == {lost: 2 * lost - 2}
    assert [*queue.ready] == [*range(3, lost)] and queue.last == 10
    assert sampler.carried.groups == left.get(lost - 1, [])
    for number in range(lost, 6):  # sampled again
        queue.put(number, Sampled(nothing, 0, 12, 2, weights, [UnderWay(9, 3, 5)]))
    assert queue.position()["carried"] == [5, weights, [[9, 3, 5]]]


def test_what_does_not_go_together_is_refused():
    with pytest.raises(ValueError, match=r"carry is 5 and oversample 0\.5.*one of them"):
        config_of("carry=5", "oversample=0.5")
    with pytest.raises(ValueError, match="carry is 5 and max_refills 3, needed is max_refills=0"):
        load_config(zero.ZeroConfig, "tiny_zero", ["carry=5"])
    assert config_of("carry=5").loss.importance == 2.0 and config_of().loss.importance == 0.0


def test_a_group_under_way_says_where_it_stands():
    assert UnderWay(7, 3, 2) == UnderWay(*json.loads(json.dumps([7, 3, 2])))
