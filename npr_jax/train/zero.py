"""Stage 1, Zero: DAPO on sequential rollouts teaches the format and raises accuracy.

arXiv 2512.07461 eq. 1 and 2. Nothing forks: an answer is one line of text, sampled throughout, and
its layout is causal. Groups whose rewards are all equal teach nothing; they are dropped, and other
problems take their place. It is the variance of the whole reward that counts, not that of
correctness alone: this is what teaches the format while hardly any answer is right.
"""

import dataclasses
import itertools
import math
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import numpy as np

from npr_jax.base.distributed import gather_all
from npr_jax.base.fields import Count, CountOrZero, PositiveOrZero, Range, Share
from npr_jax.decode import Engine, SamplingParams
from npr_jax.evaluate.judge import Answer
from npr_jax.runs.log import Report
from npr_jax.train import policy, rl
from npr_jax.train.advantages import group_std
from npr_jax.train.ask import ask
from npr_jax.train.objective import Objective
from npr_jax.train.rewards import RIGHT, WRONG, Rule, zero_reward
from npr_jax.train.rollout import (
    NOTHING_ENDED,
    ZERO,
    Shown,
    first_of,
    of_all,
    sampled_example,
    summary,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ZeroConfig(rl.RLConfig):
    """Config of stage 1, beside what `RLConfig` has.

    Attributes:
      max_refills (rounds): of further problems for dropped groups.
      refill: how many problems such a round asks: as many as are "missing"; or at the "rate" at
        which groups of this batch were kept so far, a batch of them at most, so that a round keeps
        many lanes at work and few rounds are needed. What is then kept beyond `prompts` is left
        out, those that come last.
      clip_low: the policy loss is clipped where a token has become less likely by this share
        (`losses.dapo`).
      clip_high: the same where it has become more likely.
      dual_clip: what a token of a bad answer adds to the loss, at most this times its advantage.
      reward: "ordered" (malformed < wrong < right), "paper" (a mild defect pays more than a wrong
        answer) or "accuracy" (whatever the format).
      overlong_buffer (tokens): the last of `max_tokens`, in which an answer loses reward; 0 is off.
      overlong_penalty: reward that an answer loses at the end of that buffer.
    """

    command: ClassVar[str] = "zero"
    parallel: ClassVar[bool] = False

    minibatches: Count = 2
    max_refills: CountOrZero = 3
    refill: Literal["missing", "rate"] = "missing"
    clip_low: Share = 0.2
    clip_high: PositiveOrZero = 0.28
    dual_clip: Annotated[float, Range(gt=1)] = 10.0
    reward: Rule = "ordered"
    overlong_buffer: CountOrZero = 0
    overlong_penalty: PositiveOrZero = 1.0

    def __post_init__(self):
        super().__post_init__()
        if self.carry and self.max_refills:
            raise ValueError(
                f"carry is {self.carry} and max_refills {self.max_refills}, needed is "
                "max_refills=0: what a refill asks could not end in this batch either"
            )
        if self.samples < 2:
            raise ValueError(f"samples is {self.samples}, needed is 2 or more: a group to compare")
        if self.overlong_buffer > self.max_tokens:
            raise ValueError(
                f"overlong_buffer is {self.overlong_buffer}, needed is max_tokens="
                f"{self.max_tokens} at most"
            )

    @property
    def depth(self) -> int:
        """Hidden intervals per token of a row: no tree's, and one each for group and row."""
        return 2

    @property
    def loss(self) -> Objective:
        return Objective("dapo", self.clip_low, self.clip_high, self.dual_clip, kl=self.kl)


def run(config: ZeroConfig, report: Report | None = None) -> Path:
    """Runs the stage, or goes on with it; returns the directory of the trained model.

    `report(metrics)`, if given, is called after every step in place of a progress line.
    """
    return policy.run(config, collect_groups, report)


def collect_groups(engine: Engine, feed: rl.Feed, step: int, config: ZeroConfig) -> rl.Collected:
    """Samples until there are `prompts` groups with unequal rewards, or the refills are used up."""
    sampling = SamplingParams(
        n=config.samples, max_tokens=config.max_tokens, parallel=config.parallel
    )
    groups, places, everything, own_rewards, rewards = [], [], [], [], []
    taken = found = surplus = late = rounds = 0
    begun, carried = feed.position, {}
    shown = Shown()
    while found < config.prompts and rounds <= config.max_refills:
        wanted = to_ask(config, taken, found)
        seeds = (config.seed, ZERO, step, rounds)
        answers, standing, left, carried = ask(engine, feed, config, sampling, seeds, step, wanted)
        late += left
        own = {key: reward_of(answer, config) for key, answer in answers.items()}
        everything, own_rewards = [*everything, *answers.values()], [*own_rewards, *own.values()]
        everyones = of_all(own)
        if not everyones:
            return rl.Collected([], [], carried | {"skipped_because": NOTHING_ENDED})
        taken += len({number for number, _ in everyones})
        if not rounds:
            shown = first_of(answers, everyones, standing, begun)
        rewards += everyones.values()
        for _, keys in itertools.groupby(everyones, key=lambda key: key[0]):
            keys = list(keys)
            values = [everyones[key] for key in keys]
            if min(values) == max(values):
                continue
            if found == config.prompts:
                surplus += 1
                continue
            part = [
                sampled_example(answers[key].trajectory, advantage)
                for key, advantage in zip(keys, group_std(values, [0] * len(keys)), strict=True)
                if key in answers  # else another process has it
            ]
            if part:
                groups.append(part)
                places.append(found)
            found += 1
        rounds += 1
    reward = float(np.mean(rewards))
    metrics = (
        carried
        | summary(everything)
        | {
            "reward": reward,
            "score": reward,
            **{
                f"reward/{name}": mean
                for name, mean in reward_parts(everything, own_rewards, config.reward).items()
            },
            "groups": found,
            "groups_dropped": taken - found - surplus,
            "equal_share": (taken - found - surplus) / taken,
            "rounds": rounds,
        }
    )
    if config.refill == "rate":
        metrics["groups_surplus"] = surplus
    if config.oversample:
        metrics["groups_late"] = late
    if not found:
        metrics["skipped_because"] = f"in each of {taken} groups all rewards are equal"
    return rl.Collected(groups, places, metrics, shown)


def to_ask(config: ZeroConfig, taken: int, found: int) -> int:
    """Problems of the next round, where `found` of `taken` groups were kept before.

    It follows from the config and the answers, not from lanes or hosts, so that these change no
    number.
    """
    missing = config.prompts - found
    if config.refill == "missing" or not taken:
        return missing
    return min(config.prompts, math.ceil(missing * taken / max(1, found)))


def reward_parts(answers: list[Answer], rewards: list[float], rule: str) -> dict[str, float]:
    """What the mean reward of all processes is made of; the parts add up to it."""
    parts = []
    for answer, reward in zip(answers, rewards, strict=True):
        base = RIGHT if answer.correct else WRONG
        malformed = bool(answer.violations) and rule != "accuracy"
        parts.append((reward if malformed else 0.0, 0.0 if malformed else base))
    table = np.array(gather_all([(*part, r) for part, r in zip(parts, rewards, strict=True)]))
    form, accuracy, whole = table.mean(axis=0)
    return {
        "format": float(form),
        "accuracy": float(accuracy),
        "overlong": float(whole - form - accuracy),
    }


def reward_of(answer: Answer, config: ZeroConfig) -> float:
    """The reward of one answer under the config's rule."""
    return zero_reward(
        answer.violations,
        answer.correct,
        answer.trajectory.prompt_len,
        len(answer.trajectory.token_ids),
        config.reward,
        config.max_tokens,
        config.overlong_buffer,
        config.overlong_penalty,
    )
