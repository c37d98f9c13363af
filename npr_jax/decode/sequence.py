"""The host's picture of answers in the making: requests, sequences, segments and forks.

A `Request` is one answer that was asked for. A `Sequence` is a run of its text that counts its
positions up by one: the trunk, or a branch. It consists of `Segment`s (tokens and the pages that
hold their keys) with a `Fork` between two of them. Forking and joining move no token and no page: a
branch's table is its parent's segments and its own; after the join the trunk's table is what it saw
before, then every branch's segments. Where rules hide a part of them (tree/rules.py), a table lists
copies of the entries that are left.

A segment's tokens and what was computed of them are two things: a preempted answer gives up its
pages, and later its segments are computed again from their tokens.

Who writes which field: the table in docs/architecture.md.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from npr_jax.decode.sampling import SamplingParams
from npr_jax.tree import Automaton, Block, TreeLayout
from npr_jax.tree.parse import OpenBlock

# Of a token: the step that drew it (-1: none), whether the engine wrote it, and the sampler's.
FIGURES = np.dtype(
    [("logp", "f4"), ("logp_sampled", "f4"), ("margin", "f4"), ("step", "i4"), ("forced", "?")]
)


@functools.cache
def _wide(top: int) -> np.dtype:
    own = [(name, FIGURES[name]) for name in FIGURES.names or ()]
    return np.dtype([*own, ("top_ids", "i4", (top,)), ("top_logp", "f4", (top,))])


def figures_of(sampling: SamplingParams) -> np.dtype:
    """The figures that tokens have: FIGURES, and where they are asked for the ids and raw log-probs
    of the likeliest tokens in place of each (-1 and 0: none)."""
    top = max(sampling.logprobs, sampling.prompt_logprobs or 0)
    return _wide(top) if top else FIGURES


class PromptScores:
    """Raw log-probs of a prompt of L tokens, which the answers to it share.

    Attributes:
      token_ids: i32[L].
      logp: f32[L]; 0 for the first token, which nothing predicts.
      top_ids, top_logp: i32[L, k] and f32[L, k], of the likeliest tokens in place of each, as in a
        Trajectory (-1 and 0 for the first); k is `sampling.prompt_logprobs`.
      missing: bool[L], what the device was not asked for yet.
      finite: whether all that it has told so far is.
    """

    def __init__(self, token_ids, top: int):
        length = len(token_ids)
        self.token_ids = np.array(token_ids, np.int32)
        self.logp = np.zeros(length, np.float32)
        self.top_ids = np.full((length, top), -1, np.int32)
        self.top_logp = np.zeros((length, top), np.float32)
        self.missing = np.arange(length) > 0
        self.finite = True

    def put(self, at: np.ndarray, logp: np.ndarray, top_ids: np.ndarray, top_logp: np.ndarray):
        """The device has told those of the tokens at `at` [N], with k or more of the likeliest."""
        top = self.top_ids.shape[1]
        self.logp[at], self.finite = logp, self.finite and bool(np.isfinite(logp).all())
        self.top_ids[at], self.top_logp[at] = top_ids[:, :top], top_logp[:, :top]


Piece = tuple["Segment", int, int]  # the entries [begin, end) of a segment


class Segment:
    """Tokens at positions start, start + 1, ...; `before`: the segments they see, in order;
    `dtype`: of `figures_of`."""

    def __init__(self, start: int, before: tuple["Segment", ...], dtype: np.dtype = FIGURES):
        self.start, self.before, self.dtype = start, before, dtype
        self.table = (*before, self)
        self.offset = sum(len(segment.tokens) for segment in before)  # entries before its own
        self.scores: PromptScores | None = None  # of the prompt that it is of, if it is scored
        self.tokens: list[int] = []
        self.figures = bytearray()  # of each token, `dtype`
        self.pages: list[int] = []
        # i32[P, 2], `pages` and its own entries before each; None where they have changed.
        self.row: np.ndarray | None = None
        self.computed = 0  # tokens whose keys are in `pages`
        # Text of one line from position 0 on, which begins where a page of such text does; of its
        # pages the pool's cache knows the first `published`.
        self.plain, self.published = False, 0
        self.refs = 0  # tables that list it
        # The segment of another answer whose first tokens these are: its pages are these, too.
        self.of: Segment | None = None
        # What it is a copy of: its entries are these of other segments, keys and positions too.
        self.pieces: tuple[Piece, ...] = ()

    @property
    def to_score(self) -> bool:
        """Whether tokens of its prompt have no scores yet, so that it has to be computed."""
        return self.scores is not None and bool(self.scores.missing.any())

    def append_known(self, tokens, forced: bool) -> None:
        """Adds tokens that were not sampled: the prompt (forced False) or a header."""
        figures = self.no_figures(len(tokens))
        figures["step"], figures["forced"] = -1, forced
        self.append(tokens, figures)

    def no_figures(self, count: int) -> np.ndarray:
        """Figures of so many tokens that have none."""
        figures = np.zeros(count, self.dtype)
        if self.dtype != FIGURES:
            figures["top_ids"] = -1
        return figures

    def append(self, tokens, figures: np.ndarray) -> None:
        """Adds tokens with their figures."""
        self.tokens += tokens
        self.figures += figures.tobytes()

    def shorten(self, count: int) -> None:
        """Only the first `count` tokens stay."""
        del self.tokens[count:], self.figures[count * self.dtype.itemsize :]

    @property
    def whole(self) -> Piece:
        """All of it."""
        return self, 0, len(self.tokens)

    @property
    def sources(self) -> tuple["Segment", ...]:
        """What it is computed from."""
        return tuple(segment for segment, _, _ in self.pieces) or self.before


def table_of(before: tuple[Segment, ...], pieces: Iterable[Piece]) -> tuple[Segment, ...]:
    """The table of what sees the segments `before`, and these pieces behind them. Whole segments
    are listed as they are; of others, which may begin inside a page, one copy for all that follow
    each other."""
    for is_whole, run in itertools.groupby(pieces, lambda piece: piece == piece[0].whole):
        some = tuple(run)
        if is_whole:
            before += tuple(segment for segment, _, _ in some)
            continue
        first, begin, _ = some[0]
        copy = Segment(first.start + begin, before, first.dtype)
        copy.pieces = some
        for segment, begin, end in some:
            copy.tokens += segment.tokens[begin:end]
        before = copy.table
    return before


@dataclasses.dataclass
class Fork:
    """A block that was forked.

    `block` has start, guideline_close, plans and takeaway, counted in the sequence's own tokens;
    `opens`: where in each branch its `<step>` stands; `undecided`: they are trials that still grow,
    and nobody has heard of what they drew; `first`: tokens of the shortest trial so far that has a
    result.
    """

    block: Block | OpenBlock
    branches: list["Sequence"]
    opens: list[int]
    joined: bool = False
    undecided: bool = False
    first: int | None = None


class Sequence:
    """The trunk of an answer or one of its branches."""

    def __init__(self, request: "Request", parent: "Sequence | None", number: int, key: np.ndarray):
        self.request, self.parent, self.number, self.key = request, parent, number, key
        self.path: tuple = (*parent.path, len(parent.items), number) if parent else (request.id,)
        self.depth: int = parent.depth + 1 if parent else 0
        # The same for callers: (block, branch) of every sequence above, both counted from 0.
        self.branch: tuple[tuple[int, int], ...] = ()
        if parent:
            block = sum(isinstance(item, Fork) for item in parent.items)
            self.branch = (*parent.branch, (block, number))
        self.items: list[Segment | Fork] = []
        self.tail: Segment  # the last of them that is one: it grows, unless a fork has sealed it
        self.automaton: Automaton | None = None
        self.budget = 0
        self.given: list[int] | None = None  # what its last segment will hold, if not drawn
        self.lane: int | None = None
        self.ready = False  # all that it sees is computed, or will be by what is on its way
        # Where rules hide a part: what its table is computed from, each segment behind what it is
        # computed from itself, and how much of that comes first (() where the table is all).
        self.needed: tuple[Segment, ...] = ()
        self.stage: tuple[Segment, ...] = ()
        self.late = parent.late if parent else 0  # its positions, less the tokens on its path
        self.epoch = 0  # counts starts on a lane: what was drawn in an earlier one is dropped
        self.pending = 0  # tokens that may have been drawn and were not read yet
        self.text: Any = None  # text.StopText of all its tokens, where somebody listens
        self.stop: Any = None  # text.StopText of what it has drawn, where texts end it
        self.untold = 0  # runs of its tokens that nobody has heard of yet
        self.waiting = False  # for its branches
        self.done = False
        self.failure: tuple[str, str] | None = None
        self.cut = False  # a trial that was cut off where another had a result

    def append(self, segment: Segment) -> None:
        """The sequence goes on in this segment."""
        self.items.append(segment)
        self.tail = segment

    @property
    def fork(self) -> Fork:
        """The fork whose branches it waits for."""
        last = self.items[-1]
        assert isinstance(last, Fork)
        return last

    @property
    def position(self) -> int:
        """Position of the sequence's last token."""
        return self.tail.start + len(self.tail.tokens) - 1

    @property
    def table(self) -> tuple[Segment, ...]:
        """The segments the sequence's next token sees, in order."""
        return self.tail.table

    @property
    def needs(self) -> tuple[Segment, ...]:
        """The segments that are to be computed before it draws, as far as there are pages for."""
        return self.stage or self.table

    def order(self) -> tuple[Segment, ...]:
        """Its table, and what this is computed from, as far as it is not; each segment behind what
        it is computed from itself."""
        found: dict[Segment, None] = {}

        def add(segment: Segment) -> None:
            if segment not in found:
                for other in segment.sources if self.lacks(segment) else ():
                    add(other)
                found[segment] = None

        for segment in self.table:
            add(segment)
        return tuple(found)

    @property
    def left(self) -> int:
        """Tokens the sequence may still draw by its budget or its positions."""
        tail = self.tail
        return min(self.budget, self.request.max_position - tail.start - len(tail.tokens))

    def lacks(self, segment: Segment) -> int:
        """Tokens of a segment of its table to be computed before the sequence draws: all that are
        not, but its own last."""
        count = len(segment.tokens) - (segment is self.tail) - segment.computed
        return count if count > 0 else 0

    @property
    def segments(self) -> list[Segment]:
        """The sequence's own, without those of its branches."""
        return [item for item in self.items if isinstance(item, Segment)]

    def own_tokens(self) -> list[int]:
        """The sequence's own tokens, without those of its branches."""
        return [t for item in self.items if isinstance(item, Segment) for t in item.tokens]


