"""The tables of rows, on the host and as the device has them: only cells that change are sent.

A table lists the pages of its segments in order. Its last segment grows; the others are sealed.
"""

from collections import abc

import numpy as np

from npr_jax.decode.attention import FAR
from npr_jax.decode.sequence import Segment
from npr_jax.decode.steps import Rows

CELLS = 512  # that one call writes


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
