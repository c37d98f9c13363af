"""Problems from JSONL files, in a shuffled order that any step index can be looked up in."""

import json
from pathlib import Path
from typing import NamedTuple

import grain
import numpy as np


class Problem(NamedTuple):
    """A problem and its reference answer (LaTeX or plain, without `\\boxed`)."""

    problem: str
    answer: str


def read_problems(path: str | Path) -> list[Problem]:
    """Reads a JSONL file of objects with "problem" and "answer"; other keys are left alone.

    An answer may be a string or a number. Raises ValueError with file and line number for a line
    that is not such an object, FileNotFoundError if there is no file.
    """
    problems = []
    with Path(path).open("rb") as file:  # bytes: an error names the line that is not UTF-8
        for number, line in enumerate(file, 1):
            if line.strip():
                problems.append(_problem(line, f"{path}:{number}"))
    if not problems:
        raise ValueError(f"{path}: no problems, needed is one JSON object a line")
    return problems


def _problem(line: bytes, place: str) -> Problem:
    try:
        row = json.loads(line.decode())
        json.dumps(row, ensure_ascii=False).encode()  # half a surrogate pair is no text
    except ValueError as error:
        raise ValueError(f"{place}: not valid JSON: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f'{place}: {row!r} is no object with "problem" and "answer"')
    problem, answer = row.get("problem"), row.get("answer")
    if not isinstance(problem, str) or not problem.strip():
        raise ValueError(f'{place}: "problem" is {problem!r}, needed is a text')
    if isinstance(answer, bool) or not isinstance(answer, str | int | float) or answer == "":
        raise ValueError(f'{place}: "answer" is {answer!r}, needed is a text or a number')
    return Problem(problem, str(answer))


def shuffled(num: int, *path: int) -> grain.MapDataset:
    """An endless order of the indices 0..num-1: `order[i]` for any i, each epoch shuffled anew.

    It depends on the integers of `path`, as seeds do. A position in it is one integer, which is all
    that a checkpoint needs to go on from.
    """
    return grain.MapDataset.range(num).shuffle(seed=derive_seeds(1, *path)[0]).repeat()


def derive_seeds(num: int, *path: int) -> list[int]:
    """`num` seeds in [0, 2**31) that depend on the integers of `path` (seed, stage, step, ...)."""
    return [int(x) >> 1 for x in np.random.SeedSequence(path).generate_state(num)]
