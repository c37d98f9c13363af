"""The device side of a visit: host tables and tokens become the arrays of the compiled steps.

What is asked for is on its way when a call returns; `PendingStep.read` waits for it. The device
does everything in the order in which it was asked, so a page may be given to another sequence while
a call that still writes to it is on its way.
"""

import contextlib
import dataclasses
import functools
import math
from collections import abc

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from npr_jax.decode.attention import Shared, check_pool, empty_pool
from npr_jax.decode.config import EngineConfig
from npr_jax.decode.lanes import Lanes
from npr_jax.decode.scheduler import Scheduler
from npr_jax.decode.sequence import Segment, Sequence
from npr_jax.decode.steps import (
    Rows,
    SamplerOutput,
    Steps,
    compiled_steps,
    pool_shape,
    pool_spec,
)
from npr_jax.decode.tables import Tables
from npr_jax.kernels import choose_attention
from npr_jax.model.params import unstack
from npr_jax.model.sharding import decode_shardings, place_params


@dataclasses.dataclass(frozen=True)
class PendingStep:
    """N decode steps that were asked for, and not read yet: (sequence, its epoch, most tokens it
    may draw, its row of the output)."""

    sequences: list[tuple[Sequence, int, int, int]]
    output: SamplerOutput

    def is_ready(self) -> bool:
        """Whether the device has finished it."""
        return self.output.count.is_ready()  # pyright: ignore[reportAttributeAccessIssue]  # in no stub

    def read(self, stats: dict[str, int]) -> abc.Iterator[tuple]:
        """Waits for the arrays, and counts the steps that ran; then, for every sequence that is
        still in the same epoch: (sequence, most tokens it might draw, whether its lane froze, its
        tokens with log-probs, log-probs as sampled, margins and steps, or None without any)."""
        output = jax.device_get(self.output)
        first = stats["decode_steps"]
        stats["decode_steps"] += int(output.steps.max())
        stats["decode_rows"] += int(output.steps.sum())
        stats["decode_tokens"] += int(output.count.sum())
        figures = (output.tokens, output.logp, output.logp_sampled, output.margin)
        columns = [figure.tolist() for figure in figures]
        return self._each(output, columns, first)

    def _each(self, output: SamplerOutput, columns: list, first: int) -> abc.Iterator[tuple]:
        for sequence, epoch, most, row in self.sequences:
            if sequence.lane is None or sequence.epoch != epoch:
                continue  # it has ended, or will draw the same again
            count = int(output.count[row])
            drawn = [column[row][:count] for column in columns]
            drawn.append(list(range(first, first + count)))
            yield sequence, most, bool(output.frozen[row]), drawn if count else None


