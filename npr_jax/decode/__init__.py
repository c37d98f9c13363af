"""The engine: paged KV cache, forks and joins, continuous batching, sampling."""

from npr_jax.decode.config import EngineConfig
from npr_jax.decode.engine import Engine
from npr_jax.decode.events import Event
from npr_jax.decode.sampling import SamplingParams
from npr_jax.decode.trajectory import Trajectory

__all__ = ["Engine", "EngineConfig", "Event", "SamplingParams", "Trajectory"]
