"""A stage in two processes: what one device gives; ended together, gone on with together."""

import json
import re
import signal
import time

import numpy as np
import pytest
import two_processes
from checkpoint_checks import TEXT, make_state, same
from train_toy import write_problems

from npr_jax.base.config import load_config
from npr_jax.model.pretrained import load
from npr_jax.runs.checkpoint import Checkpoints
from npr_jax.runs.digest import find_fault
from npr_jax.runs.metrics import is_measured, read_metrics
from npr_jax.train import zero

pytestmark = pytest.mark.slow

# What the number of shards decides.
OF_SHARDS = ("slot_use", "slots", "row_tokens", "micro_batches", "train_flops")


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """Overrides of tiny_zero: three steps of two minibatches; and where compiled programs go."""
    home = tmp_path_factory.mktemp("two")
    write_problems(home / "problems.jsonl", 32)
    sizes = (
        "steps=3 prompts=3 samples=4 minibatches=2 max_refills=1 max_prompt_tokens=16 "
        "max_tokens=20 train.row_len=64 train.micro_rows=1 train.checkpoint_every=2 engine.lanes=4 "
        "engine.pages=64 engine.steps=8 seed=1"
    )
    changes = ["model=tiny", f"problems={json.dumps(str(home / 'problems.jsonl'))}", *sizes.split()]
    return changes, {"JAX_COMPILATION_CACHE_DIR": str(home / "compiled")}


def command(settings, output, *more):
    arguments = [f"--set={change}" for change in (*settings[0], "mesh.fsdp=-1", *more)]
    stage = ["-m", "npr_jax", "zero", "tiny_zero", "--distributed", "--output", str(output)]
    return stage + arguments


def lines(directory):
    return [
        {k: v for k, v in line.items() if not (is_measured(k) or k in OF_SHARDS)}
        for line in read_metrics(directory)
    ]


@pytest.fixture(scope="module")
def undisturbed(settings, tmp_path_factory):
    output = tmp_path_factory.mktemp("whole") / "run"
    outs = two_processes.run(*command(settings, output), **settings[1])
    assert "final model" in outs[0] and "final model" not in outs[1]
    return output


def test_two_processes_give_what_one_device_gives(settings, undisturbed, tmp_path):
    final = zero.run(
        load_config(zero.ZeroConfig, "tiny_zero", [*settings[0], f"output={tmp_path / 'one'}"])
    )
    ours, theirs = lines(undisturbed), lines(tmp_path / "one")
    assert any(line["off_policy_steps"] == 1 for line in theirs)  # both minibatches were trained
    assert len(ours) == len(theirs) == 3
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        np.testing.assert_allclose([a[k] for k in a], [b[k] for k in a], rtol=1e-3, atol=1e-4)
    for name in ("embed", "final_norm"):
        np.testing.assert_allclose(
            load(undisturbed / "final").params[name], load(final).params[name], atol=1e-5
        )


def test_answers_are_carried_over_by_two_processes_as_by_one(settings, tmp_path):
    more = ["carry=6", "max_refills=0", "minibatches=1", "steps=5"]
    two_processes.run(*command(settings, tmp_path / "two", *more), **settings[1])
    changes = [*settings[0], *more, f"output={tmp_path / 'one'}"]
    zero.run(load_config(zero.ZeroConfig, "tiny_zero", changes))
    ours, theirs = lines(tmp_path / "two"), lines(tmp_path / "one")
    assert [line["carried"] for line in ours] == [line["carried"] for line in theirs]
    assert sum(line["carried"] > 0 for line in ours) > 2 and ours[3]["carried_batches"] > 1
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys() and a.get("skipped_because") == b.get("skipped_because")
        numbers = [key for key in a if key != "skipped_because"]
        np.testing.assert_allclose(
            [a[k] for k in numbers], [b[k] for k in numbers], rtol=1e-3, atol=1e-4
        )


