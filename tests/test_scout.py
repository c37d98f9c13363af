"""`npr-jax scout`: files of pools, what is refused, the table, lines of JSON, and the page."""

import gzip
import itertools
import json
import os
import random
import re
import sys
from pathlib import Path

import pytest
import report_toy as toy
from typer.testing import CliRunner
from webdriver import browser

from npr_jax.cli import app, main
from npr_jax.evaluate.policies import POLICIES, ProbeConfig, orders, tabulate
from npr_jax.evaluate.pools import Branch, PoolQuestion, clean_text, read_pool, write_pool
from npr_jax.evaluate.scout import scout, settings

FIELDS = ("accuracy", "sequential_tokens", "total_tokens")


def made(questions: int = 3, branches: int = 12, seed: int = 0, texts="abcd") -> list[PoolQuestion]:
    """A pool whose answers settle down on the way, more and more of them on the first text."""
    rng, pool = random.Random(seed), []
    for number in range(questions):
        answers = []
        for _ in range(branches):
            length = rng.randint(3, 30)
            row = [
                texts[0] if rng.random() < at / length else rng.choice(texts)
                for at in range(length)
            ]
            answers.append(Branch(row, 500 * length + rng.randint(1, 499), row[-1]))
        pool.append(PoolQuestion(f"What is {number}?", texts[0], 500, answers))
    return pool


@pytest.fixture
def pool(tmp_path):
    write_pool(tmp_path / "pool.json.gz", made())
    return tmp_path / "pool.json.gz"


