"""`make same` notices the smallest difference, says where it is, and takes no notice of times."""

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

_spec = importlib.util.spec_from_file_location(
    "same", Path(__file__).parents[1] / "scripts" / "same.py"
)
same = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(same)

METRICS = [
    {"step": step, "loss": 0.1 * step, "reward/format": -0.25, "train_seconds": 0.5 * step}
    for step in (1, 2, 3)
]
TRACE = {"token_ids": [1, 5, 9], "logp": [0.0, -0.5, -1.25], "stats": {"tokens": 2}}


def write_lines(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


@pytest.fixture
def sides(tmp_path):
    """Two equal folders of results."""
    base, new = tmp_path / "base", tmp_path / "new"
    write_lines(base / "run" / "metrics.jsonl", METRICS)
    write_lines(base / "run" / "traces" / "step-000003.jsonl", [TRACE, TRACE])
    (base / "run" / "final").mkdir()
    weights = np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)
    save_file({"a": weights, "b": -weights}, base / "run" / "final" / "model.safetensors")
    shutil.copytree(base, new)
    return base, new


def test_equal_results_are_equal_whatever_they_took(sides, capsys):
    base, new = sides
    lines = [line | {"train_seconds": 7.0, "tokens_per_s": 1.0} for line in METRICS]
    write_lines(new / "run" / "metrics.jsonl", lines)
    count, differences = same.compare(base, new)
    assert differences == []
    assert count == 3 * 3 + 2 * (2 * (3 + 1) + 1) + 2 * 12
    assert same.tell({"papo": (count, differences)}) == 0
    assert "equal" in capsys.readouterr().out


def test_one_bit_of_a_parameter_is_noticed(sides, capsys):
    base, new = sides
    path = new / "run" / "final" / "model.safetensors"
    tensors = {name: array.copy() for name, array in load_file(path).items()}
    tensors["b"].view("u4")[1, 2] ^= 1
    save_file(tensors, path)
    found = same.compare(base, new)
    assert [line.partition(" is ")[0] for line in found[1]] == [
        "run/final/model.safetensors: b[1, 2]"
    ]
    assert "(1 of 12 values differ)" in found[1][0]
    assert same.tell({"papo": found}) == 1
    assert "papo: run/final/model.safetensors: b[1, 2]" in capsys.readouterr().out


def test_zero_and_minus_zero_differ(sides):
    base, new = sides
    for side, value in ((base, 0.0), (new, -0.0)):
        write_lines(side / "run" / "metrics.jsonl", [{"step": 1, "loss": value}])
    assert same.compare(base, new)[1] == [
        "run/metrics.jsonl: line 1 (step 1): loss is 0.0 in base, -0.0 in this tree"
    ]


def test_the_last_bit_of_a_metric_is_noticed_and_told_before_what_follows_from_it(sides):
    base, new = sides
    loss = float(np.nextafter(METRICS[1]["loss"], 1))
    lines = [METRICS[0], METRICS[1] | {"loss": loss}, METRICS[2] | {"loss": 9.0}]
    write_lines(new / "run" / "metrics.jsonl", lines)
    changed = TRACE | {"token_ids": [1, 5, 8]}
    write_lines(new / "run" / "traces" / "step-000003.jsonl", [TRACE, changed])
    assert same.compare(base, new)[1] == [
        f"run/metrics.jsonl: line 2 (step 2): loss is 0.2 in base, {loss!r} in this tree",
        "run/traces/step-000003.jsonl: line 2: token_ids[2] is 9 in base, 8 in this tree",
    ]


@pytest.mark.parametrize("lines", [METRICS[:2], [METRICS[0] | {"new": 1}, *METRICS[1:]]])
def test_what_is_missing_or_new_is_a_difference(sides, lines):
    base, new = sides
    write_lines(new / "run" / "metrics.jsonl", lines)
    assert len(same.compare(base, new)[1]) == len(same.compare(new, base)[1]) == 1


def test_a_file_that_only_one_side_has_is_a_difference(sides):
    base, new = sides
    (new / "run" / "traces" / "step-000003.jsonl").unlink()
    name = "run/traces/step-000003.jsonl"
    assert same.compare(base, new)[1] == [f"{name}: this tree has no such file"]
    assert same.compare(new, base)[1] == [f"{name}: base has no such file"]
