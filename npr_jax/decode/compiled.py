"""The compiled steps of the engine: `prefill` computes known tokens, `decode` draws new ones.

Both run the model over rows of tokens; each layer writes the rows' keys and values into pages of
one pool, then every row attends over the pages of its own table. A table lists pages in depth-first
order and `base[m]` counts the entries before page m, so entry z of page m has the rank base[m] + z
if that is below base[m + 1]; a query sees the ranks up to its own. Visibility is what is listed:
a line's table holds its ancestors, its joined branches and itself, and no sibling.

Rows may depend on each other within one call (a branch's header on its parent's last token),
because in every layer all keys are written before any row attends.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from npr_jax.decode.sampling import LaneSampling, sample
from npr_jax.model import ModelConfig, forward, unembed


def make_pool(config: ModelConfig, num_pages: int, page_size: int, dtype) -> jax.Array:
    """The KV pool [L, P, Z, 2, KV, K]: layers, pages, entries; keys then values."""
    shape = (config.num_layers, num_pages, page_size, 2, config.num_kv_heads, config.head_dim)
    return jnp.zeros(shape, dtype)


@struct.dataclass
class Rows:
    """R rows' tables: pages i32[R, M] in order and base i32[R, M + 1], entries before each page."""

    table: jax.Array
    base: jax.Array


def _attend(rows: Rows, ranks: jax.Array, page_size: int):
    """The model's `attend` over the pages: writes k and v at `ranks` i32[R, C] (-1: nowhere)."""
    entry = rows.base[:, :-1, None] + jnp.arange(page_size)  # [R, M, Z]
    listed = entry < rows.base[:, 1:, None]
    seen = listed[:, None] & (entry[:, None] <= ranks[:, :, None, None])  # [R, C, M, Z]
    seen = seen.reshape(*seen.shape[:2], -1)
    column = jnp.sum(rows.base[:, None, 1:] <= ranks[:, :, None], axis=-1)  # [R, C]
    column = jnp.minimum(column, rows.table.shape[1] - 1)
    page = jnp.where(ranks < 0, 0, jnp.take_along_axis(rows.table, column, axis=1))
    offset = jnp.where(ranks < 0, 0, ranks - jnp.take_along_axis(rows.base, column, axis=1))

    def attend(q, k, v, layer, pool):
        new = jnp.stack([k, v], axis=2).astype(pool.dtype)
        pool = pool.at[layer, page, offset].set(new, mode="drop")
        kv = pool[layer, rows.table]  # [R, M, Z, 2, KV, K]
        kv = kv.reshape(kv.shape[0], -1, *kv.shape[3:]).astype(q.dtype)
        num_rows, chunk, heads, dim = q.shape
        q = q.reshape(num_rows, chunk, k.shape[2], -1, dim)
        scores = jnp.einsum("rcngd,rsnd->rngcs", q, kv[:, :, 0], preferred_element_type=jnp.float32)
        scores = jnp.where(seen[:, None, None], scores * dim**-0.5, -1e30)
        weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
        out = jnp.einsum("rngcs,rsnd->rcngd", weights, kv[:, :, 1])
        return out.reshape(num_rows, chunk, heads, dim), pool

    return attend


@functools.partial(jax.jit, static_argnames=("config",), donate_argnames=("pool",))
def prefill(config: ModelConfig, params, pool, rows: Rows, tokens, positions, ranks):
    """Writes the keys and values of tokens i32[R, C] at `positions` and `ranks` (-1: padding)."""
    attend = _attend(rows, ranks, pool.shape[2])
    _, pool = forward(config, params, tokens, positions, attend, pool)
    return pool


@struct.dataclass
class Drawn:
    """What a visit drew: arrays [R, N], of which the first `count[r]` entries of row r count."""

    tokens: jax.Array
    logp: jax.Array
    logp_sampled: jax.Array
    margin: jax.Array
    count: jax.Array


