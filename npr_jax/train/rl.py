"""What both reinforcement-learning stages put into the loop (runs/loop.py).

    take problems -> roll out -> groups of examples -> minibatches -> optimizer steps

A stage is its way to collect groups (rewards, advantages, filters) and its objective.
"""

import abc
import dataclasses
import logging
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Generic, NamedTuple, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh

from npr_jax.base.config import dump_config
from npr_jax.base.distributed import gather, gather_all, is_main
from npr_jax.base.fields import Checked, Count, PositiveOrZero, Seed
from npr_jax.base.mesh import MeshConfig, batch_shards, local_decode_mesh, make_mesh
from npr_jax.base.progress import Scalar, numeric
from npr_jax.data.problems import Problem, read_problems, shuffled
from npr_jax.decode import Engine, EngineConfig
from npr_jax.evaluate.traces import make_trace, write_traces
from npr_jax.model.pretrained import load, publish_model
from npr_jax.runs import sigterm
from npr_jax.runs.checkpoint import Checkpoints, checkpoint_steps
from npr_jax.runs.directory import SIZES, claim, claim_inputs
from npr_jax.runs.guards import check_gap
from npr_jax.runs.loop import Body
from npr_jax.train.batch import Batch, facts, make_batch
from npr_jax.train.deal import advice
from npr_jax.train.inputs import model_content, problems_content
from npr_jax.train.optimizer import (
    TrainState,
    learning_rate,
    new_state,
    state_shardings,
    warn_untrained,
)
from npr_jax.train.packing import Example
from npr_jax.train.rollout import STAGES, Shown, encode_problems, engine_params
from npr_jax.train.rollout_cache import Pending, fingerprint
from npr_jax.train.start import find_start, parse_start
from npr_jax.train.step import Objective, TrainConfig, optimize

