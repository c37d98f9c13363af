"""Problems in an order that goes from easy to hard: their levels, and a schedule over them."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from npr_jax.base.fields import Checked, Count, Share
from npr_jax.base.seeds import derive_seeds
from npr_jax.data.problems import Order, Problem, shuffled


@dataclasses.dataclass(frozen=True)
class CurriculumConfig(Checked):
    """How often each level of problems is drawn. It depends on how many problems were drawn before,
    and on nothing else, so a run that goes on draws as it would have.

    Attributes:
      problems (problems): over which the draws move evenly from the lowest level alone to the
        highest alone; halfway between two levels they are drawn alike.
      mixed: share of the draws that are of all levels alike, from the first to the last; 1 is all.
    """

    problems: Count
    mixed: Share = 0.0

    def shares(self, levels: int, place: int) -> np.ndarray:
        """f64[levels], how likely each is to be drawn after `place` problems; adds up to 1."""
        at = min(1.0, place / self.problems) * (levels - 1)
        moving = np.maximum(0.0, 1.0 - np.abs(np.arange(levels) - at))
        return self.mixed / levels + (1 - self.mixed) * moving


class ByLevel:
    """An endless order of the indices of problems, by the schedule over their levels.

    Each level has a shuffled order of its own, through which it goes draw by draw, each epoch anew.
    It depends on the integers of `path`, as seeds do. Raises ValueError where all problems have one
    level.
    """

    def __init__(self, problems: Sequence[Problem], config: CurriculumConfig, *path: int):
        names = sorted({problem.level for problem in problems})
        if len(names) < 2:
            raise ValueError(
                f"curriculum is set, but all {len(problems)} problems have level {names[0]}: "
                'needed are two or more levels (the integer "level" of a problem), or no curriculum'
            )
        self._config = config
        self._members = [
            [i for i, problem in enumerate(problems) if problem.level == name] for name in names
        ]
        self._orders = [
            shuffled(len(members), *path, number) for number, members in enumerate(self._members)
        ]
        self._rng = np.random.default_rng(derive_seeds(1, *path, len(names)))
        self._drawn = [0] * len(names)
        self._known: list[int] = []

    def __getitem__(self, index: int) -> int:
        while len(self._known) <= index:
            shares = self._config.shares(len(self._drawn), len(self._known))
            level = int(np.searchsorted(np.cumsum(shares), self._rng.random(), "right"))
            level = min(level, len(shares) - 1)  # where rounding leaves the sum below 1
            place = int(self._orders[level][self._drawn[level]])
            self._known.append(self._members[level][place])
            self._drawn[level] += 1
        return self._known[index]


def order_of(problems: Sequence[Problem], config: CurriculumConfig | None, *path: int) -> Order:
    """`shuffled`, or with a curriculum `ByLevel`."""
    return ByLevel(problems, config, *path) if config else shuffled(len(problems), *path)