@functools.partial(jax.jit, static_argnames=("config",), donate_argnames=("pool", "seen"))
def decode(
    config: ModelConfig,
    params,
    pool,
    rows: Rows,
    tokens,
    positions,
    ranks,
    limits,
    given,
    lanes: LaneSampling,
    seen,
):
    """Up to N steps of R lanes in one call.

    Args:
      pool: donated.
      rows: tables with pages reserved for the steps to come.
      tokens, positions, ranks: i32[R], the last token of each lane, not yet computed.
      limits: i32[R], the most tokens each lane may draw; 0 rests.
      given: i32[R, N], tokens to take instead of drawing, or -1.
      lanes: sampling knobs; a lane freezes after one of its `stops`.
      seen: bool[R, V] or None, for repetition penalties; donated.

    Returns:
      (pool, Drawn, the steps that ran i32).
    """
    num_rows, steps = given.shape

    def live(count, frozen):
        return ~frozen & (count < limits)

    def more(carry):
        step, _, _, _, _, frozen, drawn, _ = carry
        return (step < steps) & jnp.any(live(drawn.count, frozen))

    def body(carry):
        step, pool, tokens, positions, ranks, frozen, drawn, seen = carry
        on = live(drawn.count, frozen)
        where = jnp.where(on, ranks, -1)[:, None]
        attend = _attend(rows, where, pool.shape[2])
        x, pool = forward(config, params, tokens[:, None], positions[:, None], attend, pool)
        logits = unembed(config, params, x[:, 0])
        new, logp, logp_sampled, margin = sample(logits, positions + 1, given[:, step], lanes, seen)
        drawn = Drawn(
            tokens=drawn.tokens.at[:, step].set(new),
            logp=drawn.logp.at[:, step].set(logp),
            logp_sampled=drawn.logp_sampled.at[:, step].set(logp_sampled),
            margin=drawn.margin.at[:, step].set(margin),
            count=drawn.count + on,
        )
        frozen = frozen | (on & jnp.any(new[:, None] == lanes.stops, axis=1))
        if seen is not None:
            seen = seen.at[jnp.arange(num_rows), new].max(on)
        tokens = jnp.where(on, new, tokens)
        return step + 1, pool, tokens, positions + on, ranks + on, frozen, drawn, seen

    empty = jnp.zeros((num_rows, steps), jnp.float32)
    drawn = Drawn(
        tokens=jnp.zeros((num_rows, steps), jnp.int32),
        logp=empty,
        logp_sampled=empty,
        margin=empty,
        count=jnp.zeros(num_rows, jnp.int32),
    )
    frozen = jnp.zeros(num_rows, bool)
    carry = (jnp.int32(0), pool, tokens, positions, ranks, frozen, drawn, seen)
    step, pool, _, _, _, _, drawn, _ = jax.lax.while_loop(more, body, carry)
    return pool, drawn, step


def buckets(smallest: int, largest: int) -> tuple[int, ...]:
    """The table lengths to compile: doublings of `smallest` below `largest`, then `largest`."""
    sizes = []
    while smallest < largest:
        sizes.append(smallest)
        smallest *= 2
    return (*sizes, largest)


def pick(sizes: tuple[int, ...], need: int) -> int:
    """The smallest bucket that holds `need`."""
    return next(size for size in sizes if size >= need)


def as_rows(tables: list[tuple[np.ndarray, np.ndarray]], num_rows: int, width: int) -> Rows:
    """Host tables (pages, base) padded to i32[num_rows, width]; unused columns hold no entry."""
    table = np.zeros((num_rows, width), np.int32)
    base = np.zeros((num_rows, width + 1), np.int32)
    for r, (pages, starts) in enumerate(tables):
        table[r, : len(pages)] = pages
        base[r, : len(starts)] = starts
        base[r, len(starts) :] = starts[-1]
    return Rows(table=table, base=base)
