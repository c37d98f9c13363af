"""Two sides of a run: some processes train while others roll out, `staleness` batches ahead.

    side that trains                                  side that rolls out
    step n: train on batch n                          sample batch n + staleness
    ---------------- meeting of batch m: m and its metrics <--, weights, if the next needs newer -->

A side that is ready for a meeting says so, by a name in the key-value store of the coordinator, and
neither begins to wait in a collective before the other is ready too; so each can see there that the
other has ended, and why. What is trained with what follows from numbers alone (sampler.py): clocks
decide when the sides meet, and nothing else.
"""

import contextlib
import dataclasses
import itertools
import json
import math
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Generic, Literal, NamedTuple

import jax
from jax.sharding import Mesh
from orbax.checkpoint import multihost

from npr_jax.base.distributed import exchange, gather, group, group_rank, is_main
from npr_jax.base.files import json_text
from npr_jax.base.mesh import (
    MeshConfig,
    local_decode_mesh,
    rollout_mesh,
    sides,
    split_rollout,
)
from npr_jax.base.parts import part, watch
from npr_jax.base.progress import Progress
from npr_jax.data.problems import read_problems
from npr_jax.decode import Engine
from npr_jax.model import ModelConfig
from npr_jax.model.lora import joined
from npr_jax.model.pretrained import Model, load_tokenizer
from npr_jax.runs import sigterm
from npr_jax.train.batch import bare
from npr_jax.train.handover import Handover
from npr_jax.train.inputs import problems_content
from npr_jax.train.optimizer import TrainState
from npr_jax.train.rl import Collected, Feed, Groups, RLConfig
from npr_jax.train.rollout import STAGES, Shown, encode_problems, given_up_when
from npr_jax.train.rollout_cache import Pending, fingerprint
from npr_jax.train.sampler import C, Collect, Queue, Sampled, Sampler
from npr_jax.tree import TagIds

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
        """Waits until the other side is ready; raises what `check` raises if it ends, and
        SideFailed where nothing is heard of it."""
        with part("wait"):
            alive = _Alive(self._beats)
            while not self._find(f"{name}/{self.other}", _TICK):
                self.check()
                for process in alive.silent():
                    raise SideFailed(
                        f"process {process}, which {_DOES[self.other]}, has not been heard of for "
                        f"{SILENCE:.0f} seconds: its own output may say why"
                    )

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
        told, beats = False, itertools.count()
        while not self._closed.is_set():
            try:
                self._put(f"beat/{jax.process_index()}", str(next(beats)))
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
            return


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


class Start(NamedTuple):
    """What the side that trains begins with, for the other one: the model's config, the step that
    the run goes on from and its position, the config with what the inputs hold, the problems, and
    the fingerprint of the weights."""

    model: ModelConfig
    step: int
    position: Mapping[str, Any]
    config_text: str
    problems: str
    weights: int


class Given(NamedTuple):
    """A batch, but for its groups, which each process that trains gets its part of."""

    number: int
    batch: Sampled


class Told(NamedTuple):
    """What the side that trains tells at a meeting: the weights that it sends, if any, and the last
    step whose checkpoint is whole."""

    version: int | None
    weights: int
    good: int


class Ahead(Generic[C]):
    """On the side that trains: the batches that the other side samples.

    Args:
      model, problems: of `Start`; `config_text` too.
      base: of a model with adapters, which is sent with the first of them.
      good: the last step whose checkpoint is whole.
    """

    def __init__(
        self,
        link: Link,
        config: C,
        model: ModelConfig,
        base: dict | None,
        config_text: str,
        problems: str,
        good: Callable[[], int],
    ):
        self.queue = Queue()
        self._link, self._config, self._base = link, config, base
        self._first, self._handover = handovers_of(config, model)
        self._told, self._good = (model, config_text, problems), good
        self._begun: int | None = None  # the step that the run goes on from
        self._sent = 0  # version of the weights that the other side has
        self._packed: dict[int, tuple[dict, int]] = {}  # those to be sent, with their fingerprints
        self._coming: list[int] = []  # numbers of the batches to come

    def take(self, state: TrainState, number: int) -> Sampled:
        """The batch of that number."""
        if self._begun is None:
            self._begin(state, number - 1)
        self._hold(state, number - 1)
        while self._coming and self._can_meet():
            if number in self.queue.ready and not self._link.is_ready(_name(self._coming[0])):
                break
            self._meet()
        return self.queue.ready[number]

    def settle(self, state: TrainState, number: int, ending: bool) -> bool:
        """Waits until those batches are here that weights before those of step `number` sample,
        which nobody has when the run goes on from there; in a run that is `ending` it does not wait
        and tells whether they are here."""
        last = min(number + self._config.staleness, self._config.steps)
        if not ending:
            self._hold(state, number)
            while self._coming and self._coming[0] <= last:
                self._meet()
        return not self._coming or self._coming[0] > last

    def _begin(self, state: TrainState, step: int) -> None:
        model, text, problems = self._told
        weights = fingerprint(state.params)
        start = Start(model, step, self.queue.position(), text, problems, weights)
        self._link.meet("start")
        self._link.swap(start)
        self._link.meet("found")
        for given in self._link.swap(None):
            self._receive(given)
        self.queue.known = {}
        with self._link.together("hand_over"):
            self._first.send(self._first.pack(joined(self._base, state.params)))
        self._begun = self._sent = step
        numbers = range(step + 1, self._config.steps + 1)
        self._coming = [number for number in numbers if number not in self.queue.ready]

    def _hold(self, state: TrainState, version: int) -> None:
        """Packs the weights after that many steps, which wait until they are sent."""
        wanted = version + 1 + self._config.staleness <= self._config.steps
        if wanted and version > self._sent and version not in self._packed:
            with part("hand_over"):
                packed = self._handover.pack(state.params)
                self._packed[version] = packed, fingerprint(state.params)

    def _next(self) -> int | None:
        """The version that is sent when the first of the batches to come is met."""
        assert self._begun is not None
        if len(self._coming) < 2:
            return None
        version = needed_version(self._coming[1], self._config.staleness, self._begun)
        return version if version > self._sent else None

    def _can_meet(self) -> bool:
        version = self._next()
        return version is None or version in self._packed

    def _meet(self) -> None:
        self._link.meet(_name(self._coming[0]))
        told = Told((version := self._next()), 0, self._good())
        if version is not None:
            packed, weights = self._packed.pop(version)
            told = told._replace(weights=weights)
        self._receive(self._link.swap(told))
        if version is not None:
            with self._link.together("hand_over"):
                self._handover.send(packed)
            self._sent = version
        self._coming.pop(0)

    def _receive(self, given: Given) -> None:
        parts = self._link.deliver(None)
        groups = [group for groups, _ in parts for group in groups]
        places = [place for _, places in parts for place in places]
        collected = given.batch.collected._replace(groups=groups, places=places)
        self.queue.put(given.number, dataclasses.replace(given.batch, collected=collected))


