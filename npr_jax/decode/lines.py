"""The host's picture of answers in the making: segments, lines, forks, and how they become spans.

A `Line` is a run of text that counts its positions up by one: the trunk of an answer, or a branch.
It consists of `Segment`s (tokens and the pages that hold their keys) with a `Fork` between two of
them. Forking and joining move no token and no page: a branch's table is its parent's segments and
its own; after the join the trunk's table is what it saw before, then every branch's segments.

A segment's tokens and what was computed of them are two things: a preempted answer gives up its
pages, and later its segments are computed again from their tokens.
"""

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np

from npr_jax.decode.events import Event, TextPieces
from npr_jax.tree import Automaton, Block, TagIds, TreeLayout


class Segment:
    """Tokens at positions start, start + 1, ...; `before`: the segments they see, in order."""

    def __init__(self, start: int, before: tuple["Segment", ...]):
        self.start, self.before = start, before
        self.table = (*before, self)
        self.offset = sum(len(segment.tokens) for segment in before)  # entries before its own
        self.tokens: list[int] = []
        self.logp: list[float] = []
        self.logp_sampled: list[float] = []
        self.margin: list[float] = []
        self.step: list[int] = []
        self.forced: list[bool] = []
        self.pages: list[int] = []
        self.row: np.ndarray | None = None  # `pages` as an array; None where they have changed
        self.computed = 0  # tokens whose keys are in `pages`
        self.published = 0  # pages of a prompt that the pool's cache knows
        self.refs = 0  # tables that list it

    def append_known(self, tokens, forced: bool) -> None:
        """Adds tokens that were not sampled: the prompt (forced False) or a header."""
        zeros = [0.0] * len(tokens)
        self.append(tokens, zeros, zeros, zeros, [-1] * len(tokens), forced)

    def append(self, tokens, logp, logp_sampled, margin, step, forced: bool = False) -> None:
        """Adds tokens with their figures."""
        self.tokens.extend(tokens)
        self.logp.extend(logp)
        self.logp_sampled.extend(logp_sampled)
        self.margin.extend(margin)
        self.step.extend(step)
        self.forced.extend([forced] * len(tokens))


@dataclasses.dataclass
class Script:
    """A line to be replayed: pieces of given tokens, of which the first `heads[i]` of piece i are a
    forced header, and after each piece the scripts of a fork's branches (none after a last one)."""

    pieces: list[list[int]]
    heads: list[int]
    forks: list[list["Script"]]


@dataclasses.dataclass
class Fork:
    """A block that was forked. `block` has its plans and its takeaway, counted in the line's own
    tokens (None in a replay, whose layout is given)."""

    block: object  # the automaton's open block
    branches: list["Line"]
    joined: bool = False


class Line:
    """The trunk of an answer or one of its branches."""

    def __init__(self, job: "Job", parent: "Line | None", number: int, key: np.ndarray):
        self.job, self.parent, self.number, self.key = job, parent, number, key
        self.path: tuple = (*parent.path, len(parent.items), number) if parent else (job.order,)
        self.depth: int = parent.depth + 1 if parent else 0
        # The same for callers: (block, branch) of every line above, both counted from 0.
        self.branch: tuple[tuple[int, int], ...] = ()
        if parent:
            block = sum(isinstance(item, Fork) for item in parent.items)
            self.branch = (*parent.branch, (block, number))
        self.items: list[Segment | Fork] = []
        self.automaton: Automaton | None = None
        self.budget = 0
        self.lane: int | None = None
        self.seat = 0  # counts starts on a lane: what was drawn for an earlier one is dropped
        self.text: TextPieces | None = None
        self.flying = 0  # tokens that may have been drawn and were not read yet
        self.waiting = False  # for its branches
        self.done = False
        self.failure: tuple[str, str] | None = None
        self.script: Script | None = None
        self.piece = 0

    @property
    def tail(self) -> Segment:
        """The segment that grows."""
        return self.items[-1]

    @property
    def position(self) -> int:
        """Position of the line's last token."""
        return self.tail.start + len(self.tail.tokens) - 1

    @property
    def table(self) -> tuple[Segment, ...]:
        """The segments the line's next token sees, in order."""
        last = self.items[-1] if isinstance(self.items[-1], Segment) else self.items[-2]
        return last.table

    @property
    def left(self) -> int:
        """Tokens the line may still draw by its budget, its positions, or its script."""
        if self.script:
            return len(self.script.pieces[self.piece]) - len(self.tail.tokens)
        return min(self.budget, self.job.max_position - 1 - self.position)

    def own_tokens(self) -> list[int]:
        """The line's own tokens, without those of its branches."""
        return [t for item in self.items if isinstance(item, Segment) for t in item.tokens]


