"""An evaluation: what it writes, that it can be cut off anywhere, and what it refuses."""

import dataclasses
import json
import shutil

import bigram
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from train_toy import tiny
from typer.testing import CliRunner

from npr_jax.base.config import load_config
from npr_jax.cli import app
from npr_jax.data.benchmarks import Source
from npr_jax.decode import fork_join
from npr_jax.evaluate import run as module
from npr_jax.evaluate.results import Run, sum_up, tables
from npr_jax.evaluate.run import EvalConfig, evaluate, seed_of
from npr_jax.evaluate.traces import read_traces
from npr_jax.model.pretrained import save

ROWS = [
    {"problem": "A:7+4;B:6*2?", "answer": "3"},
    {"problem": "A:1+2;B:3+4?", "answer": 0},
    {"id": "last", "problem": "A:1+1;B:1+1;C:2*2?", "answer": "8"},
]
SMALL = (
    "dtype=float32",
    "engine={lanes: 4, pages: 64}",
    "sampling={max_tokens: 24, top_p: 0.9}",
)
CLOCKED = ("tokens_per_s", "speedup_tokens_per_s", "speedup_wall_clock")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("evaluate")
    save(tiny(), place / "model")
    write(place / "mine.jsonl", ROWS)
    return place


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def config(place, output, *changes, **given):
    given = {
        "model": str(place / "model"),
        "benchmarks": [f"mine={place / 'mine.jsonl'}"],
        "output": str(output),
        "samples": 2,
        "baseline": True,
    } | given
    given["compilation_cache"] = str(place / "cache")
    given = [f"{key}={json.dumps(value)}" for key, value in given.items()]
    return load_config(EvalConfig, "eval", [*SMALL, *given, *changes])


@pytest.fixture(scope="module")
def whole(place):
    """The directory of an evaluation that nothing has cut off, with its sequential baseline."""
    evaluate(config(place, place / "whole"))
    return place / "whole"


def results(output):
    return json.loads((output / "results.json").read_text(encoding="utf-8"))


def without_times(found):
    for entry in found["benchmarks"].values():
        del entry["timing"]["seconds"]
        for name in CLOCKED:
            entry["metrics"].pop(name, None)
    del found["settings"]["output"]
    return found


def answers(output, run="mine"):
    """Of each (problem, sample): the ids, and the verdict."""
    return {
        (trace.id, trace.sample): (trace.token_ids, trace.blocks, trace.prediction, trace.correct)
        for trace in read_traces(output / "traces" / f"{run}.jsonl")
    }


def test_what_is_written(place, whole):
    found = results(whole)
    assert list(found["benchmarks"]) == ["mine", "mine.sequential"]
    for name, entry in found["benchmarks"].items():
        assert (entry["problems"], entry["samples"]) == (3, 2)
        assert entry["parallel"] == (name == "mine")
        assert entry["timing"]["answers"] == 6 and entry["timing"]["seconds"] > 0
        traces = list(read_traces(whole / "traces" / f"{name}.jsonl"))
        assert {(t.id, t.sample) for t in traces} == {
            (id, i) for id in ("1", "2", "last") for i in (0, 1)
        }
        assert {t.benchmark for t in traces} == {"mine"}
        assert entry["timing"]["tokens"] == sum(len(t.token_ids) - t.prompt_len for t in traces)
        metrics = {name: metric["value"] for name, metric in entry["metrics"].items()}
        assert metrics["tokens"] == pytest.approx(entry["timing"]["tokens"] / 6)
        assert metrics["format_rate"] == sum(not t.violations for t in traces) / 6
        assert metrics["avg@2"] == sum(t.correct for t in traces) / 6
        assert [row["id"] for row in entry["by_problem"]] == ["1", "2", "last"]
    assert not any(trace.blocks for trace in read_traces(whole / "traces/mine.sequential.jsonl"))
    assert set(CLOCKED) <= set(found["benchmarks"]["mine"]["metrics"])
    assert set(found["benchmarks"]["mine.sequential"]["metrics"]) & set(CLOCKED) == {CLOCKED[0]}
    # The whole setting lies beside it.
    text = (whole / "config.yaml").read_text(encoding="utf-8")
    assert yaml.safe_load(text) == found["settings"]
    assert {"model", "benchmarks", "samples", "engine", "sampling", "instruction"} <= set(
        found["settings"]
    )
    assert found["versions"]["jax"] and "cpu" in found["device"]
    assert [table.row_count for table in tables(found)] == [2, 2, 2]
    latency = found["benchmarks"]["mine"]["metrics"]["speedup_token_latency"]
    runs = [read_traces(whole / f"traces/mine{x}.jsonl") for x in ("", ".sequential")]
    paths = [{(t.id, t.sample): t.figures.critical_path for t in run} for run in runs]
    ratios = [
        sum(paths[1][id, i] for i in (0, 1)) / sum(paths[0][id, i] for i in (0, 1))
        for id in ("1", "2", "last")
    ]
    assert latency["value"] == pytest.approx(np.mean(ratios))
    others = found["benchmarks"]["mine.sequential"]["metrics"]
    assert not {"speedup_token_latency", "block_place", "path_overlap"} & others.keys()


