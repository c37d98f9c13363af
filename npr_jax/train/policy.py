"""What both reinforcement-learning stages do in the loop (runs/loop.py): the policy answers, and
learns from its answers."""

import dataclasses
import functools
import logging
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Generic

import jax

from npr_jax.base.config import dump_config
from npr_jax.base.distributed import gather, is_main
from npr_jax.base.mesh import batch_shards, local_decode_mesh, make_mesh
from npr_jax.base.parts import part, tell
from npr_jax.base.progress import Scalar, numeric
from npr_jax.data.problems import read_problems
from npr_jax.decode import Engine, SamplingParams
from npr_jax.model.lora import joined
from npr_jax.model.pretrained import load, publish_model
from npr_jax.model.sharding import train_shardings
from npr_jax.runs import loop, sigterm
from npr_jax.runs.checkpoint import Checkpoints, checkpoint_steps
from npr_jax.runs.directory import SIZES, claim, claim_inputs
from npr_jax.runs.guards import check_gap
from npr_jax.runs.log import Report
from npr_jax.runs.loop import Body
from npr_jax.train.evaluation import evaluation_of
from npr_jax.train.figures import figures, flops_of
from npr_jax.train.inputs import model_content, problems_content
from npr_jax.train.link import Link, linked
from npr_jax.train.objective import cast
from npr_jax.train.optimizer import (
    TrainState,
    learning_rate,
    warn_untrained,
)
from npr_jax.train.rl import Feed, merged, minibatches, prompt_key
from npr_jax.train.rollout import STAGES, encode_problems, engine_params
from npr_jax.train.rollout_cache import Pending
from npr_jax.train.sampler import ByTurns, C, Collect, Sampled, Sampler
from npr_jax.train.sides import Ahead, roll_out_side
from npr_jax.train.start import around, find_start
from npr_jax.train.step import begin, optimize

_log = logging.getLogger(__name__)


