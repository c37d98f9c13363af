"""Kernels of tree and paged attention, and the choice between them and plain JAX."""

import jax


def default_implementation(head_dim: int, platform: str | None = None) -> str:
    """What suits a platform, by default JAX's: its kernel where that takes such heads."""
    takes = {"gpu": head_dim in (16, 32, 64, 128, 256), "tpu": head_dim % 128 == 0}
    return "pallas" if takes.get(platform or jax.default_backend()) else "blockwise"
