"""The tables of rows, on the host and as the device has them: only cells that change are sent.

A table lists the pages of its segments in order. Its last segment grows; the others are sealed.
Which rows begin with the same pages is found here too, from the tables alone.
"""

import itertools
from collections import abc

import numpy as np

from npr_jax.decode.attention import FAR, TOGETHER, Shared
from npr_jax.decode.sequence import Segment
from npr_jax.decode.steps import Rows

CELLS = 512  # that one call writes
_WORTH = 64  # entries from which on a run of pages is read together


class Tables:
    """The tables of the rows that `rows` (on the device) has.

    `write(rows, cells, ends)` is the compiled step of that name; `size`: tokens of a page.
    """

    def __init__(self, rows: Rows, size: int, write: abc.Callable):
        self._rows, self._size, self._write = rows, size, write
        num_rows, width = rows.table.shape
        self._cells = np.zeros((num_rows, width, 2), np.int32)  # page, entries before it
        self._cells[:, :, 1] = FAR
        self._used = [0] * num_rows  # columns that list a page
        self._ends = np.zeros((num_rows, 3), np.int32)
        self._changed: list[tuple[int, np.ndarray]] = []  # row, columns
        self._names = [b""] * num_rows  # the pages of each row when it was set, to sort by
        # What rows have in common, until one is set again: what they grow by is their own.
        self._found: dict[tuple[int, ...], Shared] = {}

    def set(self, row: int, segments: abc.Sequence[Segment]) -> None:
        """The row lists these segments from now on, and the last of them grows."""
        tail = segments[-1]
        used = sum(len(segment.pages) for segment in segments)
        cells = np.zeros((max(used, self._used[row]), 2), np.int32)
        column = entry = 0
        for segment in segments:
            end = column + len(segment.pages)
            if segment.row is None:
                segment.row = np.array(segment.pages, np.int32)
            cells[column:end, 0] = segment.row
            cells[column:end, 1] = entry + self._size * np.arange(end - column)
            if segment is tail:
                break
            column, entry = end, entry + len(segment.tokens)
        cells[used:, 1] = FAR
        old = self._cells[row, : len(cells)]
        changed = np.flatnonzero((cells != old).any(axis=1))
        old[changed] = cells[changed]
        self._changed.append((row, changed))
        self._used[row] = used
        self._ends[row] = column, entry, entry + self._size * len(tail.pages)
        self._names[row] = cells[:used, 0].astype(">i4").tobytes()
        self._found.clear()

    def grow(self, row: int, tail: Segment) -> None:
        """The row's last segment may have got more pages since."""
        column, _, room = self._ends[row].tolist()
        known = self._used[row] - column
        new = tail.pages[known:]
        if not new:
            return
        columns = self._used[row] + np.arange(len(new))
        self._cells[row, columns, 0] = new
        self._cells[row, columns, 1] = room + self._size * np.arange(len(new))
        self._changed.append((row, columns))
        self._used[row] += len(new)
        self._ends[row, 2] = room + self._size * len(new)

    def send(self, anyway: bool = False) -> Rows:
        """The tables on the device, after what has changed was sent, if anything or `anyway`."""
        if self._changed or anyway:
            at = [(row, len(columns)) for row, columns in self._changed]
            rows = np.repeat(*np.array(at, np.int32).reshape(-1, 2).T)
            columns = [columns.astype(np.int32) for _, columns in self._changed]
            columns = np.concatenate([np.zeros(0, np.int32), *columns])
            cells = np.column_stack([rows, columns, self._cells[rows, columns]])
            self._changed = []
            for first in range(0, max(1, len(cells)), CELLS):
                some = np.full((CELLS, 4), len(self._used), np.int32)  # a row that is not there
                some[: len(cells) - first] = cells[first : first + CELLS]
                self._rows = self._write(self._rows, some, self._ends.copy())
        return self._rows

    def shared(self, rows: tuple[int, ...]) -> Shared:
        """What these rows (-1: one that lists nothing) have in common in a compiled step."""
        if rows not in self._found:
            self._found.clear()
            names = [b"" if row < 0 else self._names[row] for row in rows]
            tables = [self._cells[row, : 0 if row < 0 else self._used[row]] for row in rows]
            self._found[rows] = shared_runs(names, tables, -(-_WORTH // self._size))
        return self._found[rows]


def shared_runs(names: abc.Sequence[bytes], tables: abc.Sequence[np.ndarray], worth: int) -> Shared:
    """Which tables begin with the same pages.

    Args:
      names: of each row; in their order rows with the same first pages follow each other.
      tables: i32[M, 2] of each row, page and entries before it.
      worth: pages of the shortest run.
    """
    width = len(names)
    shared = Shared.nothing(width)
    order = sorted(range(width), key=names.__getitem__)
    alike = [0] + [_alike(tables[a], tables[b]) for a, b in itertools.pairwise(order)]
    runs: list[tuple[int, int, int, int]] = []

    def look(begin: int, end: int, first: int) -> None:
        """At rows order[begin:end], which have the columns before `first` in common."""
        if end - begin < 2:
            return
        last = min(alike[begin + 1 : end])
        some = range(begin, end, TOGETHER)
        if last - first >= worth:
            if len(runs) + len(some) > len(shared.runs):
                return  # they go on alone
            runs.extend((i, min(i + TOGETHER, end), first, last) for i in some)
            shared.own[order[begin:end]] = first = last
        cuts = [i for i in range(begin + 1, end) if alike[i] == last]
        for cut in itertools.pairwise((begin, *cuts, end)):
            look(*cut, first)

    look(0, width, 0)
    shared.runs[: len(runs)] = np.array(runs, np.int32).reshape(-1, 4)
    shared.order[:] = order
    return shared


def _alike(a: np.ndarray, b: np.ndarray) -> int:
    """How many columns two tables begin with that list the same pages, each from the same entry to
    the same."""
    count = min(len(a), len(b))
    if not count or a[0, 0] != b[0, 0]:  # mostly
        return 0
    same = a[:count] == b[:count]
    pages, entries = (count if column.all() else int(column.argmin()) for column in same.T)
    if pages == entries == len(a) == len(b):
        return count
    return min(pages, entries - 1)


def pages_read(shared: Shared, used: abc.Sequence[int]) -> int:
    """Pages that one layer of a step reads for rows that see `used` pages each: those of a run once
    for all its rows."""
    alone = np.maximum(np.array(used) - shared.own, 0)
    return int(alone.sum() + (shared.runs[:, 3] - shared.runs[:, 2]).sum())