def run(*args) -> str:
    result = CliRunner().invoke(app, ["scout", *map(str, args)], catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


SMALL = ("--set", "answers=8", "--set", "trials=5")


def test_a_pool_comes_back_as_it_was_written(tmp_path):
    odd = [
        PoolQuestion("Ümläute \ud800?", "\\frac{1}{2}", 7, [Branch([None, "x", ""], 20, None)]),
        PoolQuestion("", "", 1, [Branch([], 0, "y")] * 2),
    ]
    for name in ("pool.json", "in/a/folder/pool.json.gz"):
        write_pool(tmp_path / name, odd)
        found = read_pool(tmp_path / name)
        assert found == odd
    assert (tmp_path / "in/a/folder/pool.json.gz").read_bytes()[:2] == b"\x1f\x8b"
    values = json.loads((tmp_path / "pool.json").read_text())
    assert values[0]["final_answers_trace"] == [None] and values[1]["probe_freq"] == 1


@pytest.mark.parametrize(
    "text, cleaned",
    [
        ("204", "204"),
        ("\\boxed{204}", "204"),
        ("\\text{\\textbf{a} {b} c}", "a {b} c"),
        ("\\box{1}\\text{2}", "12"),
        ("\\boxed{1", "\\boxed{1"),
        ("\\boxed{1 \\text{2}", "\\boxed{1 2"),
        ("\\bo\\text{x}{7}", "7"),
        ("I do not KNOW", "No"),
        ("cannot", "No"),
        ("x = y = 5 ", "5"),
        ("the answer is 7", "7"),
        ("this = it is 7", "it is 7"),
        ("x=\\dfrac12", "\\dfrac12"),
        ("\\dfrac{1}{2} ", "\\frac{1}{2} "),
    ],
)
def test_how_an_answer_is_cleaned(text, cleaned):
    assert clean_text(text) == cleaned


def read_told(path, **options):
    told = []
    return read_pool(path, tell=told.append, **options), told


def test_a_pool_is_cleaned_once_and_as_a_whole(tmp_path):
    path = tmp_path / "pool.json"
    # What cleaning leaves is not cleaned again, though it would change.
    done = PoolQuestion("?", "\\frac12", 500, [Branch(["\\dfrac12", "it is", None], 1400, "No")])
    write_pool(path, [done])
    assert read_told(path) == ([done], [])
    again, told = read_told(path, clean=True)
    assert again[0].branches == [Branch(["\\frac12", ""], 1400, "No")] and not told
    for raw in ("x = 5", "\\boxed{5}", "nothing"):
        write_pool(path, [done, done._replace(branches=[Branch([raw, None], 900, None)])])
        found, told = read_told(path)
        assert len(told) == 1 and "question 2" in told[0] and repr(raw) in told[0]
        assert [q.branches[0].probes for q in found] == [["\\frac12", ""], [clean_text(raw)]]
        assert read_told(path, clean=False)[0][0] == done
    write_pool(path, [done._replace(gold="\\boxed{\\dfrac12}")])
    assert read_pool(path)[0].gold == "\\frac12"


def test_more_probes_than_tokens_are_told(tmp_path):
    path = tmp_path / "pool.json"
    fits = [Branch(["a"], 1, "a"), Branch(["a"] * 4, 2000, "a"), Branch(["a"] * 5, 2001, "a")]
    write_pool(path, [PoolQuestion("?", "a", 500, fits)])
    assert read_told(path)[1] == []
    write_pool(path, [PoolQuestion("?", "a", 500, [*fits, Branch(["a"] * 5, 2000, "a")])])
    ((told,),) = read_told(path)[1:]
    assert "question 1" in told and "item 4: 5 probes, 500 tokens each, in 2000 tokens" in told


def changed(**changes) -> bytes:
    """A pool of two questions, the second one changed."""
    good = {
        "question": "?",
        "gold_answer": "a",
        "probe_freq": 500,
        "each_branch": [[["a"], 9, "a"]],
    }
    second = {key: value for key, value in (good | changes).items() if value is not ...}
    return json.dumps([good, second]).encode()


@pytest.mark.parametrize(
    "data, words",
    [
        (b"", ["neither JSON nor gzip"]),
        (b"\x00\x01\x02", ["neither JSON nor gzip"]),
        (b"\xff\xfe", ["neither JSON nor gzip"]),
        (b"[" * 100_000, ["neither JSON nor gzip"]),
        (b'[{"question": "a", "question": "b"}]', ["'question' is there twice"]),
        (gzip.compress(changed())[:-12], ["no whole gzip file"]),
        (gzip.compress(b"no json"), ["neither JSON nor gzip"]),
        (b"[]", ["holds an empty list", "a JSON list of questions"]),
        (b"{}", ["holds dict", "a JSON list of questions"]),
        (b"[7]", ["question 1", "it is 7", "an object"]),
        (changed(gold_answer=...), ["question 2", "lacks gold_answer"]),
        (changed(question=None), ["question 2", "question is None", "a text"]),
        (changed(gold_answer=204), ["question 2", "gold_answer is 204", "a text"]),
        (changed(probe_freq=0), ["question 2", "probe_freq is 0", "1 or more"]),
        (changed(probe_freq="500"), ["question 2", "probe_freq is '500'", "an integer"]),
        (changed(probe_freq=True), ["question 2", "probe_freq is True", "an integer"]),
        (changed(each_branch="ab"), ["question 2", "each_branch is 'ab'", "a list"]),
        (changed(each_branch=[]), ["question 2", "has 0 answers", "needed are 1"]),
        (changed(each_branch=[[["a"], 9]]), ["question 2", "item 1", "of 2", "a list of 3"]),
        (changed(each_branch=[{}]), ["question 2", "item 1 is {}", "a list of 3"]),
        (
            changed(each_branch=[["a", 9, "a"]]),
            ["question 2", "item 1", "probes are 'a'", "a list"],
        ),
        (changed(each_branch=[[[5], 9, "a"]]), ["question 2", "probe 1 is 5", "a text or null"]),
        (changed(each_branch=[[["a"], -1, "a"]]), ["question 2", "tokens are -1", "0 or more"]),
        (changed(each_branch=[[["a"], 9.5, "a"]]), ["question 2", "tokens are 9.5", "an integer"]),
        (changed(each_branch=[[["a"], 2**31, "a"]]), ["question 2", "tokens are 2147483648"]),
        (
            changed(each_branch=[[["a"], 9, 5]]),
            ["question 2", "final answer is 5", "a text or null"],
        ),
        (
            changed(final_answers_trace=["a", "b"]),
            ["question 2", "final_answers_trace has 2 answers", "each_branch: 1"],
        ),
        (changed(final_answers_trace="a"), ["question 2", "final_answers_trace has 'a'"]),
    ],
)
def test_a_bad_pool_is_refused_by_place_value_and_need(tmp_path, monkeypatch, capfd, data, words):
    path = tmp_path / "bad.json.gz"
    path.write_bytes(data)
    said = refused(monkeypatch, capfd, path, "--policy", "sc", "--set", "answers=1")
    assert all(word in said for word in [str(path), *words]), said


def refused(monkeypatch, capfd, *args) -> str:
    """The one line that the command says when it ends with 2."""
    monkeypatch.setattr(sys, "argv", ["npr-jax", "scout", *map(str, args)])
    with pytest.raises(SystemExit) as ending:
        main()
    said = capfd.readouterr()
    assert ending.value.code == 2 and not said.out
    (line,) = said.err.splitlines()
    assert line.startswith("error: ")
    return line


@pytest.mark.parametrize(
    "args, words",
    [
        (["--policy", "best"], ["--policy is 'best'", "sc, asc, esc, sac, probe"]),
        (["--set", "kk=7"], ["--set kk=7", "'kk' is no key of any policy", "T, k, W, steps"]),
        (["--policy", "sc", "--set", "k=7"], ["'k' is no key of sc", "answers, trials"]),
        (["--set", "k"], ["--set k", "needs the form"]),
        (["--set", "k=0"], ["--set k=0", "k is 0", "1 or more"]),
        (["--set", "k=many"], ["--set k=many", "k", "valid integer", "'many'"]),
        (["--set", "T=-1"], ["T is -1", "0 or more"]),
        (["--set", "threshold=1.5"], ["threshold is 1.5", "at most 1"]),
        (["--set", "clean=maybe"], ["clean", "'maybe'"]),
        (["--set", "trials=0"], ["trials is 0"]),
        (["--set", "answers=4"], ["window is 8", "at most answers: 4", "--set answers=4"]),
        ([], ["question 1", "each_branch has 12 answers", "needed are 64", "--set answers=12"]),
        (["--question", "1"], ["--output"]),
        ([*SMALL, "--output", "o", "--question", "4"], ["--question is 4", "1 to 3"]),
        ([*SMALL, "--output", "o", "--question", "0"], ["--question is 0"]),
    ],
)
def test_what_is_asked_for_wrongly_is_refused(pool, monkeypatch, capfd, args, words):
    monkeypatch.chdir(pool.parent)
    said = refused(monkeypatch, capfd, pool, *args)
    assert all(word in said for word in words), said
    assert not (pool.parent / "o").exists()


def test_a_pool_that_is_not_there_is_named(tmp_path, monkeypatch, capfd):
    assert "a JSON list of questions" in refused(monkeypatch, capfd, tmp_path / "none.json")
    assert "is a directory" in refused(monkeypatch, capfd, tmp_path)


def test_json_is_one_line_for_each_policy(pool):
    lines = [json.loads(line) for line in run(pool, *SMALL, "--json").splitlines()]
    assert [line["policy"] for line in lines] == list(POLICIES)
    results = scout(made(), settings(None, ["answers=8", "trials=5"]))
    for line, result in zip(lines, results, strict=True):
        assert [line[field] for field in FIELDS] == [result.accuracy, *result[3:5]]
        extra = line["total_tokens_with_probes"] - line["total_tokens"]
        assert (extra > 0) == (line["policy"] in ("sac", "probe"))
    (only,) = run(pool, *SMALL, "--json", "--policy", "probe", "--set", "k=2").splitlines()
    found = json.loads(only)
    assert found["settings"]["k"] == 2 and found["questions"] == 3
    assert found["sequential_tokens_with_probes"] > found["sequential_tokens"]


def test_probes_are_charged_as_they_are_set(pool):
    def extra(cost):
        args = (pool, *SMALL, "--json", "--policy", "sac", "--set", f"probe_tokens={cost}")
        line = json.loads(run(*args))
        return line["total_tokens_with_probes"] - line["total_tokens"]

    assert extra(0) == 0 and extra(100) == pytest.approx(10 * extra(10), abs=10)


def test_the_table_fits_a_screen_and_has_a_row_for_each_policy(pool, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    lines = run(pool, *SMALL).splitlines()
    assert max(map(len, lines)) <= 80
    rows = [line.split() for line in lines if line.split()[:1] and line.split()[0] in POLICIES]
    assert [row[0] for row in rows] == list(POLICIES) and {len(row) for row in rows} == {6}
    assert "3 questions, 8 answers to each, mean of 5 trials" in " ".join(lines)


def test_what_is_longer_than_the_controller_goes_is_told(tmp_path):
    write_pool(tmp_path / "p.json", made())
    args = ["scout", str(tmp_path / "p.json"), *SMALL, "--set", "steps=5"]
    result = CliRunner().invoke(app, args)
    assert result.exit_code == 0 and "steps is 5: what has not ended by then is cut off" in (
        result.stderr
    )
    assert "cut off" not in CliRunner().invoke(app, args[:-2]).stderr


# The page.


def page_of(folder: Path, pool: Path, *args) -> str:
    run(pool, *SMALL, "--output", folder, *args)
    return (folder / "index.html").read_text(encoding="utf-8")


def test_the_page_has_a_table_and_a_picture_of_every_question(pool, tmp_path):
    page = page_of(tmp_path / "page", pool)
    assert not toy.fetches(page) and "default-src 'none'" in page and "<script" not in page
    assert page.count("<summary>Question") == 3 and page.count('role="img" aria-label="Q') == 3
    assert all(f'<th scope="row">{name}</th>' in page for name in POLICIES)
    one = page_of(tmp_path / "page", pool, "--question", "2", "--policy", "sac")
    assert re.findall("<summary>(Question .)", one) == ["Question 2"]
    assert '<th scope="row">probe</th>' not in one and "Policy <code>sac</code>" in one


def test_the_cells_are_what_was_recorded(tmp_path):
    """The picture, read back: texts, which were read, drops, ends, and the stop."""
    questions = made(1, 12, seed=3)
    write_pool(tmp_path / "p.json", questions)
    changes = ["--policy", "probe", "--set", "T=4", "--set", "k=2", "--set", "W=1"]
    page = page_of(tmp_path, tmp_path / "p.json", *changes)
    table = tabulate(questions[0])
    order = orders(12, 8, 1)
    found = ProbeConfig(answers=8, T=4, k=2, W=1).run(table, order)
    assert found.stopped[0] and found.pruned.any()  # or the picture shows little
    cells = re.findall(r'<rect class="([^"]*)"[^>]*><title>([^<]*)</title>', page)
    for row, place in enumerate(order[0], 1):
        branch, seen = questions[0].branches[place], int(found.seen[0, row - 1])
        texts, lit = [], []
        for hue, title in cells:
            if match := re.fullmatch(rf"{row}, ([\d,]+)(?: to ([\d,]+))? tokens: (.*)", title):
                first, last = (int((x or match[1]).replace(",", "")) for x in match.group(1, 2))
                size = (last - first) // 500 + 1
                texts += [match[3]] * size
                lit += [not hue.endswith("off")] * size
        assert texts == branch.probes
        assert lit == [at < seen for at in range(len(branch.probes))]
        ended = f"{row}, ended after {branch.tokens:,} tokens: {branch.final}"
        (hue,) = [hue for hue, title in cells if title == ended]
        assert hue.endswith("off") == (seen <= len(branch.probes))
    assert page.count('<path class="mark" d="M') - 1 == found.pruned.sum()  # one is in the key
    assert f"stop at {int(found.seen.max()) * 500:,} tokens</text>" in page
    # What is right has a line through it, and nothing else.
    right = [hue for hue, title in cells if title.endswith(f": {questions[0].gold}")]
    assert page.count('<path class="gold') == len(right) + 2  # the key, and the legend
    assert all(hue.startswith("c0") for hue in right)
    assert {hue[:2] for hue, title in cells if not title.endswith(": a")} <= {"c1", "c2", "c3"}
    # The last vote is what was answered.
    said = [title for _, title in cells if title.startswith("vote, ")]
    assert said[-1].endswith(f": {table.names[found.answer[0]]}")


def test_texts_that_are_no_texts_stay_texts(tmp_path):
    bad = toy.NASTY.replace("=", "")
    pool = [PoolQuestion(bad, bad, 500, [Branch([bad, None], 700, bad)] * 8)]
    write_pool(tmp_path / "nasty.json", pool)
    page = page_of(tmp_path, tmp_path / "nasty.json")
    assert "<img" not in page and "<b>" not in page and "<script" not in page
    for character in ("\x00", "\u2028", "\u202e", "\x1b"):
        assert character not in page


@pytest.mark.slow
def test_the_page_in_a_browser(tmp_path):
    texts = [f"\\frac{{{n}}}{{{n + 1}}}" for n in range(12)]
    pool = made(4, 64, texts=texts)
    write_pool(tmp_path / "pool.json", pool)
    run(tmp_path / "pool.json", "--output", tmp_path, "--set", "trials=3", "--set", "T=20")
    folder = Path(os.environ.get("NPR_ARTIFACTS", tmp_path))
    with browser(tmp_path / "browser") as chromium:
        for (width, dark), name in zip(
            itertools.product((1280, 480), (False, True)), range(4), strict=True
        ):
            chromium.window(width, 900, dark)
            chromium.open(tmp_path / "index.html")
            assert chromium.run("return document.documentElement.scrollWidth") <= width
            edges = chromium.run(
                """document.querySelectorAll('details').forEach(d => d.open = true);
                return [...document.querySelectorAll('.matrix > svg')].map(
                  s => [s.getBoundingClientRect().right, innerWidth, s.clientWidth])"""
            )
            assert len(edges) == 4 and all(0 < right <= inner for right, inner, _ in edges)
            chromium.run("document.querySelector('#answers-over-time').scrollIntoView()")
            chromium.screenshot(folder / f"scout-{name}.png")
            assert chromium.complaints() == []
        colours = chromium.run(
            """return [...document.querySelectorAll('.matrix > svg rect')].map(
              r => getComputedStyle(r).fill + r.className.baseVal.slice(0, 2))"""
        )
        assert len({colour[:-2] for colour in colours}) == len(set(colours)) == 8
        # The text of a cell is where the pointer is.
        title = chromium.run(
            """const r = document.querySelector('.matrix > svg rect.c0').getBoundingClientRect();
            return document.elementFromPoint(r.left + r.width / 2, r.top + r.height / 2)
              .querySelector('title').textContent"""
        )
        assert title.endswith(f": {texts[0]}")
