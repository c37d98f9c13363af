"""A resumed run's metrics read as if it had never stopped; progress works without a terminal."""

import io
import json
import sys

import numpy as np
import pytest
from rich.console import Console
from tensorboardX.proto.event_pb2 import Event

from npr_jax.base.progress import Progress
from npr_jax.runs.log import RunLog
from npr_jax.runs.metrics import MetricsWriter, read_metrics


def write_steps(writer, steps, tag=""):
    for step in steps:
        writer.write({"step": step, "loss": step / 2, "note": f"{tag}{step}"})


def test_each_line_is_on_disk_when_written(tmp_path):
    with MetricsWriter(tmp_path / "run") as writer:
        for step in range(3):
            write_steps(writer, [step])
            assert read_metrics(tmp_path / "run")[-1] == {
                "step": step,
                "loss": step / 2,
                "note": str(step),
            }


def test_truncate_then_rewrite_equals_an_undisturbed_run(tmp_path):
    with MetricsWriter(tmp_path / "a") as writer:
        write_steps(writer, range(8))
    with MetricsWriter(tmp_path / "b") as writer:
        write_steps(writer, range(6), tag="lost ")
    text = (tmp_path / "b/metrics.jsonl").read_text()
    (tmp_path / "b/metrics.jsonl").write_text(text.replace("lost 0", "0") + '{"step": 6, "lo')
    with MetricsWriter(tmp_path / "b") as writer:
        writer.truncate(1)
        write_steps(writer, range(1, 8))
    assert read_metrics(tmp_path / "a") == read_metrics(tmp_path / "b")
    assert sorted(p.name for p in (tmp_path / "b").glob("metrics*")) == ["metrics.jsonl"]


def test_a_torn_last_line_is_removed_on_opening(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        write_steps(writer, range(2))
    with writer.path.open("a") as file:
        file.write('{"step": 2, "lo')
    assert len(read_metrics(tmp_path)) == 2
    with MetricsWriter(tmp_path) as writer:
        write_steps(writer, [2])
    assert [line["step"] for line in read_metrics(tmp_path)] == [0, 1, 2]


def events(directory):
    """(step, tag, value) of the scalars, and ("purge", step), in TensorBoard's order."""
    found = []
    for path in sorted(directory.glob("events*")):
        data = path.read_bytes()
        while data:
            size = int.from_bytes(data[:8], "little")
            event = Event.FromString(data[12 : 12 + size])
            data = data[12 + size + 4 :]
            if event.HasField("session_log"):
                found.append(("purge", event.step))
            for value in event.summary.value:
                found.append((event.step, value.tag, value.simple_value))
    return found


def test_tensorboard_gets_scalars_and_the_purge(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        write_steps(writer, range(2))
        writer.truncate(1)
        write_steps(writer, [1])
    assert events(tmp_path) == [
        (0, "loss", 0.0),
        (1, "loss", 0.5),
        ("purge", 1),
        (1, "loss", 0.5),
    ]


@pytest.mark.parametrize(
    "values, words",
    [
        ({"loss": 1.0}, "int 'step', got None"),
        ({"step": 1.0}, "int 'step', got 1.0"),
        ({"step": 1, "loss": np.float32(1)}, "'loss'.*float32"),
        ({"step": 1, "loss": {"a": 1}}, "'loss'.*dict"),
    ],
)
def test_bad_values_are_named_and_nothing_is_written(tmp_path, values, words):
    with MetricsWriter(tmp_path) as writer:
        with pytest.raises(ValueError, match=words):
            writer.write(values)
        assert read_metrics(tmp_path) == []


def test_progress_without_a_terminal_is_one_plain_line_per_interval():
    now, out = [0.0], io.StringIO()
    console = Console(file=out, width=40)
    with Progress("zero", 10, start=2, interval=5, console=console, clock=lambda: now[0]) as bar:
        for i in range(8):
            now[0] += 2.0
            bar.advance(1, {"reward": i / 3, "kept": i})
    lines = out.getvalue().splitlines()
    assert lines[0] == "zero: 5/10 steps, 2 s/step, 0:10 left, reward 0.6667, kept 2"
    assert lines[1].startswith("zero: 8/10 steps, 2 s/step, 0:04 left")
    assert lines[2].startswith("zero: 10/10 steps, 2 s/step, 0:00 left") and len(lines) == 3


def test_progress_on_a_terminal_shows_rate_time_left_and_metrics():
    now, out = [0.0], io.StringIO()
    console = Console(file=out, force_terminal=True, width=120)
    with Progress("beta", 7200, "row", console=console, clock=lambda: now[0]) as bar:
        now[0] = 1.0
        bar.advance(2, {"loss": 0.5})
    assert "2/7200 rows, 2 rows/s, 59:59 left, loss 0.5" in out.getvalue()


def test_lines_are_flat_json(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write({"step": 0, "loss": float("nan"), "note": 'a "quoted"\nline'})
    (line,) = writer.path.read_text().splitlines()
    assert json.loads(line)["note"] == 'a "quoted"\nline'


class FakeWandb:
    """Keeps what W&B would be told."""

    def __init__(self):
        self.begun, self.logged, self.finished = [], [], 0

    def init(self, **settings):
        self.begun.append(settings)
        return self

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self):
        self.finished += 1


def test_wandb_gets_what_the_file_gets_and_goes_on_with_the_same_run(tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    run = tmp_path / "papo"
    run.mkdir()
    (run / "config.yaml").write_text("seed: 3\n")
    with RunLog("papo", run, 2, report=print) as log:  # not asked for
        log.write({"step": 1, "reward": 0.5})
    assert not fake.begun and not (run / "wandb.id").exists()
    monkeypatch.setenv("NPR_WANDB", "trees")
    for start in (0, 1):
        with RunLog("papo", run, 2, start, report=print) as log:
            log.write({"step": start + 1, "reward": 0.5, "note": "text"})
    first, second = fake.begun
    assert first["project"] == "trees" and first["config"] == {"seed": 3}
    assert first["resume"] == "allow" and first["id"] == second["id"] != ""
    assert fake.logged == [(1, {"reward": 0.5}), (2, {"reward": 0.5})]
    assert fake.finished == 2
    assert [line["step"] for line in read_metrics(run)] == [1, 2]


def test_wandb_that_is_not_installed_is_an_error_with_a_remedy(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not there
    monkeypatch.setenv("NPR_WANDB", "trees")
    with pytest.raises(ValueError, match=r"NPR_WANDB=trees .*pip install 'npr-jax\[wandb\]'"):
        RunLog("papo", tmp_path / "run", 2)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "line",
    [
        b"nonsense",
        b"[1]",
        b'{"loss": 1}',
        b'{"step": "a"}',
        b'{"step": 2, "loss": {"a": 1}}',
        b'{"step": 2, "loss": [1]}',
        b'{"step": 2, "loss": ' + b"9" * 400 + b"}",
        b'{"step": 2, "loss": -1e308}',
        b'{"step": 2, "\\ud83d": 1}',
        b"\xff",
        b"[" * 100_000,
    ],
)
def test_a_line_that_is_none_is_told_with_its_place(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": null, "text": "\xe2\x80\xa8"}\n' + line + b"\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: .*needed is metrics\.jsonl of a run"):
        read_metrics(tmp_path)
    path.write_bytes(path.read_bytes().splitlines(keepends=True)[0])
    assert [line["step"] for line in read_metrics(tmp_path)] == [1]
