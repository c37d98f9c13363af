"""The compiled steps of the engine: `prefill` computes known tokens, `decode` draws new ones.

Both run the model over rows of tokens; each layer writes the rows' keys and values into pages of
one pool, then every row attends over the pages of its own table (decode/attention.py). Visibility
is what is listed: a sequence's table holds its ancestors, its joined branches and itself, but no
sibling.

Rows may depend on each other within one call (a branch's header on its parent's last token),
because in every layer all keys are written before any row attends.

What a lane does next stays on the device between two calls of `decode`, so that the host can ask
for the next steps before it has read the last.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from npr_jax.decode.attention import paged_attention
from npr_jax.decode.sampling import Array, LaneSampling, sample
from npr_jax.model import ModelConfig, forward, head, unembed


def pool_shape(config: ModelConfig, num_pages: int, page_size: int) -> tuple[int, ...]:
    """The KV pool [L, P, Z, 2KV, K]: layers, pages, entries; k and v of a head side by side."""
    return (config.num_layers, num_pages, page_size, 2 * config.num_kv_heads, config.head_dim)


@struct.dataclass
class Rows:
    """R rows' tables: pages i32[R, M] in order and base i32[R, M + 1], entries before each page."""

    table: Array
    base: Array


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
    `steps` i32[R]: that ran.
    """

    tokens: jax.Array
    logp: jax.Array
    logp_sampled: jax.Array
    margin: jax.Array
    count: jax.Array
    frozen: jax.Array
    steps: jax.Array

    @staticmethod
    def empty(rows: int, steps: int) -> "SamplerOutput":
        """Of a visit that has not begun."""

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
        )

    def put(self, step, on, stop, tokens, logp, logp_sampled, margin) -> "SamplerOutput":
        """With what step i32[] drew [R], which counts where `on` bool[R]; `stop` bool[R] freeze."""

        def column(old, new):
            return jax.lax.dynamic_update_index_in_dim(old, new, step, axis=1)

        return SamplerOutput(
            tokens=column(self.tokens, tokens),
            logp=column(self.logp, logp),
            logp_sampled=column(self.logp_sampled, logp_sampled),
            margin=column(self.margin, margin),
            count=self.count + on,
            frozen=self.frozen | stop,
            steps=self.steps + 1,
        )


def _attend(rows: Rows, ranks: jax.Array, attention: Callable):
    """The model's `attend` over the pages: writes k and v at `ranks` i32[R, C] (-1: nowhere)."""
    column = jnp.sum(rows.base[:, None, 1:] <= ranks[:, :, None], axis=-1)  # [R, C]
    column = jnp.minimum(column, rows.table.shape[1] - 1)
    page = jnp.where(ranks < 0, 0, jnp.take_along_axis(rows.table, column, axis=1))
    offset = jnp.where(ranks < 0, 0, ranks - jnp.take_along_axis(rows.base, column, axis=1))

    def attend(q, k, v, layer, pool):
        new = jnp.stack([k, v], axis=3).reshape(*k.shape[:2], -1, k.shape[3])
        pool = pool.at[layer, page, offset].set(new.astype(pool.dtype), mode="drop")
        # Else XLA may fuse the write into the reading, and do it twice.
        pool = jax.lax.optimization_barrier(pool)
        return attention(q, pool, layer, rows.table, rows.base, ranks), pool

    return attend


def _prefill(
    config: ModelConfig, attention: Callable, params, pool, rows: Rows, tokens, positions, ranks
):
    """Writes the keys and values of tokens i32[R, C] at `positions` and `ranks` (-1: padding)."""
    attend = _attend(rows, ranks, attention)
    _, pool = forward(config, params, tokens, positions, attend, pool)
    return pool


