"""Where a run begins that goes on from a step of another one: `start: RUN@STEP`, `--from`."""

import sys
from collections.abc import Mapping, Set
from pathlib import Path
from typing import NamedTuple

from npr_jax.base.distributed import is_main
from npr_jax.runs.checkpoint import Checkpoints, checkpoint_steps
from npr_jax.runs.directory import known_inputs, read_config
from npr_jax.train.export import checkpoints_of
from npr_jax.train.step import TrainConfig


class Start(NamedTuple):
    """A step of a run, and the directory or URL of the run's checkpoints."""

    run: Path
    step: int
    checkpoints: str

    def check(self, inputs: Mapping[str, str]) -> None:
        """Raises ValueError for an input (key: content) that is not what the run began with."""
        known = known_inputs(self.run)
        for key, content in inputs.items():
            if known.get(key, content) != content:
                raise ValueError(
                    f"start is {self}: {key} is {content}, needed is that with which {self.run} "
                    f"began, {known[key]}"
                )

    def begin(self, checkpoints: Checkpoints, name: str) -> None:
        """Lets a run that has no checkpoint of its own begin with this one, and tells so."""
        checkpoints.start = self.checkpoints, self.step, place_of
        if is_main():
            print(f"{name}: goes on from step {self.step} of {self.run}", file=sys.stderr)

    def __str__(self) -> str:
        return f"{self.run}@{self.step}"


def parse_start(text: str) -> tuple[Path, int]:
    """The run directory and the step of RUN@STEP. Raises ValueError for other texts."""
    run, _, step = text.rpartition("@")
    if not run or not step.isascii() or not step.isdigit() or not 0 < int(step) < 10**9:
        raise ValueError(f"start is {text!r}, needed is RUN@STEP: runs/papo@120")
    return Path(run), int(step)


def place_of(position: Mapping) -> dict:
    """Of the position of a run what another one takes: the place among the problems. What that run
    had sampled ahead is asked again; answers that it had under way, its evaluations and how often
    it has failed are its own."""
    if "problem" not in position:
        return {}
    ahead = [first for _, first, _ in position.get("ahead", {}).values()]
    return {"problem": min([position["problem"], *ahead])}


def around(directory: Path, seed: int) -> str:
    """How to leave out what a run of that seed cannot train on, to be added to other advice."""
    return (
        "; to go around these answers, begin another run with a checkpoint of this one and "
        f"another seed (--from {directory}@STEP --set seed={seed + 1})"
    )


def find_start(text: str, keys: Set[str], train: TrainConfig) -> Start:
    """The checkpoint that is named by RUN@STEP, for a new run whose config has these keys, and that
    trains so.

    Raises ValueError where there is none, or it is of another stage, other adapters or another
    optimizer.
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
    owner = "fit.train" if "fit" in config else "train"
    old = (config.get("fit") or config).get("train") or {}
    lora, optimizer = train.lora, old.get("optimizer") or {}
    for key, seen, needed in (
        ("lora", lora and {**vars(lora), "targets": list(lora.targets)}, old.get("lora")),
        ("optimizer.name", train.optimizer.name, optimizer.get("name", "adamw")),
    ):
        if seen != needed:
            raise ValueError(
                f"start is {text}: {owner}.{key} is {seen}, needed is that of {run}, {needed}"
            )
    place = checkpoints_of(run)
    steps = checkpoint_steps(place)
    if step not in steps:
        there = f"there are {', '.join(map(str, steps))}" if steps else f"there is none in {place}"
        raise ValueError(f"start is {text}: {run} has no checkpoint of step {step}, {there}")
    return Start(run, step, place)
