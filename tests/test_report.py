"""Pages, drawings, `npr-jax view` and `report`: whole, self-contained, and of what is there."""

import base64
import gzip
import io
import itertools
import json
import re
import xml.etree.ElementTree as xml
from html.parser import HTMLParser

import numpy as np
import pytest
import report_toy as toy
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from npr_jax.evaluate.judge import count
from npr_jax.report import content, html, terminal
from npr_jax.report.content import shares
from npr_jax.report.curves import charts_of, thinned
from npr_jax.report.lines import sections, visible
from npr_jax.report.svg import chart, histogram, nice_ticks, tick_texts, tree_svg
from npr_jax.report.visibility import rectangles, visibility_svg
from npr_jax.runs.metrics import MetricsWriter
from npr_jax.tree import layout


class Elements(HTMLParser):
    """The elements of a page by name, and texts of scripts by id."""

    def __init__(self, page):
        super().__init__()
        self.found, self.scripts, self._open = [], {}, None
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        if tag == "script":
            self._open = dict(attributes).get("id", "program")

    def handle_endtag(self, tag):
        if tag == "script":
            self._open = None

    def handle_data(self, text):
        if self._open:
            self.scripts[self._open] = self.scripts.get(self._open, "") + text


def page_of(folder, most=1000):
    return html.write(folder, most).read_text(encoding="utf-8")


def unpacked(page, number):
    return json.loads(gzip.decompress(base64.b64decode(Elements(page).scripts[f"answer-{number}"])))


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    folder = toy.evaluation(tmp_path_factory.mktemp("evaluation"))
    return folder, page_of(folder)


def test_an_evaluation_shows_figures_charts_settings_and_answers(evaluated):
    _, page = evaluated
    for words in ("avg@8", "0.667<small>0.500 to 0.812</small>", "parallel rate", "0.750"):
        assert words in page
    for words in ("5,123<small>4,800 to 5,400</small>", "made24, 40 answers", "jax 0.10.2"):
        assert words in page
    assert "m&lt;o&gt;del" in page and "m<o>del" not in page
    assert page.count("<svg") == 4 and "accuracy of answers by their length" in page
    rows = json.loads(Elements(page).scripts["rows"])
    assert [row["group"] for row in rows] == ["made24"] * 20 + ["made24.sequential"] * 20
    assert sum(row["correct"] for row in rows[:20]) == 13
    assert "40 answers." in page and "left out" not in page


def test_a_page_fetches_nothing(evaluated):
    _, page = evaluated
    assert not toy.fetches(page)
    tags = {tag for tag, _ in Elements(page).found}
    assert not tags & {"img", "link", "iframe", "object", "base"}
    policy = next(a for tag, a in Elements(page).found if "http-equiv" in a)
    assert "default-src 'none'" in policy["content"]


def test_what_is_packed_is_the_trace(tmp_path):
    trace = toy.nested()
    tree = trace.layout
    toy.write_traces(tmp_path / "traces" / "one.jsonl", [trace])
    found = unpacked(page_of(tmp_path), 0)
    assert found["ids"] == trace.token_ids and found["pieces"] == trace.pieces
    assert np.allclose(np.array(found["logp"]) / 100, trace.logp, atol=0.006)
    steps = np.cumsum(found["steps"]) + np.arange(len(tree))
    assert steps.tolist() == trace.step
    forced = np.zeros(len(tree), bool)
    for start, end in found["forced"]:
        forced[start:end] = True
    assert forced.tolist() == trace.forced
    begins = [*found["positions"], [len(tree), 0]]
    positions = [
        position + i
        for (begin, position), (after, _) in itertools.pairwise(begins)
        for i in range(after - begin)
    ]
    assert positions == tree.positions.tolist()
    assert [len(b["branches"]) for b in found["blocks"]] == [3, 2, 2]


