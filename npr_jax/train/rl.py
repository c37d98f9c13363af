"""The loop that both reinforcement-learning stages share.

    take problems -> roll out -> groups of examples -> minibatches -> metrics, checkpoint

A stage is its way to collect groups (rewards, advantages, filters) and its objective.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jax.sharding import Mesh

from npr_jax.base.config import dump_config
from npr_jax.base.distributed import gather, gather_all, is_main
from npr_jax.base.mesh import MeshConfig, local_decode_mesh, make_mesh
from npr_jax.base.progress import Scalar
from npr_jax.data.problems import Problem, read_problems, shuffled
from npr_jax.decode import Engine, EngineConfig
from npr_jax.evaluate.traces import write_traces
from npr_jax.model.pretrained import Model, load, publish_model
from npr_jax.report.html import write as write_report
from npr_jax.runs import sigterm
from npr_jax.runs.checkpoint import Checkpoints
from npr_jax.runs.directory import claim
from npr_jax.runs.guards import NonfiniteGuard, check_gap
from npr_jax.runs.log import Report, RunLog
from npr_jax.train.optimizer import TrainState, learning_rate, new_state, state_shardings
from npr_jax.train.packing import Example, empty_row, make_rows
from npr_jax.train.rollout import STAGES, Rollout, encode_problems, engine_params, trace_of
from npr_jax.train.rollout_cache import Pending, fingerprint
from npr_jax.train.step import Objective, TrainConfig, optimize

Groups = list[list[Example]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RLConfig:
    """What Zero and PAPO have in common.

    Attributes:
      model: directory, hub id or preset to start from.
      problems: JSONL file of problems and answers, or a directory of `npr-jax data prepare`.
      output: run directory; the trained model goes to its `final`.
      checkpoints: where they go, a directory or URL; null: `checkpoints` in the run directory.
      seed: of the problems' order and of sampling.
      steps: rollout batches.
      prompts, samples: problems of a batch, and answers to each.
      minibatches: optimizer steps per batch; each one after the first is off-policy.
      max_prompt_tokens: problems with longer prompts are left out.
      max_tokens: of an answer's whole tree.
      mesh: see MeshConfig; answers are decoded by replicas of mesh.tensor devices each.
      engine, train: see EngineConfig and TrainConfig.
    """

    model: str
    problems: str
    output: str
    checkpoints: str | None = None
    seed: int = 0
    steps: int
    prompts: int = 16
    samples: int = 16
    minibatches: int = 1
    max_prompt_tokens: int = 2048
    max_tokens: int
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    engine: EngineConfig = dataclasses.field(default_factory=EngineConfig)
    train: TrainConfig

    def __post_init__(self):
        for name in ("steps", "prompts", "samples", "minibatches", "max_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, needed is 1 or more")
        need = self.max_prompt_tokens + self.max_tokens
        if self.train.row_len < need:
            raise ValueError(
                f"train.row_len is {self.train.row_len}, needed is max_prompt_tokens + max_tokens "
                f"= {need} or more"
            )


class Feed:
    """Prompts and reference answers in a shuffled, endless order; `position` is all its state."""

    def __init__(self, problems: list[Problem], prompts: list[list[int]], *path: int):
        self._problems, self._prompts = problems, prompts
        self._order = shuffled(len(problems), *path)
        self.position = 0

    def problem(self, position: int) -> Problem:
        """The problem that stands there."""
        return self._problems[int(self._order[position])]

    def take(self, num: int) -> tuple[list[list[int]], list[str]]:
        """The next `num` prompts and their answers."""
        chosen = [int(self._order[self.position + i]) for i in range(num)]
        self.position += num
        return [self._prompts[i] for i in chosen], [self._problems[i].answer for i in chosen]


class Collected(NamedTuple):
    """A rollout batch: this process's groups to train on (where no process has any, the step is
    skipped), the place of each among those of all processes, metrics of all of it, and the answers
    to its first problem, for people to look at."""

    groups: Groups
    places: list[int]
    metrics: dict[str, Scalar]
    shown: Sequence[Rollout] = ()


def places(keys: Sequence[Any]) -> list[int]:
    """Where each of this process's keys stands among the sorted keys of all processes."""
    order = {key: place for place, key in enumerate(sorted(gather_all(keys)))}
    return [order[key] for key in keys]


