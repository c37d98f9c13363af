"""Figures of an engine: where the host's time goes, who holds what, what was compiled."""

import contextlib
import time
from collections import abc

from npr_jax.base.compile_cache import compilations
from npr_jax.decode.runner import PendingStep
from npr_jax.decode.scheduler import Scheduler


class Clock:
    """Adds up the time of visits, and that in which the device may have had nothing to do; the
    engine says what happens when."""

    def __init__(self):
        self.visits = self.seconds = self.waited = self.idle = 0
        self._compiled = compilations().compiled
        self._begun = self._wait_begun = self._busy = 0.0

    def begin(self, pending: PendingStep | None) -> None:
        """A visit begins."""
        now = time.perf_counter()
        if not pending or self._begun == 0.0:
            self._busy = now
        self._begun = now
        self.look(pending)

    def look(self, pending: PendingStep | None) -> None:
        """Notes whether the device is still busy with this step."""
        if pending and not pending.is_ready():
            self._busy = time.perf_counter()

    def asked(self, pending: PendingStep | None) -> None:
        """New work is on its way: if the step before has finished, the device has waited."""
        now = time.perf_counter()
        if not pending or pending.is_ready():
            self.idle += now - self._busy
        self._busy = now

    def wait(self) -> None:
        """The host waits for the device."""
        self._wait_begun = time.perf_counter()

    def go_on(self) -> None:
        """The device has answered."""
        now = time.perf_counter()
        self.waited += now - self._wait_begun
        self._busy = now  # the next step was asked for before

    def end(self) -> None:
        """A visit ends."""
        self.visits += 1
        self.seconds += time.perf_counter() - self._begun

    def figures(self, counts: dict[str, int]) -> dict[str, float]:
        """The part of `Engine.stats` that says how well time and rows were used."""
        seconds = self.seconds or 1.0
        return {
            "visits": self.visits,
            "compilations": compilations().compiled - self._compiled,
            "seconds": self.seconds,
            "tokens_per_s": counts["sampled_tokens"] / seconds,
            "occupancy": counts["decode_tokens"] / max(1, counts["decode_rows"]),
            "host_us_per_visit": 1e6 * (self.seconds - self.waited) / max(1, self.visits),
            "host_share": (self.seconds - self.waited) / seconds,
            "device_wait_share": self.idle / seconds,
        }


def of_schedulers(schedulers: abc.Sequence[Scheduler]) -> dict[str, int]:
    """The part of `Engine.stats` that is about lanes and pages."""
    figures = {
        "lanes_busy": sum(len(s.bound) for s in schedulers),
        "lanes": sum(len(s.lanes) for s in schedulers),
        "evictions": sum(s.pages.evictions for s in schedulers),
    }
    for name in ("free", "cached", "held"):
        figures[f"pages_{name}"] = sum(getattr(s.pages, f"num_{name}") for s in schedulers)
    for name in ("preemptions", "cached_tokens"):
        figures[name] = sum(s.stats[name] for s in schedulers)
    return figures


@contextlib.contextmanager
def counted_compilations() -> abc.Iterator[dict[str, float]]:
    """A dict that at the end has what was `compiled` inside, read `from_cache`, and `seconds`."""
    begun, before, figures = time.perf_counter(), compilations(), {}
    yield figures
    now = compilations()
    figures["compiled"] = now.compiled - before.compiled
    figures["from_cache"] = now.from_cache - before.from_cache
    figures["seconds"] = time.perf_counter() - begun
