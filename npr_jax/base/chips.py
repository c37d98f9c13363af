"""What devices can do at most: the vendors' figures, or a product of matrices that is timed."""

import dataclasses
import functools
import time

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from npr_jax.base.distributed import group_size

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """A kind of chip: the slice that a host of a larger one has (TPUs), bytes of memory that a
    program may use, bf16 FLOP/s, and bytes/s of memory and of all links of a chip (the vendor's
    figures)."""

    host: str
    hbm: float
    flops: float
    hbm_rate: float
    link_rate: float


CHIPS = {
    "v5e": Chip("v5e:2x2", 15.75 * GIB, 197e12, 819e9, 200e9),
    "v5p": Chip("v5p:2x2x1", 95.74 * GIB, 459e12, 2765e9, 600e9),
    "v6e": Chip("v6e:2x2", 31.25 * GIB, 918e12, 1640e9, 448e9),
}
# Of a GPU's memory, what scripts/launch lets JAX take (XLA_PYTHON_CLIENT_MEM_FRACTION).
GPU_FRACTION = 0.92
# SXM modules; links are NVLink, in one direction.
GPUS = {
    "h100": Chip("", GPU_FRACTION * 79.65 * GIB, 989e12, 3350e9, 450e9),
    "h200": Chip("", GPU_FRACTION * 140.4 * GIB, 989e12, 4800e9, 450e9),
}

# How JAX calls TPUs (`device_kind`).
_KINDS = {"TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p", "TPU v6 lite": "v6e"}


def peak_flops(mesh: Mesh | None, dtype: str) -> float:
    """FLOP/s of all devices of a run, the mesh's or one: of a chip that is known the vendor's bf16
    figure, of others what a product of matrices of this dtype reaches.

    The devices of a process on a CPU share its cores, so there a process counts once; processes
    that share a machine are counted as if each had it alone.
    """
    device = jax.local_devices()[0]
    if chip := _KINDS.get(device.device_kind):
        return CHIPS[chip].flops * (mesh.size if mesh else 1)
    number = group_size() if device.platform == "cpu" else mesh.size if mesh else 1
    return measured_peak(dtype) * number


@functools.cache
def measured_peak(dtype: str) -> float:
    """FLOP/s that the best of five products of matrices reaches on one device; measured once."""
    size = 1024 if jax.default_backend() == "cpu" else 8192
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    x = jax.device_put(jnp.ones((size, size), dtype), here)
    product = jax.jit(jnp.matmul)
    seconds = []
    for _ in range(6):
        begun = time.perf_counter()
        jax.block_until_ready(product(x, x))
        seconds.append(time.perf_counter() - begun)
    return 2 * size**3 / min(seconds[1:])  # the first one compiles


def memory() -> dict[str, float]:
    """Bytes that this process holds and has held at most: of its fullest device (and what that one
    has), or of the process where devices do not say it (CPUs); nothing where nobody says it."""
    found = [stats for device in jax.local_devices() if (stats := device.memory_stats())]
    if found:
        names = {"bytes_in_use": "bytes", "peak_bytes_in_use": "peak", "bytes_limit": "limit"}
        return {
            f"memory/{ours}": float(max(stats[theirs] for stats in found))
            for theirs, ours in names.items()
            if all(theirs in stats for stats in found)
        }
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as file:
            lines = dict(line.split(":", 1) for line in file if ":" in line)
    except OSError:  # no Linux
        return {}
    names = {"VmRSS": "memory/bytes", "VmHWM": "memory/peak"}
    return {
        ours: 1024.0 * int(lines[theirs].split()[0])
        for theirs, ours in names.items()
        if theirs in lines
    }
