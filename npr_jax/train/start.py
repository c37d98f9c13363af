"""Where a run begins that goes on from a step of another one: `start: RUN@STEP`, `--from`."""

from collections.abc import Set
from pathlib import Path
from typing import NamedTuple

from npr_jax.model.config import LoraConfig
from npr_jax.runs.checkpoint import checkpoint_steps
from npr_jax.runs.directory import known_inputs, read_config
from npr_jax.train.export import checkpoints_of


class Start(NamedTuple):
    """A step of a run, and the directory or URL of the run's checkpoints."""

    run: Path
    step: int
    checkpoints: str


def parse_start(text: str) -> tuple[Path, int]:
    """The run directory and the step of RUN@STEP. Raises ValueError for other texts."""
    run, _, step = text.rpartition("@")
    if not run or not step.isascii() or not step.isdigit() or not 0 < int(step) < 10**9:
        raise ValueError(f"start is {text!r}, needed is RUN@STEP: runs/papo@120")
    return Path(run), int(step)


def find_start(text: str, keys: Set[str], model: str, lora: LoraConfig | None = None) -> Start:
    """The checkpoint that is named by RUN@STEP, for a new run whose config has these keys, of a
    model of that content and with these adapters.

    Raises ValueError where there is none, or it is of another stage, model or other adapters.
    """
    run, step = parse_start(text)
    path = run / "config.yaml"
    if not path.is_file():
        raise ValueError(f"start is {text}: {run} is no run directory, for it has no config.yaml")
    config = read_config(path)
    if foreign := config.keys() - keys:
        raise ValueError(
            f"start is {text}: {run} is a run of another stage, for it has {min(foreign)}"
        )
    seen, train = lora and {**vars(lora), "targets": list(lora.targets)}, config.get("train") or {}
    if seen != train.get("lora"):
        raise ValueError(
            f"start is {text}: train.lora is {seen}, needed is that of {run}, {train.get('lora')}"
        )
    known = known_inputs(run).get("model", model)
    if known != model:
        raise ValueError(
            f"start is {text}: model is {model}, needed is that with which {run} began, {known}"
        )
    place = checkpoints_of(run)
    steps = checkpoint_steps(place)
    if step not in steps:
        there = f"there are {', '.join(map(str, steps))}" if steps else f"there is none in {place}"
        raise ValueError(f"start is {text}: {run} has no checkpoint of step {step}, {there}")
    return Start(run, step, place)
