"""Hugging Face directories in and out: config.json and safetensors, single or sharded.

One table says which tensor is which weight; whatever it does not foresee is an error.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401  (registers bfloat16 with numpy, which safetensors needs)
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from npr_jax.model.config import ModelConfig
from npr_jax.model.params import weight_table

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
SHARD_BYTES = 5 << 30

# name in the checkpoint -> (name in the pytree, whether it is stored transposed)
_TOP = {
    "model.embed_tokens.weight": ("embed", False),
    "model.norm.weight": ("final_norm", False),
    "lm_head.weight": ("unembed", True),
}
_LAYER = {
    "input_layernorm.weight": ("attn_norm", False),
    "self_attn.q_proj.weight": ("wq", True),
    "self_attn.k_proj.weight": ("wk", True),
    "self_attn.v_proj.weight": ("wv", True),
    "self_attn.o_proj.weight": ("wo", True),
    "self_attn.q_proj.bias": ("bq", False),
    "self_attn.k_proj.bias": ("bk", False),
    "self_attn.v_proj.bias": ("bv", False),
    "self_attn.q_norm.weight": ("q_norm", False),
    "self_attn.k_norm.weight": ("k_norm", False),
    "post_attention_layernorm.weight": ("mlp_norm", False),
    "mlp.gate_proj.weight": ("w_gate", True),
    "mlp.up_proj.weight": ("w_up", True),
    "mlp.down_proj.weight": ("w_down", True),
}


def read_config(directory: Path, **changes) -> ModelConfig:
    """The config of a directory; generation_config.json has the first word on end-of-text ids."""
    path = directory / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"{directory} has no config.json")
    hf = json.loads(path.read_text(encoding="utf-8"))
    generation = directory / "generation_config.json"
    if generation.exists():
        eos = json.loads(generation.read_text(encoding="utf-8")).get("eos_token_id")
        if eos is not None:
            hf["eos_token_id"] = eos
    try:
        return ModelConfig.from_hf(hf, **changes)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _places(config: ModelConfig) -> dict[str, tuple[str, int | None, bool]]:
    """Tensor name -> (weight, layer or None, transposed) for every tensor the model needs."""
    table = weight_table(config)
    places = {name: (ours, None, flip) for name, (ours, flip) in _TOP.items() if ours in table}
    for layer in range(config.num_layers):
        for name, (ours, flip) in _LAYER.items():
            if ours in table["layers"]:
                places[f"model.layers.{layer}.{name}"] = (ours, layer, flip)
    return places


def _files(directory: Path) -> list[Path]:
    if (directory / INDEX).exists():
        index = json.loads((directory / INDEX).read_text(encoding="utf-8"))
        return [directory / name for name in sorted(set(index["weight_map"].values()))]
    if (directory / SINGLE).exists():
        return [directory / SINGLE]
    raise FileNotFoundError(f"{directory} has neither {SINGLE} nor {INDEX}")


def read_params(directory: Path, config: ModelConfig, dtype="float32") -> dict:
    """Parameters of a directory as numpy arrays of `dtype`, padding rows zero.

    Raises:
      ValueError: tensors are missing, unexpected or of another shape; all of them are named.
    """
    table, places = weight_table(config), _places(config)
    dtype = jnp.dtype(dtype)
    arrays = {
        name: np.zeros(w.shape, dtype)
        for name, w in (table | table["layers"]).items()
        if name != "layers"
    }
    problems, found, tied_head = [], set(), None
    for path in _files(directory):
        if not path.exists():
            problems.append(f"missing file {path.name}")
            continue
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118  (not a dict)
                if name == "lm_head.weight" and config.tie_word_embeddings:
                    tied_head = file.get_tensor(name)
                    continue
                if name not in places:
                    if not name.endswith("rotary_emb.inv_freq"):
                        problems.append(f"unexpected {name}")
                    continue
                ours, layer, flip = places[name]
                tensor = file.get_tensor(name)
                tensor = tensor.T if flip else tensor
                target = arrays[ours] if layer is None else arrays[ours][layer]
                if ours == "embed":
                    target = target[: config.vocab_size]
                elif ours == "unembed":
                    target = target[:, : config.vocab_size]
                if tensor.shape != target.shape:
                    have, need = ((x.T if flip else x).shape for x in (tensor, target))
                    problems.append(f"{name} has shape {have}, needed is {need}")
                    continue
                target[...] = tensor.astype(dtype)
                found.add(name)
    problems += [
        f"missing {name}"
        for name in places
        if name not in found and not any(name in problem for problem in problems)
    ]
    if tied_head is not None and not problems:
        same = arrays["embed"][: config.vocab_size]
        if tied_head.shape != same.shape or (tied_head.astype(dtype) != same).any():
            problems.append("lm_head.weight differs from the embedding, but tie_word_embeddings")
    if problems:
        shown = "; ".join(problems[:20]) + ("; ..." if len(problems) > 20 else "")
        raise ValueError(f"{directory}: {len(problems)} tensors do not fit the config: {shown}")
    layers = {name: arrays.pop(name) for name in table["layers"]}
    return arrays | {"layers": layers}


def write(directory: Path, config: ModelConfig, params: dict, shard_bytes: int = SHARD_BYTES):
    """Writes config.json, generation_config.json and the weights; padding rows are dropped."""
    directory.mkdir(parents=True, exist_ok=True)
    for old in directory.glob("model*.safetensors*"):
        old.unlink()
    host = jax.device_get(params)
    tensors = {}
    for name, (ours, layer, flip) in _places(config).items():
        x = host[ours] if layer is None else host["layers"][ours][layer]
        if ours == "embed":
            x = x[: config.vocab_size]
        elif ours == "unembed":
            x = x[:, : config.vocab_size]
        tensors[name] = np.ascontiguousarray(x.T if flip else x)
    shards: list[dict] = [{}]
    size = 0
    for name, x in tensors.items():
        if shards[-1] and size + x.nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = x
        size += x.nbytes
    if len(shards) == 1:
        save_file(shards[0], directory / SINGLE, {"format": "pt"})
    else:
        names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
        for name, shard in zip(names, shards, strict=True):
            save_file(shard, directory / name, {"format": "pt"})
        index = {
            "metadata": {"total_size": sum(x.nbytes for x in tensors.values())},
            "weight_map": {t: n for n, s in zip(names, shards, strict=True) for t in s},
        }
        _write_json(directory / INDEX, index)
    hf = config.to_hf(str(host["embed"].dtype))
    _write_json(directory / "config.json", hf)
    _write_json(directory / "generation_config.json", {"eos_token_id": hf["eos_token_id"]})


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
