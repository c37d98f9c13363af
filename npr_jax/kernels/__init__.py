"""Kernels of tree and paged attention, and the choice between them and plain JAX."""

import jax

from npr_jax.kernels.blocks import takes


def choose_attention(named: str | None, head_dim: int, platform: str | None = None) -> str:
    """The implementation that a config names, else what suits a platform, by default JAX's: its
    kernel where that takes such heads."""
    suits = "pallas" if takes(platform or jax.default_backend(), head_dim) else "blockwise"
    return named or suits
