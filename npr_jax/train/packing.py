"""The one batch format: examples, grouped behind shared prompts and packed into rows.

    Example --group--> document (one prompt, many responses) --pack--> row --stack--> batch

All three stages train on it. A token's loss and gradient do not depend on what it is packed with.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from npr_jax import tree

Row = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """One trace to train on, T tokens.

    Attributes:
      token_ids: i32[T], prompt and response.
      layout: of these tokens, with `prompt_len`.
      loss_mask: bool[T], the tokens that count; none of the prompt.
      advantage: of every token (f32), or one each (f32[T]); supervised training ignores it.
      old_logp: f32[T], log-probs when the trace was sampled; None is zeros.
    """

    token_ids: np.ndarray
    layout: tree.TreeLayout
    loss_mask: np.ndarray
    advantage: float | np.ndarray = 0.0
    old_logp: np.ndarray | None = None

    def __post_init__(self):
        num_tokens, prompt_len = len(self.layout), self.layout.prompt_len
        old_logp = np.zeros(num_tokens, np.float32) if self.old_logp is None else self.old_logp
        for name, value in (
            ("token_ids", np.asarray(self.token_ids, np.int32)),
            ("loss_mask", np.asarray(self.loss_mask, bool)),
            ("advantage", np.broadcast_to(np.float32(self.advantage), (num_tokens,))),
            ("old_logp", np.asarray(old_logp, np.float32)),
        ):
            if value.shape != (num_tokens,):
                raise ValueError(f"{name} has shape {value.shape}, the layout {num_tokens} tokens")
            object.__setattr__(self, name, value)
        if self.loss_mask[:prompt_len].any():
            raise ValueError(f"loss_mask marks tokens of the prompt (the first {prompt_len})")


def loss_mask(layout: tree.TreeLayout, train_forced: bool = False) -> np.ndarray:
    """bool[T], the tokens that count: those of the response, but for what the engine writes unless
    `train_forced`."""
    mask = ~layout.forced | train_forced
    mask[: layout.prompt_len] = False
    return mask


def make_rows(groups: Sequence[Sequence[Example]], row_len: int, depth: int) -> list[Row]:
    """Lays groups of examples into as few rows of `row_len` tokens as best fit finds.

    Args:
      groups: examples of one group have the same prompt, which a row computes once; a group is
        split, and the prompt repeated, where it is too long for a row or where this saves rows.
      row_len: T, tokens of a row.
      depth: D, intervals per token in `hidden`.

    Returns:
      Rows of i32[T] tokens, positions and pred, i32[T, D, 2] hidden, bool[T] loss_mask, f32[T]
      advantages and old_logp.

    Raises:
      ValueError: an example is longer than a row, a group's prompts differ, `depth` is too small.
    """
    # A group that fills more than half a row leaves room that few others fit: halves may do better.
    rows = min((_lay(groups, row_len, part) for part in (row_len, row_len // 2)), key=len)
    return [make_row(row, row_len, depth) for row in rows]


def make_row(documents: Sequence[Sequence[Example]], row_len: int, depth: int) -> Row:
    """One row of documents, each of examples that have the same prompt; else as `make_rows`."""
    for number, document in enumerate(documents):
        _check_prompts(document, number)
    row = tree.pack([tree.group([e.layout for e in doc]) for doc in documents], row_len)

    def column(name: str) -> np.ndarray:
        parts = []
        for doc in documents:
            prompt_len = doc[0].layout.prompt_len
            parts.append(getattr(doc[0], name)[:prompt_len])
            parts += [getattr(example, name)[prompt_len:] for example in doc]
        values = np.concatenate(parts)
        return np.pad(values, (0, row_len - len(values)))

    return {
        "tokens": column("token_ids"),
        "positions": row.positions,
        "hidden": _fit_depth(row.hidden, depth),
        "pred": row.pred,
        # A first token that nothing predicts has no log-prob.
        "loss_mask": column("loss_mask") & (row.pred >= 0),
        "advantages": column("advantage"),
        "old_logp": column("old_logp"),
    }


def stack(rows: Sequence[Row], micro_rows: int, used: int) -> Row:
    """A batch [M, micro_rows, T, ...] of `rows`, the first `used` of whose micro-batches run.

    M is a power of two, so that few shapes compile; what the rows leave is filled with empty ones.
    """
    total = micro_rows * (1 << (used - 1).bit_length())
    empty = empty_row(*rows[0]["hidden"].shape[:2])
    filled = [*rows, *[empty] * (total - len(rows))]

    def column(name: str) -> np.ndarray:
        values = np.stack([row[name] for row in filled])
        return values.reshape(-1, micro_rows, *values.shape[1:])

    return {name: column(name) for name in rows[0]}


def empty_row(row_len: int, depth: int) -> Row:
    """A row in which nothing counts. Every token sees itself alone, which costs no attention."""
    zeros, index = np.zeros(row_len, np.int32), np.arange(row_len, dtype=np.int32)
    hidden = np.zeros((row_len, depth, 2), np.int32)
    hidden[:, 0] = np.stack([index + 1, np.full(row_len, row_len, np.int32)], axis=1)
    return {
        "tokens": zeros,
        "positions": zeros,
        "hidden": hidden,
        "pred": zeros - 1,
        "loss_mask": zeros.astype(bool),
        "advantages": zeros.astype(np.float32),
        "old_logp": zeros.astype(np.float32),
    }


def count_loss_tokens(rows: Sequence[Row]) -> int:
    """Tokens that count in the loss of these rows."""
    return sum(int(row["loss_mask"].sum()) for row in rows)


def best_fit(sizes: Sequence[int], room: int) -> list[list[int]]:
    """Bins of at most `room`, as lists of indices: the longest first, each into the fullest bin."""
    bins: list[list[int]] = []
    left: list[int] = []
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        fits = [b for b, free in enumerate(left) if free >= sizes[i]]
        if fits:
            best = min(fits, key=lambda b: left[b])
        else:
            best = len(bins)
            bins.append([])
            left.append(room)
        bins[best].append(i)
        left[best] -= sizes[i]
    return bins


def _lay(
    groups: Sequence[Sequence[Example]], row_len: int, part_len: int
) -> list[list[list[Example]]]:
    """Rows of documents of at most `part_len` tokens, or of one example that is longer."""
    documents: list[list[Example]] = []
    for number, group in enumerate(groups):
        documents += _split(group, row_len, part_len, number)
    sizes = [_length(document) for document in documents]
    return [[documents[i] for i in members] for members in best_fit(sizes, row_len)]


def _split(
    group: Sequence[Example], row_len: int, part_len: int, number: int
) -> list[list[Example]]:
    """The documents of a group: its responses behind the prompt, `part_len` tokens if they can."""
    first = group[0]
    prompt_len = first.layout.prompt_len
    for i, example in enumerate(group):
        if len(example.layout) > row_len:
            raise ValueError(
                f"example {i} of group {number} has {len(example.layout)} tokens, a row has "
                f"{row_len}: raise row_len"
            )
    _check_prompts(group, number)
    sizes = [len(example.layout) - prompt_len for example in group]
    room = max(part_len - prompt_len, *sizes)
    return [[group[i] for i in members] for members in best_fit(sizes, room)]


def _check_prompts(group: Sequence[Example], number: int) -> None:
    prompts = [example.token_ids[: example.layout.prompt_len] for example in group]
    for i, prompt in enumerate(prompts):
        if not np.array_equal(prompt, prompts[0]):
            raise ValueError(f"examples 0 and {i} of group {number} have different prompts")


def _length(document: Sequence[Example]) -> int:
    prompt_len = document[0].layout.prompt_len
    return prompt_len + sum(len(example.layout) - prompt_len for example in document)


def _fit_depth(hidden: np.ndarray, depth: int) -> np.ndarray:
    """`hidden` with `depth` intervals per token; empty ones go first, or are added."""
    empty = hidden[..., 0] >= hidden[..., 1]
    order = np.argsort(empty, axis=1, kind="stable")[..., None]
    hidden = np.where(empty[..., None], 0, hidden)
    hidden = np.take_along_axis(hidden, order, axis=1)
    need = int((~empty).sum(axis=1).max(initial=0))
    if need > depth:
        raise ValueError(f"the rows need {need} hidden intervals per token, depth is {depth}")
    missing = max(0, depth - hidden.shape[1])
    return np.pad(hidden, ((0, 0), (0, missing), (0, 0)))[:, :depth].astype(np.int32)
