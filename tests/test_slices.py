"""Slices joined by a slow network: data parallel between them, every other axis within one."""

import dataclasses

import jax
import numpy as np
import pytest

from npr_jax.base.mesh import MeshConfig, make_mesh, parse_mesh


@dataclasses.dataclass(frozen=True)
class Chip:
    """What a mesh asks of a device."""

    id: int
    process_index: int
    slice_index: int | None = None
    platform: str = "gpu"
    device_kind: str = "chip"


def chips(slices, processes, each, known=True):
    """Those of slices of that many processes, told by turns, as a runtime may tell them."""
    made = [
        Chip(process * each + i, process, process // processes if known else None)
        for process in range(slices * processes)
        for i in range(each)
    ]
    return [made[i] for i in np.random.default_rng(0).permutation(len(made))]


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize(
    "text, sizes",
    [
        ("slices=2,fsdp=-1", (2, 8, 1, 1)),
        ("slices=2,data=2,fsdp=-1,tensor=2", (4, 2, 1, 2)),
        ("slices=4,tensor=4", (4, 1, 1, 4)),
        ("slices=2,data=-1,sequence=2", (8, 1, 2, 1)),
    ],
)
def test_only_data_leaves_a_slice(text, sizes, known):
    config = parse_mesh(text)
    processes = 4 // config.slices
    mesh = make_mesh(config, chips(config.slices, processes, 4, known))
    assert tuple(mesh.shape.values()) == sizes
    where = np.vectorize(lambda chip: chip.process_index // processes)(mesh.devices)
    each = sizes[0] // config.slices
    for number in range(config.slices):
        assert (where[number * each : (number + 1) * each] == number).all()


def test_one_slice_is_the_mesh_without_slices():
    for sizes in ({"data": 2, "fsdp": -1}, {"fsdp": 2, "tensor": 4}):
        assert make_mesh(MeshConfig(slices=1, **sizes)) == make_mesh(MeshConfig(**sizes))


@pytest.mark.parametrize(
    "text, devices, message",
    [
        ("slices=3,fsdp=-1", chips(2, 2, 4), "mesh.slices is 3: 16 devices do not divide"),
        ("slices=4,fsdp=-1", chips(2, 2, 4), "mesh.slices is 4, the devices are in 2 slices"),
        ("slices=8,fsdp=-1", chips(2, 2, 4, False), "of one process would be in two"),
        ("slices=2,fsdp=16", chips(2, 2, 4), "which is 16 devices; there are 8 in each of 2"),
        ("slices=2,fsdp=4", chips(2, 2, 4), "set one axis to -1"),
    ],
)
def test_slices_that_do_not_fit_are_refused(text, devices, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(parse_mesh(text), devices)


def test_host_devices_have_no_slices_of_their_own():
    mesh = make_mesh(MeshConfig(slices=2, fsdp=-1))
    ids = np.vectorize(lambda device: device.id)(mesh.devices).reshape(2, 4)
    assert [sorted(row) for row in ids] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert len(jax.devices()) == 8
