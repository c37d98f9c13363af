"""Paged attention on a TPU: a Pallas kernel for any table, and JAX's stock kernel for plain ones.

The face is that of attention.py. `paged_attention` takes the rows one after another and brings a
row's pages to the chip block by block, up to the last page that the row sees; while it works on
one block the next one, of this row or of the next, is on its way. A page comes with the keys and
values of all heads in one copy. Runs that rows share are taken so too, with the queries of all
their rows; XLA merges what a row is told by its runs and by its own pages.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention

from npr_jax.kernels.blocks import EMPTY, FAR, LANES, check_head_dim, dot, members, merge, widen

_SLOTS = 512  # of a block: 2 MiB with 8 key heads of 128 in bfloat16
_QUERIES = 512  # times their group, that are worked on at once
_VMEM = 32 * 2**20  # bytes that a kernel may take; Qwen3-4B takes 5 MiB to decode, 19 to prefill


def paged_attention(
    q, pool, layer, table, base, ranks, used, shared=None, interpret=False
) -> jax.Array:
    """Attends over the pages of each row; see attention.py.

    Nobody checks page ids: one that is not in the pool reads other memory. Rows of one query read
    shared runs together; chunks of prompts, which compute more than they read, go alone.

    Args:
      q: [R, C, H, K]; on a TPU K is a multiple of 128.
      pool: [L, P, Z, 2KV, K], read where it lies; slots that nobody sees may hold anything.
      layer: i32[].
      table: i32[R, M], whole in the chip's scalar memory: up to 250 000 entries.
      base: i32[R, M + 1].
      ranks: i32[R, C], in each row first, first + 1, ... and then -1.
      used: i32[R, C].
      shared: of the R rows, or None.
      interpret: True or pltpu.InterpretParams(), to run on a CPU.

    Returns:
      [R, C, H, K]
    """
    num_rows, chunk, heads, dim = q.shape
    kv_heads = pool.shape[3] // 2
    group = heads // kv_heads
    if not interpret:  # XLA would copy the pool to pad it
        check_head_dim("tpu", dim)

    tiles = 1  # that the queries of a row are cut into
    while chunk % (2 * tiles) == 0 and chunk // tiles * group > _QUERIES:
        tiles *= 2
    # [R * tiles, KV, N, K]: the N = C / tiles * G queries of one key head are the lines of a matrix
    matrix = q.reshape(num_rows, tiles, -1, kv_heads, group, dim).swapaxes(2, 3)
    matrix = matrix.reshape(num_rows * tiles, kv_heads, -1, dim)
    ranks, used = (x.reshape(num_rows * tiles, -1) for x in (ranks, used))
    first, last, used = ranks[:, 0], jnp.max(ranks, axis=1), jnp.max(used, axis=1)
    row = jnp.arange(num_rows * tiles, dtype=jnp.int32) // tiles
    attend = functools.partial(_attend, pool, layer, table, base, interpret=interpret)
    if chunk > 1 or shared is None or not len(shared.runs):
        (out,) = attend(matrix, row, jnp.zeros_like(row), used, first, last, group)
        out = out.reshape(num_rows, tiles, kv_heads, -1, group, dim).swapaxes(2, 3)
        return out.reshape(num_rows, chunk, heads, dim)

    alone = attend(matrix, row, shared.own, used, first, last, group, weigh=True)
    rows = members(shared)  # [S, B]
    runs = matrix.at[rows].get(mode="clip").swapaxes(1, 2)  # [S, KV, B, G, K]
    runs = runs.reshape(len(rows), kv_heads, -1, dim)
    _, _, begin, end = shared.runs.T
    every = jnp.full_like(end, FAR - 1)  # its rows see all that a run holds
    together = attend(
        runs,
        rows[:, 0],
        begin,
        end,
        every,
        every,
        runs.shape[2],
        weigh=True,
        name="npr_shared_runs",
    )

    def apart(x):  # [S, KV, B * G, ...] -> [S * B, KV, G, ...]
        x = x.reshape(len(rows), kv_heads, -1, group, *x.shape[3:]).swapaxes(1, 2)
        return x.reshape(-1, *x.shape[2:])

    told, weight = (jnp.concatenate([x, apart(y)]) for x, y in zip(alone, together, strict=True))
    out = merge(told, weight, jnp.concatenate([row, rows.reshape(-1)]), num_rows)
    return out.reshape(q.shape).astype(q.dtype)


def _attend(
    pool,
    layer,
    table,
    base,
    q,
    row,
    begin,
    end,
    first,
    last,
    group,
    interpret,
    weigh=False,
    name="npr_paged_attention",
):
    """S steps, each of N queries of every key head, over a stretch of a table.

    q [S, KV, N, K]; of each step, i32[S]: `row` of the table, columns `begin` to `end` - 1, rank of
    the `first` query (each `group` of queries one higher) and highest rank `last`. Returns
    [S, KV, N, K] in the dtype of q; or, to `weigh`, in float32, with the logarithm of what it
    weighs [S, KV, N].
    """
    steps, kv_heads, num_queries, dim = q.shape
    _, _, size, double, _ = pool.shape
    width = table.shape[1]
    pages = max(1, _SLOTS // size)
    halves = 2 if steps % 2 == 0 else 1  # some chips have two cores

    def step(half, i):
        return half * (steps // halves) + i

    whole_row = pl.BlockSpec(
        (None, 1, width + 1),
        lambda half, i, layer, table, row, *_: (row[step(half, i)], 0, 0),
        memory_space=pltpu.SMEM,
    )

    def matrices(*shape):
        return pl.BlockSpec((None, *shape), lambda half, i, *_: (step(half, i), 0, 0, 0))

    matrix, sums = q.shape[1:], (kv_heads, num_queries, LANES)
    out_shapes = [jax.ShapeDtypeStruct(q.shape, jnp.float32 if weigh else q.dtype)]
    out_specs = [matrices(*matrix)]
    if weigh:
        out_shapes.append(jax.ShapeDtypeStruct((steps, *sums), jnp.float32))
        out_specs.append(matrices(*sums))
    out, *weight = pl.pallas_call(
        functools.partial(_kernel, group=group, weigh=weigh),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=7,
            grid=(halves, steps // halves),
            in_specs=[whole_row, matrices(*matrix), pl.BlockSpec(memory_space=pl.ANY)],
            out_specs=out_specs,
            scratch_shapes=[
                pltpu.VMEM((2, pages, size, double, dim), pool.dtype),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SMEM((1,), jnp.int32),
                pltpu.VMEM(sums, jnp.float32),
                pltpu.VMEM(sums, jnp.float32),
                pltpu.VMEM(matrix, jnp.float32),
            ],
        ),
        out_shape=out_shapes,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=_VMEM,
            disable_bounds_checks=True,  # they double the instructions that start a copy
        ),
        name=name,
        interpret=interpret,
    )(
        jnp.reshape(layer, 1),
        table.reshape(-1),
        row,
        begin,
        end,
        first,
        last,
        base[:, None],
        q,
        pool,
    )
    return (out, *(x[..., 0] for x in weight))


def _kernel(*refs, group: int, weigh: bool):
    """One step of `_attend`.

    Scalars: layer [1], table [R * M], row, begin, end, first and last [S], base [1, M + 1]. q and
    out are [KV, N, K], weight, if asked for, [KV, N, 128]; pool stays where it is.
    Scratch: buffer [2, pages, Z, 2KV, K] with a semaphore for either half, turn [1] (the half that
    comes next), and of the softmax so far top and total [KV, N, 128] and acc [KV, N, K].
    """
    layer, table, row, begin, end, first, last, base, q, pool, *outs = refs[: 11 + weigh]
    buffer, arrived, turn, top, total, acc = refs[11 + weigh :]
    _, pages, size, _, dim = buffer.shape
    kv_heads, num_queries, _ = q.shape
    width = base.shape[1] - 1
    i = pl.program_id(0) * pl.num_programs(1) + pl.program_id(1)
    is_last = pl.program_id(1) + 1 == pl.num_programs(1)
    blocks = jax.lax.div(jnp.maximum(end[i] - begin[i], 0) + pages - 1, pages)

    def each_page(i, block, do):
        """Does something for each page of a block that is seen."""
        count = jnp.clip(end[i] - begin[i] - block * pages, 0, pages)
        jax.lax.fori_loop(0, count, lambda p, _: do(p), None)

    def fetch(i, block, half):
        def start(p):
            page = pool.at[layer[0], table[row[i] * width + begin[i] + block * pages + p]]
            pltpu.make_async_copy(page, buffer.at[half, p], arrived.at[half]).start()

        each_page(i, block, start)

    def wait(block, half):
        def one(p):  # all copies bring the same number of bytes, which is what is waited for
            page = buffer.at[half, p]
            pltpu.make_async_copy(page, page, arrived.at[half]).wait()

        each_page(i, block, one)

    def clean(block, half):
        """Clears slots that nobody sees: they weigh 0, but 0 * NaN is NaN."""

        def one(p):
            column = begin[i] + block * pages + p
            start, stop = base[0, column], jnp.minimum(base[0, column + 1], last[i] + 1)

            def slot(z, _):
                buffer[half, p, z] = jnp.zeros(buffer.shape[3:], buffer.dtype)

            jax.lax.fori_loop(jnp.clip(stop - start, 0, size), size, slot, None)

        each_page(i, block, one)

    def attend(block, half):
        query = jax.lax.broadcasted_iota(jnp.int32, (num_queries, 1), 0)
        rank = first[i] + jax.lax.div(query, group)
        seen = _seen(base, begin[i] + block * pages, end[i], pages, size, rank)
        for head in range(kv_heads):
            k, v = _keys_values(buffer.at[half], head)
            scores = dot(q[head], k.astype(q.dtype), 1) * dim**-0.5
            scores = jnp.where(seen, scores, EMPTY)
            old = top[head]
            new = jnp.maximum(old, jnp.max(scores, axis=1, keepdims=True))
            weights = jnp.exp(scores - widen(new, scores.shape[1]))
            scale = jnp.exp(old - new)
            top[head] = new
            total[head] = total[head] * scale + jnp.sum(weights, axis=1, keepdims=True)
            values = dot(weights.astype(q.dtype), v.astype(q.dtype), 0)
            acc[head] = acc[head] * widen(scale, dim) + values

    def body(block, half):
        more = block + 1 < blocks

        @pl.when(more | ~is_last)
        def _():
            fetch(jnp.where(more, i, i + 1), jnp.where(more, block + 1, 0), 1 - half)

        wait(block, half)
        clean(block, half)
        attend(block, half)
        return 1 - half

    @pl.when(pl.program_id(1) == 0)
    def _():
        def clear(p, _):  # the same for pages that no copy reaches
            at = jax.lax.div(p, pages), jax.lax.rem(p, pages)
            buffer[at] = jnp.zeros(buffer.shape[2:], buffer.dtype)

        jax.lax.fori_loop(0, 2 * pages, clear, None)
        turn[0] = 0
        fetch(i, 0, 0)

    top[...] = jnp.full(top.shape, EMPTY, top.dtype)
    total[...] = jnp.zeros(total.shape, total.dtype)
    acc[...] = jnp.zeros(acc.shape, acc.dtype)
    turn[0] = jax.lax.fori_loop(0, blocks, body, turn[0])

    @pl.when((blocks == 0) & ~is_last)  # a row at rest
    def _():
        fetch(i + 1, 0, turn[0])

    for head in range(kv_heads):
        out, *weight = outs
        seen = jnp.maximum(total[head], 1e-30)
        out[head] = (acc[head] / widen(seen, dim)).astype(out.dtype)
        if weigh:
            weight[0][head] = top[head] + jnp.log(seen)


def _seen(base, first, last, pages: int, size: int, rank):
    """bool [N, pages * Z]: which slots of a block, whose pages begin with column `first` and end
    before `last`, the queries of `rank` i32[N, 1] see."""
    width = base.shape[1] - 1
    slot = jax.lax.broadcasted_iota(jnp.int32, (1, pages * size), 1)
    page = jax.lax.div(slot, size)
    start = stop = jnp.zeros_like(slot)
    for p in range(pages):  # of every slot: where its page starts and ends
        start = jnp.where(page == p, base[0, jnp.minimum(first + p, width)], start)
        stop = jnp.where(page == p, base[0, jnp.minimum(first + p + 1, width)], stop)
    entry = start + jax.lax.rem(slot, size)
    return (entry < stop) & (entry <= rank) & (first + page < last)


def _keys_values(block, head):
    """Key and value [S, K] of one head in a block [pages, Z, 2KV, K]: two of each 2KV lines."""
    double, dim = block.shape[2:]
    if block.dtype != jnp.bfloat16:
        lines = block.reshape(-1, dim)
        return lines[2 * head :: double, :], lines[2 * head + 1 :: double, :]
    # Two lines share their 32-bit words: the key has the lower half, the value the upper.
    words = block.bitcast(jnp.uint32).reshape(-1, dim)[head :: double // 2, :]
    k = pltpu.bitcast(words << 16, jnp.float32)
    v = pltpu.bitcast(words & jnp.uint32(0xFFFF0000), jnp.float32)
    return k.astype(block.dtype), v.astype(block.dtype)


def plain_attention(q, pool, layer, table, base, ranks, used=None, shared=None) -> jax.Array:
    """The same by JAX's stock kernel, for rows whose pages are full but for the last one.

    Slot z of page m has the rank m * Z + z; `base` and the last two are not looked at. Only
    bfloat16.
    """
    num_rows, chunk, heads, dim = q.shape
    _, num_pages, size, double, _ = pool.shape
    check_head_dim("tpu", dim)
    if q.dtype != jnp.bfloat16 or pool.dtype != jnp.bfloat16:
        raise ValueError(f"queries are {q.dtype}, pages {pool.dtype}, needed is bfloat16")
    # To that kernel the queries of a row are its last entries, without padding between rows, and no
    # row is empty: a row at rest stands for one that begins.
    count = jnp.maximum(jnp.sum(ranks >= 0, axis=1, dtype=jnp.int32), 1)
    real = (jnp.arange(chunk) < count[:, None]).reshape(-1)
    order = jnp.argsort(~real, stable=True)
    with jax.default_matmul_precision("default"):  # the kernel does not compile with another
        out = ragged_paged_attention(
            q.reshape(-1, heads, dim)[order],
            pool.reshape(-1, size, double, dim),
            jnp.maximum(ranks[:, 0], 0) + count,
            table + layer * num_pages,
            jnp.cumulative_sum(count, include_initial=True, dtype=jnp.int32),
            jnp.array([num_rows], jnp.int32),
            sm_scale=dim**-0.5,
            num_kv_pages_per_block=min(max(1, _SLOTS // size), table.shape[1]),
            num_queries_per_block=min(chunk, 32),
            vmem_limit_bytes=_VMEM,
        )
    out = jnp.where(real[:, None, None], out[jnp.argsort(order)], 0)
    return out.reshape(q.shape)