@pytest.mark.nightly
def test_two_processes_train_adapters_as_one_device_does(settings, tmp_path):
    lora = ["train.lora.rank=4", "train.optimizer.learning_rate=0.003", "kl=0.1"]
    two_processes.run(*command(settings, tmp_path / "two", *lora), **settings[1])
    one = [*settings[0], *lora, f"output={tmp_path / 'one'}"]
    zero.run(load_config(zero.ZeroConfig, "tiny_zero", one))
    for a, b in zip(lines(tmp_path / "two"), lines(tmp_path / "one"), strict=True):
        assert a.keys() == b.keys()
        np.testing.assert_allclose([a[k] for k in a], [b[k] for k in b], rtol=1e-3, atol=1e-4)
    for name in ("final", "final/adapter"):
        two, one = (load(tmp_path / run / name).params["layers"] for run in ("two", "one"))
        assert two.keys() == one.keys() and ("wq_a" in two) == (name == "final/adapter")
        for key, x in two.items():
            np.testing.assert_allclose(x, one[key], atol=1e-4)


@pytest.mark.nightly
def test_sigterm_to_one_ends_both_and_the_same_command_goes_on(settings, undisturbed, tmp_path):
    output = tmp_path / "run"
    processes = two_processes.start(*command(settings, output), **settings[1])
    wait_for_step(output, 1, processes)
    processes[1].send_signal(signal.SIGTERM)
    errors = [process.communicate(timeout=600)[1] for process in processes]
    assert [process.returncode for process in processes] == [143, 143], [e[-2000:] for e in errors]
    assert len(read_metrics(output)) < 3 and not (output / "final").exists()
    two_processes.run(*command(settings, output), **settings[1])
    assert lines(output) == lines(undisturbed)
    whole = (undisturbed / "final" / "model.safetensors").read_bytes()
    assert (output / "final" / "model.safetensors").read_bytes() == whole


def test_a_process_that_dies_ends_the_other_with_a_message(settings, tmp_path):
    output = tmp_path / "run"
    processes = two_processes.start(*command(settings, output, "steps=500"), **settings[1])
    wait_for_step(output, 1, processes)
    processes[1].kill()
    error = processes[0].communicate(timeout=600)[1]
    processes[1].communicate()
    assert processes[0].returncode not in (0, None)
    assert re.search("another process has ended first|JAX distributed service|heartbeat", error)


def wait_for_step(output, step, processes):
    path = output / "metrics.jsonl"
    for _ in range(3000):
        if path.exists() and path.read_text().count("\n") >= step:
            return
        assert all(process.poll() is None for process in processes), [
            process.communicate()[1][-2000:] for process in processes if process.poll() is not None
        ]
        time.sleep(0.1)
    raise AssertionError(f"{output} has not come to step {step}")


def test_each_process_takes_the_digests_of_what_it_has_written(tmp_path):
    outs = two_processes.run("tests/two_checkpoints.py", str(tmp_path))
    first, second = (json.loads(out.splitlines()[-1]) for out in outs)
    for when in ("saved", "restored"):
        for told, process, other in ((first, 0, 1), (second, 1, 0)):
            mine = [path for path in told[when] if f"/ocdbt.process_{process}/" in path]
            assert mine and not any(f"/ocdbt.process_{other}/" in path for path in told[when])
        assert all("/ocdbt.process_1/" in path for path in second[when])
    # What the first reads for all is small.
    (whole,) = [path for path in tmp_path.iterdir() if path.name == "1"]
    sizes = {p: p.stat().st_size for p in whole.rglob("*") if p.is_file()}
    own = [size for path, size in sizes.items() if "ocdbt.process_" in path.as_posix()]
    assert sum(own) > 0.9 * sum(sizes.values()), sizes
    names = {path.name for path in whole.iterdir()}
    assert "digests.json" in names and not any(name.startswith("digests-") for name in names)
    # One process reads it too, and finds the bit that is wrong.
    with Checkpoints(tmp_path, TEXT, keep=2) as checkpoints:
        step, state, position = checkpoints.restore(make_state(0))
    assert (step, position) == (1, {"problem": 7}) and same(state, make_state(1))
    (damaged,) = tmp_path.glob("damaged-2*")
    assert re.search(r"ocdbt\.process_1/.* is not what was written", find_fault(damaged))
