"""Spans of branches become positions, hidden intervals and predictors: the core of the tree.

    spans --layout--> TreeLayout --pack, group--> rows of many traces

A layout is three integer arrays that the model, the engine and the trainer share; no tags are read
here. By which rules it is made, tree/rules.py says.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from npr_jax.tree.rules import PAPER, Rules


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
      rules: by which the spans of the blocks were laid out.
    """

    positions: np.ndarray
    hidden: np.ndarray
    pred: np.ndarray
    forced: np.ndarray
    blocks: tuple[Block, ...] = ()
    prompt_len: int = 0
    rules: Rules = PAPER

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
    def path_positions(self) -> np.ndarray:
        """i32[T], tokens on the longest path to each token: the positions, if the trunk goes on at
        the largest."""
        if self.rules.positions == "max":
            return self.positions
        return layout(len(self), self.blocks, self.prompt_len).positions

    @property
    def critical_path_len(self) -> int:
        """Response tokens on the longest path: last path position - prompt length + 1."""
        if not self.total_len:
            return 0
        return int(self.path_positions[self.prompt_len :].max()) - self.prompt_len + 1


def layout(
    num_tokens: int,
    blocks: Iterable[Block] = (),
    prompt_len: int = 0,
    forced: np.ndarray | None = None,
    rules: Rules = PAPER,
    token_ids: Sequence[int] | np.ndarray | None = None,
) -> TreeLayout:
    """Lays `num_tokens` tokens out by the spans of their blocks: the strict rule.

    Every branch starts one position after its block's `</guideline>`; the trunk goes on one after
    the largest last position of the branches, or where `rules` say. `forced` bool[num_tokens]
    defaults to what the spans alone tell (`framing`). `token_ids` i32[num_tokens] are needed where
    the rules have a marker, which is the id of a token here.

    Raises ValueError where the steps of a block overlap, or lie outside it or the tokens, and where
    a marker is still a text, or there are no tokens to find it in.
    """
    blocks = tuple(blocks)
    hidden = np.zeros((num_tokens, max((b.depth + 1 for b in blocks), default=1), 2), np.int32)
    pred = np.arange(-1, num_tokens - 1, dtype=np.int32)
    cuts: list[tuple[int, int, bool]] = []  # (index, block, is a join): where counting breaks off
    for number, block in enumerate(blocks):
        start = block.fork if block.steps else 0
        for branch, (step_open, end) in enumerate(block.steps):
            if not start <= step_open < end <= block.join <= num_tokens:
                raise ValueError(
                    f"step [{step_open}, {end}) of a branch from {start} on, joined at "
                    f"{block.join} of {num_tokens} tokens: out of order"
                )
            hidden[start:end, block.depth] = end, block.join
            pred[start] = (block.fork if rules.fork == "trunk" else block.plans[branch][1]) - 1
            cuts.append((start, number, False))
            start = end
        if block.steps and block.join < num_tokens:
            cuts.append((block.join, number, True))
    cuts.sort()
    base, top = ([-1] * len(blocks), [-1] * len(blocks))  # positions: of </guideline>, the largest
    begin, position = 0, 0  # of the run of tokens that count up by one
    begins, shifts = [0], [0]
    for index, number, is_join in cuts:
        last = position + index - begin - 1
        if base[number] < 0:
            base[number] = last
        top[number] = max(top[number], last)
        if rules.positions == "sum" and is_join:
            top[number] = base[number] + index - blocks[number].fork
        begin, position = index, (top[number] if is_join else base[number]) + 1
        begins.append(begin)
        shifts.append(position - begin)
    positions = np.arange(num_tokens, dtype=np.int32)
    for begin, end, shift in zip(begins, [*begins[1:], num_tokens], shifts, strict=True):
        positions[begin:end] += shift
    forced = framing(num_tokens, blocks) if forced is None else forced
    if rules.join == "last" and blocks:
        _hide_bodies(hidden, blocks, forced, rules.marker, token_ids)
    if rules.fork == "fresh":
        hidden = _hide_trunks(hidden, blocks, prompt_len)
    return TreeLayout(
        positions=positions,
        hidden=hidden,
        pred=pred,
        forced=forced,
        blocks=blocks,
        prompt_len=prompt_len,
        rules=rules,
    )


def framing(num_tokens: int, blocks: Iterable[Block]) -> np.ndarray:
    """bool[num_tokens], what the spans alone tell of the tokens that the engine writes: the white
    space before `<step>` and `<takeaway>`, and these tags."""
    found = np.zeros(num_tokens, bool)
    for block in blocks:
        for (start, _), (step_open, _) in zip(block.branches, block.steps, strict=True):
            found[start : step_open + 1] = True
        if block.takeaway:
            found[block.join : block.takeaway[0] + 1] = True
    return found


def _hide_bodies(hidden: np.ndarray, blocks: Sequence[Block], forced, marker, token_ids) -> None:
    """Hides what each step holds from behind its header to its last marker from all that comes
    after the branch. Markers inside a step's own blocks are not the step's."""
    if token_ids is None or not isinstance(marker, int):
        lacking = "no tokens to find it in" if isinstance(marker, int) else "needed is an id"
        raise ValueError(f"marker is {marker!r} and join 'last': {lacking}")
    ends = len(hidden)
    within = np.zeros(ends, np.int32)  # blocks that a token is in
    for block in blocks:
        within[block.start : block.end] += 1
    marked = np.asarray(token_ids) == marker
    for block in blocks:
        for step_open, end in block.steps:
            body = step_open + 1
            while body < end and forced[body]:
                body += 1
            found = np.flatnonzero(marked[body:end] & (within[body:end] == block.depth + 1))
            if not len(found):
                continue
            # Each level hides it up to where the next one out does, the outermost to the end.
            levels = hidden[body : body + found[-1] + 1, : block.depth + 1]
            levels[:, 0, 1] = ends
            levels[:, 1:, 1] = levels[:, :-1, 0]


def _hide_trunks(hidden: np.ndarray, blocks: Sequence[Block], prompt_len: int) -> np.ndarray:
    """`hidden` with what lies behind the prompt hidden from all branches of each block, but for a
    plan from its own branch."""
    real = hidden[:, :, 0] < hidden[:, :, 1]
    used = np.max(np.where(real, np.arange(1, real.shape[1] + 1), 0), axis=1)  # columns of each key

    def hide(keys: np.ndarray, start: int, end: int) -> None:
        nonlocal hidden
        if start < end and len(keys):
            if used[keys].max() == hidden.shape[1]:
                hidden = np.pad(hidden, ((0, 0), (0, 1), (0, 0)))
            hidden[keys, used[keys]] = start, end
            used[keys] += 1

    for block in blocks:
        if not block.steps:
            continue
        last = block.fork - 1
        keys = np.arange(prompt_len, block.fork)
        inside = (hidden[keys, :, 0] <= last) & (last < hidden[keys, :, 1])
        keys = keys[~inside.any(axis=1)]  # the trunk sees the others
        branches, end = block.branches, block.branches[-1][1]
        for (first, stop), branch in zip(block.plans, branches, strict=False):
            own = np.arange(first, stop)
            keys = np.setdiff1d(keys, own)
            hide(own, block.fork, branch[0])
            hide(own, branch[1], end)
        hide(keys, block.fork, end)
    return hidden


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
