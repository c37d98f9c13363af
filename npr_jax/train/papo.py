"""Stage 3, PAPO: reinforcement learning on native parallel rollouts.

arXiv 2512.07461 eq. 5 and 6. The engine forks and joins for real; the trainer lays the same tokens
out as the engine did. An answer that is no whole tree is filtered, or penalised if the config says
so; the others are rewarded by accuracy alone. No clip, no importance weights: one optimizer step
per batch is on-policy.
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np

from npr_jax.base.fields import CountOrZero, PositiveOrZero, Share
from npr_jax.decode import Engine, SamplingParams, Trajectory
from npr_jax.evaluate.judge import Answer
from npr_jax.evaluate.steps import Label, find_labels, label_blocks
from npr_jax.runs.log import Report
from npr_jax.train import policy, rl
from npr_jax.train.advantages import batch_std, branch_credit, differ, group_std, mean
from npr_jax.train.ask import ask
from npr_jax.train.objective import Objective
from npr_jax.train.packing import Example
from npr_jax.train.rewards import (
    RIGHT,
    WRONG,
    add_structure,
    alternating_reward,
    annealed,
    off_path,
    papo_reward,
)
from npr_jax.train.rollout import (
    NOTHING_ENDED,
    PAPO,
    first_of,
    of_all,
    sampled_example,
    summary,
)
from npr_jax.tree import TagIds, TraceError, parse
from npr_jax.tree.parse import reference_depth

ADVANTAGES = {"batch_std": batch_std, "group_std": group_std, "mean": mean}
MALFORMED_REWARD = -2.0  # below WRONG


@dataclasses.dataclass(frozen=True, kw_only=True)
class PapoConfig(rl.RLConfig):
    """Config of stage 3, beside what `RLConfig` has.

    Attributes:
      malformed: what happens to answers that are no whole tree. "filter" leaves them out, as the
        paper does; nothing then holds the policy back from writing more of them. "penalty" gives
        them a reward below that of a wrong answer.
      acceleration: weight of the reward of a right answer for its share of tokens off the critical
        path (`rewards.papo_reward`); 0 is the paper's.
      acceleration_cap: up to which this share counts.
      acceleration_until (steps): in which that weight falls linearly to 0, as in PARL; 0 keeps it.
      parallel_bonus: weight of a right answer's share of tokens in parallel branches, as a z-score
        within its group (`rewards.add_structure`, as in Parason); 0 is off.
      acceleration_bonus: the same for its share of tokens off the critical path.
      schedule: "accuracy" pays the same at every step; "alternating" pays in the last two of every
        ten more for blocks that keep the format (`rewards.alternating_reward`, as in Parallel-R1).
      schedule_until (steps): after which "alternating" pays accuracy alone; 0: never.
      advantage: "batch_std" is the paper's, "group_std" DAPO's; "mean" divides by no std, as
        ThreadWeaver, whose reward is `acceleration` 1 with an `acceleration_cap` of 0.4.
      branch_labels: says which branches are right: a Python file (its path ends in .py) or a
        module, with a function label_branches(problem, branches) that gives True, False or None
        (not known) for the text of each (docs/recipe.md); null: nobody does.
      branch_credit: weight of what a branch's tokens get beside the answer's advantage: its label,
        1 or -1, less the mean of its siblings' (`advantages.branch_credit`); 0 is off.
      objective: "papo" is the paper's; "dapo" weighs by importance and clips, which does something
        from the second of several minibatches on.
      train_forced: whether tokens that the engine wrote count in the loss, as in the released code.
        They have no log-prob of the sampler: `logp_gap` then says how surprising they are.
      layout: what answers are trained under. "strict" is what the engine does, "reference" the
        released trainer's masks and positions; answers that it cannot lay out are left out.
    """

    command: ClassVar[str] = "papo"
    parallel: ClassVar[bool] = True

    malformed: Literal["filter", "penalty"] = "filter"
    acceleration: Share = 0.0
    acceleration_cap: Share = 0.5
    acceleration_until: CountOrZero = 0
    parallel_bonus: Share = 0.0
    acceleration_bonus: Share = 0.0
    schedule: Literal["accuracy", "alternating"] = "accuracy"
    schedule_until: CountOrZero = 0
    advantage: Literal["batch_std", "group_std", "mean"] = "batch_std"
    branch_labels: str | None = None
    branch_credit: PositiveOrZero = 0.0
    objective: Literal["papo", "dapo"] = "papo"
    train_forced: bool = False
    layout: Literal["strict", "reference"] = "strict"

    def __post_init__(self):
        super().__post_init__()
        self.engine.check_rows(self.layout)
        if self.layout == "reference" and self.engine.max_depth != 1:
            raise ValueError(
                f"engine.max_depth is {self.engine.max_depth}, needed is 1: layout='reference' has "
                "no nested blocks"
            )
        if self.layout == "reference" and self.train.exact:
            raise ValueError(
                "train.exact is true and layout 'reference', which is not what the engine decodes: "
                "set layout to 'strict', or train.exact to false"
            )
        self._check_rewards()
        if self.branch_labels is not None:
            find_labels(self.branch_labels)
        elif self.branch_credit:
            raise ValueError(
                f"branch_credit is {self.branch_credit} and branch_labels null: nobody says which "
                "branches are right; set branch_labels, or branch_credit to 0"
            )
        if self.branch_credit and (self.carry or self.staleness):
            raise ValueError(
                f"branch_credit is {self.branch_credit}, carry {self.carry} and staleness "
                f"{self.staleness}: together they are not tested; set branch_credit to 0, or the "
                "others"
            )

    def _check_rewards(self) -> None:
        alternating = self.schedule == "alternating"
        for name in ("acceleration", "parallel_bonus", "acceleration_bonus"):
            if alternating and getattr(self, name):
                raise ValueError(
                    f"schedule is 'alternating' and {name} {getattr(self, name)}, needed is "
                    f"{name}=0: what its steps pay is fixed"
                )
        for name, on, needed in (
            ("schedule_until", alternating, "schedule to 'alternating'"),
            ("acceleration_until", self.acceleration, "acceleration above 0"),
        ):
            if getattr(self, name) and not on:
                raise ValueError(
                    f"{name} is {getattr(self, name)}, and there is nothing that it would end: set "
                    f"{needed}, or {name} to 0"
                )
        # No z-score among n numbers is larger in size than the root of n - 1.
        most = (self.parallel_bonus + self.acceleration_bonus) * math.sqrt(self.samples - 1)
        if most >= RIGHT - WRONG:
            raise ValueError(
                f"parallel_bonus is {self.parallel_bonus} and acceleration_bonus "
                f"{self.acceleration_bonus}, needed is a sum below "
                f"{(RIGHT - WRONG) / math.sqrt(self.samples - 1):.3g} for samples={self.samples}: "
                "a right answer could be worth less than a wrong one"
            )
        changing = alternating or self.acceleration_until
        if changing and self.train.keep_best and not self.evaluate:
            raise ValueError(
                "train.keep_best is 1 and the reward changes with the step (schedule, "
                "acceleration_until), so that scores of different steps say nothing of the "
                "weights: set evaluate, or train.keep_best to 0"
            )

    @property
    def depth(self) -> int:
        """Hidden intervals per token of a row: the tree's, and one each for group and row."""
        if self.layout == "reference":
            return reference_depth(self.engine.max_branches) + 2
        return self.engine.rules.intervals(self.engine.max_depth, self.engine.max_blocks) + 2

    @property
    def loss(self) -> Objective:
        older = (self.staleness or self.carry) and self.objective == "papo"
        bound = self.importance_bound if older else 0.0
        return Objective(self.objective, kl=self.kl, importance=bound)


