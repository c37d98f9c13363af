"""What the lanes hold, on the host and as the device was last told: tables, knobs, where they are.

A lane is a slot of the batch. Its table grows as its sequence gets pages; the rest is written when
a sequence is bound to it, or begins a new epoch on it (`Sequence.epoch`). Only here are these
arrays written; each is sent again where it has changed.
"""

from collections import abc

import jax
import numpy as np

from npr_jax.decode.attention import table_width
from npr_jax.decode.config import EngineConfig
from npr_jax.decode.sampling import LaneSampling
from npr_jax.decode.sequence import Segment, Sequence
from npr_jax.decode.steps import LaneState, Rows


class Lanes:
    """The arrays of `num_lanes` lanes; `put` sends host arrays to the device.

    Attributes, all on the device: `rows`, `knobs`; `state`, which the compiled step gives back
    and the runner stores; `_no_tokens` i32[lanes, N] for "draw all".
    """

    def __init__(self, config: EngineConfig, num_lanes: int, put: abc.Callable):
        self.config, self.put = config, put
        width = table_width(config.longest_table, config.page_size)
        self._table = np.zeros((num_lanes, width), np.int32)
        self._base = np.zeros((num_lanes, width + 1), np.int32)
        self._pages = [0] * num_lanes  # of `_table` that count
        self._bound: list[tuple[Sequence, int] | None] = [None] * num_lanes  # with its epoch
        self._knobs = LaneSampling(
            key=np.zeros((num_lanes, 2), np.uint32),
            temperature=np.ones(num_lanes, np.float32),
            top_p=np.ones(num_lanes, np.float32),
            top_k=np.zeros(num_lanes, np.int32),
            min_p=np.zeros(num_lanes, np.float32),
            penalty=np.ones(num_lanes, np.float32),
            stops=np.full((num_lanes, config.max_stops), -1, np.int32),
        )
        none = np.zeros(num_lanes, np.int32)
        self._resting = put(np.zeros(num_lanes, bool)), put(_state(none, none))
        self._no_tokens = put(np.full((num_lanes, config.steps), -1, np.int32))
        self.state = put(_state(none, none, frozen=True))
        self.rows = put(Rows(self._table.copy(), self._base.copy()))
        self.knobs = put(jax.tree.map(np.copy, self._knobs))

    def __len__(self) -> int:
        return len(self._bound)

    def arguments(self, sequences: abc.Sequence[Sequence], counts: abc.Sequence[int]) -> tuple:
        """What a decode step of these sequences takes, after the weights and the pool: tables,
        state, which lanes restart and where, given tokens, knobs."""
        restart, state = self._update(sequences)
        given = self._given(sequences, counts)
        return self.rows, self.state, restart, state, given, self.knobs

    def _update(self, sequences: abc.Sequence[Sequence]):
        """Brings the arrays up to date; returns which lanes restart bool[lanes], and where."""
        here: list[Sequence | None] = [None] * len(self)
        for sequence in sequences:
            assert sequence.lane is not None
            here[sequence.lane] = sequence
        restarted, changed = [], False
        for lane, sequence in enumerate(here):
            bound = sequence and (sequence, sequence.epoch)
            if bound != self._bound[lane]:
                self._bound[lane] = bound
                restarted.append(lane)
                if sequence:
                    self._bind(lane, sequence)
            elif sequence and len(sequence.tail.pages) != self._pages[lane]:
                self._grow_row(lane, sequence)
                changed = True
        if restarted or changed:
            self.rows = self.put(Rows(self._table.copy(), self._base.copy()))
        if not restarted:
            return self._resting
        self.knobs = self.put(jax.tree.map(np.copy, self._knobs))
        mask = np.zeros(len(self), bool)
        mask[restarted] = True
        here = [sequence if mask[lane] else None for lane, sequence in enumerate(here)]
        state = LaneState(
            tokens=_column(here, lambda sequence: sequence.tail.tokens[-1]),
            positions=_column(here, lambda sequence: sequence.position),
            ranks=_column(here, lambda s: s.tail.offset + len(s.tail.tokens) - 1),
            left=_column(here, lambda sequence: sequence.left),
            frozen=np.array([sequence is None for sequence in here]),
        )
        return self.put((mask, state))

    def _given(self, sequences: abc.Sequence[Sequence], counts: abc.Sequence[int]):
        """i32[lanes, N], the tokens to take instead of drawing, or -1."""
        if not any(sequence.given for sequence in sequences):
            return self._no_tokens
        given = np.full((len(self), self.config.steps), -1, np.int32)
        for sequence, count in zip(sequences, counts, strict=True):
            if sequence.given:
                done = len(sequence.tail.tokens) + sequence.pending
                given[sequence.lane, :count] = sequence.given[done : done + count]
        return self.put(given)

    def seen(self, sequences: abc.Sequence[Sequence], vocab: int):
        """bool[lanes, vocab], the tokens that each lane's sequence sees."""
        seen = np.zeros((len(self), vocab), bool)
        for sequence in sequences:
            for segment in sequence.table:
                seen[sequence.lane, segment.tokens] = True
        return self.put(seen)

    def _bind(self, lane: int, sequence: Sequence) -> None:
        """Writes a sequence's table and knobs into its lane."""
        write_row(self._table[lane], self._base[lane], sequence.table, self.config.page_size)
        self._pages[lane] = len(sequence.tail.pages)
        knobs, sampling = self._knobs, sequence.request.sampling
        knobs.key[lane] = sequence.key
        knobs.temperature[lane] = sampling.temperature
        knobs.top_p[lane] = sampling.top_p
        knobs.top_k[lane] = sampling.top_k
        knobs.min_p[lane] = sampling.min_p
        knobs.penalty[lane] = sampling.repetition_penalty
        if sequence.depth and sampling.step_repetition_penalty:
            knobs.penalty[lane] = sampling.step_repetition_penalty
        knobs.stops[lane] = -1
        knobs.stops[lane, : len(sequence.request.stops)] = sequence.request.stops

    def _grow_row(self, lane: int, sequence: Sequence) -> None:
        """Appends the pages that the sequence's last segment got since."""
        pages, size = sequence.tail.pages, self.config.page_size
        new = pages[self._pages[lane] :]
        used = sum(len(segment.pages) for segment in sequence.tail.before) + self._pages[lane]
        self._table[lane, used : used + len(new)] = new
        start = self._base[lane, used]
        self._base[lane, used:] = start + size * len(new)
        self._base[lane, used : used + len(new)] = start + size * np.arange(len(new))
        self._pages[lane] = len(pages)


def write_row(
    table: np.ndarray, base: np.ndarray, segments: abc.Sequence[Segment], size: int
) -> None:
    """Pages of the segments in order, and the entries before each; the last segment's are open."""
    used = entries = 0
    for segment in segments:
        count = len(segment.pages)
        if segment.row is None:
            segment.row = np.array(segment.pages, np.int32)
        table[used : used + count] = segment.row
        base[used : used + count] = entries + size * np.arange(count)
        used += count
        entries += size * count if segment is segments[-1] else len(segment.tokens)
    base[used:] = entries


def _state(tokens, left, frozen: bool = False) -> LaneState:
    return LaneState(tokens, tokens, tokens, left, np.full(len(tokens), frozen))


def _column(sequences: list[Sequence | None], value: abc.Callable[[Sequence], int]) -> np.ndarray:
    return np.array([value(s) if s else 0 for s in sequences], np.int32)
