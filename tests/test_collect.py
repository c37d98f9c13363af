"""What the stages make of judged answers: which are left out, and what the others are worth."""

import dataclasses
import random

import numpy as np
import pytest
from train_toy import encode, problem, tiny

from npr_jax.base.config import load_config
from npr_jax.decode.outputs import Trajectory
from npr_jax.evaluate.judge import Answer
from npr_jax.runs.guards import check_gap
from npr_jax.train import ask, beta, papo, zero
from npr_jax.train.rollout import summary
from npr_jax.tree import Rules, parse
from npr_jax.tree.format import Violation

BAD = [Violation("no_boxed", 9, "no box")]


@pytest.fixture(scope="module")
def model():
    return tiny()


class FakeEngine:
    def __init__(self, model):
        self.tags = model.tags


class FakeFeed:
    position = 0

    def take(self, num):
        self.position += num
        return [[1]] * num, ["1"] * num


def judged(model, correct, violations=(), seed=0, reason="stop", length=None, groups=2):
    prompt, response, _ = problem(random.Random(seed), groups)
    ids, prompt_len = encode(model, prompt, response)
    ids = ids[:length]
    tree = parse(ids, prompt_len, model.tags, allow_open=True)
    trajectory = Trajectory(
        token_ids=ids,
        prompt_len=prompt_len,
        layout=tree,
        logp=np.zeros(len(ids), np.float32),
        logp_sampled=np.zeros(len(ids), np.float32),
        margin=np.zeros(len(ids), np.float32),
        step=np.full(len(ids), -1, np.int32),
        forced=tree.forced,
        text="",
        finish_reason=reason,
        detail="",
        stats={},
    )
    return Answer(trajectory, list(violations), None, correct)


def collect(stage, config, groups, monkeypatch, model, step=1):
    answers = {(n, i): one for n, group in enumerate(groups) for i, one in enumerate(group)}
    monkeypatch.setattr(ask, "roll_out", lambda *_: answers)
    return stage.collect_groups(FakeEngine(model), FakeFeed(), step, config)


def advantages(collected):
    return [[float(example.advantage[0]) for example in group] for group in collected.groups]


def test_zero_compares_within_groups_and_drops_those_that_say_nothing(model, monkeypatch):
    config = load_config(zero.ZeroConfig, "tiny_zero", ["prompts=4", "samples=3", "max_refills=0"])
    groups = [
        [judged(model, right) for right in (True, False, False)],
        [judged(model, True) for _ in range(3)],
        [judged(model, False, BAD) for _ in range(3)],
        [judged(model, True, BAD), judged(model, False), judged(model, False)],
    ]
    collected = collect(zero, config, groups, monkeypatch, model)
    assert collected.metrics["groups_dropped"] == 2
    first, second = advantages(collected)
    np.testing.assert_allclose(first, [2 / 3**0.5, -1 / 3**0.5, -1 / 3**0.5], rtol=1e-4)
    # Malformed is worse than wrong, whatever it says.
    np.testing.assert_allclose(second, [-2 / 3**0.5, 1 / 3**0.5, 1 / 3**0.5], rtol=1e-4)


def test_papo_centers_each_group_and_divides_by_the_whole_batch(model, monkeypatch):
    config = load_config(papo.PapoConfig, "tiny_papo", ["malformed=filter"])
    groups = [
        [judged(model, right) for right in (True, True, False)],
        [judged(model, right) for right in (False, False, False)],
        [judged(model, True), judged(model, False), judged(model, False, reason="length")],
    ]
    collected = collect(papo, config, groups, monkeypatch, model)
    rewards = np.array([1, 1, -1, -1, -1, -1, 1, -1])
    std = rewards.std(ddof=1)
    found = advantages(collected)
    expected = [[2 / 3, 2 / 3, -4 / 3], [0, 0, 0], [1, -1]]
    assert [len(group) for group in found] == [3, 3, 2]
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, np.array(theirs) / std, atol=1e-4)
    assert collected.metrics["filtered"] == 1
    equal = collect(papo, config, [[judged(model, True), judged(model, True)]], monkeypatch, model)
    assert equal.groups == [] and "2 whole trees are equal" in equal.metrics["skipped_because"]


