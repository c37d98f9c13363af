"""What is written as JSON is JSON: no NaN, no Infinity, in no file of the package."""

import ast
import json
import math
from pathlib import Path

import npr_jax
from npr_jax.base.files import json_text
from npr_jax.runs.metrics import MetricsWriter, read_metrics

# Calls of json.dumps whose text is no file, or is of what holds no floats.
ELSEWHERE = {
    "answers/grade.py": 1,  # to its own worker
    "answers/match.py": 1,
    "base/config.py": 2,  # pydantic's way in; whether .nan is allowed is said there; a check
    "base/files.py": 1,  # json_text itself
    "base/seeds.py": 1,  # a digest
    "data/benchmarks.py": 2,  # a line as if of a file of JSON; a digest
    "data/sources.py": 1,  # whether it can be encoded
    "demo/__init__.py": 2,  # texts
    "evaluate/generate.py": 1,
    "evaluate/traces.py": 1,  # with allow_nan=False
    "report/html.py": 1,  # shown as text
    "serve/http.py": 1,  # to clients, with allow_nan=False
    "runs/digest.py": 1,
    "runs/directory.py": 2,  # of a message
    "runs/metrics.py": 1,  # whether it can be encoded
    "train/inputs.py": 2,  # a digest; what a model is known by
    "train/rollout_cache.py": 2,
}


def refuse(token):
    raise AssertionError(f"{token} is no JSON")


def test_what_is_not_finite_is_null():
    values = {"a": [1.5, math.nan, (math.inf, {"b": -math.inf})], "c": "NaN", "d": None, "e": True}
    text = json_text(values, indent=1)
    found = json.loads(text, parse_constant=refuse)
    assert found == {"a": [1.5, None, [None, {"b": None}]], "c": "NaN", "d": None, "e": True}
    assert json_text(0.1) == "0.1" and json_text([1, "é"]) == json.dumps([1, "é"])


def test_metrics_that_are_not_finite_come_back_as_nan(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write({"step": 1, "loss": math.nan, "norm": math.inf, "why": "NaN"})
    path = tmp_path / "metrics.jsonl"
    json.loads(path.read_text(), parse_constant=refuse)
    with path.open("a") as file:
        file.write('{"step": 2, "loss": NaN, "norm": Infinity}\n')  # as older runs have it
    first, second = read_metrics(tmp_path)
    assert math.isnan(first["loss"]) and math.isnan(first["norm"]) and first["why"] == "NaN"
    assert math.isnan(second["loss"]) and second["norm"] == math.inf


def test_every_file_of_json_is_written_by_one_writer():
    root, found = Path(npr_jax.__file__).parent, {}
    for path in root.rglob("*.py"):
        calls = [
            node
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.Attribute)
            and node.attr in ("dumps", "dump")
            and isinstance(node.value, ast.Name)
            and node.value.id == "json"
        ]
        if calls:
            found[path.relative_to(root).as_posix()] = len(calls)
    extra = {name: number for name, number in found.items() if number > ELSEWHERE.get(name, 0)}
    assert not extra, f"write files with npr_jax.base.files.json_text: {extra}"
