"""Labels of the demo's steps are exact, and ProcessBench's score is the published one."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from npr_jax.answers import equal, extract
from npr_jax.demo.steps import label_branches, label_steps
from npr_jax.demo.sums import DEFECTS, Sum, Teacher, draw, ideal, true_value, write
from npr_jax.evaluate.steps import StepScore, align, first_wrong, harmonic_mean, score_steps

TASKS = draw(1000, np.random.default_rng(0))


@pytest.mark.parametrize(
    "error, correct, f1",
    [
        (18.0, 82.0, 29.5),
        (21.4, 80.0, 33.8),
        (6.1, 91.6, 11.4),
        (16.0, 89.2, 27.1),
        (48.0, 90.1, 62.6),
        (15.0, 71.1, 24.8),
        (11.1, 85.0, 19.6),
        (35.7, 87.3, 50.7),
    ],
)
def test_f1_is_that_of_the_papers(error, correct, f1):
    """Percentages of arXiv 2506.15498 and 2412.06559."""
    assert round(harmonic_mean(error, correct), 1) == f1


def test_the_score_by_hand():
    known = [0, 2, 2, 5, None, None, None]
    found = [0, 2, 1, None, None, None, 0]
    assert score_steps(found, known) == StepScore(2 / 4, 2 / 3, pytest.approx(4 / 7))
    assert score_steps(known, known) == (1, 1, 1)
    assert score_steps([None] * 2, [0, None]) == (0, 1, 0)
    assert score_steps([1, 1], [0, None]).f1 == 0  # and not 0 / 0
    assert [first_wrong(x) for x in ([], [True], [False], [True, False, False])] == [
        None,
        None,
        0,
        1,
    ]


@pytest.mark.parametrize("known, message", [([1, 2], "2 .* and 0 without"), ([None], "has 0 ")])
def test_a_score_that_is_not_defined_is_refused(known, message):
    with pytest.raises(ValueError, match=message):
        score_steps(known, known)


class Told:
    """A teacher that remembers the value of each fact that it was asked for, in order."""

    def __init__(self, teacher, rng):
        self.teacher, self.rng, self.told = teacher, rng, []

    def __call__(self, fact):
        self.told.append((fact, self.teacher.value(fact, self.rng)))
        return self.told[-1][1]


def by_arithmetic(task, told) -> list[bool]:
    """What the steps of an answer must be, from the facts in the order in which `write` asks."""
    asked, labels = iter(told), []
    cuts = [0, task.split, len(task.groups)] if task.split else [0, len(task.groups)]
    for block, (start, end) in enumerate(itertools.pairwise(cuts)):
        chain = True
        for number in range(start, end):
            (op, a, b), value = next(asked)
            labels.append(value == (a + b if op == "+" else a * b) % 10)
            if block or number > start:
                (_, a, b), value = next(asked)
                chain &= value == (a + b) % 10
        labels.append(chain)
    assert next(asked, None) is None
    return [*labels, True]  # the teacher's box repeats its last sum


@pytest.mark.parametrize("defect", [None, *DEFECTS])
def test_labels_are_those_of_an_arithmetic_oracle(defect):
    rng = np.random.default_rng(1)
    tasks = TASKS if defect is None else TASKS[:100]
    wrong = []
    for number, task in enumerate(tasks):
        told = Told(Teacher(number % 7), rng)
        answer = write(task, told, defect, rng)
        steps = label_steps(task.problem, answer)
        labels = [step.right for step in steps]
        assert labels == by_arithmetic(task, told.told), answer
        wrong += [value != true_value(*fact) for fact, value in told.told]
        if not defect:
            # Two errors may cancel, but no error comes without a wrong step.
            assert equal(extract(answer), task.answer) or first_wrong(labels) is not None
    # A quarter of the facts has another value, which three times in four is believed.
    assert abs(np.mean(wrong) - 0.25 * 0.75) < 0.05


def test_a_planted_error_is_found_where_it_is():
    """One fact is false, and what follows goes on from it."""
    for task in TASKS[:200]:
        for planted in range(2 * len(task.groups) - 1):
            asked = []

            def value(fact, asked=asked, planted=planted):
                asked.append(fact)
                return (true_value(*fact) + (len(asked) == planted + 1)) % 10

            steps = label_steps(task.problem, write(task, value, None, None))
            op, a, b = asked[planted]
            (found,) = [step for step in steps if not step.right]
            assert f"{a}{op}{b}=" in found.text or f"+{b}=" in found.text


def test_all_steps_of_the_right_answer_are_right():
    assert all(step.right for task in TASKS for step in label_steps(task.problem, ideal(task)))


@pytest.mark.parametrize(
    "before, after, wrong",
    [
        ("B:6*2=2", "B:6*2=3", "2:B:6*2=3"),  # a false value
        ("B:6*2=2", "B:6+2=8", "2:B:6+2=8"),  # true, and not the problem's
        ("B:6*2=2", "A:7+4=1", "2:A:7+4=1"),  # a group twice
        ("B:6*2=2", "B:6*2=", "2:B:6*2="),  # no form
        ("S:1+2=3+2=5", "S:1+2=3", "S:1+2=3"),  # a value left out
        ("S:1+2=3+2=5", "S:1+2=3+3=6", "S:1+2=3+3=6"),  # another value
        ("S:1+2=3+2=5", "S:1+2=4+2=5", "S:1+2=4+2=5"),  # false sums
        ("boxed{5}", "boxed{6}", "\\boxed{6}"),
        ("<step>\n3:C:7*6=2\n</step>\n", "", "S:1+2=3+2=5"),  # a value from nowhere
    ],
)
def test_what_makes_a_step_wrong(before, after, wrong):
    problem = "A:7+4;B:6*2;C:7*6?"
    right = ideal(Sum((("+", 7, 4), ("*", 6, 2), ("*", 7, 6))))
    assert before in right and all(x.right for x in label_steps(problem, right))
    steps = label_steps(problem, right.replace(before, after))
    assert next(x.text for x in steps if not x.right) == wrong


@st.composite
def edited(draw):
    """A task, and its right answer with a few of its lines taken out, put elsewhere or changed."""
    task = TASKS[draw(st.integers(0, 99))]
    lines = ideal(task).splitlines()
    for _ in range(draw(st.integers(0, 3))):
        at, to = (draw(st.integers(0, len(lines) - 1)) for _ in range(2))
        match draw(st.sampled_from(["cut", "copy", "move", "digit"])):
            case "cut" if len(lines) > 1:
                del lines[at]
            case "copy":
                lines.insert(to, lines[at])
            case "move":
                lines.insert(to, lines.pop(at))
            case "digit":
                digits = [i for i, x in enumerate(lines[at]) if x.isdigit()]
                if digits:
                    i = draw(st.sampled_from(digits))
                    new = str(draw(st.integers(0, 9)))
                    lines[at] = lines[at][:i] + new + lines[at][i + 1 :]
    return task, "\n".join(lines)


@settings(deadline=None, max_examples=300)
@given(edited())
def test_where_all_steps_are_right_the_answer_is(case):
    task, answer = case
    prediction = extract(answer)
    if prediction is not None and all(x.right for x in label_steps(task.problem, answer)):
        assert prediction == task.answer


@pytest.mark.parametrize("problem", ["", "What is 2+2?", "A:7+4;C:6*2?", "B:1+1?", "A:1+1"])
def test_another_problem_is_refused(problem):
    with pytest.raises(ValueError, match="needed is one of the demo's"):
        label_steps(problem, "A:1+1=2")


def lines_of(task, value) -> tuple[list[str], list[str]]:
    """Plans and branches of an answer in the demo's form."""
    plans, branches = [], []
    for number, (letter, (op, a, b)) in enumerate(zip("ABCD", task.groups, strict=False), 1):
        plans.append(f"{number}:{letter}")
        branches.append(f"{number}:{letter}:{a}{op}{b}={value((op, a, b))}")
    return plans, branches


