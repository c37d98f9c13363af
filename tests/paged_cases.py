"""Random tables for tests of paged attention."""

import jax.numpy as jnp
import numpy as np

CASES = {
    "decode": dict(rows=5, chunk=1),
    "decode, one head each": dict(rows=3, chunk=1, kv_heads=4, group=1),
    "decode, group of 4": dict(rows=3, chunk=1, kv_heads=1, group=4),
    "decode, long tables": dict(rows=2, chunk=1, width=37, size=8),
    "headers": dict(rows=4, chunk=5),
    "prefill": dict(rows=2, chunk=48, width=23),
    "small pages": dict(rows=3, chunk=3, size=4, width=29),
    "large pages": dict(rows=2, chunk=1, size=64, width=5),
    "one row": dict(rows=1, chunk=1, width=19),
}


def make_case(
    rows, chunk, size=16, width=11, kv_heads=2, group=2, dim=32, layers=3, dtype="float32", seed=0
):
    """(q, pool, layer, table, base, ranks): pages shared by rows, filled in part also in the
    middle, columns unused, rows that rest, large numbers in slots that no table lists."""
    rng = np.random.default_rng(seed)
    num_pages = rows * width + 1
    pool = np.full((layers, num_pages, size, 2 * kv_heads, dim), 1e9, np.float32)
    table = np.zeros((rows, width), np.int32)
    base = np.zeros((rows, width + 1), np.int32)
    ranks = np.full((rows, chunk), -1, np.int32)
    fresh = iter(rng.permutation(np.arange(1, num_pages)))
    for r in range(rows):
        count = int(rng.integers(max(1, width // 2), width + 1))
        fills = rng.integers(1, size + 1, count)
        fills[rng.random(count) < 0.5] = size
        while fills.sum() < chunk:
            fills[rng.integers(count)] = size
        for m in range(count):
            if r and m < 2 and fills[m] <= base[0, m + 1] - base[0, m]:
                table[r, m] = table[0, m]  # a page of the first row
                fills[m] = base[0, m + 1] - base[0, m]
                continue
            table[r, m] = next(fresh)
            shape = (layers, fills[m], 2 * kv_heads, dim)
            pool[:, table[r, m], : fills[m]] = rng.normal(size=shape)
        base[r, 1 : count + 1] = np.cumsum(fills)
        base[r, count + 1 :] = base[r, count]
        if rows > 1 and r == rows // 2:
            continue  # this row rests
        # The queries may end before the last entries: pages are reserved ahead.
        some = int(rng.integers(1, chunk + 1))
        last = int(rng.integers(max(some, base[r, count] - 2 * size), base[r, count] + 1)) - 1
        ranks[r, :some] = last - some + 1 + np.arange(some)
    q = rng.normal(size=(rows, chunk, kv_heads * group, dim))
    return (
        jnp.asarray(q, dtype),
        jnp.asarray(pool, dtype),
        jnp.int32(layers - 1),
        jnp.asarray(table),
        jnp.asarray(base),
        jnp.asarray(ranks),
    )
