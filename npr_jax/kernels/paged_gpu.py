"""Paged attention on a GPU: a Pallas kernel for any table. The face is that of attention.py.

One program of the kernel takes a tile of the queries of one row that share a key head, and one
stretch of the slots that these queries see. So a few long rows fill a GPU as well as many short
ones; XLA merges the stretches of a row afterwards. Runs that rows share are taken so too, with the
queries of all their rows.

The kernel is for the Triton backend of Pallas, which compiles it for every GPU from Ampere to
Blackwell and multiplies float32 as such. Mosaic GPU, its successor, has in jax 0.10.2 one product
for Hopper (`wgmma`), another for Blackwell (`tcgen05_mma`), none for older GPUs, and cuts float32
to tf32. Later releases have `mma` there for older GPUs too: with them is the time to move.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from npr_jax.kernels.blocks import EMPTY, FAR, check_head_dim, dot, members, merge

# What a program holds, so that it fits into the registers and shared memory of all these GPUs.
_LEAST, _LINES = 16, 128  # queries, and of these so many numbers by their bytes
_LINES_SIZE = {2: 2**14, 4: 2**12}
_BLOCK, _BLOCK_BYTES = 64, 2**14  # slots at a time: their keys, and as much again of values
_STRETCH = 256  # slots that are worth a program of their own
_ALL_LINES = 2**15  # of all programs together up to which rows are cut into stretches


def paged_attention(
    q, pool, layer, table, base, ranks, used, shared=None, interpret=False
) -> jax.Array:
    """Attends over the pages of each row; see attention.py.

    Nobody checks page ids: one that is not in the pool reads other memory. Rows of one query read
    shared runs together; chunks of prompts, which compute more than they read, go alone.

    Args:
      q: [R, C, H, K]; K is 16, 32, 64, 128 or 256.
      pool: [L, P, Z, 2KV, K], read where it lies; slots that nobody sees are not read.
      layer: i32[].
      table: i32[R, M].
      base: i32[R, M + 1].
      ranks: i32[R, C].
      used: i32[R, C].
      shared: of the R rows, or None.
      interpret: True to run on a CPU.

    Returns:
      [R, C, H, K]
    """
    num_rows, chunk, _, dim = q.shape
    check_head_dim("gpu", dim)
    attend = functools.partial(_attend, pool, layer, table, base, interpret=interpret)
    row = jnp.arange(num_rows, dtype=jnp.int32)
    if chunk > 1 or shared is None or not len(shared.runs):
        told, weight = attend(q, row, jnp.zeros_like(row), used, ranks)
        if len(told) == 1:
            return told[0]
        weight = jax.nn.softmax(weight, axis=0)[..., None]
        return jnp.sum(weight * told, axis=0).astype(q.dtype)

    rows = members(shared)  # [S, B]
    runs = q[:, 0].at[rows].get(mode="clip")  # [S, B, H, K]
    _, _, begin, end = shared.runs.T
    here = rows < num_rows
    end, rank = jnp.where(here, end[:, None], 0), jnp.where(here, FAR - 1, -1)
    alone = attend(q, row, shared.own, used, ranks)
    together = attend(runs, rows[:, 0], begin, end, rank)

    told, weight = (
        jnp.concatenate([x.reshape(-1, *x.shape[3:]) for x in parts])
        for parts in zip(alone, together, strict=True)
    )
    whose = [jnp.tile(r.reshape(-1), len(x)) for r, (x, _) in ((row, alone), (rows, together))]
    out = merge(told.astype(jnp.float32), weight, jnp.concatenate(whose), num_rows)
    return out.reshape(q.shape).astype(q.dtype)


def _attend(pool, layer, table, base, q, row, begin, used, ranks, interpret):
    """Every query of q [R, C, H, K] over the columns `begin` i32[R] to `used` - 1 i32[R, C] of the
    tables `row` i32[R], up to its rank i32[R, C].

    Returns what each of S stretches tells [S, R, C, H, K] (float32 where S > 1), and the logarithm
    of what that weighs [S, R, C, H].
    """
    num_rows, chunk, heads, dim = q.shape
    _, _, size, double, _ = pool.shape
    kv_heads = double // 2
    lines = chunk * (heads // kv_heads)  # queries of a row that share a key head
    tile = min(_LINES, _LINES_SIZE[q.dtype.itemsize] // dim, pl.next_power_of_2(lines))
    tile = max(_LEAST, tile)
    tiles = pl.cdiv(lines, tile)
    stretches = min(
        pl.cdiv(_ALL_LINES, num_rows * tiles * kv_heads * tile),
        pl.cdiv(table.shape[1] * size, _STRETCH),
    )
    return pl.pallas_call(
        functools.partial(_kernel, tile=tile, tiles=tiles),
        grid=(kv_heads, num_rows * tiles, stretches),
        out_shape=(
            jax.ShapeDtypeStruct((stretches, *q.shape), q.dtype if stretches == 1 else jnp.float32),
            jax.ShapeDtypeStruct((stretches, *q.shape[:-1]), jnp.float32),
        ),
        # Three stages bring page ids and then pages; two more bring the next block of pages.
        compiler_params=plgpu.CompilerParams(
            num_warps=4 if tile < _LINES else 8, num_stages=5 if tile == _LEAST else 3
        ),
        name="npr_paged_attention",
        interpret=interpret,
    )(jnp.reshape(layer, 1), table, base, row, begin, ranks, used, q, pool)


def _kernel(layer, table, base, rows, first, ranks, used, q, pool, out, weight, *, tile, tiles):
    """One program of `_attend`; all arguments are whole, `first` is its `begin`."""
    _, chunk, heads, dim = q.shape
    _, _, size, double, _ = pool.shape
    group = heads // (double // 2)
    block = min(_BLOCK, _BLOCK_BYTES // (dim * pool.dtype.itemsize))
    head, i, stretch = (pl.program_id(axis) for axis in range(3))
    row = jax.lax.div(i, tiles)
    listing, skipped = plgpu.load(rows.at[row]), plgpu.load(first.at[row]) * size
    lane = jnp.arange(dim)[None]

    line = jax.lax.rem(i, tiles) * tile + jnp.arange(tile)
    query, query_head = jax.lax.div(line, group), head * group + jax.lax.rem(line, group)
    real = query < chunk
    real_lanes = jnp.broadcast_to(real[:, None], (tile, dim))
    at = row, query[:, None], query_head[:, None], lane
    queries = plgpu.load(q.at[at], mask=real_lanes, other=0)
    rank = plgpu.load(ranks.at[row, query], mask=real, other=-1)
    last = jnp.max(rank)

    end = jnp.max(plgpu.load(used.at[row, query], mask=real, other=0)) * size
    span = jnp.maximum(pl.cdiv(jnp.maximum(end - skipped, 0), pl.num_programs(2)), _STRETCH)
    span = pl.cdiv(span, block) * block
    begin = skipped + stretch * span
    end = jnp.minimum(begin + span, end)

    def body(j, carry):
        top, total, acc = carry
        slot = begin + j * block + jnp.arange(block)
        column, offset = jax.lax.div(slot, size), jax.lax.rem(slot, size)
        inside = slot < end
        page = plgpu.load(table.at[listing, column], mask=inside, other=0)
        entry = plgpu.load(base.at[listing, column], mask=inside, other=0) + offset
        stop = plgpu.load(base.at[listing, column + 1], mask=inside, other=0)
        listed = (entry < stop) & (entry <= last)

        def load(which):  # what nobody sees may be anything, and 0 * NaN is NaN
            at = layer[0], page[:, None], offset[:, None], 2 * head + which, lane
            mask = jnp.broadcast_to(listed[:, None], (block, dim))
            return plgpu.load(pool.at[at], mask=mask, other=0).astype(q.dtype)

        scores = dot(queries, load(0), 1) * dim**-0.5
        seen = listed[None] & (entry[None] <= rank[:, None])
        scores = jnp.where(seen, scores, EMPTY)
        new = jnp.maximum(top, jnp.max(scores, axis=1))
        p = jnp.exp(scores - new[:, None])  # 1 while a query sees nothing: scaled away later
        scale = jnp.exp(top - new)
        told = dot(p.astype(q.dtype), load(1), 0)
        return new, total * scale + jnp.sum(p, axis=1), acc * scale[:, None] + told

    start = (
        jnp.full(tile, EMPTY, jnp.float32),
        jnp.zeros(tile, jnp.float32),
        jnp.zeros((tile, dim), jnp.float32),
    )
    blocks = pl.cdiv(jnp.maximum(end - begin, 0), block)
    top, total, acc = jax.lax.fori_loop(0, blocks, body, start)
    total = jnp.maximum(total, 1e-30)
    told = (acc / total[:, None]).astype(out.dtype)
    plgpu.store(out.at[(stretch, *at)], told, mask=real_lanes)
    plgpu.store(weight.at[stretch, row, query, query_head], top + jnp.log(total), mask=real)
