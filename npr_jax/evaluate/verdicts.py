"""A step head: what the model says of each branch right behind its `</step>`, right or wrong.

In a tree nothing is sampled from the output at `</step>`: what follows is predicted by
`</guideline>`, or forced. So that output can learn a verdict, one of two words of the vocabulary,
and needs no parameters of its own (the step model of SPARE, arXiv 2506.15498 eq. 1, whose rare
end-of-step token is `</step>` here). A verdict is a leaf: a token behind the answer that `</step>`
predicts, and that predicts nothing.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from npr_jax.evaluate.likelihood import Likelihood
from npr_jax.model.pretrained import Model
from npr_jax.tree import TreeLayout


def word_ids(tokenizer, words: Sequence[str]) -> tuple[int, int]:
    """The ids of the two words, that for right first; ValueError where they are not two different
    tokens, one each."""
    found = [tokenizer.encode(word, add_special_tokens=False) for word in words]
    if len(found) != 2 or {*map(len, found)} != {1} or found[0] == found[1]:
        raise ValueError(
            f"step_words is {list(words)!r:.60}, of {[*map(len, found)]} tokens, needed are two "
            "different words that are one token each, such as '+' and '-'"
        )
    return found[0][0], found[1][0]


def closed(tree: TreeLayout) -> list[list[int]]:
    """The index of each branch's `</step>`, block by block; [] of a block that has not joined."""
    return [[end - 1 for _, end in block.steps] if block.takeaway else [] for block in tree.blocks]


def with_leaves(tree: TreeLayout, after: Sequence[int]) -> TreeLayout:
    """The layout of T + len(after) tokens: leaf i is predicted by token after[i].

    No token that predicts another sees a leaf, for they stand at the end: so the log-probs of the
    first T tokens are as before.
    """
    ends = np.asarray(after, np.int32)

    def longer(values: np.ndarray, more: np.ndarray) -> np.ndarray:
        return np.concatenate([values, more.astype(values.dtype)])

    return dataclasses.replace(
        tree,
        positions=longer(tree.positions, tree.positions[ends] + 1),
        hidden=longer(tree.hidden, np.zeros((len(ends), *tree.hidden.shape[1:]))),
        pred=longer(tree.pred, ends),
        forced=longer(tree.forced, np.zeros(len(ends))),
    )


class StepHead:
    """Scores the branches of answers, `rows` answers together, by a model that has learnt verdicts
    (`train.verdicts`)."""

    def __init__(self, model: Model, words: Sequence[str], rows: int = 8):
        self._logp, self.ids = Likelihood(model, rows), word_ids(model.tokenizer, words)

    def scores(
        self, answers: Sequence[tuple[Sequence[int] | np.ndarray, TreeLayout]]
    ) -> list[list[list[float]]]:
        """Of answers (ids, layout) the chance that each branch is right, block by block: a softmax
        over the two words. A block that has not joined has none."""
        known, asked = [closed(tree) for _, tree in answers], []
        for (ids, tree), blocks in zip(answers, known, strict=True):
            ends = [index for own in blocks for index in own]
            leaves = np.repeat(self.ids, len(ends))
            asked.append((np.concatenate([ids, leaves]), with_leaves(tree, [*ends, *ends])))
        found = []
        for logp, (ids, _), blocks in zip(self._logp(asked), answers, known, strict=True):
            right, wrong = logp[len(ids) :].astype(np.float64).reshape(2, -1)
            scores = iter(np.exp(right - np.logaddexp(right, wrong)).tolist())
            found.append([[next(scores) for _ in own] for own in blocks])
        return found


def answer_score(scores: Sequence[Sequence[float]]) -> float:
    """The score of an answer, the product over its branches: it is right if all of them are.

    SPARE takes the last step's, which has seen the others; branches have not. 1 without branches.
    """
    return math.prod(score for own in scores for score in own)
