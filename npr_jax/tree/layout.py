"""Spans of branches become positions, hidden intervals and predictors: the core of the tree.

    spans --layout--> TreeLayout --pack, group--> rows of many traces

A layout is three integer arrays that the model, the engine and the trainer share; no tags are read
here.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np


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
        return tuple(zip([self.fork, *ends[:-1]], ends, strict=True))

    @property
    def fork(self) -> int:
        """The first token after `</guideline>`, where the branches start."""
        assert self.guideline_close is not None, "the block is cut off in its guideline"
        return self.guideline_close + 1


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
    the largest last position of the branches. `forced` bool[num_tokens] defaults to what the spans
    alone tell: the white space before `<step>` and `<takeaway>`, and these tags.

    Raises ValueError where the steps of a block overlap, or lie outside it or the tokens.
    """
    blocks = tuple(blocks)
    hidden = np.zeros((num_tokens, max((b.depth + 1 for b in blocks), default=1), 2), np.int32)
    pred = np.arange(-1, num_tokens - 1, dtype=np.int32)
    structure = np.zeros(num_tokens, bool)
    cuts: list[tuple[int, int, bool]] = []  # (index, block, is a join): where counting breaks off
    for number, block in enumerate(blocks):
        start = block.fork if block.steps else 0
        for step_open, end in block.steps:
            if not start <= step_open < end <= block.join <= num_tokens:
                raise ValueError(
                    f"step [{step_open}, {end}) of a branch from {start} on, joined at "
                    f"{block.join} of {num_tokens} tokens: out of order"
                )
            hidden[start:end, block.depth] = end, block.join
            pred[start] = block.fork - 1
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
    positions = np.arange(num_tokens, dtype=np.int32)
    for begin, end, shift in zip(begins, [*begins[1:], num_tokens], shifts, strict=True):
        positions[begin:end] += shift
    return TreeLayout(
        positions=positions,
        hidden=hidden,
        pred=pred,
        forced=structure if forced is None else forced,
        blocks=blocks,
        prompt_len=prompt_len,
    )


def pack(layouts: Sequence[TreeLayout], length: int | None = None) -> TreeLayout:
    """Lays documents side by side in one row: branches of nothing that never join.

    `length` pads the row; the padding is one more document, seen by nobody and without predictors.
    Returns a layout without blocks whose `hidden` has one column more than the deepest member's.
    Raises ValueError where the documents are longer than `length`.
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
    blocks, with one more column in `hidden`. Raises ValueError where prompts differ in length.
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
