"""What a dense Qwen3-, Llama- or Qwen2-shaped model is: sizes, switches, presets."""

import dataclasses
import math
from collections.abc import Mapping
from numbers import Real
from typing import Any, Literal, get_args

from npr_jax.base.fields import Checked, Count, Positive
from npr_jax.model.rope import Yarn, product, read_rope

ATTENTION = ("", "blockwise", "dense", "pallas", "exact")
Remat = Literal["none", "full", "dots"]
REMAT = get_args(Remat)
VOCAB_MULTIPLE = (
    128  # rows of the embedding: the lane width of a TPU, and divisible by any mesh axis
)


# The matrices that may have adapters: their names in Hugging Face's files, and in the parameters.
TARGETS = {
    "q_proj": "wq",
    "k_proj": "wk",
    "v_proj": "wv",
    "o_proj": "wo",
    "gate_proj": "w_gate",
    "up_proj": "w_up",
    "down_proj": "w_down",
}
Target = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclasses.dataclass(frozen=True)
class LoraConfig(Checked):
    """Adapters (LoRA, arXiv 2106.09685): beside a frozen matrix W stand A and B, of which alone is
    trained, and x W becomes x W + alpha / rank * (x A) B.

    Attributes:
      rank: columns of A, and rows of B.
      alpha: what they add counts alpha / rank times.
      targets: the matrices of each layer that have adapters, by their names in Hugging Face's
        files; all others, norms, the embedding with the rows of the tags, and the head are frozen.
    """

    rank: Count = 16
    alpha: Positive = 32.0
    targets: tuple[Target, ...] = get_args(Target)

    def __post_init__(self):
        super().__post_init__()
        if not self.targets or len(set(self.targets)) < len(self.targets):
            raise ValueError(
                f"targets is {list(self.targets)}, needed is one or more of {', '.join(TARGETS)}, "
                "each once"
            )

    @property
    def scale(self) -> float:
        """What the product of A and B is multiplied by."""
        return self.alpha / self.rank


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
      attention: "blockwise", "pallas" (kernels for TPU and GPU), "dense" (the reference) or ""
        (what suits the platform); attention_block: queries and keys per block of "blockwise".
      remat: "none", "full" (a layer keeps its input) or "dots" (and its matrix products and what
        attention needs).
      logp_chunk: tokens whose logits exist at one time.
      init_*: standard deviations and gains of a random initialisation.
      yarn: how positions beyond the original ones are read; it says max_position_embeddings.
      lora: the adapters that the parameters have beside the model's own (model/lora.py), or None.
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
    yarn: Yarn | None = None
    lora: LoraConfig | None = None

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
        if yarn := self.yarn:
            most = yarn.max_position_embeddings
            checks += (
                ("rope_theta", self.rope_theta > 1, "above 1 with yarn"),
                (
                    "max_position_embeddings",
                    self.max_position_embeddings == most,
                    f"{most}: {product(yarn)}",
                ),
            )
        for name, good, need in checks:
            if not good:
                raise ValueError(f"{name} is {getattr(self, name)!r}, needed is {need}")

    @classmethod
    def from_hf(cls, hf: Mapping, **changes) -> "ModelConfig":
        """From the dict of a Hugging Face config.json; `changes` override fields.

        Raises:
          ValueError: a field of the architecture is missing, or asks for what is not supported.
        """
        kind = _need(hf, "model_type")
        if not isinstance(kind, str) or kind not in MODEL_TYPES:
            raise ValueError(f"model_type is {kind!r}, supported are {', '.join(MODEL_TYPES)}")
        layers = _integer(hf, "num_hidden_layers")
        _refuse_variants(hf, kind, layers)
        hidden, heads = _integer(hf, "hidden_size"), _integer(hf, "num_attention_heads")
        if kind == "qwen3" or hf.get("head_dim") is not None:
            head_dim = _integer(hf, "head_dim")
        elif hidden % heads:
            raise ValueError(f"hidden_size={hidden} is no multiple of num_attention_heads={heads}")
        else:  # by definition, where the file has none
            head_dim = hidden // heads
        vocab = _integer(hf, "vocab_size")
        (theta, yarn), positions = _rope(hf), _integer(hf, "max_position_embeddings")
        fields: dict[str, Any] = dict(
            model_type=kind,
            vocab_size=vocab,
            padded_vocab_size=pad_vocab(vocab),
            hidden_size=hidden,
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=_integer(hf, "num_key_value_heads"),
            head_dim=head_dim,
            intermediate_size=_integer(hf, "intermediate_size"),
            rope_theta=theta,
            rms_norm_eps=_number("rms_norm_eps", _need(hf, "rms_norm_eps")),
            # transformers leaves this field out of the file where it has its default, false
            tie_word_embeddings=_switch(hf, "tie_word_embeddings"),
            qk_norm=kind == "qwen3",
            attention_bias=kind == "qwen2",
            max_position_embeddings=yarn.max_position_embeddings if yarn else positions,
            eos_token_ids=eos_ids(hf, vocab),
            yarn=yarn,
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
        if self.yarn:  # by the old name too, or readers that know no other would leave it out
            hf["rope_scaling"] = self.yarn.to_hf()
            hf["rope_parameters"] = hf["rope_scaling"] | {"rope_theta": self.rope_theta}
        return hf


MODEL_TYPES = {
    "qwen3": "Qwen3ForCausalLM",
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
}


def pad_vocab(size: int) -> int:
    """The next multiple of VOCAB_MULTIPLE."""
    return -(-size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


# Sizes are i32 and numbers f32 on a device; a table of tensors is made for all layers.
_MOST, _MOST_LAYERS, _SMALLEST, _LARGEST = 2**31 - 1, 10_000, 1e-30, 1e30


def _need(hf: Mapping, name: str):
    if hf.get(name) is None:
        raise ValueError(f"config.json has no {name!r}; architecture fields have no defaults")
    return hf[name]


def _integer(hf: Mapping, name: str) -> int:
    value = _need(hf, name)
    if type(value) is not int or value < 1:
        raise ValueError(f"{name} is {value!r}, needed is an integer, 1 or more")
    most = _MOST_LAYERS if name == "num_hidden_layers" else _MOST
    if value > most:
        raise ValueError(f"{name} is {value!r}, needed is {most} at most")
    return value


def _is_real(value) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _number(name: str, value) -> float:
    if not _is_real(value) or not 0 < value < math.inf:
        raise ValueError(f"{name} is {value!r}, needed is a finite number above 0")
    if not _SMALLEST <= value <= _LARGEST:
        raise ValueError(
            f"{name} is {value!r}, needed is a number from {_SMALLEST:g} to {_LARGEST:g}"
        )
    return float(value)


def _switch(hf: Mapping, name: str) -> bool:
    value = hf.get(name)
    if value not in (None, True, False):
        raise ValueError(f"{name} is {value!r}, needed is true or false")
    return bool(value)


def eos_ids(hf: Mapping, vocab_size: int) -> tuple[int, ...]:
    """The end-of-text ids that a configuration file gives (one, a list or none), each once.

    Raises ValueError for what is no id of the vocabulary.
    """
    eos = hf.get("eos_token_id")
    ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    for i in ids:
        if type(i) is not int or not 0 <= i < vocab_size:
            raise ValueError(f"eos_token_id holds {i!r}, needed are ids from 0 to {vocab_size - 1}")
    return tuple(dict.fromkeys(ids))


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Keys of config.json that change the numbers of a model when they are on.
_MUST_BE_OFF = _words(
    """
    mlp_bias quantization_config compression_config use_sliding_window dual_chunk_attention_config
    attention_chunk_size window_size attention_window sliding_window_pattern sliding_window_layers
    attention_sinks num_sink_tokens rope_interleaved rope_interleave use_mrope mrope_section
    rope_local_base_freq use_dynamic_ntk use_logn_attn no_rope_layer_interval alibi use_alibi
    attn_logit_softcapping attn_logit_softcap final_logit_softcapping final_logit_softcap
    logit_softcapping logit_softcap logits_soft_cap query_pre_attn_scalar attention_multiplier
    attention_scale attn_scale softmax_scale scale_depth dim_model_base scale_embedding
    attn_temperature_tuning attn_output_gate parallel_attn parallel_block use_parallel_residual
    num_experts num_local_experts n_routed_experts moe_num_experts is_encoder_decoder
    add_cross_attention tie_encoder_decoder use_bidirectional_attention
    """
)
_MUST_BE_ONE = _words(
    """
    partial_rotary_factor rotary_pct rope_ratio logit_scale logits_scaling embedding_multiplier
    embedding_scale residual_multiplier lm_head_multiplier key_multiplier scale_emb
    """
)
_OF_QK_NORM = ("qk_norm", "use_qk_norm", "qk_layernorm", "use_qk_layernorm")
_READ = _words(
    """
    model_type vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads
    head_dim intermediate_size rope_theta rope_parameters rope_scaling rms_norm_eps
    tie_word_embeddings max_position_embeddings original_max_position_embeddings eos_token_id
    hidden_act hidden_activation attention_bias layer_types no_rope_layers sliding_window
    max_window_layers architectures position_embedding_type
    """
).union(_MUST_BE_OFF, _MUST_BE_ONE, _OF_QK_NORM)
# These say nothing about the numbers: tokens, sampling, storage, history, other heads.
_HARMLESS = _words(
    """
    bos_token_id pad_token_id sep_token_id unk_token_id decoder_start_token_id tokenizer_class
    torch_dtype dtype transformers_version use_cache initializer_range initializer_factor
    pretraining_tp auto_map is_decoder is_llama_config return_dict output_attentions
    output_hidden_states torchscript use_bfloat16 id2label label2id num_labels problem_type
    finetuning_task task_specific_params chunk_size_feed_forward max_length min_length do_sample
    temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size
    num_beams num_beam_groups num_return_sequences early_stopping diversity_penalty
    encoder_no_repeat_ngram_size model_max_length transformers.js_config gradient_checkpointing
    use_flash_attn flash_attn attn_implementation
    """
)


def is_off(value) -> bool:
    """Whether the value of a key says that there is nothing of what it names."""
    return value is None or value in (False, 0, "", [], {})


def unknown_keys(hf: Mapping) -> list[str]:
    """Keys of a config.json that are set and of which nothing is known here."""
    return sorted(
        key
        for key, value in hf.items()
        if key not in _READ | _HARMLESS
        and not key.startswith(("_", "unsloth_"))
        and not is_off(value)
    )


def _refuse_variants(hf: Mapping, kind: str, layers: int) -> None:
    """Raises ValueError for whatever asks for other numbers than those that are computed here."""

    def refuse(name, need):
        raise ValueError(f"{name} is {hf[name]!r}, supported is {need}")

    architectures = hf.get("architectures")
    listed = architectures if isinstance(architectures, list) else [architectures]
    if architectures and MODEL_TYPES[kind] not in listed:
        refuse("architectures", MODEL_TYPES[kind])
    for name in ("hidden_act", "hidden_activation"):
        if hf.get(name) not in (None, "silu", "swish"):
            refuse(name, "'silu'")
    windows = hf.get("use_sliding_window", kind == "llama")
    if windows and hf.get("sliding_window", "use_sliding_window" in hf):  # on, it has a default
        raise ValueError(
            "sliding-window attention is not supported: sliding_window is "
            f"{hf.get('sliding_window')!r}, use_sliding_window {hf.get('use_sliding_window')!r}"
        )
    for name in sorted(_MUST_BE_OFF & hf.keys()):
        if not is_off(hf[name]) and name != "use_sliding_window":
            refuse(name, "none of it")
    for name in sorted(_MUST_BE_ONE & hf.keys()):
        if hf[name] is not None and hf[name] != 1:
            refuse(name, "1")
    for name in _OF_QK_NORM:
        if hf.get(name) not in (None, kind == "qwen3"):
            refuse(name, f"{kind == 'qwen3'} in {kind}")
    if hf.get("position_embedding_type") not in (None, "rope", "rotary"):
        refuse("position_embedding_type", "'rope'")
    types = hf.get("layer_types")
    if types is not None and types != ["full_attention"] * layers:
        refuse("layer_types", f"{layers} times 'full_attention' (no sliding-window attention)")
    without = hf.get("no_rope_layers") or []
    if not isinstance(without, list) or not all(without):
        refuse("no_rope_layers", "1 for every layer")
    if kind == "qwen3":
        _need(hf, "attention_bias")
    if _switch(hf, "attention_bias") and kind != "qwen2":
        raise ValueError(f"attention_bias of {kind} also biases the output, supported is false")


def _rope(hf: Mapping) -> tuple[float, Yarn | None]:
    """rope_theta and YaRN."""
    said, yarn = read_rope(hf)
    found = {name: _number(name, value) for name, value in said.items()}
    if len(set(found.values())) != 1:
        raise ValueError(
            f"config.json gives {len(set(found.values()))} values of rope_theta {found or ''}, "
            "needed is one (rope_theta or rope_parameters.rope_theta)"
        )
    return next(iter(found.values())), yarn


def _qwen3(hidden, layers, heads, ffn, tied, kv_heads=8, **changes) -> ModelConfig:
    fields: dict[str, Any] = dict(
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
