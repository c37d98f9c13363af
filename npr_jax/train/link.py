"""What the two sides of a run (sides.py) tell each other, and when they meet.

A side that is ready for a meeting says so, by a name in the key-value store of the coordinator, and
neither begins to wait in a collective before the other is ready too; so each can see there that the
other has ended, and why. Whether a meeting takes place that one of them is already leaving is what
the first process says that knows: all others do the same, and none waits in a collective alone.
"""

import contextlib
import itertools
import json
import math
import re
import threading
import time
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import jax
from orbax.checkpoint import multihost

from npr_jax.base.distributed import exchange, gather, group, group_rank, is_main
from npr_jax.base.files import json_text
from npr_jax.base.mesh import MeshConfig, split_rollout
from npr_jax.base.parts import part
from npr_jax.runs import sigterm

Side = Literal["train", "rollout"]
SILENCE = 15.0  # seconds without a word, shorter than JAX's own patience (HEARTBEAT_SECONDS)
PATIENCE = 30.0  # seconds in which a side that has failed waits for the other to end in order
_DOES = {"train": "trains", "rollout": "rolls out"}
_LAST_WORDS = 2.0  # seconds that a process takes to end once it has heard
_TICK = 1000  # milliseconds between two looks at whether a side has ended
_numbers = itertools.count()  # of the runs of this process, the same in all processes


class Stop(NamedTuple):
    """Why a side ends: it is at its end, was asked to by a signal, or has failed (`text`)."""

    why: Literal["end", "signal", "failed"]
    text: str = ""


class Ended(Exception):
    """The run has come to its end; there is nothing more to roll out."""


class SideFailed(OSError):
    """Names the side that failed, and says how."""


class _Alive:
    """Which processes give signs of life, from here on; `beats` has the last one of each."""

    def __init__(self, beats: Callable[[], dict[int, str]]):
        self._beats, self._heard = beats, dict[int, tuple[str, float]]()

    def silent(self) -> list[int]:
        """Those that have given none for `SILENCE` seconds."""
        now = time.monotonic()
        for process, beat in self._beats().items():
            if process not in self._heard or self._heard[process][0] != beat:
                self._heard[process] = beat, now
        return [process for process, (_, when) in self._heard.items() if now - when > SILENCE]