def run(config: PapoConfig, report: Report | None = None) -> Path:
    """Runs the stage, or goes on with it; returns the directory of the trained model.

    `report(metrics)`, if given, is called after every step in place of a progress line.
    """
    return policy.run(config, collect_groups, report)


def collect_groups(engine: Engine, feed: rl.Feed, step: int, config: PapoConfig) -> rl.Collected:
    """Samples one batch, filters it, and gives what is left advantages.

    No groups come back where fewer than two answers are left or all rewards are equal.
    """
    sampling = SamplingParams(
        n=config.samples, max_tokens=config.max_tokens, parallel=config.parallel
    )
    first, seeds = feed.position, (config.seed, PAPO, step)
    answers, places, late, carried = ask(
        engine, feed, config, sampling, seeds, step, config.prompts
    )
    values = {
        key: (
            reward_of(answer, engine.tags, config, step),
            shares_of(answer),
            labels_of(answer, engine.tags, config, feed, places[key[0]]),
        )
        for key, answer in answers.items()
    }
    # Bonuses and advantages are about the answers of all processes.
    everyones = of_all(values)
    if not everyones:
        return rl.Collected([], [], carried | {"skipped_because": NOTHING_ENDED})
    shown = first_of(answers, everyones, places, first)
    groups_given = len({number for number, _ in everyones})
    batch = {key: reward for key, (reward, *_) in everyones.items() if reward is not None}
    rewards, labels = list(batch.values()), [number for number, _ in batch]
    weights = (config.parallel_bonus, config.acceleration_bonus)
    if any(weights) and batch:
        rewards = add_structure(rewards, labels, [everyones[key][1] for key in batch], weights)
    filtered = len(everyones) - len(batch)
    metrics = (
        carried
        | summary(list(answers.values()))
        | {
            # What is left out counts here, or writing no trees would make it better.
            "score": float(np.mean([*rewards, *[MALFORMED_REWARD] * filtered])),
            "filtered": filtered,
            "groups_equal": groups_given
            - sum(
                len({r for r, label in zip(rewards, labels, strict=True) if label == number}) > 1
                for number in set(labels)
            ),
        }
    )
    if config.oversample:
        metrics["groups_late"] = late
    metrics["equal_share"] = metrics["groups_equal"] / groups_given
    if rewards:
        metrics["reward"] = float(np.mean(rewards))
    known = [everyones[key][2] for key in batch]
    if config.branch_labels is not None and batch:
        metrics |= label_metrics(known)
    if len(set(rewards)) < 2 and not (config.branch_credit and any(map(differ, known))):
        metrics["skipped_because"] = (
            f"the rewards of all {len(rewards)} whole trees are equal"
            if rewards
            else f"none of {filtered} answers is a whole tree"
        )
        return rl.Collected([], [], metrics, shown)
    found = ADVANTAGES[config.advantage](rewards, labels)
    groups: dict[int, list[Example]] = {}
    for key, advantage, own in zip(batch, found, known, strict=True):
        if answer := answers.get(key):  # else another process has it
            if config.branch_credit and own:
                credit = branch_credit(answer.trajectory.layout, own)
                advantage = advantage + config.branch_credit * credit
            example = example_of(answer.trajectory, advantage, engine.tags, config)
            groups.setdefault(key[0], []).append(example)
    order = {number: place for place, number in enumerate(sorted(set(labels)))}
    return rl.Collected(list(groups.values()), [order[number] for number in groups], metrics, shown)