def test_what_papo_leaves_out_makes_no_weights_better(model, monkeypatch):
    """The score, by which the best checkpoint is chosen, is that of all answers."""
    config = load_config(papo.PapoConfig, "tiny_papo", ["malformed=filter"])
    cut = judged(model, True, reason="length")
    scores = []
    for group in (
        [judged(model, True), judged(model, True), judged(model, False), judged(model, False)],
        [judged(model, True), cut, cut, cut],  # one tree is left, and it is right
        [cut] * 4,
    ):
        collected = collect(papo, config, [group], monkeypatch, model)
        scores.append(collected.metrics["score"])
    assert scores == [0.0, -1.25, -2.0]
    assert collected.metrics["filtered"] == 4 and "reward" not in collected.metrics
    assert collected.metrics["skipped_because"] == "none of 4 answers is a whole tree"


def test_zero_says_why_there_is_nothing_to_train_on(model, monkeypatch):
    config = load_config(zero.ZeroConfig, "tiny_zero", ["prompts=1", "samples=2", "max_refills=0"])
    metrics = collect(
        zero, config, [[judged(model, True), judged(model, True)]], monkeypatch, model
    ).metrics
    assert metrics["skipped_because"] == "in each of 1 groups all rewards are equal"
    assert metrics["score"] == metrics["reward"] == 1


def test_refills_ask_by_the_rate_of_what_was_kept_and_leave_out_what_is_too_much(
    model, monkeypatch
):
    config = load_config(zero.ZeroConfig, "tiny_zero", ["prompts=3", "samples=2", "refill=rate"])
    asked = [zero.to_ask(config, *known) for known in ((0, 0), (3, 0), (3, 1), (3, 2), (5, 2))]
    assert asked == [3, 3, 3, 2, 3]
    missing = dataclasses.replace(config, refill="missing")
    assert [zero.to_ask(missing, *known) for known in ((0, 0), (3, 0), (5, 2))] == [3, 3, 1]
    same, other = [judged(model, True)] * 2, [judged(model, True), judged(model, False)]
    rounds, sizes = iter(([same, other, same], [same, other, other], [other])), []

    def roll_out(engine, prompts, *_):
        sizes.append(len(prompts))
        return {(n, i): one for n, group in enumerate(next(rounds)) for i, one in enumerate(group)}

    monkeypatch.setattr(ask, "roll_out", roll_out)
    collected = zero.collect_groups(FakeEngine(model), FakeFeed(), 1, config)
    assert sizes == [3, 3] and collected.places == [0, 1, 2]
    figures = [collected.metrics[f"groups{name}"] for name in ("", "_dropped", "_surplus")]
    assert figures == [3, 3, 0]
    rounds = iter(([same, other, other], [other, other]))
    collected = zero.collect_groups(FakeEngine(model), FakeFeed(), 1, config)
    assert sizes[2:] == [3, 2] and len(collected.groups) == 3
    figures = [collected.metrics[f"groups{name}"] for name in ("", "_dropped", "_surplus")]
    assert figures == [3, 1, 1]


def test_what_the_engine_forced_is_not_trained_on(model, monkeypatch):
    config = load_config(papo.PapoConfig, "tiny_papo")
    groups = [[judged(model, True), judged(model, False)]]
    for group in collect(papo, config, groups, monkeypatch, model).groups:
        for example in group:
            sampled = ~example.layout.forced
            sampled[: example.layout.prompt_len] = False
            assert np.array_equal(example.loss_mask, sampled)
            assert example.layout.forced.sum() > 10


def test_what_the_engine_forced_is_trained_on_if_asked_for(model, monkeypatch):
    config = load_config(papo.PapoConfig, "tiny_papo", ["train_forced=true"])
    groups = [[judged(model, True), judged(model, False)]]
    for example in collect(papo, config, groups, monkeypatch, model).groups[0]:
        assert example.loss_mask[example.layout.prompt_len :].all()
        assert not example.loss_mask[: example.layout.prompt_len].any()


