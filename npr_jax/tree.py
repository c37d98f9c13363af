"""The tree of a trace: which token sees which, at what position, and what predicts it.

A trace is a flat list of token ids in depth-first order. Its blocks

    <guideline> <plan>1: ...</plan> ... </guideline>      the trunk writes the plans
    <step> 1: ... </step> ...                             one branch per plan, blind to its siblings
    <takeaway> ... </takeaway>                            the trunk goes on and sees every branch

are found by one `Automaton`, and `layout` turns their spans into a `TreeLayout`: positions, hidden
intervals and predictors, three integer arrays that the model, the engine and the trainer share.
Nothing else in the code base reads tags.

Invariant: key k is visible to query q iff k <= q and no interval hidden[k, d] = [end, join) holds
q; and under the strict rule position[q] = 1 + the largest position among the other tokens q sees.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

TAG_NAMES = (
    "<guideline>",
    "</guideline>",
    "<plan>",
    "</plan>",
    "<step>",
    "</step>",
    "<takeaway>",
    "</takeaway>",
)
MAX_HEADERS = 64  # step headers made for a tokenizer; more branches than that cannot be forced


class TraceError(ValueError):
    """A trace is not a tree. `index`: the token at fault (or the length, at an early end)."""

    def __init__(self, index: int, reason: str):
        super().__init__(f"token {index}: {reason}")
        self.index = index
        self.reason = reason


@dataclasses.dataclass(frozen=True)
class TagIds:
    """Token ids of the eight tags, of white space, and of the text that the engine forces.

    `step_headers[i - 1]` are the ids of "\\n<step>\\n{i}:" and `takeaway_header` those of
    "\\n<takeaway>\\n"; `decode` turns ids into text. A tokenizer gives them. The layout of a trace
    needs none of the three; the numbers of its plans and the engine do.
    """

    guideline_open: int
    guideline_close: int
    plan_open: int
    plan_close: int
    step_open: int
    step_close: int
    takeaway_open: int
    takeaway_close: int
    whitespace: frozenset[int]
    step_headers: tuple[tuple[int, ...], ...] = ()
    takeaway_header: tuple[int, ...] = ()
    decode: Callable[[Sequence[int]], str] | None = dataclasses.field(default=None, compare=False)

    @property
    def ids(self) -> tuple[int, ...]:
        """The eight tag ids in the order of TAG_NAMES."""
        return tuple(getattr(self, field.name) for field in dataclasses.fields(self)[:8])

    @classmethod
    def from_tokenizer(cls, tokenizer) -> "TagIds":
        """Reads the ids from a transformers tokenizer in which every tag is a single token."""

        def encode(text: str) -> tuple[int, ...]:
            return tuple(tokenizer.encode(text, add_special_tokens=False))

        def decode(ids: Sequence[int]) -> str:
            return tokenizer.decode(
                list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
            )

        for name in TAG_NAMES:
            if len(encode(name)) != 1:
                raise ValueError(
                    f"the tokenizer splits {name} into {len(encode(name))} tokens, needed is 1: "
                    "add the tags first (npr_jax.model.add_tags)"
                )
        pieces = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
        return cls(
            *(encode(name)[0] for name in TAG_NAMES),
            whitespace=frozenset(i for i, piece in enumerate(pieces) if piece.isspace()),
            step_headers=tuple(encode(f"\n<step>\n{i}:") for i in range(1, MAX_HEADERS + 1)),
            takeaway_header=encode("\n<takeaway>\n"),
            decode=decode,
        )


class Block(NamedTuple):
    """Spans of one block, as half-open token runs `(start, end)`.

    Plans, steps and takeaway run from the opening tag to the closing tag inclusive. Branch i is
    step i with the white space before it. `join` is the first token after the last branch; in a
    block that is cut off before its takeaway it is the number of tokens.
    """

    start: int
    guideline_close: int | None
    plans: tuple[tuple[int, int], ...]
    steps: tuple[tuple[int, int], ...]
    join: int
    takeaway: tuple[int, int] | None
    end: int
    depth: int

    @property
    def branches(self) -> tuple[tuple[int, int], ...]:
        """Spans of the branches; branch i starts where branch i-1 ends."""
        if not self.steps:
            return ()
        ends = [end for _, end in self.steps]
        return tuple(zip([self.guideline_close + 1, *ends[:-1]], ends, strict=True))


@dataclasses.dataclass(frozen=True, eq=False)
class TreeLayout:
    """Positions, visibility and predictors of T tokens.

    Attributes:
      positions: i32[T].
      hidden: i32[T, D, 2]; key k is hidden from the queries in [hidden[k, d, 0], hidden[k, d, 1]).
      pred: i32[T]; the row that predicts token t, the largest k < t visible to it; -1: none.
      forced: bool[T]; tokens that the engine writes without sampling them.
      blocks: in the order of their start; empty for packed and grouped rows.
      prompt_len: number of tokens before the response.
    """

    positions: np.ndarray
    hidden: np.ndarray
    pred: np.ndarray
    forced: np.ndarray
    blocks: tuple[Block, ...] = ()
    prompt_len: int = 0

    def __len__(self) -> int:
        return len(self.positions)

    def visible(self) -> np.ndarray:
        """bool[T, T], query by key: the definition, for tests and pictures (O(T^2) memory)."""
        t = np.arange(len(self))
        seen = t[None, :] <= t[:, None]
        for d in range(self.hidden.shape[1]):
            start, end = self.hidden[:, d, 0], self.hidden[:, d, 1]
            seen &= ~((start[None, :] <= t[:, None]) & (t[:, None] < end[None, :]))
        return seen

    @property
    def num_branches(self) -> int:
        """Branches of all blocks."""
        return sum(len(block.steps) for block in self.blocks)

    @property
    def depth(self) -> int:
        """Levels of nested blocks; 0 for plain text."""
        return max((block.depth + 1 for block in self.blocks if block.steps), default=0)

    @property
    def width(self) -> int:
        """The most branches that can run at one time, nested ones included; 1 for plain text."""
        # A block starts after the blocks around it, so reversed order sees inner blocks first.
        waiting: list[tuple[int, int, int]] = []  # (depth, start, width), inner blocks not yet used
        for block in reversed(self.blocks):
            total = 0
            for _, end in block.branches:
                inner = [1]
                while waiting and waiting[-1][0] > block.depth and waiting[-1][1] < end:
                    inner.append(waiting.pop()[2])
                total += max(inner)
            if total:
                waiting.append((block.depth, block.start, total))
        return max((width for _, _, width in waiting), default=1)

    @property
    def total_len(self) -> int:
        """Tokens of the response."""
        return len(self) - self.prompt_len

    @property
    def critical_path_len(self) -> int:
        """Response tokens on the longest path: last position - prompt length + 1."""
        if not self.total_len:
            return 0
        return int(self.positions[self.prompt_len :].max()) - self.prompt_len + 1


def layout(
    num_tokens: int,
    blocks: Iterable[Block] = (),
    prompt_len: int = 0,
    forced: np.ndarray | None = None,
) -> TreeLayout:
    """Lays `num_tokens` tokens out by the spans of their blocks: the strict rule.

    Every branch starts one position after its block's `</guideline>`; the trunk goes on one after
    the largest last position of the branches. `forced` defaults to what the spans alone tell: the
    white space before `<step>` and `<takeaway>`, and these tags.
    """
    blocks = tuple(blocks)
    hidden = np.zeros((num_tokens, max((b.depth + 1 for b in blocks), default=1), 2), np.int32)
    pred = np.arange(-1, num_tokens - 1, dtype=np.int32)
    structure = np.zeros(num_tokens, bool)
    cuts: list[tuple[int, int, bool]] = []  # (index, block, is a join): where counting breaks off
    for number, block in enumerate(blocks):
        start = block.guideline_close + 1 if block.steps else 0
        for step_open, end in block.steps:
            if not start <= step_open < end <= block.join <= num_tokens:
                raise ValueError(
                    f"step [{step_open}, {end}) of a branch from {start} on, joined at "
                    f"{block.join} of {num_tokens} tokens: out of order"
                )
            hidden[start:end, block.depth] = end, block.join
            pred[start] = block.guideline_close
            structure[start : step_open + 1] = True
            cuts.append((start, number, False))
            start = end
        if block.steps and block.join < num_tokens:
            cuts.append((block.join, number, True))
        if block.takeaway:
            structure[block.join : block.takeaway[0] + 1] = True
    cuts.sort()
    base, top = ([-1] * len(blocks), [-1] * len(blocks))  # positions: of </guideline>, the largest
    begin, position = 0, 0  # of the run of tokens that count up by one
    begins, shifts = [0], [0]
    for index, number, is_join in cuts:
        last = position + index - begin - 1
        if base[number] < 0:
            base[number] = last
        top[number] = max(top[number], last)
        begin, position = index, (top[number] if is_join else base[number]) + 1
        begins.append(begin)
        shifts.append(position - begin)
    lengths = np.diff(np.array([*begins, num_tokens]))
    positions = np.arange(num_tokens) + np.repeat(shifts, lengths)
    return TreeLayout(
        positions=positions.astype(np.int32),
        hidden=hidden,
        pred=pred,
        forced=structure if forced is None else forced,
        blocks=blocks,
        prompt_len=prompt_len,
    )


# The automaton's states. TEXT: a line of text, the trunk or the body of a step.
TEXT, GUIDELINE, PLAN, STEPS, TAKEAWAY = ("text", "guideline", "plan", "steps", "takeaway")
_WHITESPACE = 8  # the kinds 0..7 are the tags in the order of TAG_NAMES


class _OpenBlock:
    """A block while it is being read; spans are [start, end] with None for an open end."""

    def __init__(self, start: int, depth: int):
        self.start, self.depth = start, depth
        self.guideline_close = self.join = self.end = self.takeaway = None
        self.plans: list[list] = []
        self.steps: list[list] = []

    def close(self, num_tokens: int) -> Block:
        """The block's spans; what is still open ends at `num_tokens`."""

        def run(span):
            return (span[0], num_tokens if span[1] is None else span[1])

        return Block(
            self.start,
            self.guideline_close,
            tuple([run(span) for span in self.plans]),
            tuple([run(span) for span in self.steps]),
            num_tokens if self.join is None else self.join,
            run(self.takeaway) if self.takeaway else None,
            num_tokens if self.end is None else self.end,
            self.depth,
        )