def test_labels_by_alignment_are_the_exact_ones():
    """Of the demo's sums, whose right answer is the reference, in any order of its lines."""
    rng, wrong = np.random.default_rng(2), 0
    for number, task in enumerate(TASKS[:300]):
        teacher = Teacher(number % 7)
        plans, branches = lines_of(task, lambda fact, t=teacher: t.value(fact, rng))
        reference = lines_of(task, lambda fact: true_value(*fact))[1] + ["S:1+2=3", "So it is."]
        reference = [line.partition(":")[2] for line in reference]  # without its number
        labels = align(plans, branches, rng.permutation(reference).tolist())
        assert labels == label_branches(task.problem, branches)
        wrong += labels.count(False)
    assert wrong > 50


@pytest.mark.parametrize(
    "plan, branch, expected",
    [
        ("1: the  Area", "1: 3 * 4 = 12", True),
        ("2. THE AREA ", "so it is = 12.0", True),  # equality of values
        ("the area", "3 * 4\n= 13\nwhich is all", False),
        ("the area", "it is twelve", None),  # no result
        ("the area", "x =", None),
        ("the volume", "= 12", None),  # no line
        ("the sum", "= 7", None),  # two lines with different results
        ("the edge", "= 2", True),  # two lines with the same
        ("the height", "= 3", None),  # its line has no result
    ],
)
def test_a_branch_is_aligned_with_the_line_of_its_plan(plan, branch, expected):
    reference = [
        "1. The area: 3 * 4 = 12",
        "the sum: 3 + 4 = 7",
        "the sum: 7 + 1 = 8",
        "the edge: x = 4 / 2 = 2",
        "the edge: x = 2.0",
        "the height: three",
        "= 12",
    ]
    assert align([plan], [branch], reference) == [expected]
    with pytest.raises(ValueError):
        align([plan, plan], [branch], reference)
