"""One table of every weight: shape, logical axes, and how it starts.

Parameters are a nested dict {"embed", "layers": {name: [L, ...]}, "final_norm"[, "unembed"]}; the
layers are stacked on the first axis, and every matrix is stored so that `x @ w` needs no transpose.
With `config.lora` layers also have the adapters of each target w, as w_a [L, in, rank] and w_b
[L, rank, out] (model/lora.py).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from npr_jax.model.config import TARGETS, ModelConfig

ADAPTERS = frozenset(f"{name}_{part}" for name in TARGETS.values() for part in "ab")


class Weight(NamedTuple):
    """One weight. `axes`: a logical name per dimension; `std`: of its normal init, None for a norm
    (constant `gain`) and 0 for a bias."""

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    std: float | None
    gain: float = 1.0


def weight_table(config: ModelConfig) -> dict:
    """The tree of `Weight`s in the structure of the parameters."""
    c = config
    d, f = c.hidden_size, c.intermediate_size
    q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim

    def matrix(rows, cols, axes, scale=1.0):
        return Weight((c.num_layers, rows, cols), ("layers", *axes), scale * rows**-0.5)

    def norm(size, axis, gain=1.0):
        return Weight((c.num_layers, size), ("layers", axis), None, gain)

    layers = {
        "attn_norm": norm(d, "embed"),
        "wq": matrix(d, q, ("embed", "heads")),
        "wk": matrix(d, kv, ("embed", "kv_heads")),
        "wv": matrix(d, kv, ("embed", "kv_heads")),
        "wo": matrix(q, d, ("heads", "embed"), c.init_out_scale),
        "mlp_norm": norm(d, "embed"),
        "w_gate": matrix(d, f, ("embed", "mlp")),
        "w_up": matrix(d, f, ("embed", "mlp")),
        "w_down": matrix(f, d, ("mlp", "embed"), c.init_out_scale),
    }
    if c.qk_norm:
        layers["q_norm"] = norm(c.head_dim, "head_dim", c.init_qk_gain)
        layers["k_norm"] = norm(c.head_dim, "head_dim", c.init_qk_gain)
    if c.attention_bias:
        for name, size, axis in (
            ("bq", q, "heads"),
            ("bk", kv, "kv_heads"),
            ("bv", kv, "kv_heads"),
        ):
            layers[name] = Weight((c.num_layers, size), ("layers", axis), 0.0)
    targets, r = (c.lora.targets, c.lora.rank) if c.lora else ((), 0)
    for name in map(TARGETS.__getitem__, targets):
        _, rows, cols = layers[name].shape
        _, first, last = (x if x == "embed" else f"adapted_{x}" for x in layers[name].axes)
        # A has the variance of PEFT's, and B is 0, so that the adapters begin with adding nothing.
        layers[f"{name}_a"] = matrix(rows, r, (first, "rank"), 3**-0.5)
        layers[f"{name}_b"] = Weight((c.num_layers, r, cols), ("layers", "rank", last), 0.0)
    table = {
        "embed": Weight((c.padded_vocab_size, d), ("vocab", "embed"), c.init_embed_std),
        "layers": layers,
        "final_norm": Weight((d,), ("embed",), None),
    }
    if not c.tie_word_embeddings:
        table["unembed"] = Weight((d, c.padded_vocab_size), ("embed", "vocab"), d**-0.5)
    return table


def _is_weight(x) -> bool:
    return isinstance(x, Weight)


def init_params(config: ModelConfig, key: jax.Array, dtype="float32") -> dict:
    """Random parameters in the structure that this module describes.

    Args:
      key: of `jax.random.key`; each weight of the table folds a key of its own from it, so that a
        model has the same weights with adapters and without.
      dtype: of all parameters, which are drawn in float32.
    """
    leaves, tree = jax.tree.flatten_with_path(weight_table(config), is_leaf=_is_weight)
    names = [path[-1].key for path, _ in leaves]
    number = {name: i for i, name in enumerate(sorted(names, key=ADAPTERS.__contains__))}

    def make(name: str, w: Weight):
        if w.std is None:
            return jnp.full(w.shape, w.gain, dtype)
        noise = jax.random.normal(jax.random.fold_in(key, number[name]), w.shape, jnp.float32)
        return (noise * w.std).astype(dtype)

    return jax.tree.unflatten(
        tree, [make(name, w) for name, (_, w) in zip(names, leaves, strict=True)]
    )


def unstack(params: dict) -> dict:
    """The same parameters with a tuple of layers, for functions that unroll them: XLA on a CPU
    copies every layer's weights out of a stack before it multiplies with them."""
    layers = params["layers"]
    count = jax.tree.leaves(layers)[0].shape[0]
    split = [{name: x[i] for name, x in layers.items()} for i in range(count)]
    return {**params, "layers": tuple(split)}


def abstract_params(config: ModelConfig, dtype="float32") -> dict:
    """The parameters as `jax.ShapeDtypeStruct`s of that dtype, in the same structure."""
    return jax.tree.map(
        lambda w: jax.ShapeDtypeStruct(w.shape, jnp.dtype(dtype)),
        weight_table(config),
        is_leaf=_is_weight,
    )


def logical_axes(config: ModelConfig) -> dict:
    """Logical axis names of the parameters, a tuple for each, in the same structure, for a rules
    table to map to a mesh."""
    return jax.tree.map(lambda w: w.axes, weight_table(config), is_leaf=_is_weight)


def num_params(config: ModelConfig) -> int:
    """Number of parameters, padding rows included."""
    return sum(x.size for x in jax.tree.leaves(abstract_params(config)))


def check_finite(arrays, what: str) -> None:
    """Raises FloatingPointError that names `what` and the arrays of a pytree, on devices or on the
    host, that have a value that is not finite."""
    found = jax.tree.leaves_with_path(_finite(arrays))
    name = functools.partial(jax.tree_util.keystr, simple=True, separator=".")
    bad = [name(path) for path, finite in found if not finite]
    if bad:
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        named = f"{', '.join(bad[:3])}{more}"
        raise FloatingPointError(f"{what}: {named} has values that are not finite")


@jax.jit
def _finite(arrays):
    return jax.tree.map(lambda x: jnp.isfinite(x).all(), arrays)
