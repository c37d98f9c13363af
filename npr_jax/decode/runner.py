"""The device side of a visit: host tables and tokens become the arrays of the compiled steps.

What is asked for is on its way when a call returns; `PendingStep.read` waits for it. The device
does everything in the order in which it was asked, so a page may be given to another sequence while
a call that still writes to it is on its way.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import itertools
import os
from collections import abc

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from npr_jax.decode.attention import Shared, check_pool, empty_pool
from npr_jax.decode.config import EngineConfig
from npr_jax.decode.lanes import Lanes
from npr_jax.decode.prefill import Scored, copies_of, prefill_work, runs_of, score_targets
from npr_jax.decode.scheduler import Scheduler
from npr_jax.decode.sequence import FIGURES, Segment, Sequence
from npr_jax.decode.steps import (
    COPIED,
    SCORED,
    Rows,
    SamplerOutput,
    Steps,
    compiled_steps,
    pool_shape,
    pool_spec,
)
from npr_jax.decode.tables import Tables
from npr_jax.kernels import choose_attention
from npr_jax.kernels.exact import key_block
from npr_jax.model.exact import check, for_engine, require
from npr_jax.model.lora import adapters_of, alone, joined, same_part
from npr_jax.model.params import unstack
from npr_jax.model.sharding import decode_shardings, place_params


@dataclasses.dataclass(frozen=True)
class PendingStep:
    """N decode steps that were asked for, and not read yet: (sequence, its epoch, most tokens it
    may draw, its row of the output); and tokens of prompts that prefills before it have scored."""

    sequences: list[tuple[Sequence, int, int, int]]
    output: SamplerOutput
    scored: list[tuple[Scored, tuple]] = dataclasses.field(default_factory=list)

    def is_ready(self) -> bool:
        """Whether the device has finished it."""
        return self.output.count.is_ready()  # pyright: ignore[reportAttributeAccessIssue]  # in no stub

    def read(self, stats: dict[str, int]) -> abc.Iterator[tuple]:
        """Waits for the arrays, puts the scores of prompts where they belong, and counts the steps
        that ran; then, for every sequence that is still in the same epoch: (sequence, most tokens
        it might draw, whether its lane froze, whether its log-probs are finite, its tokens, their
        figures)."""
        output = jax.tree.map(np.asarray, self.output)
        for scored, arrays in self.scored:
            arrays = jax.tree.map(np.asarray, arrays)
            for scores, at, here in scored:
                scores.put(at, *(x.reshape(-1, *x.shape[2:])[here] for x in arrays))
        first = stats["decode_steps"]
        stats["decode_steps"] += int(output.steps.max())
        stats["decode_rows"] += int(output.steps.sum())
        stats["decode_tokens"] += int(output.count.sum())
        return self._each(output, first)

    def _each(self, output: SamplerOutput, first: int) -> abc.Iterator[tuple]:
        figures = np.zeros(output.tokens.shape, FIGURES)
        for name in ("logp", "logp_sampled", "margin"):
            figures[name] = getattr(output, name)
        number = np.arange(figures.shape[1])
        figures["step"] = first + number
        drawn = number < np.expand_dims(output.count, 1)
        finite = np.all(np.isfinite(output.logp) | ~drawn, axis=1).tolist()
        tokens, counts = output.tokens.tolist(), output.count.tolist()
        rests = output.frozen.tolist()
        for sequence, epoch, most, row in self.sequences:
            if sequence.lane is None or sequence.epoch != epoch:
                continue  # it has ended, or will draw the same again
            count = counts[row]
            own = figures[row, :count]
            if sequence.tail.dtype != FIGURES:
                k = sequence.request.sampling.logprobs
                own, few = sequence.tail.no_figures(count), own
                for name in FIGURES.names or ():
                    own[name] = few[name]
                for name in ("top_ids", "top_logp"):
                    own[name][:, :k] = getattr(output, name)[row, :count, :k]
            scores = sequence.request.scores
            good = finite[row] and (scores is None or scores.finite)
            yield sequence, most, rests[row], good, tokens[row][:count], own


class Runner:
    """Owns the parameters and the KV pool, and calls the compiled steps in a few fixed shapes."""

    def __init__(self, model_config, params, config: EngineConfig, mesh: Mesh | None = None):
        if config.exact:
            require(model_config, mesh, "engine.exact")
            if model_config.lora:
                raise ValueError(
                    "engine.exact is true and the model has adapters, for which exact is not: set "
                    "it to false, or decode with merged weights (npr_jax.Model.merged)"
                )
            model_config = dataclasses.replace(model_config, attention="exact")
        self.model_config, self.config, self.mesh = model_config, config, mesh
        self.replicas = mesh.shape["data"] if mesh else 1
        attention = "exact" if config.exact else config.attention
        attention = choose_attention(attention, model_config.head_dim)
        self._attention = attention
        dtype = jax.numpy.dtype(config.cache_dtype or params["embed"].dtype)
        shape = config.steps, mesh, config.max_logprobs
        self._steps = compiled_steps(model_config, attention, *shape)
        # Prompts, whose pages are full but the last, are what the stock kernel of a TPU can do.
        stock = attention == "pallas" and jax.default_backend() == "tpu"
        stock = stock and params["embed"].dtype == dtype == jax.numpy.bfloat16
        prompts = "plain" if stock else attention
        self._prompt_steps = compiled_steps(model_config, prompts, *shape)
        check_pool(attention, dtype)
        self._dtype = dtype
        self._like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
        self._shapes = tuple(
            dict.fromkeys(
                (
                    (min(config.lanes, config.header_rows), config.header_chunk),
                    (config.prefill_rows, config.prefill_chunk),
                )
            )
        )
        if config.exact:
            self._refuse_inexact(params["embed"].dtype)
            counts = [*config.widths, *(rows * chunk for rows, chunk in self._shapes), SCORED]
            check(model_config, counts, few=True)
        self.set_params(params)
        with _fitting(config):
            self.reset()
            self._pool = self._make_pool()
        decode, prefill = ("steps", "rows", "tokens"), ("calls", "tokens")
        names = [f"decode_{name}" for name in decode] + [f"prefill_{name}" for name in prefill]
        self.stats = dict.fromkeys(names, 0)

    def set_params(self, params) -> None:
        """Takes these weights from the next call on: all of them; of a model with adapters also the
        adapters alone, for the base that is there, or a model's without, to which none is added.

        Raises ValueError if a leaf is not what it was when the runner was made.
        """
        config = self.model_config
        if config.lora and not alone(config, params) and not adapters_of(params)["layers"]:
            nothing = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), adapters_of(self._like))
            params = joined(params, nothing)
        _refuse_unlike(params, same_part(config, self._like, params))
        adapters = alone(config, params)
        if self.mesh is not None:
            shardings = decode_shardings(config, self.mesh)
            params = place_params(params, same_part(config, shardings, params))
        if jax.default_backend() == "cpu":
            params = _unstack(params)
        if self.config.exact:
            params = for_engine(config, params)
        self.params = joined(self.params, params) if adapters else params

    def _refuse_inexact(self, dtype) -> None:
        """Refuses pages in which keys do not keep their bits, or that attention cannot take."""
        size, most = self.config.page_size, key_block(self.model_config.head_dim)
        if self._dtype != dtype:
            raise ValueError(
                f"engine.cache_dtype is {self._dtype} and engine.exact true, needed is the "
                f"weights' {dtype}: set cache_dtype to null, or exact to false"
            )
        if size > most:
            raise ValueError(
                f"engine.page_size is {size} and engine.exact true, needed is at most {most} for "
                f"head_dim={self.model_config.head_dim}: make it smaller, or set exact to false"
            )

    def reset(self) -> None:
        """Forgets what lanes and pages hold; the next call makes another pool."""
        self._pool = None
        self._scored: list[tuple[Scored, tuple]] = []  # that no pending step tells of yet
        lanes = self.replicas * self.config.lanes
        seen = np.zeros((lanes, self.model_config.padded_vocab_size), np.uint16)
        seen, mark = self._put(seen, P("data")), self._steps.mark
        tables = self._tables(lanes)
        self._lanes = Lanes(self.config, tables, seen, mark, self._put, self._once)
        self._prefill_rows = max(rows for rows, _ in self._shapes)
        self._prefill_tables = self._tables(self.replicas * self._prefill_rows)

    def _tables(self, num_rows: int) -> Tables:
        rows = self._put(Rows.empty(num_rows, self.config.longest_table), P("data"))
        write = self._steps.write
        return Tables(rows, self.config.page_size, lambda old, *new: write(old, *self._once(new)))

    def warmup(self, progress: abc.Callable[[int, int], None] | None = None) -> int:
        """Compiles every shape this engine can need, as many at a time as there are cores, and
        calls each once; returns how many."""
        lanes, widths = self._lanes, self.config.widths
        steps = dict.fromkeys((self._prompt_steps, self._steps))
        prefills = list(itertools.product(steps, self._shapes))
        calls: list[abc.Callable[[], object]] = [
            functools.partial(lanes.tables.send, anyway=True),
            functools.partial(self._prefill_tables.send, anyway=True),
            functools.partial(lanes.mark, {}),
            *(functools.partial(self._prefill_call, [], *shape, some) for some, shape in prefills),
            *(functools.partial(self._decode_call, [], width=width) for width in widths),
        ]
        if self.config.rules.hide:
            calls.append(lambda: self._copy_call([np.zeros((0, 4))] * self.replicas))
        if self.config.max_logprobs:
            calls.append(functools.partial(self._score_call, [], *self._shapes[-1]))
        with _fitting(self.config):
            jobs = [
                (self._steps.decode, self._decode_arguments([], width=width)[1]) for width in widths
            ]
            jobs += [(some.prefill, self._prefill_arguments([], *at)) for some, at in prefills]
            if self.config.max_logprobs:
                jobs.append((self._steps.score, self._score_arguments([], *self._shapes[-1])[1]))
            self._pool = pool = self._take_pool()
            # Several processes may have to compile the same program at the same time.
            workers = 1 if jax.process_count() > 1 else os.cpu_count()
            with concurrent.futures.ThreadPoolExecutor(workers) as threads:
                compiled = [
                    threads.submit(step.lower(self.params, pool, *arguments).compile)
                    for step, arguments in jobs
                ]
                for done, program in enumerate(compiled, 1):
                    program.result()
                    if progress:
                        progress(done, len(calls))
        for done, call in enumerate(calls, 1):
            with _fitting(self.config):
                call()
                jax.block_until_ready(self._pool)
            if progress and done > len(jobs):
                progress(done, len(calls))
        return len(calls)

    def prefill(self, schedulers: abc.Sequence[Scheduler]) -> None:
        """Computes what the sequences with lanes must have before they decode, but at most one long
        chunk of it, so that decoding lanes wait for no more than that."""
        shape = None
        while any(unready := [scheduler.unready() for scheduler in schedulers]):
            if self._copy(schedulers, unready):
                continue
            if shape == self._shapes[-1]:
                return
            shape = rows, chunk = self._prefill_shape(unready)
            work = []
            for replica, lines in enumerate(zip(schedulers, unready, strict=True)):
                row = replica * rows
                for scheduler, run in prefill_work(*lines, rows, chunk):
                    work.append((row, scheduler, run))
                    row += -(-sum(count for _, count in run) // chunk)
            if not work:  # it was adopted
                continue
            self._prefill_call(work, rows, chunk)
            self.stats["prefill_calls"] += 1
            for _, scheduler, run in work:
                for segment, count in run:
                    scheduler.computed(segment, count)
                    self.stats["prefill_tokens"] += count

    def _copy(
        self, schedulers: abc.Sequence[Scheduler], unready: abc.Sequence[list[Sequence]]
    ) -> bool:
        """Makes the copies that can be made; whether there were any."""
        copies = [copies_of(some) for some in unready]
        if not any(copies):
            return False
        cells = [self._copy_cells(some) for some in copies]
        for first in range(0, max(map(len, cells)), COPIED):
            self._copy_call([some[first : first + COPIED] for some in cells])
        for scheduler, some in zip(schedulers, copies, strict=True):
            for segment in some:
                scheduler.computed(segment, len(segment.tokens))
        return True

    def _copy_cells(self, copies: list[Segment]) -> np.ndarray:
        """i32[N, 4], of every entry of some copies where it comes from and goes to."""
        size = self.config.page_size

        def places(segment: Segment, begin: int, end: int) -> np.ndarray:
            entries = np.arange(begin, end)
            return np.stack([np.array(segment.pages)[entries // size], entries % size], axis=1)

        pairs = [
            np.concatenate([np.concatenate([places(*p) for p in x.pieces]), places(*x.whole)], 1)
            for x in copies
        ]
        return np.concatenate([np.zeros((0, 4), np.int64), *pairs])

    def _copy_call(self, cells: abc.Sequence[np.ndarray]) -> None:
        """Copies entries, at most COPIED of each replica."""
        rows = np.full((self.replicas, COPIED, 4), (0, 0, self.config.pages, 0), np.int32)
        for row, some in zip(rows, cells, strict=True):
            row[: len(some)] = some
        self._pool = self._steps.copy(self._take_pool(), self._once(rows.reshape(-1, 4)))

    def decode(self, sequences: abc.Sequence[Sequence]) -> PendingStep | None:
        """Asks for N steps of these sequences; None where none of them can draw.

        For a few steps only while other lanes wait for a chunk of their prompts: a step takes its
        time however few lanes are in it.
        """
        ready = [sequence for sequence in sequences if sequence.ready]
        few = max(1, self.config.steps // 16)
        limit = self.config.steps if len(ready) == len(sequences) else few
        counts = [self._most(sequence, limit) for sequence in ready]
        if not any(counts):
            return None
        rows, output = self._decode_call(ready, counts, limit)
        asked = []
        for sequence, count, row in zip(ready, counts, rows, strict=True):
            most = count if sequence.given or not count else limit
            sequence.pending += most
            asked.append((sequence, sequence.epoch, most, row))
        scored, self._scored = self._scored, []
        return PendingStep(asked, jax.copy_to_host_async(output), scored)

    def _most(self, sequence: Sequence, limit: int) -> int:
        """The most tokens a lane draws in its next visit of `limit` steps, if it has drawn all that
        was asked for; for given tokens this is exact."""
        tail = sequence.tail
        room = len(tail.pages) * self.config.page_size - len(tail.tokens) + 1
        return max(0, min(limit, min(sequence.left, room) - sequence.pending))

    def _prefill_shape(self, unready: list[list[Sequence]]) -> tuple[int, int]:
        """Of the two shapes, the one that computes what the sequences of each replica lack at less
        cost; that of long prompts where something is to be scored."""
        if any(x.to_score for some in unready for sequence in some for x in sequence.needs):
            return self._shapes[-1]
        counts = [[] for _ in unready]
        for lengths, some in zip(counts, unready, strict=True):
            seen: set[Segment] = set()
            for sequence in some:
                for run in runs_of(sequence, self.config.page_size, seen):
                    lengths.append(sum(map(sequence.lacks, run)))
                    seen.update(run)

        def cost(shape):  # tokens computed, padding included, and a call's reading of the weights
            rows, chunk = shape
            calls = max(-(-sum(-(-n // chunk) for n in some) // rows) for some in counts)
            return calls * (rows * chunk + 64)

        return min(self._shapes, key=cost)

    def _prefill_call(self, work, rows: int, chunk: int, steps: Steps | None = None) -> None:
        if any(segment.to_score for *_, run in work for segment, _ in run):
            self._score_call(work, rows, chunk)
            return
        if steps is None:
            plain = all(segment.plain for *_, run in work for segment, _ in run)
            steps = self._prompt_steps if plain else self._steps
        arguments = self._prefill_arguments(work, rows, chunk)
        self._pool = steps.prefill(self.params, self._take_pool(), *arguments)

    def _score_call(self, work, rows: int, chunk: int) -> None:
        scored, arguments = self._score_arguments(work, rows, chunk)
        self._pool, *found = self._steps.score(self.params, self._take_pool(), *arguments)
        self._scored.append((scored, jax.copy_to_host_async(tuple(found))))

    def _score_arguments(self, work, rows: int, chunk: int) -> tuple[Scored, tuple]:
        """What is scored, and what a scoring prefill takes after the weights and the pool."""
        targets, scored = score_targets(work, self.replicas * rows, chunk)
        return scored, (*self._prefill_arguments(work, rows, chunk), self._once(targets))

    def _prefill_arguments(self, work, rows: int, chunk: int) -> tuple:
        """What a prefill takes after the weights and the pool."""
        shape = self.replicas * rows, chunk
        tokens, positions = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        ranks = np.full(shape, -1, np.int32)
        listed = [[-1] * rows for _ in range(self.replicas)]
        for row, _, run in work:
            begin = end = row * chunk  # consecutive chunks fill consecutive rows
            for segment, count in run:
                first, here = segment.computed, slice(end, end + count)
                tokens.reshape(-1)[here] = segment.tokens[first : first + count]
                for array, start in ((positions, segment.start), (ranks, segment.offset)):
                    array.reshape(-1)[here] = np.arange(start + first, start + first + count)
                end += count
            (replica, place), used = divmod(row, rows), -(-(end - begin) // chunk)
            table = replica * self._prefill_rows + place
            self._prefill_tables.set(table, run[-1][0].table, used, written=len(run))
            listed[replica][place : place + used] = range(table, table + used)
        tables = self._prefill_tables.send()
        shared = self._shared(self._prefill_tables, listed)
        return tables, shared, *self._once((tokens, positions, ranks))

    def _decode_call(
        self, sequences: abc.Sequence[Sequence], counts=(), limit=0, width=None
    ) -> tuple[list[int], SamplerOutput]:
        """Returns the row of the output that each sequence has, and the output."""
        lanes = self._lanes
        rows, arguments = self._decode_arguments(sequences, counts, limit, width)
        self._pool, lanes.state, lanes.seen, output = self._steps.decode(
            self.params, self._take_pool(), *arguments
        )
        return rows, output

    def _decode_arguments(
        self, sequences: abc.Sequence[Sequence], counts=(), limit=0, width=None
    ) -> tuple[list[int], tuple]:
        """The row that each sequence has, and what a decode step takes after the weights and the
        pool."""
        arguments = self._lanes.arguments(sequences, counts)
        rows, pick, least, shared = self._pick(sequences, counts, width)
        return rows, (*arguments, pick, shared, least, np.int32(limit))

    def _pick(self, sequences: abc.Sequence[Sequence], counts, width: int | None):
        """The row of each sequence in a step of the least width that has room for all of them; the
        lanes i32[replicas * width] in these rows, or None for all; i32[replicas], how many must be
        at work lest the visit ends: three of four that can be, so that others can take their place
        soon; and what the rows have in common."""
        num = int(self.config.lanes)
        lanes = [sequence.lane for sequence in sequences if sequence.lane is not None]
        found: list[list[int]] = [[] for _ in range(self.replicas)]
        for lane in sorted(lanes):
            found[lane // num].append(lane)
        able = [0] * self.replicas
        if not any(sequence.given for sequence in sequences):  # which come in fixed portions
            for lane, count in zip(lanes, counts, strict=True):
                able[lane // num] += count > 0
        least = np.ceil(_AT_WORK * np.array(able)).astype(np.int32)
        most = max(map(len, found))
        width = width or next(width for width in self.config.widths if width >= most)
        if width == num:
            rows, pick = lanes, None
            at_work = [[-1] * num for _ in found]
            for lane in lanes:
                at_work[lane // num][lane % num] = lane
        else:
            at_work = [some + [-1] * (width - len(some)) for some in found]
            pick = np.full((self.replicas, width), num, np.int32)
            row = {}
            for replica, some in enumerate(found):
                pick[replica, : len(some)] = np.array(some, np.int32) - replica * num
                row |= {lane: replica * width + i for i, lane in enumerate(some)}
            rows, pick = [row[lane] for lane in lanes], self._once(pick.reshape(-1))
        return rows, pick, self._once(least), self._shared(self._lanes.tables, at_work)

    def _shared(self, tables: Tables, rows: list[list[int]]) -> Shared:
        """What the rows of each replica have in common."""
        found = [tables.shared(tuple(some)) for some in rows]
        if len(found) == 1:
            return self._once(found[0])
        return self._once(jax.tree.map(lambda *x: np.concatenate(x), *found))

    def _take_pool(self):
        """The pool, to be donated: until the call has given it back, there is none."""
        pool, self._pool = self._pool, None
        return self._make_pool() if pool is None else pool

    def _make_pool(self):
        config, dtype = self.config, self._dtype
        pages, name = self.replicas * config.pages, self._attention
        shape = pool_shape(self.model_config, name, pages, config.page_size)
        if self.mesh is None:
            return empty_pool(shape, dtype)
        sharding = NamedSharding(self.mesh, pool_spec(self.model_config, name, self.mesh))
        return jax.jit(lambda: empty_pool(shape, dtype), out_shardings=sharding)()

    def _once(self, tree):
        """Host arrays for one call, which a device alone takes as they are."""
        return tree if self.mesh is None else self._put(tree)

    def _put(self, tree, spec: P | None = None):
        """Host arrays to the device; every process has the same ones of a mesh."""
        if self.mesh is None:
            return jax.device_put(tree)
        sharding = NamedSharding(self.mesh, spec or P())
        return jax.tree.map(
            lambda x: jax.make_array_from_callback(x.shape, sharding, lambda i: x[i]), tree
        )


_unstack = jax.jit(unstack)
_AT_WORK = 0.75  # of a visit's lanes: it ends when fewer are


@contextlib.contextmanager
def _fitting(config: EngineConfig) -> abc.Iterator[None]:
    """Where memory, of the host or the device, is too small for an engine, its sizes are named."""
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        names = ("lanes", "pages", "page_size", "table_pages", "steps")
        names += ("header_rows", "header_chunk", "prefill_rows", "prefill_chunk")
        sizes = ", ".join(f"engine.{name}={getattr(config, name)}" for name in names)
        raise ValueError(f"memory is too small for {sizes} ({error}): make some smaller") from error


def _refuse_unlike(params, like) -> None:
    """Refuses weights of another structure, shape or dtype, and names the leaf."""

    def leaves(tree) -> dict[str, str]:
        found, _ = jax.tree_util.tree_flatten_with_path(tree)
        return {
            jax.tree_util.keystr(path, simple=True, separator="/"): (
                f"{getattr(x, 'dtype', type(x).__name__)}{list(np.shape(x))}"
            )
            for path, x in found
        }

    has, needs = leaves(params), leaves(like)
    for name in (*needs, *has):
        if has.get(name) != needs.get(name):
            raise ValueError(
                f"the weights' {name} is {has.get(name, 'missing')}, needed is "
                f"{needs.get(name, 'no such leaf')}, as in the engine's own"
            )