def test_a_figure_that_is_null_is_shown_as_none():
    metrics = {"tokens": {"value": None}, "avg@2": {"value": 0.5, "low": None, "high": None}}
    entry = {"problems": 1, "samples": 2, "metrics": metrics}
    shown = [
        next(iter(column.cells))
        for table in tables({"benchmarks": {"a": entry}})
        for column in table.columns
    ]
    assert shown[:4] == ["a", "1", "2", "50.0"] and set(shown[4:]) == {"-", "a", "1", "2"}


@pytest.mark.parametrize("value", ['"1"', "null", "NaN", "1e999", "9" * 400, "[1]"])
@pytest.mark.parametrize("key", ["seconds", "tokens"])
def test_a_time_that_is_no_number_is_named(key, value, tmp_path):
    numbers = {"seconds": "1.5", "tokens": "3"} | {key: value}
    line = ", ".join(f'"{name}": {number}' for name, number in numbers.items())
    (tmp_path / "timing.jsonl").write_text(f'{{"run": "mine", {line}}}\n')
    run = Run("mine", Source("mine", [], ""), True, {})
    with pytest.raises(ValueError, match=r"timing.jsonl:1: .*no numbers; needed is"):
        sum_up({}, tmp_path, [run], [{}], 1)


@pytest.mark.parametrize("cut", ["parallel", "sequential", "both"])
def test_a_cut_off_evaluation_goes_on(cut, place, whole, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(whole, output)
    (output / "results.json").unlink()
    times = (output / "timing.jsonl").read_bytes().splitlines(keepends=True)
    if cut != "sequential":  # killed in the benchmark itself
        path = output / "traces" / "mine.jsonl"
        lines = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(b"".join(lines[:3]) + lines[3][:200])
        times = times[:3] + times[6:]
    if cut != "parallel":
        path = output / "traces" / "mine.sequential.jsonl"
        path.write_bytes(path.read_bytes()[:-1])  # only the line's end is missing
        times = [*times[:-1], times[-1][:9]]
    (output / "timing.jsonl").write_bytes(b"".join(times))
    evaluate(config(place, output))
    assert without_times(results(output)) == without_times(results(whole))
    for run in ("mine", "mine.sequential"):
        assert answers(output, run) == answers(whole, run)
    kept = (output / "traces" / "mine.jsonl").read_bytes()
    again = evaluate(config(place, output))  # nothing is left to do
    assert again["benchmarks"] == results(output)["benchmarks"]
    assert (output / "traces" / "mine.jsonl").read_bytes() == kept


def test_an_answer_depends_on_nothing_but_its_problem_and_sample(place, whole, tmp_path):
    write(
        tmp_path / "other.jsonl", [ROWS[0], *({"problem": f"A:{i}+1?", "answer": 1} for i in "12")]
    )
    write(tmp_path / "few.jsonl", ROWS[2:])
    few = [f"other={tmp_path / 'other.jsonl'}", f"mine={tmp_path / 'few.jsonl'}"]
    output = tmp_path / "out"
    evaluate(config(place, output, benchmarks=few, samples=1, baseline=False))
    assert answers(output) == {key: answers(whole)[key] for key in [("last", 0)]}
    # More samples, and other benchmarks: what is there is kept, and summed up again.
    evaluate(config(place, output, benchmarks=few[1:], samples=2, baseline=False))
    assert answers(output) == {key: answers(whole)[key] for key in [("last", 0), ("last", 1)]}
    found = results(output)["benchmarks"]
    assert {name: entry["samples"] for name, entry in found.items()} == {"other": 1, "mine": 2}
    # Fewer: the others do not count.
    evaluate(config(place, output, benchmarks=few[1:], samples=1, baseline=False))
    assert results(output)["benchmarks"]["mine"]["by_problem"][0]["samples"] == 1
    seeds = {seed_of(s, b, q, i) for s in (0, 1) for b in "ab" for q in "12" for i in (0, 1)}
    assert len(seeds) == 16 and max(seeds) < 2**32


def test_what_a_directory_refuses(place, whole, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(whole, output)
    before = sorted((path, path.read_bytes()) for path in output.rglob("*") if path.is_file())
    with pytest.raises(ValueError, match=r"sampling.temperature was 1.0, is 0.5"):
        evaluate(config(place, output, "sampling.temperature=0.5"))
    with pytest.raises(ValueError, match="instruction was"):
        evaluate(config(place, output, instruction="Think."))
    assert before == sorted((p, p.read_bytes()) for p in output.rglob("*") if p.is_file())
    write(tmp_path / "mine.jsonl", [ROWS[0], ROWS[1] | {"answer": "5"}, ROWS[2]])
    changed = [f"mine={tmp_path / 'mine.jsonl'}"]
    with pytest.raises(ValueError, match=r"mine.jsonl:\d answers problem '2'.*another output"):
        evaluate(config(place, output, benchmarks=changed))


@pytest.mark.parametrize(
    "change, message",
    [
        ("samples=0", "samples is 0"),
        ("sampling.n=2", "set samples instead"),
        ("sampling.seed=[1, 2]", r"sampling\.seed"),
        ("sampling.parallel=false", "nothing to compare"),
        ("benchmarks=[]", "needed are different ones"),
        ("benchmarks=[aime25, aime25=x]", "needed are different ones"),
        ("benchmarks=[aime26]", "unknown; there are"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(change, message, place):
    with pytest.raises(ValueError, match=message):
        config(place, place / "never", change)


def test_a_model_without_tags_decodes_sequentially_only(place, tmp_path, monkeypatch):
    bare = dataclasses.replace(tiny(), tags=None)
    monkeypatch.setattr(module, "load", lambda *args, **kwargs: bare)
    with pytest.raises(ValueError, match=r"set sampling\.parallel=false"):
        evaluate(config(place, tmp_path / "a", baseline=False))
    settings = config(place, tmp_path / "b", "sampling.parallel=false", baseline=False, samples=1)
    (entry,) = evaluate(settings)["benchmarks"].values()
    assert not entry["parallel"] and entry["metrics"]["format_rate"]["value"] == 0
    assert {t.violations[0] for t in read_traces(tmp_path / "b/traces/mine.jsonl")} == {
        "the tokenizer has no tags"
    }


def test_a_prompt_that_does_not_fit_is_named(place, tmp_path):
    write(tmp_path / "long.jsonl", [ROWS[0], {"id": "long", "problem": "A" * 2000, "answer": "1"}])
    both = [f"mine={place / 'mine.jsonl'}", f"far={tmp_path / 'long.jsonl'}"]
    with pytest.raises(ValueError, match="the prompt of far/long needs"):
        evaluate(config(place, tmp_path / "out", benchmarks=both))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["config.yaml"]


def test_the_command_with_an_instruction_of_ones_own(place, tmp_path):
    model = tiny()
    model.tokenizer.chat_template = "{{ messages[0]['content'] }}:"
    save(model, tmp_path / "chat")
    (tmp_path / "instruction.txt").write_text("A+B;\n", encoding="utf-8")
    command = ["eval", "--model", tmp_path / "chat", "--output", tmp_path / "out"]
    command += ["--benchmarks", f"mine={place / 'mine.jsonl'}", "--samples", 1]
    command += ["--instruction", tmp_path / "instruction.txt"]
    for change in SMALL:
        command += ["--set", change]
    command += ["--set", f"compilation_cache={place / 'cache'}"]
    done = CliRunner().invoke(app, [str(word) for word in command])
    assert done.exit_code == 0, done.output
    assert "results.json" in done.output and "avg@k" in done.output
    prompts = {
        "".join(trace.pieces[: trace.prompt_len])
        for trace in read_traces(tmp_path / "out/traces/mine.jsonl")
    }
    assert prompts == {f"{row['problem']}\n\nA+B;:" for row in ROWS}
    assert results(tmp_path / "out")["settings"]["instruction"] == "A+B;"


def branching():
    """The tiny model with weights by which the next token follows from the last one alone, so that
    its answers are blocks of one plan, two, three, ... and then a box with a 3 or a 0."""
    model = tiny()
    of = {token: id for token, id in model.tokenizer.get_vocab().items()}
    follows = {
        "?": ["<guideline>"],
        "<guideline>": ["<plan>"],
        "<plan>": ["A"],
        "A": ["</plan>"],
        "</plan>": ["<plan>", "</guideline>"],
        "</guideline>": ["S"],  # where it is not forked
        ":": ["B"],  # the end of a step's header
        "B": ["B", "</step>"],
        "\n": ["S"],  # the end of a takeaway's header
        "S": ["</takeaway>"],
        "</takeaway>": ["\\boxed{"],
        "\\boxed{": ["3", "0"],
        "3": ["}"],
        "0": ["}"],
        "}": ["<eos>"],
    }
    params = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), model.params)
    size = len(model.tokenizer)
    params["embed"][:size, :size] = np.eye(size)
    params["final_norm"] += 3
    layers = params["layers"]
    for name in ("attn_norm", "mlp_norm", "q_norm", "k_norm"):
        layers[name] += 1
    layers["w_gate"][0, :size, :size] = layers["w_up"][0, :size, :size] = np.eye(size)
    for token, targets in follows.items():
        layers["w_down"][0, of[token], [of[target] for target in targets]] = 0.1
    return dataclasses.replace(model, params=jax.tree.map(jnp.asarray, params))


def test_answers_that_branch_are_shorter_than_they_are_long(place, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "load", lambda *args, **kwargs: branching())
    monkeypatch.setattr(fork_join, "check_block", bigram.check_block_without_numbers)
    evaluate(config(place, tmp_path / "out", "sampling.max_tokens=64", samples=8))
    found = results(tmp_path / "out")["benchmarks"]
    parallel, sequential = (
        {name: metric["value"] for name, metric in found[name]["metrics"].items()}
        for name in ("mine", "mine.sequential")
    )
    traces = list(read_traces(tmp_path / "out/traces/mine.jsonl"))
    wide = [t for t in traces if t.layout.num_branches > 1]
    assert 0 < len(wide) < len(traces) == 24
    assert parallel["parallel_rate"] == len(wide) / 24 and sequential["parallel_rate"] == 0
    assert parallel["branches"] == sum(t.layout.num_branches for t in traces) / 24
    assert parallel["width"] > 1 and parallel["depth"] <= 1 == sequential["width"]
    assert 0.2 < parallel["parallel_token_share"] < 0.8
    assert parallel["speedup_critical_path"] > 1.1 and sequential["speedup_critical_path"] == 1
    assert 0 < parallel["avg@8"] < 1  # a 3 is right, a 0, or neither
    assert parallel["avg@8"] == sum("\\boxed{3}" in t.text for t in traces if t.id == "1") / 24 + (
        sum("\\boxed{0}" in t.text for t in traces if t.id == "2") / 24
    )
    bounds = found["mine"]["metrics"]["avg@8"]
    assert bounds["low"] <= bounds["value"] <= bounds["high"]


def test_an_interval_of_no_width_is_left_out_of_the_table():
    def shown(low, high):
        metrics = {"avg@1": {"value": 1.0, "low": low, "high": high}}
        entry = {"problems": 30, "samples": 1, "metrics": metrics}
        (table, *_) = tables({"benchmarks": {"b": entry}})
        (cell,) = [column for column in table.columns if column.header == "avg@k [95%]"]
        return list(cell.cells)

    assert shown(1.0, 1.0) == ["100.0"]
    assert shown(0.95, 1.0) == ["100.0 [95.0, 100.0]"]
