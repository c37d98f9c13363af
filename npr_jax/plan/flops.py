"""FLOPs of training, counted by hand: a compiler's own analysis counts a scanned layer once."""

from npr_jax.model import ModelConfig, num_params


def train_flops(config: ModelConfig, rows: int, row_len: int) -> float:
    """FLOPs of a forward and backward pass over rows in which nothing is hidden; layers that are
    computed again (remat) count again."""
    tokens, c = rows * row_len, config
    table = c.padded_vocab_size * c.hidden_size
    layers = num_params(c) - table * (1 if c.tie_word_embeddings else 2)
    matrices = 2 * layers * tokens
    attention = 2 * c.num_layers * c.num_heads * c.head_dim * tokens * row_len  # causal: half
    again = 1 if c.remat == "full" else 0  # "dots" keeps what costs
    return (3 + again) * (matrices + attention) + 3 * 2 * table * tokens  # logits: never again
