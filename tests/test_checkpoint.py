"""Checkpoints: what was saved comes back, on any mesh; what is damaged is named and passed over;
what cannot be written leaves what was there."""

import contextlib
import dataclasses
import importlib.util
import logging
import os
import resource
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from checkpoint_checks import (
    OPTIMIZER,
    TEXT,
    content,
    data_file,
    flip,
    make_state,
    same,
    steps_in,
)
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from train_toy import examples, tiny

from npr_jax.model.pretrained import publish_model
from npr_jax.runs.checkpoint import Checkpoints, checkpoint_steps
from npr_jax.runs.directory import claim
from npr_jax.runs.guards import NonfiniteGuard
from npr_jax.runs.log import RunLog
from npr_jax.runs.metrics import read_metrics
from npr_jax.train.fit import FitConfig, fit
from npr_jax.train.packing import make_rows
from npr_jax.train.rollout_cache import Pending, fingerprint
from npr_jax.train.step import TrainConfig


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


def test_what_a_failed_save_still_writes_does_not_stop_the_next(saved):
    """The array store's threads go on for a while after its error has been told."""
    half = saved / f"3{ocp.utils.TMP_DIR_SUFFIX}" / "state" / "d"
    half.mkdir(parents=True)
    end = time.monotonic() + 0.5

    def straggle():
        number = 0
        while time.monotonic() < end:
            half.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(OSError):
                (half / str(number)).write_bytes(b"late")
            number += 1

    thread = threading.Thread(target=straggle)
    thread.start()
    with Checkpoints(saved, TEXT, keep=1) as checkpoints:
        checkpoints.restore(make_state(0))
        checkpoints.save(3, make_state(3), {"problem": 30})
    thread.join()
    assert steps_in(saved) == [3]
    assert not half.exists()


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


def test_pending_rollouts_with_any_bit_flipped_are_found_or_sampled_again(model, tmp_path):
    """The archive's own checksums say nothing of its directory, in which all bytes are tried."""
    pending = Pending(tmp_path, TEXT)
    pending.save(4, 77, grouped(model), {"reward": 0.5}, 12)
    path = tmp_path / "4.npz"
    known = path.read_bytes()
    directory = known.index(b"PK\x01\x02")
    for place in [*range(0, directory, 997), *range(directory, len(known))]:
        path.write_bytes(known[:place] + bytes([known[place] ^ 8]) + known[place + 1 :])
        found = pending.load(4, 77)
        assert found is None or found[1:] == ({"reward": 0.5}, 12)


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


@pytest.fixture(autouse=True)
def warnings_are_seen(caplog):
    caplog.set_level(logging.WARNING)
