"""Traces of some steps of a run, for TensorBoard and Perfetto."""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import jax

from npr_jax.base.fields import Checked, Count
from npr_jax.base.files import writing
from npr_jax.base.parts import part


@dataclasses.dataclass(frozen=True)
class ProfileConfig(Checked):
    """Of which steps a profile is written, to `profile` in the run's directory: open that with
    TensorBoard's profiler, or its perfetto_trace.json.gz at ui.perfetto.dev.

    Attributes:
      steps: the first and the last of them, such as [3, 5]; the first steps of a run compile.
    """

    steps: tuple[Count, ...]

    def __post_init__(self):
        super().__post_init__()
        if len(self.steps) != 2 or self.steps[0] > self.steps[1]:
            raise ValueError(
                f"steps is {list(self.steps)}, needed are a first and a last one, such as [3, 5]"
            )


class Profiler:
    """Writes one profile of the steps that `config` names, each process its own; of a run that is
    resumed among them, of those that are left. Without a config it does nothing."""

    def __init__(self, config: ProfileConfig | None, directory: Path, name: str):
        self._steps, self._name, self._on = config.steps if config else None, name, False
        own = f"process-{jax.process_index()}" if jax.process_count() > 1 else ""
        self.directory = directory / "profile" / own

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around the step of that number."""
        if self._steps is None or not self._steps[0] <= number <= self._steps[1]:
            yield
            return
        if not self._on:
            self._start()
        with jax.profiler.StepTraceAnnotation(self._name, step_num=number):
            yield
        if number == self._steps[1]:
            self.stop()

    def stop(self) -> None:
        """Writes what was seen so far, if a profile is being taken."""
        if self._on:
            self._on = False
            with part("profile"), writing(self.directory):
                jax.profiler.stop_trace()

    def _start(self) -> None:
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # every call of Python would be most of the file
        with part("profile"), writing(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
            jax.profiler.start_trace(
                str(self.directory), create_perfetto_trace=True, profiler_options=options
            )
        self._on = True

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, *exc_info) -> None:
        self.stop()
