"""What a run tells while it runs: metric files, and a progress line or the caller's own display."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from npr_jax.base.distributed import is_main
from npr_jax.base.files import writing
from npr_jax.base.progress import Progress, Scalar
from npr_jax.runs.metrics import WANDB, MetricsWriter, WandbWriter

Report = Callable[[Mapping[str, Scalar]], None]


class RunLog:
    """Metrics of the steps after `start`, of `total`; lines of later steps are cut off first. Of
    several processes the first tells.

    `report(metrics)`, if given, is called at every step in place of the progress line, which shows
    the metrics named in `shown`, and of a step that was skipped why. NPR_WANDB=PROJECT in the
    environment sends them to Weights & Biases too; ValueError if it is not installed.
    """

    def __init__(
        self,
        name: str,
        directory: str | Path,
        total: int,
        start: int = 0,
        shown: Sequence[str] = (),
        report: Report | None = None,
        unit: str = "step",
    ):
        self._on, self._report, self._shown = is_main(), report, shown
        self._progress = None
        if not self._on:
            return
        self._wandb = None
        if project := os.environ.get(WANDB):
            run = Path(directory).resolve()
            self._wandb = WandbWriter(run, project, f"{name} {run.parent.name}/{run.name}")
        with writing(directory):
            self._writer = MetricsWriter(directory)
            self._writer.truncate(start + 1)
        if not report:
            self._progress = Progress(name, total, unit, start)

    def write(self, metrics: Mapping[str, Scalar]) -> None:
        """Logs one step; `metrics` holds its number, counted from 1, as "step"."""
        if not self._on:
            return
        with writing(self._writer.path):
            self._writer.write(metrics)
        if self._wandb:
            self._wandb.write(metrics)
        if self._report:
            self._report(metrics)
        else:
            assert self._progress  # without `report` there is one
            values = {k: metrics[k] for k in self._shown if k in metrics}
            if reason := metrics.get("skipped_because"):
                values = {"skipped:": reason} | values
            self._progress.advance(1, values)

    def inside(self, text: str) -> None:
        """Shows in the progress line how far the step under way is."""
        if self._progress:
            self._progress.inside(text)

    def __enter__(self) -> "RunLog":
        if self._progress:
            self._progress.__enter__()
        return self

    def __exit__(self, *exc_info) -> None:
        if self._progress:
            self._progress.__exit__(*exc_info)
        if not self._on:
            return
        if self._wandb:
            self._wandb.close()
        with writing(self._writer.directory):
            self._writer.close()
