"""The parts of a step: the seconds of each, how far it is, and its name in a profile.

    with watch() as clock:            the loop of a run
        with part("rollout"): ...     anywhere below
        clock.lap()                   {"seconds": 61.2, "seconds/rollout": 40.1, ...}

At every moment at most one part is charged, the innermost, so that the parts of a lap add up to it
but for what is in none. What a device computes is charged to the part in which the host waits for
it; whoever opens a part fetches in it what the part is to make.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

import jax


class Clock:
    """Charges the time of one thread to the parts that it opens; `told` gets what they tell."""

    def __init__(
        self,
        told: Callable[[str], None] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self.told, self._clock, self._thread = told, clock, threading.get_ident()
        self._open: list[tuple[str, bool]] = []
        self._seconds: dict[str, float] = {}
        self._begun = self._charged = clock()

    def open(self, name: str, whole: bool) -> None:
        """From here on time is charged to this part; not where it is in one that is `whole`."""
        self._charge()
        inside = bool(self._open) and self._open[-1][1]
        self._open.append(self._open[-1] if inside else (name, whole))

    def close(self) -> None:
        """The part that was opened last ends."""
        self._charge()
        self._open.pop()

    def lap(self) -> dict[str, float]:
        """`seconds` since the last lap, and `seconds/<part>` of each part in them."""
        self._charge()
        found = {"seconds": self._charged - self._begun}
        found |= {f"seconds/{name}": seconds for name, seconds in self._seconds.items()}
        self._begun, self._seconds = self._charged, {}
        return found

    def tell(self, text: str) -> None:
        """Passes on how far the open part is."""
        if self.told and self._open:
            self.told(f"{self._open[-1][0]}: {text}")

    def is_mine(self) -> bool:
        """Whether it is this thread whose time it charges."""
        return self._thread == threading.get_ident()

    def _charge(self) -> None:
        now = self._clock()
        if self._open:
            name = self._open[-1][0]
            self._seconds[name] = self._seconds.get(name, 0.0) + now - self._charged
        self._charged = now


_clock: Clock | None = None  # of the loop that runs


@contextlib.contextmanager
def watch(told: Callable[[str], None] | None = None) -> Iterator[Clock]:
    """A clock for the parts that are opened in here; one of outside stands by."""
    global _clock
    outer, _clock = _clock, Clock(told)
    try:
        yield _clock
    finally:
        _clock = outer


@contextlib.contextmanager
def part(name: str, whole: bool = False) -> Iterator[None]:
    """A part of what is under way, which is not charged while another is open in it; a `whole` one
    is charged with all of these."""
    clock = _clock if _clock and _clock.is_mine() else None
    with jax.profiler.TraceAnnotation(name):
        if clock:
            clock.open(name, whole)
        try:
            yield
        finally:
            if clock:
                clock.close()


def tell(text: str) -> None:
    """Says how far the open part is, where somebody watches."""
    if _clock and _clock.is_mine():
        _clock.tell(text)
