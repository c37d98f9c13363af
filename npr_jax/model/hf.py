"""Hugging Face directories in and out: config.json and safetensors, single or sharded.

One table says which tensor is which weight; whatever it does not foresee is an error.
"""

import contextlib
import dataclasses
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401  (registers bfloat16 with numpy, which safetensors needs)
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from npr_jax.base.files import json_text, without_twins
from npr_jax.model.config import ModelConfig, eos_ids, unknown_keys
from npr_jax.model.params import Weight, weight_table

CONFIG, GENERATION = "config.json", "generation_config.json"
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
DTYPES = ("F64", "F32", "F16", "BF16")  # as safetensors calls them
SHARD_BYTES = 5 << 30
_log = logging.getLogger(__name__)

# name in the checkpoint -> (name in the pytree, whether it is stored transposed)
_TOP = {
    EMBEDDING: ("embed", False),
    "model.norm.weight": ("final_norm", False),
    HEAD: ("unembed", True),
}
LAYER = {
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


class SourceFiles(NamedTuple):
    """What config.json and generation_config.json hold; both empty where there was none. An export
    keeps of them what it does not say itself: tokens, sampling, and all that changes no number."""

    config: Mapping = {}
    generation: Mapping = {}

    def eos_ids(self, vocab_size: int) -> tuple[int, ...]:
        """The ids that end a text; generation_config.json has the first word."""
        return eos_ids(self.generation, vocab_size) or eos_ids(self.config, vocab_size)


def read_config(directory: Path) -> tuple[ModelConfig, SourceFiles]:
    """The config of a directory, and the files that say it.

    Raises:
      FileNotFoundError: it has no config.json.
      ValueError: a file cannot be read, or asks for what is not supported; it is named.
    """
    path = directory / CONFIG
    if not path.exists():
        raise FileNotFoundError(f"{directory} has no {CONFIG}")
    source = SourceFiles(read_json(path), read_json(directory / GENERATION))
    try:
        config = ModelConfig.from_hf(source.config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    try:
        config = dataclasses.replace(config, eos_token_ids=source.eos_ids(config.vocab_size))
    except ValueError as error:
        raise ValueError(f"{directory / GENERATION}: {error}") from error
    if unknown := unknown_keys(source.config):
        _log.warning("%s: these keys are not known and not used: %s", path, ", ".join(unknown))
    return config, source


def read_json(path: Path) -> dict:
    """The object in a file; {} where there is none. Raises ValueError for other files."""
    if not path.exists():
        return {}

    def refuse(constant: str):  # NaN and Infinity, which no other reader takes
        raise ValueError(f"{constant} is no number of JSON")

    try:
        text = path.read_text(encoding="utf-8")
        value = json.loads(text, parse_constant=refuse, object_pairs_hook=without_twins)
    except ValueError as error:  # of the encoding too
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{path} is not valid JSON: nested too deep") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds {type(value).__name__}, needed is an object")
    return value


Places = dict[str, tuple[str, int | None, bool]]  # of tensors: weight, layer, transposed


def _places(config: ModelConfig) -> Places:
    """Where every tensor goes that the model needs; its adapters have files of their own."""
    table = weight_table(config)
    places: Places = {
        name: (ours, None, flip) for name, (ours, flip) in _TOP.items() if ours in table
    }
    for layer in range(config.num_layers):
        for name, (ours, flip) in LAYER.items():
            if ours in table["layers"]:
                places[f"model.layers.{layer}.{name}"] = (ours, layer, flip)
    return places


def _files(directory: Path) -> list[Path]:
    """The safetensors files of a directory; ValueError where they are not all there, or unclear."""
    single, index = directory / SINGLE, directory / INDEX
    if not index.exists():
        if single.exists():
            return [single]
        raise FileNotFoundError(f"{directory} has neither {SINGLE} nor {INDEX}")
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(
        isinstance(name, str) and Path(name).name == name for name in names.values()
    ):
        raise ValueError(f"{index} has no weight_map from tensors to names of files")
    names = sorted(set(names.values()))
    if single.exists() and SINGLE not in names:
        raise ValueError(
            f"{directory} has {SINGLE}, and {INDEX} that names other files: remove one of the two"
        )
    if missing := [name for name in names if not (directory / name).exists()]:
        raise ValueError(f"{index} names files that are missing: {', '.join(missing)}")
    return [directory / name for name in names]


@contextlib.contextmanager
def _opened(path: Path) -> Iterator:
    """A safetensors file; ValueError names one that is not whole."""
    try:
        with safe_open(path, framework="numpy") as file:
            yield file
    except (SafetensorError, OSError) as error:
        with path.open("rb") as file:
            pointer = file.read(12) == b"version http"
        raise ValueError(
            f"{path} cannot be read ({error}): it is "
            + ("a pointer of git-lfs, fetch the file" if pointer else "no whole safetensors file")
        ) from error


def _shape(config: ModelConfig, weight: Weight, ours: str, layer: int | None, flip: bool):
    """The shape of a weight's tensor in a file."""
    shape = list(weight.shape if layer is None else weight.shape[1:])
    if ours in ("embed", "unembed"):
        shape[weight.axes.index("vocab")] = config.vocab_size
    return shape[::-1] if flip else shape


def _find(
    directory: Path, files: list[Path], config: ModelConfig, places: dict
) -> dict[Path, list[str]]:
    """The tensors to be read from each file, known from the files' headers alone.

    Raises:
      ValueError: tensors are missing, there twice, unexpected, or of another shape or dtype; all of
        them are named with their files.
    """
    table = weight_table(config)
    problems, found, wanted = [], {}, {}
    tied = EMBEDDING in places and config.tie_word_embeddings
    for path in files:
        wanted[path] = []
        with _opened(path) as file:
            for name in sorted(file.keys()):
                place = places.get(name)
                if name == HEAD and tied:  # compared with the embedding
                    place = (*places[EMBEDDING][:2], False)
                if place is None:
                    if not name.endswith("rotary_emb.inv_freq"):
                        problems.append(f"unexpected {name} in {path.name}")
                    continue
                if name in found:
                    problems.append(f"{name} is in {found[name]} and in {path.name}")
                    continue
                found[name] = path.name
                ours, layer, flip = place
                weight = table[ours] if layer is None else table["layers"][ours]
                tensor, need = file.get_slice(name), _shape(config, weight, ours, layer, flip)
                if (have := tensor.get_shape()) != need:
                    problems.append(
                        f"{name} has shape {tuple(have)}, needed is {tuple(need)}, in {path.name}"
                    )
                elif (dtype := tensor.get_dtype()) not in DTYPES:
                    problems.append(
                        f"{name} has dtype {dtype}, supported are {', '.join(DTYPES)}, in "
                        f"{path.name}"
                    )
                wanted[path].append(name)
    problems += [f"missing {name}" for name in places if name not in found]
    if problems:
        shown = "; ".join(problems[:20]) + ("; ..." if len(problems) > 20 else "")
        raise ValueError(f"{directory}: {len(problems)} tensors do not fit the config: {shown}")
    return wanted


def _count_not_finite(x: np.ndarray) -> int:
    """Of an array of floats of any size, by their bits: numpy is slow at bfloat16."""
    bits = np.dtype(f"u{x.dtype.itemsize}")
    infinity = np.array(np.inf, x.dtype).view(bits)
    return int(np.count_nonzero((x.view(bits) & infinity) == infinity))


def read_params(directory: Path, config: ModelConfig, dtype="float32") -> dict:
    """Parameters of a directory as numpy arrays of `dtype`, padding rows zero.

    Raises:
      ValueError: a file is not whole; or tensors are missing, there twice, unexpected, of another
        shape or of a dtype that is not float, all of them named before any is read; or one holds
        what is not finite in `dtype`.
    """
    return read_tensors(directory, _files(directory), config, _places(config), dtype)


def read_tensors(
    directory: Path, files: list[Path], config: ModelConfig, places: Places, dtype="float32"
) -> dict:
    """As `read_params`, of the tensors of these files at these places; the weights that have none
    are left out."""
    table = weight_table(config)
    wanted = _find(directory, files, config, places)
    dtype, named = jnp.dtype(dtype), {ours for ours, _, _ in places.values()}
    arrays = {
        name: np.zeros(w.shape, dtype)
        for name, w in (table | table["layers"]).items()
        if name in named
    }
    tied_head = None
    for path, names in wanted.items():
        with _opened(path) as file:
            for name in names:
                with np.errstate(over="ignore"):  # which is seen below
                    tensor = file.get_tensor(name).astype(dtype)
                if count := _count_not_finite(tensor):
                    raise ValueError(
                        f"{path}: {name} holds {count} values that are not finite in {dtype}"
                    )
                if name not in places:
                    tied_head = (path, tensor)
                    continue
                ours, layer, flip = places[name]
                target = arrays[ours] if layer is None else arrays[ours][layer]
                tensor = tensor.T if flip else tensor
                target[tuple(slice(size) for size in tensor.shape)] = tensor
    if tied_head and (tied_head[1] != arrays["embed"][: config.vocab_size]).any():
        raise ValueError(
            f"{tied_head[0]}: {HEAD} differs from the embedding, but tie_word_embeddings is true"
        )
    layers = {name: arrays.pop(name) for name in table["layers"] if name in named}
    return arrays | {"layers": layers}


def tensors_of(host: dict, config: ModelConfig, places: Places) -> dict[str, np.ndarray]:
    """What a file holds of parameters on the host; padding rows are dropped."""
    tensors = {}
    for name, (ours, layer, flip) in places.items():
        x = host[ours] if layer is None else host["layers"][ours][layer]
        if ours == "embed":
            x = x[: config.vocab_size]
        elif ours == "unembed":
            x = x[:, : config.vocab_size]
        tensors[name] = np.ascontiguousarray(x.T if flip else x)
    return tensors


def write(
    directory: Path,
    config: ModelConfig,
    params: dict,
    source: SourceFiles | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes config.json, generation_config.json and the weights; padding rows are dropped.

    `source`: the files that the model came from; what they say and the config does not, is kept.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for old in directory.glob("model*.safetensors*"):
        old.unlink()
    host = jax.device_get(params)
    tensors = tensors_of(host, config, _places(config))
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
        write_json(directory / INDEX, index)
    ours, source = config.to_hf(str(host["embed"].dtype)), source or SourceFiles()
    eos = ours["eos_token_id"]
    unchanged = config.eos_token_ids == source.eos_ids(config.vocab_size)

    def said(file: Mapping) -> dict:  # the two may differ: a base's end of text, and a chat's
        return {"eos_token_id": file.get("eos_token_id", eos) if unchanged else eos}

    # What `ours` says by other names, or in its own way; and code, which is left.
    old = {"torch_dtype", "rope_scaling", "original_max_position_embeddings", "auto_map"}
    kept = {name: value for name, value in source.config.items() if name not in old}
    write_json(directory / GENERATION, {**source.generation, **said(source.generation)})
    write_json(directory / CONFIG, kept | ours | said(source.config))


def write_json(path: Path, value: dict) -> None:
    """Writes an object as a file."""
    path.write_text(json_text(value, indent=2) + "\n", encoding="utf-8")
