"""Some processes train while others roll out: the same numbers as by turns, ended in order."""

import itertools
import json
import os
import re
import signal
import time

import jax
import numpy as np
import pytest
import two_processes
from test_two_processes import lines, wait_for_step
from train_toy import write_problems

from npr_jax.base.mesh import MeshConfig, split_rollout
from npr_jax.runs import sigterm
from npr_jax.runs.metrics import read_metrics
from npr_jax.train import link

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """Overrides of tiny_zero: five steps, rollouts one ahead; and where compiled programs go."""
    home = tmp_path_factory.mktemp("sides")
    write_problems(home / "problems.jsonl", 32)
    sizes = (
        "steps=5 prompts=3 samples=4 minibatches=2 max_refills=1 max_prompt_tokens=16 "
        "max_tokens=20 train.row_len=64 train.row_lengths=1 train.micro_rows=1 staleness=1 "
        "train.checkpoint_every=2 engine.lanes=4 engine.pages=64 engine.steps=8 seed=1"
    )
    changes = ["model=tiny", f"problems={json.dumps(str(home / 'problems.jsonl'))}", *sizes.split()]
    one_device = "--xla_force_host_platform_device_count=1"
    return changes, {
        "JAX_COMPILATION_CACHE_DIR": str(home / "compiled"),
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} {one_device}",
    }


def command(settings, output, *more):
    arguments = [f"--set={change}" for change in (*settings[0], "mesh.rollout=1", *more)]
    stage = ["-m", "npr_jax", "zero", "tiny_zero", "--distributed", "--output", str(output)]
    return [*stage, *arguments]


@pytest.fixture(scope="module")
def by_turns(settings, tmp_path_factory):
    """The run in one process, which does both by turns."""
    output = tmp_path_factory.mktemp("turns") / "run"
    turns = [arg for arg in command(settings, output, "mesh.rollout=0") if arg != "--distributed"]
    two_processes.run_one(*turns, **settings[1])
    assert any(line.get("loss_tokens") for line in lines(output))
    return output


def test_both_sides_give_what_one_process_gives_by_turns(settings, by_turns, tmp_path):
    outs = two_processes.run(*command(settings, tmp_path / "run"), **settings[1])
    assert "final model" in outs[0] and "final model" not in outs[1]
    ours, theirs = lines(tmp_path / "run"), lines(by_turns)
    assert ours == theirs and [line["rollout_age"] for line in ours] == [0, 1, 1, 1, 1]
    whole = (by_turns / "final" / "model.safetensors").read_bytes()
    assert (tmp_path / "run" / "final" / "model.safetensors").read_bytes() == whole
    assert any("seconds/rollout" in line for line in read_metrics(by_turns))
    assert not any("seconds/rollout" in line for line in read_metrics(tmp_path / "run"))


