"""The loop of every resumable run; a stage gives its body.

    begin -> restore -> [step -> log -> look for what must not go on -> save]* -> finish

From the command `npr-jax papo` it is five calls to the compiled train step:

    papo.run -> loop.run -> Policy.step -> optimize -> compiled_step(...)

What is random comes from the run's seed and the step's number, so a run that was cut off, or ended
by SIGTERM, ends as one that nobody has touched.
"""

import contextlib
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from npr_jax.base.distributed import is_main
from npr_jax.base.parts import part, watch
from npr_jax.base.progress import Scalar
from npr_jax.runs import sigterm
from npr_jax.runs.attempts import Attempts, Work
from npr_jax.runs.guards import NonfiniteGuard
from npr_jax.runs.log import Report, RunLog
from npr_jax.runs.profile import ProfileConfig, Profiler

State = TypeVar("State")  # what the steps change: arrays, or records
Result = TypeVar("Result")  # what is left of the run at its end


class Store(Protocol[State]):
    """Where states are kept: `Checkpoints`, or the file of records that Beta samples. It is entered
    by the loop; at its exit all that was saved is on disk."""

    last: int  # the step that was saved last, 0 if none was

    def restore(self, state: State) -> tuple[int, State, dict] | None:
        """(step, state, position) of the last state; None if there is none."""
        ...

    def save(self, step: int, state: State, position: Mapping, value: float | None = None) -> None:
        """Saves the state after `step` steps, unless it is the last one saved."""
        ...

    def __enter__(self) -> "Store": ...

    def __exit__(self, *exc_info) -> None: ...


class Body(ABC, Generic[State, Result]):
    """What a stage does in the loop.

    Attributes:
      name, unit: of the run and of its steps, in its progress line.
      shown: metrics in the progress line.
      directory: of metrics.
      total: steps; known from `begin` on.
      every: steps between saves; the last step is saved too.
      max_nonfinite: steps in a row without a finite update, after which the run stops.
      profile: steps of which a profile is written, if any.
    """

    name: str
    unit = "step"
    shown: tuple[str, ...]
    directory: Path
    total: int
    every = 1
    max_nonfinite = 1
    profile: ProfileConfig | None = None

    def claim(self) -> Result | None:
        """Takes the run's directory; the result if the run has come to its end before."""
        return None

    @abstractmethod
    def begin(self) -> tuple[State, Store[State]]:
        """Loads what the steps need: the state before the first, and where states are kept."""

    @abstractmethod
    def step(self, state: State, number: int) -> tuple[State, dict[str, Scalar]]:
        """The step of that number, counted from 1, which uses the state up; and its metrics.

        Raises Preempted only while the state given is whole: it is saved then.
        """

    @abstractmethod
    def finish(self, state: State) -> Result:
        """Makes the result of the last state, which is saved."""

    def position(self) -> dict[str, Any]:
        """Where the run goes on, beside the step: JSON values that are saved with the state."""
        return {}

    def move(self, position: Mapping[str, Any]) -> None:
        """Goes to where `position` says."""

    def settle(self, state: State, number: int, ending: bool) -> bool:
        """Before a save of the state after `number` steps: makes whole what else the run needs to
        go on from there. False where that would take too long in a run that is `ending`, which then
        goes on from the save before."""
        return True

    tell_work: Callable[[Work], None] = staticmethod(lambda work: None)
    """Set by the loop: a step that trains calls it first, with what it trains on."""

    def remedies(self, training: bool) -> str:
        """Which keys make a step need less memory: where it trains, or where it samples."""
        return "take devices with more memory"

    def value(self, metrics: Mapping[str, Scalar]) -> float | None:
        """How good the state before a step's update is, the larger, the better, as far as the step
        has measured it; None if it has not. It is kept with the state after it."""
        return None

    def is_over(self) -> bool:
        """Whether the run ends here, before its last step; asked of a state that was restored too,
        which knows it from its position."""
        return False

    def check(self, number: int, metrics: Mapping[str, Scalar]) -> None:
        """Raises FloatingPointError where the run must not go on."""


def run(body: Body[State, Result], report: Report | None = None) -> Result:
    """Runs a body to its end, or goes on with it.

    Args:
      report: called with the metrics of every step, in place of a progress line.

    Raises ValueError for a directory of another run, OSError where it cannot write or a device has
    no room for a step (`Attempts` says for which, and what would help),
    FloatingPointError after `max_nonfinite` steps, Preempted after SIGTERM or Ctrl-C.
    """
    if (result := body.claim()) is not None:
        return result
    with sigterm.watched():
        state, store = body.begin()
        with _tells_what_is_saved(body, store), store:
            start, guard, value = 0, NonfiniteGuard(body.max_nonfinite), None
            if found := store.restore(state):
                start, state, position = found
                guard.in_a_row = position.get("nonfinite_in_a_row", 0)
                body.move(position)
            if start > body.total:
                raise ValueError(
                    f"{body.directory} has done {start} {body.unit}s, and is to have "
                    f"{body.total}: needed are {start} or more, or another output"
                )
            arguments = body.name, body.directory, body.total, start, body.shown, report, body.unit
            attempts = Attempts(body.directory, body.remedies)
            body.tell_work = attempts.tell
            profiler = Profiler(body.profile, body.directory, body.name)
            with profiler, RunLog(*arguments) as log, watch(log.inside) as clock:
                for number in range(start + 1, body.total + 1):
                    if body.is_over():
                        break
                    whole = body.settle(state, number - 1, True)
                    position = _position(body, guard)
                    try:
                        with attempts.step(number), profiler.step(number):
                            state, metrics = body.step(state, number)
                    except sigterm.Preempted:
                        if whole:
                            store.save(number - 1, state, position, value)
                        raise
                    # What follows is in the seconds of the next step, before which it comes.
                    metrics |= {"step": number} | guard.count(metrics) | clock.lap()
                    with part("log"):
                        log.write(metrics)
                    guard.check(number)
                    body.check(number, metrics)
                    value, ending = body.value(metrics), sigterm.wanted()
                    last = number == body.total or body.is_over()
                    due = number % body.every == 0 or last or ending
                    if due and body.settle(state, number, ending):
                        with part("save"):
                            store.save(number, state, _position(body, guard), value)
                    if ending:
                        raise sigterm.Preempted
        return body.finish(state)


@contextlib.contextmanager
def _tells_what_is_saved(body: Body, store: Store) -> Iterator[None]:
    try:
        yield
    except sigterm.Preempted:
        if is_main():
            what = f"{store.last} of {body.total} {body.unit}s are saved"
            print(f"{body.name}: {what}; the same command goes on", file=sys.stderr)
        raise


def _position(body: Body, guard: NonfiniteGuard) -> dict[str, Any]:
    return body.position() | {"nonfinite_in_a_row": guard.in_a_row}