def needed_version(number: int, staleness: int, begun: int) -> int:
    """After how many steps the weights are that sample that batch, of a run that goes on from step
    `begun`."""
    return max(begun, number - 1 - staleness)


def handovers_of(
    config: RLConfig, model: ModelConfig, local: Mesh | None = None
) -> tuple[Handover, Handover]:
    """Between the two sides of a run, the first one and those after it, for which adapters go
    alone; `local` as for `Handover`."""
    arguments = model, config.train.compute_dtype, *sides(config.mesh), local
    first = Handover(*arguments)
    return first, Handover(*arguments, alone=True) if model.lora else first


def roll_out_side(config: C, collect: Collect[C], link: Link) -> Path:
    """Samples batches for the side that trains until that is at its end; returns the directory of
    its model."""
    directory, final = Path(config.output), Path(config.output) / "final"
    pending: Pending | None = None
    try:
        tokenizer = load_tokenizer(config.model)
        problems, prompts = encode_problems(
            tokenizer, read_problems(config.problems), config.max_prompt_tokens
        )
        link.meet("start")
        start: Start = link.swap(None)
        if problems_content(problems, prompts) != start.problems:
            raise ValueError(f"{config.problems} is another file here than where the run trains")
        feed = Feed(problems, prompts, config.seed, STAGES.index(config.command))
        place = config.checkpoints or directory / "checkpoints"
        pending = Pending(f"{place}/rollouts", start.config_text)
        sampler = Sampler(config, collect, feed, pending, directory, link.give_up)
        local = local_decode_mesh(rollout_mesh(config.mesh))
        (whole, handover), queue = handovers_of(config, start.model, local), Queue()
        queue.move(start.position)
        again = queue.bring_back(sampler)
        link.meet("found")
        ready = sorted(queue.ready.items())
        link.swap([_given(number, found) for number, found in ready])
        for _, found in ready:
            link.deliver(_carried(found))
        with link.together("hand_over"):
            params = whole.receive()
        model = Model(start.model, params, tokenizer, TagIds.from_tokenizer(tokenizer))
        engine = Engine(model, config.engine, local)
        version, weights, last = start.step, start.weights, queue.last
        with _telling(config.command, config.steps, start.step + len(queue.ready)) as progress:
            for number in range(start.step + 1, config.steps + 1):
                if number in queue.ready:
                    continue
                first = again.get(number, last)
                found = sampler.find(number, weights, first)
                if found is None:
                    with given_up_when(link.has_ended):
                        found = sampler.sample(engine, number, version, weights, first)
                last = max(last, found.last)
                link.meet(_name(number))
                told: Told = link.swap(_given(number, found))
                link.deliver(_carried(found))
                if told.version is not None:
                    with link.together("hand_over"):
                        params = handover.receive()
                    engine.set_params(params)
                    version, weights = told.version, told.weights
                pending.drop(told.good)
                if progress:
                    progress.advance(1, {"tokens_per_s": found.tokens / max(found.seconds, 1e-9)})
        while True:
            link.wait_for("the end")  # of which it hears by `Ended`
    except Ended:
        if pending:
            pending.drop(config.steps)
        return final


@contextlib.contextmanager
def _telling(name: str, total: int, done: int) -> Iterator[Progress | None]:
    """The progress line of the first process of this side."""
    if not is_main():
        yield None
        return
    with Progress(name, total, "rollout", done) as progress, watch(progress.inside):
        yield progress


def _name(number: int) -> str:
    return f"batch-{number}"


def _given(number: int, found: Sampled) -> Given:
    collected = Collected([], [], found.collected.metrics, Shown(answers={}))
    return Given(number, dataclasses.replace(found, collected=collected))


def _carried(found: Sampled) -> tuple[Groups, list[int]]:
    groups = [[bare(example) for example in group] for group in found.collected.groups]
    return groups, found.collected.places
