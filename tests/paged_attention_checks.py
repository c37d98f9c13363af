"""What all implementations of paged attention are checked with: rows of every kind, and numpy."""

import jax
import jax.numpy as jnp
import numpy as np

REST = "rest"  # a row without a query

# Pages of one entry, filled in part, full, not needed yet; rows that end at and within a page. The
# first row has more slots than any block of the tests, and their number is no multiple of one.
FILLS = [
    [4] * 13,
    [4, 1, 3, 4, 4, 1, 1, 2, 4, 4, 3],
    [4, 4],
    [4, 2, 4, 1, 4, 4, 4, 4, 3, 4, 4, 4, 4, 4, 4],
    [4, 3, 4],
]
ENTRIES = [49, 22, REST, 52, 1]


def reference(q, pool, layer, table, base, ranks, used=None):
    """Entry after entry, only of those that a query sees: f64[R, C, H, K], 0 for padding."""
    q, pool = np.asarray(q, np.float64), np.asarray(pool, np.float64)
    table, base, ranks = (np.asarray(x) for x in (table, base, ranks))
    group = q.shape[2] // (pool.shape[3] // 2)
    out = np.zeros(q.shape)
    for r, c in np.argwhere(ranks >= 0):
        fill = np.diff(base[r])
        kv = np.concatenate([pool[layer, p, :n] for p, n in zip(table[r], fill, strict=True)])
        kv = kv[: ranks[r, c] + 1]
        k, v = (np.repeat(kv[:, i::2], group, axis=1) for i in (0, 1))
        scores = np.einsum("hd,shd->hs", q[r, c], k) / np.sqrt(q.shape[3])
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        weights /= weights.sum(axis=1, keepdims=True)
        out[r, c] = np.einsum("hs,shd->hd", weights, v)
    return out


def problem(entries, fills, chunk=1, size=4, kv_heads=2, group=2, dim=16, dtype="float32", same=()):
    """Random arguments. Row r attends over its first `entries[r]` entries or is at REST, and has
    pages of `fills[r]` entries. All rows start with the same page; what nobody sees is NaN. For
    every (r, other, n) of `same` row r lists the first n pages of the other."""
    fills = [list(fill) for fill in fills]
    rng = np.random.default_rng(chunk)
    num_rows, width = len(fills), max(len(fill) for fill in fills) + 2
    layers, pages = 3, 1 + num_rows * width
    names = rng.permutation(np.arange(1, pages)).reshape(num_rows, width)
    table = np.zeros((num_rows, width), np.int32)
    base = np.zeros((num_rows, width + 1), np.int32)
    ranks = np.full((num_rows, chunk), -1, np.int32)
    pool = np.full((layers, pages, size, 2 * kv_heads, dim), np.nan)
    names[:, 0] = names[0, 0]
    for r, other, count in same:
        names[r, :count], fills[r][:count] = names[other, :count], fills[other][:count]
    for r, fill in enumerate(fills):
        table[r, : len(fill)] = names[r, : len(fill)]
        base[r, 1:] = np.cumsum(np.pad(fill, (0, width - len(fill))))
        if entries[r] == REST:
            continue
        count = min(entries[r], int(rng.integers(1, chunk + 1)))
        ranks[r, :count] = np.arange(entries[r] - count, entries[r])
        for page, start, stop in zip(table[r], base[r], base[r, 1:], strict=False):
            seen = np.clip(entries[r] - start, 0, stop - start)
            pool[:, page, :seen] = rng.normal(size=(layers, seen, 2 * kv_heads, dim))
    q = rng.normal(size=(num_rows, chunk, kv_heads * group, dim))
    used = np.sum(base[:, None, :-1] <= ranks[:, :, None], axis=2, dtype=np.int32)
    arrays = jnp.asarray(q, dtype), jnp.asarray(pool, dtype), jnp.int32(2)
    return *arrays, *(jnp.asarray(x) for x in (table, base, ranks, used))


def check(attend, arguments, shared=None):
    """Numbers of an implementation against the reference; what nobody sees (NaN) shows nowhere."""
    q, ranks = arguments[0], np.asarray(arguments[5])
    out = jax.jit(attend)(*arguments, shared)
    assert out.shape == q.shape
    assert out.dtype == q.dtype
    out, real = np.asarray(out, np.float64), ranks >= 0
    assert np.isfinite(out).all()
    tolerance = 1e-5 if q.dtype == jnp.float32 else 0.02
    expected = reference(*arguments)
    np.testing.assert_allclose(out[real], expected[real], rtol=tolerance, atol=tolerance)
