"""The device side of a visit: host tables and tokens become the arrays of the compiled steps.

What is asked for is on its way when a call returns; `Flight.read` waits for it. The device does
everything in the order in which it was asked, so a page may be given to another line while a call
that still writes to it is in flight.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from npr_jax.decode.attention import default_implementation, table_width
from npr_jax.decode.compiled import (
    Drawn,
    LaneState,
    Rows,
    Steps,
    compiled,
    pool_shape,
    pool_spec,
)
from npr_jax.decode.config import EngineConfig
from npr_jax.decode.lines import Line, Segment
from npr_jax.decode.sampling import LaneSampling, SamplingParams, fold_branches
from npr_jax.decode.scheduler import Scheduler
from npr_jax.model.params import unstack
from npr_jax.model.sharding import decode_shardings, place_params


@dataclasses.dataclass(frozen=True)
class Flight:
    """Decode steps that were asked for: (line, its seat, most tokens it may draw) in each lane."""

    lines: list[tuple[Line, int, int]]
    drawn: Drawn

    def landed(self) -> bool:
        """Whether the device has finished it."""
        return self.drawn.count.is_ready()

    def read(self) -> Drawn:
        """Waits for the arrays on the host."""
        return jax.device_get(self.drawn)


class Runner:
    """Owns the parameters and the KV pool, and calls the compiled steps in a few fixed shapes."""

    def __init__(self, model_config, params, config: EngineConfig, mesh: Mesh | None = None):
        self.model_config, self.config, self.mesh = model_config, config, mesh
        self.replicas = mesh.shape["data"] if mesh else 1
        attention = config.attention or default_implementation(model_config.head_dim)
        dtype = jax.numpy.dtype(config.cache_dtype or params["embed"].dtype)
        self._steps = compiled(model_config, attention, config.steps, mesh)
        # Prompts, whose pages are full but the last, are what the stock kernel of a TPU can do.
        stock = attention == "pallas" and jax.default_backend() == "tpu"
        stock = stock and model_config.head_dim % 128 == 0 and dtype == jax.numpy.bfloat16
        self._prompt_steps = self._steps
        if stock and params["embed"].dtype == dtype:
            self._prompt_steps = compiled(model_config, "plain", config.steps, mesh)
        self.set_params(params)
        lanes = self.replicas * config.lanes
        self._pool = self._make_pool(dtype)
        self._shapes = tuple(
            dict.fromkeys(
                (
                    (min(config.lanes, config.header_rows), config.header_chunk),
                    (config.prefill_rows, config.prefill_chunk),
                )
            )
        )
        self.stats = dict.fromkeys(("decode_steps", "prefill_calls", "prefill_tokens"), 0)
        # What the lanes hold, as the device was last told; each is sent again where it has changed.
        width = table_width(config.longest_table, config.page_size)
        self._table = np.zeros((lanes, width), np.int32)
        self._base = np.zeros((lanes, width + 1), np.int32)
        self._pages = [0] * lanes  # of `_table` that count
        self._seats: list[tuple[Line, int] | None] = [None] * lanes
        self._knobs = LaneSampling(
            key=np.zeros((lanes, 2), np.uint32),
            temperature=np.ones(lanes, np.float32),
            top_p=np.ones(lanes, np.float32),
            top_k=np.zeros(lanes, np.int32),
            min_p=np.zeros(lanes, np.float32),
            penalty=np.ones(lanes, np.float32),
            stops=np.full((lanes, config.max_stops), -1, np.int32),
        )
        none = np.zeros(lanes, np.int32)
        self._resting = self._put(np.zeros(lanes, bool)), self._put(self._state(none, none))
        self._sampling = self._put(np.full((lanes, config.steps), -1, np.int32))
        self._lanes_state = self._put(self._state(none, none, frozen=True))
        self._device_rows = self._put(Rows(self._table.copy(), self._base.copy()))
        self._device_knobs = self._put(jax.tree.map(np.copy, self._knobs))

    def set_params(self, params) -> None:
        """Takes these weights from the next call on."""
        if self.mesh is not None:
            params = place_params(params, decode_shardings(self.model_config, self.mesh))
        if jax.default_backend() == "cpu":
            params = _unstack(params)
        self.params = params

    def warmup(self, penalised: bool, progress: Callable[[int, int], None] | None = None) -> int:
        """Compiles every shape this engine can need; returns how many."""
        calls = [
            functools.partial(self._prefill_call, [], *shape, steps)
            for steps in dict.fromkeys((self._prompt_steps, self._steps))
            for shape in self._shapes
        ]
        calls.append(lambda: self._decode_call([], False))
        if penalised:
            calls.append(lambda: self._decode_call([], True))
        calls.append(lambda: self.fold(np.zeros(2, np.uint32), 1))
        for done, call in enumerate(calls, 1):
            call()
            jax.block_until_ready(self._pool)
            if progress:
                progress(done, len(calls))
        return len(calls)

    def fold(self, key: np.ndarray, count: int) -> list[np.ndarray]:
        """The keys of branches 0..count-1 of `key`, in calls of one fixed shape."""
        size, keys = self.config.max_branches, []
        for first in range(0, count, size):
            numbers = np.arange(first, first + size, dtype=np.int32)
            keys += list(np.asarray(fold_branches(key, numbers)))
        return keys[:count]

    def prefill(self, schedulers: Sequence[Scheduler]) -> None:
        """Computes what the lines with lanes must have before they decode, but at most one long
        chunk of it, so that decoding lanes wait for no more than that."""
        while True:
            rows, chunk = self._prefill_shape(schedulers)
            work = [
                (replica * rows + row, *piece)
                for replica, scheduler in enumerate(schedulers)
                for row, piece in enumerate(_prefill_work(scheduler, rows, chunk))
            ]
            if not work:
                return
            self._prefill_call(work, rows, chunk)
            self.stats["prefill_calls"] += 1
            for _, scheduler, segment, count in work:
                scheduler.computed(segment, count)
                self.stats["prefill_tokens"] += count
            if (rows, chunk) == self._shapes[-1]:
                return

    def decode(self, lines: Sequence[Line]) -> Flight | None:
        """Asks for N steps of these lines; None where none of them can draw.

        For a few steps only while other lanes wait for a chunk of their prompts: a step takes its
        time however few lanes are in it.
        """
        ready = [line for line in lines if _ready(line)]
        limit = self.config.steps if len(ready) == len(lines) else max(1, self.config.steps // 16)
        lines = ready
        counts = [min(self._most(line), limit) for line in lines]
        if not any(counts):
            return None
        drawn = self._decode_call(lines, any(line.job.penalised for line in lines), counts, limit)
        for line, count in zip(lines, counts, strict=True):
            line.flying += count
        flown = [(line, line.seat, n) for line, n in zip(lines, counts, strict=True)]
        return Flight(flown, drawn)

    def _most(self, line: Line) -> int:
        """The most tokens a lane draws in its next visit; for given tokens this is exact."""
        room = len(line.tail.pages) * self.config.page_size - len(line.tail.tokens) + 1
        return max(0, min(self.config.steps, line.left - line.flying, room - line.flying))

    def _prefill_shape(self, schedulers) -> tuple[int, int]:
        """Of the two shapes, the one that computes what is pending at less cost."""
        counts = []
        for scheduler in schedulers:
            pending = {
                id(segment): goal(segment, line) - segment.computed
                for line in scheduler.active
                for segment in line.table
            }
            counts.append([count for count in pending.values() if count > 0])

        def cost(shape):  # tokens computed, padding included, and a call's reading of the weights
            rows, chunk = shape
            calls = max(
                math.ceil(len(c) / rows) * math.ceil(max(c, default=0) / chunk) for c in counts
            )
            return calls * (rows * chunk + 64)

        return min(self._shapes, key=cost)

    def _prefill_call(self, work, rows: int, chunk: int, steps: Steps | None = None) -> None:
        rows *= self.replicas
        tokens = np.zeros((rows, chunk), np.int32)
        positions = np.zeros((rows, chunk), np.int32)
        ranks = np.full((rows, chunk), -1, np.int32)
        table = np.zeros((rows, self._table.shape[1]), np.int32)
        base = np.zeros((rows, self._base.shape[1]), np.int32)
        for r, _, segment, count in work:
            first, number = segment.computed, np.arange(count)
            _write_row(table[r], base[r], segment.table, self.config.page_size)
            tokens[r, :count] = segment.tokens[first : first + count]
            positions[r, :count] = segment.start + first + number
            ranks[r, :count] = segment.offset + first + number
        arrays = self._put((Rows(table, base), tokens, positions, ranks))
        if steps is None:
            branches = any(segment.before for _, _, segment, _ in work)
            steps = self._steps if branches else self._prompt_steps
        self._pool = steps.prefill(self.params, self._pool, *arrays)

    def _decode_call(self, lines: Sequence[Line], penalised: bool, counts=(), limit=0) -> Drawn:
        restart, state = self._update_lanes(lines)
        given = self._sampling
        if any(line.script for line in lines):
            given = np.full(self._sampling.shape, -1, np.int32)
            for line, count in zip(lines, counts, strict=True):
                done = len(line.tail.tokens) + line.flying
                given[line.lane, :count] = line.script.pieces[line.piece][done : done + count]
            given = self._put(given)
        seen = None
        if penalised:  # the caller has read all that was drawn
            seen = np.zeros((len(self._seats), self.model_config.padded_vocab_size), bool)
            for line in lines:
                for segment in line.table:
                    seen[line.lane, segment.tokens] = True
            seen = self._put(seen)
        self._pool, self._lanes_state, drawn = self._steps.decode(
            self.params,
            self._pool,
            self._device_rows,
            self._lanes_state,
            restart,
            state,
            given,
            self._device_knobs,
            seen,
            np.int32(limit),
        )
        return drawn

    def _update_lanes(self, lines: Sequence[Line]):
        """Brings the lanes' arrays up to date; returns which lanes restart, and where."""
        seats: list[Line | None] = [None] * len(self._seats)
        for line in lines:
            seats[line.lane] = line
        restarted, changed = [], False
        for lane, line in enumerate(seats):
            seat = line and (line, line.seat)
            if seat != self._seats[lane]:
                self._seats[lane] = seat
                restarted.append(lane)
                if line:
                    self._sit_down(lane, line)
            elif line and len(line.tail.pages) != self._pages[lane]:
                self._grow_row(lane, line)
                changed = True
        if restarted or changed:
            self._device_rows = self._put(Rows(self._table.copy(), self._base.copy()))
        if not restarted:
            return self._resting
        self._device_knobs = self._put(jax.tree.map(np.copy, self._knobs))
        mask = np.zeros(len(seats), bool)
        mask[restarted] = True
        here = [line if mask[lane] else None for lane, line in enumerate(seats)]
        state = LaneState(
            tokens=_column(here, lambda line: line.tail.tokens[-1]),
            positions=_column(here, lambda line: line.position),
            ranks=_column(here, lambda line: line.tail.offset + len(line.tail.tokens) - 1),
            left=_column(here, lambda line: line.left),
            frozen=np.array([line is None for line in here]),
        )
        return self._put((mask, state))

    def _sit_down(self, lane: int, line: Line) -> None:
        """Writes a line's table and knobs into its lane."""
        _write_row(self._table[lane], self._base[lane], line.table, self.config.page_size)
        self._pages[lane] = len(line.tail.pages)
        knobs, sampling = self._knobs, line.job.sampling
        knobs.key[lane] = line.key
        knobs.temperature[lane] = sampling.temperature
        knobs.top_p[lane] = sampling.top_p
        knobs.top_k[lane] = sampling.top_k
        knobs.min_p[lane] = sampling.min_p
        knobs.penalty[lane] = sampling.repetition_penalty
        if line.depth and sampling.step_repetition_penalty:
            knobs.penalty[lane] = sampling.step_repetition_penalty
        knobs.stops[lane] = -1
        if not line.script:
            knobs.stops[lane, : len(line.job.stops)] = line.job.stops

    def _grow_row(self, lane: int, line: Line) -> None:
        """Appends the pages that the line's last segment got since."""
        pages, size = line.tail.pages, self.config.page_size
        new = pages[self._pages[lane] :]
        used = sum(len(segment.pages) for segment in line.tail.before) + self._pages[lane]
        self._table[lane, used : used + len(new)] = new
        start = self._base[lane, used]
        self._base[lane, used:] = start + size * len(new)
        self._base[lane, used : used + len(new)] = start + size * np.arange(len(new))
        self._pages[lane] = len(pages)

    def _make_pool(self, dtype) -> jax.Array:
        config = self.config
        shape = pool_shape(self.model_config, self.replicas * config.pages, config.page_size)
        if self.mesh is None:
            return jax.numpy.zeros(shape, dtype)
        sharding = NamedSharding(self.mesh, pool_spec(self.model_config, self.mesh))
        return jax.jit(lambda: jax.numpy.zeros(shape, dtype), out_shardings=sharding)()

    def _put(self, tree):
        """Host arrays to the device; on a mesh every process gives every device the same."""
        if self.mesh is None:
            return jax.device_put(tree)
        whole = NamedSharding(self.mesh, P())
        return jax.tree.map(
            lambda x: jax.make_array_from_callback(x.shape, whole, lambda i: x[i]), tree
        )

    def _state(self, tokens, left, frozen: bool = False) -> LaneState:
        return LaneState(tokens, tokens, tokens, left, np.full(len(tokens), frozen))


