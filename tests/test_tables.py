"""Tables on the device are those of the host, and only what has changed is sent."""

import jax
import numpy as np
import pytest
from conftest import examples
from fake_device import Device
from hypothesis import given, settings
from hypothesis import strategies as st

from npr_jax.decode import tables as module
from npr_jax.decode.attention import FAR, TOGETHER
from npr_jax.decode.sequence import Segment
from npr_jax.decode.steps import Rows, _write
from npr_jax.decode.tables import Tables, pages_read

SIZE, WIDTH, ROWS = 4, 24, 3


def expected(segments):
    """Pages and bases of one row, its column, entry and room: entry by entry."""
    pages, base, entries = [], [], 0
    for segment in segments:
        column, entry = len(pages), entries
        for number, page in enumerate(segment.pages):
            pages.append(page)
            base.append(entry + SIZE * number)
        entries += len(segment.tokens)
    pad = WIDTH - len(pages)
    room = entry + SIZE * len(segments[-1].pages)
    return pages + [0] * pad, base + [FAR] * (pad + 1), column, entry, room


def segment_of(before, tokens: int, pages) -> Segment:
    segment = Segment(0, tuple(before))
    segment.append_known([0] * tokens, forced=False)
    segment.pages = list(pages)
    return segment


# A row and how many get the same table, and the tokens of each segment that they list; or a row
# whose last segment grows; or whose segments, joined, are listed before another one.
CHANGES = st.lists(
    st.tuples(
        st.integers(0, ROWS - 1),
        st.integers(1, 2),
        st.one_of(
            st.lists(st.integers(1, 20), min_size=1, max_size=4),
            st.integers(0, 3),
            st.none(),
        ),
    ),
    max_size=12,
)