class Request:
    """One answer in the making: what was asked, and the trunk with all that grew from it.

    `id`: the order of arrival, which is the priority; `replica`: where it decodes; `on_event`: the
    caller's; `quiet`: no consumer wants its tokens; `end`: why it ended (reason, detail), told or
    not; `silent`: nothing but its finish will be told; `ends`: ids that end the text; `stops`: ids
    at which a lane freezes, `ends` first; `scores`: of its prompt, if they are asked for; `echoed`:
    they are told, or will be; `running`: whether its tables hold pages; `passed`: later answers
    that have started before it; `refused`: why blocks went on sequentially; `tree`: the layout that
    is replayed; `cached`: tokens of its prompt that were not computed for it.
    """

    def __init__(self, number: int, sampling: SamplingParams, prompt_len: int, max_position: int):
        self.id, self.sampling, self.prompt_len = number, sampling, prompt_len
        self.max_position = max_position
        self.replica = 0
        self.quiet = self.silent = False
        self.end: tuple[str, str] | None = None
        self.on_event: Callable | None = None
        self.scores: PromptScores | None = None
        self.echoed = False
        self.ends: frozenset[int] = frozenset()
        self.stops: tuple[int, ...] = ()
        self.trunk: Sequence  # the maker's
        self.tree: TreeLayout | None = None
        self.running = False
        self.preempted = self.passed = self.cached = 0
        self.refused: list[str] = []

    @property
    def ends_from(self) -> int:
        """The position from which on a line may end."""
        return self.prompt_len + self.sampling.min_tokens

    @property
    def length(self) -> int:
        """Tokens on the longest path of the response, as far as it has come."""
        last = max((sequence.position - sequence.late for sequence in self.growing()), default=0)
        return max(0, last + 1 - self.prompt_len)

    @property
    def shortest(self) -> int:
        """The same of the shortest of the paths that can go on."""
        last = min((sequence.position - sequence.late for sequence in self.growing()), default=0)
        return max(0, last + 1 - self.prompt_len)

    def growing(self) -> Iterator[Sequence]:
        """The sequences that can go on: not ended, not waiting for branches."""

        def walk(sequence: Sequence):
            if not sequence.done and not sequence.waiting:
                yield sequence
            if sequence.waiting:
                for branch in sequence.fork.branches:
                    yield from walk(branch)

        yield from walk(self.trunk)

    def tables(self) -> Iterator[tuple[Segment, ...]]:
        """The tables that hold pages: of the sequences that have not ended, and of branches that
        have ended and wait to be joined; and what some are computed from."""

        def walk(sequence: Sequence):
            yield sequence.table
            if sequence.needed:
                yield sequence.needed
            if sequence.waiting:
                for branch in sequence.fork.branches:
                    yield from walk(branch)

        if self.running:
            yield from walk(self.trunk)