def test_papo_can_divide_by_the_std_of_each_group(model, monkeypatch):
    config = load_config(papo.PapoConfig, "tiny_papo", ["advantage=group_std"])
    groups = [
        [judged(model, right) for right in (True, True, False)],
        [judged(model, right) for right in (True, False)],
    ]
    found = advantages(collect(papo, config, groups, monkeypatch, model))
    for ours, rewards in zip(found, ([1, 1, -1], [1, -1]), strict=True):
        expected = (np.array(rewards) - np.mean(rewards)) / np.std(rewards, ddof=1)
        np.testing.assert_allclose(ours, expected, rtol=1e-4)


def test_papo_pays_by_the_step(model, monkeypatch):
    """A right tree, a right one of broken format, right plain text, and a wrong tree: their
    advantages are those of these rewards."""
    plain = [Violation("no_block", 9, "no block")]
    group = [judged(model, True), judged(model, True, BAD), judged(model, True, plain)]
    group.append(judged(model, False))
    share = papo.shares_of(group[0])[1]
    assert 0.2 < share < 0.5
    alternating = ["schedule=alternating", "schedule_until=19"]
    for changes, step, rewards in (
        (alternating, 8, [1, 1, 1, -1]),
        (alternating, 9, [1.2, -1, 1, -1]),
        (alternating, 10, [1.2, -1, 1, -1]),
        (alternating, 11, [1, 1, 1, -1]),
        (alternating, 19, [1.2, -1, 1, -1]),
        (alternating, 20, [1, 1, 1, -1]),
        (["acceleration=0.5", "acceleration_until=4"], 1, [1 + share / 2] * 3 + [-1]),
        (["acceleration=0.5", "acceleration_until=4"], 3, [1 + share / 4] * 3 + [-1]),
        (["acceleration=0.5", "acceleration_until=4"], 5, [1, 1, 1, -1]),
    ):
        config = load_config(papo.PapoConfig, "tiny_papo", ["advantage=mean", *changes])
        collected = collect(papo, config, [group], monkeypatch, model, step)
        assert collected.metrics["reward"] == pytest.approx(np.mean(rewards))
        assert advantages(collected) == [pytest.approx(np.array(rewards) - np.mean(rewards))]


def test_papo_pays_structure_within_the_group(model, monkeypatch):
    """Beside the acceleration reward, as in Parason; what is left out is not of the group."""
    config = load_config(
        papo.PapoConfig,
        "tiny_papo",
        [
            *("malformed=filter", "advantage=mean", "acceleration=1", "acceleration_cap=0.2"),
            *("parallel_bonus=0.1", "acceleration_bonus=0.05"),
        ],
    )
    group = [judged(model, right, groups=n) for right, n in ((True, 1), (True, 2), (False, 3))]
    cut = judged(model, True, reason="length")
    collected = collect(papo, config, [[*group, cut]], monkeypatch, model)
    shares = np.array([papo.shares_of(answer) for answer in group])
    assert (np.diff(shares, axis=0) > 0.04).all() and (shares[0] == 0).all()
    z = (shares - shares.mean(0)) / shares.std(0)
    bonus = np.where([True, True, False], z @ [0.1, 0.05], 0)
    rewards = np.array([1, 1 + min(0.2, shares[1, 1]), -1]) + bonus
    assert collected.metrics["reward"] == pytest.approx(rewards.mean())
    assert advantages(collected) == [pytest.approx(rewards - rewards.mean(), abs=1e-6)]


