"""Paged attention: every row's queries attend over the pages that the row's table lists.

All implementations have one face:

    q      [R, C, H, K]      queries, normed and rotated
    pool   [L, P, Z, 2KV, K] layers, pages, entries; keys and values of a head side by side.
                             `blockwise` has the heads first: [L, P, 2KV, Z, K]. Or Int8 of these
    layer  i32[]
    table  i32[R, M]         pages in order
    base   i32[R, M + 1]     entries before each page: entry z of page m has the rank base[m] + z if
                             that is below base[m + 1]; a page may be filled in part. After the
                             last page come FAR or the row's number of entries
    ranks  i32[R, C]         a query sees the ranks up to its own; -1 is padding
    used   i32[R, C]         pages of the row up to the last that the query sees; 0 is padding
    shared Shared            which rows list the same pages; None: nobody looked
    out    [R, C, H, K]

What no query of a row sees may hold anything, NaN included, and changes nothing.

`gather` is the reference. `blockwise` is the same with work and memory that follow what a table
holds: the choice on a CPU. `pallas` are the kernels for TPU and GPU. Softmax and sums are float32.
But for the reference all read the pages that rows share once for `TOGETHER` of them.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from npr_jax.kernels import exact
from npr_jax.kernels.blocks import EMPTY, FAR, TOGETHER

Implementation = Literal["gather", "blockwise", "pallas"]
IMPLEMENTATIONS = get_args(Implementation)
# What `blockwise` takes at a time: entries of a row, bytes of several rows' entries, and entries of
# a run that rows share.
_BLOCK, _CACHE_BYTES, _RUN = 64, 1 << 20, 128

Array = Any  # of JAX on the device, of NumPy on the host


@struct.dataclass
class Shared:
    """Runs of pages that several of R rows list alike, so that they are read once.

    Attributes:
      order: i32[R], all rows, so that those that share follow each other.
      runs: i32[R // 2, 4], (begin, end, first, last): the rows order[begin:end], at most TOGETHER,
        list the same pages in the columns from first to last - 1. A row's runs follow each other
        from column 0; zeros are no run, and come last.
      own: i32[R], the column after the last run of each row, from where it reads alone.
    """

    order: Array
    runs: Array
    own: Array

    @staticmethod
    def nothing(rows: int) -> "Shared":
        """Of rows that share nothing, on the host."""
        runs, own = np.zeros((rows // 2, 4), np.int32), np.zeros(rows, np.int32)
        return Shared(np.arange(rows, dtype=np.int32), runs, own)


@struct.dataclass
class Int8:
    """Keys and values [..., K] as `whole` int8[..., K] times `scale` f32[...]: a 127th of the
    largest of each K numbers."""

    whole: Array
    scale: Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what it stands for."""
        return self.whole.shape

    @staticmethod
    def of(x: jax.Array) -> "Int8":
        """The nearest to x [..., K]."""
        x = x.astype(jnp.float32)
        scale = jnp.max(jnp.abs(x), axis=-1) / 127
        whole = jnp.round(x / jnp.where(scale > 0, scale, 1.0)[..., None])
        return Int8(whole.astype(jnp.int8), scale)


def empty_pool(shape: tuple[int, ...], dtype):
    """A pool of zeros; what it holds takes as many bytes as `dtype` has, and int8 four more for
    every head of an entry."""
    if dtype == jnp.int8:
        return Int8(jnp.zeros(shape, jnp.int8), jnp.zeros(shape[:-1], jnp.float32))
    return jnp.zeros(shape, dtype)


def check_pool(implementation: str, dtype) -> None:
    """Raises ValueError for pages that an implementation does not read."""
    if implementation == "pallas" and dtype == jnp.int8:
        raise ValueError(
            "cache_dtype is 'int8', which attention='pallas' does not read: set attention to "
            "'blockwise' (or 'gather'), or cache_dtype to 'bfloat16'"
        )


def write(pool, at: tuple, new: jax.Array):
    """The pool with `new` [..., K] at some places; what is out of bounds is dropped."""
    values = Int8.of(new) if isinstance(pool, Int8) else new.astype(pool.dtype)
    return jax.tree.map(lambda old, new: old.at[at].set(new, mode="drop"), pool, values)


def _read(pool, at: tuple, dtype) -> jax.Array:
    """What the pool holds at some places [..., K]."""
    if isinstance(pool, Int8):
        return (pool.whole[at] * pool.scale[at][..., None]).astype(dtype)
    return pool[at].astype(dtype)


class PagedAttention(NamedTuple):
    """An implementation, and the axis of the heads in its pool: the entries have the other of 2
    and 3."""

    attend: Callable
    heads: int = 3


def paged_attention(implementation: str) -> PagedAttention:
    """The implementation of that name; "pallas" is the kernel of the platform that compiles."""
    if implementation == "gather":
        return PagedAttention(gather)
    if implementation == "plain":  # the runner's, for prompts on a TPU
        from npr_jax.kernels.paged_tpu import plain_attention

        return PagedAttention(plain_attention)
    if implementation == "blockwise":
        return PagedAttention(blockwise, heads=2)
    if implementation == "exact":
        return PagedAttention(exact.paged)
    if implementation != "pallas":
        raise ValueError(
            f"attention is {implementation!r}, needed is one of {', '.join(IMPLEMENTATIONS)}"
        )
    if jax.default_backend() == "gpu":
        from npr_jax.kernels.paged_gpu import paged_attention as kernel
    else:  # a TPU, or its compiler on another machine
        from npr_jax.kernels.paged_tpu import paged_attention as kernel
    return PagedAttention(kernel)


def gather(q, pool, layer, table, base, ranks, used=None, shared=None) -> jax.Array:
    """The reference: gathers whole tables, masks what is not there."""
    num_rows, chunk, heads, dim = q.shape
    entry = base[:, :-1, None] + jnp.arange(pool.shape[2])  # [R, M, Z]
    listed = entry < base[:, 1:, None]
    seen = listed[:, None] & (entry[:, None] <= ranks[:, :, None, None])  # [R, C, M, Z]
    seen = seen.reshape(num_rows, chunk, -1)
    kv = _read(pool, (layer, table), q.dtype)  # [R, M, Z, 2KV, K]
    kv = kv.reshape(num_rows, -1, kv.shape[3] // 2, 2, dim)
    q = q.reshape(num_rows, chunk, kv.shape[2], -1, dim)
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    scores = product("rcngd,rsnd->rngcs", q, kv[:, :, :, 0]) * dim**-0.5
    weights = jax.nn.softmax(jnp.where(seen[:, None, None], scores, EMPTY), axis=-1)
    # What no query of a row sees weighs 0, but may be anything, and 0 * NaN is NaN.
    values = jnp.where(jnp.any(seen, axis=1)[:, :, None, None], kv[:, :, :, 1], 0)
    out = jnp.einsum("rngcs,rsnd->rcngd", weights.astype(q.dtype), values)
    return out.reshape(num_rows, chunk, heads, dim)


def _see(pool, layer, table, base, pages, rows, first, end, q, limit, state):
    """Goes on over more keys: the columns first[b] to first[b] + `pages` of the tables rows[b], if
    they are before end[b], for q [B, KV, N, K] that see the ranks up to limit i32[B, N].

    `state`: f32, the largest score and the sum of exponentials [B, KV, N], and the sum of weighted
    values [B, KV, N, K].
    """
    num, kv_heads, _, dim = q.shape
    size = pool.shape[3]
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    column = first[:, None] + jnp.arange(pages + 1)
    here = table.at[rows[:, None], column[:, :-1]].get(mode="clip")
    edges = base.at[rows[:, None], column].get(mode="clip")
    entry = edges[:, :-1, None] + jnp.arange(size)
    listed = (entry < edges[:, 1:, None]) & (column[:, :-1] < end[:, None])[:, :, None]
    entry = jnp.where(listed, entry, FAR).reshape(num, -1)
    kv = _read(pool, (layer, here), q.dtype).reshape(num, pages, kv_heads, 2, size, dim)
    k, v = (kv[:, :, :, i].swapaxes(1, 2).reshape(num, kv_heads, -1, dim) for i in (0, 1))
    # What no query of a row sees weighs 0, but may be anything, and 0 * NaN is NaN.
    some = entry <= jnp.max(limit, axis=1, keepdims=True)
    v = jnp.where(some[:, None, :, None], v, 0)
    scores = product("bnqd,bnsd->bnqs", q, k) * dim**-0.5
    seen = entry[:, None, :] <= limit[:, :, None]
    scores = jnp.where(seen[:, None], scores, EMPTY)
    top, total, acc = state
    new = jnp.maximum(top, jnp.max(scores, axis=-1))
    p = jnp.exp(scores - new[..., None])  # 1 while a row sees nothing: scaled away later
    scale = jnp.exp(top - new)
    out = product("bnqs,bnsd->bnqd", p.astype(q.dtype), v)
    return new, total * scale + jnp.sum(p, axis=-1), acc * scale[..., None] + out


def blockwise(q, pool, layer, table, base, ranks, used, shared=None) -> jax.Array:
    """A block of pages at a time: first of the runs that rows share, then of what is a row's own,
    a few rows at a time, up to the last page that these rows see.

    What is taken at a time fits into a CPU's cache. The pool has the heads before the entries, so
    that the keys of a head and a page follow each other.
    """
    num_rows, chunk, heads, dim = q.shape
    size, kv_heads = pool.shape[3], pool.shape[2] // 2
    group = heads // kv_heads
    shared = jax.tree.map(jnp.asarray, shared or Shared.nothing(num_rows))
    order, width = shared.order, table.shape[1]

    # From here on rows are in the order in which those that share follow each other.
    # [R, KV, C * G, K]: one matrix per row and key head
    q = q[order].reshape(num_rows, chunk, kv_heads, group, dim).swapaxes(1, 2)
    q = q.reshape(num_rows, kv_heads, chunk * group, dim)
    own, limit = shared.own[order], jnp.repeat(ranks[order], group, axis=1)
    used = jnp.max(used, axis=1)[order]
    state = (
        jnp.full(q.shape[:-1], EMPTY, jnp.float32),
        jnp.zeros(q.shape[:-1], jnp.float32),
        jnp.zeros(q.shape, jnp.float32),
    )

    see = functools.partial(_see, pool, layer, table, base)

    def run(i, state):
        begin, end, first, last = shared.runs[i]
        num = min(TOGETHER, num_rows)
        start = jnp.minimum(begin, num_rows - num)
        member = start + jnp.arange(num)
        member = (begin <= member) & (member < end)
        pages = min(max(1, _RUN // size), width)

        def together(x):  # [R, KV, N, ...] -> [1, KV, num * N, ...]
            x = jax.lax.dynamic_slice_in_dim(x, start, num).swapaxes(0, 1)
            return x.reshape(1, kv_heads, -1, *x.shape[3:])

        def apart(x, some):
            some = some.reshape(kv_heads, num, *x.shape[2:]).swapaxes(0, 1)
            return jax.lax.dynamic_update_slice_in_dim(x, some, start, axis=0)

        sees = jnp.where(member[:, None], jax.lax.dynamic_slice_in_dim(limit, start, num), -1)
        seen = jnp.where(member, jax.lax.dynamic_slice_in_dim(used, start, num), 0)
        last = jnp.minimum(last, jnp.max(seen))  # a prompt has pages that are not written yet
        rows, q_run, end, sees = order[begin][None], together(q), last[None], sees.reshape(1, -1)

        def block(j, some):
            return see(pages, rows, (first + j * pages)[None], end, q_run, sees, some)

        some = jax.tree.map(together, state)
        some = jax.lax.fori_loop(0, -((first - last) // pages), block, some)
        return jax.tree.map(apart, state, some)

    if len(shared.runs):
        state = jax.lax.fori_loop(0, jnp.sum(shared.runs[:, 1] > 0), run, state)

    pages = min(max(1, _BLOCK // size), width)
    entry_bytes = 2 * kv_heads * dim * q.dtype.itemsize
    at_once = min(max(1, _CACHE_BYTES // (pages * size * entry_bytes)), num_rows)

    def some_rows(inputs):
        rows, own, blocks, q, limit, state = inputs

        def block(j, state):
            return see(pages, rows, own + j * pages, jnp.full(at_once, width), q, limit, state)

        _, total, acc = jax.lax.fori_loop(0, jnp.max(blocks), block, state)
        return acc / jnp.maximum(total, 1e-30)[..., None]

    def cut(x):  # a row that only fills up sees no block
        pad = [(0, -num_rows % at_once)] + [(0, 0)] * (x.ndim - 1)
        return jnp.pad(x, pad).reshape(-1, at_once, *x.shape[1:])

    blocks = -((own - used) // pages)
    inputs = jax.tree.map(cut, (order, own, jnp.maximum(blocks, 0), q, limit, state))
    out = jax.lax.map(some_rows, inputs).reshape(-1, kv_heads, chunk, group, dim)[:num_rows]
    out = jnp.zeros_like(out).at[order].set(out).swapaxes(1, 2)
    return out.reshape(num_rows, chunk, heads, dim).astype(q.dtype)