class Automaton:
    """Reads one line of a response token by token and says at once where it stops being a tree.

    A line is the trunk, or (`in_step=True`) the inside of a branch, which ends with its own
    `</step>`. The parser reads a whole trace as one line; the engine gives each branch an automaton
    of its own and lets the trunk's skip the steps. Token indices count from `index`.

    Attributes: `state`; `index`, tokens read so far; `blocks`, all blocks begun; `stack`, the
    open ones; `closed`, whether the line's own `</step>` was read.
    """

    def __init__(
        self,
        tags: TagIds,
        max_depth: int = 8,
        index: int = 0,
        depth: int = 0,
        in_step: bool = False,
    ):
        self._kinds = dict.fromkeys(tags.whitespace, _WHITESPACE)
        self._kinds.update({token: kind for kind, token in enumerate(tags.ids)})
        self.max_depth, self.depth, self.in_step = max_depth, depth, in_step
        self.state, self.index, self.closed = TEXT, index, False
        self.blocks: list[_OpenBlock] = []
        self.stack: list[_OpenBlock] = []

    def read(self, tokens: Iterable[int]) -> None:
        """Reads tokens; raises TraceError at the first that no tree can have there.

        The offending token is not taken: `index` and `state` are those before it.
        """
        kind_of, index, state = self._kinds.get, self.index, self.state
        for token in tokens:
            kind = kind_of(token)
            if kind is None:
                if state is GUIDELINE or state is STEPS:
                    self.index = index
                    where = "inside <guideline>" if state is GUIDELINE else "before a step"
                    raise TraceError(index, f"text {where}, where only white space may stand")
            elif kind < _WHITESPACE:
                self.index = index
                state = self.state = self._tag(kind)
            index += 1
        self.index = index

    def _tag(self, kind: int) -> str:
        """Takes a tag at `self.index` and returns the next state."""
        index = self.index
        block = self.stack[-1] if self.stack else None
        if self.closed:
            raise TraceError(index, f"{TAG_NAMES[kind]} after the end of the step")
        match self.state, kind:
            case "text", 0:
                if self.depth + len(self.stack) >= self.max_depth:
                    raise TraceError(index, f"blocks nested deeper than {self.max_depth}")
                block = _OpenBlock(index, self.depth + len(self.stack))
                self.blocks.append(block)
                self.stack.append(block)
                return GUIDELINE
            case "guideline", 2:
                block.plans.append([index, None])
                return PLAN
            case "plan", 3:
                block.plans[-1][1] = index + 1
                return GUIDELINE
            case "guideline", 1:
                if not block.plans:
                    raise TraceError(index + 1, "a guideline without a plan has ended")
                block.guideline_close = index
                return STEPS
            case "steps", 4:
                if len(block.steps) == len(block.plans):
                    raise TraceError(index, f"more steps than plans ({len(block.plans)})")
                block.steps.append([index, None])
                return TEXT
            case "text", 5 if block:
                block.steps[-1][1] = index + 1
                return STEPS
            case "text", 5 if self.in_step:
                self.closed = True
                return TEXT
            case "steps", 6:
                if len(block.steps) < len(block.plans):
                    raise TraceError(
                        index, f"fewer steps ({len(block.steps)}) than plans ({len(block.plans)})"
                    )
                block.join = block.steps[-1][1]
                block.takeaway = [index, None]
                return TAKEAWAY
            case "takeaway", 7:
                block.takeaway[1] = block.end = index + 1
                self.stack.pop()
                return TEXT
        place = {
            TEXT: "in a step" if block or self.in_step else "in the text",
            GUIDELINE: "between plans",
            PLAN: "in a plan",
            STEPS: "before a step",
            TAKEAWAY: "in a takeaway",
        }[self.state]
        raise TraceError(index, f"{TAG_NAMES[kind]} {place}")

    def skip_steps(self) -> None:
        """The open block's steps ran elsewhere (the engine's branches): go on at its takeaway."""
        block = self.stack[-1]
        block.steps = [[self.index, self.index]] * len(block.plans)

    def finish(self, allow_open: bool = False) -> tuple[Block, ...]:
        """The blocks of the line; one that is still open is an error, or is cut off here."""
        if self.stack and not allow_open:
            raise TraceError(
                self.index, f"the trace ends inside the block of token {self.stack[-1].start}"
            )
        if self.stack and self.state is STEPS:
            block = self.stack[-1]
            after = block.steps[-1][1] if block.steps else block.guideline_close + 1
            if after < self.index:
                raise TraceError(after, "cut off in white space: a step's or the trunk's?")
        return tuple([block.close(self.index) for block in self.blocks])


