"""What a process computes of an optimizer step: rows of all groups, dealt, as arrays.

    examples --lengths to all--> deal (deal.py) --exchange--> examples of own rows --> micro-batches

Only lengths go to every process; an example goes to the one that trains on it.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from npr_jax.base.distributed import exchange, group_rank, group_size
from npr_jax.train.deal import ALL, Item, MicroBatch, Shapes, deal, used_tokens
from npr_jax.train.packing import Example, Row, empty_row, make_row, stack
from npr_jax.tree import TreeLayout


@dataclasses.dataclass(frozen=True, eq=False)
class Batch:
    """This process's part of an optimizer step.

    Attributes:
      parts: columns [M, B, T, ...] of B rows on all shards of this process together; M micro-
        batches run one after another. All processes have as many parts, of the same M, B and T.
      used: micro-batches that run, of the first part; of each other part all do.
      count: loss tokens of all processes, also of those that are not computed: the loss is divided
        by it.
      computed: loss tokens that are computed.
      fused: whether the first part is all, and of the shape that a plan counts with.
      left_out: examples of all processes that are counted and not computed.
      figures: metrics of the rows: `slot_use`, `row_tokens`, `slots`, `micro_batches`.
    """

    parts: tuple[Row, ...]
    used: int
    count: int
    computed: int
    fused: bool
    left_out: int = 0
    figures: dict[str, float] = dataclasses.field(default_factory=dict)


class Facts(NamedTuple):
    """What every process knows of an example: what dealing needs, its loss tokens, and whether its
    loss has a gradient."""

    item: Item
    loss_tokens: int
    teaches: bool


def facts(example: Example, process: int, group: int) -> Facts:
    """Of one example, `teaches` by its advantages."""
    layout, counts = example.layout, example.loss_mask & (example.layout.pred >= 0)
    prompt_len = layout.prompt_len
    pairs = max(0, visible_pairs(layout) - prompt_len * (prompt_len + 1) // 2)
    item = Item(process, group, prompt_len, len(layout) - prompt_len, pairs)
    return Facts(item, int(counts.sum()), bool((example.advantage * counts).any()))


def visible_pairs(layout: TreeLayout) -> int:
    """Pairs of a token and one that it sees, itself included, as `TreeLayout.visible` has them; of
    intervals that overlap, which only the layout "reference" has, the pairs are hidden twice."""
    num = len(layout)
    start = np.maximum(layout.hidden[..., 0], np.arange(num)[:, None]).astype(np.int64)
    hidden = np.maximum(np.minimum(layout.hidden[..., 1], num) - start, 0)
    return num * (num + 1) // 2 - int(hidden.sum())


def make_batch(
    known: Sequence[Facts],
    own: dict[int, Example],
    allowed: Shapes,
    shards: int,
    depth: int,
    every: bool = False,
) -> Batch:
    """Deals the examples of an optimizer step, and lays out those of this process.

    Args:
      known: facts of the examples of all processes, in an order that is the same everywhere.
      own: those that this process has, by their numbers in it.
      allowed: shapes of micro-batches.
      shards: parts of the batch, of all processes.
      depth: D, hidden intervals per token.
      every: whether examples whose advantages are 0 are computed too: where another term than the
        policy's loss gives them a gradient.

    Returns:
      The batch; without parts where there is no example to compute.

    Raises:
      ValueError: an example is longer than a row, prompts of a group differ, `depth` is too small.
    """
    numbers = [i for i, fact in enumerate(known) if every or fact.teaches]
    items = [known[i].item for i in numbers]
    row_len = allowed.lengths[-1]
    for item in items:
        if item.prompt + item.response > row_len:
            raise ValueError(
                f"an example has {item.prompt + item.response} tokens, a row has {row_len}: raise "
                "row_len"
            )
    processes, process = group_size(), group_rank()
    dealt = deal(items, shards, processes, allowed)
    owned = _travel(items, [own.get(i) for i in numbers], dealt, shards // processes)
    each = shards // processes
    mine = [
        (part, [row for rows in part.rows[process * each : (process + 1) * each] for row in rows])
        for part in dealt
    ]
    largest = allowed.rows[-1], row_len
    fused = all(part.shape == largest for part, _ in mine)
    made = [
        [
            make_row([[owned[i] for i in document] for document in row], part.row_len, depth)
            if row
            else empty_row(part.row_len, depth)
            for row in rows
        ]
        for part, rows in mine
    ]
    if fused and made:
        parts = [stack([row for rows in made for row in rows], len(made[0]), len(made))]
    else:
        parts = [stack(rows, len(rows), 1) for rows in made]
    slots, tokens = sum(part.slots for part in dealt), used_tokens(items, dealt)
    return Batch(
        parts=tuple(parts),
        used=len(made) if fused else 1,
        count=sum(fact.loss_tokens for fact in known),
        computed=sum(known[i].loss_tokens for i in numbers),
        fused=fused,
        left_out=len(known) - len(numbers),
        figures={
            "slot_use": tokens / max(1, slots),
            "row_tokens": tokens,
            "slots": slots,
            "micro_batches": len(dealt),
        },
    )


def _travel(
    items: Sequence[Item],
    own: Sequence[Example | None],
    dealt: Sequence[MicroBatch],
    each: int,
) -> dict[int, Example]:
    """The examples of this process's rows by their numbers, those of others sent by them."""
    process, processes = group_rank(), group_size()
    home = {
        number: shard // each
        for part in dealt
        for shard, rows in enumerate(part.rows)
        for row in rows
        for document in row
        for number in document
    }
    found = {i: e for i, e in enumerate(own) if e is not None and home[i] == process}
    if all(item.process in (ALL, home[i]) for i, item in enumerate(items)):
        return found
    out = [
        {i: bare(e) for i, e in enumerate(own) if e is not None and home[i] == to}
        if to != process
        else {}
        for to in range(processes)
    ]
    for part in exchange(out):
        found |= part
    return found


def bare(example: Example) -> Example:
    """An example as rows need it: the blocks of its layout stay behind."""
    return dataclasses.replace(example, layout=dataclasses.replace(example.layout, blocks=()))
