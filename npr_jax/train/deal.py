"""Which rows an optimizer step computes, and on which shard: a pure function of lengths.

    examples of all processes --documents--> rows of a few lengths --micro-batches--> shards

All shards run the same micro-batches, of one shape each, and wait for each other in every one. So
rows of all groups are packed together and dealt to all shards; what does not fill a whole
micro-batch gets one with fewer or shorter rows, and rows that run together cost alike.

A shape is one of few (`Shapes`), since each is a program to compile: the rows of a micro-batch are
`micro_rows` or a smaller power of two, its row length is `row_len` or one of a few shorter ones
(`train.row_lengths`). `row_len` by `micro_rows`, which is what a plan counts with, is kept wherever
others would save less than `GAIN`.
"""

import heapq
import math
from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

ALL = -1  # in place of a process: all have the example
GAIN = 1.02  # times fewer slots, for which other shapes are compiled,
ENOUGH = 0.955  # unless this share of the slots is used without
_BLOCK = 32  # tokens, of which row lengths on a part of `mesh.sequence` are multiples


class Item(NamedTuple):
    """What dealing knows of an example.

    `process` that has it, or `ALL`; `group`, the same for all that share a prompt; tokens of the
    `prompt` and of the `response`; `pairs` of response tokens and what they see: the attention.
    """

    process: int
    group: int
    prompt: int
    response: int
    pairs: int


class Shapes(NamedTuple):
    """The micro-batches that may be compiled: rows a shard, rising, and row lengths, rising."""

    rows: tuple[int, ...]
    lengths: tuple[int, ...]

    def length(self, tokens: int) -> int:
        """The shortest row that holds so many tokens."""
        return self.lengths[bisect_left(self.lengths, tokens)]


Document = tuple[int, ...]  # examples of one group, by their numbers, behind their prompt
Documents = tuple[Document, ...]  # of a row, each of another group


class MicroBatch(NamedTuple):
    """Rows that run at one time: `rows[shard][slot]` has the documents of a row of `row_len`."""

    row_len: int
    rows: tuple[tuple[Documents, ...], ...]

    @property
    def shape(self) -> tuple[int, int]:
        """Rows of a shard, and their length."""
        return len(self.rows[0]), self.row_len

    @property
    def slots(self) -> int:
        """Tokens that are computed, of all shards."""
        return len(self.rows) * len(self.rows[0]) * self.row_len


def shapes(
    row_len: int, micro_rows: int, sequence: int = 1, fixed: bool = False, number: int = 8
) -> Shapes:
    """The shapes beside `row_len` by `micro_rows`: powers of two of rows, and the `number`-th parts
    of the length and half of the last of them (8: eighths and 15 sixteenths; 1: the whole alone),
    in whole blocks on every part of `sequence`. `fixed`: that one alone.
    """
    if fixed:
        return Shapes((micro_rows,), (row_len,))
    unit = _BLOCK * sequence
    parts = [*range(2, 2 * number, 2), 2 * number - 1] if number > 1 else []
    lengths = {math.ceil(row_len * part / (2 * number) / unit) * unit for part in parts}
    powers = {1 << k for k in range(micro_rows.bit_length())}
    return Shapes(
        tuple(sorted({micro_rows, *powers})),
        tuple(sorted({row_len, *(length for length in lengths if length < row_len)})),
    )


def deal(items: Sequence[Item], shards: int, processes: int, allowed: Shapes) -> list[MicroBatch]:
    """Packs examples into rows and deals these to shards, of which every process has as many.

    Args:
      items: the examples of all processes; the order counts.
      shards: parts of the batch; process p has shards p * shards / processes and on.
      allowed: `shapes`; its longest row holds the longest example with its prompt.

    Returns:
      Micro-batches, those of other shapes first and then those of the largest allowed. An example
      is in one row of one of them; a row has one document of a group at most.
    """
    if not items:
        return []
    options = list(_options(items, shards, allowed))
    most = GAIN * min(option.slots for option in options)
    chosen = min(
        (option for option in options if option.full or option.slots <= most),
        key=lambda option: (*option.others, option.slots, len(option.blocks)),
    )
    return _place(items, chosen, shards, processes, allowed)


