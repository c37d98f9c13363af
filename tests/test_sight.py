"""What a run tells of itself: where a step's time goes, how much of the device it uses, how good
its weights are on other problems, and what is wrong."""

import dataclasses
import gzip
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from train_toy import examples, tiny, write_problems

import npr_jax
from npr_jax.base import chips, distributed, parts
from npr_jax.base.config import load_config
from npr_jax.base.parts import Clock, part, tell, watch
from npr_jax.base.progress import Progress
from npr_jax.data.problems import read_problems
from npr_jax.model import PRESETS, abstract_params
from npr_jax.model.flops import row_work, train_flops, work_flops
from npr_jax.model.pretrained import load
from npr_jax.report import html
from npr_jax.report.alarms import alarm_lines, alarms
from npr_jax.runs import loop
from npr_jax.runs.directory import same_config
from npr_jax.runs.metrics import MetricsWriter, is_measured
from npr_jax.runs.profile import ProfileConfig
from npr_jax.train import figures, zero
from npr_jax.train.batch import Batch
from npr_jax.train.evaluation import EvaluateConfig, Evaluation, evaluation_of
from npr_jax.train.objective import Objective, loss_sums
from npr_jax.train.packing import empty_row, make_rows, stack


class Hands:
    """A clock that is moved by hand."""

    now = 0.0

    def __call__(self):
        return self.now


def test_the_parts_of_a_lap_add_up_and_the_innermost_is_charged():
    hands, told = Hands(), []
    clock = Clock(told.append, hands)

    def spend(seconds):
        hands.now += seconds

    spend(1)
    clock.open("rollout", False)
    spend(2)
    clock.open("wait", False)
    spend(4)
    clock.tell("3/4 answers")
    clock.close()
    spend(8)
    clock.close()
    clock.open("evaluate", True)
    clock.open("rollout", False)
    spend(16)
    assert clock.lap() == {
        "seconds": 31,
        "seconds/rollout": 10,
        "seconds/wait": 4,
        "seconds/evaluate": 16,
    }
    spend(3)  # a part that is open goes on in the next lap
    clock.close()
    clock.close()
    assert clock.lap() == {"seconds": 3, "seconds/evaluate": 3}
    assert clock.lap() == {"seconds": 0} and told == ["wait: 3/4 answers"]


def test_parts_without_anybody_who_watches_are_free_and_what_raises_is_charged():
    with part("rollout"):
        tell("nobody hears it")
    assert parts._clock is None
    with watch() as clock:
        with pytest.raises(KeyError), part("rollout"):
            raise KeyError
        with watch() as inner, part("train"):
            pass
        assert set(inner.lap()) == {"seconds", "seconds/train"}
        assert set(clock.lap()) == {"seconds", "seconds/rollout"}
    assert parts._clock is None


