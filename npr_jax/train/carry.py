"""Answers that a batch leaves to the next one, and how they are kept.

An answer that goes on is its Trajectory alone (decode/regrow.py): tokens, the log-probs under which
they were drawn, and where it forked.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from npr_jax.decode import Trajectory
from npr_jax.decode.sequence import FIGURES
from npr_jax.tree import Block, Rules, layout

_ARRAYS = ("token_ids", *(FIGURES.names or ()))


class UnderWay(NamedTuple):
    """A group that goes on: where its problem stands among all, the seed of its answers, and the
    batch in which it was begun."""

    place: int
    seed: int
    step: int


@dataclasses.dataclass
class Carried:
    """What a batch leaves to the next one.

    Attributes:
      groups: under way, those of all processes.
      answers: this process's answers of these groups, by place and sample: those that have ended,
        and those that go on.
    """

    groups: list[UnderWay] = dataclasses.field(default_factory=list)
    answers: dict[tuple[int, int], Trajectory] = dataclasses.field(default_factory=dict)


def to_arrays(carried: Carried) -> tuple[list, dict[str, np.ndarray]]:
    """Answers that go on as JSON values and arrays, to be kept."""
    facts, columns = [], {name: [] for name in _ARRAYS}
    for (place, sample), made in carried.answers.items():
        blocks = [[*block] for block in made.layout.blocks]
        facts.append([place, sample, made.prompt_len, made.finish_reason, made.detail, blocks])
        rules = dataclasses.asdict(made.layout.rules)
        facts[-1] += [made.text, made.stats, rules, len(made.token_ids)]
        for name, column in columns.items():
            column.append(getattr(made, name))
    arrays = {
        name: np.concatenate(column) if column else np.zeros(0) for name, column in columns.items()
    }
    return facts, arrays


def from_arrays(facts: list, arrays: Mapping[str, np.ndarray]) -> dict[tuple[int, int], Trajectory]:
    """The answers of `to_arrays`."""
    found, begin = {}, 0
    for place, sample, prompt_len, reason, detail, blocks, text, stats, rules, size in facts:
        own = {name: arrays[name][begin : begin + size] for name in _ARRAYS}
        begin += size
        spans = [Block(*map(_tuples, block)) for block in blocks]
        known = Rules(**rules), own["token_ids"]
        tree = layout(size, spans, prompt_len, own["forced"], *known)
        found[place, sample] = Trajectory(
            prompt_len=prompt_len,
            layout=tree,
            text=text,
            finish_reason=reason,
            detail=detail,
            stats=stats,
            **own,
        )
    return found


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
