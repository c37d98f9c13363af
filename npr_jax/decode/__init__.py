"""The engine: paged KV cache, forks and joins, continuous batching, sampling."""

from npr_jax.decode.async_engine import AsyncEngine
from npr_jax.decode.config import EngineConfig
from npr_jax.decode.engine import Engine
from npr_jax.decode.outputs import Event, Trajectory
from npr_jax.decode.sampling import SamplingParams

__all__ = ["AsyncEngine", "Engine", "EngineConfig", "Event", "SamplingParams", "Trajectory"]
