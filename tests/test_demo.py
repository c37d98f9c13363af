"""The demo's task, checks and report, and a small run of it from end to end."""

import copy
import dataclasses
import os
import re
import xml.etree.ElementTree as xml
from pathlib import Path

import jax
import numpy as np
import pytest
import report_toy

from npr_jax import demo, load
from npr_jax.answers import equal, extract
from npr_jax.base.config import load_config
from npr_jax.data.prompts import prompt_ids
from npr_jax.demo import sums
from npr_jax.demo.blocks import DEFECTS
from npr_jax.demo.page import write_page
from npr_jax.demo.sums import CHECKS, FIT, Teacher, draw, ideal, true_value, write
from npr_jax.demo.table import RATES, shortfalls
from npr_jax.demo.task import find_task, name_of
from npr_jax.model.tokenizer import demo_tokenizer
from npr_jax.report.svg import draw_tree, tree_svg
from npr_jax.runs.metrics import MetricsWriter
from npr_jax.train import papo
from npr_jax.tree import TagIds, layout, parse
from npr_jax.tree.format import check_format

OPTIMISED = True

TOKENIZER = demo_tokenizer()
TAGS = TagIds.from_tokenizer(TOKENIZER)


def encoded(one, text):
    prompt = prompt_ids(TOKENIZER, one.problem)
    return [*prompt, *TOKENIZER.encode(text), TOKENIZER.eos_token_id], len(prompt)


def tasks(num=300, seed=0):
    return draw(num, np.random.default_rng(seed))


def test_a_fact_is_its_sum_or_product_modulo_ten():
    assert [true_value(*fact) for fact in (("+", 7, 8), ("*", 7, 8), ("*", 9, 0))] == [5, 6, 0]


def test_the_ideal_answer_is_right_well_formed_and_short():
    for one in tasks():
        text = ideal(one)
        ids, prompt_len = encoded(one, text)
        assert TOKENIZER.decode(ids[prompt_len:-1]) == text  # the alphabet covers it
        assert not check_format(ids, prompt_len, TAGS)
        assert equal(extract(text), one.answer)
        assert prompt_len <= 32 and len(ids) - prompt_len <= 160  # the limits in configs/tiny_*


@pytest.mark.parametrize("defect", DEFECTS)
def test_every_defect_breaks_the_format(defect):
    rng = np.random.default_rng(0)
    for one in tasks(100):
        text = write(one, lambda fact: true_value(*fact), defect, rng)
        assert check_format(*encoded(one, text), TAGS)


def test_problems_differ_and_leave_out_what_they_must():
    first = tasks(200)
    names = {one.problem for one in first}
    assert len(names) == 200
    more = draw(500, np.random.default_rng(1), first)
    assert not names & {one.problem for one in more}
    assert [one.problem for one in tasks(200)] == [one.problem for one in first]


def test_the_teacher_is_imperfect_in_the_way_that_its_seed_says():
    teacher, rng = Teacher(5), np.random.default_rng(0)
    assert teacher.wrong == Teacher(5).wrong != Teacher(6).wrong
    assert len(teacher.wrong) == 50
    assert all(value != true_value(*fact) for fact, value in teacher.wrong.items())
    fact, belief = next(iter(teacher.wrong.items()))
    believed = np.mean([teacher.value(fact, rng) == belief for _ in range(2000)])
    assert abs(believed - 0.75) < 0.05
    good = [not check_format(*encoded(one, teacher.answer(one, rng)), TAGS) for one in tasks(600)]
    assert abs(np.mean(good) - 0.35) < 0.07


def good_rows():
    """Rows as a run that shows everything has them."""
    row = {"format": 1.0, "accuracy": 0.8, "parallel": 1.0, "tokens": 80.0, "critical_path": 50.0}
    return {
        "seed sequential": row | {"format": 0.4, "accuracy": 0.4},
        "zero sequential": row | {"format": 0.9, "accuracy": 0.6},
        "zero parallel": row | {"accuracy": 0.1},
        "beta parallel": row | {"accuracy": 0.7},
        "papo parallel": row | {"accuracy": 0.9},
    }


SHORT = [
    ("zero sequential", "format", 0.69, "Zero raises the format rate"),
    ("zero sequential", "accuracy", 0.49, "Zero raises the accuracy"),
    ("zero parallel", "accuracy", 0.31, "Zero, decoded in parallel"),
    ("beta parallel", "format", 0.94, "Beta, in parallel, keeps the format"),
    ("beta parallel", "accuracy", 0.56, "Beta, in parallel, is as accurate"),
    ("papo parallel", "accuracy", 0.74, "PAPO adds accuracy"),
    ("beta parallel", "parallel", 0.98, "Beta runs in parallel"),
    ("papo parallel", "parallel", 0.98, "PAPO runs in parallel"),
    ("papo parallel", "critical_path", 65.0, "The critical path is short"),
]