def test_waiting_for_other_processes_is_a_part(monkeypatch):
    """Of two processes that are one: what it is given comes back twice."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(distributed, "_all_gather", lambda known, x: np.stack([x, x]))
    with watch() as clock, part("judge"):
        assert distributed.gather("a") == ["a", "a"]
    assert clock.lap().keys() == {"seconds", "seconds/judge", "seconds/wait"}


def test_a_long_step_says_how_far_it_is():
    now, out = [0.0], io.StringIO()
    console = Console(file=out, width=40)
    with Progress("zero", 10, start=2, interval=5, console=console, clock=lambda: now[0]) as bar:
        for answers in range(4):
            now[0] += 3.0
            bar.inside(f"rollout: {answers}/4 answers")
        bar.advance()
    assert out.getvalue().splitlines() == [
        "zero: 2/10 steps, rollout: 1/4 answers",
        "zero: 2/10 steps, rollout: 3/4 answers",
        "zero: 3/10 steps, 12 s/step, 1:24 left",
    ]


# FLOPs


def seen(row) -> tuple[int, int]:
    """Tokens of a row and the keys that they see, one by one."""
    tokens = max((i + 1 for i, p in enumerate(row["pred"]) if p >= 0), default=0)
    pairs = 0
    for query in range(tokens):
        for key in range(query + 1):
            pairs += not any(a <= query < b for a, b in row["hidden"][key])
    return tokens, pairs


MODEL = tiny()


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 4))
def test_the_work_of_a_row_is_what_its_tokens_see(seed, num):
    made = examples(MODEL, num, seed=seed)
    (row, *_) = make_rows([[example] for example in made], 512, 4)
    assert row_work(row["hidden"], row["pred"]) == seen(row)
    assert 0 < seen(row)[0] < 512


def test_nested_and_empty_intervals_count_once_and_a_row_of_nothing_is_no_work():
    hidden = np.zeros((6, 3, 2), np.int32)
    hidden[0] = [(3, 5), (2, 6), (9, 9)]
    hidden[1] = [(5, 9), (0, 0), (3, 4)]
    row = {"hidden": hidden, "pred": np.array([-1, 0, 1, 2, 3, -1])}
    assert row_work(**row) == seen(row) == (5, 15 - 3 - 1)
    empty = empty_row(16, 2)
    assert row_work(empty["hidden"], empty["pred"]) == (0, 0)
    assert figures.flops_of(PRESETS["tiny"], batch_of([empty])) == 0


def batch_of(rows):
    return Batch((stack(rows, 1, len(rows)),), len(rows), 0, 0, fused=True)


def counted(config, rows, row_len, unrolled):
    """FLOPs of a forward and backward pass, as the compiler counts them."""
    batch = {
        name: jax.ShapeDtypeStruct((rows, *value.shape), value.dtype)
        for name, value in empty_row(row_len, 2).items()
    }
    params = abstract_params(config)
    if unrolled:
        layer = {k: jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for k, x in params["layers"].items()}
        params["layers"] = (layer,) * config.num_layers
    grad = jax.grad(lambda p, b: loss_sums(p, b, config, Objective("sft"), "float32")[0])
    return jax.jit(grad).lower(params, batch).compile().cost_analysis()["flops"]


def test_flops_are_those_of_an_unrolled_program():
    """A scanned program's own analysis has one layer of four."""
    config = dataclasses.replace(
        PRESETS["tiny"], num_layers=4, hidden_size=256, intermediate_size=512, attention="dense"
    )
    rows, row_len = 2, 64
    ours = work_flops(config, rows * row_len, rows * row_len**2)  # "dense" computes what is hidden
    assert ours == pytest.approx(counted(config, rows, row_len, True), rel=0.05)
    assert counted(config, rows, row_len, False) < 0.5 * ours
    half = train_flops(config, rows, row_len)
    assert half == work_flops(config, rows * row_len, rows * row_len**2 / 2) < ours
    full = dataclasses.replace(config, remat="full")
    assert 1.2 < train_flops(full, rows, row_len) / half < 4 / 3  # but the logits


def test_remat_is_no_work_of_a_step():
    rows = make_rows([[example] for example in examples(MODEL, 2)], 256, 4)
    full = dataclasses.replace(PRESETS["tiny"], remat="full")
    rows = batch_of(rows)
    assert figures.flops_of(full, rows) == figures.flops_of(PRESETS["tiny"], rows) > 0


def test_figures_are_of_all_processes(monkeypatch):
    """Of two processes, the other one with twice the work, other memory and an engine at rest."""
    counts = dict.fromkeys((*figures._COUNTS, *figures._ROWS), 6) | {"decode_rows": 12}
    other = (200.0, {"memory/bytes": 1e15}, dict.fromkeys(counts, 0))
    monkeypatch.setattr(figures, "gather", lambda mine: [mine, other])
    monkeypatch.setattr(figures, "peak_flops", lambda mesh, dtype: 1000.0)
    found = figures.figures(100.0, 2.0, None, "float32", counts)
    assert found["train_flops"] == 300 and found["mfu"] == 300 / 2 / 1000
    assert found["engine/occupancy"] == 6 / 12 and found["engine/preemptions"] == 6
    assert found["memory/bytes"] == 1e15
    monkeypatch.setattr(figures, "gather", lambda mine: [mine])
    none = figures.figures(0.0, 0.1, None, "float32", dict.fromkeys(counts, 0))
    assert none["train_flops"] == 0 and not {"mfu", "engine/occupancy"} & none.keys()


class Device:
    platform = "tpu"

    def __init__(self, kind, stats=None):
        self.device_kind, self._stats = kind, stats

    def memory_stats(self):
        return self._stats


def test_the_peak_is_the_chips_or_a_measured_one(monkeypatch):
    measured = chips.peak_flops(None, "float32")
    assert measured == chips.measured_peak("float32") > 1e8  # and is not measured again
    monkeypatch.setattr(jax, "local_devices", lambda: [Device("TPU v5 lite")])
    assert chips.peak_flops(None, "bfloat16") == 197e12


def test_memory_is_of_the_fullest_device_or_of_the_process(monkeypatch):
    held = np.ones(2**22)
    own = chips.memory()
    assert held.nbytes < own["memory/bytes"] <= own["memory/peak"]
    stats = [{"bytes_in_use": n, "peak_bytes_in_use": 2 * n, "bytes_limit": 9} for n in (3, 4)]
    monkeypatch.setattr(jax, "local_devices", lambda: [Device("TPU v5p", s) for s in stats])
    assert chips.memory() == {"memory/bytes": 4, "memory/peak": 8, "memory/limit": 9}


