"""Answers: what is extracted, agreement with the golden verdicts, and no input that breaks it."""

import gzip
import json
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import shared_path
from hypothesis import given, settings
from hypothesis import strategies as st

from npr_jax import answers
from npr_jax.answers import equal, equal_many, extract


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
def test_extract_is_linear(text):
    began = time.perf_counter()
    extract(text)
    assert time.perf_counter() - began < 5


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
    monkeypatch.setattr(answers, "_worker", None)
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
]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_answers_are_unequal_soon_and_harm_no_other(text):
    equal("x+1", "1+x")  # the worker is up
    began = time.perf_counter()
    assert equal(text, r"\frac{3}{4}") is False
    seconds = time.perf_counter() - began
    assert equal(r"\frac{6}{8}", r"\frac{3}{4}") is True
    # Two seconds of CPU at most, one to start the next worker; the rest is for a busy machine.
    assert seconds < 10


def test_a_killed_worker_is_replaced():
    assert equal(r"\frac{6}{8}", r"\frac{3}{4}")
    answers._worker._process.kill()
    answers._worker._process.wait()
    assert not equal(r"\frac{6}{8}", r"\frac{3}{4}")
    assert equal(r"\frac{6}{8}", r"\frac{3}{4}")


def test_the_worker_is_one_process_without_jax():
    assert equal("1+x", "x+1")
    process = answers._worker._process
    assert equal("2+x", "x+2") and answers._worker._process is process
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
from npr_jax import answers

def worker():
    assert answers.equal("2+x", "x+2")
    return answers._worker._process.pid

ours = worker()
with multiprocessing.get_context("fork").Pool(1) as pool:
    assert pool.apply(worker) != ours
assert worker() == ours
"""


def test_a_forked_child_has_its_own_worker():
    # In a process of its own: this one has threads of JAX, which do not survive a fork.
    subprocess.run([sys.executable, "-c", FORK], check=True, timeout=120)


def test_agreement_with_the_golden_verdicts(record_property):
    with gzip.open(shared_path("golden/answers.json.gz")) as file:
        cases = [case for case in json.load(file)["cases"] if not case["contestable"]]
    verdicts = equal_many([(case["prediction"], case["reference"]) for case in cases])
    wrong = [
        (case["prediction"], case["reference"], case["equal"])
        for case, verdict in zip(cases, verdicts, strict=True)
        if verdict != case["equal"]
    ]
    agreement = 1 - len(wrong) / len(cases)
    record_property("agreement", agreement)
    assert agreement >= 0.97, f"{agreement:.3f}; wrong: {wrong}"