def test_papo_can_train_under_the_released_layout(model, monkeypatch):
    config = load_config(papo.PapoConfig, "tiny_papo", ["layout=reference"])
    cut = judged(model, False, reason="length", length=-9)
    groups = [[judged(model, True), judged(model, False), cut]]
    collected = collect(papo, config, groups, monkeypatch, model)
    assert collected.metrics["filtered"] == 1  # there is no such layout of it
    for example in collected.groups[0]:
        tree = parse(example.token_ids, example.layout.prompt_len, model.tags, rule="reference")
        assert np.array_equal(example.layout.positions, tree.positions)
        assert np.array_equal(example.layout.hidden, tree.hidden)
    with pytest.raises(ValueError, match=r"engine\.max_depth is 2, needed is 1"):
        load_config(papo.PapoConfig, "tiny_papo", ["layout=reference", "engine.max_depth=2"])
    with pytest.raises(ValueError, match="objective is 'ppo', needed is 'papo' or 'dapo'"):
        load_config(papo.PapoConfig, "tiny_papo", ["objective=ppo"])


def test_beta_learns_under_the_layout_that_it_is_told(model):
    answer = judged(model, True).trajectory
    record = {"accepted": [answer.token_ids.tolist()], "prompt_len": answer.prompt_len}
    (strict,) = beta.make_examples([record], model.tags)
    (causal,) = beta.make_examples([record], model.tags, "causal")
    (reference,) = beta.make_examples([record], model.tags, "reference", train_forced=True)
    assert np.array_equal(causal.layout.positions, np.arange(len(causal.token_ids)))
    assert np.array_equal(causal.loss_mask, strict.loss_mask)
    assert not causal.layout.hidden.any() and strict.layout.hidden.any()
    assert (reference.layout.positions != strict.layout.positions).any()
    assert reference.loss_mask.sum() == len(reference.token_ids) - answer.prompt_len


def test_a_run_states_its_rules_once(model):
    """Beta learns, and PAPO trains on, what the engine decodes; their rows have room for it."""
    answer = judged(model, True).trajectory
    record = {"accepted": [answer.token_ids.tolist()], "prompt_len": answer.prompt_len}
    rules = model.tags.resolved(Rules("last", "fresh", "sum", "="))
    (strict,), (made,) = (
        beta.make_examples([record], model.tags, rules=x) for x in (Rules(), rules)
    )
    assert made.layout.rules == rules and np.array_equal(made.loss_mask, strict.loss_mask)
    assert made.layout.hidden.shape[1] <= rules.intervals(beta.MAX_DEPTH, 3)
    assert made.layout.visible().sum() < strict.layout.visible().sum()
    assert made.layout.positions[-1] == len(made.token_ids) - 1 > strict.layout.positions[-1]
    fresh = ["engine.rules.fork=fresh", "engine.max_blocks=3", "engine.max_depth=2"]
    papo_config = load_config(papo.PapoConfig, "tiny_papo", fresh)
    assert papo_config.depth == 2 * 3 + 1 + 2
    assert load_config(beta.BetaConfig, "tiny_beta", fresh).depth == 3 + 1 + 1
    plain = ["engine.rules={join: last, marker: '=', positions: sum}", "engine.max_depth=2"]
    assert load_config(papo.PapoConfig, "tiny_papo", plain).depth == 2 + 2
    good, size = judged(model, True), len(answer.token_ids)
    assert beta.accepts(good, model.tags, size, max_blocks=1)
    twice = np.concatenate([answer.token_ids, answer.token_ids[answer.prompt_len :]])
    twice = dataclasses.replace(answer, token_ids=twice)
    many = dataclasses.replace(good, trajectory=twice)
    assert beta.accepts(many, model.tags, 2 * size)
    assert not beta.accepts(many, model.tags, 2 * size, max_blocks=1)
    for cls, preset in ((papo.PapoConfig, "tiny_papo"), (beta.BetaConfig, "tiny_beta")):
        with pytest.raises(
            ValueError, match=r"engine.max_blocks is 0 and engine.rules.fork 'fresh'"
        ):
            load_config(cls, preset, fresh[:1])
        with pytest.raises(ValueError, match=r"engine.rules are .*'sum'.* needed are the defaults"):
            load_config(cls, preset, ["layout=reference", "engine.rules.positions=sum"])
        with pytest.raises(ValueError, match=r"marker is None and join 'last', needed is a text"):
            load_config(cls, preset, ["engine.rules.join=last"])


