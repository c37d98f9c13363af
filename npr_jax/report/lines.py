"""The lines of an answer: the trunk and every branch, and how their text is shown."""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from npr_jax.tree import TreeLayout

Span = tuple[int, int]

# What a terminal or a browser would act on, or not show: control characters, line separators,
# characters of no width, those that turn the direction of text, and halves of surrogate pairs.
_HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]"
)


class Section(NamedTuple):
    """A run of a line's own tokens, and the branches that run after it, which may be none."""

    run: Span
    branches: tuple[Span, ...]


def sections(tree: TreeLayout, span: Span, depth: int = 0) -> list[Section]:
    """A line from its start to its end; the branches are lines of depth + 1, and so on."""
    found, (start, end) = [], span
    for block in tree.blocks:
        if block.depth == depth and block.branches and start <= block.start < end:
            found.append(Section((start, block.fork), block.branches))
            start = block.join
    return [*found, Section((start, end), ())]


def visible(text: str) -> str:
    """The text with everything that would act or hide spelt out; line ends and tabs stay."""
    return _HIDDEN.sub(_name, text)


def _name(match: re.Match) -> str:
    code = ord(match.group())
    if code < 0x20:
        return chr(0x2400 + code)  # the control pictures
    return "\u2421" if code == 0x7F else f"\u27e8U+{code:04X}\u27e9"


def text_lines(
    pieces: Sequence[str], forced: Sequence[bool] | np.ndarray, span: Span, limit: int | None = None
) -> list[list[tuple[str, bool]]]:
    """The text of a span as lines of (text, forced) pieces, without empty ones; a line is broken
    between tokens where it would be longer than `limit` characters."""
    lines: list[list[tuple[str, bool]]] = [[]]
    size = 0
    for i in range(*span):
        for number, piece in enumerate(visible(pieces[i]).expandtabs(4).split("\n")):
            if number or (limit and size and size + len(piece) > limit):
                lines.append([])
                size = 0
            if piece:
                lines[-1].append((piece, bool(forced[i])))
                size += len(piece)
    return [line for line in lines if line] or [[]]
