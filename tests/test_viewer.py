"""The viewer in a real browser: clicks through the tree, keys, a narrow window, many answers.

Screenshots go to the folder NPR_ARTIFACTS, or to pytest's own.
"""

import dataclasses
import itertools
import json
import os
import re
from pathlib import Path

import pytest
import report_toy as toy
from webdriver import browser

from npr_jax.demo.page import results_table
from npr_jax.report import content, html

pytestmark = pytest.mark.slow
OPEN = "const d = document.querySelector('.detail'); return d.dataset.open === String(arguments[0])"
FOCUS = "const a = document.activeElement; return a.className || a.tagName"
RIGHT = "return document.querySelector('.now').getBoundingClientRect().right"
INSPECTOR = "return document.querySelector('.inspector').innerText"
NOW = "return document.querySelector('.now')?.textContent"


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("browser")) as found:
        yield found


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Answers 0: nested blocks, 1: nothing but hostile text, then an evaluation."""
    folder = toy.evaluation(tmp_path_factory.mktemp("evaluation"))
    hostile = toy.made(
        toy.NASTY,
        toy.block(toy.NASTY, "אב גד <b>x</b>") + "\\boxed{4}",
        prediction=toy.NASTY,
        reference=None,
        correct=None,
        violations=[toy.NASTY],
        id=toy.NASTY,
    )
    toy.write_traces(folder / "traces" / "a.jsonl", [toy.nested(id="nested"), hostile])
    return html.write(folder)


@pytest.fixture
def opened(chromium, page):
    chromium.window(1280, 900)
    chromium.open(page.parent / "index.html")
    chromium.run("location.hash = ''; location.reload()")
    chromium.until(OPEN, 0)
    chromium.complaints()
    yield chromium
    assert chromium.complaints() == []


def picture(chromium, tmp_path, name):
    folder = Path(os.environ.get("NPR_ARTIFACTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    chromium.screenshot(folder / name)
    assert (folder / name).stat().st_size > 10_000


def test_branches_stand_side_by_side_and_join_again(opened, tmp_path):
    forks = opened.run(
        """return [...document.querySelectorAll('.fork')].map(f => [...f.firstChild.children]
           .map(b => b.getBoundingClientRect()).map(r => [r.left, r.top, r.right]))"""
    )
    assert [len(fork) for fork in forks] == [3, 2, 2]
    for fork in forks:
        assert len({round(top) for _, top, _ in fork}) == 1
        assert all(a[2] < b[0] for a, b in itertools.pairwise(fork))
    assert opened.run("return document.querySelectorAll('.branch .branch').length") == 2
    text = opened.run("return document.querySelector('.tree').textContent")
    assert text.endswith("\\boxed{42}") and text.count("<step>") == 7
    words = opened.run("return document.querySelector('.detail').innerText")
    for word in ("✓ right", "What is six times seven?", "stop", "nested · sample 0"):
        assert word in words
    opened.run("document.getElementById('viewer').scrollIntoView({behavior: 'instant'})")
    picture(opened, tmp_path, "viewer.png")
    opened.window(1280, 900, dark=True)
    picture(opened, tmp_path, "viewer-dark.png")


def test_branches_are_coloured_by_their_scores(chromium, tmp_path):
    folder, answer = toy.evaluation(tmp_path / "scored"), toy.nested(id="nested")
    scores = [[round(0.9 / (i + 1), 2) for i in range(len(b.steps))] for b in answer.blocks]
    scored = dataclasses.replace(answer, scores=scores)
    toy.write_traces(folder / "traces" / "a.jsonl", [scored])
    html.write(folder)
    chromium.open(folder / "index.html")
    chromium.until(OPEN, 0)
    shown = chromium.run(
        """return [...document.querySelectorAll('.branch > .name')].map(n => [n.textContent,
           getComputedStyle(n.querySelector('.score')).backgroundColor])"""
    )
    assert len(shown) == sum(map(len, scores)) == 7
    for text, colour in shown:
        told = int(text.rpartition("right: ")[2].rstrip("%"))
        path = re.split("steps|not sampled", text)[0]  # branch 2.1 › 1.2
        assert told == round(90 / int(path.rpartition(".")[2]))
        assert [c for t, c in shown if t.endswith(f"right: {told}%")] == [colour] * sum(
            t.endswith(f"right: {told}%") for t, _ in shown
        )
    assert len({colour for _, colour in shown}) == 3
    assert chromium.complaints() == []


def test_clicks_go_through_the_tree(opened):
    opened.run("document.getElementById('viewer').scrollIntoView({behavior: 'instant'})")
    opened.click(".branch:nth-child(2) > .name")
    trace = toy.nested()
    first = trace.blocks[0].branches[1][0]
    assert opened.run("return viewer.view.now") == first
    assert "line 1.2" in opened.run(INSPECTOR).replace("\n", " ")
    assert "written by the engine" in opened.run(INSPECTOR)
    # A token that was sampled tells its step, its id and its log-prob.
    number = next(i for i, s in enumerate(trace.step) if s >= 0 and "second" in trace.pieces[i])
    opened.run(
        """viewer.view.span(arguments[0]).scrollIntoView({block: 'center'});
           viewer.view.span(arguments[0]).id = 'wanted'""",
        number,
    )
    opened.click("#wanted")
    told = " ".join(opened.run(INSPECTOR).split())
    for fact in (
        f"id {trace.token_ids[number]}",
        f"position {trace.layout.positions[number]}",
        f"step {trace.step[number]}",
        f"log-prob {round(100 * trace.logp[number]) / 100:.2f}",
    ):
        assert fact in told
    assert opened.run(NOW) == trace.pieces[number]


def test_the_timeline_shows_which_branch_decoded_when(opened):
    rows = opened.run(
        """return [...document.querySelectorAll('.track')].map(t => [t.line.name,
           [...t.children].map(b => [parseFloat(b.style.left), parseFloat(b.style.width)])])"""
    )
    names = ["trunk", "1.1", "1.2", "1.3", "2.1", "2.1 › 1.1", "2.1 › 1.2", "2.2"]
    assert [name for name, _ in rows] == names
    bars, trace = dict(rows), toy.nested()
    steps = max(trace.step) + 1
    for branch, name in zip(trace.blocks[0].branches, names[1:4], strict=True):
        ran = [s for s in trace.step[slice(*branch)] if s >= 0]
        ((left, width),) = bars[name]
        assert left == pytest.approx(100 * min(ran) / steps, abs=0.01)
        assert left + width == pytest.approx(100 * (max(ran) + 1) / steps, abs=0.01)
    assert len(bars["trunk"]) == 3 and len(bars["2.1"]) == 2  # they wait for their branches
    # A click on it goes to the token of that step.
    opened.click(".track.a2")
    told = " ".join(opened.run(INSPECTOR).split())
    assert "line 1.2" in told


def test_keys_lead_everywhere(opened):
    opened.press("j")
    opened.until(OPEN, 1)
    opened.press("k")
    opened.until(OPEN, 0)
    opened.press("/")
    assert opened.run("return document.activeElement.type") == "search"
    opened.press(*"number 7")
    opened.until("return document.querySelector('.count').innerText === '4 of 42'")
    opened.press("j")  # in the search it is a letter
    opened.until("return document.querySelector('.count').innerText === '0 of 42'")
    opened.run("viewer.search.value = ''; viewer.filter()")
    opened.press("Escape", "Down", "Down", "Enter")
    opened.until(OPEN, 2)
    assert opened.run("return document.activeElement.getAttribute('role')") == "listbox"
    assert (
        opened.run(
            """const at = document.activeElement.getAttribute('aria-activedescendant');
           return document.getElementById(at).getAttribute('aria-selected')"""
        )
        == "true"
    )
    opened.press("Home", "Enter")
    opened.until(OPEN, 0)
    opened.press("?")
    assert opened.run("return document.querySelector('dialog').open")
    opened.press("Escape")
    assert not opened.run("return document.querySelector('dialog').open")
    # Tab goes from the list through the open answer: prompt, timeline, tree, branches.
    opened.run("viewer.list.focus()")
    reached = []
    for _ in range(12):
        opened.press("Tab")
        reached.append(opened.run(FOCUS))
    for part in ("SUMMARY", "timeline", "tree", "name"):
        assert part in reached, reached
    opened.run("document.querySelector('.tree').focus()")
    start = opened.run("return viewer.view.now")
    opened.press("Right", "Right")
    assert opened.run("return viewer.view.now") == start + 2
    assert (
        opened.run("return getComputedStyle(viewer.view.span(viewer.view.now)).outlineStyle")
        == "solid"
    )
    # Down: the next line, at the same step.
    trace = toy.nested()
    at = trace.blocks[0].branches[0][0] + 4
    opened.run("viewer.view.select(arguments[0])", at)
    opened.press("Down")
    now = opened.run("return viewer.view.now")
    assert trace.blocks[0].branches[1][0] <= now < trace.blocks[0].branches[1][1]
    assert trace.step[now] == trace.step[at]


def test_filters_choose_answers(opened):
    for value, count in (("right", 34), ("wrong", 7), ("none", 1), ("broken", 1), ("parallel", 17)):
        opened.run(
            "viewer.kind.value = arguments[0]; viewer.kind.dispatchEvent(new Event('change'))",
            value,
        )
        assert opened.run("return viewer.chosen.length") == count, value
    opened.run("viewer.kind.value = ''; viewer.group.value = 'made24'; viewer.filter()")
    assert opened.run("return viewer.chosen.length") == 20


def test_hostile_text_is_text(opened):
    opened.run("viewer.show(1)")
    opened.until(OPEN, 1)
    assert opened.run("return document.querySelectorAll('#viewer img, .tree b').length") == 0
    tree = opened.run("return document.querySelector('.tree').textContent")
    for shown in ("</script><img", "␀", "⟨U+2028⟩", "⟨U+202E⟩", "⟨U+D800⟩", "אב", "<b>x</b>", "␛"):
        assert shown in tree
    assert "– not judged" in opened.run("return document.querySelector('.verdict').innerText")


def test_nothing_overflows_a_narrow_window(opened, tmp_path):
    opened.window(360, 780)
    for number in (0, 1, 4):
        opened.run("viewer.show(arguments[0])", number)
        opened.until(OPEN, number)
        wide = opened.run(
            """const out = []; const limit = document.documentElement.clientWidth;
               if (document.documentElement.scrollWidth > limit) out.push('page');
               for (const e of document.querySelectorAll('#viewer *')) {
                 if (e.closest('.fork, dialog, option')) continue;
                 const {right} = e.getBoundingClientRect();
                 if (right > limit + 1) out.push(e.className || e.tagName);
               } return out"""
        )
        assert wide == []
    opened.run("viewer.show(0)")
    opened.until(OPEN, 0)
    assert opened.run(
        "const f = document.querySelector('.fork'); return f.scrollWidth > f.clientWidth"
    )
    opened.click(".branch:nth-child(3) > .name")  # which lies outside until it is scrolled to
    box = opened.run(RIGHT)
    assert box <= 360
    picture(opened, tmp_path, "viewer-narrow.png")


METRICS = ("avg@8", "pass@1", "pass@8", "best@8", "maj@8", "format_rate", "parallel_rate")
METRICS += ("parallel_token_share", "blocks", "branches", "depth", "width", "tokens")
METRICS += ("critical_path", "speedup_critical_path", "tokens_per_s", "speedup_wall_clock")
WIDE = """const out = []; for (const e of document.querySelectorAll('.wide'))
  out.push([e.scrollWidth, e.clientWidth]); return out"""


def test_the_summary_fits_and_narrow_windows_keep_its_names(chromium, tmp_path):
    folder = toy.evaluation(tmp_path)
    results = json.loads((folder / "results.json").read_text())
    metrics = {name: {"value": 5123.4, "low": 4800.1, "high": 5400.2} for name in METRICS}
    entry = {"problems": 30, "samples": 8, "metrics": metrics}
    names = ("aime24", "aime24.sequential", "hmmt25", "hmmt25.sequential", "zebralogic", "math500")
    results["benchmarks"] = dict.fromkeys(names, entry)
    (folder / "results.json").write_text(json.dumps(results))
    chromium.window(1400, 900)
    chromium.open(html.write(folder))
    ((wide, room),) = chromium.run(WIDE)
    assert wide <= room
    # Nothing but the heading stands between the title and the first number.
    gap = chromium.run(
        """const h = document.querySelector('section h2').getBoundingClientRect();
           const t = document.querySelector('thead th').getBoundingClientRect();
           return [t.top - h.bottom, t.height]"""
    )
    assert gap[0] < 20 and gap[1] < 40
    picture(chromium, tmp_path, "summary.png")
    chromium.window(480, 900)
    assert chromium.run("return document.documentElement.scrollWidth") <= 480
    chromium.run("document.querySelector('.wide').scrollLeft = 400")
    assert (
        chromium.run("return document.querySelector('tbody th').getBoundingClientRect().left") < 20
    )
    picture(chromium, tmp_path, "summary-narrow.png")


def test_a_narrow_window_shows_what_the_demo_is_about(chromium, tmp_path):
    names = ("format", "accuracy", "both", "parallel", "tokens", "critical_path")
    row = dict.fromkeys(names[:4], 0.95) | dict.fromkeys(names[4:], 85.2)
    row |= {"decode_steps": 812, "seconds": 2.4}
    rows = {
        f"{stage} {mode}": row for stage in ("zero", "papo") for mode in ("sequential", "parallel")
    }
    empty = content.Content("demo", results={"device": "cpu"})
    table = f'<div class="wide">{results_table(rows)}</div>'
    chromium.window(480, 900)
    chromium.open(html.write_page(tmp_path / "index.html", html.page(empty, {"Results": table})))
    right = chromium.run(
        """return [...document.querySelectorAll('thead th')].map(
             e => [e.innerText.replace(/\\s+/g, ' '), e.getBoundingClientRect().right])"""
    )
    assert [name for name, edge in right if edge <= 480][1:7] == [
        n.replace("_", " ") for n in names
    ]


def test_the_page_says_why_lanes_wait(chromium, tmp_path):
    trace = toy.nested(id="waits")
    fork = trace.blocks[0].branches[0][0]
    steps = [s + 7 * (i >= fork) if s >= 0 else s for i, s in enumerate(trace.step)]
    late = dataclasses.replace(trace, step=steps)
    flat = toy.made("Plain?", "It is.\n\\boxed{1}", id="flat")
    toy.write_traces(tmp_path / "traces" / "a.jsonl", [late, flat])
    chromium.window(1280, 900)
    chromium.open(html.write(tmp_path))
    chromium.until(OPEN, 0)
    told = chromium.run("return document.querySelector('.waits').innerText")
    path = trace.layout.critical_path_len
    assert told.startswith(f"{max(steps) + 1} decode steps for a critical path of {path} tokens")
    chromium.press("j")
    chromium.until(OPEN, 1)
    assert chromium.run("return document.querySelector('.waits')") is None


def test_a_thousand_answers_and_a_long_one(chromium, tmp_path):
    traces = [toy.made(f"Problem {i}", toy.block("a", "b"), i, id=f"p{i}") for i in range(999)]
    toy.write_traces(tmp_path / "traces" / "many.jsonl", [*traces, toy.long(30000)])
    chromium.window(1280, 900)
    chromium.open(html.write(tmp_path))
    chromium.until(OPEN, 0)
    assert chromium.run("return document.querySelectorAll('[role=option]').length") < 40
    chromium.run("viewer.list.focus()")
    chromium.press("End", "Up", "Enter")
    chromium.until(OPEN, 998)
    chromium.press("j")
    chromium.until(OPEN, 999, seconds=30)
    assert chromium.run("return document.querySelectorAll('.t').length") < 3000  # those in sight
    assert chromium.run("return document.querySelector('.tree').textContent.length") > 60_000
    chromium.run("document.querySelector('.tree').focus()")
    chromium.press("Home", "End")
    assert chromium.run(NOW) == "42}" or chromium.run(NOW).endswith("}")
    assert chromium.complaints() == []
