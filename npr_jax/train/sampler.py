"""Rollout batches: sampled, kept on disk until they are trained on, and taken in their order.

    step n trains on batch n, which was sampled with the weights after step n - 1 - staleness

The first batches, which would need older weights than there are, have those that the run began
with. So the weights of a batch follow from its number alone, wherever and whenever it is sampled:
by the devices that train (`ByTurns`), or by others at the same time (sides.py).
"""

import dataclasses
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from npr_jax.base.distributed import gather, is_main
from npr_jax.base.parts import part
from npr_jax.decode import Engine
from npr_jax.evaluate.traces import make_trace, write_traces
from npr_jax.runs import sigterm
from npr_jax.train.carry import Carried, UnderWay
from npr_jax.train.figures import engine_counts
from npr_jax.train.optimizer import TrainState
from npr_jax.train.rl import Collected, Feed, RLConfig
from npr_jax.train.rollout_cache import Pending, fingerprint

_log = logging.getLogger(__name__)
C = TypeVar("C", bound=RLConfig)
Collect = Callable[[Engine, Feed, int, C], Collected]


@dataclasses.dataclass(frozen=True, eq=False)
class Sampled:
    """A rollout batch.

    Attributes:
      collected: what is trained on, this process's part of it.
      first, last: where its problems begin and end among all.
      version, weights: of the weights that sampled it, after how many steps, and `fingerprint`.
      under_way: groups that it leaves to the next one.
      seconds, tokens: that it took, and that were sampled in them; 0 where it was on disk.
      counts: of the engine meanwhile (`figures.engine_counts`).
    """

    collected: Collected
    first: int
    last: int
    version: int
    weights: int
    under_way: Sequence[UnderWay] = ()
    seconds: float = 0.0
    tokens: float = 0.0
    counts: Mapping[str, float] = dataclasses.field(default_factory=dict)


class Sampler(Generic[C]):
    """Samples the batches of a run, and keeps them in its `pending` files.

    Args:
      collect: (engine with the weights, feed, number of the batch, config) -> Collected.
      directory: of the run, to which the traces go.
      check: called when a batch is collected, before it is kept; may raise.
    """

    def __init__(
        self,
        config: C,
        collect: Collect[C],
        feed: Feed,
        pending: Pending,
        directory: Path,
        check: Callable[[], None] = lambda: None,
    ):
        self.config, self.collect, self.feed = config, collect, feed
        self.pending, self.directory, self.check = pending, directory, check
        self.carried = Carried()  # by the last batch

    def find(self, number: int, weights: int, first: int) -> Sampled | None:
        """The batch of that number as it is on disk, where all processes have it."""
        with sigterm.interruptible(), part("keep"):
            found = self.pending.load(number, weights)
            if not all(gather(found is not None)):
                return None
        assert found is not None  # this process is one of all
        groups, metrics, position = found
        collected = Collected(groups, position["places"], metrics)
        version = position.get("version", number - 1)
        under_way = [UnderWay(*group) for group in position.get("under_way", ())]
        self.take_up(number, weights, under_way)
        return Sampled(collected, first, position["problem"], version, weights, under_way)

    def take_up(self, number: int, weights: int, under_way: Sequence[UnderWay]) -> None:
        """The next batch goes on with what that one, which these weights sampled, has left to it:
        these groups, and their answers as they are on disk."""
        found = self.pending.load_carried(number, weights) if under_way else {}
        if found is None:
            _log.warning(
                "the answers that step %d left unfinished are not in %s, or are damaged: those of "
                "%d groups are begun anew",
                number,
                self.pending.directory,
                len(under_way),
            )
        self.carried = Carried([*under_way], found or {})

    def sample(
        self, engine: Engine, number: int, version: int, weights: int, first: int
    ) -> Sampled:
        """Samples the batch of that number, from the problem at `first` on. It is on disk from then
        on, and of one that is saved the first process writes its answers to the first problem as
        traces."""
        feed, begun = self.feed, time.perf_counter()
        before, tokens = engine_counts(engine.stats()), engine.stats()["sampled_tokens"]
        with sigterm.interruptible(), part("collect"):
            feed.position, feed.carried = first, self.carried
            collected = self.collect(engine, feed, number, self.config)
        self.check()
        self.carried = carried = feed.carried
        after = engine_counts(engine.stats())
        with part("keep"):
            self._write_traces(engine, number, first, collected)
            position = {
                "problem": feed.position,
                "places": collected.places,
                "version": version,
            }
            if carried.groups:
                position["under_way"] = [[*group] for group in carried.groups]
                self.pending.save_carried(number, weights, carried)
            self.pending.save(number, weights, collected.groups, collected.metrics, position)
        return Sampled(
            collected,
            first,
            feed.position,
            version,
            weights,
            carried.groups,
            time.perf_counter() - begun,
            engine.stats()["sampled_tokens"] - tokens,
            {name: after[name] - before[name] for name in after},
        )

    def _write_traces(self, engine: Engine, number: int, first: int, collected: Collected) -> None:
        place, answers = collected.shown
        saved = number % self.config.train.checkpoint_every == 0 or number == self.config.steps
        if is_main() and answers and saved:
            path = self.directory / f"traces/step-{number:06d}.jsonl"
            problem = self.feed.problem(first + place)
            kept = [
                make_trace(answer, engine.tokenizer, problem, id=path.stem, sample=sample)
                for sample, answer in answers.items()
            ]
            write_traces(path, kept)


