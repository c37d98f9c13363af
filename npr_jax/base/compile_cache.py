"""What JAX compiles, counted, and kept on disk between runs."""

from pathlib import Path
from typing import NamedTuple

import jax

from npr_jax.base.files import writing

DEFAULT_CACHE = Path("~/.cache/npr_jax/compiled")


class Compilations(NamedTuple):
    """Programs of this process so far: compiled, and read from the cache on disk."""

    compiled: int
    from_cache: int


_built = _read = 0


def _on_duration(event: str, duration_secs: float, **_: str | int) -> None:
    global _built
    if event == "/jax/core/compile/backend_compile_duration":  # of programs from the cache too
        _built += 1


def _on_event(event: str, **_: str | int) -> None:
    global _read
    if event == "/jax/compilation_cache/cache_hits":
        _read += 1


jax.monitoring.register_event_duration_secs_listener(_on_duration)
jax.monitoring.register_event_listener(_on_event)


def compilations() -> Compilations:
    """The count so far."""
    return Compilations(_built - _read, _read)


def use_cache(directory: str | Path = DEFAULT_CACHE) -> Path:
    """Keeps every compiled program in `directory` (JAX's persistent compilation cache), so that a
    later run with the same shapes, versions and devices compiles nothing."""
    path = Path(directory).expanduser()
    with writing(path, "set another compilation_cache"):
        path.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return path
