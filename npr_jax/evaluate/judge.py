"""Judging: what there is to say of a finished answer.

    trajectory, reference --judge--> Answer --count--> Figures

Figures are all that metrics and charts are made of, in training, evaluation and reports alike.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from npr_jax.answers import equal, extract
from npr_jax.answers.check import Check
from npr_jax.answers.grade import check_many
from npr_jax.decode import Engine, Trajectory
from npr_jax.decode.outputs import TRUNCATED
from npr_jax.tree import TreeLayout
from npr_jax.tree.format import Violation, check_format


class Figures(NamedTuple):
    """What is counted of one answer. Tokens are those of the response, forced ones included.

    Attributes:
      prediction: the answer found in its text, or None.
      correct: whether that is right; None where there was no reference.
      formed: it keeps the format; truncated: a limit cut it off.
      tokens: all of them; critical_path: those on the longest path; parallel_tokens: those in
        branches of blocks of two or more, each counted once.
      blocks, branches: how many were forked; depth: levels of nested blocks; width: the most
        branches that can run at one time.
    """

    prediction: str | None
    correct: bool | None
    formed: bool
    truncated: bool
    tokens: int
    critical_path: int
    parallel_tokens: int
    blocks: int
    branches: int
    depth: int
    width: int

    @property
    def parallel(self) -> bool:
        """Whether branches ran beside each other."""
        return self.width > 1

    @property
    def right(self) -> bool:
        """`correct` of an answer to a problem with a reference."""
        assert self.correct is not None
        return self.correct


@dataclasses.dataclass(frozen=True, eq=False)
class Answer:
    """A finished answer, judged.

    Attributes:
      trajectory: what was decoded.
      violations: rules of the format that it breaks.
      prediction: the answer found in its text, or None.
      correct: whether that equals the reference.
    """

    trajectory: Trajectory
    violations: list[Violation]
    prediction: str | None
    correct: bool

    @functools.cached_property
    def figures(self) -> Figures:
        """What is counted of it."""
        answer = self.trajectory
        formed = not self.violations
        return count(answer.layout, answer.finish_reason, formed, self.prediction, self.correct)


def judge(
    engine: Engine,
    trajectories: Sequence[Trajectory],
    references: Sequence[str],
    check: Check = equal,
) -> list[Answer]:
    """Answers that `engine` decoded, judged against a reference each by `check`.

    What has no text makes no prediction; without tags nothing keeps the format. Raises
    FloatingPointError for an answer that ended with an error, which says nothing about its model's
    reasoning: neither a benchmark nor a reward may count it.
    """
    for trajectory in trajectories:
        if trajectory.finish_reason == "error":
            raise FloatingPointError(f"an answer ended with an error: {trajectory.detail}")
    predictions = [extract(trajectory.text or "") for trajectory in trajectories]
    correct = check_many(zip(predictions, references, strict=True), check)
    return [
        Answer(trajectory, violations(engine, trajectory), prediction, right)
        for trajectory, prediction, right in zip(trajectories, predictions, correct, strict=True)
    ]


def count(
    tree: TreeLayout,
    finish_reason: str,
    formed: bool,
    prediction: str | None,
    correct: bool | None,
) -> Figures:
    """The figures of an answer, from its layout and what was judged of it."""
    in_parallel = np.zeros(len(tree), bool)  # so that a token of nested branches counts once
    for block in tree.blocks:
        if len(block.steps) > 1:
            in_parallel[block.branches[0][0] : block.branches[-1][1]] = True
    return Figures(
        prediction=prediction,
        correct=correct,
        formed=formed,
        truncated=finish_reason in TRUNCATED,
        tokens=tree.total_len,
        critical_path=tree.critical_path_len,
        parallel_tokens=int(in_parallel.sum()),
        blocks=sum(bool(block.steps) for block in tree.blocks),
        branches=tree.num_branches,
        depth=tree.depth,
        width=tree.width,
    )


def violations(engine: Engine, answer: Trajectory) -> list[Violation]:
    """The rules of the format that an answer breaks; without tags nothing keeps it."""
    if engine.tags is None:
        return [Violation("no_tags", answer.prompt_len, "the tokenizer has no tags")]
    limit = engine.config.max_branches
    return check_format(answer.token_ids, answer.prompt_len, engine.tags, limit)
