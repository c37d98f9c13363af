"""Supervised training on examples: stage Beta, and any other model that learns from traces."""

import dataclasses
import hashlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from jax.sharding import Mesh

from npr_jax.base.config import dump_config
from npr_jax.base.distributed import is_main
from npr_jax.base.fields import Checked, Count, CountOrZero, PositiveOrZero
from npr_jax.base.mesh import batch_shards
from npr_jax.base.parts import part
from npr_jax.base.progress import Scalar, numeric
from npr_jax.data.problems import shuffled
from npr_jax.model.lora import joined
from npr_jax.model.pretrained import Model
from npr_jax.runs import loop, sigterm
from npr_jax.runs.checkpoint import Checkpoints
from npr_jax.runs.directory import SIZES, claim
from npr_jax.runs.log import Report
from npr_jax.runs.loop import Body
from npr_jax.runs.profile import ProfileConfig
from npr_jax.train.batch import facts, make_batch
from npr_jax.train.deal import ALL, advice
from npr_jax.train.figures import figures, flops_of
from npr_jax.train.objective import Objective
from npr_jax.train.optimizer import TrainState, learning_rate, warn_untrained
from npr_jax.train.packing import Example
from npr_jax.train.start import Start, around
from npr_jax.train.step import TrainConfig, begin, optimize

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class FitConfig(Checked):
    """How long to train on examples, and how.

    Attributes:
      train: the rows, the optimizer and the checkpoints.
      batch (examples): per optimizer step.
      steps (optimizer steps): until the end; 0 where `epochs` says it.
      epochs (passes over the examples): until the end; 0 where `steps` says it.
      checkpoints: where they go, a directory or URL; null: `checkpoints` in the run directory.
      profile: optimizer steps of which a profile is written, or null.
    """

    train: TrainConfig
    batch: Count = 32
    steps: CountOrZero = 0
    epochs: PositiveOrZero = 0.0
    checkpoints: str | None = None
    profile: ProfileConfig | None = None

    def __post_init__(self):
        super().__post_init__()
        if (self.steps > 0) == (self.epochs > 0):
            raise ValueError(
                f"fit.steps is {self.steps} and fit.epochs {self.epochs}: set one of them above 0"
            )

    @property
    def loss(self) -> Objective:
        """What a train step minimises."""
        return Objective("sft")

    def advice(self, shards: int, key: str = "batch") -> str:
        """What helps where a step has fewer examples than the batch has parts; else ""."""
        return advice(self.batch, shards, f"{key} to {shards} or more")

    def num_steps(self, num_examples: int) -> int:
        """Optimizer steps for that many examples."""
        return self.steps or max(1, round(self.epochs * num_examples / self.batch))


def fit(
    model: Model,
    examples: Sequence[Example],
    config: FitConfig,
    directory: str | Path,
    seed: int = 0,
    name: str = "fit",
    report: Report | None = None,
    mesh: Mesh | None = None,
    depth: int | None = None,
) -> Model:
    """Trains a copy of the model on examples (log-likelihood of their loss tokens).

    On a mesh the model has been loaded onto it. Several processes have the same examples, and each
    lays out the rows that are dealt to it. `depth`: hidden intervals per token of a row; None is
    what the examples need.

    Metrics and checkpoints go to `directory`; the same call again goes on where it stopped.
    Returns the trained model, float32; with `train.lora` the model in train.compute_dtype, with its
    adapters in float32 (`Model.merged` adds them). Raises ValueError without examples, for an
    example that is longer than a row, and for a directory of another run; OSError where it cannot
    write; FloatingPointError after `max_nonfinite` steps; Preempted after SIGTERM.
    """
    body = Fit(lambda: model, examples, config, Path(directory), seed, name, mesh, depth)
    return loop.run(body, report)