def test_text_that_is_no_text_stays_text(tmp_path):
    names = ("prediction", "reference", "id", "finish_reason", "detail")
    trace = toy.made(toy.NASTY, toy.NASTY, **dict.fromkeys(names, toy.NASTY))
    toy.write_traces(tmp_path / "traces" / "nasty.jsonl", [trace])
    (tmp_path / "config.yaml").write_text(toy.NASTY.replace("\ud800", ""), encoding="utf-8")
    page = page_of(tmp_path)
    elements = Elements(page)
    assert not [tag for tag, _ in elements.found if tag in ("img", "b")]
    assert json.loads(elements.scripts["rows"])[0]["id"] == toy.NASTY
    assert unpacked(page, 0)["problem"] == toy.NASTY
    for character in ("\x00", "\u2028", "\u202e", "\x1b"):
        assert character not in page
    for drawing in (tree_svg(trace.pieces, trace.layout), visibility_svg(trace.layout)):
        xml.fromstring(drawing)
    file = io.StringIO()
    Console(file=file, width=60, color_system=None).print(terminal.draw(trace, 60))
    text = file.getvalue()
    assert "\x1b" not in text and "\u202e" not in text
    text.encode()
    assert "␛[31m" in text


def test_a_thousand_answers_of_two_thousand_stay_a_small_page(tmp_path):
    traces = [
        toy.made(f"Problem {i}", toy.block("a b c", "d e f"), i, id=str(i)) for i in range(50)
    ]
    toy.write_traces(tmp_path / "traces" / "many.jsonl", traces * 40)
    toy.write_traces(tmp_path / "traces" / "few.jsonl", traces[:10])
    page = page_of(tmp_path)
    rows = json.loads(Elements(page).scripts["rows"])
    assert [row["group"] for row in rows].count("few") == 10 and len(rows) == 1000
    assert "1,000 of 2,010 answers" in page and "1,010 are left out" in page
    assert "many, 2,000 answers" in page  # the charts are of all
    assert len(page) < 2_000_000
    assert "10 of 2,010 answers" in page_of(tmp_path, 10)
    assert 'id="viewer"' not in page_of(tmp_path, 0)


def test_shares_are_as_equal_as_the_sizes_allow():
    assert shares([5, 100, 100], 65) == [5, 30, 30]
    assert shares([3, 4], 100) == [3, 4]
    assert shares([10, 10, 10], 2) == [0, 1, 1]
    assert shares([], 10) == []