def example_of(
    trajectory: Trajectory, advantage: float | np.ndarray, tags: TagIds, config: PapoConfig
) -> Example:
    """What is trained of one answer, and under which layout."""
    example = sampled_example(trajectory, advantage, config.train_forced)
    if config.layout == "reference":
        tree = parse(trajectory.token_ids, trajectory.prompt_len, tags, rule="reference")
        example = dataclasses.replace(example, layout=tree)
    return example


def shares_of(answer: Answer) -> tuple[float, float]:
    """Shares of its tokens that are in parallel branches, and off its critical path, which the
    structure bonuses compare within a group."""
    found = answer.figures
    share = found.parallel_tokens / found.tokens if found.tokens else 0.0
    return share, off_path(found.tokens, found.critical_path)


def labels_of(
    answer: Answer, tags: TagIds, config: PapoConfig, feed: rl.Feed, place: int
) -> list[list[Label]]:
    """Labels of the branches of a whole tree, block by block; none where nobody is asked, or of
    another answer. `place`: of its problem in the feed."""
    if config.branch_labels is None or not is_whole(
        answer.trajectory, tags, config.engine.max_depth
    ):
        return []
    label, problem = find_labels(config.branch_labels), feed.problem(place).problem
    made = answer.trajectory
    return label_blocks(label, problem, made.token_ids, made.layout, tags)


def label_metrics(labels: Sequence[Sequence[Sequence[Label]]]) -> dict[str, float]:
    """Of whole trees with the labels of their branches: the share of trees of which branches are
    told apart, and of the known branches, if there are any, that of right ones."""
    known = [label for tree in labels for own in tree for label in own if label is not None]
    found = {"branches_told_apart": float(np.mean([differ(tree) for tree in labels]))}
    return found | ({"branches_right": float(np.mean(known))} if known else {})


def reward_of(answer: Answer, tags: TagIds, config: PapoConfig, step: int) -> float | None:
    """The reward of one answer at a step, from 1, by itself; None leaves it out."""
    trajectory = answer.trajectory
    if is_whole(trajectory, tags, config.engine.max_depth):
        if config.schedule == "alternating":
            has_block = all(violation.kind != "no_block" for violation in answer.violations)
            formed = not answer.violations
            return alternating_reward(
                step, answer.correct, formed, has_block, config.schedule_until
            )
        return papo_reward(
            answer.correct,
            answer.figures.tokens,
            answer.figures.critical_path,
            annealed(config.acceleration, step, config.acceleration_until),
            config.acceleration_cap,
        )
    # What the engine had no room for says nothing about the policy.
    policy = trajectory.finish_reason not in ("pages_exhausted", "aborted")
    policy = policy and config.layout == "strict"  # the other rule lays out whole trees only
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
