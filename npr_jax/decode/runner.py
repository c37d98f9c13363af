"""The device side of a visit: host tables and tokens become the arrays of the compiled steps."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from npr_jax.decode.compiled import (
    Drawn,
    as_rows,
    buckets,
    decode,
    make_pool,
    pick,
    prefill,
)
from npr_jax.decode.config import EngineConfig
from npr_jax.decode.lines import Line, Segment
from npr_jax.decode.sampling import LaneSampling, SamplingParams, fold_branches


class Runner:
    """Owns the parameters and the KV pool, and calls the compiled steps in a few fixed shapes."""

    def __init__(self, model_config, params, config: EngineConfig):
        self.model_config, self.params, self.config = model_config, params, config
        dtype = config.cache_dtype or params["embed"].dtype
        self._pool = make_pool(model_config, config.pages, config.page_size, dtype)
        longest = config.longest_table
        self._widths = buckets(min(8, longest), longest)
        self._shapes = (
            (config.lanes, config.header_chunk),
            (config.prefill_rows, config.prefill_chunk),
        )
        self.stats = dict.fromkeys(
            ("decode_steps", "sampled_tokens", "prefill_calls", "prefill_tokens"), 0
        )

    def warmup(self, sampling: SamplingParams | None = None) -> int:
        """Compiles every shape this engine can need for such sampling; returns how many."""
        penalised = sampling is not None and _penalty(sampling)
        count = 0
        for width in self._widths:
            for rows, chunk in self._shapes:
                self._prefill_call([], rows, chunk, width)
                count += 1
            self._decode_call({}, width, penalised)
            count += 1
        self.fold(np.zeros(2, np.uint32), 1)
        return count

    def fold(self, key: np.ndarray, count: int) -> list[np.ndarray]:
        """The keys of branches 0..count-1 of `key`, in calls of one fixed shape."""
        size, keys = self.config.max_branches, []
        for first in range(0, count, size):
            numbers = np.arange(first, first + size, dtype=np.int32)
            keys += list(np.asarray(fold_branches(key, numbers)))
        return keys[:count]

    def prefill(self, lines: list[Line]) -> None:
        """Computes what `lines` must have before they decode, but at most one long chunk of it."""
        while True:
            rows, chunk = self._prefill_shape(lines)
            work = self._prefill_work(lines, rows, chunk)
            if not work:
                return
            tables = [(*segment.before, segment) for segment, _, _ in work]
            self._prefill_call(work, rows, chunk, self._width(tables))
            self.stats["prefill_calls"] += 1
            for segment, _, count in work:
                segment.computed += count
                self.stats["prefill_tokens"] += count
            if (rows, chunk) == self._shapes[1]:
                return

    def decode(self, steps: dict[Line, int]) -> Drawn:
        """Draws up to `steps[line]` tokens for every line; rows of the result are lanes."""
        penalised = any(_penalty(line.job.sampling) for line in steps)
        drawn = self._decode_call(steps, self._width([line.table for line in steps]), penalised)
        for line in steps:
            count = int(drawn.count[line.lane])
            line.tail.computed += count
            self.stats["sampled_tokens"] += count
        return drawn

    def _width(self, tables) -> int:
        """The bucket of table lengths that holds these tables."""
        return pick(self._widths, max(sum(len(s.pages) for s in table) for table in tables))

    def _prefill_shape(self, lanes: list[Line]) -> tuple[int, int]:
        """Of the two shapes, the one that computes what is pending with less padding."""
        pending = {
            id(segment): goal(segment, line) - segment.computed
            for line in lanes
            for segment in line.table
        }
        counts = [count for count in pending.values() if count > 0]

        def cost(shape):  # tokens computed, padding included
            rows, chunk = shape
            calls = math.ceil(len(counts) / rows) * math.ceil(max(counts, default=0) / chunk)
            return calls * rows * chunk

        return min(self._shapes, key=cost)

    def _prefill_work(self, lanes, rows: int, chunk: int) -> list[tuple[Segment, int, int]]:
        """Up to `rows` pieces (segment, first token, count) that can be computed in one call."""
        work, planned = [], {}
        for line in lanes:
            for segment in line.table:
                end = goal(segment, line)
                begin = max(segment.computed, planned.get(id(segment), 0))
                if begin == end:
                    continue
                if id(segment) in planned or len(work) == rows:
                    break  # the next call goes on here
                count = min(chunk, end - begin)
                work.append((segment, begin, count))
                planned[id(segment)] = begin + count
                if begin + count < end:
                    break
        return work

    def _prefill_call(self, work, rows: int, chunk: int, width: int) -> None:
        tokens = np.zeros((rows, chunk), np.int32)
        positions = np.zeros((rows, chunk), np.int32)
        ranks = np.full((rows, chunk), -1, np.int32)
        tables = []
        for r, (segment, first, count) in enumerate(work):
            tables.append(self._table((*segment.before, segment)))
            start = sum(len(s.tokens) for s in segment.before) + first
            tokens[r, :count] = segment.tokens[first : first + count]
            positions[r, :count] = segment.start + first + np.arange(count)
            ranks[r, :count] = start + np.arange(count)
        self._pool = prefill(
            self.model_config,
            self.params,
            self._pool,
            as_rows(tables, rows, width),
            tokens,
            positions,
            ranks,
        )

    def _table(self, segments: Sequence[Segment]) -> tuple[np.ndarray, np.ndarray]:
        """Pages in order and the number of entries before each; the last segment's are open."""
        size = self.config.page_size
        pages, fills = [], []
        for segment in segments:
            pages += segment.pages
            fills += [size] * len(segment.pages)
            if segment is not segments[-1]:
                fills[-1] = len(segment.tokens) - size * (len(segment.pages) - 1)
        return np.array(pages, np.int32), np.cumsum([0, *fills], dtype=np.int32)

    def _decode_call(self, steps: dict[Line, int], width: int, penalised: bool):
        lanes, stops = self.config.lanes, self.config.max_stops
        ints = {name: np.zeros(lanes, np.int32) for name in ("token", "position", "limit", "top_k")}
        ranks = np.full(lanes, -1, np.int32)
        given = np.full((lanes, self.config.steps), -1, np.int32)
        ends = np.full((lanes, stops), -1, np.int32)
        keys = np.zeros((lanes, 2), np.uint32)
        floats = {name: np.ones(lanes, np.float32) for name in ("temperature", "top_p", "penalty")}
        min_p = np.zeros(lanes, np.float32)
        seen = np.zeros((lanes, self.model_config.padded_vocab_size), bool) if penalised else None
        tables = [(np.zeros(0, np.int32), np.zeros(1, np.int32))] * lanes
        for line, count in steps.items():
            r, sampling, table = line.lane, line.job.sampling, line.table
            tables[r] = self._table(table)
            ints["token"][r] = line.tail.tokens[-1]
            ints["position"][r] = line.position
            ints["limit"][r] = count
            ranks[r] = sum(len(segment.tokens) for segment in table) - 1
            keys[r] = line.key
            if line.script:
                done = len(line.tail.tokens)
                given[r, :count] = line.script.pieces[line.piece][done : done + count]
            else:
                ends[r, : len(line.job.stops)] = line.job.stops
            floats["temperature"][r] = sampling.temperature
            floats["top_p"][r] = sampling.top_p
            ints["top_k"][r] = sampling.top_k
            min_p[r] = sampling.min_p
            penalty = sampling.step_repetition_penalty if line.parent else None
            floats["penalty"][r] = penalty or sampling.repetition_penalty
            if penalised:
                for segment in table:
                    seen[r, segment.tokens] = True
        self._pool, drawn, count = decode(
            self.model_config,
            self.params,
            self._pool,
            as_rows(tables, lanes, width),
            ints["token"],
            ints["position"],
            ranks,
            ints["limit"],
            given,
            LaneSampling(key=keys, stops=ends, top_k=ints["top_k"], min_p=min_p, **floats),
            None if seen is None else jnp.asarray(seen),
        )
        drawn, count = jax.device_get((drawn, count))
        self.stats["decode_steps"] += int(count)
        return drawn


def goal(segment: Segment, line: Line) -> int:
    """How many tokens of a segment must be computed before `line` decodes: all, but its last."""
    return len(segment.tokens) - (segment is line.tail)


def ready(line: Line) -> bool:
    """Whether everything the line sees is computed."""
    return all(segment.computed >= goal(segment, line) for segment in line.table)


def _penalty(sampling: SamplingParams) -> bool:
    return sampling.repetition_penalty != 1 or (sampling.step_repetition_penalty or 1) != 1