Collect = Callable[[Engine, Feed, int], Collected]


def train(
    stage: int,
    config: RLConfig,
    objective: Objective,
    collect: Collect,
    depth: int,
    report: Report | None = None,
) -> Path:
    """Runs a stage to its end, or goes on with it; returns the directory of the trained model.

    Args:
      stage: ZERO or PAPO.
      collect: (engine with the current weights, feed, step from 1) -> Collected.
      depth: hidden intervals per token of a row.

    Raises ValueError for a directory of another run, OSError where it cannot write,
    FloatingPointError after `train.max_nonfinite` steps, Preempted after SIGTERM.
    """
    text, settings = dump_config(config), config.train
    mesh = make_mesh(config.mesh)
    settings.check(mesh)
    output = claim(config.output, text)
    final = output / "final"
    if gather(final.exists())[0]:
        return final
    with sigterm.watched():
        with sigterm.interruptible():
            model, feed = _load(stage, config, mesh)
            shardings = mesh and state_shardings(model.config, settings.optimizer, mesh)
            state = new_state(model.params, settings.optimizer, shardings)
        model = dataclasses.replace(model, params={})  # the state has them from here on
        place = config.checkpoints or output / "checkpoints"
        pending = Pending(f"{place}/rollouts", text)
        shown = ("reward", "format_rate", "accuracy", "grad_norm")
        with Checkpoints(place, text, settings.keep_checkpoints, settings.keep_best) as checkpoints:
            start, reward, guard = 0, None, NonfiniteGuard(settings.max_nonfinite)
            if found := checkpoints.restore(state):
                start, state, position = found
                feed.position, guard.in_a_row = position["problem"], position["nonfinite_in_a_row"]
            weights = engine_params(model.config, state.params, settings.compute_dtype, mesh)
            engine = Engine(
                dataclasses.replace(model, params=weights), config.engine, local_decode_mesh(mesh)
            )
            with RunLog(STAGES[stage], output, config.steps, start, shown, report) as log:
                for step in range(start + 1, config.steps + 1):
                    position = _position(feed, guard)
                    begun, decoded = time.perf_counter(), engine.stats()["sampled_tokens"]
                    try:
                        params = engine_params(
                            model.config, state.params, settings.compute_dtype, mesh
                        )
                        engine.set_params(params)
                        version = fingerprint(state.params)
                        keep = step % settings.checkpoint_every == 0 or step == config.steps
                        traces = output / f"traces/step-{step:06d}.jsonl" if keep else None
                        collected = _sample(engine, feed, step, collect, pending, version, traces)
                        if sigterm.wanted():
                            raise sigterm.Preempted
                    except sigterm.Preempted:
                        checkpoints.save(step - 1, state, position, reward)
                        raise
                    sampled = time.perf_counter()
                    decoded = engine.stats()["sampled_tokens"] - decoded
                    state, updates = update(state, collected, model, config, objective, depth, mesh)
                    trained = time.perf_counter()
                    metrics = (
                        collected.metrics
                        | updates
                        | guard.count(updates)
                        | {
                            "step": step,
                            "rollout_seconds": sampled - begun,
                            "rollout_tokens_per_s": decoded / (sampled - begun),
                            "train_seconds": trained - sampled,
                            "rollout_time_share": (sampled - begun) / (trained - begun),
                            "train_tokens_per_s": updates.get("loss_tokens", 0)
                            / (trained - sampled),
                        }
                    )
                    log.write(metrics)
                    guard.check(step)
                    check_gap(step, metrics, settings.gap_warn, settings.gap_stop)
                    reward, ending = metrics["reward"], sigterm.wanted()
                    if step % settings.checkpoint_every == 0 or step == config.steps or ending:
                        before = checkpoints.last  # whole on disk once the next one is begun
                        checkpoints.save(step, state, _position(feed, guard), reward)
                        pending.drop(before)
                    if ending:
                        raise sigterm.Preempted
        pending.drop(config.steps)
        publish_model(dataclasses.replace(model, params=state.params), final)
        if is_main():
            write_report(output)
    return final


