"""Kernels of tree and paged attention, and the choice between them and plain JAX."""

import jax

from npr_jax.kernels.blocks import takes


def default_implementation(head_dim: int, platform: str | None = None) -> str:
    """What suits a platform, by default JAX's: its kernel where that takes such heads."""
    return "pallas" if takes(platform or jax.default_backend(), head_dim) else "blockwise"
