"""Rewards of the two reinforcement-learning stages.

Zero keeps one order whatever else changes: malformed < wrong < right. Where a mild defect pays more
than a well-formed wrong answer, a policy learns to break the format instead of to reason.
"""

from collections.abc import Sequence
from typing import Literal, get_args

from npr_jax.tree.format import Violation

Rule = Literal["ordered", "paper", "accuracy"]
RULES = get_args(Rule)
RIGHT, WRONG = 1.0, -1.0
MILD = 0.1  # severity of a defect of a whole tree; several add up to at most MOST_MILD
MOST_MILD = 0.4
TREE_LATE, TREE_EARLY = 0.45, 0.95  # no tree: depends on where that shows
NO_BLOCK = 1.0
_MARGIN = MILD / 2  # overlong shaping stays this far from the rewards of the class below


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
    share = 1.0 - critical_path / tokens if tokens else 0.0
    return RIGHT + acceleration * min(share, acceleration_cap)
