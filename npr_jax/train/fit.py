"""Supervised training on examples: stage Beta, and any other model that learns from traces."""

import dataclasses
import hashlib
import time
from collections.abc import Sequence
from pathlib import Path

from jax.sharding import Mesh

from npr_jax.base.config import dump_config
from npr_jax.base.distributed import mine
from npr_jax.data.problems import shuffled
from npr_jax.model.pretrained import Model
from npr_jax.runs import sigterm
from npr_jax.runs.checkpoint import Checkpoints
from npr_jax.runs.directory import claim
from npr_jax.runs.guards import NonfiniteGuard
from npr_jax.runs.log import Report, RunLog
from npr_jax.train.optimizer import learning_rate, new_state, state_shardings
from npr_jax.train.packing import Example, empty_row, make_rows
from npr_jax.train.step import Objective, TrainConfig, optimize


@dataclasses.dataclass(frozen=True)
class FitConfig:
    """How long to train on examples, and how.

    Attributes:
      train: see TrainConfig.
      batch: examples per optimizer step.
      steps: optimizer steps; or epochs: passes over the examples. One of the two is given.
      checkpoints: where they go, a directory or URL; null: `checkpoints` in the run directory.
    """

    train: TrainConfig
    batch: int = 32
    steps: int = 0
    epochs: float = 0.0
    checkpoints: str | None = None

    def __post_init__(self):
        if self.batch < 1:
            raise ValueError(f"fit.batch is {self.batch}, needed is 1 or more")
        if (self.steps > 0) == (self.epochs > 0):
            raise ValueError(
                f"fit.steps is {self.steps} and fit.epochs {self.epochs}: set one of them above 0"
            )

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
) -> Model:
    """Trains a copy of the model on examples (log-likelihood of their loss tokens).

    On a mesh the model has been loaded onto it. Several processes have the same examples, and each
    lays out its own share of every batch.

    Metrics and checkpoints go to `directory`; the same call again goes on where it stopped.
    Returns the trained model, float32. Raises ValueError without examples, for an example that is
    longer than a row, and for a directory of another run; OSError where it cannot write;
    FloatingPointError after `max_nonfinite` steps; Preempted after SIGTERM.
    """
    if not examples:
        raise ValueError(f"{name}: there are no examples to train on")
    config.train.check(mesh)
    total = config.num_steps(len(examples))
    depth = max(example.layout.hidden.shape[1] for example in examples) + 1
    model_config = dataclasses.replace(model.config, remat=config.train.remat)
    text = f"{dump_config(config)}seed: {seed}\nexamples: {_digest(examples)}\n"
    directory = claim(directory, text)
    order = shuffled(len(examples), seed)
    objective = Objective("sft")
    place, settings = config.checkpoints or directory / "checkpoints", config.train
    shardings = mesh and state_shardings(model.config, settings.optimizer, mesh)
    state = new_state(model.params, settings.optimizer, shardings)
    with (
        sigterm.watched(),
        Checkpoints(place, text, settings.keep_checkpoints, settings.keep_best) as checkpoints,
    ):
        start, guard = 0, NonfiniteGuard(settings.max_nonfinite)
        if found := checkpoints.restore(state):
            start, state, position = found
            guard.in_a_row = position["nonfinite_in_a_row"]
        shown = ("loss", "grad_norm", "tokens_per_s")
        with RunLog(name, directory, total, start, shown, report) as log:
            for step in range(start + 1, total + 1):
                begun = time.perf_counter()
                first = (step - 1) * config.batch
                batch = [examples[order[first + i]] for i in range(config.batch)]
                rows = make_rows([[example] for example in mine(batch)], settings.row_len, depth)
                rows = rows or [empty_row(settings.row_len, depth)]
                rate = learning_rate(settings.optimizer, step - 1, total)
                state, metrics = optimize(
                    state, rows, model_config, settings, objective, rate, mesh
                )
                seconds = time.perf_counter() - begun
                metrics |= {
                    "step": step,
                    "seconds": seconds,
                    "tokens_per_s": sum(len(e.layout) for e in batch) / seconds,
                }
                metrics |= guard.count(metrics)
                log.write(metrics)
                guard.check(step)
                ending = sigterm.wanted()
                if step % settings.checkpoint_every == 0 or step == total or ending:
                    position = {"nonfinite_in_a_row": guard.in_a_row}  # the step says the rest
                    checkpoints.save(step, state, position, -metrics["loss"])
                if ending:
                    raise sigterm.Preempted
    return dataclasses.replace(model, params=state.params)


def _digest(examples: Sequence[Example]) -> str:
    """Tells two sets of examples apart."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(example.token_ids.tobytes())
        digest.update(example.loss_mask.tobytes())
        digest.update(b"|")
    return digest.hexdigest()[:16]
