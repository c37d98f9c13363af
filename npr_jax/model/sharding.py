"""Where parameters live on a mesh: rules tables from logical axes to mesh axes.

The resolver raises where others replicate without a word: on a mesh axis that the mesh does not
have, on one axis used twice, and on sizes that do not divide.
"""

import functools

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from npr_jax.model.config import ModelConfig
from npr_jax.model.lora import adapters_of, alone, same_part
from npr_jax.model.params import Weight, weight_table

# Decoding: heads and the hidden layer over `tensor`, the same on every replica of `data`.
DECODE_RULES = {
    "layers": None,
    "embed": None,
    "head_dim": None,
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "rank": None,
    "adapted_heads": "tensor",
    "adapted_kv_heads": "tensor",
    "adapted_mlp": "tensor",
}
# Training: every matrix is also split over `fsdp`, and gathered where it is used. Adapters have one
# axis that is long, which may have to be split over both.
_BOTH = "tensor", "fsdp"
TRAIN_RULES = DECODE_RULES | {
    "embed": "fsdp",
    "adapted_heads": _BOTH,
    "adapted_kv_heads": _BOTH,
    "adapted_mlp": _BOTH,
}


Rules = dict[str, str | tuple[str, ...] | None]


def resolve(name: str, weight: Weight, units: dict[str, int], rules: Rules, mesh: Mesh) -> P:
    """The PartitionSpec of one weight; `units[axis]` is what must divide where it is not the size
    itself (heads, not columns)."""
    spec: list[str | tuple[str, ...] | None] = []
    used: list[str] = []
    for axis, size in zip(weight.axes, weight.shape, strict=True):
        if axis not in rules:
            raise ValueError(f"{name} has the logical axis {axis!r}, for which there is no rule")
        target = rules[axis]
        size, parts = units.get(axis, size), 1
        for one in (target,) if isinstance(target, str) else target or ():
            if one not in mesh.shape:
                raise ValueError(f"{axis} goes to {one!r}; the mesh has {tuple(mesh.shape)}")
            if one in used:
                raise ValueError(f"two axes of {name} go to {one!r}")
            used.append(one)
            if size // parts % mesh.shape[one]:
                raise ValueError(
                    f"{name}: {axis}={size} does not divide by {one}={mesh.shape[one]}"
                )
            parts *= mesh.shape[one]
        spec.append(target)
    return P(*spec)


def decode_shardings(config: ModelConfig, mesh: Mesh) -> dict:
    """NamedShardings of the parameters on a mesh (data, tensor). KV heads that do not divide by
    `tensor` are on every shard.

    Raises ValueError where query heads, the hidden layer or the vocabulary do not divide.
    """
    rules: Rules = dict(DECODE_RULES)
    if config.num_kv_heads % mesh.shape["tensor"]:
        rules["kv_heads"] = rules["adapted_kv_heads"] = None
    return _shardings(config, mesh, rules)


def train_shardings(config: ModelConfig, mesh: Mesh) -> dict:
    """NamedShardings of the parameters on a training mesh (npr_jax.base.mesh).

    Raises ValueError where heads, KV heads, the hidden layer or the vocabulary do not divide by
    `tensor`, or the model's width by `fsdp`.
    """
    return _shardings(config, mesh, TRAIN_RULES)


def _shardings(config: ModelConfig, mesh: Mesh, rules: Rules) -> dict:
    units = {"heads": config.num_heads, "kv_heads": config.num_kv_heads}
    return jax.tree_util.tree_map_with_path(
        lambda path, weight: NamedSharding(
            mesh, resolve(jax.tree_util.keystr(path, simple=True), weight, units, rules, mesh)
        ),
        weight_table(config),
        is_leaf=lambda x: isinstance(x, Weight),
    )


def place_params(params, shardings):
    """Parameters onto a mesh, from the devices or from hosts that all have them; each device gets
    its own part only."""

    def place(x, sharding):
        if isinstance(x, jax.Array) and not (
            x.is_fully_addressable and sharding.mesh.is_multi_process
        ):
            return jax.device_put(x, sharding)
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(place, params, shardings)


def to_decode(config: ModelConfig, params, dtype: str, mesh: Mesh, local: Mesh):
    """Parameters, or adapters alone, from the training layout to the decoding layout, in one
    compiled program.

    Args:
      dtype: that the engine computes in.
      mesh: (data, tensor) over the devices of the training mesh (`mesh.decode_mesh`).
      local: the part of it that is this process's, on which the result lives.
    """
    arrays = _reshard(config, dtype, mesh, alone(config, params))(params)
    here = same_part(config, decode_shardings(config, local), params)

    def own(x, sharding):
        shards = [shard.data for shard in x.addressable_shards]
        return jax.make_array_from_single_device_arrays(x.shape, sharding, shards)

    return jax.tree.map(own, arrays, here)


@functools.cache
def _reshard(config: ModelConfig, dtype: str, mesh: Mesh, adapters: bool):
    def cast(params):
        return jax.tree.map(lambda x: x.astype(dtype), params)

    shardings = decode_shardings(config, mesh)
    return jax.jit(cast, out_shardings=adapters_of(shardings) if adapters else shardings)
