"""Stage 1, Zero: DAPO on sequential rollouts teaches the format and raises accuracy.

arXiv 2512.07461 eq. 1 and 2. Nothing forks: an answer is one line of text, sampled throughout, and
its layout is causal. Groups whose rewards are all equal teach nothing; they are dropped, and other
problems take their place. It is the variance of the whole reward that counts, not that of
correctness alone: this is what teaches the format while hardly any answer is right.
"""

import dataclasses
from pathlib import Path

import numpy as np

from npr_jax.base.distributed import gather, gather_all
from npr_jax.decode import Engine, SamplingParams
from npr_jax.evaluate.judge import Answer
from npr_jax.runs import loop
from npr_jax.runs.log import Report
from npr_jax.train import rl
from npr_jax.train.advantages import group_std
from npr_jax.train.rewards import RIGHT, RULES, WRONG, zero_reward
from npr_jax.train.rollout import ZERO, roll_out, sampled_example, summary
from npr_jax.train.step import Objective

DEPTH = 2  # no tree; one interval for the group, one for the row


@dataclasses.dataclass(frozen=True, kw_only=True)
class ZeroConfig(rl.RLConfig):
    """Config of stage 1, beside what `RLConfig` has.

    Attributes:
      max_refills: rounds of further problems for dropped groups.
      clip_low, clip_high, dual_clip: of the policy loss (`losses.dapo`).
      reward: "ordered", "paper" or "accuracy" (`rewards.zero_reward`).
      overlong_buffer, overlong_penalty: of the same; a buffer of 0 is off.
    """

    minibatches: int = 2
    max_refills: int = 3
    clip_low: float = 0.2
    clip_high: float = 0.28
    dual_clip: float = 10.0
    reward: str = "ordered"
    overlong_buffer: int = 0
    overlong_penalty: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        if self.reward not in RULES:
            raise ValueError(f"reward is {self.reward!r}, needed is one of {RULES}")
        if self.samples < 2:
            raise ValueError(f"samples is {self.samples}, needed is 2 or more: a group to compare")


def run(config: ZeroConfig, report: Report | None = None) -> Path:
    """Runs the stage, or goes on with it; returns the directory of the trained model.

    `report(metrics)`, if given, is called after every step in place of a progress line.
    """

    def collect(engine: Engine, feed: rl.Feed, step: int) -> rl.Collected:
        return collect_groups(engine, feed, step, config)

    objective = Objective("dapo", config.clip_low, config.clip_high, config.dual_clip)
    return loop.run(rl.Policy(ZERO, config, objective, collect, DEPTH), report)


def collect_groups(engine: Engine, feed: rl.Feed, step: int, config: ZeroConfig) -> rl.Collected:
    """Samples until there are `prompts` groups with unequal rewards, or the refills are used up."""
    sampling = SamplingParams(n=config.samples, max_tokens=config.max_tokens, parallel=False)
    groups, keys, everything, all_rewards = [], [], [], []
    taken = found = rounds = 0
    while found < config.prompts and rounds <= config.max_refills:
        prompts, references = feed.take(config.prompts - found)
        taken += len(prompts)
        seeds = (config.seed, ZERO, step, rounds)
        for number, group in roll_out(engine, prompts, references, sampling, seeds).items():
            rewards = [reward_of(answer, config) for answer in group]
            everything += group
            all_rewards += rewards
            if min(rewards) == max(rewards):
                continue
            advantages = group_std(rewards, [0] * len(group))
            groups.append(
                [
                    sampled_example(answer.trajectory, advantage)
                    for answer, advantage in zip(group, advantages, strict=True)
                ]
            )
            keys.append((rounds, number))
        rounds += 1
        found = sum(gather(len(groups)))
    metrics = summary(everything) | {
        "reward": float(np.mean(gather_all(all_rewards))),
        **{
            f"reward/{name}": mean
            for name, mean in reward_parts(everything, all_rewards, config.reward).items()
        },
        "groups": found,
        "groups_dropped": taken - found,
        "rounds": rounds,
    }
    return rl.Collected(groups, rl.places(keys), metrics, everything[: config.samples])


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
