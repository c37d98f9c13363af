"""Answers that Beta accepted: the records of rejection sampling, and their JSONL file."""

import bisect
import itertools
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypedDict

from npr_jax.base.distributed import gather, is_main
from npr_jax.base.files import json_text, whole_lines, write_atomically, writing

ACCEPTED = "accepted.jsonl"  # in a run directory


class Record(TypedDict):
    """What rejection sampling knows of a problem: its tries, and of the answers that it accepted
    the token ids, with those of the prompt, and the texts."""

    problem: str
    answer: str
    tries: int
    prompt_len: int
    accepted: list[list[int]]
    texts: list[str | None]  # as `Trajectory.text`


class Records:
    """The JSONL file of records, to which every round appends its own; `sizes`: of the rounds."""

    def __init__(self, path: Path, sizes: Sequence[int]):
        self.path, self._ends = path, list(itertools.accumulate(sizes, initial=0))
        self.last = 0

    def restore(self, state: list[Record]) -> tuple[int, list[Record], dict]:
        """The whole rounds that the file holds; what is left of another is cut off."""
        records = gather(read_records(self.path) if is_main() else [])[0]
        self.last = bisect.bisect(self._ends, len(records)) - 1
        records = records[: self._ends[self.last]]
        if is_main():
            with writing(self.path):
                write_atomically(self.path, _lines(records))
        return self.last, records, {}

    def save(
        self, step: int, state: list[Record], position: Mapping, value: float | None = None
    ) -> None:
        """Appends the records of round `step`, on disk when this returns."""
        if step == self.last:
            return
        if is_main():
            with writing(self.path), self.path.open("ab") as file:
                file.write(_lines(state[self._ends[self.last] :]))
                file.flush()
                os.fsync(file.fileno())
        self.last = step

    def __enter__(self) -> "Records":
        return self

    def __exit__(self, *exc_info) -> None:
        """Nothing is left to write."""


def _lines(records: Iterable[Record]) -> bytes:
    return "".join(json_text(record) + "\n" for record in records).encode()


def read_records(path: Path) -> list[Record]:
    """The whole lines of `path`; none if there is no file. Raises ValueError with file and line for
    one that is no record."""
    if not path.exists():
        return []
    return [record for _, record in whole_lines(path, "accepted.jsonl of Beta", _record)]


def _record(record: dict) -> Record:
    return Record(**{key: record[key] for key in Record.__annotations__})