def test_a_run_that_is_not_over_shows_whole_lines(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        for step in range(1, 6):
            values = {"reward": step / 5, "finish/stop": 0.5, "my_number": 7.0, "note": "text"}
            values |= {"block_place": 0.2} if step > 2 else {}
            writer.write({"step": step, **values})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "rew')
    toy.write_traces(tmp_path / "traces" / "step-000005.jsonl", [toy.nested()])
    with (tmp_path / "traces" / "step-000005.jsonl").open("a") as file:
        file.write('{"problem": "cut o')
    page = page_of(tmp_path)
    titles = ("reward", "how answers finish", "my number", "step 1", ">5<")
    for title in (*titles, "first block and overlap of siblings"):
        assert title in page
    assert "step-000005" in page and "1 answers." in page
    assert "note" not in charts_of([{"step": 1, "note": "text"}])


def test_curves_leave_out_what_is_not_finite_and_thin_long_lines():
    assert charts_of([{"step": 1, "loss": float("nan")}]) == []
    line = thinned([(float(i), float(i)) for i in range(3000)])
    assert len(line) == 300 and line[0] == (4.5, 4.5) and line[-1] == (2994.5, 2994.5)


def figures(tokens, correct):
    return count([0] * tokens, layout(tokens), "stop", True, None, correct)


def test_accuracy_is_that_of_answers_of_like_length():
    judged = [figures(10 * i, i < 20) for i in range(40)]
    points = html.accuracy_by_tokens([*judged, figures(1, None)])
    assert len(points) == 8 and points[0] == (20.0, 1.0, "5") and points[-1] == (370.0, 0.0, "5")
    assert html.accuracy_by_tokens([]) == []


def test_answers_of_one_length_are_one_point():
    lengths = [50] * 30 + [57] * 9 + [58] + [90] * 20
    points = html.accuracy_by_tokens([figures(n, i % 2 == 0) for i, n in enumerate(lengths)])
    xs = [point.x for point in points]
    assert xs == sorted(set(xs)) and xs[0] == 50 and xs[-1] == 90
    assert sum(int(point.note) for point in points) == 60
    drawn = texts(chart("t", {"a": points}, (0, 1), "tokens"))
    assert {"30", "20"} <= {text for text, *_ in drawn}


def texts(svg):
    """(text, its left end, its right end) of a drawing, digits being as wide as they can be."""
    found = []
    for e in xml.fromstring(svg).iter():
        if e.tag.endswith("}text") and e.get("x"):
            wide, x = 0.56 * float(e.get("font-size", 11)) * len(e.text), float(e.get("x"))
            left = x - {"end": 1.0, "middle": 0.5}.get(e.get("text-anchor"), 0) * wide
            found.append((e.text, left, left + wide))
    return found


@pytest.mark.parametrize(
    "values", [(0.0, 5e-324), (-5e-324, 0.0), (5e-324, 5e-324), (0.0, 1e-299), (-1e300, 1e300)]
)
def test_numbers_of_any_size_are_drawn(values):
    xml.fromstring(chart("loss", {"loss": list(enumerate(values))}))


@given(
    st.floats(-1e12, 1e12, allow_subnormal=False) | st.floats(-1e-4, 1e-4, allow_subnormal=False),
    st.floats(1e-5, 1e5),
    st.booleans(),
)
def test_ticks_are_few_round_numbers_around_the_data(low, width, whole):
    high = low + width * max(abs(low), 1e-9)
    ticks = nice_ticks(low, high, whole)
    assert 2 <= len(ticks) <= 8 and ticks == sorted(set(ticks))
    slack = 1e-5 * (ticks[1] - ticks[0])
    assert ticks[0] <= low + slack and high - slack <= ticks[-1]
    shown = tick_texts(ticks)
    assert len(set(shown)) == len(ticks)
    for text, value in zip(shown, ticks, strict=True):
        assert float(text.replace(",", "")) == pytest.approx(value, rel=1e-9, abs=1e-9 * width)


@pytest.mark.parametrize(
    ("values", "first", "last"),
    [
        ([1.67e-5, 3.1e-5], "1.5e-5", "3.5e-5"),
        ([48.2812, 48.3121], "48.28", "48.32"),
        ([0.0, 151_936.0], "0", "200,000"),
        ([3.0, 3.0], "2.6", "3.4"),
        ([-2.5e-9, 0.0], "-2.5e-9", "0"),
        ([12_345_678.0, 12_345_679.5], "1.23456780e7", "1.23456795e7"),
    ],
)
def test_numbers_of_the_axes_are_round_and_whole(values, first, last):
    drawn = texts(chart("t", {"a": list(zip((2, 97), values, strict=True))}))
    shown = [text for text, *_ in drawn]
    assert first in shown and last in shown
    assert "step 20" in shown and "80" in shown
    assert all(left >= 0 and right <= 380 for _, left, right in drawn), drawn


def test_an_interval_of_no_width_is_one_number():
    def cell(**metric):
        return html.summary_table({"b": {"problems": 2, "samples": 1, "metrics": {"m": metric}}})

    assert "<td>1</td>" in cell(value=1.0, low=1.0, high=1.0)
    assert "<td>0.333</td>" in cell(value=1 / 3, low=0.33331, high=0.33329)
    assert "<td>1<small>0.500 to 1</small></td>" in cell(value=1.0, low=0.5, high=1.0)
    assert "<td>0.500</td>" in cell(value=0.5)
    assert "<td>–</td>" in cell(value=None)


def test_bars_are_shares():
    drawn = xml.fromstring(histogram("t", {"a": [1, 1, 1, 2]}, [0.5, 1.5, 2.5], "x"))
    bars = [float(e.get("height")) for e in drawn.iter() if e.tag.endswith("rect")]
    assert len(bars) == 2 and bars[0] == pytest.approx(3 * bars[1], rel=0.01)


def test_a_directory_with_nothing_and_a_broken_file_are_errors(tmp_path):
    with pytest.raises(ValueError, match="is no directory"):
        content.read(tmp_path / "none")
    with pytest.raises(ValueError, match=r"neither results\.json nor metrics\.jsonl"):
        content.read(tmp_path)
    (tmp_path / "traces").mkdir()
    (tmp_path / "traces" / "x.jsonl").write_text('{"problem": 1}\n')
    with pytest.raises(ValueError, match=r"x\.jsonl:1: this is no trace"):
        content.read(tmp_path)
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(ValueError, match=r"results\.json is not valid JSON"):
        content.read(tmp_path)


@pytest.mark.parametrize(
    "text, words",
    [
        ("[1]", "it holds list, needed is an object"),
        ("null", "it holds NoneType"),
        ('{"benchmarks": 3}', "benchmarks is int"),
        ('{"versions": [1]}', "versions is list"),
        ('{"benchmarks": {"a": 3}}', "benchmarks.a has no object metrics"),
        ('{"benchmarks": {"a": {"metrics": {}}}}', "benchmarks.a.problems is None"),
        (
            '{"benchmarks": {"a": {"problems": 1, "samples": 1, "metrics": {"m": {"v": "x"}}}}}',
            "benchmarks.a.metrics.m is {'v': 'x'}, needed are numbers",
        ),
        (
            '{"benchmarks": {"a": {"problems": 1, "samples": 1, "metrics": {"m": {"v": NaN}}}}}',
            "benchmarks.a.metrics.m is {'v': nan}",
        ),
        *(
            (
                json.dumps(
                    {"benchmarks": {"a": {"problems": 1, "samples": 1, "metrics": {"m": m}}}}
                ),
                "needed are numbers: value, or value, low and high",
            )
            for m in ({}, {"low": None}, {"value": 1, "low": 0})
        ),
        ("[" * 100_000, "is not valid JSON"),
    ],
)
def test_results_that_are_none_are_told_with_what_is_wrong(tmp_path, text, words):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(ValueError) as error:
        html.write(tmp_path)
    assert words in str(error.value) and "results.json" in str(error.value)
    assert not (tmp_path / "index.html").exists()


def test_a_picture_replaces_neither_the_traces_nor_the_other_picture(tmp_path):
    path, svg = tmp_path / "traces.jsonl", tmp_path / "a.svg"
    toy.write_traces(path, [toy.nested()])
    before = path.read_bytes()
    for pictures in ((path, None), (None, tmp_path / "." / path.name), (svg, svg)):
        with pytest.raises(ValueError, match="is given twice, a picture would replace it"):
            terminal.view(path, svg=pictures[0], visibility=pictures[1])
    assert path.read_bytes() == before and not svg.exists()


def covered(tree):
    seen = np.zeros((len(tree), len(tree)), int)
    for q0, q1, k0, k1 in rectangles(tree):
        seen[q0:q1, k0:k1] += 1
    return seen * np.tri(len(tree), dtype=int)


@pytest.mark.parametrize("cut", [None, 40, 90, 130])
def test_the_picture_of_visibility_is_the_visibility(cut):
    trace = toy.nested()
    text = "".join(trace.pieces[trace.prompt_len :])
    if cut:  # inside blocks
        words = toy.Words()
        names = words.encode(text)[:cut]
        pieces = {i: piece for piece, i in words.ids.items()}
        trace = toy.made("What is six times seven?", "".join(pieces[i] for i in names))
    tree = trace.layout
    assert np.array_equal(covered(tree), tree.visible())
    xml.fromstring(visibility_svg(tree))


def test_the_picture_of_a_long_answer_is_small():
    tree = toy.long(30000).layout
    assert len(visibility_svg(tree)) < 100_000
    assert len(visibility_svg(layout(30000))) < 2_000


def boxes(drawn):
    return [e for e in drawn.iter() if e.tag.endswith("rect")]


def test_the_tree_is_drawn_as_it_was_forked():
    trace = toy.nested()
    drawn = xml.fromstring(tree_svg(trace.pieces, trace.layout))
    assert len(boxes(drawn)) == 1 + 3 + 7  # the prompt, runs of the trunk, branches
    words = "".join("".join(e.itertext()) for e in drawn.iter() if e.tag.endswith("}text"))
    assert sorted(words) == sorted("".join(trace.pieces).replace("\n", ""))
    # A block that was decoded as plain text is plain text here too.
    flat = layout(len(trace.token_ids), (), trace.prompt_len)
    assert len(boxes(xml.fromstring(tree_svg(trace.pieces, flat)))) == 2


def test_sections_are_the_line_and_its_branches():
    trace = toy.nested()
    tree = trace.layout
    found = sections(tree, (trace.prompt_len, len(tree)))
    assert [len(section.branches) for section in found] == [3, 2, 0]
    inner = sections(tree, found[1].branches[0], 1)
    assert [len(section.branches) for section in inner] == [2, 0]
    spans = [found[0].run, *found[0].branches, found[1].run]
    assert all(a[1] == b[0] for a, b in itertools.pairwise(spans))


def test_view_shows_the_trace_that_is_asked_for(tmp_path):
    path = tmp_path / "t.jsonl"
    wrong = toy.nested(id="b", sample=1, correct=False, prediction=None, violations=["no answer"])
    toy.write_traces(path, [toy.nested(id="a"), wrong])
    pictures = {"svg": tmp_path / "tree.svg", "visibility": tmp_path / "sees.svg"}

    def viewed(width=100, **wanted):
        with (tmp_path / "out").open("w+", encoding="utf-8") as file:
            console = Console(file=file, width=width, color_system="truecolor", force_terminal=True)
            written = terminal.view(path, console=console, **wanted)
            file.seek(0)
            return file.read(), written

    text, written = viewed(number=1, **pictures)
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    assert "✓ right: answer 42, reference 42" in plain and "\x1b[" in text
    line = next(line for line in plain.splitlines() if "first thought" in line)
    assert "second thought" in line and "third" in line  # side by side
    assert max(map(len, plain.splitlines())) <= 100
    assert written == list(pictures.values())
    for picture in written:
        xml.parse(picture)
    plain = re.sub(r"\x1b\[[0-9;]*m", "", viewed(30, name="b", sample=1)[0])
    assert "✗ wrong: no answer found" in plain and "broken: no answer" in plain
    assert max(map(len, plain.splitlines())) <= 30
    for wanted in ({"number": 3}, {"number": 0}, {"name": "b"}, {"number": 1, "name": "a"}):
        with pytest.raises(ValueError, match=r"number|id"):
            viewed(**wanted)
    with pytest.raises(FileNotFoundError):
        terminal.view(tmp_path / "none.jsonl")
    with pytest.raises(OSError, match=r"cannot be written .*: give another file"):
        viewed(svg=tmp_path / "no" / "x.svg")


def test_levels_of_probability():
    styles = [terminal.style_of(x) for x in (0.0, -0.5, -1.0, -2.0, -9.0)]
    assert len(set(styles)) == 5
    assert terminal.style_of(float("nan")) == styles[-1]


def test_visible_leaves_text_alone():
    text = "plain, ünïcode 数学 אב 😀\n\ttabbed"
    assert visible(text) == text
    assert visible("\x00\x7f\u2028\ud800") == "␀␡⟨U+2028⟩⟨U+D800⟩"
