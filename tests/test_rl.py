"""A policy's step, with an engine that decodes nothing: what is trained of what was collected, and
what stays in memory."""

import dataclasses
import gc
import json

import jax
import numpy as np
import pytest
from checkpoint_checks import content, flip
from train_toy import examples, tiny, write_problems

from npr_jax.base.config import load_config
from npr_jax.model.pretrained import load, save
from npr_jax.runs import loop
from npr_jax.runs.metrics import is_measured, read_metrics
from npr_jax.train import beta, fit, policy, rl, zero
from npr_jax.train.fit import FitConfig
from npr_jax.train.optimizer import OptimizerConfig
from npr_jax.train.step import TrainConfig
from npr_jax.tree import layout


class FakeEngine:
    """Has weights, as the engine has, and gives no answers."""

    def __init__(self, model, config, mesh=None):
        self.params, self.tags, self.tokenizer = model.params, model.tags, model.tokenizer

    def set_params(self, params):
        self.params = params

    def stats(self):
        counts = "sampled_tokens preemptions cached_tokens prefill_tokens decode_tokens decode_rows"
        return dict.fromkeys(counts.split(), 0)


@pytest.fixture
def settings(tmp_path, monkeypatch):
    """(stage, changes) -> a config of the tiny model, the engine of which decodes nothing."""
    write_problems(tmp_path / "problems.jsonl", 16)
    gc.collect()  # what the test before has left would go while this one counts
    monkeypatch.setattr(policy, "Engine", FakeEngine)
    monkeypatch.setattr(beta, "Engine", FakeEngine)

    def make(stage, *changes):
        cls = {"zero": zero.ZeroConfig, "beta": beta.BetaConfig}[stage]
        paths = {"problems": tmp_path / "problems.jsonl", "output": tmp_path / stage}
        paths = [f"{key}={json.dumps(str(value))}" for key, value in paths.items()]
        return load_config(cls, f"tiny_{stage}", ["model=tiny", *paths, *changes])

    return make


def nothing(engine, feed, step, config):
    return rl.Collected([], [], {"score": 0.0, "skipped_because": "there is nothing"})


def arrays(dtype):
    """Live arrays as large as the embedding, of which every copy of the weights has one."""
    shape = load("tiny").with_tags().params["embed"].shape
    return sum(x.shape == shape and x.dtype == dtype for x in jax.live_arrays())


@pytest.mark.slow
def test_the_engine_has_the_only_copy_of_its_weights(settings):
    """Parameters and two moments in float32, and one copy in what is decoded with."""
    config, counts = settings("zero", "steps=3", "train.compute_dtype=bfloat16"), []

    def collect(engine, feed, step, config):
        counts.append((arrays("float32"), arrays("bfloat16")))
        return nothing(engine, feed, step, config)

    before = arrays("float32"), arrays("bfloat16")
    loop.run(policy.Policy(config, collect), lambda metrics: None)
    assert [np.subtract(count, before).tolist() for count in counts] == [[3, 1]] * 3


@pytest.mark.slow
def test_with_adapters_there_is_one_base_for_trainer_engine_and_reference(settings):
    """In bfloat16, without a copy for any of them; of float32 weights nothing is left."""
    changes = "train.compute_dtype=bfloat16", "train.lora.rank=4", "kl=0.1"
    config, counts = settings("zero", "steps=3", *changes), []

    def collect(engine, feed, step, config):
        counts.append((arrays("float32"), arrays("bfloat16")))
        return nothing(engine, feed, step, config)

    before = arrays("float32"), arrays("bfloat16")
    loop.run(policy.Policy(config, collect), lambda metrics: None)
    assert [np.subtract(count, before).tolist() for count in counts] == [[0, 1]] * 3


def test_sampling_keeps_the_weights_of_the_engine_only(settings, tmp_path, monkeypatch):
    config, counts = settings("beta", "sampler_model=tiny", "sample.batch=8"), []
    config = dataclasses.replace(
        config,
        fit=dataclasses.replace(
            config.fit, train=dataclasses.replace(config.fit.train, compute_dtype="bfloat16")
        ),
    )

    def sample_batch(engine, batch, *_):
        counts.append((arrays("float32"), arrays("bfloat16")))
        return [{"accepted": []} for _ in batch], {"accepted_rate": 0.0}

    monkeypatch.setattr(beta, "_sample_batch", sample_batch)
    before = arrays("float32"), arrays("bfloat16")
    found = loop.run(beta.Sampling(config, tmp_path / "a.jsonl"), lambda metrics: None)
    assert len(found) == 16
    assert [np.subtract(count, before).tolist() for count in counts] == [[0, 1]] * 2


