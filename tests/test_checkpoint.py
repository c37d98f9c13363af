"""Checkpoints: what was saved comes back, on any mesh; what is damaged is named and passed over;
what cannot be written leaves what was there."""

import contextlib
import dataclasses
import functools
import importlib.util
import json
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from train_toy import examples, tiny

from npr_jax import demo
from npr_jax.model.pretrained import load, publish_model, save
from npr_jax.runs import directory as claims
from npr_jax.runs import sigterm
from npr_jax.runs.checkpoint import Checkpoints, checkpoint_steps
from npr_jax.runs.directory import SIZES, claim, claim_inputs
from npr_jax.runs.guards import NonfiniteGuard
from npr_jax.runs.log import RunLog
from npr_jax.runs.metrics import read_metrics
from npr_jax.train.export import export
from npr_jax.train.fit import FitConfig, fit
from npr_jax.train.inputs import model_content
from npr_jax.train.optimizer import OptimizerConfig, new_state
from npr_jax.train.packing import make_rows
from npr_jax.train.rollout_cache import Pending, fingerprint
from npr_jax.train.step import TrainConfig

TEXT = "seed: 0\n"
OPTIMIZER = OptimizerConfig(learning_rate=1e-3)


def make_state(number, sharding=None):
    """A train state of 0.8 MB whose every array tells `number`."""
    rng = np.random.default_rng(number)
    state = new_state({"w": jnp.asarray(rng.normal(size=(256, 256)), jnp.float32)}, OPTIMIZER)
    state = jax.tree.map(lambda x: x + number, state)
    if sharding:
        state = jax.tree.map(lambda x: jax.device_put(x, sharding(x)), state)
    return state


def same(a, b):
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(x, y) and x.dtype == y.dtype for x, y in leaves)


def content(directory):
    return {p: p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def steps_in(directory):
    return sorted(int(p.name) for p in directory.iterdir() if p.name.isdigit())


@pytest.fixture
def saved(tmp_path):
    """A directory with the checkpoints of steps 1 and 2."""
    with Checkpoints(tmp_path / "c", TEXT, keep=2) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, make_state(step), {"problem": 10 * step})
    return tmp_path / "c"


