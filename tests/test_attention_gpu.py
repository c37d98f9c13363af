"""The GPU kernel: its numbers against numpy in interpret mode, and its lowering for CUDA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from npr_jax.kernels import paged_gpu as attention_gpu
from npr_jax.kernels.paged_gpu import paged_attention

REST = "rest"


def oracle(q, pool, layer, table, base, ranks):
    """Gathers the entries that a table lists, then takes for each query those that it sees."""
    q, pool = np.asarray(q, np.float64), np.asarray(pool, np.float64)
    group = q.shape[2] // (pool.shape[3] // 2)
    out = np.zeros(q.shape)
    for r, pages in enumerate(table):
        fill = np.diff(base[r])
        kv = np.concatenate([pool[layer, p, :n] for p, n in zip(pages, fill, strict=True)])
        k, v = (np.repeat(kv[:, i::2], group, axis=1) for i in (0, 1))
        for c, rank in enumerate(ranks[r]):
            if rank >= 0:
                scores = np.einsum("hd,shd->hs", q[r, c], k[: rank + 1]) / np.sqrt(q.shape[3])
                weights = np.exp(scores - scores.max(axis=1, keepdims=True))
                weights /= weights.sum(axis=1, keepdims=True)
                out[r, c] = np.einsum("hs,shd->hd", weights, v[: rank + 1])
    return out


def problem(entries, fills, chunk=1, size=4, kv_heads=2, group=2, dim=16, dtype="float32"):
    """Random arguments. Row r attends over its first `entries[r]` entries or is at REST, and has
    pages of `fills[r]` entries. All rows start with the same page; what nobody sees is NaN."""
    rng = np.random.default_rng(chunk)
    num_rows, width = len(fills), max(len(fill) for fill in fills) + 2
    layers, pages = 3, 1 + num_rows * width
    names = rng.permutation(np.arange(1, pages)).reshape(num_rows, width)
    table = np.zeros((num_rows, width), np.int32)
    base = np.zeros((num_rows, width + 1), np.int32)
    ranks = np.full((num_rows, chunk), -1, np.int32)
    pool = np.full((layers, pages, size, 2 * kv_heads, dim), np.nan)
    names[:, 0] = names[0, 0]
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
    return jnp.asarray(q, dtype), jnp.asarray(pool, dtype), jnp.int32(2), table, base, ranks


def check(arguments):
    q, ranks = arguments[0], arguments[-1]
    out = jax.jit(functools.partial(paged_attention, interpret=True))(*arguments)
    assert out.shape == q.shape
    assert out.dtype == q.dtype
    out = np.asarray(out, np.float64)
    assert np.isfinite(out).all()
    expected = oracle(*arguments)
    tolerance = 1e-5 if q.dtype == jnp.float32 else 0.02
    np.testing.assert_allclose(
        out[ranks >= 0], expected[ranks >= 0], rtol=tolerance, atol=tolerance
    )


# Pages of one entry, filled in part, full, not needed yet; rows that end at and within a page.
FILLS = [
    [4] * 13,
    [4, 1, 3, 4, 4, 1, 1, 2, 4, 4, 3],
    [4, 4],
    [4, 2, 4, 1, 4, 4, 4, 4, 3, 4, 4, 4, 4, 4, 4],
    [4, 3, 4],
]
ENTRIES = [49, 22, REST, 52, 1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("chunk", "group"), [(1, 1), (1, 4), (9, 2), (20, 1), (7, 3)])
@pytest.mark.parametrize("all_lines", [1, 2**15], ids=["one stretch", "five stretches"])
def test_kernel_matches_the_oracle(monkeypatch, all_lines, chunk, group, dtype):
    """With blocks of 16 slots, tiles of 16 queries and stretches of 16 slots or of a whole row."""
    for name in ("_BLOCK", "_LINES", "_STRETCH"):
        monkeypatch.setattr(attention_gpu, name, 16)
    monkeypatch.setattr(attention_gpu, "_ALL_LINES", all_lines)
    check(problem(ENTRIES, FILLS, chunk, group=group, dtype=dtype))


@pytest.mark.parametrize(
    ("chunk", "size", "kv_heads", "group", "dim"), [(60, 16, 8, 4, 128), (1, 64, 2, 8, 64)]
)
def test_kernel_at_the_shapes_of_models(chunk, size, kv_heads, group, dim):
    rng = np.random.default_rng(0)
    fills = [[size, *rng.integers(1, size + 1, 700 // size)] for _ in range(2)]
    sizes = {"size": size, "kv_heads": kv_heads, "group": group, "dim": dim}
    check(problem([sum(fills[0]) - 3, 70], fills, chunk, dtype="bfloat16", **sizes))


def test_blocks_that_nobody_sees_are_not_worked_on(monkeypatch):
    """Of the 16 blocks of 16 slots in a row: 3 of the first row, none of the second."""
    blocks = []
    original = attention_gpu._dot

    def dot(a, b, axis):
        jax.debug.callback(lambda: blocks.append(axis))
        return original(a, b, axis)

    monkeypatch.setattr(attention_gpu, "_dot", dot)
    monkeypatch.setattr(attention_gpu, "_BLOCK", 16)
    check(problem([40, REST], [[4] * 62] * 2, kv_heads=1))
    jax.effects_barrier()
    assert len(blocks) == 2 * 3


@pytest.mark.parametrize("dim", [8, 24])
def test_head_dim_that_the_kernel_does_not_take(dim):
    with pytest.raises(ValueError, match=f"head_dim is {dim}, needed is one of 16, 32"):
        paged_attention(*problem([5], [[4, 4]], dim=dim))


@pytest.mark.parametrize("size", [16, 64])
@pytest.mark.parametrize(("num_rows", "chunk"), [(64, 1), (1, 1), (4, 128)])
def test_lowering_for_cuda_at_qwen3_4b_and_16k(num_rows, chunk, size):
    width = 16384 // size + 4
    pool = jax.ShapeDtypeStruct((36, 4 * width, size, 16, 128), jnp.bfloat16)
    arguments = (
        jax.ShapeDtypeStruct((num_rows, chunk, 32, 128), jnp.bfloat16),
        pool,
        jax.ShapeDtypeStruct((), jnp.int32),
        jax.ShapeDtypeStruct((num_rows, width), jnp.int32),
        jax.ShapeDtypeStruct((num_rows, width + 1), jnp.int32),
        jax.ShapeDtypeStruct((num_rows, chunk), jnp.int32),
    )
    lowered = jax.jit(paged_attention).trace(*arguments).lower(lowering_platforms=("cuda",))
    text = lowered.as_text()
    (call,) = [line for line in text.splitlines() if "__gpu$xla.gpu.triton" in line]
    assert "npr_paged_attention" in call
    # The pool is an argument of the function and of the kernel, and of nothing else.
    name = "x".join(map(str, pool.shape)) + "xbf16"
    assert name in call
    assert text.count(name) == 2
