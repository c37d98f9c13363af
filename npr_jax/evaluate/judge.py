"""Judging: what there is to say of a finished answer.

    trajectory, reference --judge--> Answer --count--> Figures

Figures are all that metrics and charts are made of, in training, evaluation and reports alike.
"""

import dataclasses
import functools
import itertools
from collections import Counter
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
from npr_jax.tree.rules import PAPER

NGRAM = 2  # tokens of a run that siblings are compared by


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
      block_place: tokens before the first block that forked, by all tokens; None without one.
      path_overlap: `overlap` of the steps of a block, mean over all pairs of siblings; None where
        no siblings have joined.
      score: of its branches together, in [0, 1] (`verdicts.answer_score`); None where no step head
        was asked.
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
    block_place: float | None = None
    path_overlap: float | None = None
    score: float | None = None

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
        return count(
            answer.token_ids,
            answer.layout,
            answer.finish_reason,
            formed,
            self.prediction,
            self.correct,
        )


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
    token_ids: Sequence[int] | np.ndarray,
    tree: TreeLayout,
    finish_reason: str,
    formed: bool,
    prediction: str | None,
    correct: bool | None,
) -> Figures:
    """The figures of an answer, from its tokens, its layout and what was judged of it."""
    in_parallel = np.zeros(len(tree), bool)  # so that a token of nested branches counts once
    for block in tree.blocks:
        if len(block.steps) > 1:
            in_parallel[block.branches[0][0] : block.branches[-1][1]] = True
    first = next((block.start for block in tree.blocks if block.steps), None)
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
        block_place=None if first is None else (first - tree.prompt_len) / tree.total_len,
        path_overlap=path_overlap(token_ids, tree),
    )


def path_overlap(token_ids: Sequence[int] | np.ndarray, tree: TreeLayout) -> float | None:
    """How alike siblings are: the mean `overlap` of all pairs of a block's steps, of what was
    sampled in them; None where no block of two or more has joined."""
    ids, found = np.asarray(token_ids), []
    for block in tree.blocks:
        if block.takeaway is None:
            continue  # cut off, and a step of it perhaps, too
        inside = [np.arange(start, end - 1) for start, end in block.steps]  # without </step>
        steps = [ids[own[~tree.forced[own]]].tolist() for own in inside]
        found += [overlap(a, b) for a, b in itertools.combinations(steps, 2)]
    return float(np.mean(found)) if found else None


def overlap(a: Sequence[int], b: Sequence[int], n: int = NGRAM) -> float:
    """ROUGE-n F1 of two runs of tokens (Lin 2004): n-grams that they share, each as often as both
    have it, by the mean of how many they have; 1 for equal runs, 0 without a common n-gram.

    A run of fewer than n tokens is one n-gram.
    """
    ours, theirs = (
        Counter(zip(*(run[i:] for i in range(n)), strict=False))
        if len(run) >= n
        else Counter([tuple(run)])
        for run in (a, b)
    )
    return 2 * (ours & theirs).total() / (ours.total() + theirs.total())


def violations(engine: Engine, answer: Trajectory) -> list[Violation]:
    """The rules of the format that an answer breaks; without tags nothing keeps it."""
    if engine.tags is None:
        return [Violation("no_tags", answer.prompt_len, "the tokenizer has no tags")]
    limit = engine.config.max_branches
    rules = answer.layout.rules if answer.layout.blocks else PAPER  # of what was forked
    return check_format(answer.token_ids, answer.prompt_len, engine.tags, limit, rules=rules)
