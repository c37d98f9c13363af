"""FLOPs of training, counted by hand: a compiler's own analysis counts a layer that is scanned
once, however many there are, and knows nothing of what a mask hides."""

import numpy as np

from npr_jax.model.config import ModelConfig
from npr_jax.model.lora import plain
from npr_jax.model.params import num_params


def train_flops(config: ModelConfig, rows: int, row_len: int) -> float:
    """FLOPs of a forward and backward pass over rows in which nothing is hidden; layers that are
    computed again (remat) count again."""
    tokens = rows * row_len
    return work_flops(config, tokens, tokens * row_len / 2)


def work_flops(config: ModelConfig, tokens: int, pairs: float) -> float:
    """FLOPs of a forward and backward pass over `tokens` that see `pairs` keys together; layers
    that are computed again (remat) count again. Weights beside adapters are frozen, and have no
    gradient."""
    c = config
    table = c.padded_vocab_size * c.hidden_size
    other = 0 if c.tie_word_embeddings else table  # rows that are looked up
    layers = num_params(c) - table - other
    frozen = num_params(plain(c)) - other if c.lora else 0
    matrices = 2 * layers * tokens
    attention = 4 * c.num_layers * c.num_heads * c.head_dim * pairs
    again = 1 if c.remat == "full" else 0  # "dots" keeps what costs
    logits = 3 * 2 * table * tokens  # never again
    return (3 + again) * (matrices + attention) + logits - 2 * frozen * tokens


def row_work(hidden: np.ndarray, pred: np.ndarray) -> tuple[int, int]:
    """Tokens of a row, but for those that fill it up, and the keys that they see together.

    Args:
      hidden: i32[T, D, 2], the intervals of queries that do not see the token; pred: i32[T], the
        index of the token that predicts it, or -1. The last token of a row's texts has one.
    """
    predicted = np.flatnonzero(pred >= 0)
    tokens = int(predicted[-1]) + 1 if len(predicted) else 0
    after = np.arange(tokens) + 1
    begins = np.clip(hidden[:tokens, :, 0], after[:, None], tokens)
    ends = np.clip(hidden[:tokens, :, 1], after[:, None], tokens)
    order = np.argsort(begins, axis=1)
    begins, ends = np.take_along_axis(begins, order, 1), np.take_along_axis(ends, order, 1)
    unseen, reached = np.zeros(tokens, np.int64), after
    for depth in range(hidden.shape[1]):  # intervals may lie in each other
        unseen += np.maximum(0, ends[:, depth] - np.maximum(begins[:, depth], reached))
        reached = np.maximum(reached, ends[:, depth])
    return tokens, int((tokens - after + 1).sum() - unseen.sum())
