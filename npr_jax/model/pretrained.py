"""A model as a whole: config, parameters, tokenizer and tags; loaded and saved together."""

import dataclasses
import functools
import re
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from npr_jax.base.distributed import is_main, to_host, wait
from npr_jax.base.fields import Dtype, wanted
from npr_jax.base.files import DEMO, absent, hub_error, publish, writing
from npr_jax.model.config import PRESETS, LoraConfig, ModelConfig
from npr_jax.model.hf import CONFIG, SourceFiles, read_config, read_params, write
from npr_jax.model.lora import adapters_of, joined, merge, plain
from npr_jax.model.params import check_finite, init_params
from npr_jax.model.peft import (
    ADAPTER_CONFIG,
    read_adapter_config,
    read_adapters,
    write_adapters,
)
from npr_jax.model.sharding import place_params, train_shardings
from npr_jax.model.tokenizer import add_tags, demo_tokenizer, has_tags
from npr_jax.tree import TAG_NAMES, TagIds

ADAPTER_DIR = "adapter"  # in the directory of a merged model
TOKENIZER_FILES = ["*.json", "*.txt", "*.jinja"]  # and the config


@dataclasses.dataclass(frozen=True)
class Model:
    """`params`: see model/params.py. `tokenizer` is None where there is none; `tags` too, or where
    tokenizer and vocabulary do not have the eight tags (`with_tags` adds them). `source`: what the
    configuration files said that it came from, which an export keeps. `base`: the directory, hub
    id or preset that the weights without adapters were loaded from, None where there is none."""

    config: ModelConfig
    params: dict
    tokenizer: Any = None
    tags: TagIds | None = None
    source: SourceFiles | None = None
    base: str | None = None

    def merged(self) -> "Model":
        """The model without adapters that computes the same, in their dtype (`lora.merge`); the
        model itself if it has none. In bfloat16 what is small beside a weight is rounded away: load
        in float32 to merge."""
        if self.config.lora is None:
            return self
        params = merge(self.config, self.params)
        return dataclasses.replace(self, config=plain(self.config), params=params, base=None)

    def with_tags(self) -> "Model":
        """The model with the eight tags as single tokens; the model itself if it has them.

        The tokenizer is changed in place. Raises ValueError where there is none, or where it has no
        tokens for the word of a tag, from whose rows that of the tag is made.
        """
        if self.tags is not None:
            return self
        if self.tokenizer is None:
            raise ValueError("the model has no tokenizer to add the tags to")
        config, params = add_tags(self.config, self.params, self.tokenizer)
        tags = TagIds.from_tokenizer(self.tokenizer)
        return dataclasses.replace(self, config=config, params=params, tags=tags)


def load(
    source: str | Path,
    dtype: str = "float32",
    seed: int = 0,
    tags: bool = False,
    mesh: Mesh | None = None,
    adapter: str | Path | None = None,
) -> Model:
    """Loads a model.

    Args:
      source: a Hugging Face directory, a hub id ("Qwen/Qwen3-4B"), or the name of a preset, which
        gets random weights. Or the directory or hub id of adapters in PEFT's layout: then the model
        that its base_model_name_or_path names, with these adapters, unmerged (`Model.merged`).
      dtype: of the parameters.
      seed: of a preset's weights.
      tags: adds the eight tags to a tokenizer that lacks them (`Model.with_tags`).
      mesh: of training, on which parameters are created in parts: no device holds a whole matrix.
      adapter: directory or hub id of adapters to `source`, whatever base they name.

    Raises:
      FileNotFoundError: there is no such directory, preset or reachable hub repository.
      NotADirectoryError: `source` is a file.
      ValueError: the config, a tensor or the tokenizer cannot be used; it is named with its file.
        Or `dtype` is neither "float32" nor "bfloat16", or `tags` are wanted and cannot be added
        (`Model.with_tags`).
    """
    if dtype not in get_args(Dtype):
        raise ValueError(f"dtype is {dtype!r}, needed is {wanted(Dtype)}")
    if adapter is not None:
        directory = Path(adapter)
        if not directory.is_dir():
            directory = _download(str(adapter), [*TOKENIZER_FILES, "*.safetensors"])
        if not _is_adapter(directory):
            raise ValueError(f"{directory} has no {ADAPTER_CONFIG}: needed are adapters")
        lora, _ = read_adapter_config(directory)
        return _with_adapters(load(source, dtype, seed, tags, mesh), directory, lora, dtype, mesh)
    if str(source) in PRESETS:
        config = PRESETS[str(source)]
        make = functools.partial(init_params, config, dtype=dtype)
        if mesh is not None:
            make = jax.jit(make, out_shardings=train_shardings(config, mesh))
        tokenizer = demo_tokenizer() if str(source) == "tiny" else None
        model = _assemble(config, make(jax.random.key(seed)), tokenizer, str(source))
        return model.with_tags() if tags else model
    directory = Path(source)
    if not directory.is_dir():
        directory = _download(str(source), [*TOKENIZER_FILES, "*.safetensors"])
    if _is_adapter(directory):
        return _load_adapted(directory, dtype, seed, tags, mesh)
    config, files = read_config(directory)
    tokenizer = _read_tokenizer(directory)
    if not config.eos_token_ids and tokenizer is not None:
        config = dataclasses.replace(config, eos_token_ids=_own_eos(directory, config, tokenizer))
    params = read_params(directory, config, dtype)
    model = _assemble(config, params, tokenizer, str(source), files)
    model = model.with_tags() if tags else model
    if mesh is None:
        return dataclasses.replace(model, params=jax.tree.map(jnp.asarray, model.params))
    shardings = train_shardings(model.config, mesh)
    return dataclasses.replace(model, params=place_params(model.params, shardings))


