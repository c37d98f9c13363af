"""Answers that go on from where they were left: what was drawn grows through forks and joins again.

An unfinished answer is its Trajectory and nothing else. The machinery that grew it rebuilds the
sequences, budgets and keys from its tokens, on the host; the keys and values of these are computed
later, by prefill, as those of an answer that was preempted. So one that goes on under the same
weights ends as if it had never been left.
"""

import collections
from typing import Any, NamedTuple

import numpy as np

from npr_jax.decode.config import EngineConfig
from npr_jax.decode.fork_join import ForkJoin
from npr_jax.decode.outputs import Trajectory
from npr_jax.decode.replay import Script, script_of
from npr_jax.decode.sequence import Fork, Request, Sequence
from npr_jax.tree import TagIds


class Begun(NamedTuple):
    """An answer that was left, and how many tokens of each of its paths count: what lies behind
    them is drawn anew."""

    answer: Trajectory
    tokens: int = 1 << 30


class _NoScheduler:
    """Of answers that hold neither lane nor page."""

    def release(self, sequence) -> None: ...

    def take(self, sequence) -> None: ...

    def drop(self, table) -> None: ...


class _Growth(ForkJoin):
    def __init__(self, config: EngineConfig, tags: TagIds | None):
        counts = {"sampled_tokens": 0, "forks": 0, "joins": 0}
        nobody: Any = collections.defaultdict(_NoScheduler)  # of each replica
        super().__init__(config, tags, nobody, self._ended, lambda *_, **__: None, counts)
        self.over: tuple[str, str] | None = None

    def _ended(self, request: Request, reason: str, detail: str) -> None:
        self.over = reason, detail


def regrow(
    request: Request, begun: Begun, config: EngineConfig, tags: TagIds | None, name: str
) -> None:
    """Lets a new request grow to where `begun` was left, of the same prompt and sampling.

    Raises ValueError, naming it, where it is of another prompt, or does not grow so with this
    config and sampling.
    """
    answer, trunk = begun.answer, request.trunk
    ids = answer.token_ids.tolist()
    if answer.layout.rules != config.rules:
        raise ValueError(
            f"{name} goes on from an answer with the rules {answer.layout.rules}, engine.rules are "
            f"{config.rules}"
        )
    if ids[: answer.prompt_len] != trunk.own_tokens():
        raise ValueError(f"{name} goes on from an answer to another prompt")
    figures = np.zeros(len(ids), trunk.tail.dtype)
    for field in figures.dtype.names or ():
        values, shape = getattr(answer, field), figures[field].shape
        if np.shape(values) != shape:
            raise ValueError(
                f"{name} goes on from an answer whose {field} is {list(np.shape(values))}, needed "
                f"is {list(shape)}: ask for the same log-probs as then"
            )
        figures[field] = values
    counts = answer.layout.path_positions < answer.prompt_len + begun.tokens
    growth = _Growth(config, tags)
    # The prompt's last token is the head of the trunk's first piece.
    script, at = script_of(ids, answer.layout), answer.prompt_len - 1
    _grow(growth, trunk, script, at, ids, figures, counts)
    drawn = [ids[i] for i in np.flatnonzero(counts & ~answer.forced)]
    if growth.over or drawn != _drawn(trunk):
        why = f": it ended ({growth.over[0]})" if growth.over else ""
        raise ValueError(f"{name} goes on from an answer that does not grow so here{why}")


def _grow(
    growth: _Growth, sequence: Sequence, script: Script, at: int, ids: list[int], figures, counts
) -> int:
    """Lets a sequence draw what its script has, which lies in `ids` from `at` on, as far as it
    `counts`; where it ends in `ids`."""
    for number, (piece, head) in enumerate(zip(script.pieces, script.heads, strict=True)):
        drawn, begin = script.drawn(number), at + head
        end = begin + int(counts[begin : at + drawn.stop].sum())
        at += len(piece)
        while begin < end and not growth.over:
            # One of these may be an event, at which a lane freezes: what follows is drawn later.
            stops = sequence.request.stops
            cut = next((i + 1 for i in range(begin, end) if ids[i] in stops), end)
            growth.advance(sequence, ids[begin:cut], figures[begin:cut])
            begin = cut
        if number < len(script.forks):
            children = script.forks[number][2]
            if not sequence.waiting:  # all of them lie behind what counts
                at += sum(map(_size, children))
                continue
            for branch, child in zip(sequence.fork.branches, children, strict=False):
                at = _grow(growth, branch, child, at, ids, figures, counts)
    return at


def _size(script: Script) -> int:
    """The tokens of a sequence and its branches."""
    own = sum(map(len, script.pieces))
    return own + sum(_size(child) for _, _, children in script.forks for child in children)


def _drawn(sequence: Sequence) -> list[int]:
    """The tokens that a sequence and its branches have not been given, in depth-first order."""
    found: list[int] = []
    for item in sequence.items:
        if isinstance(item, Fork):
            for branch in item.branches:
                found += _drawn(branch)
        else:
            forced = np.frombuffer(item.figures, item.dtype)["forced"]
            found += [t for t, given in zip(item.tokens, forced, strict=True) if not given]
    return found