def parse(
    token_ids: Sequence[int],
    prompt_len: int,
    tags: TagIds,
    rule: str = "strict",
    max_depth: int = 8,
    allow_open: bool = False,
) -> TreeLayout:
    """Lays out a trace: `prompt_len` prompt tokens, which are plain text, then the response.

    Args:
      token_ids: T ids.
      prompt_len: where the response starts; tags before it are just text.
      tags: the ids of the tags and of white space.
      rule: "strict", or "reference" for the released trainer's masks and positions (complete
        blocks of one level).
      max_depth: levels of nested blocks that are accepted.
      allow_open: lay out a response that was cut off inside a block instead of refusing it.

    Raises:
      TraceError: with the index of the first token at which the response is no tree.
    """
    tokens = np.asarray(token_ids).tolist()
    if not 0 <= prompt_len <= len(tokens):
        raise ValueError(f"prompt_len is {prompt_len}, needed is 0 to {len(tokens)} (tokens)")
    if rule not in ("strict", "reference"):
        raise ValueError(f"rule is {rule!r}, needed is 'strict' or 'reference'")
    if rule == "reference" and allow_open:
        raise ValueError("rule='reference' lays out complete traces only: allow_open must be False")
    automaton = Automaton(tags, max_depth, index=prompt_len)
    automaton.read(tokens[prompt_len:])
    tree = layout(len(tokens), automaton.finish(allow_open), prompt_len)
    # The spans give the forced tags; the canonical headers reach past them.
    for block in tree.blocks:
        starts = [start for start, _ in block.branches]
        heads = list(zip(starts, tags.step_headers, strict=False))
        if block.takeaway:
            heads.append((block.join, tags.takeaway_header))
        for start, head in heads:
            if tuple(tokens[start : start + len(head)]) == head:
                tree.forced[start : start + len(head)] = True
    return tree if rule == "strict" else _reference(tree)