def least_slots(items: Sequence[Item], shards: int, row_len: int) -> int:
    """Slots that no deal of these examples goes below, whatever rows up to `row_len` are allowed.

    Each prompt is computed once at least. Of examples longer than half of `row_len` no two share a
    row, so one of every `shards` of them, the longest first, has a row length of its own.
    """
    prompts = {item.group: item.prompt for item in items}
    tokens = sum(prompts.values()) + sum(item.response for item in items)
    sizes = sorted((item.prompt + item.response for item in items), reverse=True)
    alone = [size for size in sizes if 2 * size > row_len] or sizes[:1]
    return max(tokens, shards * sum(alone[::shards]))


def used_tokens(items: Sequence[Item], dealt: Sequence[MicroBatch]) -> int:
    """Tokens that a deal computes without the filling; a prompt counts in every row that has it."""
    return sum(_row_length(items, row) for part in dealt for rows in part.rows for row in rows)


def advice(examples: int, shards: int, more: str) -> str:
    """What helps where an optimizer step has fewer examples than the batch has parts, so that some
    compute empty rows; "" where it has not. `more`: a setting that gives a step more examples."""
    if examples >= shards:
        return ""
    parts = next(n for n in range(min(examples, shards), 0, -1) if shards % n == 0)
    return (
        f"an optimizer step has {examples} examples for {shards} parts of the batch (mesh.data x "
        f"mesh.fsdp): {shards - examples} or more of them compute empty rows. Set {more}, or "
        f"mesh.sequence or mesh.tensor {shards // parts} times as large and mesh.fsdp as much "
        f"smaller, which leaves {parts} parts"
    )


class _Option(NamedTuple):
    """A packing: rows by falling length, how they go into micro-batches (rows a shard, row length),
    their tokens and slots, and how many shapes other than the largest they take, and how many of
    these have shorter rows."""

    rows: list[Documents]
    blocks: list[tuple[int, int]]
    tokens: int
    slots: int
    others: tuple[int, int]

    @property
    def full(self) -> bool:
        """Whether enough of the slots are used."""
        return self.tokens >= ENOUGH * self.slots


