"""What a dense Qwen3-, Llama- or Qwen2-shaped model is: sizes, switches, presets."""

import dataclasses

ATTENTION = ("", "blockwise", "dense", "pallas")
REMAT = ("none", "full", "dots")
VOCAB_MULTIPLE = (
    128  # rows of the embedding: the lane width of a TPU, and divisible by any mesh axis
)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Architecture and numerics of one model; hashable, a static argument of compiled functions.

    Attributes:
      model_type: "qwen3", "llama" or "qwen2", as in config.json.
      vocab_size: ids that exist; padded_vocab_size: rows of the embedding, of which those beyond
        vocab_size are never sampled and never exported.
      hidden_size, num_layers, num_heads, num_kv_heads, head_dim, intermediate_size: sizes.
      rope_theta, rms_norm_eps, max_position_embeddings: of the positions and norms.
      tie_word_embeddings: the head is the embedding.
      qk_norm, attention_bias: Qwen3 has the norms, Qwen2 the biases of q, k and v.
      eos_token_ids: end an answer.
      attention: "blockwise", "pallas" (kernels for TPU and GPU), "dense" (the oracle) or "" (what
        suits the platform); attention_block: queries and keys per block of "blockwise".
      remat: "none", "full" (a layer keeps its input) or "dots" (and its matrix products and what
        attention needs).
      logp_chunk: tokens whose logits exist at one time.
      init_*: standard deviations and gains of a random initialisation.
    """

    model_type: str
    vocab_size: int
    padded_vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    rope_theta: float
    rms_norm_eps: float
    tie_word_embeddings: bool
    qk_norm: bool
    attention_bias: bool
    max_position_embeddings: int
    eos_token_ids: tuple[int, ...]
    attention: str = ""
    attention_block: int = 128
    remat: str = "none"
    logp_chunk: int = 1024
    init_embed_std: float = 0.02
    init_qk_gain: float = 1.0
    init_out_scale: float = 1.0

    def __post_init__(self):
        checks = (
            ("model_type", self.model_type in MODEL_TYPES, f"one of {', '.join(MODEL_TYPES)}"),
            ("attention", self.attention in ATTENTION, f"one of {ATTENTION}"),
            ("remat", self.remat in REMAT, f"one of {', '.join(REMAT)}"),
            (
                "padded_vocab_size",
                self.padded_vocab_size >= self.vocab_size,
                f"at least vocab_size={self.vocab_size}",
            ),
            (
                "num_heads",
                self.num_kv_heads > 0 and self.num_heads % self.num_kv_heads == 0,
                f"a multiple of num_kv_heads={self.num_kv_heads}",
            ),
            ("head_dim", self.head_dim > 0 and self.head_dim % 2 == 0, "even and above 0"),
            ("logp_chunk", self.logp_chunk > 0, "above 0"),
            ("attention_block", self.attention_block > 0, "above 0"),
        )
        for name, good, need in checks:
            if not good:
                raise ValueError(f"{name} is {getattr(self, name)!r}, needed is {need}")

    @classmethod
    def from_hf(cls, hf: dict, **changes) -> "ModelConfig":
        """From the dict of a Hugging Face config.json; `changes` override fields.

        Raises:
          ValueError: a field of the architecture is missing, or asks for what is not supported.
        """
        kind = _need(hf, "model_type")
        if kind not in MODEL_TYPES:
            raise ValueError(f"model_type is {kind!r}, supported are {', '.join(MODEL_TYPES)}")
        if hf.get("hidden_act", "silu") != "silu":
            raise ValueError(f"hidden_act is {hf['hidden_act']!r}, supported is 'silu'")
        layers = _need(hf, "num_hidden_layers")
        windowed = "sliding_attention" in (hf.get("layer_types") or ())
        if windowed or (hf.get("use_sliding_window") and hf.get("sliding_window")):
            raise ValueError("sliding-window attention is not supported (use_sliding_window)")
        if hf.get("mlp_bias"):
            raise ValueError("mlp_bias is true, supported is false")
        if kind != "qwen2" and hf.get("attention_bias") and kind == "llama":
            raise ValueError("attention_bias of Llama also biases the output, not supported")
        heads = _need(hf, "num_attention_heads")
        if kind == "qwen3":
            head_dim, bias = _need(hf, "head_dim"), _need(hf, "attention_bias")
            if bias:
                raise ValueError("attention_bias of Qwen3 also biases the output, not supported")
        else:  # by definition hidden / heads where the file has none
            head_dim = hf.get("head_dim") or _need(hf, "hidden_size") // heads
            bias = kind == "qwen2"
        vocab = _need(hf, "vocab_size")
        eos = hf.get("eos_token_id")
        fields = dict(
            model_type=kind,
            vocab_size=vocab,
            padded_vocab_size=pad_vocab(vocab),
            hidden_size=_need(hf, "hidden_size"),
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=_need(hf, "num_key_value_heads"),
            head_dim=head_dim,
            intermediate_size=_need(hf, "intermediate_size"),
            rope_theta=_rope_theta(hf),
            rms_norm_eps=_need(hf, "rms_norm_eps"),
            # transformers leaves this field out of the file where it has its default, false
            tie_word_embeddings=hf.get("tie_word_embeddings", False),
            qk_norm=kind == "qwen3",
            attention_bias=bias,
            max_position_embeddings=_need(hf, "max_position_embeddings"),
            eos_token_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
        )
        return cls(**(fields | changes))

    def to_hf(self, dtype: str = "float32") -> dict:
        """The dict of a config.json that transformers loads."""
        eos = list(self.eos_token_ids)
        hf = {
            "architectures": [MODEL_TYPES[self.model_type]],
            "model_type": self.model_type,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "intermediate_size": self.intermediate_size,
            "hidden_act": "silu",
            "rope_theta": self.rope_theta,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
            "rms_norm_eps": self.rms_norm_eps,
            "tie_word_embeddings": self.tie_word_embeddings,
            "max_position_embeddings": self.max_position_embeddings,
            "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
            "dtype": dtype,
        }
        if self.model_type != "qwen2":
            hf["attention_bias"] = self.attention_bias
        return hf


MODEL_TYPES = {
    "qwen3": "Qwen3ForCausalLM",
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
}


def pad_vocab(size: int) -> int:
    """The next multiple of VOCAB_MULTIPLE."""
    return -(-size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def _need(hf: dict, name: str):
    if hf.get(name) is None:
        raise ValueError(f"config.json has no {name!r}; architecture fields have no defaults")
    return hf[name]


def _rope_theta(hf: dict) -> float:
    """rope_theta from the top level (old files) or from rope_parameters (transformers 5)."""
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ValueError(f"rope type is {kind!r}, supported is 'default'")
    found = {float(x) for x in (rope.get("rope_theta"), hf.get("rope_theta")) if x is not None}
    if len(found) != 1:
        raise ValueError(
            f"config.json gives {len(found)} values of rope_theta {sorted(found)}, needed is one "
            "(rope_theta or rope_parameters.rope_theta)"
        )
    return found.pop()


def _qwen3(hidden, layers, heads, ffn, tied, kv_heads=8, **changes) -> ModelConfig:
    fields = dict(
        model_type="qwen3",
        vocab_size=151936,
        padded_vocab_size=151936,
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=128,
        intermediate_size=ffn,
        rope_theta=1e6,
        rms_norm_eps=1e-6,
        tie_word_embeddings=tied,
        qk_norm=True,
        attention_bias=False,
        max_position_embeddings=40960,
        eos_token_ids=(151645, 151643),
        remat="full",
    )
    return ModelConfig(**(fields | changes))


PRESETS = {
    "qwen3-0.6b": _qwen3(1024, 28, 16, 3072, True),
    "qwen3-1.7b": _qwen3(2048, 28, 16, 6144, True),
    "qwen3-4b": _qwen3(2560, 36, 32, 9728, True),
    "qwen3-4b-instruct-2507": _qwen3(
        2560, 36, 32, 9728, True, rope_theta=5e6, max_position_embeddings=262144
    ),
    "qwen3-8b": _qwen3(4096, 36, 32, 12288, False),
    "qwen3-14b": _qwen3(5120, 40, 40, 17408, False),
    "qwen3-32b": _qwen3(5120, 64, 64, 25600, False),
    # The demo's model; without its init values it learns several times slower.
    "tiny": _qwen3(
        96,
        3,
        4,
        192,
        True,
        kv_heads=2,
        vocab_size=39,  # len(demo_tokenizer())
        padded_vocab_size=128,
        head_dim=24,
        rope_theta=1e4,
        max_position_embeddings=2048,
        eos_token_ids=(2,),
        remat="none",
        init_embed_std=0.2,
        init_qk_gain=2**0.5,
        init_out_scale=0.3,
    ),
}
