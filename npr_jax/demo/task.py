"""What a task of the demo is: one Python file with the names of `Task` (docs/tasks.md)."""

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np

from npr_jax.base.modules import load_module
from npr_jax.model import ModelConfig
from npr_jax.train.fit import FitConfig

TASKS = ("sums", "countdown")
Rows = Mapping[str, Mapping[str, float]]  # of the demo's table: {name: {column: value}}


class Posed(Protocol):
    """A problem: `problem` is its text, the prompt; `answer` is what `check` is given of it; a
    larger `level` is harder."""

    @property
    def problem(self) -> str: ...
    @property
    def answer(self) -> str: ...
    @property
    def level(self) -> int: ...


class Teacher(Protocol):
    """Whom the seed model learns from."""

    def answer(self, problem: Any, rng: np.random.Generator) -> str:
        """A response, up to and without the end-of-text token."""
        ...


class Task(Protocol):
    """A task file, which is a module.

    Attributes:
      __name__: of the module, by which `checker` finds it.
      ABOUT: what the problems and answers are, for the report.
      SYMBOLS: the words: texts that are a token each, beside the tags.
      MODEL: the shape of the model; its vocabulary is made for the words.
      FIT: how the seed model learns from the teacher, who answers `batch * steps` problems.
      SETTINGS: by stage ("zero", "beta", "papo"), what differs from its preset tiny_<stage>, as
        "key=value".
      CHECKS: what the demo must show: a sentence, what is measured of the rows, and at least how
        much.
      COLUMNS: further columns of the table, {column: metric of a rollout batch}.
      Teacher: makes the teacher from a seed.
    """

    __name__: str

    @property
    def ABOUT(self) -> str: ...
    @property
    def SYMBOLS(self) -> Sequence[str]: ...
    @property
    def MODEL(self) -> ModelConfig: ...
    @property
    def FIT(self) -> FitConfig: ...
    @property
    def SETTINGS(self) -> Mapping[str, Sequence[str]]: ...
    @property
    def CHECKS(self) -> Sequence[tuple[str, Callable[[Rows], float], float]]: ...
    @property
    def COLUMNS(self) -> Mapping[str, str]: ...
    @property
    def Teacher(self) -> Callable[[int], Teacher]: ...

    def draw(
        self, num: int, rng: np.random.Generator, exclude: Collection[Posed] = ()
    ) -> Sequence[Posed]:
        """`num` problems whose texts differ, none of them one of `exclude` in other words."""
        ...

    def lessons(
        self, num: int, rng: np.random.Generator, exclude: Collection[Posed] = ()
    ) -> Sequence[Posed]:
        """`num` problems for the teacher, none of `exclude`: as those of `draw`, or with more said
        in them. One may come again."""
        ...

    def check(self, prediction: str, reference: str) -> bool:
        """Whether the content of a box answers a problem with that `answer`."""
        ...


_NAMES = (
    *("ABOUT", "SYMBOLS", "MODEL", "FIT", "SETTINGS", "CHECKS", "COLUMNS"),
    *("Teacher", "draw", "lessons", "check"),
)


def find_task(name: str) -> Task:
    """The task of one of TASKS, or of a Python file. Raises ValueError for what is none."""
    if name not in TASKS and not name.endswith(".py"):
        raise ValueError(
            f"task is {name!r}, needed is one of {', '.join(TASKS)}, or a Python file (its path "
            "ends in .py)"
        )
    module = load_module(f"npr_jax.demo.{name}" if name in TASKS else name)
    if lacking := [one for one in _NAMES if not hasattr(module, one)]:
        raise ValueError(f"the task {name} has no {', '.join(lacking)}: see docs/tasks.md")
    return cast(Task, module)


def name_of(task: Task) -> str:
    """A task's short name: that of its file, without what ends it."""
    return Path(task.__name__.removesuffix(".py")).name.split(".")[-1]
