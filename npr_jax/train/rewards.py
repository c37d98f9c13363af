"""Rewards of the two reinforcement-learning stages.

Zero keeps one order whatever else changes: malformed < wrong < right. Where a mild defect pays more
than a well-formed wrong answer, a policy learns to break the format instead of to reason.
"""

from collections.abc import Hashable, Sequence
from typing import Literal, get_args

import numpy as np

from npr_jax.tree.format import Violation

Rule = Literal["ordered", "paper", "accuracy"]
RULES = get_args(Rule)
RIGHT, WRONG = 1.0, -1.0
MILD = 0.1  # severity of a defect of a whole tree; several add up to at most MOST_MILD
MOST_MILD = 0.4
TREE_LATE, TREE_EARLY = 0.45, 0.95  # no tree: depends on where that shows
NO_BLOCK = 1.0
_MARGIN = MILD / 2  # overlong shaping stays this far from the rewards of the class below
WINDOW, TIERED = 10, 2  # steps of a period of `alternating_reward`; the last of these are tiered
BLOCK_BONUS = 0.2
LEAST_STD = 1e-8  # of a share within a group, which says nothing where it is less spread


def severity(violations: Sequence[Violation], prompt_len: int, num_tokens: int) -> float:
    """How badly a response breaks the format, in [0, 1]; 0 only without a violation.

    A response that is no tree is worse the earlier this shows, and worse than any tree with
    defects; one without a block is worst. `num_tokens` counts prompt and response.
    """
    worst = 0.0
    for violation in violations:
        if violation.kind == "no_block":
            worst = max(worst, NO_BLOCK)
        elif violation.kind == "tree":
            left = (num_tokens - violation.index) / max(1, num_tokens - prompt_len)
            worst = max(worst, TREE_LATE + (TREE_EARLY - TREE_LATE) * min(1.0, max(0.0, left)))
    return max(worst, min(MOST_MILD, MILD * len(violations)))


def format_penalty(violations: Sequence[Violation], prompt_len: int, num_tokens: int) -> float:
    """0 for a response that keeps the format, else a graded penalty in [-2, -1)."""
    bad = severity(violations, prompt_len, num_tokens)
    return -1.0 - bad if bad else 0.0


def zero_reward(
    violations: Sequence[Violation],
    correct: bool,
    prompt_len: int,
    num_tokens: int,
    rule: str = "ordered",
    max_tokens: int = 0,
    overlong_buffer: int = 0,
    overlong_penalty: float = 1.0,
) -> float:
    """Reward of a sequential response in stage 1.

    Args:
      violations: what `check_format` found.
      correct: whether its answer equals the reference.
      prompt_len, num_tokens: tokens of the prompt, and of prompt and response.
      rule: "ordered": right 1, wrong -1, malformed `format_penalty`, in [-2, -1). "paper", the
        literal rule of arXiv 2512.07461: malformed -2 times `severity`, in [-2, 0), else ±1; a
        mild defect then pays more than a wrong answer. "accuracy": ±1 whatever the format, as in
        the released code.
      max_tokens, overlong_buffer, overlong_penalty: a response that enters the last
        `overlong_buffer` of `max_tokens` response tokens loses up to `overlong_penalty`, linearly
        (DAPO, arXiv 2503.14476). 0 switches it off. Under "ordered" only well-formed responses lose
        anything, and never so much that the order malformed < wrong < right breaks.

    Raises ValueError for an unknown rule.
    """
    if rule not in RULES:
        raise ValueError(f"reward rule is {rule!r}, needed is one of {RULES}")
    overlong = 0.0
    if overlong_buffer > 0:
        into = num_tokens - prompt_len - (max_tokens - overlong_buffer)
        overlong = overlong_penalty * min(1.0, max(0.0, into / overlong_buffer))
    base = RIGHT if correct else WRONG
    if rule == "accuracy":
        return base - overlong
    if rule == "paper":
        bad = severity(violations, prompt_len, num_tokens)
        return (-2.0 * bad if bad else base) - overlong
    if violations:
        return format_penalty(violations, prompt_len, num_tokens)
    floor = WRONG + _MARGIN if correct else WRONG - _MARGIN
    return max(base - overlong, floor)


def papo_reward(
    correct: bool,
    tokens: int = 0,
    critical_path: int = 0,
    acceleration: float = 0.0,
    acceleration_cap: float = 1.0,
) -> float:
    """Reward of a whole tree in stage 3: accuracy, ±1, and on request a little for going parallel.

    Args:
      tokens, critical_path: of the response; their difference was decoded beside the longest path.
      acceleration: weight of the share of tokens off the critical path, which counts up to
        `acceleration_cap` and for right answers only (as in ThreadWeaver): else
        a policy would learn to split what is wrong.
    """
    if not correct:
        return WRONG
    return RIGHT + acceleration * min(off_path(tokens, critical_path), acceleration_cap)


def off_path(tokens: int, critical_path: int) -> float:
    """The share of a response's tokens that are off its critical path."""
    return 1.0 - critical_path / tokens if tokens else 0.0


def annealed(weight: float, step: int, until: int) -> float:
    """A weight at a step, from 1: it falls linearly, and is 0 after `until` steps; 0 keeps it.

    The auxiliary rewards of PARL (Kimi K2.5) end so; along which curve is not published.
    """
    return weight * max(0.0, 1.0 - (step - 1) / until) if until else weight


def alternating_reward(
    step: int, correct: bool, formed: bool, has_block: bool, until: int = 0
) -> float:
    """Reward of a whole tree under Parallel-R1's schedule (arXiv 2509.07980, S2).

    Of every ten steps eight pay accuracy, ±1. The last two are tiered: a right answer earns 1.2
    where it has blocks and keeps the format, 1 where it has no block, and any other answer -1.

    Args:
      step: of the run, from 1, and the only clock.
      formed: whether it keeps the format, which needs a block; has_block: whether it has written
        one, well-formed or not.
      until: after so many steps accuracy is all that counts (the scaffold); 0: never.
    """
    if not correct:
        return WRONG
    if (until and step > until) or (step - 1) % WINDOW < WINDOW - TIERED or not has_block:
        return RIGHT
    return RIGHT + BLOCK_BONUS if formed else WRONG


def add_structure(
    rewards: Sequence[float],
    groups: Sequence[Hashable],
    shares: Sequence[Sequence[float]],
    weights: Sequence[float],
) -> list[float]:
    """Rewards of whole trees with PA-GRPO's structure bonuses (Parason, arXiv 2608.24658).

    A right answer, which is one whose reward is above that of a wrong one, gets each of its shares
    as a z-score times a weight: less the mean of its group, by the group's std (ddof 0). The group
    is all of its answers in `rewards`, wrong ones too. Where the std is at most 1e-8, z is 0.

    Args:
      rewards: [B]; groups: [B] labels.
      shares: [B, K]; weights: [K].
    """
    found, labels, table = np.array(rewards, float), np.asarray(groups), np.array(shares, float)
    for label in np.unique(labels):
        own = labels == label
        std = table[own].std(axis=0)
        spread = std > LEAST_STD
        z = np.where(spread, (table[own] - table[own].mean(axis=0)) / np.where(spread, std, 1), 0)
        found[own] += np.where(found[own] > WRONG, z @ np.array(weights), 0.0)
    return found.tolist()