Left = tuple[int, int, Sequence[UnderWay]]  # of a batch: number, weights, what it leaves


class Queue:
    """Batches that were sampled and not trained on yet, by their numbers; part of what is saved."""

    def __init__(self):
        self.ready: dict[int, Sampled] = {}
        self.last = 0  # where the problems of the last one end
        self.newest: Left = 0, 0, ()
        self.trained: Left = 0, 0, ()  # the last batch that was trained on
        self.known: dict[int, tuple[int, int, int]] = {}  # weights, first, last: those to find
        self.moved = False  # and not brought back yet

    def put(self, number: int, sampled: Sampled) -> None:
        self.ready[number] = sampled
        if number >= self.newest[0]:  # equal where it was lost and is sampled again
            self.newest = number, sampled.weights, sampled.under_way
        self.last = max(self.last, sampled.last)

    def drop(self, number: int) -> None:
        """The batch of that number was trained on."""
        if found := self.ready.pop(number, None):
            self.trained = number, found.weights, found.under_way

    def position(self) -> dict[str, Any]:
        """Where the run goes on: JSON values."""
        ready = {n: (found.weights, found.first, found.last) for n, found in self.ready.items()}
        ahead = {str(n): list(of) for n, of in sorted((self.known | ready).items())}
        found: dict[str, Any] = {"problem": self.last}
        if ahead:
            found["ahead"] = ahead
        kept = {"carried": self.newest} | ({"trained": self.trained} if ahead else {})
        for name, (number, weights, under_way) in kept.items():
            if under_way:
                found[name] = [number, weights, [[*group] for group in under_way]]
        return found

    def move(self, position: Mapping[str, Any]) -> None:
        """Goes to where `position` says."""
        self.last = position["problem"]
        self.known = {int(n): tuple(of) for n, of in position.get("ahead", {}).items()}
        self.newest, self.trained = (
            (number, weights, [UnderWay(*group) for group in under_way])
            for number, weights, under_way in (
                position.get(name, (0, 0, ())) for name in ("carried", "trained")
            )
        )
        self.moved = True

    def bring_back(self, sampler: Sampler) -> dict[int, int]:
        """Finds what was ready when the run was saved. What is not on disk any more has to be
        sampled anew: its numbers, and where its problems begin. With `carry` so has all behind it,
        which goes on with what it will leave, from where the problems end."""
        lost, left = {}, self.newest
        for number, (weights, first, _) in sorted(self.known.items()):
            if found := sampler.find(number, weights, first):
                self.put(number, found)
            else:
                lost[number] = first
                _log.warning(
                    "the rollouts of step %d are not in %s, or are damaged: they are sampled "
                    "again, with newer weights than those that sampled them first",
                    number,
                    sampler.pending.directory,
                )
                if sampler.config.carry:
                    before = self.ready.get(number - 1)
                    left = self.trained
                    if before:
                        left = number - 1, before.weights, before.under_way
                    break
        if self.moved:
            sampler.take_up(*left)
        self.known, self.moved = {}, False
        return lost


class ByTurns(Generic[C]):
    """The batches of a run whose devices sample and train by turns.

    Args:
      hand_over: makes the engine that has the weights of a state.
    """

    def __init__(self, sampler: Sampler[C], hand_over: Callable[[TrainState], Engine]):
        self.sampler, self._hand_over = sampler, hand_over
        self.queue = Queue()

    def take(self, state: TrainState, number: int) -> Sampled:
        """The batch of that number; all that these weights are to sample is sampled."""
        config, queue, sampler = self.sampler.config, self.queue, self.sampler
        again = queue.bring_back(sampler)
        last = min(number + config.staleness, config.steps)
        missing = [n for n in range(number, last + 1) if n not in queue.ready]
        if missing:
            with part("keep"):
                weights = fingerprint(state.params)
            engine: Engine | None = None
            for n in missing:
                first = again.get(n, queue.last)
                found = sampler.find(n, weights, first)
                if found is None:
                    engine = engine or self._hand_over(state)
                    found = sampler.sample(engine, n, number - 1, weights, first)
                queue.put(n, found)
        return queue.ready[number]

    def settle(self, state: TrainState, number: int, ending: bool) -> bool:
        """What is ready is on disk."""
        return True
