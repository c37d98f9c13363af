"""Logits, token log-probs and losses of laid-out rows."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from npr_jax.base.mesh import BATCH, activations
from npr_jax.model.attention import chunk_order, take_chunks, tree_attend
from npr_jax.model.config import ModelConfig
from npr_jax.model.exact import check, require
from npr_jax.model.forward import forward, head, log_sum_exp, unembed

Figures = tuple[dict[str, jax.Array], dict[str, jax.Array]]  # sums, largest values: scalars


def logits(config: ModelConfig, params: dict, tokens, positions, hidden) -> jax.Array:
    """Logits f32[B, T, vocab_size] of tokens i32[B, T] at positions i32[B, T], under `hidden`
    i32[B, T, D, 2].

    Materialises all of them: for tests and small inputs.
    """
    x, _ = forward(config, params, tokens, positions, tree_attend(config, hidden), None)
    return unembed(config, head(config, params), x)[..., : config.vocab_size]


def token_logp(
    config: ModelConfig, params: dict, tokens, positions, hidden, pred, exact: bool = False
) -> jax.Array:
    """Raw log-prob f32[B, T] of each token from the row that predicts it; 0 where `pred` is -1.

    Arguments as for `token_logp_entropy`; `exact`: with the bits of an engine whose config says
    `exact`, on one CPU device (else ValueError).
    """
    if exact:
        config = dataclasses.replace(config, attention="exact")
    return token_logp_entropy(config, params, tokens, positions, hidden, pred)[0]


def token_logp_entropy(
    config: ModelConfig, params: dict, tokens, positions, hidden, pred
) -> tuple[jax.Array, jax.Array]:
    """Log-probs f32[B, T] of the tokens, and entropies f32[B, T] of their distributions.

    The entropies carry no gradient; both are 0 where `pred` is -1. Logits exist for `logp_chunk`
    tokens at a time, forward and backward; `token_loss` computes them only once.

    Args:
      tokens, positions: i32[B, T].
      hidden: i32[B, T, D, 2], the intervals of queries that do not see the token.
      pred: i32[B, T], the index in its row of the token that predicts it; -1: none.
    """
    rows = _predictors(config, params, tokens, positions, hidden, pred)
    weights, columns = head(config, params), {"tokens": tokens, "pred": pred}
    score = jax.checkpoint(lambda chunk: _score(config, weights, *chunk))
    scores = jax.lax.map(score, _chunks(config, rows, columns))
    return tuple(y.reshape(-1)[: tokens.size].reshape(tokens.shape) for y in scores)


def token_loss(
    config: ModelConfig,
    params: dict,
    rows: dict,
    measure: Callable[[jax.Array, jax.Array, dict], tuple[jax.Array, Figures]],
    mesh: Mesh | None = None,
) -> tuple[jax.Array, Figures]:
    """A loss f32[] that is a sum over tokens, and figures of the same tokens.

    `measure` gives them for N of the tokens, of log-probs f32[N] and entropies f32[N] (both 0 where
    `pred` is -1) and the columns {name: [N]} of `rows`; sums are added up, and of the largest
    values the largest stays. It is asked for `logp_chunk` tokens at a time (the last of them may be
    none: zeros with a `pred` of -1), and the gradient of their logits is formed then and there, so
    that logits neither stay nor are computed again (as in Liger-Kernel, arXiv 2410.10989). Only the
    loss has a gradient, and only in the parameters.

    Args:
      rows: i32[B, T] tokens, positions and pred, i32[B, T, D, 2] hidden; more columns [B, T].
      mesh: of training, on which every device scores its own tokens; the vocabulary stays split
        over `tensor`.
    """
    layout = rows["tokens"], rows["positions"], rows["hidden"], rows["pred"]
    x = _predictors(config, params, *layout, mesh)
    columns = {name: value for name, value in rows.items() if name not in ("positions", "hidden")}
    return _chunked_loss(config, measure, mesh)(head(config, params), x, columns)


def row_logp(config: ModelConfig, params: dict, rows: dict, mesh: Mesh | None = None) -> jax.Array:
    """Log-probs f32[B, T] of the tokens of rows, which are as for `token_loss`; without gradient.

    `mesh`: of training, on which every device scores its own tokens.
    """
    tokens, pred = rows["tokens"], rows["pred"]
    x = _predictors(config, params, tokens, rows["positions"], rows["hidden"], pred, mesh)

    def logp(weights, x, columns):
        tokens = columns["tokens"]
        chunks = _chunks(config, x, columns)
        found = jax.lax.map(lambda chunk: _score(config, weights, *chunk)[0], chunks)
        return found.reshape(-1)[: tokens.size].reshape(tokens.shape)

    split = None if mesh is None else activations(mesh)
    score = _on_own_tokens(logp, mesh, split)
    return jax.lax.stop_gradient(score(head(config, params), x, {"tokens": tokens, "pred": pred}))


def _on_own_tokens(function: Callable, mesh: Mesh | None, out_specs) -> Callable:
    """f(weights [D, V], x [B, T, D], columns {name: [B, T]}) where every device has its tokens."""
    if mesh is None:
        return function
    split = activations(mesh)
    return jax.shard_map(
        function,
        mesh=mesh,
        in_specs=(P(), split, split),
        out_specs=out_specs,
        axis_names={*BATCH, "sequence"},
        check_vma=False,
    )


def _predictors(config, params, tokens, positions, hidden, pred, mesh=None) -> jax.Array:
    """The model's output [B, T, D] at the row that predicts each token."""
    if config.attention == "exact":
        require(config, mesh, "exact")
        check(config, (tokens.size, config.logp_chunk), few=False)
    attend, pred = tree_attend(config, hidden, mesh), jnp.maximum(pred, 0)
    if order := chunk_order(mesh, tokens.shape[1]):
        places = np.argsort(order) * (tokens.shape[1] // len(order))  # of the chunks' first tokens
        chunk, rest = jnp.divmod(pred, tokens.shape[1] // len(order))
        pred = jnp.asarray(places, jnp.int32)[chunk] + rest
        tokens, positions = take_chunks(tokens, order), take_chunks(positions, order)
    x, _ = forward(config, params, tokens, positions, attend, None, mesh)
    return jnp.take_along_axis(x, pred[..., None], axis=1)


def _chunks(config: ModelConfig, x, columns: dict) -> tuple[jax.Array, dict]:
    """x [B, T, D] and columns [B, T] as [B * T / N, N, ...], N = `logp_chunk`; what fills the last
    chunk up has no predictor."""
    size = min(config.logp_chunk, x.shape[0] * x.shape[1])

    def cut(x, fill=0):
        x = x.reshape(-1, *x.shape[2:])
        pads = ((0, -len(x) % size), *((0, 0),) * (x.ndim - 1))
        return jnp.pad(x, pads, constant_values=fill).reshape(-1, size, *x.shape[1:])

    return cut(x), {name: cut(y, -1 if name == "pred" else 0) for name, y in columns.items()}


def _score(config: ModelConfig, weights, x, columns: dict) -> tuple[jax.Array, jax.Array]:
    """Log-probs f32[N] of a chunk's tokens and entropies, under the logits of x [N, D]."""
    z = unembed(config, weights, x)
    norm = log_sum_exp(config)(z)
    # A sum and no lookup: with a vocabulary in parts, every part adds what it has.
    here = jnp.arange(z.shape[-1]) == columns["tokens"][:, None]
    logp = jnp.sum(jnp.where(here, z, 0.0), axis=-1) - norm
    p = jax.lax.stop_gradient(jnp.exp(z - norm[:, None]))
    entropy = jax.lax.stop_gradient(norm - jnp.sum(jnp.where(p > 0, p * z, 0.0), axis=-1))
    predicted = columns["pred"] >= 0
    return jnp.where(predicted, logp, 0.0), jnp.where(predicted, entropy, 0.0)


def _chunked_loss(config: ModelConfig, measure: Callable, mesh: Mesh | None) -> Callable:
    """f(weights [D, V], x [B, T, D], columns {name: [B, T]}) -> what `token_loss` returns."""
    axes, split = ((), None) if mesh is None else ((*BATCH, "sequence"), activations(mesh))

    @jax.named_scope("loss")
    def loss(weights, x, columns):
        return measure(*_score(config, weights, x, columns), columns)

    def values(weights, x, columns):
        return jax.lax.map(lambda chunk: loss(weights, *chunk), _chunks(config, x, columns))

    def values_and_gradients(weights, x, columns):
        def add(d_weights, chunk):
            value, (d_w, d_x) = jax.value_and_grad(loss, (0, 1), has_aux=True)(weights, *chunk)
            return d_weights + d_w, (value, d_x)

        zeros = jnp.zeros(weights.shape, jnp.float32)  # of many chunks, so not in bfloat16
        d_weights, (found, d_x) = jax.lax.scan(add, zeros, _chunks(config, x, columns))
        d_weights = jax.lax.psum(d_weights, axes).astype(weights.dtype)
        d_x = d_x.reshape(-1, x.shape[-1])[: x.shape[0] * x.shape[1]].reshape(x.shape)
        return found, d_weights, d_x

    @jax.custom_vjp
    def total(weights, x, columns):
        return _fold(_on_own_tokens(values, mesh, P(axes))(weights, x, columns))

    def forward_(weights, x, columns):
        both = _on_own_tokens(values_and_gradients, mesh, (P(axes), P(), split))
        found, *gradients = both(weights, x, columns)
        return _fold(found), gradients

    def backward(gradients, cotangent):
        scale, _ = cotangent
        return *((scale * g).astype(g.dtype) for g in gradients), None

    total.defvjp(forward_, backward)
    return total


def _fold(parts: tuple[jax.Array, Figures]) -> tuple[jax.Array, Figures]:
    """Loss and figures [N] of N parts as those of the whole."""
    loss, (sums, largest) = parts
    add, top = (lambda x: x.sum(axis=0)), (lambda x: x.max(axis=0))
    return add(loss), (jax.tree.map(add, sums), jax.tree.map(top, largest))
