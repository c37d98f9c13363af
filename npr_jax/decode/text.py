"""The text of a line while it grows, token by token."""

import re
from collections import abc

_BYTE = re.compile("<0x[0-9A-F]{2}>")  # the tokens that a byte-fallback decoder joins to text


class TextPieces:
    """Text of a growing list of tokens, in pieces that never cut a character."""

    def __init__(self, tokenizer):
        self._decode = lambda ids: tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        self._name = tokenizer.convert_ids_to_tokens
        self._ids: list[int] = []  # from the last whole piece on, and that piece before them
        self._known = 0  # of `_ids`, those of the piece before
        self._given = 0  # characters of their text that were given out

    def add(self, token: int) -> str:
        """The text that this token completes."""
        self._ids.append(token)
        if _BYTE.fullmatch(self._name(token) or ""):
            return ""  # one stray byte makes all others of such a run no text, so wait for its end
        text = self._decode(self._ids)
        # It may be the first bytes of a character; whatever stands before it is what it is.
        open_ = text.endswith("\N{REPLACEMENT CHARACTER}")
        piece = text[self._given : len(text) - open_]
        if not open_ or len(self._ids) - self._known > 8:  # or stray bytes would pile up
            self._ids, self._known = self._ids[self._known :], len(self._ids) - self._known
            text = self._decode(self._ids)
        self._given = len(text) - open_
        return piece

    def flush(self) -> str:
        """What was kept back: the text ends inside a character."""
        piece = self._decode(self._ids)[self._given :]
        self._ids, self._known, self._given = [], 0, 0
        return piece


class StopText:
    """The text of a growing line up to the first of some texts, if any: what may begin one is kept
    back.

    Attributes:
      found: whether one was there, after which the line says nothing more.
      dropped: characters from its first on, to the end of the token that completed it.
    """

    def __init__(self, tokenizer, stops: abc.Sequence[str]):
        self._tokenizer, self._stops = tokenizer, stops
        self._pieces = TextPieces(tokenizer)
        self._kept = ""
        self._written: list[int] = []
        self.found, self.dropped = False, 0

    def of_branch(self) -> "StopText":
        """Of another line, which stops at the same texts."""
        return StopText(self._tokenizer, self._stops)

    def wrote(self, tokens: abc.Sequence[int]) -> None:
        """These tokens are known, and are read with the next one."""
        self._written += tokens

    def add(self, token: int, known: bool = False) -> str:
        """The text that is sure to stay with this token. One that is `known`, which the engine has
        written or which ends the text, is not searched."""
        if self.found:
            return ""
        written, self._written = self._written, []
        for before in written:
            self.add(before, known=True)
        self._kept += self._pieces.add(token)
        if known or not self._stops:
            return self._give(len(self._kept))
        begins = [begin for stop in self._stops if (begin := self._kept.find(stop)) >= 0]
        if begins:
            self.found = True
            text = self._give(min(begins))
            self.dropped = len(self._kept + self._pieces.flush())
            return text
        longest = max(map(len, self._stops)) - 1
        for begin in range(max(0, len(self._kept) - longest), len(self._kept)):
            if any(stop.startswith(self._kept[begin:]) for stop in self._stops):
                return self._give(begin)
        return self._give(len(self._kept))

    def _give(self, count: int) -> str:
        text, self._kept = self._kept[:count], self._kept[count:]
        return text

    def settle(self) -> str:
        """What was kept back, as branches follow, and no text reaches across them."""
        return self._give(len(self._kept))

    def flush(self) -> str:
        """What was kept back, as the line ends without any of the texts."""
        return "" if self.found else self._give(len(self._kept)) + self._pieces.flush()