def _reference(tree: TreeLayout) -> TreeLayout:
    """The released SFT trainer's mask and positions for the blocks of `tree`.

    Only the spans `<step>...</step>` are hidden, from later siblings' spans (siblings - 1
    intervals), so the separators leak. Every `<step>` restarts at p + 1, p being the position of
    `</guideline>`; the tokens between steps count on; `<takeaway>` stands at p + longest step + 1.
    Targets are the flat shift.
    """
    num_tokens = len(tree)
    for block in tree.blocks:
        if block.depth:
            raise TraceError(block.start, "rule='reference' has no nested blocks")
    siblings = max((len(block.steps) for block in tree.blocks), default=1)
    hidden = np.zeros((num_tokens, max(1, siblings - 1), 2), np.int32)
    begins, starts = ([0], [0])  # of the runs of tokens that count up by one: index, position
    for block in tree.blocks:
        base = starts[-1] + block.guideline_close - begins[-1]
        for i, (start, end) in enumerate(block.steps):
            for d, later in enumerate(block.steps[i + 1 :]):
                hidden[start:end, d] = later
            begins.append(start)
            starts.append(base + 1)
        begins.append(block.takeaway[0])
        starts.append(base + 1 + max(end - start for start, end in block.steps))
    lengths = np.diff(np.array([*begins, num_tokens]))
    positions = np.arange(num_tokens) + np.repeat(np.subtract(starts, begins), lengths)
    pred = np.arange(-1, num_tokens - 1, dtype=np.int32)
    return dataclasses.replace(tree, hidden=hidden, positions=positions.astype(np.int32), pred=pred)


