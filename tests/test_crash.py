"""A run that is killed at any moment, again and again, ends as one that nobody has touched.

Real processes, killed by SIGKILL: at random moments, and while a checkpoint is being written.
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
from conftest import examples, spread

from npr_jax.runs.metrics import is_measured, read_metrics

pytestmark = pytest.mark.slow

KILLS = examples(2)  # of each stage
STEPS = 6
RL = {
    "steps": STEPS,
    "prompts": 4,
    "samples": 4,
    "max_prompt_tokens": 16,
    "max_tokens": 64,
    "train.row_len": 256,
    "train.checkpoint_every": 2,
    "train.keep_best": 1,
}
SETTINGS = {
    "zero": {"model": "seed", "minibatches": 2, **RL},
    "papo": {"model": "tree", "malformed": "penalty", **RL},
    "beta": {
        "model": "seed",
        "sampler_model": "seed",
        "sample.num_problems": 16,
        "sample.batch": 4,
        "sample.tries": 6,
        "sample.max_tokens": 64,
        "fit.steps": STEPS,
        "fit.batch": 4,
        "fit.train.row_len": 256,
        "fit.train.checkpoint_every": 2,
    },
}
METRICS = {"zero": ["."], "papo": ["."], "beta": ["sampling", "fit"]}


class Run:
    """A stage as a process of its own, through the command line."""

    def __init__(self, home, stage, output):
        values = {"seed": 3, "engine.lanes": 16, "engine.pages": 256, **SETTINGS[stage]}
        for key in ("model", "sampler_model"):
            if key in values:
                values[key] = str(home / values[key])
        values |= {"problems": str(home / "problems.jsonl"), "output": str(output)}
        changes = [f"--set={key}={json.dumps(value)}" for key, value in values.items()]
        self.output = output
        self._command = [sys.executable, "-m", "npr_jax", stage, f"tiny_{stage}", *changes]

    def start(self):
        return subprocess.Popen(self._command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def finish(self):
        process = self.start()
        text, _ = process.communicate(timeout=900)
        assert process.returncode == 0, text.decode()

    def files(self):
        """Names and sizes: what changes as the run goes on, and while it writes."""
        found = set()
        for directory, _, names in os.walk(self.output):
            for name in names:
                path = os.path.join(directory, name)
                with contextlib.suppress(FileNotFoundError):
                    found.add((path, os.stat(path).st_size))
        return found

    def saving(self):
        return any(".orbax-checkpoint-tmp" in path for path, *_ in os.walk(self.output))

    def result(self, stage):
        """Metrics without times, and the trained parameters."""
        lines = [
            {k: v for k, v in line.items() if not is_measured(k)}
            for name in METRICS[stage]
            for line in read_metrics(self.output / name)
        ]
        return lines, (self.output / "final" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def undisturbed(home, tmp_path_factory):
    """stage -> the result of a run that nobody touches; it also compiles for the others."""
    results = {}

    def make(stage):
        if stage not in results:
            run = Run(home, stage, tmp_path_factory.mktemp("whole") / stage)
            run.finish()
            results[stage] = run.result(stage)
        return results[stage]

    return make


def kill(run, rng, in_a_save):
    """Starts the run, kills it, and returns its exit code: 0 if it came to its end before."""
    process, seen, changes = run.start(), run.files(), rng.randrange(12)
    try:
        while process.poll() is None:
            if in_a_save:
                now = run.saving()
            else:
                files = run.files()
                changes -= files != seen
                seen, now = files, changes < 0
            if now:
                time.sleep(rng.uniform(0, 0.02 if in_a_save else 0.3))
                break
            time.sleep(0.005)
        process.kill()
        text, _ = process.communicate(timeout=900)
        assert process.returncode in (0, -signal.SIGKILL), text.decode()
        return process.returncode
    finally:
        process.kill()


@pytest.mark.parametrize("stage", spread(["beta", "zero", "papo"], test=1))
def test_a_run_that_is_killed_again_and_again_ends_as_if_nothing_had_happened(
    home, undisturbed, tmp_path, stage, report
):
    lines, weights = undisturbed(stage)
    rng, run, killed, in_saves = random.Random(stage), Run(home, stage, tmp_path / stage), 0, 0
    begun = time.monotonic()
    for number in range(KILLS):
        in_a_save = number % 3 == 1
        if kill(run, rng, in_a_save):
            killed += 1
            in_saves += run.saving()
        else:  # it was done: the next kills hit another run
            assert run.result(stage) == (lines, weights)
            run = Run(home, stage, tmp_path / f"{stage}{number}")
    run.finish()
    found = run.result(stage)
    assert found[0] == lines
    assert found[1] == weights
    report(f"{killed} kills, {in_saves} in a save, {time.monotonic() - begun:.0f} s")
    assert killed >= KILLS - 1


def test_sigterm_ends_a_run_in_order_and_the_same_command_goes_on(
    home, undisturbed, tmp_path, report
):
    run = Run(home, "papo", tmp_path / "papo")
    metrics = run.output / "metrics.jsonl"

    def steps():
        return metrics.read_bytes().count(b"\n") if metrics.exists() else 0

    for _ in range(2):
        begun, done, process = time.monotonic(), steps(), run.start()
        while steps() <= done:
            assert process.poll() is None, process.communicate()[0].decode()
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        text, _ = process.communicate(timeout=900)
        assert process.returncode == 143, text.decode()
        assert not run.saving()
        report(f"{time.monotonic() - begun:.1f} s from start to end")
    run.finish()
    assert run.result("papo") == undisturbed("papo")
