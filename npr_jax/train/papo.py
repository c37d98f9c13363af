"""Stage 3, PAPO: reinforcement learning on native parallel rollouts.

arXiv 2512.07461 eq. 5 and 6. The engine forks and joins for real; the trainer lays the same tokens
out as the engine did. An answer that is no whole tree is filtered, or penalised if the config says
so; the others are rewarded by accuracy alone. No clip, no importance weights: one optimizer step
per batch is on-policy.
"""

import dataclasses
from pathlib import Path

import numpy as np

from npr_jax.decode import Engine, SamplingParams, Trajectory
from npr_jax.train import rl
from npr_jax.train.advantages import batch_std
from npr_jax.train.log import Report
from npr_jax.train.rewards import papo_reward
from npr_jax.train.rollout import PAPO, Rollout, roll_out, sampled_example, summary
from npr_jax.train.step import Objective
from npr_jax.tree import TagIds, TraceError, parse

MALFORMED = ("filter", "penalty")
MALFORMED_REWARD = -2.0  # below WRONG


@dataclasses.dataclass(frozen=True, kw_only=True)
class PapoConfig(rl.RLConfig):
    """Config of stage 3.

    Attributes:
      malformed: what happens to answers that are no whole tree. "filter" leaves them out, as the
        paper does; nothing then holds the policy back from writing more of them. "penalty" gives
        them a reward below that of a wrong answer.
    """

    malformed: str = "filter"

    def __post_init__(self):
        super().__post_init__()
        if self.malformed not in MALFORMED:
            raise ValueError(f"malformed is {self.malformed!r}, needed is one of {MALFORMED}")


def run(config: PapoConfig, report: Report | None = None) -> Path:
    """Runs the stage, or goes on with it; returns the directory of the trained model.

    `report(metrics)`, if given, is called after every step in place of a progress line.
    """

    def collect(engine: Engine, feed: rl.Feed, step: int) -> rl.Collected:
        return collect_groups(engine, feed, step, config)

    depth = config.engine.max_depth + 2  # the tree's, and one each for the group and the row
    return rl.train(PAPO, config, Objective("papo"), collect, depth, report)


def collect_groups(engine: Engine, feed: rl.Feed, step: int, config: PapoConfig) -> rl.Collected:
    """Samples one batch, filters it, and gives what is left advantages.

    No groups come back where fewer than two answers are left or all rewards are equal.
    """
    sampling = SamplingParams(n=config.samples, max_tokens=config.max_tokens, parallel=True)
    prompts, answers = feed.take(config.prompts)
    seeds = (config.seed, PAPO, step)
    rollouts = roll_out(engine, prompts, answers, sampling, seeds)
    everything = [rollout for group in rollouts for rollout in group]
    kept = [
        (number, rollout, reward)
        for number, group in enumerate(rollouts)
        for rollout in group
        if (reward := reward_of(rollout, engine.tags, config)) is not None
    ]
    rewards = [reward for _, _, reward in kept]
    labels = [number for number, _, _ in kept]
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
    for (number, rollout, _), advantage in zip(kept, batch_std(rewards, labels), strict=True):
        groups[number].append(sampled_example(rollout.trajectory, advantage))
    return rl.Collected([group for group in groups if group], metrics)


def reward_of(rollout: Rollout, tags: TagIds, config: PapoConfig) -> float | None:
    """The reward of one answer; None leaves it out."""
    trajectory = rollout.trajectory
    if is_whole(trajectory, tags, config.engine.max_depth):
        return papo_reward(rollout.correct)
    # What the engine had no room for says nothing about the policy.
    policy = trajectory.finish_reason not in ("pages_exhausted", "aborted")
    return MALFORMED_REWARD if policy and config.malformed == "penalty" else None


def is_whole(trajectory: Trajectory, tags: TagIds, max_depth: int) -> bool:
    """The structural filter: the answer came to its own end, and is a tree."""
    if trajectory.finish_reason != "stop":
        return False
    try:
        parse(trajectory.token_ids, trajectory.prompt_len, tags, max_depth=max_depth)
    except TraceError:
        return False
    return True