def pack(layouts: Sequence[TreeLayout], length: int | None = None) -> TreeLayout:
    """Lays documents side by side in one row: branches of nothing that never join.

    `length` pads the row; the padding is one more document, seen by nobody and without predictors.
    Returns a layout without blocks whose `hidden` has one column more than the deepest member's.
    """
    total = sum(map(len, layouts))
    length = total if length is None else length
    if total > length:
        raise ValueError(f"the documents have {total} tokens, the row has {length}")
    padding = layout(length - total)
    padding.pred[:] = -1
    return _side_by_side([*layouts, padding], 0)


def group(traces: Sequence[TreeLayout]) -> TreeLayout:
    """Lays the responses of one prompt behind it, as branches that never join.

    All traces share their first `prompt_len` tokens; the row holds these once, then each response.
    The first token of every response is predicted by the prompt's last. Returns a layout without
    blocks, with one more column in `hidden`.
    """
    prompt_len = traces[0].prompt_len
    if any(trace.prompt_len != prompt_len for trace in traces):
        raise ValueError(
            f"a group shares one prompt: prompt lengths are {[t.prompt_len for t in traces]}"
        )
    return _side_by_side(traces, prompt_len)


def _side_by_side(trees: Sequence[TreeLayout], shared: int) -> TreeLayout:
    """One row: the first `shared` tokens of trees[0], then the rest of every tree, never joined."""
    total = shared + sum(len(tree) - shared for tree in trees)
    depth = max(tree.hidden.shape[1] for tree in trees)
    hidden = np.zeros((total, depth + 1, 2), np.int32)
    pred = np.arange(-1, total - 1, dtype=np.int32)
    begin = shared
    for tree in trees:
        end, shift = begin + len(tree) - shared, begin - shared
        hidden[begin:end, : tree.hidden.shape[1]] = tree.hidden[shared:] + shift
        hidden[begin:end, depth] = end, total
        own = tree.pred[shared:]
        pred[begin:end] = np.where(own >= shared, own + shift, own)
        begin = end

    def row(name: str) -> np.ndarray:
        parts = [getattr(tree, name)[shared:] for tree in trees]
        return np.concatenate([getattr(trees[0], name)[:shared], *parts])

    return TreeLayout(
        positions=row("positions"),
        hidden=hidden,
        pred=pred,
        forced=row("forced"),
        prompt_len=shared,
    )
