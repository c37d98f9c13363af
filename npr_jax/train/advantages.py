"""Advantages of rollouts, on the host in float64.

A group is the rollouts of one prompt; group labels are any values that numpy can sort. The three
functions that compare rollouts subtract the group's mean, and differ in what they divide by. A
group that says nothing (one rollout, or equal rewards) gets exactly 0. `branch_credit` compares the
branches of one rollout.
"""

from collections.abc import Hashable, Sequence

import numpy as np

from npr_jax.tree import TreeLayout

EPSILON = 1e-6  # added to the standard deviation, as in the released code


def group_std(rewards: Sequence[float], groups: Sequence[Hashable]) -> np.ndarray:
    """(r - group mean) / (group std + 1e-6), std with ddof 1: DAPO's advantage, eq. 1.

    Args:
      rewards: [B] finite numbers.
      groups: [B] labels; equal labels need not be adjacent.

    Returns:
      f64[B], without NaN. Raises ValueError for wrong shapes or rewards that are not finite.
    """
    checked, index = _check(rewards, groups)
    centered, sizes = _center(checked, index)
    variance = np.bincount(index, centered**2) / np.maximum(sizes - 1, 1)
    return centered / (np.sqrt(variance)[index] + EPSILON)


def batch_std(rewards: Sequence[float], groups: Sequence[Hashable]) -> np.ndarray:
    """(r - group mean) / (std of all rewards + 1e-6): PAPO's advantage, arXiv 2512.07461 eq. 5.

    The std is that of the whole batch with ddof 1, taken once, singleton groups included. Fewer
    than two rewards give zeros. Arguments, result and errors are those of `group_std`.
    """
    checked, index = _check(rewards, groups)
    centered, _ = _center(checked, index)
    if len(checked) < 2:
        return centered
    return centered / (np.std(checked, ddof=1) + EPSILON)


def mean(rewards: Sequence[float], groups: Sequence[Hashable]) -> np.ndarray:
    """r - group mean: ThreadWeaver's P-GRPO, arXiv 2512.07843 eq. 6, divided by nothing.

    Where all of a group are right, what is left is a small term such as that of the acceleration,
    which `group_std` would make as loud as right and wrong. Arguments, result and errors are those
    of `group_std`.
    """
    return _center(*_check(rewards, groups))[0]


def branch_credit(tree: TreeLayout, labels: Sequence[Sequence[bool | None]]) -> np.ndarray:
    """What the tokens of an answer get for the branches that they are in, f64[T].

    A branch's credit is its label, 1 for right and -1 for wrong (SPARE, arXiv 2506.15498), less the
    mean label of its siblings, which are the other branches of its block: so the branches of a
    block get 0 together. A token gets the sum over all branches around it, and outside of branches
    0. A block of one branch, or with a label that is None, adds nothing.

    Args:
      tree: T tokens.
      labels: for each block of `tree` those of its branches.
    """
    credit = np.zeros(len(tree))
    for block, own in zip(tree.blocks, labels, strict=True):
        if not differ([own]):
            continue  # equal labels would leave 0, too
        values = np.array([1.0 if right else -1.0 for right in own])
        siblings = (values.sum() - values) / (len(own) - 1)
        for (start, end), value in zip(block.branches, values - siblings, strict=True):
            credit[start:end] += value
    return credit


def differ(labels: Sequence[Sequence[bool | None]]) -> bool:
    """Whether `branch_credit` tells branches apart: in a block all are known, and not all equal."""
    return any(None not in own and len(set(own)) > 1 for own in labels)


def _check(rewards, groups) -> tuple[np.ndarray, np.ndarray]:
    """Rewards as f64[B] and each one's group number i64[B]."""
    rewards, groups = np.asarray(rewards, np.float64), np.asarray(groups)
    if rewards.ndim != 1 or rewards.shape != groups.shape:
        raise ValueError(
            f"rewards and groups need the same shape [B], got {rewards.shape} and {groups.shape}"
        )
    # The bound keeps sums of squares finite; NaN fails the comparison too.
    bad = np.flatnonzero(~(np.abs(rewards) < 1e100))
    if bad.size:
        raise ValueError(
            f"rewards need to be finite and below 1e100 in size, got {rewards[bad[0]]} at index "
            f"{bad[0]}"
        )
    return rewards, np.unique(groups, return_inverse=True)[1]


def _center(rewards: np.ndarray, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """r - group mean f64[B], exactly 0 in groups without variance; and the sizes of the groups."""
    sizes = np.bincount(index)
    centered = rewards - (np.bincount(index, rewards) / sizes)[index]
    low, high = np.full(len(sizes), np.inf), np.full(len(sizes), -np.inf)
    np.minimum.at(low, index, rewards)
    np.maximum.at(high, index, rewards)
    # The mean of equal numbers may differ from them in the last bit; 1e-6 would magnify that.
    return np.where((low == high)[index], 0.0, centered), sizes
