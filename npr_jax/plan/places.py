"""What is planned for: kinds of chips, and slices and nodes of them, which need not be there."""

import importlib.util
import math
import os
import re
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from npr_jax.base.chips import CHIPS, GPUS, Chip
from npr_jax.base.mesh import AXES, MeshConfig, local_decode_mesh, make_mesh

# Bytes/s of a chip's share of the network between slices or nodes, in one direction.
NETWORK = {"v5e": 3.1e9, "v5p": 6.25e9, "v6e": 12.5e9, "h100": 50e9, "h200": 50e9}


# What libtpu would ask a TPU's host for: where there is none it logs errors that mean nothing here.
# Slices are planned by their names, whatever these say.
_NO_HOST = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # a compiler is not in a TPU's way
}


class Place(NamedTuple):
    """Chips on which a stage is planned: the training mesh over `hosts` hosts, the decoding mesh of
    one of the `rollout_hosts`, which are the same if there is no `mesh.rollout`, bytes/s of a
    chip's links and of its share of the network. Without `compiled` there is no compiler for it,
    and the meshes have no devices."""

    kind: str
    chip: Chip
    mesh: Mesh
    local: Mesh
    hosts: int
    rollout_hosts: int
    network: float
    compiled: bool


def find_place(topology: str, config: MeshConfig) -> Place:
    """The chips that are meant by "v5p:4x4x4" (with `slices` of the mesh so many of it), by
    "h100:8", a node of 8 GPUs, or "h100:8x4", four of them.

    Raises ValueError where there is no such thing, it does not fit the mesh, or there is no TPU
    compiler.
    """
    kind = topology.partition(":")[0]
    if kind in GPUS and (match := re.fullmatch(r"\w+:(\d+)(?:x(\d+))?", topology)):
        return _gpus(kind, int(match[1]), int(match[2] or 1), config)
    if kind not in CHIPS or not re.fullmatch(r"\w+:\d+(x\d+)+", topology):
        raise ValueError(
            f"topology is {topology!r}, needed is one of {', '.join(CHIPS)} and a shape: "
            f"v5p:4x4x4; or one of {', '.join(GPUS)}, how many a node has, and nodes: h100:8x4"
        )
    devices = _slices(topology, config.slices)
    mesh = make_mesh(config, devices)
    if mesh is None:
        raise ValueError(f"{topology} has one chip, needed are several")
    local, chip = _one_host(mesh, CHIPS[kind]), CHIPS[kind]
    hosts = mesh.size // local.size
    rollout = config.rollout // local.size or hosts
    return Place(kind, chip, mesh, local, hosts, rollout, NETWORK[kind], True)


def array_bytes(tree) -> int:
    """Bytes on one device of abstract arrays with shardings."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )


def _gpus(kind: str, each: int, nodes: int, config: MeshConfig) -> Place:
    if config.rollout % each or config.rollout >= each * nodes:
        raise ValueError(
            f"mesh.rollout is {config.rollout}, needed is a multiple of {each}, which are a node, "
            f"below {each * nodes}"
        )
    rollout, nodes = config.rollout // each, nodes - config.rollout // each
    sizes = config.sizes(each * nodes)
    if math.prod(sizes.values()) != each * nodes or each * nodes < 2:
        raise ValueError(
            f"{kind}:{each}x{nodes} are {each * nodes} GPUs, and the mesh takes "
            f"{math.prod(sizes.values())}: set one axis to -1"
        )
    row = sizes["sequence"] * sizes["tensor"]
    if each % row:
        raise ValueError(
            f"mesh.sequence x mesh.tensor = {row} GPUs share a row, and a node has {each}: needed "
            "is a divisor of that"
        )
    tensor = sizes["tensor"]
    mesh = AbstractMesh(tuple(sizes[axis] for axis in AXES), AXES)
    local = AbstractMesh((each // tensor, tensor), ("data", "tensor"))
    abstract: Any = mesh  # in the place of a mesh with devices
    own: Any = local
    return Place(kind, GPUS[kind], abstract, own, nodes, rollout or nodes, NETWORK[kind], False)


def _slices(topology: str, number: int) -> list:
    """The devices of slices, which need not exist."""
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(
            "planning needs the TPU compiler (Linux on x86): pip install libtpu, or make libtpu "
            "and PYTHONPATH=build/libtpu"
        )
    for name, value in _NO_HOST.items():
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    several = {"num_slices": number} if number > 1 else {}
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology, **several)
    except Exception as error:  # the compiler's own, of several kinds
        raise ValueError(f"topology {topology!r}: the TPU compiler says {error}") from error
    return list(found.devices)


def _one_host(mesh: Mesh, chip: Chip) -> Mesh:
    """The decoding mesh of one host, as a slice of its own: compilers number chips by slices."""
    from jax.experimental import topologies

    local = local_decode_mesh(mesh, mesh.devices.flat[0].process_index)
    assert local is not None  # a mesh has one
    alone = topologies.get_topology_desc(platform="tpu", topology_name=chip.host).devices
    if len(alone) != local.size:
        return local
    return Mesh(np.array(alone).reshape(local.devices.shape), local.axis_names, local.axis_types)
