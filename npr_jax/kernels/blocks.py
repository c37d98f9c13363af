"""What the kernels share, and of tree attention which blocks of queries see which of keys.

Key k is visible to query q iff k <= q and no interval hidden[k, d] holds q. Of a block of keys only
the ends of its intervals are looked at, column by column, so nothing here has T * T elements. In a
tree the keys that a block of queries does not see are hidden by one column (that of the outermost
branch or document that they do not share), so little that is hidden counts as seen in part.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

NONE, SOME, ALL = 0, 1, 2  # of the pairs of two blocks that are visible
EMPTY = -1e30  # score of what is not seen; finite, so that a row that sees nothing stays finite
SAVED = "attention"  # name of what the backward pass needs of attention, for `jax.checkpoint`
FAR = 1 << 30  # more than any rank of paged attention
TOGETHER = 8  # rows that read a run of pages at once
LANES = 128  # of a TPU's vectors
_GPU_DIMS = (16, 32, 64, 128, 256)  # powers of two; Triton multiplies nothing narrower than 16
_NEVER, _ALWAYS = np.iinfo(np.int32).min, np.iinfo(np.int32).max


def takes(platform: str, head_dim: int) -> bool:
    """Whether the kernels of a platform take such heads; where there are none, nothing does."""
    return {"gpu": head_dim in _GPU_DIMS, "tpu": head_dim % LANES == 0}.get(platform, False)


def check_head_dim(platform: str, head_dim: int) -> None:
    """Raises ValueError for heads that the kernels of a platform, "gpu" or "tpu", do not take."""
    if not takes(platform, head_dim):
        dims = ", ".join(map(str, _GPU_DIMS))
        needed = f"one of {dims}" if platform == "gpu" else f"a multiple of {LANES}"
        raise ValueError(
            f"head_dim is {head_dim}, the {platform.upper()} kernels need {needed}: "
            "where attention is 'pallas' set it to 'blockwise'"
        )


def pad_queries(x: jax.Array, block: int) -> jax.Array:
    """x [B, T, ...] with zeros up to a multiple of `block`."""
    return _pad(x, block, 0)


def pad_keys(k, v, hidden, block: int):
    """k, v and hidden [B, S, ...] up to a multiple of `block`; what is added nobody sees."""
    padding = -k.shape[1] % block
    everyone = jnp.array([_NEVER, _ALWAYS], jnp.int32)
    everyone = jnp.broadcast_to(everyone, (hidden.shape[0], padding, *hidden.shape[2:]))
    return _pad(k, block, 0), _pad(v, block, 0), jnp.concatenate([hidden, everyone], axis=1)


def _pad(x, block, value):
    pads = [(0, 0)] * x.ndim
    pads[1] = 0, -x.shape[1] % block
    return jnp.pad(x, pads, constant_values=value)


def pair_kinds(hidden: jax.Array, offset, length: int, block_q: int, block_k: int) -> jax.Array:
    """How much each block of queries sees of each block of keys.

    NONE and ALL are certain; SOME may in truth be either.

    Args:
      hidden: i32[B, S, D, 2], S a multiple of block_k (`pad_keys`), D above 0.
      offset: i32[], index of the first query; the queries are offset ... offset + length - 1.

    Returns:
      i32[B, ceil(length / block_q), S / block_k] of NONE, SOME and ALL.
    """
    batch, _, depth, _ = hidden.shape
    hidden = hidden.reshape(batch, -1, block_k, depth, 2)
    start, end = hidden[..., 0], hidden[..., 1]  # [B, M, block_k, D]
    real = start < end
    num_q, num_k = -(-length // block_q), hidden.shape[1]

    first = offset + jnp.arange(num_q, dtype=jnp.int32)[:, None] * block_q  # [N, 1], queries
    last = jnp.minimum(first + block_q, offset + length) - 1
    first_key = jnp.arange(num_k, dtype=jnp.int32) * block_k  # [M]

    def each(x):  # [B, M, D] -> [B, N, M, D]
        return x[:, None]

    q0, q1 = first[..., None], last[..., None]  # [N, 1, 1]
    covered = (each(jnp.max(start, axis=2)) <= q0) & (q1 < each(jnp.min(end, axis=2)))
    lowest = jnp.min(jnp.where(real, start, _ALWAYS), axis=2)
    highest = jnp.max(jnp.where(real, end, _NEVER), axis=2)
    touched = (each(lowest) <= q1) & (q0 < each(highest))

    none = jnp.any(covered, axis=-1) | (first_key > last)
    every = ~jnp.any(touched, axis=-1) & (first_key + block_k - 1 <= first)
    return jnp.where(none, NONE, jnp.where(every, ALL, SOME)).astype(jnp.int32)


def members(shared) -> jax.Array:
    """The rows i32[S, TOGETHER] of each run of a `Shared` of R rows (decode/attention.py); R where
    there is none."""
    num_rows = len(shared.order)
    place = shared.runs[:, :1] + jnp.arange(TOGETHER)
    row = shared.order[jnp.minimum(place, num_rows - 1)]
    return jnp.where(place < shared.runs[:, 1:2], row, num_rows)


def merge(told: jax.Array, weight: jax.Array, rows: jax.Array, num_rows: int) -> jax.Array:
    """What rows are told by several parts of their keys: f32[num_rows, ..., K].

    Args:
      told: f32[N, ..., K], attention over each part.
      weight: f32[N, ...], the logarithm of the part's sum of exponentials.
      rows: i32[N], whose part it is; `num_rows`: nobody's.
    """
    reduce = functools.partial(jax.ops.segment_max, num_segments=num_rows)
    top = reduce(weight, rows).at[rows].get(mode="clip")
    part = jnp.exp(weight - top)
    reduce = functools.partial(jax.ops.segment_sum, num_segments=num_rows)
    return reduce(part[..., None] * told, rows) / reduce(part, rows)[..., None]


def dot(a: jax.Array, b: jax.Array, axis: int) -> jax.Array:
    """Inside a kernel: a @ b (axis 0) or a @ b.T (axis 1) in float32."""
    precision = "highest" if a.dtype == jnp.float32 else "default"
    return jax.lax.dot_general(
        a, b, (((1,), (axis,)), ((), ())), precision, preferred_element_type=jnp.float32
    )


def widen(x: jax.Array, lanes: int) -> jax.Array:
    """x [N, 128], the same in all lanes, as [N, lanes]: cheaper than to broadcast one lane."""
    return jnp.tile(x, (1, -(-lanes // LANES)))[:, :lanes]
