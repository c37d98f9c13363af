"""The models that the benchmarks decode with: random weights, no end of text, synthetic tags."""

import jax

from npr_jax.model import ModelConfig, init_params
from npr_jax.model.pretrained import Model
from npr_jax.tree import TagIds

SHAPES = {
    "tiny": dict(layers=4, hidden=128, heads=4, kv_heads=2, head_dim=32, ffn=384, vocab=512),
    "mid": dict(layers=8, hidden=1024, heads=16, kv_heads=8, head_dim=128, ffn=3072, vocab=32768),
}
# Ids 0..7 are the tags, 8..15 the numbers of steps, 16 is a new line.
NEW_LINE = 16
TAGS = TagIds(
    *range(8),
    whitespace=frozenset({NEW_LINE}),
    step_headers=tuple((NEW_LINE, 4, NEW_LINE, 8 + i) for i in range(8)),
    takeaway_header=(NEW_LINE, 6, NEW_LINE),
    decode=lambda ids: " ".join(map(str, ids)),
)


def make_model(name: str, dtype: str = "float32", max_position: int = 32768) -> Model:
    """A Qwen3-shaped model of `SHAPES`."""
    s = SHAPES[name]
    config = ModelConfig(
        model_type="qwen3",
        vocab_size=s["vocab"],
        padded_vocab_size=s["vocab"],
        hidden_size=s["hidden"],
        num_layers=s["layers"],
        num_heads=s["heads"],
        num_kv_heads=s["kv_heads"],
        head_dim=s["head_dim"],
        intermediate_size=s["ffn"],
        rope_theta=1e6,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        qk_norm=True,
        attention_bias=False,
        max_position_embeddings=max_position,
        eos_token_ids=(),
    )
    params = jax.jit(lambda key: init_params(config, key, dtype))(jax.random.key(0))
    return Model(config, params, None, TAGS)