class Policy(Body[TrainState, Path], Generic[C]):
    """The body of a stage: the policy that answers, and learns from its answers.

    Args:
      config: of the stage.
      collect: (engine with the current weights, feed, step from 1, config) -> Collected.
      link: to the side that rolls out, where it is another than this one.
    """

    shown = ("reward", "format_rate", "accuracy", "grad_norm", "eval/score")
    last_update = 0.0  # seconds of an optimizer step, as far as one was made

    def __init__(self, config: C, collect: Collect[C], link: Link | None = None):
        self.config, self.collect, self.link = config, collect, link
        self.name, self.total = config.command, config.steps
        self.every, self.max_nonfinite = config.train.checkpoint_every, config.train.max_nonfinite
        self.profile = config.profile
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
            model = load(config.model, seed=config.seed, tags=True, mesh=self.mesh).merged()
            given = read_problems(config.problems)
            problems, prompts = encode_problems(model.tokenizer, given, config.max_prompt_tokens)
            self.evaluation, held_out = evaluation_of(
                config.evaluate,
                model.tokenizer,
                given,
                config.max_prompt_tokens,
                SamplingParams(max_tokens=config.max_tokens, parallel=config.parallel),
                config.seed,
                config.check,
            )
            self.model, self.base, state = begin(model, train, config.seed, self.mesh)
            self.reference = self.base if config.kl else None
            if config.kl and self.base is None:
                laid_out = self.mesh and train_shardings(model.config, self.mesh)
                to_dtype = functools.partial(cast, dtype=train.compute_dtype)
                self.reference = jax.jit(to_dtype, out_shardings=laid_out)(model.params)
            contents = {
                "model": model_content(config.model, model),
                "problems": problems_content(problems, prompts, bool(config.curriculum)),
                **held_out,
            }
        place = config.checkpoints or self.directory / "checkpoints"
        start = None
        if config.start is not None and not checkpoint_steps(place):
            start = find_start(config.start, vars(config).keys(), train)
            start.check({"model": contents["model"]})
        text = self.text + claim_inputs(self.directory, contents)
        # The state has the parameters from here on, and the engine gets its own in the first step.
        self.engine = None
        # Each stage has an order of its own: what the stage before has learnt teaches nothing.
        path = config.seed, STAGES.index(config.command)
        self.feed = Feed(problems, prompts, *path, curriculum=config.curriculum)
        self.pending = Pending(f"{place}/rollouts", text)
        if self.link:
            arch, known = self.model.config, contents["problems"]
            self.source = Ahead(self.link, config, arch, self.base, text, known, self._good)
        else:
            sampler = Sampler(config, self.collect, self.feed, self.pending, self.directory)
            self.source = ByTurns(sampler, self._set_params)
        self.checkpoints = Checkpoints(place, text, train.keep_checkpoints, train.keep_best)
        if start:
            start.begin(self.checkpoints, self.name)
        return state, self.checkpoints

    def position(self) -> dict[str, Any]:
        found = self.source.queue.position()
        return found | ({"evaluation": self.evaluation.record} if self.evaluation else {})

    def move(self, position: Mapping[str, Any]) -> None:
        self.source.queue.move(position)
        if self.evaluation:
            self.evaluation.record = position.get("evaluation", {})

    def is_over(self) -> bool:
        return self.evaluation is not None and self.evaluation.is_over()

    def step(self, state: TrainState, number: int) -> tuple[TrainState, dict[str, Scalar]]:
        """One rollout batch, and the optimizer steps on it; without groups there are none."""
        config, train = self.config, self.config.train
        if not self.link:
            with part("keep"):
                self.pending.drop(self.checkpoints.good)
        if self.evaluation and not self.evaluation.record:
            with sigterm.interruptible():
                self.evaluation.begin(self._set_params(state), number - 1)
        sampled = self.source.take(state, number)
        collected = sampled.collected
        if sigterm.wanted():
            raise sigterm.Preempted
        begun = time.perf_counter()
        with part("keep"):
            self.tell_work(self._work(sampled))
        model_config = train.model(self.model.config)
        history = []
        with part("pack"):
            parts = list(
                minibatches(
                    collected,
                    config.minibatches,
                    train,
                    config.depth,
                    self.mesh,
                    every=config.kl > 0,  # then all have a gradient
                )
            )
        packed, flops = time.perf_counter(), 0.0
        for batch in parts:
            if not batch.parts:
                continue
            total = config.steps * config.minibatches
            rate = learning_rate(train.optimizer, int(state.step), total)
            with part("train"):
                flops += flops_of(model_config, batch)
                tell(self._told(len(history), len(parts), int(batch.figures["micro_batches"])))
                state, metrics = optimize(
                    state,
                    batch,
                    model_config,
                    train,
                    config.loss,
                    rate,
                    self.mesh,
                    self.reference,
                    self.base,
                )
            history.append(metrics)
        trained = time.perf_counter()
        updates = merged(history, len(parts))
        if history:
            self.last_update = (trained - packed) / len(history)
        with part("log"):
            counts = sampled.counts if is_main() or not self.link else {}
            more = figures(flops, trained - packed, self.mesh, train.compute_dtype, counts)
            self.source.queue.drop(number)
        if config.curriculum:
            more |= self.feed.level(sampled.first, sampled.last)
        if self.evaluation and self.evaluation.due(number, self.total):
            more |= self.evaluation.measure(self._set_params(state), number)
        return state, {
            **collected.metrics,
            **updates,
            "zero_advantage": sum(batch.left_out for batch in parts),
            "rollout_seconds": sampled.seconds,
            "rollout_tokens_per_s": sampled.tokens / sampled.seconds if sampled.seconds else 0.0,
            "train_seconds": trained - begun,
            "rollout_time_share": sampled.seconds / (sampled.seconds + trained - begun),
            "train_tokens_per_s": numeric(updates, "loss_tokens", 0) / (trained - begun),
            "rollout_age": number - 1 - sampled.version,
            **more,
        }

    def check(self, number: int, metrics: Mapping[str, Scalar]) -> None:
        check_gap(number, metrics, self.config.train.gap_warn, self.config.train.gap_stop)

    def settle(self, state: TrainState, number: int, ending: bool) -> bool:
        return self.source.settle(state, number, ending)

    def _told(self, done: int, updates: int, micro_batches: int) -> str:
        """Of training under way. Micro-batches run in one compiled call, which cannot say how far
        it is; how long the updates of the step before took is what is known."""
        last = f", one took {self.last_update:.3g} s" if self.last_update else ""
        return f"update {done + 1}/{updates}, {micro_batches} micro-batches{last}"

    def value(self, metrics: Mapping[str, Scalar]) -> float | None:
        if self.evaluation:
            return self.evaluation.value(metrics)
        if "score" not in metrics:  # rollouts that were kept by an older version
            return None
        return numeric(metrics, "score")

    def remedies(self, training: bool) -> str:
        config = self.config
        if training:
            need = config.max_prompt_tokens + config.max_tokens
            return config.train.smaller(need=need) + around(self.directory, config.seed)
        return config.engine.smaller()

    def finish(self, state: TrainState) -> Path:
        warn_untrained(state, self.total)
        final = self.directory / "final"
        self.pending.drop(self.total)
        params = joined(self.base, state.params)
        publish_model(dataclasses.replace(self.model, params=params), final)
        return final

    def _good(self) -> int:
        return self.checkpoints.good

    def _work(self, sampled: Sampled) -> dict[str, list[int]]:
        """The tokens of each answer of this process, by how its problem begins."""
        config, first = self.config, sampled.first
        if config.carry:  # a group may have been begun so many batches before
            first -= config.prompts * math.ceil(config.max_tokens / config.carry)
        names, work = self.feed.names(max(0, first), sampled.last), {}
        for group in sampled.collected.groups:
            prompt = group[0].token_ids[: group[0].layout.prompt_len]
            # One of no problem was put in by a caller's own `collect`.
            name = names.get(prompt_key(prompt), "another problem")
            work.setdefault(name, []).extend(len(example.layout) for example in group)
        return work

    def _set_params(self, state: TrainState) -> Engine:
        """The engine with the weights of the state; here nothing holds on to its copy of them."""
        dtype, mesh = self.config.train.compute_dtype, self.mesh
        with part("hand_over"):
            # Waited for, or the rollout would be charged with it, which waits for it anyway.
            # Adapters are handed over alone, to an engine that has the base.
            params = joined(self.base, state.params) if self.engine is None else state.params
            params = engine_params(self.model.config, params, dtype, mesh)
            params = jax.block_until_ready(params)
            if self.engine is not None:
                self.engine.set_params(params)
                return self.engine
            model = dataclasses.replace(self.model, params=params)
            self.engine = Engine(model, self.config.engine, local_decode_mesh(mesh))
            return self.engine


def run(config: C, collect: Collect[C], report: Report | None = None) -> Path:
    """Runs a stage, or goes on with it; returns the directory of the trained model.

    Args:
      collect: as for `Policy`.
      report: called with the metrics of every step, in place of a progress line.
    """
    if not config.mesh.rollout:
        return loop.run(Policy(config, collect), report)
    with linked(config.mesh) as link:
        if link.side == "train":
            return loop.run(Policy(config, collect, link), report)
        with sigterm.watched():
            return roll_out_side(config, collect, link)
