"""Whose directory it is: a run goes on only with the config that it was begun with.

What changes no number may change, and the number of steps; a model or a file of problems may move,
where its content is known from before (`inputs.yaml`).
"""

import contextlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import yaml

from npr_jax.base.distributed import is_main, wait
from npr_jax.base.files import alone, describe, is_url, read_text, write_atomically, writing

_log = logging.getLogger(__name__)

# Ends of dotted keys that may change. Where a run lies, what is saved of it, when it gives up:
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
# Sizes of a stage, which change how it computes and what it can hold, and its numbers by rounding
# alone, as the mesh does.
SIZES = (
    "train.micro_rows",
    "train.remat",
    *(
        f"engine.{name}"
        for name in (
            "lanes",
            "pages",
            "page_size",
            "table_pages",
            "steps",
            "header_rows",
            "header_chunk",
            "prefill_rows",
            "prefill_chunk",
            "max_stops",
            "attention",
        )
    ),
)
LENGTHS = ("steps", "epochs", "fit.steps", "fit.epochs")  # of a run: whole keys
INPUTS = ("model", "sampler_model", "problems")  # whole keys of what has a content of its own


def claim(directory: str | Path, config_text: str, free: Sequence[str] = ()) -> Path:
    """Makes the run directory with its config.yaml; a run that is there is gone on with. Of several
    processes the first does it, and the others wait. `free`: ends of more keys that may change.

    A run that is made longer goes on where it ended: its `final` becomes `final-KEY-VALUE` first.

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


@contextlib.contextmanager
def alone_in(directory: str | Path) -> Iterator[None]:
    """Keeps a second command out of a run directory, which is made where there is none. Of several
    processes of one run the first does it.

    Raises ValueError if another command is in it, OSError if it cannot be made.
    """
    if is_url(directory) or not is_main():
        yield  # `claim` refuses the URL
        return
    directory = Path(directory)
    with writing(directory, "set another output"):
        directory.mkdir(parents=True, exist_ok=True)
    with alone(directory):
        yield


def _claim(directory: Path, config_text: str, free: Sequence[str]) -> None:
    path = directory / "config.yaml"
    with writing(directory, "set another output"):
        directory.mkdir(parents=True, exist_ok=True)
        started = any(entry != path for entry in directory.iterdir())
        if path.exists() and started:  # a run that failed at once has left its config only
            old_text = read_config_text(path)
            same_config(old_text + _known_inputs(directory), config_text, directory, free)
            _lengthen(directory, _flat(yaml.safe_load(old_text)), config_text)
        write_atomically(path, config_text.encode())


def read_config_text(path: Path) -> str:
    """The text of a run's config.yaml. Raises ValueError for a file that is no mapping of keys."""
    text = read_text(path, "config.yaml of a run")
    try:
        values = yaml.safe_load(text) or {}
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no config of a run: {describe(error)}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} is no config of a run: it is {values!r:.60}, no keys with values")
    return text


def _lengthen(directory: Path, old: dict, config_text: str) -> None:
    """Where the number of steps is another: takes a final model, which is of the old one, aside."""
    new, final = _flat(yaml.safe_load(config_text)), directory / "final"
    for key in LENGTHS:
        if key not in old or old[key] == new.get(key):
            continue
        if final.exists():
            if not (new.get(key) or 0) > old[key]:
                raise ValueError(
                    f"{key} was {old[key]}, is {new.get(key)}: {final} has been trained for the "
                    f"former. Needed is {key}={old[key]} or more, or another output"
                )
            final.rename(directory / f"final-{key.split('.')[-1]}-{old[key]}")
        _log.warning(
            "%s was %s, is %s: the run goes on to there; a learning rate that depends on the "
            "number of steps follows the new one from here on",
            key,
            old[key],
            new.get(key),
        )


def claim_inputs(directory: Path, inputs: Mapping[str, str]) -> str:
    """Writes down what the inputs of a run hold, by their keys (`INPUTS`), so that they may move.

    Returns it as YAML, to be added to the text of the config. Raises ValueError naming the key if
    the run in the directory was begun with another content.
    """
    text = yaml.safe_dump({"inputs": dict(inputs)})
    if is_main():
        known = _known_inputs(directory)
        same_config(known, text, directory)
        both = (yaml.safe_load(known) or {"inputs": {}})["inputs"] | dict(inputs)
        with writing(directory):
            write_atomically(directory / "inputs.yaml", yaml.safe_dump({"inputs": both}).encode())
    wait(f"inputs of {directory}")
    return text


def _known_inputs(directory: Path) -> str:
    path = directory / "inputs.yaml"
    return path.read_text(encoding="utf-8") if path.exists() else ""


def same_config(old_text: str, new_text: str, directory: object, free: Sequence[str] = ()) -> None:
    """Raises ValueError naming the keys in which two configs differ, where that matters. Keys that
    the old one does not have came later, and are named in a warning."""
    old, new = essence(old_text, free), essence(new_text, free)
    for key in INPUTS:
        content = f"inputs.{key}"
        if content in old:  # then its place is of no matter
            old.pop(key, None), new.pop(key, None)
        if not (content in old and content in new):
            old.pop(content, None), new.pop(content, None)
    added = sorted(new.keys() - old.keys()) if old.keys() < new.keys() else []
    changed = [
        f"{key} was {json.dumps(old.get(key))}, is {json.dumps(new.get(key))}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and key not in added
    ]
    if changed:
        raise ValueError(
            f"{directory} belongs to a run of another config ({'; '.join(changed)}), and what it "
            "has done so far depends on that: go on with that config, set another output, or "
            "remove the directory"
        )
    for key in added if old else ():
        _log.warning("%s: the run was begun without %s; it is %s now", directory, key, new[key])


def essence(config_text: str, free: Sequence[str] = ()) -> dict:
    """The keys of a config, dotted, on which its numbers depend; `free` are ends of some that they
    do not depend on."""
    ends = (*_FREE, *free)
    return {
        key: value
        for key, value in _flat(yaml.safe_load(config_text) or {}).items()
        if not any(f".{key}".endswith(f".{end}") for end in ends)
        and not key.startswith("mesh.")
        and key not in LENGTHS
    }


def _flat(values: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
