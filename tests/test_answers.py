"""Answers: what is extracted, agreement with the golden verdicts, and no input that breaks it."""

import random
import subprocess
import sys
import threading
import time
from fractions import Fraction
from pathlib import Path

import pytest
from answer_cases import EQUAL, UNEQUAL
from conftest import examples, read_golden
from hypothesis import given, settings
from hypothesis import strategies as st

from npr_jax.answers import equal, equal_many, extract, grade
from npr_jax.answers.read import read


@pytest.mark.parametrize(
    "text, answer",
    [
        (r"so \boxed{42}.", "42"),
        (r"\boxed{1} and \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed {3}", "3"),
        (r"\\boxed{4}", "4"),
        (r"\boxed{ a b }", "a b"),
        (r"\boxed{1} then \boxed{2", "1"),
        (r"\boxed{5 and \boxed{6}", "6"),
        (r"\boxed{\boxed{7}}", "7"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{[1, 2\}}", r"[1, 2\}"),
        (r"\boxed{a \\{b}}", r"a \\{b}"),
        (r"}}} \boxed{8}", "8"),
        (r"{ \boxed{9}", "9"),
        (r"\boxed{}", ""),
        (r"\boxed{1}</takeaway> \boxed{2} </takeaway> \boxed{3} x", "3"),
        (r"\boxed{1}</takeaway> none", None),
        (r"\boxed{1</takeaway>2}", None),
        (r"\boxed 5", None),
        (r"boxed{5}", None),
        ("", None),
    ],
)
def test_extract(text, answer):
    assert extract(text) == answer


groups = st.recursive(
    st.text("ab1 ", max_size=4),
    lambda inner: st.lists(inner.map(lambda t: f"{{{t}}}")).map("".join),
)


@settings(deadline=None)
@given(st.text(r"\{}boxed a", max_size=30), groups, st.text("ab }", max_size=9))
def test_extract_finds_a_balanced_box_after_anything_closed(before, content, after):
    # A box after any prefix is the last to start, so it is the one found.
    assert extract(before + r" \boxed{" + content + "}" + after) == content.strip()


@pytest.mark.parametrize(
    "text",
    [
        "{" * 1_000_000,
        "}" * 1_000_000,
        "\\" * 1_000_000,
        r"\boxed{" * 150_000,
        r"\boxed" * 150_000,
        r"\boxed" + " " * 1_000_000,
        r"\boxed{" + "{" * 500_000 + "}" * 500_000,
        "</takeaway>" * 90_000,
    ],
)
def test_extract_is_linear(text, patience):
    began = time.perf_counter()
    extract(text)
    assert time.perf_counter() - began < 5 * patience


@pytest.mark.parametrize(
    "prediction, reference, same",
    [
        ("42", "42", True),
        ("042", "+42", True),
        ("-42", "42", False),
        (" x ", "x", True),
        (r"\frac{1}{2}", "0.5", True),
        (r"\frac{2}{4}", r"\frac12", True),
        (r"\frac{1}{3}", r"\frac12", False),
        ("(1,2)", "(2,1)", False),
        ("", "", False),
        (None, "1", False),
        (r"\text{yes", "1", False),
    ],
)
def test_equal(prediction, reference, same):
    assert equal(prediction, reference) is same


def test_plain_cases_start_no_process(monkeypatch):
    monkeypatch.setattr(grade, "_worker", None)
    assert equal_many([("7", "7"), ("7", "8"), ("a+b", "a+b"), (None, "1"), ("x" * 9999, "1")]) == [
        *[True, False, True, False, False],
    ]


HOSTILE = [
    "2^{2^{2^{2^{9}}}}",
    r"\binom{10^9}{5*10^8}",
    "{" * 1_000_000,
    "{" * 1900,
    r"\frac{" * 300,
    "\0",
    "1\0",
    "\ud800",
    "\n\r\u2028",
    "9" * 1900 + ".5",
    "9" * 6000,
    r"\boxed{1",
    "$" * 100,
    "\\",
    r"\frac{1}{1+" * 150 + "1" + "}" * 150,
    "1+" * 900 + "1",
    "(" * 900 + "1" + ")" * 900,
    "x^{" * 30 + "9" + "}" * 30,
    "(x+1)^{9999}",
    "9!!!",
    r"\{" + "1," * 900 + r"1\}",
    "$" * 1999 + "1",
    " " * 1000 + r"\text{" + " " * 900,
    r"\boxed{" * 280,
]


@pytest.mark.slow
@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_answers_are_unequal_soon_and_harm_no_other(text, patience):
    equal("x+1", "1+x")  # the worker is up
    began = time.perf_counter()
    assert equal(text, r"\frac{3}{4}") is False
    seconds = time.perf_counter() - began
    assert equal(r"\frac{6}{8}", r"\frac{3}{4}") is True
    # Two seconds of CPU at most, one to start the next worker; the rest is for a busy machine.
    assert seconds < 10 * patience


def test_a_killed_worker_is_replaced():
    assert equal(r"\frac{6}{8}", r"\frac{3}{4}")
    grade._worker._process.kill()
    grade._worker._process.wait()
    assert not equal(r"\frac{6}{8}", r"\frac{3}{4}")
    assert equal(r"\frac{6}{8}", r"\frac{3}{4}")


def test_the_worker_is_one_process_without_jax():
    assert equal("1+x", "x+1")
    process = grade._worker._process
    assert equal("2+x", "x+2") and grade._worker._process is process
    maps = Path(f"/proc/{process.pid}/maps")
    if not maps.exists():
        pytest.skip("needs /proc")
    assert "jaxlib" not in maps.read_text()


def test_threads_get_their_own_answers():
    random_numbers = random.Random(0)
    cases = [(random_numbers.randrange(9), random_numbers.randrange(2)) for _ in range(40)]
    results = {}

    def check(i, number, right):
        results[i] = equal(f"{number}+x", f"x+{number if right else number + 1}")

    threads = [threading.Thread(target=check, args=(i, *c)) for i, c in enumerate(cases)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [results[i] for i in range(40)] == [bool(right) for _, right in cases]


FORK = """
import multiprocessing
from npr_jax.answers import grade

def worker():
    assert grade.equal("2+x", "x+2")
    return grade._worker._process.pid

ours = worker()
with multiprocessing.get_context("fork").Pool(1) as pool:
    assert pool.apply(worker) != ours
assert worker() == ours
"""


def test_a_forked_child_has_its_own_worker():
    # In a process of its own: this one has threads of JAX, which do not survive a fork.
    subprocess.run([sys.executable, "-c", FORK], check=True, timeout=600)


def triples(table):
    kinds = {}
    for line in table.strip("\n").split("\n"):
        kind, prediction, reference = line.split("\t")
        kinds.setdefault(kind, []).append((prediction, reference))
    return kinds.items()


@pytest.mark.parametrize("kind, pairs", triples(EQUAL), ids=lambda value: str(value)[:12])
def test_answers_written_in_two_ways_are_equal(kind, pairs):
    assert [pair for pair in pairs if not equal(*pair)] == []


@pytest.mark.parametrize("kind, pairs", triples(UNEQUAL), ids=lambda value: str(value)[:12])
def test_near_misses_are_unequal_whichever_is_the_reference(kind, pairs):
    pairs = pairs + [(reference, prediction) for prediction, reference in pairs]
    assert [pair for pair in pairs if equal(*pair)] == []


def spellings(value: Fraction) -> list[str]:
    n, d, sign = abs(value.numerator), value.denominator, "-" if value < 0 else ""
    found = [
        rf"{sign}\frac{{{n}}}{{{d}}}",
        f"{sign}{3 * n}/{3 * d}",
        rf"$x = {sign}\dfrac{{{n}}}{{{d}}}$",
    ]
    found += [rf"{sign}{n} \cdot {d}^{{-1}}", rf"\boxed{{{sign}\left({n}/{d}\right)}}."]
    if d == 1:
        found += [f"{sign}{n:,}", f"{sign}{n}.0", rf"{sign}{n}\text{{ cm}}"]
    elif n > d:
        found += [rf"{sign}{n // d}\frac{{{n % d}}}{{{d}}}", f"{sign}{n // d} {n % d}/{d}"]
    return found


@settings(deadline=None, max_examples=examples(60))
@given(st.data())
def test_spellings_of_a_number_equal_those_of_no_other(data):
    values = st.fractions(-3000, 3000, max_denominator=12)
    a = data.draw(values)
    b = data.draw(
        st.sampled_from([a, -a, a + 1, a * 100, a / 100, a + Fraction(1, 10**9)]) | values
    )
    prediction = data.draw(st.sampled_from(spellings(a)))
    reference = data.draw(st.sampled_from(spellings(b)))
    assert equal(prediction, reference) is (a == b)


PIECES = [r"\frac", r"\sqrt", "[", "]", "{", "}", "(", ")", r"\{", r"\}", "1", "2.5", "x", "^", "_"]
PIECES += ["+", "-", "=", "<", r"\le", r"\in", r"\pm", ",", ";", r"\text{m}", r"\%", "$", "|", "!"]
PIECES += [" and ", " ", r"\begin{pmatrix}", "&", r"\\", r"\end{pmatrix}", r"\cup", r"\boxed{"]


@settings(deadline=None, max_examples=examples(300))
@given(st.lists(st.sampled_from(PIECES)).map("".join))
def test_every_text_has_a_form_that_equals_itself(text):
    assert read(text) == read(f" {text} ")
    assert equal(text, text) is bool(text.strip())


@pytest.mark.slow
def test_agreement_with_the_golden_verdicts(record_property):
    cases = read_golden("answers")["cases"]
    verdicts = equal_many([(case["prediction"], case["reference"]) for case in cases])
    wrong = [c for c, verdict in zip(cases, verdicts, strict=True) if verdict != c["equal"]]
    settled = [case for case in cases if not case["contestable"]]
    agreement = 1 - sum(not case["contestable"] for case in wrong) / len(settled)
    record_property("agreement", agreement)
    assert agreement >= 0.99, wrong
    assert [case for case in wrong if not case["equal"]] == []  # nothing wrong is accepted
    document = (Path(__file__).parents[1] / "docs/answers.md").read_text()
    listed = {line for line in document.splitlines() if line.startswith("| `")}
    for case in wrong:
        start = f"| `{case['prediction']}` | `{case['reference']}` | {str(case['equal']).lower()} |"
        assert any(line.startswith(start) for line in listed), f"docs/answers.md lacks {start}"
    assert len(listed) == len({(case["prediction"], case["reference"]) for case in wrong})


def test_rewards_rejection_sampling_and_inference_judge_by_this_module():
    package = Path(grade.__file__).parents[1]
    users = {
        str(path.relative_to(package))
        for path in package.rglob("*.py")
        if "math_verify" in path.read_text() or "latex2sympy" in path.read_text()
    }
    assert users <= {"answers/grade.py", "answers/match.py"}
    judge = (package / "evaluate/judge.py").read_text()
    assert "import equal, extract" in judge and "check: Check = equal," in judge