@contextlib.contextmanager
def no_room(limit):
    """No file grows beyond `limit` bytes: writes fail for real, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_what_is_saved_is_the_state_of_that_step_though_the_next_one_uses_it_up(tmp_path):
    advance = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    state, copies = make_state(0), {}
    with Checkpoints(tmp_path, TEXT, keep=4) as checkpoints:
        assert checkpoints.restore(state) is None
        for step in (1, 2, 3, 4):
            state = advance(state)
            copies[step] = jax.tree.map(np.array, state)
            checkpoints.save(step, state, {"problem": step})
    for step in (4, 3, 2, 1):
        with Checkpoints(tmp_path, TEXT, keep=4) as checkpoints:
            found, restored, position = checkpoints.restore(state)
        assert (found, position) == (step, {"problem": step})
        assert same(restored, copies[step])
        (tmp_path / str(step)).rename(tmp_path / f"gone-{step}")


def test_the_last_ones_and_the_best_stay(tmp_path):
    values = {1: 0.0, 2: 3.0, 3: float("nan"), 4: 1.0, 5: None, 6: 2.0}
    for step, value in values.items():  # opened anew each time, as by a run that is cut off often
        with Checkpoints(tmp_path, TEXT, keep=2, keep_best=1) as checkpoints:
            checkpoints.restore(make_state(0))
            checkpoints.save(step, make_state(step), {}, value)
    assert steps_in(tmp_path) == [2, 5, 6]
    with Checkpoints(tmp_path, TEXT, keep=2) as checkpoints:
        checkpoints.save(7, make_state(7), {}, 0.0)
    assert steps_in(tmp_path) == [6, 7]


@pytest.mark.parametrize("shape", [(8, 1), (2, 4), (1, 1)], ids=str)
def test_a_checkpoint_restores_on_another_mesh(tmp_path, shape):
    def on(shape):
        devices = jax.devices()[: shape[0] * shape[1]]
        mesh = jax.make_mesh(shape, ("fsdp", "tensor"), devices=devices)
        return lambda x: NamedSharding(mesh, P("fsdp", "tensor") if x.ndim == 2 else P())

    state = make_state(1, on((4, 2)))
    with Checkpoints(tmp_path, TEXT, keep=1) as checkpoints:
        checkpoints.save(1, state, {})
    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=on(shape)(x)), state
    )
    with Checkpoints(tmp_path, TEXT, keep=1) as checkpoints:
        _, restored, _ = checkpoints.restore(target)
    assert same(restored, state)
    assert fingerprint(restored.params) == fingerprint(state.params)
    for x, goal in zip(jax.tree.leaves(restored), jax.tree.leaves(target), strict=True):
        assert x.sharding.is_equivalent_to(goal.sharding, x.ndim)


def data_file(checkpoint):
    """The largest file: the arrays."""
    return max((p for p in checkpoint.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip(checkpoint):
    path = data_file(checkpoint)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "one bit is another": (flip, "is not what was written"),
    "a file ends early": (lambda c: os.truncate(data_file(c), 1000), "is not what was written"),
    "a file is missing": (lambda c: data_file(c).unlink(), "is missing"),
    "there are no digests": (lambda c: (c / "digests.json").unlink(), "half-written"),
    "the digests end early": (lambda c: os.truncate(c / "digests.json", 40), "is damaged"),
    "the digests are a list": (lambda c: (c / "digests.json").write_text("[]"), "holds list"),
    "the digests are deep": (lambda c: (c / "digests.json").write_text("[" * 9**5), "is damaged"),
    "the digests are in a folder": (
        lambda c: (c / "digests.json").rename(c / "x") and (c / "digests.json").mkdir(),
        "half-written",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(saved, caplog, kind):
    damage, message = DAMAGE[kind]
    damage(saved / "2")
    left = content(saved / "2")
    with Checkpoints(saved, TEXT, keep=2) as checkpoints:
        step, state, position = checkpoints.restore(make_state(0))
        assert (step, position) == (1, {"problem": 10})
        assert same(state, make_state(1))
        assert f"{saved / '2'} is damaged" in caplog.text and message in caplog.text
        # It is not removed, and its step can be saved anew.
        assert [*content(saved / "damaged-2").values()] == [*left.values()]
        checkpoints.save(2, make_state(2), {"problem": 20})
    with Checkpoints(saved, TEXT, keep=2) as checkpoints:
        assert checkpoints.restore(make_state(0))[0] == 2


def test_what_is_named_otherwise_is_no_checkpoint_and_no_rollouts(saved):
    pending = Pending(saved / "rollouts", TEXT)
    pending.save(1, 7, [], {}, 0)
    for name in ("²", "٣", "007", "0", "foo", "-1"):
        (saved / name).mkdir()
        (saved / "rollouts" / f"{name}.npz").touch()
    assert checkpoint_steps(saved) == [1, 2]
    with Checkpoints(saved, TEXT, keep=2) as checkpoints:
        assert checkpoints.restore(make_state(0))[0] == 2
    before = content(saved / "rollouts")
    pending.drop(2)
    gone = saved / "rollouts" / "1.npz"
    assert content(saved / "rollouts") == {k: v for k, v in before.items() if k != gone}


def test_if_all_are_damaged_the_run_does_not_begin_anew(saved):
    flip(saved / "1")
    (saved / "2" / "digests.json").unlink()
    before = content(saved)
    with (
        Checkpoints(saved, TEXT, keep=2) as checkpoints,
        pytest.raises(ValueError, match=r"every checkpoint.*2: half-written.*1: .*not what was"),
    ):
        checkpoints.restore(make_state(0))
    assert content(saved) == before


def test_a_half_written_checkpoint_is_named_and_the_one_before_it_used(saved, caplog):
    (saved / "2").rename(saved / "2.orbax-checkpoint-tmp")
    with Checkpoints(saved, TEXT, keep=2) as checkpoints:
        assert "2.orbax-checkpoint-tmp is half-written" in caplog.text
        assert checkpoints.restore(make_state(0))[0] == 1


def test_another_config_is_named_and_nothing_overwritten(saved, tmp_path):
    output = claim(tmp_path / "run", "seed: 0\nkeep_best: 0\n")
    (output / "metrics.jsonl").write_text("{}\n")
    before = content(tmp_path)
    with pytest.raises(ValueError, match="seed was 0, is 1"):
        claim(output, "seed: 1\nkeep_best: 0\n")
    with (
        Checkpoints(saved, "seed: 1\n", keep=1) as checkpoints,
        pytest.raises(ValueError, match="seed was 0, is 1"),
    ):
        checkpoints.restore(make_state(0))
    assert content(tmp_path) == before
    assert claim(output, "seed: 0\nkeep_best: 1\ncheckpoints: elsewhere\n") == output


def begun(directory, text, final=False):
    """A run directory in which something has been done."""
    output = claim(directory, text)
    (output / "metrics.jsonl").write_text("{}\n")
    if final:
        (output / "final").mkdir()
    return output


def test_what_changes_no_number_may_change(tmp_path):
    old = "train: {micro_rows: 4, remat: dots}\nengine: {pages: 9, lanes: 2, max_depth: 1}\n"
    new = "train: {micro_rows: 1, remat: full}\nengine: {pages: 5, lanes: 1, max_depth: 1}\n"
    output = begun(tmp_path / "run", old)
    assert claim(output, new, SIZES) == output
    with pytest.raises(ValueError, match=r"engine\.max_depth was 1, is 2.*depends on that"):
        claim(output, new.replace("max_depth: 1", "max_depth: 2"), SIZES)
    with pytest.raises(ValueError, match=r"engine\.lanes was 1, is 2"):
        claim(output, old)  # of an evaluation: its figures tell of speed, too
    with Checkpoints(tmp_path / "c", old, keep=1) as checkpoints:
        checkpoints.save(1, make_state(1), {})
    with Checkpoints(tmp_path / "c", new, keep=1) as checkpoints:
        assert checkpoints.restore(make_state(0))[0] == 1
    pending = Pending(tmp_path / "p", old)
    pending.save(1, 7, [], {}, 0)
    assert Pending(tmp_path / "p", new).load(1, 7) is not None


@pytest.mark.parametrize("key", ["steps", "fit.steps", "fit.epochs"])
def test_a_run_can_be_made_longer_and_not_shorter_than_it_is(tmp_path, caplog, key):
    def text(number):
        *outer, name = key.split(".")
        return f"{outer[0]}: {{{name}: {number}}}\n" if outer else f"{name}: {number}\n"

    output = begun(tmp_path, text(10), final=True)
    before = content(output)
    with pytest.raises(ValueError, match=rf"{key} was 10, is 9.*{key}=10 or more"):
        claim(output, text(9))
    assert content(output) == before and (output / "final").exists()
    claim(output, text(20))
    assert not (output / "final").exists()
    assert (output / f"final-{key.split('.')[-1]}-10").exists()
    assert f"{key} was 10, is 20: the run goes on" in caplog.text
    claim(output, text(15))  # nothing was made of 20 yet


def test_inputs_may_move_where_their_content_is_known(tmp_path):
    old, new = "model: here\nseed: 1\n", "model: there\nseed: 1\n"
    output = begun(tmp_path / "run", old)
    with pytest.raises(ValueError, match=r"model was .*here.*, is .*there"):
        claim(output, new)  # a run of before contents were written down
    text = claim_inputs(output, {"model": "weights 1"})
    claim(output, new)
    assert claim_inputs(output, {"model": "weights 1"}) == text
    with pytest.raises(ValueError, match=r"inputs\.model was .*weights 1.*, is .*weights 2"):
        claim_inputs(output, {"model": "weights 2"})
    with Checkpoints(tmp_path / "c", old + text, keep=1) as checkpoints:
        checkpoints.save(1, make_state(1), {})
    with Checkpoints(tmp_path / "c", new + text, keep=1) as checkpoints:
        assert checkpoints.restore(make_state(0))[0] == 1
    with (
        Checkpoints(tmp_path / "c", new + text.replace("weights 1", "weights 2"), 1) as checkpoints,
        pytest.raises(ValueError, match=r"inputs\.model was"),
    ):
        checkpoints.restore(make_state(0))


def test_a_run_from_before_a_key_was_there_goes_on(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(claims, "LATER", ("later",))
    output = begun(tmp_path, "seed: 1\n")
    claim(output, "seed: 1\nlater: 5\n")
    assert "begun without later; it is 5 now" in caplog.text
    with pytest.raises(ValueError, match="later was 5, is missing; other was missing, is 2"):
        claim(output, "seed: 1\nother: 2\n")


def test_a_config_of_which_a_part_is_gone_is_no_config_to_go_on_with(tmp_path):
    text = "seed: 1\nsteps: 3\nsampling: {max_tokens: 8}\nsamples: 1\n"
    output = begun(tmp_path, text, final=True)
    for part, message in (
        (
            "seed: 1\nsteps: 3\n",
            r"samples was missing, is 1; sampling\.max_tokens was missing, is 8",
        ),
        ("", r"config\.yaml is no config of a run"),
        (text.replace("steps: 3\n", ""), r"config\.yaml: steps is None, needed is the number"),
        (text.replace("3", "ten"), r"config\.yaml: steps is 'ten', needed is the number"),
    ):
        (output / "config.yaml").write_text(part)
        before = content(output)
        with pytest.raises(ValueError, match=message):
            claim(output, text)
        assert content(output) == before
    (output / "config.yaml").unlink()
    with pytest.raises(ValueError, match=r"holds final, and no config\.yaml that says of which"):
        claim(output, text)
    assert not (output / "config.yaml").exists()


def test_the_log_of_a_scheduler_may_be_there_before_the_run(tmp_path):
    (tmp_path / "slurm-1.out").write_text("it begins")
    claim(tmp_path, "seed: 0\n")
    assert (tmp_path / "config.yaml").exists()


@pytest.mark.parametrize("name, text", [("problems.jsonl", ""), ("config.yaml", "theme: dark\n")])
def test_a_directory_that_no_run_has_made_is_left_as_it_was(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    for begin in (lambda: claim(tmp_path, "seed: 0\n"), lambda: demo.run(0, tmp_path)):
        with pytest.raises(ValueError, match=f"{name}.*set another output"):
            begin()
    assert content(tmp_path) == {tmp_path / name: text.encode()}


def test_a_directory_in_which_nothing_was_done_is_free(tmp_path):
    (tmp_path / ".config.yaml.incomplete-npr-jax").write_text("se")  # a crash has left it
    for text in ("seed: 0\n", "seed: 1\n"):
        assert claim(tmp_path, text) == tmp_path
        assert (tmp_path / "config.yaml").read_text() == text


@pytest.mark.parametrize("ending", ["", "\n...\n", "\n\n"])
def test_a_config_ends_as_an_editor_leaves_it(tmp_path, ending):
    output = begun(tmp_path, "model: here\nseed: 1\n")
    claim_inputs(output, {"model": "weights 1"})
    (output / "config.yaml").write_text("model: here\nseed: 1" + ending)
    claim(output, "model: there\nseed: 1\n")


@pytest.mark.parametrize(
    "text", ["", "inp", "[1]", "inputs:\n", "inputs: [1]\n", "inputs: {model: 3}\n"]
)
def test_inputs_that_are_none_are_named(tmp_path, text):
    output = begun(tmp_path, "model: here\n")
    (output / "inputs.yaml").write_text(text)
    for go_on in (
        lambda: claim(output, "model: here\n"),
        lambda: claim_inputs(output, {"model": "weights 1"}),
    ):
        with pytest.raises(ValueError, match=r"inputs\.yaml(: inputs is| is no config of a run)"):
            go_on()
    assert (output / "inputs.yaml").read_text() == text


def test_a_full_disk_is_named_and_the_last_good_checkpoint_stays(saved, tmp_path):
    with (
        no_room(100_000),
        pytest.raises(OSError, match=r"step 3 cannot be written to .*the last good one is that of"),
        Checkpoints(saved, TEXT, keep=1) as checkpoints,
    ):
        checkpoints.restore(make_state(0))
        checkpoints.save(3, make_state(3), {"problem": 30})
    with Checkpoints(saved, TEXT, keep=1) as checkpoints:
        step, state, _ = checkpoints.restore(make_state(0))
        assert step == 2 and same(state, make_state(2))
        checkpoints.save(3, make_state(3), {"problem": 30})  # there is room again
    assert steps_in(saved) == [3]

    with (
        no_room(110),
        pytest.raises(OSError, match=r"run.* cannot be written \(file too large\): make room"),
        RunLog("run", tmp_path / "run", 10, report=lambda metrics: None) as log,
    ):
        for step in range(1, 11):
            log.write({"step": step, "loss": 1.0})
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [1, 2, 3, 4]


def test_a_directory_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"file/run cannot be written .*set another output"):
        claim(tmp_path / "file" / "run", TEXT)
    with pytest.raises(OSError, match=r"file/c cannot be written .*set `checkpoints`"):
        Checkpoints(tmp_path / "file" / "c", TEXT, keep=1)
    with pytest.raises(ValueError, match=r"gs://bucket/run.*set `checkpoints`"):
        claim("gs://bucket/run", TEXT)
    if importlib.util.find_spec("gcsfs") is None:
        with pytest.raises(ValueError, match=r"gs://bucket/run: .*gcsfs"):
            Checkpoints("gs://bucket/run", TEXT, keep=1)


def test_the_configuration_of_a_run_is_never_half_written(tmp_path, monkeypatch):
    output = claim(tmp_path, TEXT)

    def crash(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", crash)
    with pytest.raises(KeyboardInterrupt):
        claims.claim(output, "seed: 1\n")
    assert (output / "config.yaml").read_text() == TEXT


@pytest.fixture(scope="module")
def model():
    return tiny()


def grouped(model):
    made = examples(model, 1, seed=5) * 2 + examples(model, 1, seed=6)
    return [[made[0], made[1]], [made[2]]]


def test_pending_rollouts_come_back_as_they_were(model, tmp_path, caplog):
    groups = grouped(model)
    metrics = {"reward": 1 / 3, "groups": 2}
    pending = Pending(tmp_path, TEXT)
    assert pending.load(4, 77) is None
    pending.save(4, 77, groups, metrics, 12)
    found, numbers, position = pending.load(4, 77)
    assert (numbers, position) == (metrics, 12)
    rows = zip(make_rows(groups, 256, 3), make_rows(found, 256, 3), strict=True)
    for row, other in rows:
        for name in row:
            assert row[name].dtype == other[name].dtype
            np.testing.assert_array_equal(row[name], other[name])
    # They belong to one step, one set of weights, one config.
    assert pending.load(5, 77) is None
    assert pending.load(4, 78) is None
    assert Pending(tmp_path, "seed: 1\n").load(4, 77) is None
    assert Pending(tmp_path, TEXT + "output: elsewhere\n").load(4, 77) is not None
    pending.save(5, 77, [], {"reward": 0.0}, 13)
    assert pending.load(5, 77) == ([], {"reward": 0.0}, 13)
    flip(tmp_path)
    assert pending.load(4, 77) is None
    assert "4.npz is damaged" in caplog.text
    pending.drop(4)
    assert [path.name for path in tmp_path.iterdir()] == ["5.npz"]


def test_other_weights_have_another_fingerprint():
    w = np.arange(12, dtype=np.float32).reshape(3, 4)
    variants = [w, w.T.reshape(3, 4), w + 1, np.nextafter(w, np.float32(99)), w[::-1]]
    prints = {fingerprint({"a": jnp.asarray(v), "b": jnp.zeros(2)}) for v in variants}
    assert len(prints) == len(variants)


def test_steps_that_are_not_finite_count_in_a_row():
    guard = NonfiniteGuard(limit=2)
    for metrics, count in (
        ({"nonfinite": 1}, 1),
        ({"skipped": 1}, 1),  # there was nothing to train on
        ({"nonfinite": 1, "off_policy_steps": 1}, 0),  # one of two updates was
        ({"nonfinite": 2, "off_policy_steps": 1}, 1),
    ):
        counted = guard.count(metrics)
        assert counted["nonfinite_in_a_row"] == count
        whole = metrics.get("nonfinite", 0) > metrics.get("off_policy_steps", 0)
        assert ("not finite" in counted.get("skipped_because", "")) == whole
        guard.check(7)
    assert guard.count({"accepted_rate": 1.0}) == {}  # no step of training
    guard.count({"nonfinite": 1})
    with pytest.raises(FloatingPointError, match=r"step 8: .* 2 steps in a row"):
        guard.check(8)


def fit_config(**fields):
    train = TrainConfig(OPTIMIZER, row_len=256, micro_rows=2, **fields)
    return FitConfig(train, batch=2, steps=5)


@pytest.mark.slow
def test_a_run_of_steps_that_are_not_finite_stops_with_its_checkpoint(model, tmp_path):
    params = model.params | {"final_norm": jnp.full_like(model.params["final_norm"], 3e38)}
    broken = type(model)(model.config, params, model.tokenizer, model.tags)
    config, made = fit_config(checkpoint_every=2), examples(model, 4)
    for _ in range(2):  # the second run counts on from the checkpoint of step 2
        with pytest.raises(FloatingPointError, match="step 3"):
            fit(broken, made, config, tmp_path, report=lambda metrics: None)
        lines = read_metrics(tmp_path)
        assert [line["nonfinite_in_a_row"] for line in lines] == [1, 2, 3]
        assert steps_in(tmp_path / "checkpoints") == [2]


def test_what_is_not_finite_is_neither_saved_nor_published(saved, model, tmp_path):
    state = make_state(3)
    bad = state.replace(params={"w": state.params["w"].at[5, 7].set(np.inf)})
    with Checkpoints(saved, TEXT, keep=1) as checkpoints:
        with pytest.raises(FloatingPointError, match=r"after step 3 is not saved: params\.w has"):
            checkpoints.save(3, bad, {})
        assert checkpoints.restore(state)[0] == 2
    layers = model.params["layers"]
    broken = layers | {"wq": layers["wq"].at[0, 0, 0].set(np.nan)}
    broken = dataclasses.replace(model, params=model.params | {"layers": broken})
    with pytest.raises(FloatingPointError, match=r"not written to .*final: layers\.wq has"):
        publish_model(broken, tmp_path / "final")
    assert not (tmp_path / "final").exists()


def test_a_checkpoint_is_exported_as_a_model(model, tmp_path, monkeypatch):
    """Of a run of one loop, and of Beta, whose checkpoints are those of `fit`; paths are relative
    as a user writes them."""
    monkeypatch.chdir(tmp_path)
    started = load("tiny", seed=0, tags=True)
    for name, text, inside in (("zero", "", "."), ("beta", "fit: {}\n", "fit")):
        run = claim(Path(name), f"model: tiny\nseed: 0\n{text}")
        states = {}
        with Checkpoints(run / inside / "checkpoints", TEXT, keep=3) as checkpoints:
            for step in (2, 4):
                params = jax.tree.map(functools.partial(jnp.add, step), started.params)
                state = new_state(params, OPTIMIZER)
                states[step] = jax.tree.map(np.array, state.params)
                checkpoints.save(step, state, {})
        before = content(run)
        assert export(run, Path(f"{name}-last")) == 4
        assert export(run, tmp_path / f"{name}-2", 2) == 2
        assert content(run) == before
        for step, output in ((4, "last"), (2, "2")):
            found = load(tmp_path / f"{name}-{output}")
            used = slice(len(found.tokenizer))  # the rest of the table is padding
            assert np.array_equal(found.params["embed"][used], states[step]["embed"][used])
            assert same(found.params["layers"], states[step]["layers"])
            assert found.tags == started.tags
    with pytest.raises(ValueError, match=r"no checkpoint of step 3, there are 2, 4"):
        export(run, tmp_path / "x", 3)
    with pytest.raises(ValueError, match=r"beta-2 is there already"):
        export(run, tmp_path / "beta-2", 2)
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(ValueError, match=r"link is there already"):
        export(run, tmp_path / "link", 2)
    with pytest.raises(ValueError, match=r"no config\.yaml"):
        export(tmp_path, tmp_path / "x")
    with pytest.raises(ValueError, match=r"has no checkpoint: there is none in"):
        export(claim(tmp_path / "empty", "model: tiny\nseed: 0\n"), tmp_path / "x")
    flip(run / "fit" / "checkpoints" / "2")
    with pytest.raises(ValueError, match=r"2 is damaged .*take another step"):
        export(run, tmp_path / "x", 2)
    (run / "config.yaml").write_text("model: no/such\nseed: 0\nfit: {}\n")
    with pytest.raises(FileNotFoundError, match="--model DIR"):
        export(run, tmp_path / "x")
    assert export(run, tmp_path / "x", start="tiny") == 4


@pytest.fixture
def unfinished(tmp_path):
    """A run that has no `final` yet, of a model with files that say more than we do."""
    source, run = tmp_path / "model", tmp_path / "run"
    save(load("tiny", tags=True), source)
    for name, more in (
        ("config.json", {"bos_token_id": 1, "pad_token_id": 0}),
        ("generation_config.json", {"temperature": 0.6, "top_k": 20}),
    ):
        change(source / name, more)
    started = load(source, tags=True)
    claim(run, f"model: {source}\nseed: 0\n")
    claim_inputs(run, {"model": model_content(str(source), started.params)})
    with Checkpoints(run / "checkpoints", TEXT, keep=1) as checkpoints:
        checkpoints.save(2, new_state(started.params, OPTIMIZER), {})
    return run


def change(path, values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_an_export_keeps_what_its_source_says_as_final_does(unfinished, tmp_path):
    export(unfinished, tmp_path / "out")
    publish_model(load(tmp_path / "model", tags=True), unfinished / "final")
    export(unfinished, tmp_path / "out-2")
    assert content(tmp_path / "out").keys() > {tmp_path / "out" / "config.json"}
    for name, data in content(unfinished / "final").items():
        for output in ("out", "out-2"):
            assert (tmp_path / output / name.name).read_bytes() == data, name


@pytest.mark.parametrize("output", ["final", "fit/x", "../run/x"])
def test_an_export_into_its_run_is_refused(unfinished, output):
    with pytest.raises(ValueError, match=r"(x|final) is in .*run, .*outside of it"):
        export(unfinished, unfinished / output)
    assert not (unfinished / output).exists()


def test_the_model_of_an_export_is_the_one_that_the_run_began_with(unfinished, tmp_path):
    same, other = tmp_path / "same", tmp_path / "other"
    shutil.copytree(tmp_path / "model", same)
    save(load("tiny", seed=1, tags=True), other)
    with pytest.raises(ValueError, match=r"other is not the model that .*: its content is weights"):
        export(unfinished, tmp_path / "x", start=str(other))
    assert export(unfinished, tmp_path / "out", start=str(same)) == 2
    publish_model(load(same, tags=True), unfinished / "final")
    assert export(unfinished, tmp_path / "out-2", start=str(same)) == 2
    tokenizer = json.loads((same / "tokenizer.json").read_text())["model"]
    vocab = tokenizer["vocab"]
    vocab["0"], vocab["1"] = vocab["1"], vocab["0"]
    for name, values, message in (
        ("config.json", {"rope_theta": 5e5, "rope_parameters": None}, "rope_theta is 500000.0, ne"),
        ("tokenizer.json", {"model": tokenizer | {"vocab": vocab}}, "tokenizer is another, needed"),
    ):
        shutil.copytree(tmp_path / "model", tmp_path / name)
        change(tmp_path / name / name, values)
        with pytest.raises(ValueError, match=f"is not the model that .*: its {message}"):
            export(unfinished, tmp_path / "x", start=str(tmp_path / name))
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "text, message",
    [
        ("model: tiny\n", "seed is None, needed is an integer"),
        ("model: null\nseed: 0\n", "model is None, needed is a text"),
        ("model: tiny\nseed: 0\nfit: null\n", "fit is None, needed are keys"),
        ("model: tiny\nseed: 0\ncheckpoints: 5\n", "checkpoints is 5, needed is a text or null"),
        ("model: tiny\nseed: 0\nfit: {checkpoints: []}\n", r"checkpoints is \[\], needed is a"),
    ],
)
def test_a_config_that_cannot_be_exported_is_named(tmp_path, text, message):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match=rf"config\.yaml is no config of zero, .*: {message}"):
        export(tmp_path, tmp_path.with_name("x"))


@pytest.mark.slow
def test_sigterm_saves_and_the_same_call_goes_on(model, tmp_path):
    config, made = fit_config(), examples(model, 8)
    whole = fit(model, made, config, tmp_path / "whole", report=lambda metrics: None)

    def end_at_two(metrics):
        if metrics["step"] == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(sigterm.Preempted) as caught:
        fit(model, made, config, tmp_path / "cut", report=end_at_two)
    assert caught.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is before
    assert steps_in(tmp_path / "cut" / "checkpoints") == [2]
    again = fit(model, made, config, tmp_path / "cut", report=lambda metrics: None)
    assert same(again.params, whole.params)


def test_sigterm_waits_but_for_what_may_end_anywhere():
    reached = []
    with pytest.raises(sigterm.Preempted), sigterm.watched(), sigterm.watched():
        os.kill(os.getpid(), signal.SIGTERM)
        reached.append(sigterm.wanted())
        with sigterm.interruptible():
            reached.append("the part that may end anywhere")
    assert reached == [True]
    with pytest.raises(sigterm.Preempted), sigterm.watched(), sigterm.interruptible():
        os.kill(os.getpid(), signal.SIGTERM)
        reached.append("after the signal")
    assert reached == [True]
    # A signal that nothing looked at ends the stage once it is done.
    with pytest.raises(sigterm.Preempted), sigterm.watched():
        os.kill(os.getpid(), signal.SIGTERM)
    assert not sigterm.wanted()
    with sigterm.watched():
        pass


@pytest.mark.parametrize(
    "number, name", [(signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "Ctrl-C")], ids=str
)
def test_a_second_signal_ends_the_process_at_once(number, name):
    program = f"""if True:
        import os
        from npr_jax.runs import sigterm
        with sigterm.watched():
            os.kill(os.getpid(), {number:d})
            print("one", flush=True)
            os.kill(os.getpid(), {number:d})
            print("two", flush=True)
        """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (-number, "one\n")
    assert f"{name}: this run saves what it has" in done.stderr


def test_ctrl_c_is_as_sigterm_and_stays_ignored_where_it_is():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(sigterm.Preempted) as caught, sigterm.watched(), sigterm.interruptible():
        os.kill(os.getpid(), signal.SIGINT)
    assert caught.value.code == 130 and signal.getsignal(signal.SIGINT) is before
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell does for jobs in the background
    try:
        with sigterm.watched(), sigterm.interruptible():
            os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True)
def warnings_are_seen(caplog):
    caplog.set_level(logging.WARNING)
