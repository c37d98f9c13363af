"""The log-probs that a model gives to the tokens of texts that are there, under their layouts."""

import functools
from collections.abc import Sequence

import jax
import numpy as np

from npr_jax.model import token_logp
from npr_jax.model.pretrained import Model
from npr_jax.tree import TreeLayout, pack


class Likelihood:
    """Scores texts, `rows` of them together, the short ones first; lengths and depths are rounded
    up to powers of two, so that few shapes are compiled."""

    def __init__(self, model: Model, rows: int):
        self._params, self._rows = model.params, rows
        self._logp = jax.jit(functools.partial(token_logp, model.config))

    def __call__(
        self, asked: Sequence[tuple[Sequence[int] | np.ndarray, TreeLayout]]
    ) -> list[np.ndarray]:
        """The log-probs f32[T] of T ids under a layout, of each that is asked for."""
        found: list[np.ndarray] = [np.zeros(0)] * len(asked)
        order = sorted(range(len(asked)), key=lambda i: len(asked[i][1]))
        for begin in range(0, len(order), self._rows):
            some = order[begin : begin + self._rows]
            length = _rounded(len(asked[some[-1]][1]))
            trees = [pack([asked[i][1]], length) for i in some]
            trees += [pack([], length)] * (self._rows - len(some))
            depth = _rounded(max(tree.hidden.shape[1] for tree in trees))
            tokens = np.zeros((self._rows, length), np.int32)
            hidden = np.zeros((self._rows, length, depth, 2), np.int32)
            for row, tree in enumerate(trees):
                hidden[row, :, : tree.hidden.shape[1]] = tree.hidden
            for row, i in enumerate(some):
                tokens[row, : len(asked[i][1])] = asked[i][0]
            positions, pred = (
                np.stack([getattr(tree, name) for tree in trees]) for name in ("positions", "pred")
            )
            logp = np.asarray(self._logp(self._params, tokens, positions, hidden, pred))
            for row, i in enumerate(some):
                found[i] = logp[row, : len(asked[i][1])]
        return found


def _rounded(size: int) -> int:
    """The next power of two."""
    return 1 << (size - 1).bit_length()