def test_fitting_keeps_its_state_only(settings, tmp_path, monkeypatch):
    made, counts = examples(tiny(), 4), []
    train = dataclasses.replace(settings("zero").train, row_len=256)

    def optimize(state, *_):
        counts.append(arrays("float32"))
        return state, {"loss": 1.0, "nonfinite": 0}

    monkeypatch.setattr(fit, "optimize", optimize)
    before = arrays("float32")
    body = fit.Fit(
        lambda: load("tiny", tags=True),
        made,
        FitConfig(train, batch=2, steps=1),
        tmp_path / "fit",
        0,
        "fit",
        None,
        None,
    )
    loop.run(body, lambda metrics: None)
    assert [count - before for count in counts] == [3]


def test_a_run_goes_on_with_its_model_elsewhere_and_more_steps(settings, tmp_path):
    save(load("tiny", seed=1, tags=True), tmp_path / "a")

    def run(*changes):
        config = settings("zero", *changes)
        return loop.run(policy.Policy(config, nothing), lambda metrics: None)

    def done():
        return [line["step"] for line in read_metrics(tmp_path / "zero")]

    run(f"model={tmp_path / 'a'}", "steps=2")
    (tmp_path / "a").rename(tmp_path / "b")
    final = run(f"model={tmp_path / 'b'}", "steps=3", "train.micro_rows=1", "engine.lanes=3")
    assert done() == [1, 2, 3] and final.exists()
    assert sorted(path.name for path in final.parent.glob("final*")) == ["final", "final-steps-2"]
    assert run(f"model={tmp_path / 'b'}", "steps=3") == final
    with pytest.raises(ValueError, match="steps was 3, is 2"):
        run(f"model={tmp_path / 'b'}", "steps=2")
    save(load("tiny", seed=2, tags=True), tmp_path / "other")
    with pytest.raises(ValueError, match=r"inputs\.model was .*weights"):
        run(f"model={tmp_path / 'other'}", "steps=4")
    run(f"model={tmp_path / 'b'}", "steps=4")
    assert done() == [1, 2, 3, 4]
    final.rename(tmp_path / "gone")
    with pytest.raises(ValueError, match="has done 4 steps, and is to have 3"):
        run(f"model={tmp_path / 'b'}", "steps=3")


def test_a_run_that_is_smaller_than_its_mesh_says_so_once(settings, caplog):
    changes = "mesh.fsdp=8", "prompts=4", "samples=4", "minibatches=4"
    policy.Policy(settings("zero", *changes), nothing)
    (record,) = caplog.records
    assert "has 4 examples for 8 parts" in record.message
    assert "Set minibatches to 2 or less" in record.message
    policy.Policy(settings("zero", *changes, "minibatches=2"), nothing)
    assert len(caplog.records) == 1


def collected(*advantages):
    """A group for every number, of one example that has it as its advantage."""
    made = examples(tiny(), len(advantages), seed=3)
    groups = [
        [
            dataclasses.replace(
                e,
                advantage=np.full(len(e.layout), a, np.float32),
                old_logp=np.zeros(len(e.layout), np.float32),
            )
        ]
        for e, a in zip(made, advantages, strict=True)
    ]
    return rl.Collected(groups, list(range(len(groups))), {"score": 0.0})


def test_where_every_advantage_is_zero_no_step_is_made(settings, tmp_path, caplog):
    """Nor would a step be made by decay and momentum alone."""
    config = settings("zero", "steps=2", "minibatches=1", "train.optimizer.weight_decay=0.5")
    before = load("tiny", seed=config.seed, tags=True).params

    def collect(engine, feed, step, config):
        return collected(0.0, 0.0)

    final = loop.run(policy.Policy(config, collect), lambda metrics: None)
    lines = read_metrics(tmp_path / "zero")
    assert [line["skipped"] for line in lines] == [1, 1]
    assert {line["skipped_because"] for line in lines} == {
        "within each group all rewards are equal"
    }
    size = len(load(final).tokenizer)
    assert np.array_equal(load(final).params["embed"][:size], before["embed"][:size])
    assert "none of the 2 steps has trained anything" in caplog.text