def _sample(
    engine: Engine,
    feed: Feed,
    step: int,
    collect: Collect,
    pending: Pending,
    version: int,
    traces: Path | None,
) -> Collected:
    """The groups of `step`: pending ones, or new ones, which are pending from then on. Of new ones
    the answers to the first problem go to the file `traces`, if one is given."""
    with sigterm.interruptible():
        found = pending.load(step, version)
        if all(gather(found is not None)):
            groups, metrics, position = found
            feed.position = position["problem"]
            return Collected(groups, position["places"], metrics)
        first = feed.problem(feed.position)
        collected = collect(engine, feed, step)
    if traces and is_main():
        kept = [
            trace_of(rollout, engine.tokenizer, first, id=traces.stem, sample=sample)
            for sample, rollout in enumerate(collected.shown)
        ]
        write_traces(traces, kept)
    position = {"problem": feed.position, "places": collected.places}
    pending.save(step, version, collected.groups, collected.metrics, position)
    return collected


def _position(feed: Feed, guard: NonfiniteGuard) -> dict[str, int]:
    """Where the run goes on, beside the step: what a checkpoint holds of it."""
    return {"problem": feed.position, "nonfinite_in_a_row": guard.in_a_row}


def _load(stage: int, config: RLConfig, mesh: Mesh | None) -> tuple[Model, Feed]:
    """The model to start from, and its problems in the order of the stage."""
    model = load(config.model, seed=config.seed, tags=True, mesh=mesh)
    problems, prompts = encode_problems(
        model.tokenizer,
        read_problems(config.problems),
        config.max_prompt_tokens,
    )
    # Each stage has an order of its own: what the stage before has learnt teaches nothing.
    return model, Feed(problems, prompts, config.seed, stage)


def update(
    state: TrainState,
    collected: Collected,
    model: Model,
    config: RLConfig,
    objective: Objective,
    depth: int,
    mesh: Mesh | None,
) -> tuple[TrainState, dict[str, Scalar]]:
    """The optimizer steps on one rollout batch: minibatches of whole groups, dealt by their places.

    Metrics: means over the steps; the gap to the sampler's log-probs is that of the first, whose
    weights are those that sampled. Without groups the step is skipped, and counted.
    """
    model_config = dataclasses.replace(model.config, remat=config.train.remat)
    total = config.steps * config.minibatches
    parts = min(config.minibatches, sum(gather(len(collected.groups))))
    history = []
    for number in range(parts):
        part = [
            group
            for group, place in zip(collected.groups, collected.places, strict=True)
            if place % config.minibatches == number
        ]
        row_len = config.train.row_len
        rows = make_rows(part, row_len, depth) or [empty_row(row_len, depth)]
        rate = learning_rate(config.train.optimizer, int(state.step), total)
        state, metrics = optimize(state, rows, model_config, config.train, objective, rate, mesh)
        history.append(metrics)
    if not history:
        return state, {"skipped": 1, "off_policy_steps": 0}
    merged: dict[str, Scalar] = {
        key: sum(metrics[key] for metrics in history) / len(history) for key in history[0]
    }
    merged |= {key: history[0][key] for key in ("logp_gap", "logp_gap_max")}
    for key in ("loss_tokens", "nonfinite"):
        merged[key] = sum(metrics[key] for metrics in history)
    return state, merged | {"skipped": 0, "off_policy_steps": len(history) - 1}
