"""How well the first wrong step of an answer is found: ProcessBench (arXiv 2412.06559)."""

from collections.abc import Sequence
from typing import NamedTuple


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