_unstack = jax.jit(unstack)


def _column(lines: list[Line | None], value: Callable[[Line], int]) -> np.ndarray:
    return np.array([value(line) if line else 0 for line in lines], np.int32)


def _write_row(table: np.ndarray, base: np.ndarray, segments: Sequence[Segment], size: int) -> None:
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


def _prefill_work(scheduler: Scheduler, rows: int, chunk: int):
    """Up to `rows` pieces (scheduler, segment, count) that one call can compute together."""
    work: list[tuple[Scheduler, Segment, int]] = []
    planned: dict[int, int] = {}  # segment: its computed tokens after this call
    pages = set()  # prompt pages that this call begins: an equal prompt waits, then adopts them
    for line in scheduler.active:
        for segment in line.table:
            scheduler.stats["cached_tokens"] += scheduler.adopt(segment)
            end = goal(segment, line)
            begin = max(segment.computed, planned.get(id(segment), 0))
            if begin == end:
                continue
            if id(segment) in planned or len(work) == rows:
                break  # the next call goes on here
            page = scheduler.next_page(segment)
            if page in pages:
                break
            pages.add(page)
            pages.discard(None)
            count = min(chunk, end - begin)
            work.append((scheduler, segment, count))
            planned[id(segment)] = begin + count
            if begin + count < end:
                break
    return work


def goal(segment: Segment, line: Line) -> int:
    """How many tokens of a segment must be computed before `line` decodes: all, but its last."""
    return len(segment.tokens) - (segment is line.tail)


def _ready(line: Line) -> bool:
    """Whether everything the line sees is computed, or will be by what is in flight."""
    return all(segment.computed >= goal(segment, line) for segment in line.table)


def penalised(sampling: SamplingParams) -> bool:
    """Whether any token's logit is changed because it was seen."""
    return sampling.repetition_penalty != 1 or (sampling.step_repetition_penalty or 1) != 1