class Fit(Body[TrainState, Model]):
    """The body of `fit`; it loads the model when it begins, and then keeps its state only."""

    shown = ("loss", "grad_norm", "tokens_per_s")

    def __init__(
        self,
        load: Callable[[], Model],
        examples: Sequence[Example],
        config: FitConfig,
        directory: Path,
        seed: int,
        name: str,
        mesh: Mesh | None,
        depth: int | None,
        start: Start | None = None,
    ):
        if not examples:
            raise ValueError(f"{name}: there are no examples to train on")
        config.train.check(mesh)
        self.keys = "fit.train" if name == "beta" else "train"  # of config.train, by its stage
        longest, row_len = max(len(example.layout) for example in examples), config.train.row_len
        if longest > row_len:
            raise ValueError(
                f"{name}: an example has {longest} tokens, {self.keys}.row_len is {row_len}, "
                f"needed is {longest} or more"
            )
        self.load, self.examples, self.config, self.mesh = load, examples, config, mesh
        self.name, self.directory, self.profile, self.seed = name, directory, config.profile, seed
        self.total = config.num_steps(len(examples))
        self.every, self.max_nonfinite = config.train.checkpoint_every, config.train.max_nonfinite
        deepest = max(example.layout.hidden.shape[1] for example in examples)
        self.depth: int = deepest + 1 if depth is None else depth
        self.order, self.start = shuffled(len(examples), seed), start
        if is_main() and (text := config.advice(batch_shards(mesh))):
            _log.warning("%s: %s", name, text)
        self.text = f"{dump_config(config)}seed: {seed}\nexamples: {_digest(examples)}\n"

    def claim(self) -> None:
        claim(self.directory, self.text, SIZES)

    def begin(self) -> tuple[TrainState, Checkpoints]:
        train = self.config.train
        with sigterm.interruptible():
            self.model, self.base, state = begin(self.load(), train, self.seed, self.mesh)
        place = self.config.checkpoints or self.directory / "checkpoints"
        checkpoints = Checkpoints(place, self.text, train.keep_checkpoints, train.keep_best)
        if self.start:
            self.start.begin(checkpoints, self.name)
        return state, checkpoints

    def step(self, state: TrainState, number: int) -> tuple[TrainState, dict[str, Scalar]]:
        """One optimizer step on the next `batch` examples."""
        config, train = self.config, self.config.train
        begun = time.perf_counter()
        first = (number - 1) * config.batch
        numbers = [int(self.order[first + i]) for i in range(config.batch)]
        batch = [self.examples[i] for i in numbers]
        self.tell_work(
            {f"example {i + 1}": [len(self.examples[i].layout)] for i in sorted(set(numbers))}
        )
        with part("pack"):
            known = [facts(example, ALL, group) for group, example in enumerate(batch)]
            rows = make_batch(
                known,
                dict(enumerate(batch)),
                train.shapes(self.mesh),
                batch_shards(self.mesh),
                self.depth,
                every=True,
            )
        model_config = train.model(self.model.config)
        rate = learning_rate(train.optimizer, number - 1, self.total)
        packed = time.perf_counter()
        with part("train"):
            flops = flops_of(model_config, rows)
            state, metrics = optimize(
                state, rows, model_config, train, config.loss, rate, self.mesh, None, self.base
            )
        trained = time.perf_counter()
        with part("log"):
            more = figures(flops, trained - packed, self.mesh, train.compute_dtype)
        tokens = sum(len(example.layout) for example in batch)
        return state, {**metrics, "tokens_per_s": tokens / (trained - begun), **more}

    def remedies(self, training: bool) -> str:
        smaller = self.config.train.smaller(self.keys)
        return smaller + (around(self.directory.parent, self.seed) if self.name == "beta" else "")

    def value(self, metrics: Mapping[str, Scalar]) -> float:
        return -numeric(metrics, "loss")

    def finish(self, state: TrainState) -> Model:
        warn_untrained(state, self.total)
        return dataclasses.replace(self.model, params=joined(self.base, state.params))


def _digest(examples: Sequence[Example]) -> str:
    """Tells two sets of examples apart."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(example.token_ids.tobytes())
        digest.update(example.loss_mask.tobytes())
        digest.update(b"|")
    return digest.hexdigest()[:16]
