"""Device meshes: one for training, one for decoding, over the same devices.

    training  data, fsdp, sequence, tensor    batch rows over data and fsdp, tokens over sequence
    decoding  data, tensor                    a replica per `data`, with lanes and pages of its own

Slices that a slow network joins (`slices`) have the same mesh each, and `data` goes over all of
them: nothing but the sum of the gradients leaves a slice.

The devices of one process hold whole batch rows and whole decoding replicas, so that a process
feeds its own rows and decodes its own requests without a word to the others.
"""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Annotated

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from npr_jax.base.fields import Checked, Count, CountOrZero, Range

AXES = ("data", "fsdp", "sequence", "tensor")
BATCH = ("data", "fsdp")  # what the rows of a batch are split over


Axis = Annotated[int, Range(ge=1, also=-1)]


@dataclasses.dataclass(frozen=True)
class MeshConfig(Checked):
    """Sizes of the mesh axes, in each slice; one of them may be -1: what the others leave.

    Attributes:
      slices: TPU slices, or groups of nodes, that are joined by a slower network than their chips:
        each has a copy of the parameters at least.
      data (devices): copies of the parameters, each with rows of its own.
      fsdp (devices): parts of parameters and optimizer state; rows are split over it too.
      tensor (devices): parts of heads, hidden layer and vocabulary.
      sequence (devices): parts of a row's tokens (context parallelism).
      rollout (devices): of all, those of the last processes, which do nothing but roll out while
        the others train (`staleness`); 0: all devices do both by turns.
    """

    slices: Count = 1
    data: Axis = 1
    fsdp: Axis = 1
    tensor: Axis = 1
    sequence: Axis = 1
    rollout: CountOrZero = 0

    def __post_init__(self):
        super().__post_init__()
        sizes = {axis: getattr(self, axis) for axis in AXES}
        if sum(size == -1 for size in sizes.values()) > 1:
            raise ValueError(f"mesh is {_text(sizes)}, needed is -1 for one axis at most")

    def sizes(self, num_devices: int) -> dict[str, int]:
        """The size of every axis on that many devices, of which `data` goes over all slices. Raises
        ValueError where they do not fit."""
        if num_devices % self.slices:
            raise ValueError(
                f"mesh.slices is {self.slices}: {num_devices} devices do not divide by that"
            )
        num_devices //= self.slices
        sizes = {axis: getattr(self, axis) for axis in AXES}
        known = math.prod(size for size in sizes.values() if size != -1)
        if -1 in sizes.values():
            if num_devices % known:
                raise ValueError(
                    f"mesh is {_text(sizes)}: {num_devices} devices do not divide by {known}"
                )
            rest = num_devices // known
            sizes = {axis: rest if size == -1 else size for axis, size in sizes.items()}
        elif known > num_devices:
            raise ValueError(
                f"mesh is {_text(sizes)}, which is {known} devices; there are {num_devices}"
                + (f" in each of {self.slices} slices" if self.slices > 1 else "")
            )
        return sizes | {"data": sizes["data"] * self.slices}


def parse_mesh(text: str) -> MeshConfig:
    """A config from text such as "fsdp=16,tensor=4"; axes that are not named have size 1."""
    sizes = {}
    for part in text.split(","):
        axis, _, size = part.strip().partition("=")
        known = axis in ("slices", "rollout", *AXES) and axis not in sizes
        if not known or not re.fullmatch("-?[0-9]{1,9}", size):
            raise ValueError(
                f"mesh {text!r}: {part!r} is not understood, needed is AXIS=SIZE, once per axis of "
                f"slices, rollout, {', '.join(AXES)}"
            )
        sizes[axis] = int(size)
    return MeshConfig(**sizes)


