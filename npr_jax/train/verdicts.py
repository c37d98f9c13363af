"""Examples from which a model learns the verdicts of its step head (evaluate/verdicts.py)."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from npr_jax.evaluate.steps import Label, LabelBranches, label_blocks
from npr_jax.evaluate.verdicts import closed, with_leaves
from npr_jax.train.packing import Example
from npr_jax.tree import TagIds


def with_verdicts(
    example: Example, labels: Sequence[Sequence[Label]], words: tuple[int, int]
) -> Example:
    """An example with a verdict on each of its branches, as tokens behind it that count in the
    loss like any other; of the first tokens nothing changes.

    Args:
      labels: for each block those of its branches; None has no verdict.
      words: ids of right and of wrong (`evaluate.verdicts.word_ids`).

    Raises ValueError for labels of other blocks than the example's layout has.
    """
    ends = closed(example.layout)
    if [*map(len, ends)] != [*map(len, labels)]:
        raise ValueError(
            f"labels are of blocks with {[*map(len, labels)]} branches, the layout has joined "
            f"{[*map(len, ends)]}"
        )
    told = [
        (end, words[0] if right else words[1])
        for block, own in zip(ends, labels, strict=True)
        for end, right in zip(block, own, strict=True)
        if right is not None
    ]
    zeros = np.zeros(len(told), np.float32)
    return dataclasses.replace(
        example,
        token_ids=np.concatenate([example.token_ids, np.array([x for _, x in told], np.int32)]),
        layout=with_leaves(example.layout, [end for end, _ in told]),
        loss_mask=np.concatenate([example.loss_mask, np.ones(len(told), bool)]),
        advantage=np.concatenate([np.asarray(example.advantage), zeros]),
        old_logp=np.concatenate([np.asarray(example.old_logp), zeros]),
    )


def judged(
    examples: Sequence[Example],
    problems: Sequence[str],
    label: LabelBranches,
    words: tuple[int, int],
    tags: TagIds,
) -> list[Example]:
    """The examples with their verdicts; `problems`: the text that each of them answers."""
    labels = [
        label_blocks(label, problem, example.token_ids, example.layout, tags)
        for example, problem in zip(examples, problems, strict=True)
    ]
    return [with_verdicts(*both, words) for both in zip(examples, labels, strict=True)]