@pytest.mark.nightly
def test_both_sides_may_have_several_devices(settings, by_turns, tmp_path):
    environment = settings[1] | {"XLA_FLAGS": os.environ["XLA_FLAGS"] + two_processes.FOUR}
    arguments = command(settings, tmp_path / "run", "mesh.rollout=4", "mesh.fsdp=2", "mesh.data=2")
    two_processes.run(*arguments, **environment)
    ours, theirs = lines(tmp_path / "run"), lines(by_turns)
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        np.testing.assert_allclose([a[k] for k in a], [b[k] for k in a], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("side", [pytest.param(0, marks=pytest.mark.nightly), 1])
def test_sigterm_to_either_side_ends_both_and_the_run_goes_on(settings, by_turns, tmp_path, side):
    output = tmp_path / "run"
    processes = two_processes.start(*command(settings, output), **settings[1])
    wait_for_step(output, 1, processes)
    processes[side].send_signal(signal.SIGTERM)
    errors = [process.communicate(timeout=600)[1] for process in processes]
    assert [process.returncode for process in processes] == [143, 143], [e[-2000:] for e in errors]
    assert not (output / "final").exists()
    two_processes.run(*command(settings, output), **settings[1])
    assert lines(output) == lines(by_turns)


@pytest.mark.nightly
def test_answers_are_carried_over_on_the_side_that_rolls_out(settings, tmp_path):
    more = ["carry=6", "max_refills=0", "minibatches=1"]
    turns = command(settings, tmp_path / "turns", "mesh.rollout=0", *more)
    turns.remove("--distributed")
    two_processes.run_one(*turns, **settings[1])
    two_processes.run(*command(settings, tmp_path / "sides", *more), **settings[1])
    assert lines(tmp_path / "sides") == lines(tmp_path / "turns")
    assert sum(line["carried"] > 0 for line in lines(tmp_path / "sides")) > 2


@pytest.mark.nightly
@pytest.mark.parametrize("side", [0, 1])
def test_either_side_may_be_killed_and_the_run_goes_on(settings, by_turns, tmp_path, side):
    output = tmp_path / "run"
    processes = two_processes.start(*command(settings, output), **settings[1])
    wait_for_step(output, 2, processes)
    processes[side].kill()
    errors = [process.communicate(timeout=600)[1] for process in processes]
    assert processes[1 - side].returncode not in (0, None)
    said = "leader task" if side == 0 else "side that rolls out|process 1, which rolls out"
    assert re.search(said, errors[1 - side]), errors[1 - side][-2000:]
    two_processes.run(*command(settings, output), **settings[1])
    assert lines(output) == lines(by_turns)


def test_a_side_that_fails_is_named_by_both(settings, tmp_path):
    output = tmp_path / "run"
    other = tmp_path / "others.jsonl"
    write_problems(other, 8, seed=5)
    arguments = command(settings, output)
    processes = two_processes.start(
        *arguments, each=[[], [f"--set=problems={json.dumps(str(other))}"]], **settings[1]
    )
    errors = [process.communicate(timeout=600)[1] for process in processes]
    assert all(process.returncode in (1, 2) for process in processes), errors
    assert "another file here than where the run trains" in errors[1]
    assert re.search(
        "process 1, which rolls out, has failed: ValueError: .*another file", errors[0]
    )


@pytest.fixture
def values(monkeypatch):
    """The key-value store of the coordinator, in which links of this process put what they say."""
    values = {}

    class Client:
        def key_value_set(self, key, value, allow_overwrite=False):
            if values.setdefault(key, value) != value and not allow_overwrite:
                raise jax.errors.JaxRuntimeError("ALREADY_EXISTS")
            values[key] = value

        def key_value_try_get(self, key):
            return self.blocking_key_value_get(key, 0)

        def key_value_dir_get(self, prefix):
            return [(key, value) for key, value in values.items() if key.startswith(prefix)]

        def blocking_key_value_get(self, key, milliseconds):
            time.sleep(milliseconds / 1000)
            if key not in values:
                raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED")
            return values[key]

    monkeypatch.setattr(link, "_TICK", 10)
    monkeypatch.setattr(link, "_numbers", itertools.repeat(0))
    monkeypatch.setattr(link, "split_rollout", lambda *_: (jax.devices()[:1], []))
    monkeypatch.setattr(link.multihost, "get_jax_distributed_client", Client)
    monkeypatch.setattr(link.sigterm, "request", lambda: None)
    return values


@pytest.mark.parametrize("first", ["ready", "leaving"])
def test_both_sides_meet_or_neither(values, first):
    """One is ready for a meeting and hears of a signal, before or after the other is there too."""
    with link.Link(MeshConfig()) as train, link.Link(MeshConfig()) as rollout:
        rollout.side, rollout.other = "rollout", "train"
        rollout.ready("start")
        if first == "ready":
            train.meet("start")
        rollout.end("signal")
        while not rollout.has_ended():
            time.sleep(0.01)
        if first == "ready":
            rollout.wait_for("start")  # where the other one waits for it
        for side in (rollout, train):
            with pytest.raises(sigterm.Preempted):
                side.meet("start" if first == "leaving" else "batch-1")


def test_a_process_gives_signs_of_life_until_it_ends(values):
    """Also while it saves, after both sides have heard of a signal: the other one waits for it."""
    with link.Link(MeshConfig()) as here:
        here.end("signal")
        while not here.has_ended():
            time.sleep(0.01)
        (beat,) = [key for key in values if "beat" in key]
        begun, until = values[beat], time.monotonic() + 60
        while int(values[beat]) < int(begun) + 5:
            assert time.monotonic() < until
            time.sleep(0.01)


def test_weights_arrive_bit_by_bit(tmp_path):
    two_processes.run("tests/two_handovers.py", str(tmp_path / "told"))
    pairs = [line.split() for line in (tmp_path / "told").read_text().splitlines()]
    assert len(pairs) == 3 and all(wanted == arrived for wanted, arrived in pairs)
    assert len({wanted for wanted, _ in pairs}) == 3


def test_a_process_trains_or_rolls_out():
    class Device:
        def __init__(self, id):
            self.id, self.process_index = id, id // 4

    devices = [Device(i) for i in range(16)]
    train, rollout = split_rollout(MeshConfig(rollout=8), devices[::-1])
    assert [d.id for d in train] == [*range(8)] and [d.id for d in rollout] == [*range(8, 16)]
    for number in (2, 6, 16):
        with pytest.raises(ValueError, match=rf"mesh\.rollout is {number}.*multiple of 4 below 16"):
            split_rollout(MeshConfig(rollout=number), devices)
    with pytest.raises(ValueError, match="there are 1 processes"):
        split_rollout(MeshConfig(rollout=1), jax.devices())
