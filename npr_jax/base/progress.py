"""A progress line for work that takes long."""

import time
from collections.abc import Callable, Mapping

from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn
from rich.progress import Progress as RichProgress

Scalar = float | int | str


def numeric(metrics: Mapping[str, Scalar], name: str, default: float | None = None) -> float:
    """A metric that is no text; KeyError where it is missing and there is no default."""
    value = metrics[name] if default is None else metrics.get(name, default)
    assert not isinstance(value, str), f"{name} is {value!r}"
    return value


class Progress:
    """A progress line for a long loop: how far, how fast, how long still, the latest metrics.

        with Progress("zero", total=18, unit="step") as progress:
            for step in range(18):
                ...
                progress.advance(1, {"reward": 0.25})

    On a terminal one line is kept up to date; elsewhere a plain line is written at most every
    `interval` seconds, and one at the end. The rate is that of this process: `start` units were
    done before it (a resumed run).
    """

    def __init__(
        self,
        name: str,
        total: int,
        unit: str = "step",
        start: int = 0,
        interval: float = 10.0,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.name, self.total, self.unit, self.interval = name, total, unit, interval
        self.done = self._start = self._shown = start  # _shown: when a line was last written
        self._console, self._clock = console or Console(), clock
        self._values: dict[str, Scalar] = {}
        self._began = self._written = clock()
        self._live = None
        if self._console.is_terminal:
            self._live = RichProgress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                TaskProgressColumn(),
                TextColumn("{task.fields[status]}"),
                console=self._console,
            )
            self._task = self._live.add_task(name, total=total, completed=start, status="")

    def __enter__(self) -> "Progress":
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *exc_info) -> None:
        if self._live:
            self._live.stop()
        elif self.done > self._shown:
            self._write_line()

    def advance(self, count: int = 1, values: Mapping[str, Scalar] | None = None) -> None:
        """Counts `count` more units as done; `values` replace the metrics that are shown."""
        self.done += count
        self._values = dict(values) if values is not None else self._values
        if self._live:
            self._live.update(self._task, completed=self.done, status=self.status())
        elif self._clock() - self._written >= self.interval:
            self._write_line()

    def inside(self, text: str) -> None:
        """Shows how far the unit under way is."""
        if self._live:
            self._live.update(self._task, status=f"{self.status()}, {text}")
        elif self._clock() - self._written >= self.interval:
            self._write_line(text)

    def status(self) -> str:
        """One line: units done, rate, time left, metrics."""
        seconds, count = self._clock() - self._began, self.done - self._start
        parts = [f"{self.done}/{self.total} {self.unit}s"]
        if count > 0 and seconds > 0:
            rate = count / seconds
            shown = f"{rate:.3g} {self.unit}s/s" if rate >= 1 else f"{1 / rate:.3g} s/{self.unit}"
            parts += [shown, f"{_clock_text((self.total - self.done) / rate)} left"]
        for key, value in self._values.items():
            parts.append(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}")
        return ", ".join(parts)

    def _write_line(self, *inside: str) -> None:
        self._written, self._shown = self._clock(), self.done
        text = ", ".join([f"{self.name}: {self.status()}", *inside])
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


def _clock_text(seconds: float) -> str:
    minutes, seconds = divmod(round(max(seconds, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