def _options(items: Sequence[Item], shards: int, allowed: Shapes) -> Iterator[_Option]:
    """Packings: into rows of the full length alone, and into ever more tokens of other lengths up
    to what these take; of whole groups, and of their parts, which fit better and repeat prompts."""
    row_len, micro_rows, step = allowed.lengths[-1], allowed.rows[-1], allowed.lengths[0]
    cuts = [_documents(items, row_len, row_len // parts) for parts in (1, 2, 4, row_len)]
    tokens = min(sum(_length(items, document) for document in documents) for documents in cuts)
    longest = max(item.prompt + item.response for item in items)

    def packed(lengths: Sequence[int]) -> Iterator[_Option]:
        for documents in cuts:
            if rows := _fill(items, documents, lengths, shards):
                yield from _cuts(items, rows, lengths, shards, allowed)
                return

    number = -(-tokens // (shards * row_len * micro_rows)) * micro_rows
    while not (found := list(packed([row_len] * number))):
        number += micro_rows
    yield from found
    if any(option.others == (0, 0) and option.full for option in found):
        return  # as it will be chosen
    best = min(option.slots for option in found)
    size, tried = max(-(-tokens // shards), longest), set()
    while size * shards < best:
        for lengths in _lengths(size, longest, allowed):
            if lengths not in tried and sum(lengths) * shards < best:
                tried.add(lengths)
                for option in packed(lengths):
                    best = min(best, option.slots)
                    yield option
        size += step


def _lengths(size: int, longest: int, allowed: Shapes) -> Iterator[tuple[int, ...]]:
    """Row lengths of a shard for `size` tokens or a little more: as many as can be of one length,
    at least `longest`, and one for the rest."""
    for length in allowed.lengths[bisect_left(allowed.lengths, longest) :]:
        rest = size % length
        yield (length,) * (size // length) + ((allowed.length(rest),) if rest else ())


def _cuts(
    items: Sequence[Item],
    rows: list[Documents],
    lengths: Sequence[int],
    shards: int,
    allowed: Shapes,
) -> Iterator[_Option]:
    """Ways to make micro-batches of rows that were packed into these lengths: what fills no whole
    one as one of fewer rows, as several, or with the last row of the shards alone; and row lengths
    as they were given, or as short as the rows turned out."""
    rows = sorted(rows, key=lambda row: (-_row_length(items, row), row))
    tokens = sum(_row_length(items, row) for row in rows)
    layers, most = -(-len(rows) // shards), allowed.rows[-1]  # rows of a shard

    def powers(layers: int) -> list[int]:
        return [number for number in reversed(allowed.rows[:-1]) if number & layers]

    whole, rest = [most] * (layers // most), layers % most
    cuts = [[*whole, allowed.rows[bisect_left(allowed.rows, rest)]] if rest else whole]
    if allowed.rows[0] == 1 < most:
        cuts.append([*whole, *powers(rest)])
        cuts.append([*[most] * ((layers - 1) // most), *powers((layers - 1) % most), 1])
    for cut in cuts:
        for trimmed in (False, True):
            blocks, done = [], 0
            for number in cut:
                length = lengths[done]
                if trimmed:
                    length = allowed.length(_row_length(items, rows[done * shards]))
                blocks.append((number, length))
                done += number
            slots = shards * sum(number * length for number, length in blocks)
            others = {*blocks} - {(most, allowed.lengths[-1])}
            short = sum(length < allowed.lengths[-1] for _, length in others)
            yield _Option(rows, blocks, tokens, slots, (len(others), short))


def _documents(items: Sequence[Item], row_len: int, part_len: int) -> list[Document]:
    """The groups in documents of at most `part_len` tokens, or of one example that is longer."""
    groups = defaultdict(list)
    for number, item in enumerate(items):
        groups[item.group].append(number)
    found: list[Document] = []
    for members in groups.values():
        most = max(items[number].response for number in members)
        room = max(part_len - items[members[0]].prompt, most)
        while members:
            part = _fullest(items, members, room)
            found.append(part)
            members = [number for number in members if number not in part]
    return found


def _fullest(items: Sequence[Item], members: Sequence[int], room: int) -> Document:
    """Those of a group's examples whose responses fill `room` tokens best, few and long ones."""
    order = sorted(members, key=lambda number: (items[number].response, number))
    reached = [1]  # bit n: some of the examples so far have n tokens
    for number in order:
        more = reached[-1] << items[number].response
        reached.append(reached[-1] | more & ((2 << room) - 1))
    tokens, part = reached[-1].bit_length() - 1, []
    for number, before in zip(reversed(order), reversed(reached[:-1]), strict=True):
        left = tokens - items[number].response
        if left >= 0 and before >> left & 1:
            part.append(number)
            tokens = left
    return tuple(sorted(part))


def _fill(
    items: Sequence[Item], documents: Sequence[Document], lengths: Sequence[int], shards: int
) -> list[Documents]:
    """The documents in rows of these lengths, as many of each as there are shards, empty rows left
    out; [] where they do not fit.

    The longest goes first, into the fullest row that holds it, of those that have its prompt if one
    does. A document that no row holds is split: the row with the most room gets what it can of it,
    and the rest goes on alone.
    """
    room = [length for length in lengths for _ in range(shards)]
    free = sorted((length, row) for row, length in enumerate(room))
    rows: list[dict[int, list[int]]] = [{} for _ in room]  # by group
    homes: dict[int, list[int]] = defaultdict(list)  # of a group: rows
    queue = [(-_length(items, document), document) for document in documents]
    heapq.heapify(queue)
    while queue:
        size, document = -queue[0][0], heapq.heappop(queue)[1]
        first = items[document[0]]
        known = [row for row in homes[first.group] if room[row] >= size - first.prompt]
        if known:
            row, size = min(known, key=lambda row: (room[row], row)), size - first.prompt
        elif (place := bisect_left(free, (size, -1))) < len(free):
            row = free[place][1]
        else:
            row = free[-1][1]
            part = _fullest(items, document, max(0, room[row] - first.prompt))
            if not part:
                return []
            rest = tuple(number for number in document if number not in part)
            heapq.heappush(queue, (-_length(items, rest), rest))
            document, size = part, _length(items, part)
        free.pop(bisect_left(free, (room[row], row)))
        room[row] -= size
        insort(free, (room[row], row))
        if first.group not in rows[row]:
            rows[row][first.group] = []
            homes[first.group].append(row)
        rows[row][first.group] += document
    return [
        tuple(tuple(sorted(groups[group])) for group in sorted(groups)) for groups in rows if groups
    ]


def _place(
    items: Sequence[Item], option: _Option, shards: int, processes: int, allowed: Shapes
) -> list[MicroBatch]:
    """Micro-batches of rows that cost alike, each row where most of it lies already."""
    of_shape: dict[tuple[int, int], list[Documents]] = defaultdict(list)
    done = 0
    for number, length in option.blocks:
        of_shape[number, length] += option.rows[done : done + number * shards]
        done += number * shards
    largest = allowed.rows[-1], allowed.lengths[-1]
    found = []
    for shape in sorted(of_shape, key=lambda shape: (shape == largest, shape)):
        number, length = shape
        rows = sorted(of_shape[shape], key=lambda row: (-_pairs(items, row), row))
        for first in range(0, len(rows), number * shards):
            part = rows[first : first + number * shards]
            bundles: list[list[Documents]] = [[] for _ in range(shards)]
            for i, row in enumerate(part):  # there and back, so that sums are alike
                turn, at = divmod(i, shards)
                bundles[shards - 1 - at if turn % 2 else at].append(row)
            for bundle in bundles:
                bundle += [()] * (number - len(bundle))
            found.append(MicroBatch(length, _near(items, bundles, processes)))
    return found


def _near(
    items: Sequence[Item], bundles: list[list[Documents]], processes: int
) -> tuple[tuple[Documents, ...], ...]:
    """The bundles of a micro-batch by shards, each at a process that has much of it."""
    each = len(bundles) // processes
    wishes = []
    for i, bundle in enumerate(bundles):
        held: dict[int, int] = defaultdict(int)
        for row in bundle:
            for document in row:
                for number in document:
                    held[items[number].process] += items[number].response
        wishes += [(-tokens, i, process) for process, tokens in held.items() if process != ALL]
    homes: list[list[int]] = [[] for _ in range(processes)]
    left = set(range(len(bundles)))
    for _, i, process in sorted(wishes):
        if i in left and len(homes[process]) < each:
            homes[process].append(i)
            left.remove(i)
    rest = iter(sorted(left))
    for home in homes:
        home += [next(rest) for _ in range(each - len(home))]
    return tuple(tuple(bundles[i]) for home in homes for i in home)


def _length(items: Sequence[Item], document: Document) -> int:
    """Tokens of a document."""
    return items[document[0]].prompt + sum(items[number].response for number in document)


def _row_length(items: Sequence[Item], row: Documents) -> int:
    """Tokens of a row."""
    return sum(_length(items, document) for document in row)


def _pairs(items: Sequence[Item], row: Documents) -> int:
    """Pairs of tokens and what they see in a row."""
    return sum(
        items[document[0]].prompt ** 2 // 2 + sum(items[number].pairs for number in document)
        for document in row
    )
