"""Any checkpoint of a run as a model directory."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from npr_jax.base.fields import Checked, Dtype, Seed
from npr_jax.base.files import describe
from npr_jax.model import abstract_params
from npr_jax.model.config import LoraConfig
from npr_jax.model.hf import read_config as read_model_config
from npr_jax.model.lora import joined, trained
from npr_jax.model.pretrained import Model, load, load_tokenizer, publish_model
from npr_jax.runs.checkpoint import best_step, checkpoint_steps, read_checkpoint_params
from npr_jax.runs.directory import known_inputs, read_config
from npr_jax.train.inputs import model_content
from npr_jax.train.objective import cast


@dataclasses.dataclass(frozen=True)
class _Begun(Checked):
    """What is used of a run's config, which may be that of another version."""

    model: str
    seed: Seed
    checkpoints: str | None
    lora: LoraConfig | None = None
    compute_dtype: Dtype = "float32"


def export(
    run: Path,
    output: Path,
    step: int | None = None,
    start: str | None = None,
    best: bool = False,
) -> int:
    """Writes the model of a checkpoint as a Hugging Face directory; returns its step.

    Args:
      run: run directory of a stage, which may be going on; it is only read.
      output: directory that is not there yet, outside of the run's.
      step: of the checkpoint; None is the last one.
      start: the model that the run began with, which has its tokenizer, and of a run with
        `train.lora` the base; None is the run's `final`, where it holds these, or what the run's
        config names.
      best: in place of a step, that whose checkpoint has the largest value (`keep_best`).

    Raises ValueError for what is no run directory, a step that has no checkpoint or a damaged one,
    an output that is there or in the run, and a model that is not the one that the run began with;
    FileNotFoundError where the model is not to be had.
    """
    path = run / "config.yaml"
    if not path.is_file():
        raise ValueError(f"{run} is no run directory: it has no config.yaml")
    begun, place = _read(path)
    if os.path.lexists(output):  # a link that leads nowhere cannot become a directory either
        raise ValueError(f"{output} is there already: give another directory for the model")
    if output.resolve().is_relative_to(run.resolve()):  # as its `final` it would end the run
        raise ValueError(f"{output} is in {run}, the run's own: give a directory outside of it")
    steps = checkpoint_steps(place)
    if not steps:
        raise ValueError(f"{run} has no checkpoint: there is none in {place}")
    if best:
        step = _best(run, place, step)
    step = steps[-1] if step is None else step
    if step not in steps:
        raise ValueError(
            f"{run} has no checkpoint of step {step}, there are {', '.join(map(str, steps))}"
        )
    model = _start(run, begun, start)
    here = SingleDeviceSharding(jax.devices()[0])
    config = dataclasses.replace(model.config, lora=begun.lora)
    wanted = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=here),
        trained(config, abstract_params(config)),
    )
    params = read_checkpoint_params(place, step, wanted)
    if begun.lora:
        params = joined(cast(model.params, begun.compute_dtype), params)
    publish_model(dataclasses.replace(model, config=config, params=params), output)
    return step


def _best(run: Path, place: str, step: int | None) -> int:
    """The step of the best checkpoint, which no other step is asked for beside."""
    if step is not None:
        raise ValueError(f"--best and --step {step} are given, needed is one of them")
    found = best_step(place)
    if found is None:
        raise ValueError(
            f"{run} has no best checkpoint: none in {place} has a value. Needed is a run with "
            "train.keep_best=1; where it has `evaluate`, also an evaluation that is better than "
            "the model it began with (metrics eval/best, eval/baseline)"
        )
    return found


def _read(path: Path) -> tuple[_Begun, str]:
    """What a run's config says, and where its checkpoints are: those of Beta are its training's."""
    config = read_config(path)
    owner, directory = config, path.parent
    if "fit" in config:
        owner, directory = config["fit"], directory / "fit"
    try:
        if not isinstance(owner, dict):
            raise ValueError(f"fit is {owner!r}, needed are keys with values")
        values: dict[str, Any] = {key: config.get(key) for key in ("model", "seed")}
        train = owner.get("train") or {}
        if lora := train.get("lora"):
            lora = LoraConfig(lora["rank"], lora["alpha"], tuple(lora["targets"]))
            values |= {"lora": lora, "compute_dtype": train.get("compute_dtype", "float32")}
        begun = _Begun(**values, checkpoints=owner.get("checkpoints"))
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is no config of zero, beta or papo: {describe(error)}") from error
    return begun, begun.checkpoints or str(directory / "checkpoints")


def checkpoints_of(run: Path) -> str:
    """Where the checkpoints of a run directory are, which has a config."""
    return _read(run / "config.yaml")[1]


def _start(run: Path, begun: _Begun, start: str | None) -> Model:
    """A model with the config and the tokenizer of the run's."""
    final = run / "final"
    # Into the weights of `final` the adapters are merged.
    source = start or (str(final) if final.exists() and not begun.lora else begun.model)
    try:
        model = load(source, seed=begun.seed, tags=True).merged()
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"the model that the run began with is needed for its tokenizer"
            f"{' and base' if begun.lora else ''}: say where it lies now "
            f"with --model DIR. {error}"
        ) from error
    if source != str(final):
        _check_same(model, source, run)
    return model


def _check_same(model: Model, source: str, run: Path) -> None:
    """Raises ValueError naming what tells a model from the one that the run began with: weights,
    where the run has written down what they were, and the rest, where it has a `final`."""
    pairs: dict[str, tuple] = {}  # what is seen, what is needed
    final = run / "final"
    if known := known_inputs(run).get("model"):
        pairs["content"] = model_content(source, model), known
    if final.exists():
        seen, needed = model.config.to_hf(), read_model_config(final)[0].to_hf()
        pairs |= {key: (seen.get(key), value) for key, value in needed.items()}
        if model.tokenizer.get_vocab() != load_tokenizer(final).get_vocab():
            pairs["tokenizer"] = "another", f"that of {final}"
    for key, (seen, needed) in pairs.items():
        if seen != needed:
            raise ValueError(
                f"{source} is not the model that {run} began with: its {key} is {seen}, needed is "
                f"{needed}: say where that model lies with --model DIR"
            )