def make_mesh(config: MeshConfig, devices: Sequence | None = None) -> Mesh | None:
    """The training mesh; None for a single device.

    Args:
      devices: all there are if None, of which those for rollouts are left out. One process may use
        fewer of them than there are; several processes use all.

    Raises:
      ValueError: the axes and the devices do not fit each other.
    """
    devices = list(jax.devices() if devices is None else devices)
    if config.rollout:
        devices, _ = split_rollout(config, devices)
    sizes = config.sizes(len(devices))
    total = math.prod(sizes.values())
    processes = len({device.process_index for device in devices})
    if processes > 1 and total < len(devices):
        raise ValueError(
            f"mesh is {_text(sizes)}, which is {total} devices; the {processes} processes have "
            f"{len(devices)}: set one axis to -1"
        )
    if total == 1:
        return None
    shape = tuple(sizes.values())
    if config.slices > 1 and total < len(devices):
        raise ValueError(
            f"mesh is {_text(sizes)}, which is {total} devices; the {config.slices} slices have "
            f"{len(devices)}: set one axis to -1"
        )
    parts = _slices(devices[:total], config.slices)
    ordered = np.concatenate(
        [_ordered((shape[0] // len(parts), *shape[1:]), part) for part in parts]
    )
    auto = (AxisType.Auto,) * len(AXES)
    mesh = Mesh(ordered, AXES, axis_types=auto)
    if not _rows_are_whole(mesh):  # the order with the best links splits rows among processes
        parts = [
            sorted(part, key=lambda device: (device.process_index, device.id)) for part in parts
        ]
        mesh = Mesh(np.array(parts).reshape(shape), AXES, axis_types=auto)
    if not _rows_are_whole(mesh):
        raise ValueError(
            f"mesh is {_text(sizes)}: sequence x tensor = {shape[2] * shape[3]} devices share a "
            f"row, and a process has {len(devices) // processes}: make them smaller, so that no "
            "row is split among processes"
        )
    return mesh


def split_rollout(config: MeshConfig, devices: Sequence) -> tuple[list, list]:
    """The devices that train, and the `rollout` ones, which are all those of the last processes.
    Raises ValueError where these are not whole processes, or would be all."""
    ordered = sorted(devices, key=_place)
    train, rollout = ordered[: -config.rollout], ordered[-config.rollout :]
    processes = sorted({device.process_index for device in devices})
    each = len(devices) // len(processes)
    if not train or {d.process_index for d in train} & {d.process_index for d in rollout}:
        raise ValueError(
            f"mesh.rollout is {config.rollout}, and there are {len(processes)} processes of {each} "
            f"devices: needed is a multiple of {each} below {len(devices)}, so that every process "
            "either trains or rolls out"
        )
    return train, rollout


def rollout_mesh(config: MeshConfig) -> Mesh | None:
    """The decoding replicas on the devices for rollouts, as a training mesh has them; None for a
    single device."""
    _, devices = split_rollout(config, jax.devices())
    return make_mesh(MeshConfig(data=-1, tensor=config.tensor), devices)


def sides(config: MeshConfig) -> tuple[Mesh, Mesh]:
    """(data, tensor) over the devices that train, and over those for rollouts."""
    parts = split_rollout(config, jax.devices())
    meshes = make_mesh(config), rollout_mesh(config)
    train, rollout = (
        decode_mesh(mesh) if mesh else _decoding(np.array(part[:1]))
        for mesh, part in zip(meshes, parts, strict=True)
    )
    return train, rollout


def _slices(devices: list, number: int) -> list[list]:
    """The devices of each slice: as the devices know it, else neighbours in the order of their
    processes."""
    if number == 1:
        return [devices]
    known = {getattr(device, "slice_index", 0) for device in devices}
    if len(known) > 1:
        if len(known) != number:
            raise ValueError(f"mesh.slices is {number}, the devices are in {len(known)} slices")
        parts = [
            [d for d in devices if d.slice_index == part]
            for part in sorted({d.slice_index for d in devices})
        ]
    else:
        devices = sorted(devices, key=_place)
        size = len(devices) // number
        parts = [devices[i : i + size] for i in range(0, len(devices), size)]
    processes = [len({device.process_index for device in part}) for part in parts]
    if len({len(part) for part in parts}) > 1 or (
        sum(processes) != len({device.process_index for device in devices}) > 1
    ):
        raise ValueError(
            f"mesh.slices is {number}, and the devices of one process would be in two of them: "
            "needed is a number of whole processes in each"
        )
    return parts


def _place(device) -> tuple[int, int]:
    return device.process_index, device.id


def _ordered(shape: tuple[int, ...], devices: list) -> np.ndarray:
    """Devices of a slice in the order that has the best links."""
    try:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    except NotImplementedError:  # no order of its own for this shape
        return np.array(devices).reshape(shape)


def batch_shards(mesh: Mesh | None) -> int:
    """Into how many parts the rows of a batch are split."""
    return math.prod(mesh.shape[axis] for axis in BATCH) if mesh else 1


def activations(mesh: Mesh) -> P:
    """How [B, T, ...] arrays are split over a training mesh."""
    return P(BATCH, "sequence")


def decode_mesh(mesh: Mesh) -> Mesh:
    """The devices of a training mesh as (data, tensor): replicas that decode on their own."""
    return _decoding(mesh.devices)


def local_decode_mesh(mesh: Mesh | None, process: int | None = None) -> Mesh | None:
    """The part of `decode_mesh` that is a process's, this one's by default; None without a mesh."""
    if mesh is None:
        return None
    process = jax.process_index() if process is None else process
    flat = mesh.devices.reshape(-1, mesh.shape["tensor"])
    here = [row for row in flat if row[0].process_index == process]
    return _decoding(np.array(here))


def describe(mesh: Mesh | None) -> str:
    """What a run tells of its devices."""
    device = jax.devices()[0]
    if mesh is None:
        return f"1 of {jax.device_count()} {device.platform} devices ({device.device_kind})"
    return (
        f"{mesh.size} of {jax.device_count()} {device.platform} devices ({device.device_kind}), "
        f"{jax.process_count()} processes, mesh {_text(mesh.shape)}"
    )


def _decoding(devices: np.ndarray) -> Mesh:
    shape = (-1, devices.shape[-1])
    return Mesh(devices.reshape(shape), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)


def _rows_are_whole(mesh: Mesh) -> bool:
    """Whether the devices that share a batch row, and those of a replica, are of one process."""
    rows = mesh.devices.reshape(-1, mesh.shape["sequence"] * mesh.shape["tensor"])
    return all(len({device.process_index for device in row}) == 1 for row in rows)


def _text(sizes) -> str:
    return ",".join(f"{axis}={size}" for axis, size in sizes.items())