def test_what_clocks_and_machines_say_is_told_apart():
    for name in ("seconds", "seconds/wait", "train_seconds", "mfu", "memory/bytes", "tokens_per_s"):
        assert is_measured(name)
    for name in ("loss", "eval/score", "train_flops", "rollout_age", "finish/stop"):
        assert not is_measured(name)


# Evaluation


class Scored(Evaluation):
    """Evaluations whose scores are known before."""

    def __init__(self, config, scores):
        super().__init__(config, [], [], zero.SamplingParams(), 0)
        self.scores = iter(scores)

    def _measure(self, engine):
        return {"eval/score": next(self.scores)}


def evaluated(scores, patience=0):
    made = Scored(EvaluateConfig(every=2, problems="p", patience=patience), scores)
    made.begin(None, 0)
    made.begin(None, 7)  # there is one already
    found = []
    for step in range(2, 2 * len(scores), 2):
        metrics = made.measure(None, step) | {"step": step}
        found.append((made.value(metrics), made.is_over()))
    return made, found


def test_only_what_is_better_than_the_baseline_is_a_best():
    made, found = evaluated([0.5, 0.4, 0.5, 0.6, 0.6, 0.1])
    assert [value for value, _ in found] == [None, None, 0.6, None, None]
    assert made.record == {"baseline": 0.5, "best": 0.6, "best_step": 6, "since": 2}
    assert made.value({"step": 7}) is None  # no evaluation


def test_patience_counts_evaluations_without_a_better_one():
    assert [over for _, over in evaluated([0.5, 0.4, 0.6, 0.6, 0.5], 2)[1]] == [
        False,
        False,
        False,
        True,
    ]
    assert not any(over for _, over in evaluated([0.5] * 9)[1])
    made = Scored(EvaluateConfig(every=1, problems="p", patience=2), [])
    assert not made.is_over()
    made.record = json.loads(json.dumps({"baseline": 0.5, "best": 0.5, "best_step": 0, "since": 2}))
    assert made.is_over()  # as a run that was resumed


def test_problems_that_are_trained_on_are_refused(tmp_path):
    path = tmp_path / "held.jsonl"
    write_problems(path, 4, seed=5)
    trained = read_problems(path)[1:2]
    config = EvaluateConfig(every=1, problems=str(path))
    arguments = load("tiny").tokenizer, trained, 64, zero.SamplingParams(), 0
    with pytest.raises(ValueError, match=r"1 of its 4 problems are trained on, such as"):
        evaluation_of(config, *arguments)
    assert evaluation_of(None, *arguments) == (None, {})
    made, contents = evaluation_of(config, arguments[0], [], *arguments[2:])
    assert made.config is config and contents["evaluate.problems"].startswith("problems ")


def test_what_is_evaluated_is_saved():
    changes = ["train.checkpoint_every=2", "evaluate={every: 3, problems: p}"]
    with pytest.raises(ValueError, match=r"evaluate\.every is 3, needed is a multiple of train\."):
        load_config(zero.ZeroConfig, "tiny_zero", changes)
    found = load_config(zero.ZeroConfig, "tiny_zero", [*changes, "evaluate.every=4"])
    assert found.evaluate == EvaluateConfig(every=4, problems="p")
    assert load_config(zero.ZeroConfig, "tiny_zero").evaluate is None
    with pytest.raises(ValueError, match=r"profile.*steps is \[5, 3\], needed are a first"):
        load_config(zero.ZeroConfig, "tiny_zero", ["profile={steps: [5, 3]}"])


def test_a_run_may_begin_to_evaluate_and_then_stays_with_it():
    def named(old, new):
        """Raises for what differs between a run's config and a new one."""
        same_config(old, new, "run")

    off, on = {"evaluate": None, "profile": None}, {"every": 2, "problems": "p", "samples": 1}
    for old in ({}, off, {"evaluate": on | {"patience": 0}}):
        named(old, {"evaluate": on | {"patience": 3}, "profile": {"steps": [1, 2]}})
        named(old, {"evaluate": on | {"patience": 0}, "profile": None})
    for change in ({"every": 4}, {"samples": 2}, {"problems": "q"}):
        (key,) = change
        with pytest.raises(ValueError, match=rf"evaluate\.{key} was"):
            named({"evaluate": on}, {"evaluate": on | change})
    with pytest.raises(ValueError, match=r"evaluate\.every was 2, is missing"):
        named({"evaluate": on}, off)
    moved = [
        {"evaluate": on | {"problems": place}, "inputs": {"evaluate.problems": content}}
        for place, content in (("p", "a"), ("q", "a"), ("p", "b"))
    ]
    named(moved[0], moved[1])
    with pytest.raises(ValueError, match=r"inputs\.evaluate\.problems was .a., is .b."):
        named(moved[0], moved[2])


