"""Stage 3, PAPO: reinforcement learning on native parallel rollouts.

arXiv 2512.07461 eq. 5 and 6. The engine forks and joins for real; the trainer lays the same tokens
out as the engine did. An answer that is no whole tree is filtered; the others are rewarded by
accuracy alone. No clip, no importance weights: one optimizer step per batch is on-policy.
"""

import dataclasses
from pathlib import Path

import numpy as np

from npr_jax.decode import Engine, SamplingParams, Trajectory
from npr_jax.train import rl
from npr_jax.train.advantages import batch_std
from npr_jax.train.log import Report
from npr_jax.train.rewards import papo_reward
from npr_jax.train.rollout import PAPO, roll_out, sampled_example, summary
from npr_jax.train.step import Objective
from npr_jax.tree import TagIds, TraceError, parse


@dataclasses.dataclass(frozen=True, kw_only=True)
class PapoConfig(rl.RLConfig):
    """Config of stage 3: what `RLConfig` has."""


def run(config: PapoConfig, report: Report | None = None) -> Path:
    """Runs the stage, or goes on with it; returns the directory of the trained model.

    `report(metrics)`, if given, is called after every step in place of a progress line.
    """

    def collect(engine: Engine, feed: rl.Feed, step: int) -> rl.Collected:
        return collect_groups(engine, feed, step, config)

    depth = config.engine.max_depth + 2  # the tree's, and one each for the group and the row
    return rl.train(PAPO, config, Objective("papo"), collect, depth, report)


def collect_groups(engine: Engine, feed: rl.Feed, step: int, config: PapoConfig) -> rl.Collected:
    """Samples one batch, filters it, and gives what is left its advantages.

    No groups come back where fewer than two answers are left or all rewards are equal.
    """
    sampling = SamplingParams(n=config.samples, max_tokens=config.max_tokens, parallel=True)
    prompts, answers = feed.take(config.prompts)
    seeds = (config.seed, PAPO, step)
    rollouts = roll_out(engine, prompts, answers, sampling, seeds)
    everything = [rollout for group in rollouts for rollout in group]
    depth = config.engine.max_depth
    kept = [
        (number, rollout)
        for number, group in enumerate(rollouts)
        for rollout in group
        if is_whole(rollout.trajectory, engine.tags, depth)
    ]
    rewards = [papo_reward(rollout.correct) for _, rollout in kept]
    labels = [number for number, _ in kept]
    metrics = summary(everything) | {
        "reward": float(np.mean(rewards)) if rewards else 0.0,
        "filtered": len(everything) - len(kept),
        "groups_equal": sum(
            len({r for r, label in zip(rewards, labels, strict=True) if label == number}) <= 1
            for number in range(len(rollouts))
        ),
    }
    if len(set(rewards)) < 2:
        return rl.Collected([], metrics)
    groups: list[list] = [[] for _ in rollouts]
    for (number, rollout), advantage in zip(kept, batch_std(rewards, labels), strict=True):
        groups[number].append(sampled_example(rollout.trajectory, advantage))
    return rl.Collected([group for group in groups if group], metrics)


def is_whole(trajectory: Trajectory, tags: TagIds, max_depth: int) -> bool:
    """The structural filter: the answer came to its own end, and is a tree."""
    if trajectory.finish_reason != "stop":
        return False
    try:
        parse(trajectory.token_ids, trajectory.prompt_len, tags, max_depth=max_depth)
    except TraceError:
        return False
    return True