class Link:
    """What this process of one side hears of the other, beside arrays.

    Attributes:
      side: of this process.
      stop: why one of the sides ends, once one does.
    """

    def __init__(self, config: MeshConfig):
        train, rollout = split_rollout(config, jax.devices())
        devices: dict[Side, list] = {"train": train, "rollout": rollout}
        self._processes = {
            side: sorted({device.process_index for device in part})
            for side, part in devices.items()
        }
        here = jax.process_index()
        self.side: Side = "train" if here in self._processes["train"] else "rollout"
        self.other: Side = "rollout" if self.side == "train" else "train"
        self.processes = self._processes[self.side]
        self.stop: Stop | None = None
        self._prefix = f"npr_jax/sides/{next(_numbers)}"
        self._client = multihost.get_jax_distributed_client()
        self._closed = threading.Event()
        self._listener = threading.Thread(target=self._listen, daemon=True)

    def __enter__(self) -> "Link":
        self._listener.start()
        return self

    def __exit__(self, *exc_info) -> None:
        self._closed.set()
        self._listener.join()

    def ready(self, name: str) -> None:
        """Tells the other side that this one is ready for the meeting of that name."""
        if is_main():
            self._put(f"{name}/{self.side}", "")

    def is_ready(self, name: str) -> bool:
        """Whether the other side is; all processes of this side ask together."""
        self.give_up()
        return gather(is_main() and self._find(f"{name}/{self.other}"))[0]

    def wait_for(self, name: str) -> None:
        """Waits until the other side is ready; raises what `check` raises if one ends before, and
        SideFailed where nothing is heard of it."""
        with part("wait"):
            alive = _Alive(self._beats)
            while True:
                if self._find(f"{name}/{self.other}", _TICK):
                    if self._agree(name, "meet"):
                        return
                    while not self.has_ended():
                        time.sleep(_TICK / 1000)
                if self.has_ended():
                    if not self._agree(name, "leave"):
                        return
                    self.check()
                for process in alive.silent():
                    raise SideFailed(
                        f"process {process}, which {_DOES[self.other]}, has not been heard of for "
                        f"{SILENCE:.0f} seconds: its own output may say why"
                    )

    def _agree(self, name: str, word: Literal["meet", "leave"]) -> bool:
        """Whether that is what all do at the meeting, which the first of them to speak says. One
        that leaves has heard of a stop, so the others will."""
        key = f"{self._prefix}/{name}/what"
        try:
            self._client.key_value_set(key, word)
        except jax.errors.JaxRuntimeError as error:
            if "ALREADY_EXISTS" not in str(error):
                raise
            return self._client.key_value_try_get(key) == word
        return True

    def meet(self, name: str) -> None:
        """Both sides are ready when this returns."""
        self.ready(name)
        self.wait_for(name)

    def swap(self, value):
        """What the first process of the other side tells, to which the first of this one tells
        `value`. Both sides make the call together, after a meeting."""
        with self.together():
            return gather(value)[self._processes[self.other][0]]

    def deliver(self, value) -> list:
        """Brings what each process that rolls out has to one that trains; what this one gets. Both
        sides make the call together, after a meeting."""
        training = self._processes["train"]
        out: list = [None] * jax.process_count()
        if self.side == "rollout":
            out[training[group_rank() % len(training)]] = value
        with self.together():
            return [x for x in exchange(out) if x is not None]

    @contextlib.contextmanager
    def together(self, name: str = "wait") -> Iterator[None]:
        """In here both sides work as one, in the part of that name. Raises SideFailed where the
        connection breaks."""
        with group(None), part(name):
            try:
                yield
            except (jax.errors.JaxRuntimeError, ValueError) as error:  # Gloo's is the latter
                if not re.search("Gloo|[Cc]onnection|UNAVAILABLE", str(error)):
                    raise
                said = str(error).partition("\n")[0]
                raise SideFailed(
                    f"the connection to the side that {_DOES[self.other]} is broken, whose own "
                    f"output may say why: {said}"
                ) from None

    def has_ended(self) -> bool:
        """Whether this process has heard that a side ends."""
        return self.stop is not None

    def give_up(self) -> None:
        """Raises what `check` raises where any process of this side has heard that a side ends; all
        of them make the call together."""
        if any(gather(self.has_ended())):
            while not self.has_ended():
                time.sleep(_TICK / 1000)
            self.check()

    def check(self) -> None:
        """Raises where a side has ended: SideFailed, Preempted, or Ended."""
        match self.stop:
            case Stop("failed", text):
                raise SideFailed(text)
            case Stop("signal"):
                raise sigterm.Preempted
            case Stop("end"):
                raise Ended

    def end(self, why: Literal["end", "signal", "failed"], text: str = "") -> None:
        """Tells all processes why this side ends; the first to say so is heard."""
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # one was before
            self._client.key_value_set(f"{self._prefix}/stop", json_text([why, text]))

    def part_ways(self, failed: bool) -> None:
        """Before this process ends without having come to its end: one that rolls out goes when
        those that train have saved what they have, one that has `failed` when the others have heard
        of it, and the first process last, for the others need it to end in order."""
        here = jax.process_index()
        self._put(f"gone/{here}", "")
        until = time.monotonic() + PATIENCE if failed or here == 0 else math.inf
        others = [p for side in self._processes.values() for p in side if p != here]
        if not failed and here != 0:
            others = self._processes["train"] if self.side == "rollout" else []
        alive = _Alive(self._beats)
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # the first process may be gone
            for other in others:
                while not self._find(f"gone/{other}", _TICK) and time.monotonic() < until:
                    if other in alive.silent():
                        break
            if here == 0:
                time.sleep(_LAST_WORDS)

    def _beats(self) -> dict[int, str]:
        """The last sign of life of each process of the other side."""
        found = dict(self._client.key_value_dir_get(f"{self._prefix}/beat/"))
        known = {int(key.rsplit("/", 1)[-1]): value for key, value in found.items()}
        return {p: known.get(p, "") for p in self._processes[self.other]}

    def _put(self, key: str, value: str) -> None:
        self._client.key_value_set(f"{self._prefix}/{key}", value, allow_overwrite=True)

    def _find(self, key: str, wait: int = 0) -> bool:
        """Whether a key is there, or comes within `wait` milliseconds."""
        try:
            if wait:
                self._client.blocking_key_value_get(f"{self._prefix}/{key}", wait)
            else:
                self._client.key_value_try_get(f"{self._prefix}/{key}")
        except jax.errors.JaxRuntimeError as error:
            if "NOT_FOUND" in str(error) or "DEADLINE_EXCEEDED" in str(error):
                return False
            raise
        return True

    def _listen(self) -> None:
        """Gives signs of life, and hears of a stop, after which others still wait for this one."""
        told, beats = False, itertools.count()
        while not self._closed.is_set():
            try:
                self._put(f"beat/{jax.process_index()}", str(next(beats)))
                if self.stop:
                    self._closed.wait(_TICK / 1000)
                    continue
                found = self._client.blocking_key_value_get(f"{self._prefix}/stop", _TICK)
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    return  # without a coordinator JAX ends the process
                if sigterm.seen() and not told:
                    told = True
                    self.end("signal")
                continue
            self.stop = Stop(*json.loads(found))
            if self.stop.why == "signal":
                sigterm.request()


@contextlib.contextmanager
def linked(config: MeshConfig) -> Iterator[Link]:
    """The link of this process to the other side; in here it works with its own side alone. An
    error that is raised in here ends both sides, and is told by both."""
    with Link(config) as link, group(link.processes):
        try:
            yield link
        except sigterm.Preempted:
            link.end("signal")
            link.part_ways(failed=False)
            raise
        except SideFailed:
            link.part_ways(failed=False)
            raise
        except BaseException as error:
            if link.stop and link.stop.why == "failed":  # which broke the connection
                link.part_ways(failed=False)
                raise SideFailed(link.stop.text) from None
            said = f"{type(error).__name__}: {error}".partition("\n")[0]
            who = f"process {jax.process_index()}, which {_DOES[link.side]}, has failed"
            link.end("failed", f"{who}: {said}")
            link.part_ways(failed=True)
            raise
        if link.side == "train":
            link.end("end")
