"""Two sides of a run: some processes train while others roll out, `staleness` batches ahead.

    side that trains                                  side that rolls out
    step n: train on batch n                          sample batch n + staleness
    ---------------- meeting of batch m: m and its metrics <--, weights, if the next needs newer -->

What is trained with what follows from numbers alone (sampler.py): clocks decide when the sides meet
(link.py), and nothing else.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Generic, NamedTuple

from jax.sharding import Mesh

from npr_jax.base.distributed import is_main
from npr_jax.base.mesh import local_decode_mesh, rollout_mesh, sides
from npr_jax.base.parts import part, watch
from npr_jax.base.progress import Progress
from npr_jax.data.problems import read_problems
from npr_jax.decode import Engine
from npr_jax.model import ModelConfig
from npr_jax.model.lora import joined
from npr_jax.model.pretrained import Model, load_tokenizer
from npr_jax.train.batch import bare
from npr_jax.train.handover import Handover
from npr_jax.train.inputs import problems_content
from npr_jax.train.link import Ended, Link
from npr_jax.train.optimizer import TrainState
from npr_jax.train.rl import Collected, Feed, Groups, RLConfig
from npr_jax.train.rollout import STAGES, Shown, encode_problems, given_up_when
from npr_jax.train.rollout_cache import Pending, fingerprint
from npr_jax.train.sampler import C, Collect, Queue, Sampled, Sampler
from npr_jax.tree import TagIds


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
        if problems_content(problems, prompts, bool(config.curriculum)) != start.problems:
            raise ValueError(f"{config.problems} is another file here than where the run trains")
        path = config.seed, STAGES.index(config.command)
        feed = Feed(problems, prompts, *path, curriculum=config.curriculum)
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
