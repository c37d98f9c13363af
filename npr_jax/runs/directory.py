"""Whose directory it is: a run goes on only with the config that it was begun with."""

import json
from collections.abc import Sequence
from pathlib import Path

import yaml

from npr_jax.base.distributed import is_main, wait
from npr_jax.base.files import is_url, write_atomically, writing

# What may change: where a run lies, what is saved of it, when it gives up, on what devices it runs.
_FREE = (
    "output",
    "checkpoints",
    "checkpoint_every",
    "keep_checkpoints",
    "keep_best",
    "max_nonfinite",
    "gap_warn",
    "gap_stop",
)


def claim(directory: str | Path, config_text: str, free: Sequence[str] = ()) -> Path:
    """Makes the run directory with its config.yaml; a run that is there is gone on with. Of several
    processes the first does it, and the others wait. `free`: more keys that may change.

    Raises ValueError naming the keys if the directory belongs to a run of another config, OSError
    if it cannot be written. In both cases nothing has been changed.
    """
    if is_url(directory):
        raise ValueError(
            f"output is {directory}, needed is a local directory: set `checkpoints` to have the "
            "checkpoints in an object store"
        )
    directory = Path(directory)
    if is_main():
        _claim(directory, config_text, free)
    wait(f"claimed {directory}")
    return directory


def _claim(directory: Path, config_text: str, free: Sequence[str]) -> None:
    path = directory / "config.yaml"
    with writing(directory, "set another output"):
        directory.mkdir(parents=True, exist_ok=True)
        started = any(entry != path for entry in directory.iterdir())
        if path.exists() and started:  # a run that failed at once has left its config only
            same_config(path.read_text(encoding="utf-8"), config_text, directory, free)
        write_atomically(path, config_text.encode())


def same_config(old_text: str, new_text: str, directory: object, free: Sequence[str] = ()) -> None:
    """Raises ValueError naming the keys in which two configs differ, where that matters."""
    old, new = essence(old_text, free), essence(new_text, free)
    changed = [
        f"{key} was {json.dumps(old.get(key))}, is {json.dumps(new.get(key))}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]
    if changed:
        raise ValueError(
            f"{directory} belongs to a run of another config ({'; '.join(changed)}): "
            "go on with that config, set another output, or remove the directory"
        )


def essence(config_text: str, free: Sequence[str] = ()) -> dict:
    """The keys of a config, dotted, on which its numbers depend; `free` are some that they do not
    depend on."""
    values = _flat(yaml.safe_load(config_text))
    return {
        key: value
        for key, value in values.items()
        if key.split(".")[-1] not in (*_FREE, *free) and not key.startswith("mesh.")
    }


def _flat(values: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
