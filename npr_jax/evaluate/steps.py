"""Which steps of an answer are right, and how well the first wrong one is found.

Labels of steps as SPARE has them (arXiv 2506.15498), the score of ProcessBench (arXiv 2412.06559).
"""

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import numpy as np

from npr_jax.answers import equal
from npr_jax.base.modules import load_module
from npr_jax.tree import TagIds, TreeLayout

Label = bool | None  # whether it is right; None: nobody knows
_NUMBER = re.compile(r"^\s*\d+\s*[:.)]\s*")  # of a plan or a line
_LABELS = {bool, np.bool_, type(None)}
# (problem, texts of the branches of an answer) -> the label of each
LabelBranches = Callable[[str, Sequence[str]], Sequence[Label]]


def find_labels(source: str) -> LabelBranches:
    """The function `label_branches` of a Python file (its path ends in .py) or of a module.

    It gets the texts between `<step>` and `</step>`, those of an inner block after all of the
    blocks that began before it. Raises ValueError where there is none.
    """
    found = getattr(load_module(source), "label_branches", None)
    if not callable(found):
        raise ValueError(
            f"branch_labels is {source!r}, which has no function label_branches(problem, branches)"
        )
    return cast(LabelBranches, found)


def label_blocks(
    label: LabelBranches,
    problem: str,
    token_ids: Sequence[int] | np.ndarray,
    tree: TreeLayout,
    tags: TagIds,
) -> list[list[Label]]:
    """The labels of an answer's branches, for each block of `tree`.

    Raises ValueError where `label` does not give one of True, False and None for each branch.
    """
    ids = np.asarray(token_ids).tolist()
    spans = [(start, end) for block in tree.blocks for start, end in block.steps]
    texts = [tags.text(ids[start:end]) for start, end in spans]
    branches = [x.removeprefix("<step>").removesuffix("</step>").strip() for x in texts]
    found = list(label(problem, branches))
    if len(found) != len(branches) or not {*map(type, found)} <= _LABELS:
        raise ValueError(
            f"label_branches gave {found!r:.60} for {len(branches)} branches of {problem!r:.40}, "
            "needed is True, False or None for each"
        )
    labels = iter(None if x is None else bool(x) for x in found)
    return [[next(labels) for _ in block.steps] for block in tree.blocks]


def align(
    plans: Sequence[str],
    branches: Sequence[str],
    reference: Sequence[str],
    same: Callable[[str, str], bool] = equal,
) -> list[Label]:
    """Labels of branches from a reference solution: a branch is aligned with the line that has its
    plan's label, and is right if it comes to the same result (SPARE's one-to-one case, by rule).

    A label is what stands before the first colon of a line, or is the whole plan, without the
    number before it, whatever its case and spaces. A result is what stands behind the last "=" of a
    text. None where no line has the label, where one of the two has no result, or where lines of
    one label have different ones.

    Args:
      plans, branches: texts, one each of a branch.
      reference: the lines of the solution.
      same: whether two results are the same.
    """
    known: dict[str, list[str]] = {}
    for line in reference:
        head, colon, _ = _NUMBER.sub("", line, count=1).partition(":")
        if colon and (result := _result(line)) is not None:
            known.setdefault(_plain(head), []).append(result)
    labels: list[Label] = []
    for plan, branch in zip(plans, branches, strict=True):
        results, own = known.get(_plain(_NUMBER.sub("", plan, count=1)), []), _result(branch)
        if own is None or not results or not all(same(x, results[0]) for x in results[1:]):
            labels.append(None)
        else:
            labels.append(same(own, results[0]))
    return labels


def _plain(label: str) -> str:
    return " ".join(label.casefold().split())


def _result(text: str) -> str | None:
    """What stands behind the last "=" of a text, to the end of that line."""
    _, sign, rest = text.rpartition("=")
    return rest.partition("\n")[0].strip() or None if sign else None


class StepScore(NamedTuple):
    """Shares in [0, 1].

    Attributes:
      error: of the answers with a wrong step, those whose first one was found.
      correct: of the answers without, those in which none was found.
      f1: the harmonic mean of the two.
    """

    error: float
    correct: float
    f1: float


def first_wrong(labels: Sequence[bool]) -> int | None:
    """The number, from 0, of the first step that is not right, or None."""
    return next((number for number, right in enumerate(labels) if not right), None)


def harmonic_mean(error: float, correct: float) -> float:
    """2ec / (e + c) of two shares, or of two percentages; 0 where both are 0."""
    return 2 * error * correct / (error + correct) if error + correct else 0.0


def score_steps(found: Sequence[int | None], known: Sequence[int | None]) -> StepScore:
    """Compares the first wrong steps that were `found` with those that are `known`.

    Args:
      found, known: for each answer the number of its first wrong step, or None.

    Raises ValueError where the two differ in length, or where of one kind (answers with a wrong
    step, and without) there is none: its share is not defined then.
    """
    pairs = list(zip(found, known, strict=True))
    faulty = [one == other for one, other in pairs if other is not None]
    clean = [one is None for one, other in pairs if other is None]
    if not faulty or not clean:
        raise ValueError(
            f"known has {len(faulty)} answers with a wrong step and {len(clean)} without, needed "
            "is at least one of each"
        )
    error, correct = sum(faulty) / len(faulty), sum(clean) / len(clean)
    return StepScore(error, correct, harmonic_mean(error, correct))