def _decode(
    config: ModelConfig,
    attention: Callable,
    steps: int,
    params,
    pool,
    rows: Rows,
    state: LaneState,
    restart,
    restarted: LaneState,
    given,
    lanes: LaneSampling,
    seen,
    limit,
):
    """Up to `limit` i32 of N=`steps` steps of R lanes in one call.

    Args:
      attention: of decode/attention.py.
      rows: tables with pages reserved for steps to come; a lane waits at the end of its table.
      state: of the last call. Lanes where `restart` bool[R] take `restarted` instead.
      given: i32[R, N], tokens to take instead of drawing, or -1.
      lanes: sampling knobs; a lane freezes after one of its `stops`.
      seen: bool[R, V] or None, for repetition penalties.

    Returns:
      (pool, LaneState, SamplerOutput).
    """
    num_rows = given.shape[0]
    room = rows.base[:, -1]
    state = jax.tree.map(lambda new, old: jnp.where(restart, new, old), restarted, state)

    def live(state):
        return ~state.frozen & (state.left > 0) & (state.ranks < room)

    def more(carry):
        step, _, state, _, _ = carry
        return (step < jnp.minimum(limit, steps)) & jnp.any(live(state))

    def body(carry):
        step, pool, state, drawn, seen = carry
        on = live(state)
        attend = _attend(rows, jnp.where(on, state.ranks, -1)[:, None], attention)
        x, pool = forward(
            config, params, state.tokens[:, None], state.positions[:, None], attend, pool
        )
        logits = unembed(config, head(config, params), x[:, 0])
        new, *figures = sample(
            logits,
            state.positions + 1,
            jax.lax.dynamic_index_in_dim(given, step, axis=1, keepdims=False),
            lanes,
            seen,
        )
        stop = on & jnp.any(new[:, None] == lanes.stops, axis=1)
        drawn = drawn.put(step, on, stop, new, *figures)
        if seen is not None:
            seen = seen.at[jnp.arange(num_rows), new].max(on)
        state = state.moved(on, stop, new)
        return step + 1, pool, state, drawn, seen

    start = jnp.int32(0), pool, state, SamplerOutput.empty(num_rows, steps), seen
    _, pool, state, drawn, _ = jax.lax.while_loop(more, body, start)
    return pool, state, drawn


class Steps(NamedTuple):
    """The compiled steps: prefill(params, pool, rows, tokens, positions, ranks) -> pool and
    decode(params, pool, rows, state, restart, restarted, given, lanes, seen, limit)
    -> (pool, state, SamplerOutput); the pool is donated."""

    prefill: Callable
    decode: Callable


@functools.cache
def compiled_steps(
    config: ModelConfig, attention: str, steps: int, mesh: Mesh | None = None
) -> Steps:
    """The steps for one device, or for a mesh with axes (data, tensor).

    On a mesh every replica of `data` runs on its own: rows and pages are split over it, tables
    hold the replica's own page numbers, and its loop ends when its own lanes rest. Over `tensor`
    XLA partitions what is inside, as the parameters and the pool are laid out.
    """
    attend = paged_attention(attention)
    if mesh is not None:
        attend = _over_heads(config, attention, attend, mesh)
    prefill = functools.partial(_prefill, config, attend)
    decode = functools.partial(_decode, config, attend, steps)
    if mesh is None:
        return Steps(jax.jit(prefill, donate_argnums=1), jax.jit(decode, donate_argnums=1))
    pool, rows = P(None, "data"), P("data")
    shard = functools.partial(jax.shard_map, mesh=mesh, axis_names={"data"}, check_vma=False)
    prefill = shard(prefill, in_specs=(P(), pool, rows, rows, rows, rows), out_specs=pool)
    decode = shard(decode, in_specs=(P(), pool, *[rows] * 7, P()), out_specs=(pool, rows, rows))
    laid_out = NamedSharding(mesh, pool_spec(config, mesh))
    everywhere = NamedSharding(mesh, P())  # every process reads what was drawn
    split = NamedSharding(mesh, rows)
    return Steps(
        jax.jit(prefill, donate_argnums=1, out_shardings=laid_out),
        jax.jit(decode, donate_argnums=1, out_shardings=(laid_out, split, everywhere)),
    )


def _over_heads(config: ModelConfig, name: str, attend: Callable, mesh: Mesh) -> Callable:
    """Every shard of `tensor` attends with its own heads. Where KV heads do not divide XLA finds
    out what each needs, which it cannot do for a kernel."""
    shards = mesh.shape["tensor"]
    if config.num_kv_heads % shards == 0:
        heads = P(None, None, "tensor")
        return jax.shard_map(
            attend,
            in_specs=(heads, P(None, None, None, "tensor"), P(), P(), P(), P()),
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


def pool_spec(config: ModelConfig, mesh: Mesh) -> P:
    """Pages over `data`; heads over `tensor` where they divide, else on every shard."""
    heads = "tensor" if config.num_kv_heads % mesh.shape["tensor"] == 0 else None
    return P(None, "data", None, heads)