def test_rows_that_show_everything_fall_short_nowhere():
    assert shortfalls(good_rows(), CHECKS) == []
    assert len(SHORT) == len(CHECKS)


@pytest.mark.parametrize("row, column, value, sentence", SHORT)
def test_each_shortfall_is_named(row, column, value, sentence):
    rows = copy.deepcopy(good_rows())
    rows[row][column] = value
    assert any(line.startswith(sentence) for line in shortfalls(rows, CHECKS))


def test_a_tree_is_drawn_with_its_branches_side_by_side():
    one = next(one for one in tasks() if one.split and len(one.groups) == 4)
    ids, prompt_len = encoded(one, ideal(one))
    tree, pieces = parse(ids, prompt_len, TAGS), [TAGS.decode([i]) for i in ids]
    text = draw_tree(pieces, tree)
    steps = [line for line in text.splitlines() if "<step>" in line]
    assert len(steps) == 2  # a line for each block
    assert sum(line.count("<step>") for line in steps) == 4
    assert text.splitlines()[-1] == f"\\boxed{{{one.answer}}}<eos>"
    drawn = xml.fromstring(tree_svg(pieces, tree))
    boxes = [e for e in drawn.iter() if e.tag.endswith("rect")]
    assert len(boxes) == 1 + 2 * 1 + 4 + 1  # the prompt, each guideline, the steps, the end
    words = "".join("".join(e.itertext()) for e in drawn.iter() if e.tag.endswith("}text"))
    assert words == TAGS.decode(ids).replace("\n", "")
    # A trace that was never a tree, and one that was cut off, are drawn too.
    half = len(ids) // 2
    assert draw_tree(pieces[:half], parse(ids[:half], prompt_len, TAGS, allow_open=True))
    assert "|" not in draw_tree(pieces, layout(len(ids), prompt_len=prompt_len))


def test_the_report_has_the_table_the_curves_and_the_answers(tmp_path):
    values = {"format_rate": 0.5, "accuracy": 0.25, "response_tokens": 80, "critical_path": 60}
    for stage in ("zero", "papo"):
        with MetricsWriter(tmp_path / stage) as writer:
            writer.write({"step": 1, **values})
    shown = report_toy.nested()
    report_toy.write_traces(tmp_path / "traces" / "papo.parallel.jsonl", [shown] * 3)
    row = {"format": 1.0, "accuracy": 0.94, "tokens": 85.0}
    rows = {"papo parallel": row}
    write_page(tmp_path, "sums < products", rows, shown, {"zero": "seed: <3>"}, {"zero": 61.2})
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    for part in ("<td>0.94</td>", "papo parallel", "Stages: zero 61 s", "seed: &lt;3&gt;"):
        assert part in page
    for part in ("3 answers.", "tokens of an answer", "One answer as a tree", 'id="viewer"'):
        assert part in page
    assert "<p>sums &lt; products</p>" in page
    assert not report_toy.fetches(page)
    xml.parse(tmp_path / "tree.svg"), xml.parse(tmp_path / "curves.svg")