class Runner:
    """Owns the parameters and the KV pool, and calls the compiled steps in a few fixed shapes."""

    def __init__(self, model_config, params, config: EngineConfig, mesh: Mesh | None = None):
        self.model_config, self.config, self.mesh = model_config, config, mesh
        self.replicas = mesh.shape["data"] if mesh else 1
        attention = choose_attention(config.attention, model_config.head_dim)
        self._attention = attention
        dtype = jax.numpy.dtype(config.cache_dtype or params["embed"].dtype)
        self._steps = compiled_steps(model_config, attention, config.steps, mesh)
        # Prompts, whose pages are full but the last, are what the stock kernel of a TPU can do.
        stock = attention == "pallas" and jax.default_backend() == "tpu"
        stock = stock and params["embed"].dtype == dtype == jax.numpy.bfloat16
        prompts = "plain" if stock else attention
        self._prompt_steps = compiled_steps(model_config, prompts, config.steps, mesh)
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
        self.set_params(params)
        with _fitting(config):
            self.reset()
            self._pool = self._make_pool()
        decode, prefill = ("steps", "rows", "tokens"), ("calls", "tokens")
        names = [f"decode_{name}" for name in decode] + [f"prefill_{name}" for name in prefill]
        self.stats = dict.fromkeys(names, 0)

    def set_params(self, params) -> None:
        """Takes these weights from the next call on.

        Raises ValueError if a leaf is not what it was when the runner was made.
        """
        _refuse_unlike(params, self._like)
        if self.mesh is not None:
            params = place_params(params, decode_shardings(self.model_config, self.mesh))
        if jax.default_backend() == "cpu":
            params = _unstack(params)
        self.params = params

    def reset(self) -> None:
        """Forgets what lanes and pages hold; the next call makes another pool."""
        self._pool = None
        lanes = self.replicas * self.config.lanes
        self._lanes = Lanes(self.config, lanes, self._tables(lanes), self._put)
        self._prefill_rows = max(rows for rows, _ in self._shapes)
        self._prefill_tables = self._tables(self.replicas * self._prefill_rows)

    def _tables(self, num_rows: int) -> Tables:
        rows = self._put(Rows.empty(num_rows, self.config.longest_table), P("data"))
        write = self._steps.write
        return Tables(rows, self.config.page_size, lambda old, *new: write(old, *self._once(new)))

    def warmup(
        self, penalised: bool, progress: abc.Callable[[int, int], None] | None = None
    ) -> int:
        """Compiles every shape this engine can need; returns how many."""
        calls: list[abc.Callable[[], object]] = [
            functools.partial(self._prefill_call, [], *shape, steps)
            for steps in dict.fromkeys((self._prompt_steps, self._steps))
            for shape in self._shapes
        ]
        for tables in self._lanes.tables, self._prefill_tables:
            calls.append(functools.partial(tables.send, anyway=True))
        for penalty in (False, True)[: 1 + penalised]:
            for width in self.config.widths:
                calls.append(functools.partial(self._decode_call, [], penalty, width=width))
        for done, call in enumerate(calls, 1):
            with _fitting(self.config):
                call()
                jax.block_until_ready(self._pool)
            if progress:
                progress(done, len(calls))
        return len(calls)

    def prefill(self, schedulers: abc.Sequence[Scheduler]) -> None:
        """Computes what the sequences with lanes must have before they decode, but at most one long
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
            for _, scheduler, segment, _, count in work:
                scheduler.computed(segment, count)
                self.stats["prefill_tokens"] += count
            if (rows, chunk) == self._shapes[-1]:
                return

    def decode(self, sequences: abc.Sequence[Sequence]) -> PendingStep | None:
        """Asks for N steps of these sequences; None where none of them can draw.

        For a few steps only while other lanes wait for a chunk of their prompts: a step takes its
        time however few lanes are in it.
        """
        ready = [sequence for sequence in sequences if _is_ready(sequence)]
        few = max(1, self.config.steps // 16)
        limit = self.config.steps if len(ready) == len(sequences) else few
        counts = [min(self._most(sequence), limit) for sequence in ready]
        if not any(counts):
            return None
        penalised = any(sequence.request.penalised for sequence in ready)
        rows, output = self._decode_call(ready, penalised, counts, limit)
        asked = []
        for sequence, count, row in zip(ready, counts, rows, strict=True):
            most = count if sequence.given or not count else limit
            sequence.pending += most
            asked.append((sequence, sequence.epoch, most, row))
        return PendingStep(asked, output)

    def _most(self, sequence: Sequence) -> int:
        """The most tokens a lane draws in its next visit, if it has drawn all that was asked for;
        for given tokens this is exact."""
        tail, pending = sequence.tail, sequence.pending
        room = len(tail.pages) * self.config.page_size - len(tail.tokens) + 1
        return max(0, min(self.config.steps, sequence.left - pending, room - pending))

    def _prefill_shape(self, schedulers) -> tuple[int, int]:
        """Of the two shapes, the one that computes what is missing at less cost."""
        counts = []
        for scheduler in schedulers:
            missing = {
                id(segment): _goal(segment, sequence) - segment.computed
                for sequence in scheduler.bound
                for segment in sequence.table
            }
            counts.append([count for count in missing.values() if count > 0])

        def cost(shape):  # tokens computed, padding included, and a call's reading of the weights
            rows, chunk = shape
            calls = max(math.ceil(sum(math.ceil(n / chunk) for n in c) / rows) for c in counts)
            return calls * (rows * chunk + 64)

        return min(self._shapes, key=cost)

    def _prefill_call(self, work, rows: int, chunk: int, steps: Steps | None = None) -> None:
        shape = self.replicas * rows, chunk
        tokens, positions = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        ranks = np.full(shape, -1, np.int32)
        for r, _, segment, first, count in work:
            number = np.arange(count)
            self._prefill_tables.set(r // rows * self._prefill_rows + r % rows, segment.table)
            tokens[r, :count] = segment.tokens[first : first + count]
            positions[r, :count] = segment.start + first + number
            ranks[r, :count] = segment.offset + first + number
        arrays = self._once((tokens, positions, ranks))
        if steps is None:
            branches = any(segment.before for _, _, segment, *_ in work)
            steps = self._steps if branches else self._prompt_steps
        tables = self._prefill_tables.send()
        listed = {r // rows * self._prefill_rows + r % rows for r, *_ in work}
        places = np.arange(rows) + self._prefill_rows * np.arange(self.replicas)[:, None]
        places = [[r if r in listed else -1 for r in some] for some in places.tolist()]
        shared = self._shared(self._prefill_tables, places)
        self._pool = steps.prefill(self.params, self._take_pool(), tables, shared, *arrays)

    def _decode_call(
        self, sequences: abc.Sequence[Sequence], penalised: bool, counts=(), limit=0, width=None
    ) -> tuple[list[int], SamplerOutput]:
        """Returns the row of the output that each sequence has, and the output."""
        lanes = self._lanes
        arguments, seen = lanes.arguments(sequences, counts), None
        if penalised:  # the caller has read all that was drawn
            seen = lanes.seen(sequences, self.model_config.padded_vocab_size)
        rows, pick, least, shared = self._pick(sequences, counts, width)
        self._pool, lanes.state, output = self._steps.decode(
            self.params, self._take_pool(), *arguments, seen, pick, shared, least, np.int32(limit)
        )
        return rows, output

    def _pick(self, sequences: abc.Sequence[Sequence], counts, width: int | None):
        """The row of each sequence in a step of the least width that has room for all of them; the
        lanes i32[replicas * width] in these rows, or None for all; i32[replicas], how many must be
        at work lest the visit ends: three of four that can be, so that others can take their place
        soon; and what the rows have in common."""
        num = int(self.config.lanes)
        lanes = [sequence.lane for sequence in sequences if sequence.lane is not None]
        places = [divmod(lane, num) for lane in lanes]
        found = [sorted(lane for r, lane in places if r == s) for s in range(self.replicas)]
        given = any(sequence.given for sequence in sequences)  # which come in fixed portions
        able = [r for (r, _), count in zip(places, counts, strict=True) if count and not given]
        least = [math.ceil(_AT_WORK * able.count(replica)) for replica in range(self.replicas)]
        most = max(map(len, found))
        width = width or next(width for width in self.config.widths if width >= most)
        if width == num:
            rows, pick = lanes, None
            at_work = [[lane if lane in some else -1 for lane in range(num)] for some in found]
        else:
            at_work = [some + [-1] * (width - len(some)) for some in found]
            pick = np.full((self.replicas, width), num, np.int32)
            row = {}
            for replica, some in enumerate(found):
                pick[replica, : len(some)] = some
                row |= {(replica, lane): replica * width + i for i, lane in enumerate(some)}
            rows, pick = [row[place] for place in places], self._once(pick.reshape(-1))
        places = [
            [lane if lane < 0 else replica * num + lane for lane in some]
            for replica, some in enumerate(at_work)
        ]
        shared = self._shared(self._lanes.tables, places)
        return rows, pick, self._once(np.array(least, np.int32)), shared

    def _shared(self, tables: Tables, rows: list[list[int]]) -> Shared:
        """What the rows of each replica have in common."""
        found = [tables.shared(tuple(some)) for some in rows]
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


def _prefill_work(scheduler: Scheduler, rows: int, chunk: int):
    """Up to `rows` pieces (scheduler, segment, its token at which they begin, how many) that one
    call can compute together; a long segment takes a row for every `chunk` of its tokens."""
    work: list[tuple[Scheduler, Segment, int, int]] = []
    planned: dict[int, int] = {}  # segment: its computed tokens after this call
    pages = set()  # prompt pages that this call begins: an equal prompt waits, then adopts them
    for sequence in scheduler.bound:
        for segment in sequence.table:
            scheduler.stats["cached_tokens"] += scheduler.adopt(segment)
            end = _goal(segment, sequence)
            begin = max(segment.computed, planned.get(id(segment), 0))
            if begin == end:
                continue
            if len(work) == rows:
                return work
            if id(segment) in planned:
                break  # the next call goes on here
            page = scheduler.next_page(segment)
            if page in pages:
                break
            pages.add(page)
            pages.discard(None)
            while begin < end and len(work) < rows:
                count = min(chunk, end - begin)
                work.append((scheduler, segment, begin, count))
                begin += count
            planned[id(segment)] = begin
            if begin < end:
                return work
    return work


def _goal(segment: Segment, sequence: Sequence) -> int:
    """How many tokens of a segment must be computed before `sequence` decodes: all, but its own
    last."""
    return len(segment.tokens) - (segment is sequence.tail)


def _is_ready(sequence: Sequence) -> bool:
    """Whether everything the sequence sees is computed, or will be by what is on its way."""
    return all(segment.computed >= _goal(segment, sequence) for segment in sequence.table)
