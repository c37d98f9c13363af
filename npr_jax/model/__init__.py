"""The model: dense Qwen3 (and Llama and Qwen2 shapes) as pure functions over a pytree."""

from npr_jax.model.config import PRESETS, ModelConfig
from npr_jax.model.forward import forward, head, log_sum_exp, unembed
from npr_jax.model.params import abstract_params, init_params, logical_axes, num_params
from npr_jax.model.rope import Yarn
from npr_jax.model.score import logits, token_logp, token_logp_entropy, token_loss

__all__ = [
    "PRESETS",
    "ModelConfig",
    "Yarn",
    "abstract_params",
    "forward",
    "head",
    "init_params",
    "log_sum_exp",
    "logical_axes",
    "logits",
    "num_params",
    "token_logp",
    "token_logp_entropy",
    "token_loss",
    "unembed",
]
