"""Logits and token log-probs of laid-out rows: what SFT, RL, rejection and the tests all use."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from npr_jax.mesh import BATCH, activations
from npr_jax.model.attention import tree_attend
from npr_jax.model.config import ModelConfig
from npr_jax.model.forward import forward, head, unembed


def logits(config: ModelConfig, params: dict, tokens, positions, hidden) -> jax.Array:
    """Logits f32[B, T, vocab_size] of tokens i32[B, T] under `hidden` i32[B, T, D, 2].

    Materialises all of them: for tests and small inputs; training uses `token_logp`.
    """
    x, _ = forward(config, params, tokens, positions, tree_attend(config, hidden), None)
    return unembed(config, head(config, params), x)[..., : config.vocab_size]


def token_logp(config: ModelConfig, params: dict, tokens, positions, hidden, pred) -> jax.Array:
    """Raw log-prob f32[B, T] of each token from the row that predicts it; 0 where `pred` is -1."""
    return token_logp_entropy(config, params, tokens, positions, hidden, pred)[0]


def token_logp_entropy(
    config: ModelConfig,
    params: dict,
    tokens,
    positions,
    hidden,
    pred,
    mesh: Mesh | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Log-probs f32[B, T] of the tokens, and entropies f32[B, T] of their distributions.

    The entropies carry no gradient; both are 0 where `pred` i32[B, T] is -1. Logits exist for
    `logp_chunk` tokens at a time, forward and backward. On a training mesh every device scores its
    own tokens; the vocabulary stays split over `tensor`.
    """
    attend = tree_attend(config, hidden, mesh)
    x, _ = forward(config, params, tokens, positions, attend, None, mesh)
    rows = jnp.take_along_axis(x, jnp.maximum(pred, 0)[..., None], axis=1)
    score = functools.partial(_score, config)
    if mesh is not None:
        split = activations(mesh)
        score = jax.shard_map(
            score,
            mesh=mesh,
            in_specs=(P(), split, split),
            out_specs=(split, split),
            axis_names={*BATCH, "sequence"},
            check_vma=False,
        )
    logp, entropy = score(head(config, params), rows, tokens)
    keep = pred >= 0
    return jnp.where(keep, logp, 0.0), jnp.where(keep, entropy, 0.0)


def _score(config: ModelConfig, weights, rows, tokens) -> tuple[jax.Array, jax.Array]:
    """Log-probs f32[B, T] of `tokens` and entropies, under the logits of `rows` [B, T, D]."""
    batch, length, dim = rows.shape
    total = batch * length
    chunk = min(config.logp_chunk, total)
    pad = -total % chunk
    rows = jnp.pad(rows.reshape(total, dim), ((0, pad), (0, 0))).reshape(-1, chunk, dim)
    targets = jnp.pad(tokens.reshape(total), (0, pad)).reshape(-1, chunk)

    @jax.checkpoint  # or the backward pass would keep every chunk's logits
    def score(chunk_of):
        x, target = chunk_of
        z = unembed(config, weights, x)
        norm = jax.nn.logsumexp(z, axis=-1)
        # A sum and no lookup: with a vocabulary in parts, every part adds what it has.
        here = jnp.arange(z.shape[-1]) == target[:, None]
        logp = jnp.sum(jnp.where(here, z, 0.0), axis=-1) - norm
        p = jax.lax.stop_gradient(jnp.exp(z - norm[:, None]))
        entropy = norm - jnp.sum(jnp.where(p > 0, p * z, 0.0), axis=-1)
        return logp, jax.lax.stop_gradient(entropy)

    logp, entropy = jax.lax.map(score, (rows, targets))

    def back(y):
        return y.reshape(-1)[:total].reshape(batch, length)

    return back(logp), back(entropy)
