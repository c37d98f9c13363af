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
        self._pairs = self._cells.view(np.int64)[:, :, 0]  # the same, a cell as one number
        self._used = [0] * num_rows  # columns that list a page
        self._ends = [(0, 0, 0)] * num_rows  # as `Rows` has them: column, entry, room
        self._rows_changed: list[int] = []
        self._columns_changed: list[int] = []  # of these rows
        self._ends_changed = False
        self._names = [b""] * num_rows  # the pages of each row when it was set, to sort by
        # What rows have in common, until one is set again: what they grow by is their own.
        self._found: dict[tuple[int, ...], Shared] = {}

    def set(
        self, row: int, segments: abc.Sequence[Segment], count: int = 1, written: int = 1
    ) -> None:
        """The row, and what else makes `count` rows, list these segments from now on, of which the
        last `written` are written to: the last grows, and the others fill their pages."""
        rows = slice(row, row + count)
        cells = np.concatenate([self._row(segment) for segment in segments])
        column = entry = 0  # where those begin that are written to
        begin, sealed = 0, len(segments) - written
        for number, segment in enumerate(segments[:-1]):
            begin += len(segment.pages)
            cells[begin:, 1] += len(segment.tokens)
            if number < sealed:
                column, entry = begin, entry + len(segment.tokens)
        used, old = len(cells), max(self._used[rows])
        self._names[rows] = [cells[:, 0].astype(">i4").tobytes()] * count
        if used < old:
            cells = np.concatenate([cells, np.full((old - used, 2), (0, FAR), np.int32)])
        pairs = cells.view(np.int64)[:, 0]
        at, columns = (pairs != self._pairs[rows, : len(pairs)]).nonzero()
        self._pairs[rows, : len(pairs)] = pairs
        self._rows_changed += (row + at).tolist()
        self._columns_changed += columns.tolist()
        self._used[rows] = [used] * count
        ends = [(column, entry, entry + self._size * (used - column))] * count
        self._ends_changed |= self._ends[rows] != ends
        self._ends[rows] = ends
        self._found.clear()

    def _row(self, segment: Segment) -> np.ndarray:
        """`Segment.row`, made if need be."""
        if segment.row is None:
            entries = range(0, self._size * len(segment.pages), self._size)
            pairs = list(zip(segment.pages, entries, strict=True))
            segment.row = np.array(pairs, np.int32).reshape(-1, 2)
        return segment.row

    def grow(self, row: int, tail: Segment) -> None:
        """The row's last segment may have got more pages since."""
        used, (column, entry, room) = self._used[row], self._ends[row]
        new = tail.pages[used - column :]
        if not new:
            return
        for number, page in enumerate(new, used):
            self._cells[row, number] = page, room
            room += self._size
        self._rows_changed += [row] * len(new)
        self._columns_changed += range(used, used + len(new))
        self._used[row] += len(new)
        self._ends[row], self._ends_changed = (column, entry, room), True

    def send(self, anyway: bool = False) -> Rows:
        """The tables on the device, after what has changed was sent, if anything or `anyway`."""
        if self._rows_changed or self._ends_changed or anyway:
            at = np.array([self._rows_changed, self._columns_changed], np.int32)
            self._rows_changed, self._columns_changed, self._ends_changed = [], [], False
            ends = np.array(self._ends, np.int32)
            for first in range(0, max(1, at.shape[1]), CELLS):
                rows, columns = at[:, first : first + CELLS]
                some = np.full((CELLS, 4), len(self._used), np.int32)  # a row that is not there
                some[: len(rows), 0], some[: len(rows), 1] = rows, columns
                some[: len(rows), 2:] = self._cells[rows, columns]
                self._rows = self._write(self._rows, some, ends)
        return self._rows

    def shared(self, rows: tuple[int, ...]) -> Shared:
        """What these rows (-1: one that lists nothing) have in common in a compiled step."""
        if rows not in self._found:
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
    alike = [0] * width
    for i, (a, b) in enumerate(itertools.pairwise(order), 1):
        begin = names[a][: 4 * worth]
        if len(begin) == 4 * worth and names[b].startswith(begin):  # else no run is worth it
            alike[i] = _alike(tables[a], tables[b])
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
