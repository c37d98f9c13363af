"""Products, sums and attention whose bits for one row do not depend on the rows beside it.

XLA adds the terms of a product, or of a sum over a row, in an order that changes with the number of
rows. Here every sum is one chain in the order of its terms,

    acc = 0;  for each term:  acc = fma(a[term], b[term], acc)

(of at most 512 terms; longer sums are of such chains), whatever rows, blocks, pages and hidden keys
lie around it. So an engine that draws a token and a trainer that scores it later get the same bits.
Four things make it so on a CPU:

- YNNPACK, which multiplies float32 there, adds in this order where all columns of the second factor
  fit into `_BYTES` and the rows are few, or the rows are many and the columns a multiple of 64. A
  sum is a product with ones. XLA promises none of it; `check` asks the machine at hand.
- Attention goes on with a sum where the last block of keys left it: the sums of M queries are M
  more keys of the next block, and their weights the unit matrix. A key that is not seen weighs 0,
  and adding 0 changes nothing.
- The softmax is one of powers of two whose running maximum is a whole number. What was added before
  a new maximum is scaled by a power of two, which rounds nothing.
- Barriers keep XLA from computing what is before and after a product in more than its own dtype.

What is not float32 is multiplied as float32 and rounded once.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

_BYTES = 1 << 17  # of the second factor of a product: L2 as YNNPACK takes it to be
_COLUMNS = 64  # of which a second factor has a multiple
_MANY = 64  # rows, from which on YNNPACK packs the second factor first
_QUERIES = 32  # rows of a product of attention: few
_TERMS = 512  # that a row's sum adds in one chain
_CACHE_BYTES = 1 << 20  # of the keys and values of the rows that attend at a time
_NEVER = -(2.0**20)  # below the whole part of any score
_NOWHERE = 1 << 30  # above any rank
_LOG2E, _LN2 = 1.4426950408889634, 0.6931471805599453

_barrier = jax.lax.optimization_barrier


@struct.dataclass
class Weights:
    """A weight [D, N] of products in exact mode: x [R, D] @ Weights is [R, N], in x's dtype.

    `parts`: its columns in order, f32[D, C] each, or f32[C, D] where `turned`, the last filled up
    with zeros; `size`: N. Fewer than `least` rows are filled up.
    """

    parts: tuple[jax.Array, ...]
    size: int = struct.field(pytree_node=False)
    least: int = struct.field(pytree_node=False)
    turned: bool = struct.field(pytree_node=False, default=False)

    def product(self, x: jax.Array, dtype=None) -> jax.Array:
        """x [R, D] times the weight, as `dtype` or in that of x."""
        num, dims = len(x), (((1,), (int(self.turned),)), ((), ()))
        rows = jnp.pad(x, ((0, max(0, self.least - num)), (0, 0)))
        rows = _barrier(_barrier(rows).astype(jnp.float32))
        found = _barrier([jax.lax.dot_general(rows, part, dims) for part in self.parts])
        found = found[0] if len(found) == 1 else jnp.concatenate(found, axis=1)
        return _barrier(found[:num, : self.size].astype(dtype or x.dtype))

    def __rmatmul__(self, x: jax.Array) -> jax.Array:
        return self.product(x)


def few_rows(w: jax.Array) -> Weights:
    """A weight [D, N] laid out for few rows, 1 or more."""
    padded = _pad_columns(w)
    step = max(_COLUMNS, _BYTES // 4 // len(w) // _COLUMNS * _COLUMNS)
    parts = [padded[:, i : i + step] for i in range(0, padded.shape[1], step)]
    return Weights(tuple(parts), w.shape[1], least=2)


def many_rows(w: jax.Array) -> Weights:
    """A weight [D, N] laid out for many rows."""
    return Weights((_pad_columns(w),), w.shape[1], least=_MANY)


def turned(w: jax.Array) -> Weights:
    """A weight [D, N] of which only its transpose is at hand, w [N, D]; for any number of rows."""
    return Weights((_pad_columns(w, axis=0),), len(w), least=2, turned=True)


def _pad_columns(w: jax.Array, axis: int = 1) -> jax.Array:
    pads = [(0, 0), (0, 0)]
    pads[axis] = 0, -w.shape[axis] % _COLUMNS
    return _barrier(jnp.pad(w.astype(jnp.float32), pads))


@jax.custom_vjp
def row_sum(x: jax.Array) -> jax.Array:
    """The sum f32[..., 1] over the last axis of f32[..., D]."""
    rows = x.reshape(-1, x.shape[-1])
    sums = Weights((jnp.ones((x.shape[-1], _COLUMNS), jnp.float32),), 1, least=2).product(rows)
    return sums.reshape(*x.shape[:-1], 1)


row_sum.defvjp(
    lambda x: (row_sum(x), x.shape), lambda shape, d_sum: (jnp.broadcast_to(d_sum, shape),)
)


def log_sum_exp(x: jax.Array) -> jax.Array:
    """The logarithm f32[R] of the sum of exponentials of f32[R, V]."""
    top = jax.lax.stop_gradient(jnp.max(x, axis=-1, keepdims=True))
    terms = jnp.pad(_barrier(jnp.exp(x - top)), ((0, 0), (0, -x.shape[1] % _TERMS)))
    parts = row_sum(terms.reshape(len(x), -1, _TERMS))[..., 0]
    return (jnp.log(row_sum(parts)) + top)[:, 0]


# Attention: M queries and S keys at a time, the keys f32[..., S, K]; the values f32[..., S, N] have
# a column of ones, which sums the weights up, and zeros up to the least N that is added in order.


def key_block(head_dim: int) -> int:
    """Keys that attention takes at a time; 0: such heads are too large for it."""
    most = _BYTES // 4 // _value_columns(head_dim) - _QUERIES
    return max(0, min(256, most // _COLUMNS * _COLUMNS))


def _value_columns(head_dim: int) -> int:
    return max(32, head_dim + 1)


def _scaled(q: jax.Array) -> jax.Array:
    """Queries f32 whose products with keys are exponents of 2."""
    return _barrier(q.astype(jnp.float32) * jnp.float32(q.shape[-1] ** -0.5 * _LOG2E))


def _with_ones(v: jax.Array) -> jax.Array:
    extra = _value_columns(v.shape[-1]) - v.shape[-1]
    column = jnp.broadcast_to(jnp.arange(extra) == 0, (*v.shape[:-1], extra))
    return jnp.concatenate([v.astype(jnp.float32), column.astype(jnp.float32)], axis=-1)


def _start(queries: tuple[int, ...], head_dim: int) -> tuple[jax.Array, jax.Array]:
    """Before the first key: the largest whole part of a score f32[..., M], and the sums of weighted
    values and of weights f32[..., M, N]."""
    sums = jnp.zeros((*queries, _value_columns(head_dim)), jnp.float32)
    return jnp.full(queries, _NEVER, jnp.float32), sums


def _add_keys(carry, q, k, v, seen):
    """The carry after more keys; seen bool[..., M, S]."""
    top, sums = carry
    scores = _barrier(jnp.einsum("...qd,...sd->...qs", q, k))
    whole = jnp.floor(scores)
    new = jnp.maximum(top, jnp.max(jnp.where(seen, whole, _NEVER), axis=-1))
    p = jnp.where(seen, _exp2(scores - whole) * _power(whole - new[..., None]), 0.0)
    unit = jnp.eye(q.shape[-2], dtype=jnp.float32) * _power(top - new)[..., None]
    weights = _barrier(jnp.concatenate([unit, p], axis=-1))
    values = _barrier(jnp.concatenate([sums, v], axis=-2))
    return new, _barrier(jnp.einsum("...qs,...sd->...qd", weights, values))


def _finish(carry, head_dim: int) -> tuple[jax.Array, jax.Array]:
    """Outputs f32[..., M, K], and the logarithm f32[..., M] of the sum of exponentials."""
    top, sums = carry
    total = jnp.maximum(sums[..., head_dim], 1e-30)  # 0 where nothing is seen
    return sums[..., :head_dim] / total[..., None], top * _LN2 + jnp.log(total)


def _fit_exp2() -> tuple[float, ...]:
    x = 0.5 - 0.5 * np.cos(np.pi * (np.arange(200) + 0.5) / 200)
    found = np.polynomial.Chebyshev.fit(x, 2**x, 6, domain=[0, 1])
    return tuple(found.convert(kind=np.polynomial.Polynomial).coef[::-1])


_EXP2 = _fit_exp2()  # coefficients of a polynomial, the highest first; off by 1e-9 at most


def _exp2(x: jax.Array) -> jax.Array:
    """2^x of f32 from 0 to 1."""
    y = jnp.full_like(x, _EXP2[0])
    for coefficient in _EXP2[1:]:
        y = y * x + jnp.float32(coefficient)
    return y


def _power(n: jax.Array) -> jax.Array:
    """2^n of whole f32 up to 0; below 2^-126 it is 0."""
    bits = jnp.clip(n, -127, 0).astype(jnp.int32) + 127
    return jax.lax.bitcast_convert_type(bits << 23, jnp.float32)


def paged(q, pool, layer, table, base, ranks, used=None, shared=None) -> jax.Array:
    """Attention over pages of at most `key_block` entries; arguments of decode/attention.py, of
    which it does not look at the last two: every row reads its own."""
    num_rows, chunk, heads, dim = q.shape
    size, kv_heads = pool.shape[2], pool.shape[3] // 2
    group = heads // kv_heads
    pages = min(max(1, key_block(dim) // size), table.shape[1])
    part = max(1, min(chunk, _QUERIES // group))  # queries of a row at a time
    parts = -(-chunk // part)
    entry_bytes = 2 * kv_heads * dim * pool.dtype.itemsize
    rows = min(max(1, _CACHE_BYTES // (pages * size * entry_bytes)), num_rows * parts)
    fill = -(pages * size) % _COLUMNS

    def some_rows(inputs):
        q, row, blocks, ranks = inputs
        q = _scaled(q).reshape(rows, part, kv_heads, group, dim).swapaxes(1, 2)
        q = q.reshape(rows, kv_heads, -1, dim)
        limit = jnp.repeat(ranks, group, axis=1)[:, None, :, None]
        if q.shape[2] == 1:  # two rows at least
            q = jnp.pad(q, ((0, 0), (0, 0), (0, 1), (0, 0)))

        def block(j, carry):
            column = j * pages + jnp.arange(pages + 1)
            here = table.at[row[:, None], column[:-1]].get(mode="clip")
            edges = base.at[row[:, None], column].get(mode="clip")
            entry = edges[:, :-1, None] + jnp.arange(size)
            entry = jnp.where(entry < edges[:, 1:, None], entry, _NOWHERE).reshape(rows, -1)
            entry = jnp.pad(entry, ((0, 0), (0, fill)), constant_values=_NOWHERE)
            kv = pool[layer, here].reshape(rows, -1, kv_heads, 2, dim)
            kv = jnp.pad(kv, ((0, 0), (0, fill), (0, 0), (0, 0), (0, 0)))
            # What no query of a row sees weighs 0, but may be anything, and 0 * NaN is NaN.
            some = entry <= jnp.max(ranks, axis=1, keepdims=True)
            v = jnp.where(some[:, :, None, None], kv[:, :, :, 1], 0).swapaxes(1, 2)
            k = kv[:, :, :, 0].swapaxes(1, 2).astype(jnp.float32)
            seen = entry[:, None, None] <= limit
            return _add_keys(carry, q, k, _with_ones(v), seen)

        carry = jax.lax.fori_loop(0, jnp.max(blocks), block, _start(q.shape[:-1], dim))
        out = _finish(carry, dim)[0][:, :, : part * group]
        out = out.reshape(rows, kv_heads, part, group, dim).swapaxes(1, 2)
        return out.reshape(rows, part, heads, dim)

    def split(x, fill=0):  # [R, C, ...] -> [R * parts, part, ...]
        pad = [(0, 0), (0, parts * part - chunk)] + [(0, 0)] * (x.ndim - 2)
        return jnp.pad(x, pad, constant_values=fill).reshape(-1, part, *x.shape[2:])

    def cut(x, fill=0):  # [R * parts, ...] -> [tiles, rows, ...]
        pad = [(0, -len(x) % rows)] + [(0, 0)] * (x.ndim - 1)
        return jnp.pad(x, pad, constant_values=fill).reshape(-1, rows, *x.shape[1:])

    row, limits = jnp.repeat(jnp.arange(num_rows), parts), split(ranks, -1)
    blocks = jnp.sum(base[row, :-1:pages] <= jnp.max(limits, axis=1, keepdims=True), axis=1)
    out = jax.lax.map(some_rows, (cut(split(q)), cut(row), cut(blocks), cut(limits, -1)))
    out = out.reshape(-1, part, heads, dim)[: num_rows * parts]
    return out.reshape(num_rows, -1, heads, dim)[:, :chunk].astype(q.dtype)


def rows(q, k, v, hidden) -> tuple[jax.Array, jax.Array]:
    """Tree attention, with arguments and output of model/attention.py; and the logarithm
    f32[B, T, H] of the sums of exponentials."""
    batch, length, heads, dim = q.shape
    kv_heads, size = k.shape[2], key_block(dim)
    group = heads // kv_heads
    part = max(1, _QUERIES // group)  # queries at a time

    def keys(x):  # [B, T, KV, N] -> f32[T / size, B, KV, size, N]
        x = jnp.pad(x, ((0, 0), (0, -length % size), (0, 0), (0, 0))).astype(jnp.float32)
        return x.reshape(batch, -1, size, kv_heads, x.shape[3]).transpose(1, 0, 3, 2, 4)

    def queries(x):  # [B, T, H, K] -> [T / part, B, KV, part * G, K]
        x = jnp.pad(x, ((0, 0), (0, -length % part), (0, 0), (0, 0)))
        x = x.reshape(batch, -1, part, kv_heads, group, dim).transpose(1, 0, 3, 2, 4, 5)
        return x.reshape(*x.shape[:3], -1, dim)

    all_k, all_v, some_q = keys(k), keys(_with_ones(v)), queries(_scaled(q))
    hidden = jnp.pad(hidden, ((0, 0), (0, -length % size), (0, 0), (0, 0)))
    hidden = hidden.reshape(batch, -1, size, *hidden.shape[2:]).swapaxes(0, 1)

    def some(_, inputs):
        q, i = inputs
        first = i * part
        at = jnp.repeat(first + jnp.arange(part), group)[:, None]

        def add(j, carry):
            inside = (hidden[j][:, None, :, :, 0] <= at[..., None]) & (
                at[..., None] < hidden[j][:, None, :, :, 1]
            )
            seen = (j * size + jnp.arange(size) <= at) & ~jnp.any(inside, axis=-1)
            return _add_keys(carry, q, all_k[j], all_v[j], seen[:, None])

        def step(j, carry):  # a block of which every key is hidden from all queries adds nothing
            covered = (hidden[j][..., 0] <= first) & (first + part <= hidden[j][..., 1])
            skip = jnp.all(jnp.any(covered, axis=-1))
            return jax.lax.cond(skip, lambda j, carry: carry, add, j, carry)

        last = jnp.minimum(len(all_k), (first + part - 1) // size + 1)  # causal until there
        start = _start(q.shape[:-1], dim)
        return None, _finish(jax.lax.fori_loop(0, last, step, start), dim)

    _, (out, norm) = jax.lax.scan(some, None, (some_q, jnp.arange(len(some_q))))
    shape = len(some_q), batch, kv_heads, part, group
    out = out.reshape(*shape, dim).transpose(1, 0, 3, 2, 4, 5).reshape(batch, -1, heads, dim)
    norm = norm.reshape(shape).transpose(1, 0, 3, 2, 4).reshape(batch, -1, heads)
    return out[:, :length].astype(q.dtype), norm[:, :length]
