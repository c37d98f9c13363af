"""Logits and token log-probs of laid-out rows: what SFT, RL, rejection and the tests all use."""

import jax
import jax.numpy as jnp

from npr_jax.model.attention import tree_attend
from npr_jax.model.config import ModelConfig
from npr_jax.model.forward import forward, unembed


def logits(config: ModelConfig, params: dict, tokens, positions, hidden) -> jax.Array:
    """Logits f32[B, T, vocab_size] of tokens i32[B, T] under `hidden` i32[B, T, D, 2].

    Materialises all of them: for tests and small inputs; training uses `token_logp`.
    """
    x, _ = forward(config, params, tokens, positions, tree_attend(config, hidden), None)
    return unembed(config, params, x)[..., : config.vocab_size]


def token_logp(config: ModelConfig, params: dict, tokens, positions, hidden, pred) -> jax.Array:
    """Raw log-prob f32[B, T] of each token from the row that predicts it; 0 where `pred` is -1."""
    return token_logp_entropy(config, params, tokens, positions, hidden, pred)[0]


def token_logp_entropy(
    config: ModelConfig, params: dict, tokens, positions, hidden, pred
) -> tuple[jax.Array, jax.Array]:
    """Log-probs f32[B, T] of the tokens, and entropies f32[B, T] of their distributions.

    The entropies carry no gradient; both are 0 where `pred` i32[B, T] is -1. Logits exist for
    `logp_chunk` tokens at a time, forward and backward.
    """
    x, _ = forward(config, params, tokens, positions, tree_attend(config, hidden), None)
    rows = jnp.take_along_axis(x, jnp.maximum(pred, 0)[..., None], axis=1)
    batch, length, dim = rows.shape
    total = batch * length
    chunk = min(config.logp_chunk, total)
    pad = -total % chunk
    rows = jnp.pad(rows.reshape(total, dim), ((0, pad), (0, 0))).reshape(-1, chunk, dim)
    targets = jnp.pad(tokens.reshape(total), (0, pad)).reshape(-1, chunk)

    @jax.checkpoint  # or the backward pass would keep every chunk's logits
    def score(chunk_of):
        x, target = chunk_of
        z = unembed(config, params, x)
        norm = jax.nn.logsumexp(z, axis=-1)
        logp = jnp.take_along_axis(z, target[:, None], axis=-1)[:, 0] - norm
        p = jax.lax.stop_gradient(jnp.exp(z - norm[:, None]))
        entropy = norm - jnp.sum(jnp.where(p > 0, p * z, 0.0), axis=-1)
        return logp, jax.lax.stop_gradient(entropy)

    logp, entropy = jax.lax.map(score, (rows, targets))
    keep = pred >= 0

    def back(y):
        return jnp.where(keep, y.reshape(-1)[:total].reshape(batch, length), 0.0)

    return back(logp), back(entropy)
