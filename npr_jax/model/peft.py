"""Adapters in PEFT's layout, in and out: adapter_config.json and adapter_model.safetensors.

What adapter_config.json asks for and is not supported here is an error that names it.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import get_args

import jax
from safetensors.numpy import save_file

from npr_jax.model.config import TARGETS, LoraConfig, ModelConfig, Target, is_off
from npr_jax.model.hf import LAYER, Places, read_json, read_tensors, tensors_of, write_json

ADAPTER_CONFIG, ADAPTER = "adapter_config.json", "adapter_model.safetensors"
# Keys that change no number of a trained adapter, whatever they say.
_HARMLESS = {
    *("auto_mapping", "inference_mode", "lora_dropout"),
    *("megatron_core", "peft_version", "qalora_group_size"),
}
_READ = {"base_model_name_or_path", "lora_alpha", "r", "target_modules", "use_rslora"}
# What these may say; all others must say nothing.
_SUPPORTED = {
    "peft_type": ("LORA",),
    "task_type": ("CAUSAL_LM", None),
    "bias": ("none",),
    # Others begin with a changed base, and what is saved is for that.
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal"),
}


def write_adapters(directory: Path, config: ModelConfig, params: dict, base: str | None) -> None:
    """Writes the adapters of parameters as a directory that PEFT and `read_adapters` read; `base`:
    the directory or hub id of the model that they are for."""
    lora = config.lora
    assert lora is not None  # it has adapters
    directory.mkdir(parents=True, exist_ok=True)
    host = jax.device_get({"layers": params["layers"]})
    save_file(tensors_of(host, config, _places(config)), directory / ADAPTER, {"format": "pt"})
    said = {
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_alpha": int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": lora.rank,
        "target_modules": list(lora.targets),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }
    write_json(directory / ADAPTER_CONFIG, said)


def read_adapter_config(directory: Path) -> tuple[LoraConfig, str]:
    """The adapters that a directory has, and the model that they are for.

    Raises ValueError for a file that cannot be read, or asks for what is not supported.
    """
    path = directory / ADAPTER_CONFIG
    said = read_json(path)
    try:
        return _lora(said), _base(said)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _lora(said: Mapping) -> LoraConfig:
    for name, values in _SUPPORTED.items():
        if said.get(name, values[0]) not in values:
            raise ValueError(f"{name} is {said[name]!r}, supported is {values[0]!r}")
    for name in sorted(said.keys() - _HARMLESS - _READ - _SUPPORTED.keys()):
        if not is_off(said[name]):
            raise ValueError(f"{name} is {said[name]!r}, supported is none of it")
    named = said.get("target_modules")
    asked = list(TARGETS) if named == "all-linear" else named
    if not isinstance(asked, list) or not all(name in list(TARGETS) for name in asked):
        raise ValueError(
            f"target_modules is {named!r}, supported is a list of {', '.join(TARGETS)}"
        )
    rank, alpha = said.get("r"), said.get("lora_alpha")
    if type(rank) is not int or rank < 1:
        raise ValueError(f"r is {rank!r}, needed is an integer, 1 or more")
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not 0 < alpha < math.inf:
        raise ValueError(f"lora_alpha is {alpha!r}, needed is a finite number above 0")
    if said.get("use_rslora"):  # what is added counts alpha / sqrt(rank) times
        alpha = alpha * math.sqrt(rank)
    targets = tuple(name for name in get_args(Target) if name in asked)
    return LoraConfig(rank, float(alpha), targets)


def _base(said: Mapping) -> str:
    name = said.get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise ValueError(
            f"base_model_name_or_path is {name!r}, needed is the directory, hub id or preset of "
            "the model that the adapters are for: write it there"
        )
    return name


def read_adapters(directory: Path, config: ModelConfig, dtype="float32") -> dict:
    """The adapters alone (`lora.adapters_of`) that a directory has for a model of this config, as
    numpy arrays; ValueError as for `hf.read_params`."""
    path = directory / ADAPTER
    if not path.exists():
        raise ValueError(f"{directory} has {ADAPTER_CONFIG} and no {ADAPTER}")
    return read_tensors(directory, [path], config, _places(config), dtype)


def _places(config: ModelConfig) -> Places:
    """Where every tensor of the adapters goes."""
    lora = config.lora
    assert lora is not None  # it has adapters
    adapted = {TARGETS[target] for target in lora.targets}
    return {
        f"base_model.model.model.layers.{layer}.{name.removesuffix('weight')}lora_{part}.weight": (
            f"{ours}_{part.lower()}",
            layer,
            True,
        )
        for layer in range(config.num_layers)
        for name, (ours, _) in LAYER.items()
        if ours in adapted
        for part in "AB"
    }
