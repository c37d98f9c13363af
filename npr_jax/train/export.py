"""Any checkpoint of a run as a model directory."""

import os
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from npr_jax.model import abstract_params
from npr_jax.model.pretrained import Model, load, publish_model
from npr_jax.runs.checkpoint import checkpoint_steps, read_checkpoint_params
from npr_jax.runs.directory import read_config


def export(run: Path, output: Path, step: int | None = None, start: str | None = None) -> int:
    """Writes the model of a checkpoint as a Hugging Face directory; returns its step.

    Args:
      run: run directory of a stage, which may be going on; it is only read.
      output: directory that is not there yet.
      step: of the checkpoint; None is the last one.
      start: the model that the run began with, which has its tokenizer; None is the run's `final`,
        or what its config names.

    Raises ValueError for what is no run directory, a step that has no checkpoint or a damaged one,
    and an output that is there; FileNotFoundError where the model is not to be had.
    """
    path = run / "config.yaml"
    if not path.is_file():
        raise ValueError(f"{run} is no run directory: it has no config.yaml")
    config = read_config(path)
    if "model" not in config:
        raise ValueError(f"{run} is no run directory of zero, beta or papo: {path} names no model")
    if os.path.lexists(output):  # a link that leads nowhere cannot become a directory either
        raise ValueError(f"{output} is there already: give another directory for the model")
    owner, directory = (config["fit"], run / "fit") if "fit" in config else (config, run)
    place = owner.get("checkpoints") or directory / "checkpoints"
    steps = checkpoint_steps(place)
    if not steps:
        raise ValueError(f"{run} has no checkpoint: there is none in {place}")
    step = steps[-1] if step is None else step
    if step not in steps:
        raise ValueError(
            f"{run} has no checkpoint of step {step}, there are {', '.join(map(str, steps))}"
        )
    model = _start(run, config, start)
    here = SingleDeviceSharding(jax.devices()[0])
    wanted = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=here),
        abstract_params(model.config),
    )
    params = read_checkpoint_params(place, step, wanted)
    publish_model(Model(model.config, params, model.tokenizer, model.tags), output)
    return step


def _start(run: Path, config: dict, start: str | None) -> Model:
    """A model with the config and the tokenizer of the run's."""
    final = run / "final"
    source = start or (str(final) if final.exists() else config["model"])
    try:
        return load(source, seed=config["seed"], tags=True)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"the model that the run began with is needed for its tokenizer: say where it lies now "
            f"with --model DIR. {error}"
        ) from error