@pytest.mark.parametrize("cells", [4, 512])
@given(changes=CHANGES, sends=st.integers(1, 4))
@settings(max_examples=examples(60), deadline=None)
def test_the_device_has_the_tables_of_the_host(cells, changes, sends):
    numbers = iter(range(1, 1000))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CELLS", cells)
        tables, rows = Tables(Rows.empty(ROWS, WIDTH), SIZE, Device.write), {}
        for number, (row, some, change) in enumerate(changes):
            if isinstance(change, list):
                segments = []
                for count in change:
                    pages = [next(numbers) for _ in range(-(-count // SIZE))]
                    segments.append(segment_of(segments, count, pages))
                some = min(some, ROWS - row)
                rows |= dict.fromkeys(range(row, row + some), segments)
                tables.set(row, segments, some)
            elif row in rows and change is None:
                joined = rows[row]
                if sum(len(s.pages) for s in joined) < WIDTH:
                    # What its last segment was short of its pages is seen by the next one.
                    last = segment_of(joined, 1, [next(numbers)])
                    rows = {r: s for r, s in rows.items() if s is not joined}
                    rows |= {row: [*reversed(joined), last]}
                    tables.set(row, rows[row])
            elif row in rows and sum(len(s.pages) for s in rows[row]) + change <= WIDTH:
                rows = {r: s for r, s in rows.items() if r == row or s is not rows[row]}
                rows[row][-1].pages += [next(numbers) for _ in range(change)]
                rows[row][-1].row = None
                tables.grow(row, rows[row][-1])
            if number % sends == 0:
                tables.send()
        sent = tables.send()
    for row, segments in rows.items():
        found = sent.table[row], sent.base[row], sent.column[row], sent.entry[row], sent.room[row]
        for ours, theirs in zip(found, expected(segments), strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_a_row_is_written_to_from_the_first_of_the_segments_that_grow():
    first = segment_of((), 6, [1, 2])
    whole = segment_of((first,), 2 * SIZE, [3, 4])
    last = segment_of((first, whole), 3, [5])
    tables = Tables(Rows.empty(ROWS, WIDTH), SIZE, Device.write)
    ends = []
    for written in (1, 2):
        tables.set(0, last.table, written=written)
        sent = tables.send()
        np.testing.assert_array_equal(sent.table[0, :6], [1, 2, 3, 4, 5, 0])
        np.testing.assert_array_equal(sent.base[0, :6], [0, 4, 6, 10, 14, FAR])
        ends.append((int(sent.column[0]), int(sent.entry[0]), int(sent.room[0])))
    assert ends == [(4, 14, 18), (2, 6, 18)]


def test_only_what_has_changed_is_sent():
    sent = []

    def write(rows, cells, ends):
        sent.append(int((cells[:, 0] < ROWS).sum()))
        return rows

    tables = Tables(Rows.empty(ROWS, WIDTH), SIZE, write)
    prompt = segment_of((), 40, range(1, 11))
    branches = [segment_of((prompt,), 3, [page]) for page in (11, 12)]
    asked = [
        lambda: tables.set(0, (prompt, branches[0])),
        lambda: tables.set(0, (prompt, branches[1])),  # its sibling, on the same lane
        lambda: tables.grow(0, branches[1]),
        lambda: (branches[1].pages.append(13), tables.grow(0, branches[1])),
    ]
    for ask in asked:
        ask()
        tables.send()
    assert sent == [11, 1, 1]


# Of each segment: the one before it (or none), its pages, and how full its last page is.
TREES = st.lists(st.tuples(st.integers(-1, 8), st.integers(1, 4), st.integers(1, SIZE)), max_size=9)


@given(tree=TREES, picked=st.lists(st.integers(0, 8), max_size=12), worth=st.integers(1, 3))
@settings(max_examples=examples(200), deadline=None)
def test_rows_that_begin_alike_are_found_and_read_once(tree, picked, worth):
    numbers, segments = iter(range(1, 100)), []
    for before, pages, last in tree:
        above = segments[before].table if 0 <= before < len(segments) else ()
        tokens = SIZE * (pages - 1) + last
        segments.append(segment_of(above, tokens, [next(numbers) for _ in range(pages)]))
    tails = [segments[i] for i in dict.fromkeys(picked) if i < len(segments)]
    tables = Tables(Rows.empty(12, 40), SIZE, Device.write)
    for row, tail in enumerate(tails):
        tables.set(row, tail.table)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_WORTH", SIZE * worth)
        shared = tables.shared((*range(len(tails)), *[-1] * (12 - len(tails))))
    cells = [tables._cells[row, : tables._used[row]].tolist() for row in range(len(tails))]
    ends = [[entries for _, entries in row[1:]] + [FAR] for row in cells]
    known = [
        [(*cell, end) for cell, end in zip(*row, strict=True)]
        for row in zip(cells, ends, strict=True)
    ]
    assert sorted(shared.order.tolist()) == list(range(12))
    reached = [0] * 12
    for begin, end, first, last in shared.runs.tolist():
        rows = shared.order[begin:end].tolist()
        assert len(rows) <= TOGETHER and last - first >= worth * (end > begin)
        assert all(known[row][:last] == known[rows[0]][:last] for row in rows)
        assert all(reached[row] == first for row in rows)
        for row in rows:
            reached[row] = last
    assert reached == shared.own.tolist()
    if worth == 1 and (shared.runs[:, 1] == 0).any():  # there was room: nothing is read twice
        used = [len(row) for row in cells] + [0] * (12 - len(cells))
        pages = {tuple(row[: n + 1]) for row in known for n in range(len(row))}
        rows = [sum(row[: len(page)] == list(page) for row in known) for page in pages]
        twice = sum((count - 1) // TOGETHER for count in rows)
        assert pages_read(shared, used) == len(pages) + twice


@pytest.mark.parametrize(("branches", "most"), [(5, 1.1), (1, 1.0), (8, 1.1)])
def test_branches_read_what_is_before_them_once(branches, most):
    """Five branches of up to 32 tokens behind 16,384: what a step reads, against one of them."""
    tables = Tables(Rows.empty(8, 1100), 16, Device.write)
    prompt = segment_of((), 16_384, range(1, 1025))
    for row in range(branches):
        tables.set(row, (prompt, segment_of((prompt,), 20, [1100 + 2 * row, 1101 + 2 * row])))
    rows = (*range(branches), *[-1] * (8 - branches))
    used = [1026] * branches + [0] * (8 - branches)
    assert pages_read(tables.shared(rows), used) <= most * 1026


def test_runs_for_which_there_is_no_place_are_read_alone(monkeypatch):
    monkeypatch.setattr(module, "_WORTH", SIZE)
    tables = Tables(Rows.empty(4, WIDTH), SIZE, Device.write)
    trunk = segment_of((), 2 * SIZE, [1, 2])
    for pair in range(2):  # three runs, of all and of each pair, and places for two
        inner = segment_of((trunk,), 2 * SIZE, [3 + 2 * pair, 4 + 2 * pair])
        for row in (2 * pair, 2 * pair + 1):
            tables.set(row, segment_of((trunk, inner), 1, [10 + row]).table)
    shared = tables.shared((0, 1, 2, 3))
    assert shared.runs.tolist() == [[0, 4, 0, 2], [0, 2, 2, 4]]
    assert shared.own.tolist() == [4, 4, 2, 2]


def test_rows_that_change_are_looked_at_again():
    tables = Tables(Rows.empty(2, WIDTH), SIZE, Device.write)
    prompt = segment_of((), 80, range(1, 21))
    for row in range(2):
        tables.set(row, (prompt, segment_of((prompt,), 1, [30 + row])))
    assert tables.shared((0, 1)).own.tolist() == [20, 20]
    tables.set(1, (segment_of((), 80, range(41, 61)),))
    assert tables.shared((0, 1)).own.tolist() == [0, 0]


def test_ends_are_sent_where_no_cell_has_changed():
    tables = Tables(Rows.empty(ROWS, WIDTH), SIZE, Device.write)
    whole, half = segment_of((), 20, range(1, 6)), segment_of((), 8, range(1, 3))
    tables.set(1, (whole,))
    assert tables.send().column[1] == 0
    tables.set(1, (half, segment_of((half,), 12, range(3, 6))))
    assert tables.send().column[1] == 2


def test_replicas_take_their_own_cells():
    cells = np.array([(0, 1, 7, 4), (2, 0, 8, 0), (3, 5, 9, 12), (4, 0, 0, 0)], np.int32)
    ends = np.arange(12, dtype=np.int32).reshape(4, 3)
    whole = Device.write(Rows.empty(4, WIDTH), cells, ends)
    for first in (0, 2):
        half = jax.jit(_write)(Rows.empty(2, WIDTH), cells, ends[first : first + 2], first)
        for name in ("table", "base", "column", "entry", "room"):
            expected = getattr(whole, name)[first : first + 2]
            np.testing.assert_array_equal(getattr(half, name), expected)
