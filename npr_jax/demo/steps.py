"""Which steps of an answer to a sum of `npr_jax.demo.sums` are right, exactly."""

import re
from collections.abc import Sequence
from typing import NamedTuple

from npr_jax.demo.sums import Sum, true_value

_GROUP = re.compile(r"([A-D]):(\d)([+*])(\d)")
_STEP = re.compile(r"(?:\d+:)?([A-D]):(\d)([+*])(\d)=(\d)")
_CHAIN = re.compile(r"S:(\d)((?:\+\d=\d)*)")
_BOX = re.compile(r"\\boxed\{(\d)\}")


class Step(NamedTuple):
    """A line of an answer that claims something: a group's value, a chain of sums, the box."""

    text: str
    right: bool


def label_steps(problem: str, answer: str) -> list[Step]:
    """The lines of `answer` that claim something, in its order, and whether each is right.

    A step is judged by itself, from what was written before it: sums that go on from a wrong value
    are right. What makes a line wrong:

    - of a group, that the problem has no such group, or that it is the second line of the group, or
      that its value is not that of `true_value`;
    - of a chain, that it does not add up just the values that were written since the last chain,
      onto that chain's end, or that one of its sums is not true;
    - of the box, that it is not the last chain's end, or that a group of the problem has no line;
    - of any line, that it claims something in no form of the task.

    So an answer is right wherever it has a box and all of its steps are right. Tags and numbers are
    not judged here (`npr_jax.tree.format.check_format`). Raises ValueError for another problem.
    """
    groups = {name: (op, int(a), int(b)) for name, a, op, b in _GROUP.findall(problem)}
    if Sum(tuple(groups.values())).problem != problem:
        raise ValueError(f"problem is {problem!r:.60}, needed is one of the demo's: A:7+4;B:6*2?")
    left, values, total, steps = dict(groups), [], None, []
    for line in answer.splitlines():
        if not (line.startswith("S:") or "=" in line or "\\boxed" in line):
            continue  # a tag, a plan, what says nothing
        right = False
        if match := _STEP.fullmatch(line):
            name, a, op, b, value = match.groups()
            fact = (op, int(a), int(b))
            right = left.pop(name, None) == fact and int(value) == true_value(*fact)
            values.append(int(value))
        elif match := _CHAIN.fullmatch(line):
            terms, sums = [int(match[1])], [int(match[1])]
            for term, end in re.findall(r"\+(\d)=(\d)", match[2]):
                terms, sums = [*terms, int(term)], [*sums, int(end)]
            added = all(
                end == true_value("+", start, term)
                for start, term, end in zip(sums, terms[1:], sums[1:], strict=False)
            )
            right = added and terms == [*([] if total is None else [total]), *values]
            values, total = [], sums[-1]
        elif match := _BOX.fullmatch(line):
            right = int(match[1]) == total and not values and not left
        steps.append(Step(line, right))
    return steps


def label_branches(problem: str, branches: Sequence[str]) -> list[bool]:
    """Whether each branch of an answer is right, for PAPO's `branch_labels`: whether it claims
    something, and `label_steps`, asked of the branches alone, finds all of that right.

    Raises ValueError for another problem.
    """
    labels, before = [], 0
    for number in range(1, len(branches) + 1):
        steps = label_steps(problem, "\n".join(branches[:number]))
        labels.append(len(steps) > before and all(step.right for step in steps[before:]))
        before = len(steps)
    return labels
