"""Adapters (LoRA): low-rank terms beside frozen matrices, apart, together and merged.

Parameters with adapters are a base, which has the structure of a model without, and a dict
{"layers": {w_a [L, in, rank], w_b [L, rank, out]}} of the adapters alone, of which the layers are
those of both. All functions take arrays, shapes, shardings or whatever else stands in their places.
"""

import dataclasses

import jax

from npr_jax.model.config import TARGETS, ModelConfig
from npr_jax.model.params import ADAPTERS, init_params


def plain(config: ModelConfig) -> ModelConfig:
    """The config of the model without adapters."""
    return dataclasses.replace(config, lora=None)


def adapters_of(params: dict) -> dict:
    """The adapters alone, of parameters with stacked layers."""
    layers = params["layers"]
    return {"layers": {name: x for name, x in layers.items() if name in ADAPTERS}}


def base_of(params: dict) -> dict:
    """The parameters without adapters, of those with stacked layers."""
    layers = params["layers"]
    return {**params, "layers": {name: x for name, x in layers.items() if name not in ADAPTERS}}


def alone(config: ModelConfig, params: dict) -> bool:
    """Whether these are the adapters alone of a model that has some."""
    return config.lora is not None and "embed" not in params


def same_part(config: ModelConfig, tree: dict, params: dict) -> dict:
    """Of a tree for all parameters what is for these, which may be the adapters alone."""
    return adapters_of(tree) if alone(config, params) else tree


def trained(config: ModelConfig, params: dict) -> dict:
    """What is trained of the parameters: the adapters alone, or all of a model that has none."""
    return adapters_of(params) if config.lora else params


def joined(base: dict | None, adapters: dict) -> dict:
    """The parameters of a base and adapters, both stacked or both unstacked; those in the place of
    the adapters where there is no base."""
    if base is None:
        return adapters
    layers, more = base["layers"], adapters["layers"]
    if isinstance(layers, tuple):
        return {**base, "layers": tuple(w | new for w, new in zip(layers, more, strict=True))}
    return {**base, "layers": layers | more}


def init_adapters(config: ModelConfig, key: jax.Array, dtype="float32") -> dict:
    """Adapters that add nothing yet: A is random, B is 0. To be called under `jax.jit`, or all the
    model's weights are drawn too.

    Args:
      key, dtype: as for `init_params`.
    """
    return adapters_of(init_params(config, key, dtype))


def merge(config: ModelConfig, params: dict) -> dict:
    """The parameters of a model without adapters that computes the same: W + alpha / rank A B, in
    float32 and rounded once, to the dtype of the adapters, in which all the others are given too.
    They themselves where the config has no adapters."""
    if (lora := config.lora) is None:
        return params
    dtype, layers = next(iter(adapters_of(params)["layers"].values())).dtype, params["layers"]

    def product(name: str):
        a, b = (layers[f"{name}_{part}"].astype("float32") for part in "ab")
        return lora.scale * (a @ b)

    adapted = {
        name: layers[name].astype("float32") + product(name)
        for name in map(TARGETS.__getitem__, lora.targets)
    }
    base = base_of(params)
    return jax.tree.map(lambda x: x.astype(dtype), {**base, "layers": base["layers"] | adapted})
