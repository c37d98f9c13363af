"""Where numbers of a run go: `metrics.jsonl` and TensorBoard for later, a progress line for now,
and Weights & Biases if the environment asks for it.

One line of `metrics.jsonl` is one flat JSON object with an integer `step`; numbers that are not
finite are null (base/files.py). A resumed run first
calls `truncate` with the checkpoint's step, so that the file reads as if nothing had happened.
"""

import json
import math
import os
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path

import yaml
from tensorboardX import SummaryWriter

from npr_jax.base.files import json_text, whole_lines, write_atomically
from npr_jax.base.progress import Scalar, numeric

WANDB = "NPR_WANDB"  # the variable that names a project of Weights & Biases to send metrics to


class MetricsWriter:
    """Appends metrics to `directory/metrics.jsonl` and to TensorBoard event files beside it.

    Each line is on disk when `write` returns, so a killed run loses at most the line being written;
    what is left of such a line is removed when the file is next opened.
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        self.path = self.directory / "metrics.jsonl"
        self.directory.mkdir(parents=True, exist_ok=True)
        self._open(purge_step=None)

    def _open(self, purge_step: int | None) -> None:
        _rewrite(self.path, purge_step)
        self._file = self.path.open("a", encoding="utf-8")
        # TensorBoard's files cannot be cut; `purge_step` tells its reader to forget what follows.
        # File names count whole seconds: without the suffix a second file could replace the first.
        # With a bounded queue `write` would wait for ever once its thread has met a full disk.
        self._board = SummaryWriter(
            str(self.directory),
            purge_step=purge_step,
            max_queue=0,
            filename_suffix=f".{time.time_ns()}",
        )

    def write(self, values: Mapping[str, Scalar]) -> None:
        """Appends one line. `values` holds an int "step"; strings go to the JSON file only.

        Raises ValueError for a missing step or a value that is not a float, int or str.
        """
        step = values.get("step")
        if type(step) is not int:
            raise ValueError(f"metrics need an int 'step', got {step!r}")
        for key, value in values.items():
            if not isinstance(value, Scalar):
                raise ValueError(
                    f"metric {key!r} is {value!r} ({type(value).__name__}), needs a Python float, "
                    "int or str; convert it with float() or .item()"
                )
        self._file.write(json_text(values) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        for key, value in values.items():
            if key != "step" and not isinstance(value, str):
                self._board.add_scalar(key, value, global_step=step)

    def truncate(self, step: int) -> None:
        """Drops every line whose step is `step` or later: those that a resumed run writes again."""
        self.close()
        self._open(purge_step=step)

    def close(self) -> None:
        """Closes both files; calling it again does nothing."""
        try:
            self._file.close()
        finally:
            self._board.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()


class WandbWriter:
    """Sends metrics to a Weights & Biases project; a resumed run goes on with the same W&B run.

    `directory/wandb.id` says which that is, and `directory/config.yaml`, if there is one, is its
    config. Where and whether it is sent is up to W&B's own variables (WANDB_MODE, WANDB_ENTITY...).
    """

    def __init__(self, directory: str | Path, project: str, name: str):
        try:
            import wandb  # pyright: ignore[reportMissingImports]  # an extra, not installed for dev
        except ImportError as error:
            raise ValueError(
                f"{WANDB}={project} asks for Weights & Biases, which is not installed: "
                "pip install 'npr-jax[wandb]', or unset the variable"
            ) from error
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        known, config = directory / "wandb.id", directory / "config.yaml"
        if not known.exists():
            write_atomically(known, uuid.uuid4().hex.encode())
        self._run = wandb.init(
            project=project,
            name=name,
            id=known.read_text(encoding="utf-8"),
            resume="allow",
            dir=str(directory),
            config=yaml.safe_load(config.read_text(encoding="utf-8")) if config.exists() else None,
        )

    def write(self, values: Mapping[str, Scalar]) -> None:
        """Sends one line; W&B leaves out steps that it has, which a resumed run writes again."""
        numbers = {k: v for k, v in values.items() if k != "step" and not isinstance(v, str)}
        self._run.log(numbers, step=values["step"])

    def close(self) -> None:
        """Ends the W&B run."""
        self._run.finish()


def is_measured(name: str) -> bool:
    """Whether a metric of a run is of clocks or of the machine, so that a run which does the same
    again, resumed or on other devices, may measure another value."""
    name = name.rpartition(".")[2]
    ends = ("seconds", "per_s", "time_share", "mfu")
    return name.endswith(ends) or name.startswith(("seconds/", "memory/", "engine/"))


def read_metrics(directory: str | Path) -> list[dict[str, Scalar]]:
    """The whole lines of `directory/metrics.jsonl`, in order; what is not finite is NaN. Raises
    ValueError with file and line for one that is no line of metrics."""
    return [values for _, values in _lines(Path(directory) / "metrics.jsonl")]


def _lines(path: Path) -> Iterator[tuple[bytes, dict[str, Scalar]]]:
    """The whole lines of a file with their values."""
    return whole_lines(path, "metrics.jsonl of a run", _values)


def _values(record: dict) -> dict[str, Scalar]:
    if type(record.get("step")) is not int:
        raise ValueError('it has no integer "step"')
    values = {k: math.nan if v is None else v for k, v in record.items()}
    if not all(isinstance(value, Scalar) for value in values.values()):
        raise ValueError("it holds more than numbers and texts")
    if any(isinstance(x, int | float) and 1e300 < abs(x) < math.inf for x in values.values()):
        raise ValueError("it holds a number beyond 1e300")
    json.dumps(values, ensure_ascii=False).encode()
    return values


def _rewrite(path: Path, step: int | None) -> None:
    """Leaves in `path` its whole lines, and of those the ones before `step` if that is given."""
    if not path.exists():
        return
    kept = b"".join(
        line for line, values in _lines(path) if step is None or numeric(values, "step") < step
    )
    if kept != path.read_bytes():
        write_atomically(path, kept)
