"""The compiled steps of the engine: `prefill` computes known tokens, `decode` draws new ones, and
`write` keeps the tables of their rows.

The first two run the model over rows of tokens; each layer writes the rows' keys and values into
pages of one pool, then every row attends over the pages of its own table (decode/attention.py).
Visibility is what is listed: a sequence's table holds its ancestors, its joined branches and
itself, but no sibling.

Rows may depend on each other within one call (a branch's header on its parent's last token),
because in every layer all keys are written before any row attends.

What a lane does next stays on the device between two calls of `decode`, so that the host can ask
for the next steps before it has read the last.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from npr_jax.decode.attention import FAR, PagedAttention, Shared, paged_attention, write
from npr_jax.decode.sampling import Array, LaneSampling, likeliest, sample
from npr_jax.model import ModelConfig, forward, head, log_sum_exp, unembed

SCORED = 128  # tokens of a prompt whose logits exist at one time
COPIED = 256  # entries that one call copies


def pool_shape(
    config: ModelConfig, attention: str, num_pages: int, page_size: int
) -> tuple[int, ...]:
    """The KV pool of an implementation (decode/attention.py): layers, pages, then entries and the
    keys and values of heads in its order, head_dim."""
    page = [page_size, 2 * config.num_kv_heads]
    if paged_attention(attention).heads == 2:
        page.reverse()
    return (config.num_layers, num_pages, *page, config.head_dim)


@struct.dataclass
class Rows:
    """The tables of R rows: pages i32[R, M] in order, and base i32[R, M + 1], the entries before
    each, or FAR after the last.

    A row's last segment, which grows, begins in `column` i32[R] with the rank `entry` i32[R]; its
    pages have places for ranks up to `room` i32[R], not included.
    """

    table: Array
    base: Array
    column: Array
    entry: Array
    room: Array

    @staticmethod
    def empty(rows: int, width: int) -> "Rows":
        """Tables that list nothing, on the host."""
        ends = np.zeros((3, rows), np.int32)
        table = np.zeros((rows, width), np.int32)
        return Rows(table, np.full((rows, width + 1), FAR, np.int32), *ends)


@struct.dataclass
class LaneState:
    """Where R lanes are, i32[R] and `frozen` bool[R].

    `tokens`, `positions`, `ranks` are of the last token, which is not computed yet; `left`: tokens
    it may still draw; `frozen`: it rests until the host restarts it.
    """

    tokens: Array
    positions: Array
    ranks: Array
    left: Array
    frozen: Array

    def moved(self, on, stop, tokens) -> "LaneState":
        """One token further where `on` bool[R], to rest where `stop` bool[R]."""
        return LaneState(
            tokens=jnp.where(on, tokens, self.tokens),
            positions=self.positions + on,
            ranks=self.ranks + on,
            left=self.left - on,
            frozen=self.frozen | stop,
        )


@struct.dataclass
class SamplerOutput:
    """What a visit drew.

    `tokens` i32[R, N] and their figures f32[R, N] (sampling.py), of which the first `count[r]`
    i32[R] of row r count; `frozen` bool[R]: the lanes whose last token is one of their stops;
    `steps` i32[R]: that ran; `top_ids` i32[R, N, K] and `top_logp` f32[R, N, K]: the likeliest in
    place of each token where a lane in the call wants them (None: of an engine that gives none).
    """

    tokens: jax.Array
    logp: jax.Array
    logp_sampled: jax.Array
    margin: jax.Array
    count: jax.Array
    frozen: jax.Array
    steps: jax.Array
    top_ids: jax.Array | None = None
    top_logp: jax.Array | None = None

    @staticmethod
    def empty(rows: int, steps: int, top: int) -> "SamplerOutput":
        """Of a visit that has not begun, with so many of the likeliest tokens."""

        def zeros(dtype, *shape):
            return jnp.zeros((rows, *shape), dtype)

        return SamplerOutput(
            tokens=zeros(jnp.int32, steps),
            logp=zeros(jnp.float32, steps),
            logp_sampled=zeros(jnp.float32, steps),
            margin=zeros(jnp.float32, steps),
            count=zeros(jnp.int32),
            frozen=zeros(bool),
            steps=zeros(jnp.int32),
            top_ids=zeros(jnp.int32, steps, top) if top else None,
            top_logp=zeros(jnp.float32, steps, top) if top else None,
        )

    def put(
        self, step, on, stop, tokens, logp, logp_sampled, margin, top_ids=None, top_logp=None
    ) -> "SamplerOutput":
        """With what step i32[] drew [R], which counts where `on` bool[R]; `stop` bool[R] freeze."""

        def column(old, new):
            return old if new is None else jax.lax.dynamic_update_index_in_dim(old, new, step, 1)

        return SamplerOutput(
            tokens=column(self.tokens, tokens),
            logp=column(self.logp, logp),
            logp_sampled=column(self.logp_sampled, logp_sampled),
            margin=column(self.margin, margin),
            top_ids=column(self.top_ids, top_ids),
            top_logp=column(self.top_logp, top_logp),
            count=self.count + on,
            frozen=self.frozen | stop,
            steps=self.steps + 1,
        )


def _attend(
    attention: PagedAttention, rows: Rows, ranks: jax.Array, pool: jax.Array, shared: Shared
):
    """The model's `attend` over the pages of `pool`: writes k and v at `ranks` i32[R, C] (-1:
    nowhere), which are of each row's last segment."""
    size = pool.shape[5 - attention.heads]
    number = jnp.maximum(ranks - rows.entry[:, None], 0)
    column = jnp.minimum(rows.column[:, None] + number // size, rows.table.shape[1] - 1)
    page = jnp.where(ranks < 0, 0, jnp.take_along_axis(rows.table, column, axis=1))
    offset = jnp.where(ranks < 0, 0, number % size)
    used = jnp.where(ranks < 0, 0, column + 1)

    def attend(q, k, v, layer, pool):
        new = jnp.stack([k, v], axis=3).reshape(*k.shape[:2], -1, k.shape[3])
        heads = (slice(None),) if attention.heads == 2 else ()
        pool = write(pool, (layer, page, *heads, offset), new)
        # Else XLA may fuse the write into the reading, and do it twice.
        pool = jax.lax.optimization_barrier(pool)
        out = attention.attend(q, pool, layer, rows.table, rows.base, ranks, used, shared)
        return out, pool

    return attend


def _prefill(
    config: ModelConfig,
    attention: PagedAttention,
    params,
    pool,
    rows: Rows,
    shared: Shared,
    tokens,
    positions,
    ranks,
):
    """Writes the keys and values of tokens i32[R, C] at `positions` and `ranks` (-1: padding), of
    the first R rows of `rows`."""
    return _forward(config, attention, params, pool, rows, shared, tokens, positions, ranks)[1]


def _forward(config, attention, params, pool, rows, shared, tokens, positions, ranks):
    """The model's output [R, C, D] too."""
    rows = jax.tree.map(lambda x: x[: len(tokens)], rows)
    attend = _attend(attention, rows, ranks, pool, shared)
    return forward(config, params, tokens, positions, attend, pool)


def _score(
    config: ModelConfig,
    attention: PagedAttention,
    top: int,
    params,
    pool,
    rows: Rows,
    shared: Shared,
    tokens,
    positions,
    ranks,
    targets,
):
    """`_prefill`; and in place of each token the raw log-prob f32[R, C] of its target i32[R, C]
    behind it (-1: none, and 0), and the K = `top` likeliest: ids i32[R, C, K], log-probs f32[R, C,
    K]. There are logits of SCORED tokens at a time."""
    x, pool = _forward(config, attention, params, pool, rows, shared, tokens, positions, ranks)
    weights, size = head(config, params), min(SCORED, targets.size)

    def cut(x):
        x = x.reshape(targets.size, *x.shape[2:])
        return jnp.pad(x, ((0, -len(x) % size), *((0, 0),) * (x.ndim - 1))).reshape(
            -1, size, *x.shape[1:]
        )

    def score(chunk):
        x, targets = chunk
        logits = unembed(config, weights, x)
        norm = log_sum_exp(config)(logits)
        chosen = jnp.take_along_axis(logits, jnp.maximum(targets, 0)[:, None], axis=-1)[:, 0]
        return jnp.where(targets < 0, 0.0, chosen - norm), *likeliest(logits, norm, top)

    found = jax.lax.map(score, (cut(x), cut(targets)))
    return pool, *(
        x.reshape(-1, *x.shape[2:])[: targets.size].reshape(*targets.shape, *x.shape[2:])
        for x in found
    )


def _decode(
    config: ModelConfig,
    attention: PagedAttention,
    steps: int,
    top: int,
    params,
    pool,
    rows: Rows,
    state: LaneState,
    restart,
    restarted: LaneState,
    given,
    lanes: LaneSampling,
    seen,
    pick,
    shared: Shared,
    least,
    limit,
):
    """Up to `limit` i32[] of N=`steps` steps of W of the R lanes in one call; it ends when fewer
    than `least` i32[1] of them are at work.

    Args:
      attention: of decode/attention.py.
      top: the likeliest tokens that a lane may want.
      rows: tables with pages reserved for steps to come; a lane waits at the end of its table.
      state: of the last call. Lanes where `restart` bool[R] take `restarted` instead.
      given: i32[R, N], tokens to take instead of drawing, or -1.
      lanes: sampling knobs; a lane freezes after one of its `stops`.
      seen: uint16[R, V], what a lane with a penalty sees (`add_seen`), of the last call or `_mark`.
      pick: i32[W], lanes in rising order, and R for what is left over; None is all of them.
      shared: what the W have in common.

    Returns:
      (pool, LaneState and `seen` of all, SamplerOutput of the W).
    """
    everywhere = jax.tree.map(lambda new, old: jnp.where(restart, new, old), restarted, state)
    state, lane = everywhere, jnp.arange(len(restart)) if pick is None else pick
    if pick is not None:
        picked = rows, state, given, lanes
        rows, state, given, lanes = jax.tree.map(lambda x: x.at[pick].get(mode="clip"), picked)
        state = dataclasses.replace(state, frozen=state.frozen | (pick == len(restart)))
    num_rows = len(given)

    def live(state):
        return ~state.frozen & (state.left > 0) & (state.ranks < rows.room)

    def more(carry):
        step, _, state, _, _ = carry
        at_work = jnp.sum(live(state)) >= jnp.maximum(least[0], 1)
        return (step < jnp.minimum(limit, steps)) & at_work

    def body(carry):
        step, pool, state, drawn, seen = carry
        on = live(state)
        ranks = jnp.where(on, state.ranks, -1)[:, None]
        attend = _attend(attention, rows, ranks, pool, shared)
        x, pool = forward(
            config, params, state.tokens[:, None], state.positions[:, None], attend, pool
        )
        logits = unembed(config, head(config, params), x[:, 0])
        new, *figures, norm = sample(
            logits,
            state.positions + 1,
            jax.lax.dynamic_index_in_dim(given, step, axis=1, keepdims=False),
            lanes,
            lambda: seen if pick is None else seen.at[pick].get(mode="clip"),
            log_sum_exp(config),
        )
        if top:
            nothing = jnp.full((num_rows, top), -1), jnp.zeros((num_rows, top))
            figures += jax.lax.cond(
                jnp.any(on & lanes.logprobs),
                lambda: likeliest(logits, norm, top),
                lambda: nothing,
            )
        stop = on & jnp.any(new[:, None] == lanes.stops, axis=1)
        drawn = drawn.put(step, on, stop, new, *figures)
        seen = add_seen(seen, jnp.where(on, lane, len(restart)), new)
        state = state.moved(on, stop, new)
        return step + 1, pool, state, drawn, seen

    start = jnp.int32(0), pool, state, SamplerOutput.empty(num_rows, steps, top), seen
    _, pool, state, drawn, seen = jax.lax.while_loop(more, body, start)
    if pick is not None:
        state = jax.tree.map(
            lambda every, some: every.at[pick].set(some, mode="drop"), everywhere, state
        )
    return pool, state, seen, drawn


def add_seen(seen, row, token):
    """`seen` uint16[R, V] with one token [W] more in the response that each of the rows [W] sees
    (past the end: none). Of a token that a line does not see there is 0; of others 1, and more by
    the number in the response, up to the largest there is."""
    old = jnp.clip(seen.at[row, token].get(mode="clip"), 1, np.iinfo(np.uint16).max - 1)
    return seen.at[row, token].set(old + 1, mode="drop")


def _mark(seen, fresh, tokens, first: Array = 0):
    """`seen` uint16[R, V], where rows of `fresh` bool[R] are emptied and then those of (row, token,
    number) `tokens` i32[K, 3] set, rows being counted from `first`."""
    seen = jnp.where(fresh[:, None], jnp.uint16(0), seen)
    row, token, number = tokens.T
    row = jnp.where(row < first, len(seen), row - first)  # past the end: not here
    return seen.at[row, token].set(number.astype(jnp.uint16), mode="drop")


def _write(rows: Rows, cells, ends, first: Array = 0) -> Rows:
    """With other pages in some places: cells i32[K, 4] are (row, column, page, entries before it),
    rows being counted from `first`; ends i32[R, 3] are `column`, `entry` and `room` of all rows."""
    row, column, page, base = cells.T
    row = jnp.where(row < first, len(rows.table), row - first)  # past the end: not here
    table = rows.table.at[row, column].set(page, mode="drop")
    base = rows.base.at[row, column].set(base, mode="drop")
    return Rows(table, base, *ends.T)


def _copy(attention: PagedAttention, pool, cells):
    """The pool with copies of some entries, keys and values as they are: cells i32[N, 4] are (page,
    entry, page to copy it to, entry there); past the end: none."""
    page, entry, to_page, to_entry = cells.T
    heads = (slice(None),) if attention.heads == 2 else ()

    def copy(x):
        found = x[(slice(None), page, *heads, entry)]
        return x.at[(slice(None), to_page, *heads, to_entry)].set(found, mode="drop")

    return jax.tree.map(copy, pool)


class Steps(NamedTuple):
    """The compiled steps: prefill(params, pool, rows, shared, tokens, positions, ranks) -> pool,
    score(..., targets) -> (pool, logp, top_ids, top_logp), the same with log-probs (`_score`),
    decode(params, pool, rows, state, restart, restarted, given, lanes, seen, pick, shared, least,
    limit) -> (pool, state, seen, SamplerOutput), write(rows, cells, ends) -> rows,
    mark(seen, fresh, tokens) -> seen and copy(pool, cells) -> pool; pool, `seen` and `write`'s rows
    are donated."""

    prefill: Callable
    score: Callable
    decode: Callable
    write: Callable
    mark: Callable
    copy: Callable


@functools.cache
def compiled_steps(
    config: ModelConfig, attention: str, steps: int, mesh: Mesh | None = None, top: int = 0
) -> Steps:
    """The steps for one device, or for a mesh with axes (data, tensor); `top` is the most of the
    likeliest tokens that a lane may want.

    On a mesh every replica of `data` runs on its own: rows and pages are split over it, tables
    hold the replica's own page numbers, and its loop ends when its own lanes rest. Over `tensor`
    XLA partitions what is inside, as the parameters and the pool are laid out.
    """
    attend = paged_attention(attention)
    if mesh is not None:
        attend = attend._replace(attend=_over_heads(config, attention, mesh))
    prefill = functools.partial(_prefill, config, attend)
    score = functools.partial(_score, config, attend, top)
    decode = functools.partial(_decode, config, attend, steps, top)
    copy = functools.partial(_copy, attend)
    if mesh is None:
        return Steps(
            jax.jit(prefill, donate_argnums=1),
            jax.jit(score, donate_argnums=1),
            jax.jit(decode, donate_argnums=(1, 8)),
            jax.jit(_write, donate_argnums=0),
            jax.jit(_mark, donate_argnums=0),
            jax.jit(copy, donate_argnums=0),
        )

    def write(rows, cells, ends):
        return _write(rows, cells, ends, jax.lax.axis_index("data") * len(ends))

    def mark(seen, fresh, tokens):
        return _mark(seen, fresh, tokens, jax.lax.axis_index("data") * len(seen))

    pool, rows = P(None, "data"), P("data")
    shard = functools.partial(jax.shard_map, mesh=mesh, axis_names={"data"}, check_vma=False)
    prefill = shard(prefill, in_specs=(P(), pool, *[rows] * 5), out_specs=pool)
    score = shard(score, in_specs=(P(), pool, *[rows] * 6), out_specs=(pool, *[rows] * 3))
    in_specs = P(), pool, *[rows] * 10, P()
    decode = shard(decode, in_specs=in_specs, out_specs=(pool, rows, rows, rows))
    write = shard(write, in_specs=(rows, P(), rows), out_specs=rows)
    mark = shard(mark, in_specs=(rows, rows, P()), out_specs=rows)
    copy = shard(copy, in_specs=(pool, rows), out_specs=pool)
    laid_out = NamedSharding(mesh, pool_spec(config, attention, mesh))
    everywhere = NamedSharding(mesh, P())  # every process reads what was drawn
    split = NamedSharding(mesh, rows)
    return Steps(
        jax.jit(prefill, donate_argnums=1, out_shardings=laid_out),
        jax.jit(score, donate_argnums=1, out_shardings=(laid_out, *[everywhere] * 3)),
        jax.jit(decode, donate_argnums=(1, 8), out_shardings=(laid_out, split, split, everywhere)),
        jax.jit(write, donate_argnums=0, out_shardings=split),
        jax.jit(mark, donate_argnums=0, out_shardings=split),
        jax.jit(copy, donate_argnums=0, out_shardings=laid_out),
    )


def _over_heads(config: ModelConfig, name: str, mesh: Mesh) -> Callable:
    """Every shard of `tensor` attends with its own heads. Where KV heads do not divide XLA finds
    out what each needs, which it cannot do for a kernel."""
    (attend, axis), shards = paged_attention(name), mesh.shape["tensor"]
    if config.num_kv_heads % shards == 0:
        heads, pool = P(None, None, "tensor"), P(*[None] * axis, "tensor")
        return jax.shard_map(
            attend,
            in_specs=(heads, pool, *[P()] * 6),
            out_specs=heads,
            axis_names={"tensor"},
            check_vma=False,
        )
    if name == "pallas":
        raise ValueError(
            f"num_kv_heads={config.num_kv_heads} does not divide by tensor={shards}, as the "
            "kernels need: make tensor smaller, or set attention to 'gather'"
        )
    return attend


def pool_spec(config: ModelConfig, attention: str, mesh: Mesh) -> P:
    """Pages over `data`; heads over `tensor` where they divide, else on every shard."""
    heads = "tensor" if config.num_kv_heads % mesh.shape["tensor"] == 0 else None
    return P(None, "data", *[None] * (paged_attention(attention).heads - 2), heads)
