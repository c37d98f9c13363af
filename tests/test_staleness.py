"""Rollouts ahead of training: which weights sample which batch, also when a run goes on."""

import dataclasses
import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_rl import FakeEngine
from train_toy import examples, tiny, write_problems

from npr_jax.base.config import load_config
from npr_jax.runs import loop, sigterm
from npr_jax.runs.metrics import is_measured, read_metrics
from npr_jax.train import policy, rl
from npr_jax.train.losses import papo
from npr_jax.train.papo import PapoConfig
from npr_jax.train.rollout_cache import fingerprint
from npr_jax.train.sides import needed_version


@pytest.fixture
def run(tmp_path, monkeypatch):
    """(name, changes, end) -> the metrics of a run whose batches say which weights sampled them;
    `end(number)` is called before each batch is collected."""
    write_problems(tmp_path / "problems.jsonl", 16)
    monkeypatch.setattr(policy, "Engine", FakeEngine)
    made = [
        dataclasses.replace(e, advantage=a, old_logp=np.full(len(e.token_ids), -1.0, np.float32))
        for e, a in zip(examples(tiny(), 2, seed=3), (1.0, -1.0), strict=True)
    ]

    def go(name, *changes, end=lambda number: None):
        paths = {"problems": tmp_path / "problems.jsonl", "output": tmp_path / name}
        sets = [f"{key}={json.dumps(str(value))}" for key, value in paths.items()]
        fixed = ["model=tiny", "steps=6", "prompts=1", "train.row_len=256", *sets]
        config = load_config(PapoConfig, "tiny_papo", [*fixed, "train.gap_stop=99", *changes])

        def collect(engine, feed, step, config):
            end(step)
            found = {"sampled_by": fingerprint(engine.params), "at": feed.position, "score": 0.0}
            feed.take(1)
            return rl.Collected([[e] for e in made], [0, 1], found)

        body = policy.Policy(config, collect)
        states = {}
        inner = body.step

        def step(state, number):
            states[number - 1] = fingerprint(state.params)
            return inner(state, number)

        body.step = step
        loop.run(body, lambda metrics: None)
        lines = read_metrics(tmp_path / name)
        return [{k: v for k, v in line.items() if not is_measured(k)} for line in lines], states

    return go


@pytest.mark.parametrize("staleness", [0, 1, 2, 9])
def test_a_batch_is_sampled_by_the_weights_that_its_number_says(run, staleness):
    lines, states = run("run", f"staleness={staleness}")
    assert len({*states.values()}) == 6  # each step has changed the weights
    for line in lines:
        version = needed_version(line["step"], staleness, 0)
        assert version == max(0, line["step"] - 1 - staleness)
        assert line["sampled_by"] == states[version]
        assert line["rollout_age"] == line["step"] - 1 - version
        assert ("importance" in line) == (staleness > 0)


@pytest.mark.parametrize("staleness", [1, 2])
@pytest.mark.parametrize("at", [1, 4])
@pytest.mark.parametrize("kind", [KeyboardInterrupt, sigterm.Preempted])
def test_a_run_that_was_ended_goes_on_with_the_same_batches(run, staleness, at, kind):
    changes = f"staleness={staleness}", "train.checkpoint_every=2"
    whole, _ = run("whole", *changes)
    seen = []

    def end(number):
        seen.append(number)
        if number == at:
            raise kind()

    with pytest.raises(kind):
        run("ended", *changes, end=end)
    again = []
    assert run("ended", *changes, end=again.append)[0] == whole
    # What was whole on disk is not sampled again.
    assert not {*seen} - {at} & {*again}


def test_lost_rollouts_are_named_and_sampled_anew(run, tmp_path, caplog):
    changes = "staleness=2", "train.checkpoint_every=2"

    def end(number):
        if number == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run("run", *changes, end=end)
    kept = tmp_path / "run" / "checkpoints" / "rollouts"
    assert {"3.npz", "4.npz"} <= {path.name for path in kept.iterdir()}
    (kept / "4.npz").write_bytes(b"no archive")
    with caplog.at_level(logging.WARNING):
        lines, states = run("run", *changes)
    assert "the rollouts of step 4 are not in" in caplog.text
    ages = [line["rollout_age"] for line in lines]
    assert ages == [0, 1, 2, 1, 2, 2]  # the fourth is sampled by the weights after step 2
    assert lines[3]["sampled_by"] == states[2]


@pytest.mark.parametrize("staleness", [0, 1, 3])
def test_another_run_asks_again_what_was_sampled_ahead(run, tmp_path, caplog, staleness):
    run("run", "staleness=2", "train.checkpoint_every=2", "train.keep_checkpoints=9")
    with caplog.at_level(logging.WARNING):
        lines, states = run("new", f"start={tmp_path / 'run'}@2", f"staleness={staleness}")
    assert "rollouts of step" not in caplog.text  # it is no fault that they are not there
    assert [line["at"] for line in lines] == [2, 3, 4, 5]
    for line in lines:
        assert line["sampled_by"] == states[needed_version(line["step"], staleness, 2)]


def test_importance_weights_are_ratios_up_to_the_bound():
    rng = np.random.default_rng(0)
    logp, old, advantages = (jnp.asarray(rng.normal(size=50), jnp.float32) for _ in range(3))
    mask = jnp.asarray(rng.random(50) < 0.7)
    weights = np.minimum(np.exp(logp - old), 2.0)
    total, count, metrics = papo(logp, advantages, mask, old, 2.0)
    np.testing.assert_allclose(total, -(advantages * weights)[mask].sum(), rtol=1e-5)
    gradient = jax.grad(lambda x: papo(x, advantages, mask, old, 2.0)[0])(logp)
    np.testing.assert_allclose(gradient, np.where(mask, -advantages * weights, 0), rtol=1e-5)
    np.testing.assert_allclose(metrics["importance"], weights[mask].sum(), rtol=1e-5)
    assert metrics["importance_truncated"] == (weights >= 2.0)[mask].sum() > 0
    assert count == mask.sum()
    plain = papo(logp, advantages, mask)
    same = papo(logp, advantages, mask, logp, 2.0)  # drawn by these weights: the loss of PAPO
    assert plain[0] == same[0] and same[2]["importance_truncated"] == 0


def test_what_does_not_go_together_is_refused():
    with pytest.raises(ValueError, match=r"mesh\.rollout is 4 and staleness 0.*set staleness to 1"):
        load_config(PapoConfig, "tiny_papo", ["mesh.rollout=4"])
