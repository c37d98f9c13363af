"""Problems in a shuffled order that any step index can be looked up in, in shares per process."""

from pathlib import Path
from typing import Protocol, cast

import grain

from npr_jax.base.seeds import derive_seeds
from npr_jax.data.sources import FORMS, BadRow, Problem, parse_row, read_rows

_NEEDED = (
    'JSONL of "problem" and "answer", or a directory that `npr-jax data prepare` made: set problems'
)


def read_problems(path: str | Path) -> list[Problem]:
    """Reads the problems of a JSONL file, or of a directory that `npr-jax data prepare` made.

    A line of JSONL (plain or gzip) is an object with "problem" and "answer", a text or a number;
    other keys are left alone. The order is that of the file; in a directory, of its source.
    Raises ValueError with file and line number for a line that is not such an object, and for a
    directory that is not such a data set; FileNotFoundError if there is nothing.
    """
    if Path(path).is_dir():
        from npr_jax.data.builders import read_prepared

        return read_prepared(path)
    problems = []
    form = FORMS["jsonl"]
    for row in read_rows(path, form.unit, _NEEDED):
        try:
            problems.append(parse_row(row.raw, form))
        except BadRow as error:
            raise ValueError(
                f"{path}:{row.number}: {error} (`npr-jax data prepare` sets bad lines aside)"
            ) from error
    if not problems:
        raise ValueError(f"{path}: no problems, needed is one JSON object a line")
    return problems


class Order(Protocol):
    """An endless order of the indices of a list."""

    def __getitem__(self, index: int) -> int: ...


def shuffled(num: int, *path: int) -> Order:
    """An endless order of the indices 0..num-1: `order[i]` for any i, each epoch shuffled anew.

    It depends on the integers of `path`, as seeds do. A position in it is one integer, which is all
    that a checkpoint needs to go on from.
    """
    endless = grain.MapDataset.range(num).shuffle(seed=derive_seeds(1, *path)[0]).repeat()
    return cast(Order, endless)  # which has an element at every index
