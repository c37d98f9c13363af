"""Native Parallel Reasoner (arXiv 2512.07461) in pure JAX.

The names that a user needs, imported when they are first asked for:
`load`, `Model`, `Engine`, `EngineConfig`, `SamplingParams`, `Trajectory`.
"""

import importlib

_HOMES = {
    "load": "npr_jax.model.pretrained",
    "Model": "npr_jax.model.pretrained",
    "Engine": "npr_jax.decode",
    "EngineConfig": "npr_jax.decode",
    "SamplingParams": "npr_jax.decode",
    "Trajectory": "npr_jax.decode",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str):
    if name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
