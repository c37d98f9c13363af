"""Weights from the devices that train to those that roll out.

    train layout --pack--> parts, one on each training device --turn--> all of them on every
    rollout device --unpack--> decode layout

`turn` is one compiled program of all devices; it moves bits, so what arrives is what was sent.
What is packed takes no more memory than the weights in the dtype that the engine computes in, split
over all training devices, and can wait there until it is asked for.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from npr_jax.model import ModelConfig, abstract_params
from npr_jax.model.lora import adapters_of
from npr_jax.model.sharding import decode_shardings

_BITS = {2: jnp.uint16, 4: jnp.uint32}


class Handover:
    """Between the devices of two sides, of which this process is in one.

    Args:
      config: of the model.
      dtype: that the engine computes in.
      train, rollout: meshes (data, tensor) of each side.
      local: of the second the part that is this process's; None for a single device, or none.
      alone: of a model with adapters, whether these alone are sent.
    """

    def __init__(
        self,
        config: ModelConfig,
        dtype: str,
        train: Mesh,
        rollout: Mesh,
        local: Mesh | None,
        alone: bool = False,
    ):
        part = adapters_of if alone else lambda params: params
        self._config, self._dtype, self._train, self._local = config, dtype, train, local
        devices = np.concatenate([train.devices, rollout.devices])
        self._groups = len(devices)
        both = Mesh(devices, ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
        self._parts = NamedSharding(both, P("data", "tensor"))
        count = len(train.devices)
        self._turn = jax.jit(
            functools.partial(jax.tree.map, lambda x: x[:count]),
            out_shardings=NamedSharding(both, P(None, "tensor")),
        )
        self._splits = jax.tree.map(_split, part(decode_shardings(config, train)))
        self._shapes = part(abstract_params(config, dtype))
        self._pack = jax.jit(self._packed, out_shardings=NamedSharding(train, P("data", "tensor")))
        here = part(decode_shardings(config, local)) if local else None
        self._unpack = jax.jit(self._unpacked, out_shardings=here)

    def pack(self, params: dict) -> dict:
        """On the side that trains: its parameters, ready to be sent."""
        return self._pack(params)

    def send(self, packed: dict) -> None:
        """Sends what was packed; all processes of both sides make the call, or that of `receive`,
        together."""
        sent = self._turn(jax.tree.map(self._whole, packed))
        jax.block_until_ready(sent)

    def receive(self) -> dict:
        """On the side that rolls out: the parameters as the engine of this process decodes."""
        nothing = jax.eval_shape(self._packed, self._shapes)
        received = self._turn(jax.tree.map(self._empty, nothing))

        def here(x: jax.Array) -> jax.Array:
            shards = [shard.data for shard in x.addressable_shards]
            if self._local is None:
                return shards[0]
            split = NamedSharding(self._local, P(None, "tensor"))
            return jax.make_array_from_single_device_arrays(x.shape, split, shards)

        return self._unpack(jax.tree.map(here, received))

    def _packed(self, params: dict) -> dict:
        """[G, T, C] of each weight: T parts as `tensor` splits it (or T copies), in G pieces."""
        groups, tensor = self._train.devices.shape

        def one(x, axis):
            x = x.astype(self._dtype)
            bits = jax.lax.bitcast_convert_type(x, _BITS[x.dtype.itemsize])
            if axis < 0:
                rows = jnp.broadcast_to(bits.reshape(1, -1), (tensor, x.size))
            else:
                rows = jnp.moveaxis(bits, axis, 0).reshape(tensor, -1)
            rows = jnp.pad(rows, ((0, 0), (0, -rows.shape[1] % groups)))
            return jnp.moveaxis(rows.reshape(tensor, groups, -1), 1, 0)

        return jax.tree.map(one, params, self._splits)

    def _unpacked(self, packed: dict) -> dict:
        _, tensor = self._train.devices.shape

        def one(x, axis, like):
            rows = jnp.moveaxis(x, 0, 1).reshape(tensor, -1)
            if axis < 0:
                bits = rows[0, : like.size].reshape(like.shape)
            else:
                moved = (like.shape[axis], *np.delete(like.shape, axis))
                size = math.prod(moved) // tensor
                bits = jnp.moveaxis(rows[:, :size].reshape(moved), 0, axis)
            return jax.lax.bitcast_convert_type(bits, like.dtype)

        return jax.tree.map(one, packed, self._splits, self._shapes)

    def _whole(self, x: jax.Array) -> jax.Array:
        """Packed parts as those of all devices, of which the others have none."""
        shape = (self._groups, *x.shape[1:])
        shards = [shard.data for shard in x.addressable_shards]
        return jax.make_array_from_single_device_arrays(shape, self._parts, shards)

    def _empty(self, like: jax.ShapeDtypeStruct) -> jax.Array:
        shape = (self._groups, *like.shape[1:])
        piece = np.zeros((1, 1, shape[2]), like.dtype)
        shards = [jax.device_put(piece, device) for device in self._parts.addressable_devices]
        return jax.make_array_from_single_device_arrays(shape, self._parts, shards)


def _split(sharding: NamedSharding) -> int:
    """The axis of a weight that `tensor` splits; -1 if none."""
    spec = list(sharding.spec)
    return spec.index("tensor") if "tensor" in spec else -1
