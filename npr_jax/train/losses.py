"""Token losses as sums, for the three stages.

Each loss returns `(sum, count, metrics)`: the loss summed over the masked tokens, how many they
are, and more sums over the same tokens. Sums of micro-batches and devices are added, and divided
once by the whole optimizer step's count; a mean of means would weigh tokens by their neighbours.

Shapes: `logp`, `old_logp`, `advantages` f32[...], the log-prob (natural log) of each token and the
advantage of its response; `mask` bool[...], the tokens that count. Entry t is about token t
itself, not about the next one. What is not masked in may hold anything, NaN too: it reaches
neither the sums nor the gradients.
"""

import jax
import jax.numpy as jnp

Loss = tuple[jax.Array, jax.Array, dict[str, jax.Array]]  # f32[], i32[], {name: f32[]}


def sft(logp: jax.Array, mask: jax.Array) -> Loss:
    """Negative log-likelihood, for Beta (arXiv 2512.07461, stage 2): sum of -log p."""
    mask = _check(mask, logp=logp)
    return -_masked(logp, mask).sum(), mask.sum(dtype=jnp.int32), {}


def dapo(
    logp: jax.Array,
    old_logp: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    dual_clip: float = 10.0,
) -> Loss:
    """Clipped policy loss, for Zero (arXiv 2512.07461 eq. 2; DAPO, arXiv 2503.14476).

    With r = exp(logp - old_logp), per token
        max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)),
    and for A < 0 at most -A dual_clip (dual clip, arXiv 1912.09729), so that one token that has
    become far more likely cannot dominate. The log-ratio is clamped to [-20, 20]; beyond it the
    gradient is 0.

    Metrics (sums over masked tokens): `clip_fraction` tokens at the clip, `dual_clip_fraction`
    tokens at the dual clip, `approx_kl` of old_logp - logp.
    """
    mask = _check(mask, logp=logp, old_logp=old_logp, advantages=advantages)
    advantages = _masked(advantages, mask)
    log_ratio = jnp.clip(_masked(logp, mask) - _masked(old_logp, mask), -20.0, 20.0)
    ratio = jnp.exp(log_ratio)
    free = -advantages * ratio
    clipped = -advantages * jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high)
    loss, limit = jnp.maximum(free, clipped), -advantages * dual_clip
    negative = advantages < 0
    metrics = {
        "clip_fraction": _count(clipped > free, mask, loss.dtype),
        "dual_clip_fraction": _count(negative & (loss > limit), mask, loss.dtype),
        "approx_kl": -_masked(log_ratio, mask).sum(),
    }
    loss = jnp.where(negative, jnp.minimum(loss, limit), loss)
    return _masked(loss, mask).sum(), mask.sum(dtype=jnp.int32), metrics


def papo(
    logp: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    old_logp: jax.Array | None = None,
    bound: float = 0.0,
) -> Loss:
    """Strictly on-policy loss of PAPO (arXiv 2512.07461 eq. 6): sum of -A pi / sg[pi].

    The ratio is 1, so the value is -sum A and the gradient that of -A log pi: no clip takes the
    gradient from a token, and no importance weight is there to go wrong.

    With `old_logp`, for tokens that older weights have drawn, each is weighed by
    sg[min(exp(logp - old_logp), bound)], truncated importance sampling: no weight is above the
    bound, so the variance is finite, and tokens at it count too little. Metrics then (sums over
    masked tokens): `importance` weights, `importance_truncated` tokens at the bound.
    """
    mask = _check(mask, logp=logp, advantages=advantages)
    logp = _masked(logp, mask)
    ratio = jnp.exp(logp - jax.lax.stop_gradient(logp))
    loss, metrics = -_masked(advantages, mask) * ratio, {}
    if old_logp is not None:
        _check(mask, old_logp=old_logp)
        weight = jnp.exp(jax.lax.stop_gradient(logp) - _masked(old_logp, mask))
        weight = jnp.minimum(weight, bound)
        loss = loss * weight
        metrics = {
            "importance": _masked(weight, mask).sum(),
            "importance_truncated": _count(weight >= bound, mask, loss.dtype),
        }
    return loss.sum(), mask.sum(dtype=jnp.int32), metrics


def divergence(logp: jax.Array, ref_logp: jax.Array, mask: jax.Array) -> jax.Array:
    """How far tokens have come from a reference, by the estimator k3 of
    http://joschu.net/blog/kl-approx.html: the sum f32[] of exp(r) - r - 1, r = ref_logp - logp.

    It is never negative, and where the policy has drawn the tokens its mean is the KL divergence
    from policy to reference. As a term of a loss it has the gradient that GRPO takes
    (arXiv 2402.03300 eq. 4). r is clamped to [-20, 20]; beyond it the gradient is 0.
    """
    mask = _check(mask, logp=logp, ref_logp=ref_logp)
    r = jnp.clip(_masked(ref_logp, mask) - _masked(logp, mask), -20.0, 20.0)
    return (jnp.exp(r) - r - 1.0).sum()


def _masked(values: jax.Array, mask: jax.Array) -> jax.Array:
    """Zeros outside the mask. A product would let NaN and inf through, to the gradient too."""
    return jnp.where(mask, values, 0.0)


def _count(hits: jax.Array, mask: jax.Array, dtype) -> jax.Array:
    return (hits & mask).sum(dtype=dtype)


def _check(mask: jax.Array, **arrays: jax.Array) -> jax.Array:
    """The mask as bool. Arrays of other shapes would be broadcast, and counted wrongly."""
    for name, array in arrays.items():
        if array.shape != mask.shape:
            raise ValueError(f"{name} has shape {array.shape}, needs the mask's {mask.shape}")
    return mask.astype(bool)
