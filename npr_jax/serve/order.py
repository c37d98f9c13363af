"""Pieces of branches that grow at the same time, in the order of the text.

An answer's text is its tree in depth-first order. What a branch says is held back until those
before it have said all; then it comes at once.
"""

import dataclasses
from typing import NamedTuple

from npr_jax.decode.outputs import Event
from npr_jax.tree import TagIds


class Piece(NamedTuple):
    """A token and the text that comes with it."""

    text: str
    token: Event


@dataclasses.dataclass
class _Line:
    """The trunk or a branch: its tokens, and branches where it forked; `at`: the first that was not
    given out, `child` of the branches there; `position` of its next token."""

    position: int
    items: list = dataclasses.field(default_factory=list)
    at: int = 0
    child: int = 0
    done: bool = False


class Order:
    """The order of one answer; `ends`: ids that end its text, and are no part of it."""

    def __init__(self, prompt_len: int, ends: frozenset[int], tags: TagIds | None):
        self._lines: dict[tuple, _Line] = {(): _Line(prompt_len)}
        self._ends, self._tags = ends, tags
        self._owed: str = ""  # the text of an end, if another token follows

    def position(self, branch: tuple) -> int:
        """Of the next token of a branch."""
        return self._lines[branch].position

    def hear(self, event: Event) -> None:
        """Takes what happened."""
        line = self._lines[event.branch]
        if event.kind == "token":
            line.items.append(event)
            line.position += 1
            # In a branch this tag ends it, or the answer is malformed and ends.
            if self._tags and event.branch and event.token_id == self._tags.step_close:
                line.done = True
        elif event.kind == "fork":
            assert event.branches is not None
            block = sum(isinstance(item, list) for item in line.items)
            children = [_Line(line.position) for _ in range(event.branches)]
            for number, child in enumerate(children):
                self._lines[*event.branch, (block, number)] = child
            line.items.append(children)
        elif event.kind == "join":
            children = line.items[-1]
            line.position = max(child.position for child in children)
            for child in children:
                child.done = True
        elif event.kind == "finish":
            for other in self._lines.values():
                other.done = True

    def take(self) -> list[Piece]:
        """The pieces whose turn has come since the last call."""
        found: list[Piece] = []
        self._drain(self._lines[()], found)
        return found

    def _drain(self, line: _Line, found: list[Piece]) -> bool:
        """Gives out what is ready of a line; whether that is all that it will ever say."""
        while line.at < len(line.items):
            item = line.items[line.at]
            if isinstance(item, list):
                while line.child < len(item):
                    if not self._drain(item[line.child], found):
                        return False
                    line.child += 1
                line.child = 0
            else:
                found.append(self._piece(item))
            line.at += 1
        return line.done

    def _piece(self, token: Event) -> Piece:
        text, self._owed = self._owed + (token.text or ""), ""
        if token.token_id in self._ends:
            text, self._owed = "", text
        return Piece(text, token)


class Reasoning:
    """Tells an answer's blocks from what is said beside them. Blank text beside a block is the
    block's."""

    def __init__(self, tags: TagIds | None):
        self._tags = tags
        self._depth = 0
        self._after = False  # nothing but blanks since the last block
        self._blank = ""  # that may stand before a block

    def add(self, piece: Piece) -> tuple[str, str]:
        """(reasoning, answer) that come with a piece."""
        tags, token = self._tags, piece.token.token_id
        if tags is None:
            return "", piece.text
        if self._depth or token == tags.guideline_open:
            text, self._blank = self._blank + piece.text, ""
            self._depth += (token == tags.guideline_open) - (token == tags.takeaway_close)
            self._after = True
            return text, ""
        if self._after:
            said = piece.text.lstrip()
            self._after = not said
            return piece.text[: len(piece.text) - len(said)], said
        text = self._blank + piece.text
        said = text.rstrip()
        self._blank = text[len(said) :]
        return "", said

    def flush(self, rest: str) -> tuple[str, str]:
        """What was kept back, and the rest of a character that the answer ends inside."""
        text, self._blank = self._blank + rest, ""
        return (text, "") if self._depth else ("", text)