class Job:
    """One answer in the making: what was asked, and the trunk with every line that grew from it.

    `order`: of arrival, the priority, and the request's id; `replica`: where it decodes;
    `penalised`: whether tokens it has seen change the logits; `on_event`: the caller's; `failure`:
    what this raised; `ends`: ids that end the text; `stops`: ids at which a lane freezes;
    `running`: whether its tables hold pages; `refused`: why blocks went on sequentially;
    `tree`: the layout that is replayed.
    """

    def __init__(self, order: int, sampling, prompt_len: int, max_position: int):
        self.order, self.sampling, self.prompt_len = order, sampling, prompt_len
        self.max_position = max_position
        self.replica = 0
        self.penalised = False
        self.failure: str | None = None
        self.on_event: Callable[[Event], None] | None = None
        self.ends: frozenset[int] = frozenset()
        self.stops: tuple[int, ...] = ()
        self.trunk: Line | None = None
        self.tree: TreeLayout | None = None
        self.running = False
        self.preempted = 0
        self.refused: list[str] = []

    def lines(self) -> Iterator[Line]:
        """The lines that can go on: not ended, not waiting for branches."""

        def walk(line: Line):
            if not line.done and not line.waiting:
                yield line
            if line.waiting:
                for branch in line.items[-1].branches:
                    yield from walk(branch)

        yield from walk(self.trunk)

    def tables(self) -> Iterator[tuple[Segment, ...]]:
        """The tables that hold pages: of the lines that have not ended, and of branches that have
        ended and wait to be joined."""

        def walk(line: Line):
            yield line.table
            if line.waiting:
                for branch in line.items[-1].branches:
                    yield from walk(branch)

        if self.running:
            yield from walk(self.trunk)


def flatten(trunk: Line, tags: TagIds | None) -> tuple[list[Segment], list[Block]]:
    """The segments of an answer in depth-first order, and the spans of its forked blocks."""
    segments: list[Segment] = []
    found: list[tuple] = []
    total = 0

    def walk(line: Line, depth: int) -> None:
        nonlocal total
        own = 0  # tokens of this line so far
        for item in line.items:
            if isinstance(item, Segment):
                segments.append(item)
                total += len(item.tokens)
                own += len(item.tokens)
                continue
            before, slot, steps = total - own, len(found), []
            found.append(())
            for branch in item.branches:
                start = total
                walk(branch, depth + 1)
                if item.block is not None:
                    open_tag = branch.items[0].tokens.index(tags.step_open)
                    steps.append((start + open_tag, total))
            found[slot] = (item, depth, before, tuple(steps), total, total - own)

    def block(item: Fork, depth, before, steps, join, after) -> Block:
        """`before` and `after`: what to add to the line's own token counts around the fork."""
        b, takeaway = item.block, None
        if item.joined:
            end = b.takeaway[1]
            takeaway = (b.takeaway[0] + after, total if end is None else end + after)
        return Block(
            start=b.start + before,
            guideline_close=b.guideline_close + before,
            plans=tuple((start + before, end + before) for start, end in b.plans),
            steps=steps,
            join=join if item.joined else total,
            takeaway=takeaway,
            end=takeaway[1] if takeaway else total,
            depth=depth,
        )

    walk(trunk, 0)
    return segments, [block(*parts) for parts in found if parts[0].block is not None]


def script_of(tokens: list[int], tree: TreeLayout) -> Script:
    """Cuts a laid-out trace into the scripts of its trunk and branches; the prompt's last token and
    what follows belong to the trunk's first piece."""

    def line(start: int, end: int, depth: int) -> Script:
        script = Script([], [], [])
        for block in tree.blocks:
            if block.depth != depth or not start <= block.start < end or not block.steps:
                continue
            cut = block.guideline_close + 1
            script.pieces.append(tokens[start:cut])
            script.forks.append([line(s, e, depth + 1) for s, e in block.branches])
            script.heads.append(head(start, cut))
            start = block.join
            if block.join == len(tree):
                return script
        script.pieces.append(tokens[start:end])
        script.heads.append(head(start, end))
        return script

    def head(start: int, end: int) -> int:
        sampled = np.flatnonzero(~tree.forced[start:end])
        return int(sampled[0]) if len(sampled) else end - start

    first = max(tree.prompt_len - 1, 0)
    script = line(first, len(tokens), 0)
    script.heads[0] = 1  # the prompt's last token
    return script