def _is_adapter(directory: Path) -> bool:
    """Whether a directory has adapters, and no model."""
    if not (directory / ADAPTER_CONFIG).exists():
        return False
    if (directory / CONFIG).exists():
        raise ValueError(
            f"{directory} has {CONFIG} and {ADAPTER_CONFIG}: a model or adapters to one? Keep one "
            "of the two"
        )
    return True


def _load_adapted(directory: Path, dtype: str, seed: int, tags: bool, mesh: Mesh | None) -> Model:
    """The model that the adapters of a directory are for, with them."""
    lora, base = read_adapter_config(directory)
    try:
        model = load(base, dtype, seed, tags, mesh)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise type(error)(
            f"{directory / ADAPTER_CONFIG}: base_model_name_or_path: {error}"
        ) from error
    return _with_adapters(model, directory, lora, dtype, mesh)


def _with_adapters(
    model: Model, directory: Path, lora: LoraConfig, dtype: str, mesh: Mesh | None
) -> Model:
    """A model with the adapters of a directory."""
    if model.config.lora:
        raise ValueError(f"{directory}: its adapters are for {model.base}, which has some too")
    config = dataclasses.replace(model.config, lora=lora)
    adapters = read_adapters(directory, config, dtype)
    if mesh is None:
        adapters = jax.tree.map(jnp.asarray, adapters)
    else:
        adapters = place_params(adapters, adapters_of(train_shardings(config, mesh)))
    return dataclasses.replace(model, config=config, params=joined(model.params, adapters))


def load_tokenizer(source: str | Path):
    """The tokenizer of a model as the stages use it, with the eight tags; no weights are read.

    `source` and FileNotFoundError as for `load`; ValueError if the model has no tokenizer.
    """
    if str(source) in PRESETS:
        tokenizer = demo_tokenizer() if str(source) == "tiny" else None
    else:
        directory = Path(source)
        if not directory.is_dir():
            directory = _download(str(source), TOKENIZER_FILES)
        if _is_adapter(directory):
            return load_tokenizer(read_adapter_config(directory)[1])
        tokenizer = _read_tokenizer(directory)
    if tokenizer is None:
        raise ValueError(f"{source} has no tokenizer")
    if not has_tags(tokenizer):
        tokenizer.add_tokens(list(TAG_NAMES), special_tokens=True)
    return tokenizer


def _read_tokenizer(directory: Path):
    if any((directory / name).exists() for name in ("tokenizer.json", "tokenizer_config.json")):
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(directory)
            has_tags(tokenizer)  # or what it cannot encode would be told without its file
            return tokenizer
        except Exception as error:  # for a broken file tokenizers raises just that
            raise ValueError(f"the tokenizer in {directory} cannot be read: {error}") from error
    return None


def _own_eos(directory: Path, config: ModelConfig, tokenizer) -> tuple[int]:
    """The tokenizer's end of text, for configuration files that name none."""
    eos = tokenizer.eos_token_id
    if eos is None or eos >= config.vocab_size:
        raise ValueError(
            f"{directory / CONFIG} has no eos_token_id, and that of the tokenizer is {eos}, needed "
            f"is an id below {config.vocab_size}: answers would have no end"
        )
    return (eos,)


def _assemble(
    config: ModelConfig, params: dict, tokenizer, base: str, files: SourceFiles | None = None
) -> Model:
    tags = None
    if tokenizer is not None and has_tags(tokenizer, config.vocab_size):
        tags = TagIds.from_tokenizer(tokenizer)
    return Model(config, params, tokenizer, tags, files, base)


def save(model: Model, directory: str | Path) -> None:
    """Writes a directory that `load` and transformers read. A model with adapters is merged, and
    the adapters alone are in `adapter`, a directory that `load` and PEFT read."""
    if model.config.lora:
        write_adapters(Path(directory) / ADAPTER_DIR, model.config, model.params, model.base)
        model = model.merged()
    if model.tokenizer is not None:
        model.tokenizer.save_pretrained(directory)
    # config.json last: it is all there
    write(Path(directory), model.config, model.params, model.source)


def publish_model(model: Model, directory: Path) -> None:
    """Like `save`, but the directory is there as a whole or not at all. Of several processes, all
    of which make the call, the first writes. FloatingPointError for parameters that are not finite.
    """
    check_finite(model.params, f"the model is not written to {directory}")
    model = dataclasses.replace(model, params=to_host(model.params))
    if is_main():
        with writing(directory):
            publish(directory, lambda path: save(model, path))
    wait(f"published {directory}")


def _download(name: str, wanted: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    presets = ", ".join(PRESETS)
    if Path(name).is_file():
        raise NotADirectoryError(f"{name} is a file, needed is the directory of a model")
    if not re.fullmatch(r"[A-Za-z0-9_][\w.-]*/[\w.-]+", name) or DEMO in Path(name).parents:
        raise FileNotFoundError(
            f"{absent(name)}; needed is the directory of a model in Hugging Face's form, such as "
            f"`final` of a run, a hub id such as Qwen/Qwen3-4B, or one of the presets ({presets})"
        )
    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise hub_error(
            f"{name!r} is no directory, none of the presets ({presets}), and the hub gave nothing",
            error,
        ) from error
