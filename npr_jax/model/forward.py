"""The model: one scan over stacked layers, with the attention handed in.

    x = embed[tokens];  for each layer: x += attention(norm(x));  x += swiglu(norm(x));  norm(x)

`attend(q, k, v, layer, state) -> (out, state)` is all that training and decoding do differently:
in training it is tree attention over the row, in the engine it writes k and v into pages and
attends over a table of them. Norms, rotary angles and softmax are float32, the rest is the
parameters' dtype.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from npr_jax.base.mesh import activations
from npr_jax.kernels import exact
from npr_jax.kernels.blocks import SAVED
from npr_jax.model.config import TARGETS, ModelConfig
from npr_jax.model.exact import head as exact_head
from npr_jax.model.exact import lay_out
from npr_jax.model.rope import Yarn


def rms_norm(x: jax.Array, weight: jax.Array, eps: float, same_bits: bool = False) -> jax.Array:
    """x / rms(x) * weight over the last axis, in float32; the dtype of x."""
    y = x.astype(jnp.float32)
    if same_bits:
        mean = exact.row_sum(y * y) / y.shape[-1]
    else:
        mean = jnp.mean(y * y, axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(mean + eps)
    return (y * weight.astype(jnp.float32)).astype(x.dtype)


def rope(x: jax.Array, positions: jax.Array, theta: float, yarn: Yarn | None = None) -> jax.Array:
    """Rotary embedding of x [B, T, heads, K] at positions i32[B, T]; halves, as in Hugging Face."""
    half = x.shape[-1] // 2
    if yarn is None:
        inverse = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    else:
        inverse = yarn.frequencies(theta, 2 * half)
    angle = positions[:, :, None, None].astype(jnp.float32) * inverse
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    if yarn is not None:
        sin, cos = sin * yarn.scale, cos * yarn.scale
    a, b = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def forward(
    config: ModelConfig,
    params: dict,
    tokens: jax.Array,
    positions: jax.Array,
    attend: Callable,
    state,
    mesh: Mesh | None = None,
):
    """Runs the model over tokens i32[B, T] at positions i32[B, T].

    Args:
      params: with stacked layers, which are scanned, or a tuple of layers (`params.unstack`), which
        are unrolled.
      attend: (q [B, T, H, K], k [B, T, KV, K], v, layer i32[], state) -> (out [B, T, H, K], state);
        q and k are normed and rotated.
      state: any pytree that `attend` threads through the layers (the KV pool, or None).
      mesh: of training (npr_jax.base.mesh), on which activations are split over rows and tokens.

    Returns:
      (x [B, T, D] after the final norm, in the parameters' dtype, state).
    """
    c = config
    same_bits = c.attention == "exact"
    norm = functools.partial(rms_norm, eps=c.rms_norm_eps, same_bits=same_bits)
    table, batch, length = params["embed"], *tokens.shape
    if mesh is not None:  # looked up in whole rows, which are gathered
        table = _constrain(table, mesh, P("tensor"))

    def settle(x):
        """Says where activations live, so that XLA gathers weights and never activations."""
        if same_bits:  # in its own dtype, whatever is done with it
            return jax.lax.optimization_barrier(x)
        return x if mesh is None else _constrain(x, mesh, activations(mesh))

    def flat(y):
        """One axis of tokens, or XLA on a CPU transposes them for a weight's gradient. Not on a
        mesh, where rows and tokens are split apart."""
        return y if mesh is not None else y.reshape(-1, y.shape[-1])

    adapted = [TARGETS[name] for name in c.lora.targets] if c.lora else []
    scale = c.lora.scale if c.lora else 0.0

    def times(y, w: dict) -> Callable:
        """name -> y times the matrix of that name, and its adapters."""
        # The gradient in y of all matrices is added up before that of adapters: of parts on
        # `tensor`, whose sum is then sent once and not for each matrix.
        beside = jnp.array(y, copy=True) if adapted else y

        def product(name: str):
            if name not in adapted:
                return y @ w[name]
            return y @ w[name] + (beside @ w[f"{name}_a"] * scale) @ w[f"{name}_b"]

        return product

    x = settle(table[tokens])

    def layer(carry, inputs):
        x, state = carry
        number, w = inputs
        if same_bits:
            w = lay_out(w, exact.many_rows)
        with jax.named_scope("attention"):
            y = flat(norm(x, w["attn_norm"]))
            q, k, v = map(times(y, w), ("wq", "wk", "wv"))
            if state is not None:
                # Else the TPU compiler makes heads of the weights instead of the products, and each
                # call of the engine turns these weights of all layers over.
                q, k, v = jax.lax.optimization_barrier((q, k, v))
            if c.attention_bias:
                q, k, v = q + w["bq"], k + w["bk"], v + w["bv"]
            q = q.reshape(batch, length, c.num_heads, c.head_dim)
            k = k.reshape(batch, length, c.num_kv_heads, c.head_dim)
            v = v.reshape(batch, length, c.num_kv_heads, c.head_dim)
            if c.qk_norm:
                q = norm(q, w["q_norm"])
                k = norm(k, w["k_norm"])
            q = rope(q, positions, c.rope_theta, c.yarn)
            k = rope(k, positions, c.rope_theta, c.yarn)
            if same_bits:
                q, k, v = jax.lax.optimization_barrier((q, k, v))
            out, state = attend(q, k, v, number, state)
            out = times(flat(out.reshape(batch, length, -1)), w)("wo")
            x = settle(x + out.reshape(x.shape))
        with jax.named_scope("mlp"):
            y = flat(norm(x, w["mlp_norm"]))
            product = times(y, w)
            y = times(jax.nn.silu(product("w_gate")) * product("w_up"), w)("w_down")
            x = settle(x + y.reshape(x.shape))
        return (x, state), None

    if c.remat == "full":
        layer = jax.checkpoint(layer)
    elif c.remat == "dots":
        policies = jax.checkpoint_policies
        kept = policies.save_from_both_policies(
            policies.dots_with_no_batch_dims_saveable, policies.save_only_these_names(SAVED)
        )
        if c.lora:
            kept = _but_for_sums_of(c.lora.rank, kept)
        # A loop over layers needs no barrier against CSE, and XLA on a CPU is faster without; with
        # "full" the TPU compiler holds and moves less where there is one.
        layer = jax.checkpoint(layer, prevent_cse=False, policy=kept)
    layers = params["layers"]
    if isinstance(layers, tuple):
        layer = jax.jit(layer)  # traced once for all
        for number, weights in enumerate(layers):
            (x, state), _ = layer((x, state), (jnp.int32(number), weights))
    else:
        numbers = jnp.arange(c.num_layers, dtype=jnp.int32)
        (x, state), _ = jax.lax.scan(layer, (x, state), (numbers, layers))
    return norm(x, params["final_norm"]), state


def _but_for_sums_of(rank: int, kept: Callable) -> Callable:
    """A policy that keeps what another keeps, but for products (x A) B: they are as large as those
    that they are added to, and cheap."""

    def policy(primitive, *avals, **params):
        if primitive.name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            if [avals[0].shape[i] for i in contracted] == [rank]:
                return False
        return kept(primitive, *avals, **params)

    return policy


def head(config: ModelConfig, params: dict) -> jax.Array | exact.Weights:
    """The weights [D, padded_vocab_size] of the logits, in the parameters' dtype."""
    if isinstance(params.get("unembed"), exact.Weights):  # an engine's
        return params["unembed"]
    return params["embed"].T if config.tie_word_embeddings else params["unembed"]


def unembed(config: ModelConfig, weights: jax.Array | exact.Weights, x: jax.Array) -> jax.Array:
    """Logits f32[..., padded_vocab_size] of x [..., D] under `head`; padding rows are -inf."""
    if config.attention == "exact" or isinstance(weights, exact.Weights):
        rows = exact_head(config, weights).product(x.reshape(-1, x.shape[-1]), jnp.float32)
        logits = rows.reshape(*x.shape[:-1], -1)
    else:
        logits = jnp.matmul(x, weights, preferred_element_type=jnp.float32)
    if config.padded_vocab_size > config.vocab_size:
        real = jnp.arange(config.padded_vocab_size) < config.vocab_size
        logits = jnp.where(real, logits, -jnp.inf)
    return logits


def log_sum_exp(config: ModelConfig) -> Callable[[jax.Array], jax.Array]:
    """The logarithm f32[R] of the sum of exponentials of logits f32[R, V]."""
    if config.attention == "exact":
        return exact.log_sum_exp
    return functools.partial(jax.nn.logsumexp, axis=-1)


def _constrain(x: jax.Array, mesh: Mesh, spec: P) -> jax.Array:
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))