def test_with_kl_answers_without_advantage_are_trained_on(settings, tmp_path):
    """The first step has the reference itself, the second is away from it."""
    sizes = "train.row_len=256", "max_tokens=100", "train.gap_stop=1000", "minibatches=1"
    for kl in (0.0, 0.5):
        config = settings("zero", "steps=2", f"kl={kl}", *sizes, f"output={tmp_path / str(kl)}")

        def collect(engine, feed, step, config):
            return collected(0.0, 1.0)

        loop.run(policy.Policy(config, collect), lambda metrics: None)
    none, some = read_metrics(tmp_path / "0.0"), read_metrics(tmp_path / "0.5")
    assert [line["zero_advantage"] for line in none] == [1, 1] and "kl" not in none[0]
    assert [line["zero_advantage"] for line in some] == [0, 0]
    assert some[0]["kl"] == 0 and some[1]["kl"] > 0
    assert some[0]["row_tokens"] > none[0]["row_tokens"]


def test_minibatches_that_teach_nothing_are_left_out_and_counted():
    train = TrainConfig(OptimizerConfig(1e-3), row_len=256)
    empty, dealt = rl.minibatches(collected(0.0, 1.0, 0.0, -1.0, 0.0), 2, train, 3)
    assert not empty.parts and empty.left_out == 3 and empty.count > 0
    assert dealt.left_out == 0 and dealt.count == dealt.computed
    assert dealt.count == sum(int(part["loss_mask"].sum()) for part in dealt.parts)
    metrics = {"loss": 1.0, "logp_gap": 0.1, "logp_gap_max": 0.2, "loss_tokens": 7, "nonfinite": 0}
    metrics |= {"row_tokens": 90, "slots": 100, "micro_batches": 1}
    found = rl.merged([metrics], parts=2)
    assert found["minibatches_skipped"] == 1 and found["skipped"] == 0
    both = rl.merged([metrics, metrics | {"row_tokens": 10}], parts=2)
    assert "minibatches_skipped" not in both
    assert (both["slots"], both["micro_batches"], both["slot_use"]) == (200, 2, 0.5)
    assert list(rl.minibatches(collected(), 2, train, 3)) == []