def example(tmp_path):
    """The task that docs/tasks.md has, as a file."""
    page = (Path(__file__).parents[1] / "docs/tasks.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    path = tmp_path / "differences.py"
    path.write_text(code, encoding="utf-8")
    return path


def test_a_task_of_ones_own_is_a_file(tmp_path):
    path = example(tmp_path)
    found = find_task(str(path))
    assert name_of(found) == "differences" and find_task("sums") is sums
    tokenizer = demo.seed_model(found, 0).tokenizer
    tags, rng, teacher = (
        TagIds.from_tokenizer(tokenizer),
        np.random.default_rng(0),
        found.Teacher(0),
    )
    problems = found.draw(400, rng)
    right = formed = 0
    for one in problems:
        text = teacher.answer(one, rng)
        ids = [*tokenizer.encode(one.problem), *tokenizer.encode(text), tokenizer.eos_token_id]
        assert tokenizer.decode(ids[:-1]) == one.problem + text
        formed += not check_format(ids, len(tokenizer.encode(one.problem)), tags)
        right += found.check(extract(text), one.answer)
    assert 0.4 < formed / 400 < 0.6 and 0.75 < right / 400 < 0.98


@pytest.mark.parametrize(
    "name, text, wanted",
    [
        ("products", None, "task is 'products', needed is one of sums, countdown"),
        ("none.py", None, "cannot be imported"),
        (
            "some.py",
            "ABOUT = ''",
            "has no SYMBOLS, MODEL, FIT, SETTINGS, CHECKS, COLUMNS, Teacher, draw",
        ),
    ],
)
def test_what_is_no_task_is_named(tmp_path, name, text, wanted):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=wanted):
        demo.run(str(tmp_path / name) if name.endswith(".py") else name, 0, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_task_with_its_own_check_is_checked_by_it(tmp_path):
    path = example(tmp_path)
    mine = path.with_name("mine.py")
    mine.write_text(path.read_text() + "\n\ndef check(prediction, reference):\n    return False\n")
    found = find_task(str(mine))
    config = load_config(papo.PapoConfig, "tiny_papo", demo._paths(found, "papo", tmp_path))
    assert config.check is found.check and not config.check("1", "1")
    assert "checker" not in " ".join(demo._paths(sums, "papo", tmp_path))


def test_the_seed_model_of_the_sums_is_the_preset():
    mine, preset = demo.seed_model(sums, 3), load("tiny", seed=3)
    assert mine.config == preset.config and mine.tags == preset.tags
    assert all(map(np.array_equal, jax.tree.leaves(mine.params), jax.tree.leaves(preset.params)))


def test_what_the_demo_keeps_is_never_half_written(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "TRAIN_PROBLEMS", 4)
    monkeypatch.setattr(demo, "EVAL_PROBLEMS", 4)
    results = demo._Results(tmp_path / "results.json")

    def write_all():
        demo.make_problems(sums, 0, tmp_path)
        results.add("seed sequential", {"format": 0.5})

    write_all()
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}

    def crash(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", crash)
    for write_again in (write_all, lambda: results.add("zero sequential", {})):
        with pytest.raises(KeyboardInterrupt):
            write_again()
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.nightly
def test_a_small_demo_runs_reports_and_goes_on(tmp_path, monkeypatch, capsys):
    """The whole chain at sizes that learn nothing: --check must say so."""
    small = {
        "zero": ["steps=1", "prompts=2", "samples=4", "max_refills=0"],
        "beta": [
            "sample.num_problems=16",
            "sample.batch=16",
            "sample.tries=4",
            "fit.steps=1",
            "fit.batch=2",
        ],
        "papo": ["steps=1", "prompts=2", "samples=2"],
    }

    def load_small(cls, name, overrides):
        return load_config(cls, name, [*overrides, *small[name.removeprefix("tiny_")]])

    monkeypatch.setattr(demo, "load_config", load_small)
    monkeypatch.setattr(sums, "DEFECTIVE", 0.0)
    monkeypatch.setattr(sums, "MISCONCEIVED", 0.0)
    monkeypatch.setattr(demo, "TRAIN_PROBLEMS", 32)
    monkeypatch.setattr(demo, "EVAL_PROBLEMS", 8)
    monkeypatch.setattr(sums, "FIT", dataclasses.replace(FIT, steps=100))
    assert demo.run("sums", 0, tmp_path, check=True) == 1
    said = capsys.readouterr().out
    assert "falls short" in said
    for name in ("index.html", "curves.svg", "tree.svg"):
        text = (tmp_path / name).read_text(encoding="utf-8")
        assert "<svg" in text
        assert not report_toy.fetches(text)
    xml.parse(tmp_path / "tree.svg"), xml.parse(tmp_path / "curves.svg")
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    for stage in ("seed", "zero", "beta", "papo"):
        for mode in ("sequential", "parallel"):
            assert f"{stage} {mode}" in page
    assert all(rate in page for rate in RATES)
    for part in ("beta/fit", "papo.parallel", "64 answers.", "accepted rate"):
        assert part in page
    assert load(tmp_path / "papo" / "final").tokenizer is not None

    before = (tmp_path / "results.json").read_text()
    assert demo.run("sums", 0, tmp_path) == 0  # nothing is done again
    assert (tmp_path / "results.json").read_text() == before
    with pytest.raises(ValueError, match="seed was 0, is 1"):
        demo.run("sums", 1, tmp_path)


@pytest.mark.parametrize("text", ["[]", "{", "{}", '{"rows": 3, "seconds": {}}', "\udcff"])
def test_results_that_are_none_are_named(tmp_path, text):
    path = tmp_path / "results.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=r"results\.json is n.*results\.json of a demo"):
        demo._Results(path)