def test_beta_accepts_only_what_is_finished_well_formed_right_and_short_enough(model):
    good = judged(model, True)
    size = len(good.trajectory.token_ids)
    assert beta.accepts(good, model.tags, size)
    assert not beta.accepts(good, model.tags, size - 1)
    assert not beta.accepts(judged(model, False), model.tags, size)
    assert not beta.accepts(judged(model, True, BAD), model.tags, size)
    assert not beta.accepts(judged(model, True, reason="length"), model.tags, size)
    assert not beta.accepts(judged(model, True, length=-9), model.tags, size)


def test_the_parts_of_the_reward_add_up_to_it(model):
    config = load_config(zero.ZeroConfig, "tiny_zero", ["overlong_buffer=150", "max_tokens=160"])
    answers = [judged(model, True), judged(model, False), judged(model, True, BAD)]
    rewards = [zero.reward_of(answer, config) for answer in answers]
    parts = zero.reward_parts(answers, rewards, config.reward)
    assert sum(parts.values()) == pytest.approx(np.mean(rewards))
    assert parts["format"] == pytest.approx(rewards[2] / 3)
    assert parts["accuracy"] == 0 and parts["overlong"] < 0
    config = dataclasses.replace(config, reward="accuracy", overlong_buffer=0)
    rewards = [zero.reward_of(answer, config) for answer in answers]
    assert rewards == [1, -1, 1]  # the last breaks the format
    parts = zero.reward_parts(answers, rewards, config.reward)
    assert parts == {"format": 0, "accuracy": pytest.approx(1 / 3), "overlong": pytest.approx(0)}


def test_the_summary_tells_what_was_truncated_and_which_rules_were_broken(model):
    cut = judged(model, False, BAD, reason="length", length=-9)
    found = summary([judged(model, True), cut, judged(model, True, BAD), judged(model, False)])
    assert found["truncated"] == 0.25 and found["finish/length"] == 0.25
    assert found[f"broken/{BAD[0].kind}"] == 0.5
    assert found["width"] == 2 and found["depth"] == 1
    assert found["block_place"] == 0


def test_the_summary_tells_how_branches_are_used_where_they_are(model):
    """A mean over the answers that have branches, of which one was cut off before they joined."""
    answers = [judged(model, True, seed=seed, groups=3) for seed in range(6)]
    cut = judged(model, False, BAD, reason="length", length=-30)
    alone = judged(model, True, groups=1)
    overlaps = [answer.figures.path_overlap for answer in answers]
    assert min(overlaps) == 0 < max(overlaps) < 1
    assert cut.figures.path_overlap is alone.figures.path_overlap is None
    found = summary([*answers, cut, alone])
    assert found["path_overlap"] == pytest.approx(np.mean(overlaps))
    assert "path_overlap" not in summary([cut]) and "block_place" in summary([cut])
    before = judged(model, True, length=20)  # ends in its guideline
    assert not {"path_overlap", "block_place"} & summary([before]).keys()


def test_a_gap_between_sampler_and_trainer_warns_and_then_stops(caplog):
    check_gap(1, {}, 0.05, 0.5)  # nothing was trained
    check_gap(1, {"logp_gap": 0.01, "logp_gap_max": 0.2}, 0.05, 0.5)
    bad = {"logp_gap": float("nan"), "logp_gap_max": float("nan"), "nonfinite": 1}
    check_gap(1, bad, 0.05, 0.5)  # was skipped and counted: NonfiniteGuard's affair
    assert not caplog.records
    check_gap(2, {"logp_gap": 0.1, "logp_gap_max": 0.2}, 0.05, 0.5)
    assert "more than train.gap_warn=0.05" in caplog.text
    with pytest.raises(FloatingPointError, match=r"step 3: .* by 0.6 .*train\.gap_stop=0\.5"):
        check_gap(3, {"logp_gap": 0.6, "logp_gap_max": 2.0}, 0.05, 0.5)
    with pytest.raises(FloatingPointError, match="nan"):
        check_gap(3, {"logp_gap": float("nan"), "logp_gap_max": 2.0}, 0.05, 0.5)
