"""SIGTERM, which comes before a preempted TPU or a Slurm job ends: save and exit, to be resumed.

    with watched():                 a stage, from its start to its end
        with interruptible(): ...   loading, sampling: SIGTERM ends it at once, nothing is lost
        ...                         training, saving: SIGTERM waits for the next look at `wanted()`

A stage that ends for it raises `Preempted`, an exit with code 143 (128 + SIGTERM). A second SIGTERM
ends the process at once.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

import jax

from npr_jax.base.distributed import gather

EXIT_CODE = 128 + signal.SIGTERM

_watching = _interruptible = _seen = False


class Preempted(SystemExit):
    """The process was asked to end; the same command goes on."""

    def __init__(self):
        super().__init__(EXIT_CODE)


def wanted() -> bool:
    """Whether this process, or any other of the run, has been asked to end; all ask together."""
    return any(gather(_seen))


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Catches SIGTERM in here, also where it is within another `watched`. Works in the main thread;
    in others nothing is caught."""
    global _watching, _seen
    if _watching or threading.current_thread() is not threading.main_thread():
        yield
        return
    _watching, _seen = True, False
    outer = signal.signal(signal.SIGTERM, _on_signal)
    try:
        yield
        if _seen:  # or what follows the stage would go on as if nothing had been said
            raise Preempted
    finally:
        _watching = _seen = False
        signal.signal(signal.SIGTERM, outer)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """A part of `watched` that may end anywhere: Preempted is raised where SIGTERM comes. Several
    processes end where they ask `wanted` together, and nowhere else."""
    global _interruptible
    if jax.process_count() > 1:
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
    _seen = True
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.write(2, b"SIGTERM: this run saves what it has and ends; the same command goes on\n")
    if _interruptible:
        raise Preempted