# Profiles


class Counting(loop.Body):
    """Computes a little in every step."""

    name, shown, total = "counting", (), 4

    def __init__(self, directory, steps):
        self.directory, self.profile = directory, ProfileConfig(steps)

    def begin(self):
        from test_loop import Memory

        return 0, Memory()

    def step(self, state, number):
        with part("train"), jax.named_scope("adding"):
            return state + int(jax.jit(lambda x: x @ x)(np.ones((8, 8)))[0, 0]), {}

    def finish(self, state):
        return state


def test_a_profile_has_the_steps_that_were_asked_for_and_their_parts(tmp_path):
    # In a process of its own, which has not loaded the compiler of another platform: with libtpu in
    # it the profiler of jax 0.10.2 was seen to crash.
    script = (
        "import pathlib, sys, test_sight; from npr_jax.runs import loop; "
        "body = test_sight.Counting(pathlib.Path(sys.argv[1]), (2, 3)); "
        "assert loop.run(body, lambda metrics: None) == 32"
    )
    here = [str(Path(__file__).parent), str(Path(npr_jax.__file__).parents[1])]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(here)}
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], env=env, check=True)
    (path,) = tmp_path.glob("profile/plugins/profile/*/perfetto_trace.json.gz")
    (_,) = tmp_path.glob("profile/plugins/profile/*/*.xplane.pb")  # for TensorBoard
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    steps = [e for e in events if e.get("name") == "counting"]
    assert sorted(int(e["args"]["step_num"]) for e in steps) == [2, 3]
    assert sum(e.get("name") == "train" for e in events) == 2


# Alarms


def lines(**values):
    """Metrics of as many steps as there are values."""
    columns = [[(name, value) for value in line] for name, line in values.items()]
    return [{"step": step} | dict(row) for step, row in enumerate(zip(*columns, strict=True), 1)]


ROWS = {
    "collapse of entropy": {"entropy": [1.0] * 5 + [0.05] * 5},
    "collapse of width": {"width": [1.0] * 3 + [2.6] * 7 + [1.1] * 5},
    "collapse of format": {"format_rate": [0.2, 0.9, 0.9, 0.9, 0.9, 0.9, 0.1, 0.1, 0.1, 0.1, 0.1]},
    "gap to the sampler's log-probs": {"logp_gap": [1e-5] * 9 + [0.4] * 2},
    "groups without a difference": {"equal_share": [0.5] * 5 + [0.9] * 5},
    "truncated answers": {"truncated": [0.0] * 5 + [0.6] * 5},
    "worse than at the beginning": {"eval/score": [0.6, 0.4], "eval/baseline": [0.5, 0.5]},
    "not finite": {"nonfinite": [0, 1, 0]},
}


@pytest.mark.parametrize("name", ROWS)
def test_an_alarm_is_of_its_fault_alone(name):
    made = lines(**ROWS[name])
    assert [alarm.name for alarm in alarms(made)] == [name]
    assert alarms(made[: len(made) // 3]) == []  # before it began


def test_no_alarm_where_nothing_is_wrong(tmp_path):
    good = {
        "entropy": [2.0, 1.0, 0.8, 0.6],
        "width": [1.0, 1.4, 2.1, 2.2],
        "format_rate": [0, 0, 1, 1],
    }
    calm = {"logp_gap": [1e-5] * 4, "truncated": [0.1] * 4, "equal_share": [0.4] * 4}
    score = {"eval/score": [0.4, 0.5, 0.6, 0.5], "eval/baseline": [0.4] * 4, "nonfinite": [0] * 4}
    assert alarms(lines(**good, **calm, **score)) == []
    assert alarms([]) == [] and alarms([{"step": 1, "skipped_because": "x"}]) == []
    assert alarms(lines(entropy=[float("nan")] * 4, width=[1.0, 1.01, 1.0, 1.0])) == []
    with MetricsWriter(tmp_path / "fit") as writer:
        for line in lines(truncated=[0.9] * 3):
            writer.write(line)
    assert alarm_lines(tmp_path) == [
        "ALARM fit: truncated answers, step 3: truncated is 0.9, more than 0.3"
    ]
    page = html.write(tmp_path).read_text(encoding="utf-8")
    assert "fit: truncated answers</strong>, step 3: truncated is 0.9, more than 0.3" in page
    assert html.alarm_list({"": lines(**good)}) == "<p>None.</p>"
