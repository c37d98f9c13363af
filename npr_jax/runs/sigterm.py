"""SIGTERM, which comes before a preempted TPU or a Slurm job ends, and Ctrl-C: save and exit, to be
resumed.

    with watched():                 a stage, from its start to its end
        with interruptible(): ...   loading, sampling: the signal ends it at once, nothing is lost
        ...                         training, saving: it waits for the next look at `wanted()`

A stage that ends for it raises `Preempted`, an exit with code 143 (128 + SIGTERM), or 130 after
Ctrl-C. A second signal ends the process at once.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

from npr_jax.base.distributed import gather, group_size

SIGNALS = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}

_watching = _interruptible = False
_seen = 0  # the signal that came


class Preempted(SystemExit):
    """The process was asked to end; the same command goes on."""

    def __init__(self):
        super().__init__(128 + (_seen or signal.SIGTERM))


def wanted() -> bool:
    """Whether this process, or any other of the run, has been asked to end; all ask together."""
    return any(gather(bool(_seen)))


def seen() -> bool:
    """Whether this process has been asked to end."""
    return bool(_seen)


def request() -> None:
    """Asks this process to end, as if it had got SIGTERM, but for what may end anywhere."""
    global _seen
    _seen = _seen or signal.SIGTERM


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Catches the signals in here, also where it is within another `watched`. Works in the main
    thread; in others nothing is caught. What is ignored (Ctrl-C of a job in the background) stays
    so."""
    global _watching, _seen
    if _watching or threading.current_thread() is not threading.main_thread():
        yield
        return
    _watching, _seen = True, 0
    outer = {number: signal.getsignal(number) for number in SIGNALS}
    caught = [number for number in SIGNALS if outer[number] is not signal.SIG_IGN]
    for number in caught:
        signal.signal(number, _on_signal)
    try:
        yield
        if _seen:  # or what follows the stage would go on as if nothing had been said
            raise Preempted
    finally:
        _watching, _seen = False, 0
        for number in caught:
            signal.signal(number, outer[number])


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """A part of `watched` that may end anywhere: Preempted is raised where a signal comes. Several
    processes end where they ask `wanted` together, and nowhere else."""
    global _interruptible
    if group_size() > 1:
        yield
        return
    _interruptible = True  # before the check, or a signal between the two would be overlooked
    try:
        if _seen:
            raise Preempted
        yield
    finally:
        _interruptible = False


def _on_signal(number, frame) -> None:
    global _seen
    _seen = number
    for other in SIGNALS:
        if signal.getsignal(other) is _on_signal:
            signal.signal(other, signal.SIG_DFL)
    what = "this run saves what it has and ends; the same command goes on"
    os.write(2, f"{SIGNALS[number]}: {what}\n".encode())
    if _interruptible:
        raise Preempted
