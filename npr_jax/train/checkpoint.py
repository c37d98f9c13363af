"""Checkpoints of a run: one Orbax directory per kept step, and a refusal to mix configs."""

import json
from collections.abc import Mapping
from pathlib import Path

import orbax.checkpoint as ocp
import yaml

from npr_jax.train.step import TrainState

# Neither where a run lies nor how often it is saved changes what it computes.
_FREE = ("output", "checkpoint_every", "keep_checkpoints")


def claim(directory: str | Path, config_text: str) -> Path:
    """Makes the run directory with its config.yaml; a run that is there is gone on with.

    Raises ValueError naming the keys if the directory belongs to a run of another config.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "config.yaml"
    started = any(entry != path for entry in directory.iterdir())
    if path.exists() and started:  # a run that failed at once has left its config only
        _same_config(path.read_text(encoding="utf-8"), config_text, directory)
    path.write_text(config_text, encoding="utf-8")
    return directory


class Checkpoints:
    """The checkpoints under `directory`, each of them a train state, a position and the config.

    Saving is synchronous and atomic: a killed run leaves the checkpoint before.
    """

    def __init__(self, directory: str | Path, config_text: str, keep: int):
        self.directory, self.config_text = Path(directory), config_text
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, enable_async_checkpointing=False, cleanup_tmp_directories=True
        )
        self._manager = ocp.CheckpointManager(self.directory.absolute(), options=options)

    def save(self, step: int, state: TrainState, position: Mapping) -> None:
        """Saves the state after `step` steps. `position`: JSON values, where the data goes on."""
        meta = {"config": self.config_text, "position": dict(position)}
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta)
            ),
        )

    def restore(self, state: TrainState) -> tuple[int, TrainState, dict] | None:
        """(step, state, position) of the last checkpoint; None if there is none.

        `state` gives the shapes. Raises ValueError naming the keys if the run's config was another.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        meta = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))
        _same_config(meta["meta"]["config"], self.config_text, self.directory)
        found = self._manager.restore(
            step, args=ocp.args.Composite(state=ocp.args.StandardRestore(state))
        )
        return step, found["state"], meta["meta"]["position"]

    def close(self) -> None:
        """Waits for what is being written, and lets go of the directory."""
        self._manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()


def _same_config(old_text: str, new_text: str, directory: Path) -> None:
    old, new = _flat(yaml.safe_load(old_text)), _flat(yaml.safe_load(new_text))
    changed = [
        f"{key} was {json.dumps(old.get(key))}, is {json.dumps(new.get(key))}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and key.split(".")[-1] not in _FREE
    ]
    if changed:
        raise ValueError(
            f"{directory} belongs to a run of another config ({'; '.join(changed)}): "
            "go on with that config, set another output, or remove the directory"
        )


def _flat(values: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