Groups = list[list[Example]]
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RLConfig(Checked, abc.ABC):
    """What Zero and PAPO have in common.

    Attributes:
      model: directory, hub id or preset to start from.
      problems: JSONL file of problems and answers, or a directory of `npr-jax data prepare`.
      output: run directory; the trained model goes to its `final`.
      checkpoints: where they go, a directory or URL; null: `checkpoints` in the run directory.
      start: RUN@STEP, a checkpoint of another run of the stage, with whose state and place among
        the problems this one begins; null: with `model`, at the first problem.
      seed: of the problems' order and of sampling.
      steps (rollout batches): until the end of the run.
      prompts (problems): of a rollout batch.
      samples (answers): to each problem of a batch.
      oversample: share of problems that are asked beyond those needed. Nobody waits for the groups
        whose longest answers are longest: they are given up as soon as enough others are finished.
        The bias: problems that take long answers are trained on less, all the less the larger this
        is, which favours short answers; and the metrics are of the groups that are kept. 0 is off.
      minibatches (optimizer steps): per rollout batch; each one after the first is off-policy.
      max_prompt_tokens (tokens): problems with longer prompts are left out.
      max_tokens (tokens): the most that an answer may have, all its branches together.
      mesh: the devices to train on; answers are decoded by replicas of mesh.tensor devices each.
      engine: what decodes the answers.
      train: what trains on them.
    """

    command: ClassVar[str]

    model: str
    problems: str
    output: str
    checkpoints: str | None = None
    start: str | None = None
    seed: Seed = 0
    steps: Count
    prompts: Count = 16
    samples: Count = 16
    oversample: PositiveOrZero = 0.0
    minibatches: Count = 1
    max_prompt_tokens: Count = 2048
    max_tokens: Count
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    engine: EngineConfig = dataclasses.field(default_factory=EngineConfig)
    train: TrainConfig

    def __post_init__(self):
        super().__post_init__()
        if self.start is not None:
            parse_start(self.start)
        need = self.max_prompt_tokens + self.max_tokens
        if self.train.row_len < need:
            raise ValueError(
                f"train.row_len is {self.train.row_len}, needed is max_prompt_tokens + max_tokens "
                f"= {need} or more"
            )
        if self.train.exact and not self.engine.exact:
            raise ValueError(
                "train.exact is true and engine.exact false, but exact needs both: set "
                "engine.exact to true, or train.exact to false"
            )

    @property
    @abc.abstractmethod
    def depth(self) -> int:
        """Hidden intervals per token of a row."""

    @property
    @abc.abstractmethod
    def loss(self) -> Objective:
        """What a train step minimises."""

    def asked(self, wanted: int) -> int:
        """Problems that are asked where `wanted` groups are needed."""
        return wanted + math.ceil(self.oversample * wanted)

    @property
    def rows(self) -> int:
        """Rows of an optimizer step whose answers are all as long as can be."""
        in_a_row = max(1, (self.train.row_len - self.max_prompt_tokens) // self.max_tokens)
        rows = self.prompts * math.ceil(self.samples / in_a_row)
        return math.ceil(rows / self.minibatches)

    def advice(self, shards: int) -> str:
        """What helps where a minibatch has fewer answers than the batch has parts; else ""."""
        answers = self.samples * max(1, self.prompts // self.minibatches)
        needed = math.ceil(shards / self.samples)  # problems of a minibatch
        if needed <= self.prompts:
            more = f"minibatches to {self.prompts // needed} or less"
        else:
            more = f"prompts to {needed} or more and minibatches to 1"
        return advice(answers, shards, more)


class Feed:
    """Prompts and reference answers in a shuffled, endless order; `position` is all its state."""

    def __init__(self, problems: list[Problem], prompts: list[list[int]], *path: int):
        self._problems, self._prompts = problems, prompts
        self._order = shuffled(len(problems), *path)
        self.position = 0

    def problem(self, position: int) -> Problem:
        """The problem that stands there."""
        return self._problems[int(self._order[position])]

    def names(self, first: int) -> dict[bytes, str]:
        """How the problems from the position `first` up to here begin, by their prompts."""
        numbers = {int(self._order[place]) for place in range(first, self.position)}
        return {_key(self._prompts[i]): repr(self._problems[i].problem[:40]) for i in numbers}

    def take(self, num: int) -> tuple[list[list[int]], list[str]]:
        """The next `num` prompts and their answers."""
        chosen = [int(self._order[self.position + i]) for i in range(num)]
        self.position += num
        return [self._prompts[i] for i in chosen], [self._problems[i].answer for i in chosen]


def _key(prompt: Sequence[int] | np.ndarray) -> bytes:
    return np.asarray(prompt, np.int32).tobytes()


class Collected(NamedTuple):
    """A rollout batch: this process's groups to train on (where no process has any, the step is
    skipped, and the metrics say `skipped_because`), the place of each among those of all processes,
    metrics of all of it with the `score` by which `keep_best` judges the weights that sampled it,
    and what people are shown of it.

    A group can lie on several processes in parts, which have the same place."""

    groups: Groups
    places: list[int]
    metrics: dict[str, Scalar]
    shown: Shown = Shown()


C = TypeVar("C", bound=RLConfig)


class Policy(Body[TrainState, Path], Generic[C]):
    """The body of a stage: the policy that answers, and learns from its answers.

    Args:
      config: of the stage.
      collect: (engine with the current weights, feed, step from 1, config) -> Collected.
    """

    shown = ("reward", "format_rate", "accuracy", "grad_norm")

    def __init__(self, config: C, collect: Callable[[Engine, Feed, int, C], Collected]):
        self.config, self.collect = config, collect
        self.name, self.total = config.command, config.steps
        self.every, self.max_nonfinite = config.train.checkpoint_every, config.train.max_nonfinite
        self.mesh = make_mesh(config.mesh)
        config.train.check(self.mesh)
        self.text = dump_config(config)
        self.directory = Path(config.output)
        if is_main() and (text := config.advice(batch_shards(self.mesh))):
            _log.warning("%s", text)

    def claim(self) -> Path | None:
        final = claim(self.config.output, self.text, SIZES) / "final"
        return final if gather(final.exists())[0] else None

    def begin(self) -> tuple[TrainState, Checkpoints]:
        config, train = self.config, self.config.train
        with sigterm.interruptible():
            model = load(config.model, seed=config.seed, tags=True, mesh=self.mesh)
            problems, prompts = encode_problems(
                model.tokenizer, read_problems(config.problems), config.max_prompt_tokens
            )
            shardings = self.mesh and state_shardings(model.config, train.optimizer, self.mesh)
            state = new_state(model.params, train.optimizer, shardings)
            contents = {
                "model": model_content(config.model, model),
                "problems": problems_content(problems, prompts),
            }
        place = config.checkpoints or self.directory / "checkpoints"
        start = None
        if config.start is not None and not checkpoint_steps(place):
            start = find_start(config.start, vars(config).keys(), contents["model"])
        text = self.text + claim_inputs(self.directory, contents)
        # The state has the parameters from here on, and the engine gets its own in the first step.
        self.model, self.engine = dataclasses.replace(model, params={}), None
        # Each stage has an order of its own: what the stage before has learnt teaches nothing.
        self.feed = Feed(problems, prompts, config.seed, STAGES.index(config.command))
        self.pending = Pending(f"{place}/rollouts", text)
        self.checkpoints = Checkpoints(place, text, train.keep_checkpoints, train.keep_best)
        if start:
            self.checkpoints.start = start.checkpoints, start.step
            if is_main():
                told = f"{self.name}: goes on from step {start.step} of {start.run}"
                print(told, file=sys.stderr)
        return state, self.checkpoints

    def position(self) -> dict[str, int]:
        return {"problem": self.feed.position}

    def move(self, position: Mapping[str, int]) -> None:
        self.feed.position = position["problem"]

    def step(self, state: TrainState, number: int) -> tuple[TrainState, dict[str, Scalar]]:
        """One rollout batch, and the optimizer steps on it; without groups there are none."""
        config, train = self.config, self.config.train
        self.pending.drop(self.checkpoints.good)
        begun = time.perf_counter()
        engine = self._set_params(state)
        decoded = engine.stats()["sampled_tokens"]
        first = self.feed.position
        collected = self._sample(engine, state, number)
        if sigterm.wanted():
            raise sigterm.Preempted
        sampled = time.perf_counter()
        decoded = engine.stats()["sampled_tokens"] - decoded
        self.tell_work(self._work(first, collected.groups))
        model_config = train.model(self.model.config)
        history = []
        parts = list(minibatches(collected, config.minibatches, train, config.depth, self.mesh))
        for batch in parts:
            if not batch.parts:
                continue
            total = config.steps * config.minibatches
            rate = learning_rate(train.optimizer, int(state.step), total)
            state, metrics = optimize(
                state, batch, model_config, train, config.loss, rate, self.mesh
            )
            history.append(metrics)
        trained = time.perf_counter()
        updates = merged(history, len(parts))
        return state, {
            **collected.metrics,
            **updates,
            "zero_advantage": sum(batch.left_out for batch in parts),
            "rollout_seconds": sampled - begun,
            "rollout_tokens_per_s": decoded / (sampled - begun),
            "train_seconds": trained - sampled,
            "rollout_time_share": (sampled - begun) / (trained - begun),
            "train_tokens_per_s": numeric(updates, "loss_tokens", 0) / (trained - sampled),
        }

    def check(self, number: int, metrics: Mapping[str, Scalar]) -> None:
        check_gap(number, metrics, self.config.train.gap_warn, self.config.train.gap_stop)

    def value(self, metrics: Mapping[str, Scalar]) -> float | None:
        if "score" not in metrics:  # rollouts that were kept by an older version
            return None
        return numeric(metrics, "score")

    def remedies(self, training: bool) -> str:
        config = self.config
        if training:
            return config.train.smaller(need=config.max_prompt_tokens + config.max_tokens) + (
                "; to go around these answers, begin another run with a checkpoint of this one and "
                f"another seed (--from {self.directory}@STEP --set seed={config.seed + 1})"
            )
        return config.engine.smaller()

    def finish(self, state: TrainState) -> Path:
        warn_untrained(state, self.total)
        final = self.directory / "final"
        self.pending.drop(self.total)
        publish_model(dataclasses.replace(self.model, params=state.params), final)
        return final

    def _work(self, first: int, groups: Groups) -> dict[str, list[int]]:
        """The tokens of each answer of this process, by how its problem begins."""
        names, work = self.feed.names(first), {}
        for group in groups:
            prompt = group[0].token_ids[: group[0].layout.prompt_len]
            name = names.get(_key(prompt), "another problem")  # put in by a caller's own `collect`
            work.setdefault(name, []).extend(len(example.layout) for example in group)
        return work

    def _set_params(self, state: TrainState) -> Engine:
        """The engine with the weights of the state; here nothing holds on to its copy of them."""
        dtype, mesh = self.config.train.compute_dtype, self.mesh
        params = engine_params(self.model.config, state.params, dtype, mesh)
        if self.engine is not None:
            self.engine.set_params(params)
            return self.engine
        model = dataclasses.replace(self.model, params=params)
        self.engine = Engine(model, self.config.engine, local_decode_mesh(mesh))
        return self.engine

    def _sample(self, engine: Engine, state: TrainState, number: int) -> Collected:
        """The groups of a step: pending ones, or new ones, which are pending from then on. Of new
        ones of a step that is saved, the first process writes its answers to the first problem as
        traces."""
        feed, version = self.feed, fingerprint(state.params)
        with sigterm.interruptible():
            found = self.pending.load(number, version)
            if all(gather(found is not None)):
                assert found is not None  # this process is one of all
                groups, metrics, position = found
                feed.position = position["problem"]
                return Collected(groups, position["places"], metrics)
            begun = feed.position
            collected = self.collect(engine, feed, number, self.config)
        place, answers = collected.shown
        if is_main() and answers and (number % self.every == 0 or number == self.total):
            path = self.directory / f"traces/step-{number:06d}.jsonl"
            problem = feed.problem(begun + place)
            kept = [
                make_trace(answer, engine.tokenizer, problem, id=path.stem, sample=sample)
                for sample, answer in answers.items()
            ]
            write_traces(path, kept)
        position = {"problem": feed.position, "places": collected.places}
        self.pending.save(number, version, collected.groups, collected.metrics, position)
        return collected


def minibatches(
    collected: Collected,
    most: int,
    train: TrainConfig,
    depth: int,
    mesh: Mesh | None = None,
    every: bool = False,
) -> Iterator[Batch]:
    """The batch of each optimizer step: whole groups, by their places, of which several processes
    may have parts. Examples whose advantage is 0 are counted and not computed, if not `every` one
    is to be. Without parts where that leaves none: such a step has no gradient, and would move the
    parameters by momentum and decay alone."""
    own = [
        (place, example)
        for place, group in zip(collected.places, collected.groups, strict=True)
        for example in group
    ]
    process = jax.process_index()
    known = gather_all([(facts(e, process, place), i) for i, (place, e) in enumerate(own)])
    known.sort(key=lambda entry: (entry[0].item.group, entry[0].item.process, entry[1]))
    groups = sorted({fact.item.group for fact, _ in known})
    most = min(most, len(groups))
    number_of = {group: i % most for i, group in enumerate(groups)}
    for number in range(most):
        part = [(fact, i) for fact, i in known if number_of[fact.item.group] == number]
        here = {j: own[i][1] for j, (fact, i) in enumerate(part) if fact.item.process == process}
        yield make_batch(
            [fact for fact, _ in part], here, train.shapes(mesh), batch_shards(mesh), depth, every
        )


def merged(history: Sequence[Mapping[str, float]], parts: int) -> dict[str, Scalar]:
    """Metrics of a batch of `parts` minibatches from those of its optimizer steps: their means; the
    gap to the sampler's log-probs is that of the first, whose weights are those that sampled. A
    batch without steps is skipped, and counted; so is a part of it."""
    if not history:
        reason = {"skipped_because": "within each group all rewards are equal"} if parts else {}
        return {"skipped": 1, "off_policy_steps": 0, **reason}
    found: dict[str, Scalar] = {
        key: sum(metrics[key] for metrics in history) / len(history) for key in history[0]
    }
    found |= {key: history[0][key] for key in ("logp_gap", "logp_gap_max")}
    for key in ("loss_tokens", "nonfinite", "row_tokens", "slots", "micro_batches"):
        found[key] = sum(metrics[key] for metrics in history)
    found["slot_use"] = numeric(found, "row_tokens") / numeric(found, "slots")
    found |= {"skipped": 0, "off_policy_steps": len(history) - 1}
    if len(history) < parts:
        found["minibatches_skipped"] = parts - len(history)
    return found
