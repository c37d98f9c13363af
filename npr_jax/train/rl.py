"""What both reinforcement-learning stages have in common beside their policy (policy.py).

    take problems -> roll out -> groups of examples -> minibatches -> optimizer steps

A stage is its way to collect groups (rewards, advantages, filters) and its objective.
"""

import abc
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar, NamedTuple

import numpy as np
from jax.sharding import Mesh

from npr_jax.answers.check import Check, find_check
from npr_jax.base.distributed import gather_all, group_rank
from npr_jax.base.fields import Checked, Count, CountOrZero, Positive, PositiveOrZero, Seed
from npr_jax.base.mesh import MeshConfig, batch_shards
from npr_jax.base.progress import Scalar, numeric
from npr_jax.data.curriculum import CurriculumConfig, order_of
from npr_jax.data.problems import Problem
from npr_jax.decode import EngineConfig
from npr_jax.runs.profile import ProfileConfig
from npr_jax.train.batch import Batch, facts, make_batch
from npr_jax.train.carry import Carried
from npr_jax.train.deal import advice
from npr_jax.train.evaluation import EvaluateConfig
from npr_jax.train.objective import Objective
from npr_jax.train.packing import Example
from npr_jax.train.rollout import Shown
from npr_jax.train.start import parse_start
from npr_jax.train.step import TrainConfig

Groups = list[list[Example]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RLConfig(Checked, abc.ABC):
    """What Zero and PAPO have in common.

    Attributes:
      model: directory, hub id or preset to start from.
      problems: JSONL file of problems and answers, or a directory of `npr-jax data prepare`.
      checker: says which answers are right: a Python file (its path ends in .py) or a module, with
        a function check(prediction, reference); null: equality of values (docs/answers.md).
      curriculum: a schedule over the levels of the problems, or null: all of them alike.
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
      carry (tokens): by which an answer may grow on each of its paths in a batch. One that has not
        ended then goes on in the next, with its tokens and the log-probs under which they were
        drawn; its group counts as one of `prompts`, and is trained on when all of its answers have
        ended. No batch waits for the longest, whose first tokens are of older weights. 0 is off.
      minibatches (optimizer steps): per rollout batch; each one after the first is off-policy.
      max_prompt_tokens (tokens): problems with longer prompts are left out.
      max_tokens (tokens): the most that an answer may have, all its branches together.
      staleness (rollout batches): how far rollouts are ahead of training: batch n is sampled with
        the weights after step n - 1 - staleness, so that `mesh.rollout` devices can sample while
        the others train. 0: with the newest weights.
      importance_bound: where tokens are older than the weights (`staleness`), the objective "papo"
        weighs each by exp(logp - old_logp), this at most (truncated importance sampling: the bound
        keeps the variance finite, and makes what is truncated count too little); "dapo" has its
        clips.
      kl: weight in the loss of the divergence from the model that the run began with, a copy of
        which is then kept in train.compute_dtype and asked for the log-probs of all that is trained
        on (`losses.divergence`); 0 is off.
      mesh: the devices to train on; answers are decoded by replicas of mesh.tensor devices each.
      engine: what decodes the answers.
      train: what trains on them.
      evaluate: how good the weights are on other problems, or null.
      profile: steps of which a profile is written, or null.
    """

    command: ClassVar[str]
    parallel: ClassVar[bool]  # whether its answers fork

    model: str
    problems: str
    checker: str | None = None
    curriculum: CurriculumConfig | None = None
    output: str
    checkpoints: str | None = None
    start: str | None = None
    seed: Seed = 0
    steps: Count
    prompts: Count = 16
    samples: Count = 16
    oversample: PositiveOrZero = 0.0
    carry: CountOrZero = 0
    minibatches: Count = 1
    max_prompt_tokens: Count = 2048
    max_tokens: Count
    staleness: CountOrZero = 0
    importance_bound: Positive = 2.0
    kl: PositiveOrZero = 0.0
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    engine: EngineConfig = dataclasses.field(default_factory=EngineConfig)
    train: TrainConfig
    evaluate: EvaluateConfig | None = None
    profile: ProfileConfig | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.start is not None:
            parse_start(self.start)
        find_check(self.checker)
        self.engine.check_trials()
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
        if self.carry and self.oversample:
            raise ValueError(
                f"carry is {self.carry} and oversample {self.oversample}, needed is one of them at "
                "most: what is carried over is not given up"
            )
        if self.mesh.rollout and not self.staleness:
            raise ValueError(
                f"mesh.rollout is {self.mesh.rollout} and staleness 0: each side would wait while "
                "the other works; set staleness to 1 or more, or mesh.rollout to 0"
            )
        if self.evaluate and self.evaluate.every % self.train.checkpoint_every:
            raise ValueError(
                f"evaluate.every is {self.evaluate.every}, needed is a multiple of "
                f"train.checkpoint_every={self.train.checkpoint_every}: what is evaluated is saved"
            )

    @property
    @abc.abstractmethod
    def depth(self) -> int:
        """Hidden intervals per token of a row."""

    @property
    @abc.abstractmethod
    def loss(self) -> Objective:
        """What a train step minimises."""

    @property
    def check(self) -> Check:
        """What says which answers are right."""
        return find_check(self.checker)

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
    """Prompts and reference answers in an endless order, shuffled or by a curriculum; its state is
    `position`, and what the last batch has `carried` over."""

    def __init__(
        self,
        problems: list[Problem],
        prompts: list[list[int]],
        *path: int,
        curriculum: CurriculumConfig | None = None,
    ):
        self._problems, self._prompts = problems, prompts
        self._order = order_of(problems, curriculum, *path)
        self.position, self.carried = 0, Carried()

    def prompt(self, position: int) -> list[int]:
        """The prompt that stands there."""
        return self._prompts[int(self._order[position])]

    def problem(self, position: int) -> Problem:
        """The problem that stands there."""
        return self._problems[int(self._order[position])]

    def names(self, first: int, last: int) -> dict[bytes, str]:
        """How the problems from the position `first` to `last` begin, by their prompts."""
        numbers = {int(self._order[place]) for place in range(first, last)}
        return {prompt_key(self._prompts[i]): repr(self._problems[i].problem[:40]) for i in numbers}

    def level(self, first: int, last: int) -> dict[str, float]:
        """The metric `level`, the mean over the positions from `first` to `last`; none of none."""
        found = [self.problem(place).level for place in range(first, last)]
        return {"level": sum(found) / len(found)} if found else {}

    def take(self, num: int) -> tuple[list[list[int]], list[str]]:
        """The next `num` prompts and their answers."""
        chosen = [int(self._order[self.position + i]) for i in range(num)]
        self.position += num
        return [self._prompts[i] for i in chosen], [self._problems[i].answer for i in chosen]


def prompt_key(prompt: Sequence[int] | np.ndarray) -> bytes:
    """Of a prompt's ids, to find its problem by."""
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
    process = group_rank()
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