def test_a_run_goes_on_from_a_step_of_another_in_a_directory_of_its_own(
    settings, tmp_path, monkeypatch, capsys
):
    """Examples that differ from problem to problem are put in for sampled ones."""
    model = tiny()

    def collect(engine, feed, step, config):
        feed.take(2)
        made = examples(model, 2, seed=feed.position)
        pair = [
            dataclasses.replace(made[i], advantage=sign * feed.position)
            for i, sign in ((0, 1.0), (1, -1.0))
        ]
        return rl.Collected([[pair[0]], [pair[1]]], [0, 1], {"score": 0.0, "at": feed.position})

    def run(output, *changes):
        sizes = "train.row_len=256", "max_tokens=100", "train.gap_stop=1000", "steps=4"
        kept = "train.checkpoint_every=2", "train.keep_checkpoints=9", "seed=1"
        config = settings("zero", *sizes, *kept, f"output={tmp_path / output}", *changes)
        final = loop.run(policy.Policy(config, collect), lambda metrics: None)
        lines = [
            {k: v for k, v in line.items() if not is_measured(k)}
            for line in read_metrics(tmp_path / output)
        ]
        return lines, (final / "model.safetensors").read_bytes()

    lines, weights = run("old")
    assert [line["at"] for line in lines] == [2, 4, 6, 8]
    before = content(tmp_path / "old")
    start = f"start={tmp_path / 'old'}@2"
    assert run("new", start) == (lines[2:], weights)
    assert f"zero: goes on from step 2 of {tmp_path / 'old'}" in capsys.readouterr().err
    assert f"start: {tmp_path / 'old'}@2" in (tmp_path / "new" / "config.yaml").read_text()
    assert content(tmp_path / "old") == before
    more, other = run("changed", start, "train.optimizer.learning_rate=0.1", "steps=3")
    assert [line["at"] for line in more] == [6] and other != weights
    # It has checkpoints of its own then, and needs the other run no more.
    (tmp_path / "old").rename(tmp_path / "gone")
    run("new", start, "steps=5")
    for changes, message in (
        ([], "start was .*old@2.*, is null: its state"),
        ([start.replace("@2", "@4")], "start was .*@2.*, is .*@4.*: its state"),
    ):
        with pytest.raises(ValueError, match=message):
            run("new", *changes)
    for changes, message in (
        (["start=runs@x"], "start is 'runs@x', needed is RUN@STEP"),
        ([start], "old is no run directory"),
        ([f"start={tmp_path / 'gone'}@3"], "no checkpoint of step 3, there are 2, 4"),
        (
            [f"start={tmp_path / 'gone'}@2", "train.optimizer.name=lion"],
            r"train\.optimizer\.name is lion, needed is that of .*gone, adamw",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            run("none", *changes)
    assert [path.name for path in (tmp_path / "none").iterdir()] == ["config.yaml"]
    save(load("tiny", seed=2, tags=True), tmp_path / "other")
    with pytest.raises(ValueError, match=r"model is weights .*, needed is that with which"):
        run("none", f"start={tmp_path / 'gone'}@2", f"model={tmp_path / 'other'}")
    flip(tmp_path / "gone" / "checkpoints" / "2")
    with pytest.raises(ValueError, match="has done 4 steps, and is to have 3"):
        run("short", f"start={tmp_path / 'gone'}@4", "steps=3")
    with pytest.raises(ValueError, match=r"start: checkpoint .*2: .* is not what was written"):
        run("none", f"start={tmp_path / 'gone'}@2")


def test_what_a_step_trains_on_is_told_when_it_fails_again(settings, monkeypatch, caplog):
    model, before = tiny(), policy.optimize

    def collect(engine, feed, step, config):
        (prompt,), _ = feed.take(1)
        made = examples(model, 2, seed=3)
        (text,) = feed.names(feed.position - 1, feed.position).values()
        ids = np.concatenate([prompt, made[0].token_ids[made[0].layout.prompt_len :]])
        laid = layout(len(ids), prompt_len=len(prompt))
        mask = np.arange(len(ids)) >= len(prompt)
        known.append((text, len(ids)))
        one = rl.Example(ids, laid, mask, 1.0)
        return rl.Collected([[one, dataclasses.replace(one, advantage=-1.0)]], [0], {"score": 0.0})

    def fails(*_):
        raise KeyboardInterrupt

    known = []
    changes = "train.row_len=256", "max_tokens=100", "max_prompt_tokens=100", "train.remat=dots"
    config = settings("zero", *changes, "train.gap_stop=1000", "steps=1", "minibatches=1")
    monkeypatch.setattr(policy, "optimize", fails)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            loop.run(policy.Policy(config, collect), lambda metrics: None)
    ((text, size),) = known
    told = f"begun once before and not finished. It trained on {text}: {size}, {size} tokens ("
    assert told in caplog.text
    assert "train.remat=full (it is dots)" in caplog.text
    assert "train.row_len=200 (it is 256)" in caplog.text and "--set seed=" in caplog.text
    monkeypatch.setattr(policy, "optimize", before)
    final = loop.run(policy.Policy(config, collect), lambda metrics: None)
    assert final.exists() and not (final.parent / "attempt.json").exists()


def test_a_group_that_was_carried_over_is_told_by_its_problem(settings, monkeypatch, tmp_path):
    """One of the first batch, whose answers end in the second."""

    def collect(engine, feed, step, config):
        feed.take(4)
        if step == 1:
            return nothing(engine, feed, step, config)
        ids = np.array([*feed.prompt(0), 5], np.int32)
        laid = layout(len(ids), prompt_len=len(ids) - 1)
        one = rl.Example(ids, laid, np.arange(len(ids)) == len(ids) - 1, 1.0)
        names.extend(feed.names(0, 1).values())
        return rl.Collected([[one]], [0], {"score": 0.0})

    def fails(*_):
        raise KeyboardInterrupt

    names = []
    changes = "carry=50", "max_refills=0", "steps=2", "prompts=1", "minibatches=1"
    config = settings("zero", *changes)
    monkeypatch.setattr(policy, "optimize", fails)
    with pytest.raises(KeyboardInterrupt):
        loop.run(policy.Policy(config, collect), lambda metrics: None)
    assert [*json.loads((tmp_path / "zero" / "attempt.json").read_text())["work"]] == names
