"""What happens to answers while they are decoded, one event at a time, and text piece by piece."""

import dataclasses

from npr_jax.decode.trajectory import Trajectory

KINDS = ("token", "fork", "join", "finish")


@dataclasses.dataclass(frozen=True)
class Event:
    """One thing that happened to one answer.

    Attributes:
      kind: "token" (of the response, sampled or forced), "fork" (a block's branches start), "join"
        (its trunk goes on), or "finish".
      request: the id that `Engine.submit` returned for the answer.
      branch: the line it happened to: (block, branch) of every line above, counted from 0; () is
        the trunk. Tokens of one line come in order; lines are interleaved.
      token_id, logp, forced: of a token; logp is raw, 0 for a forced token.
      text: what the token adds to its line's text: "" while a character is incomplete, None
        without a tokenizer.
      branches: of a fork, their number.
      trajectory: of a finish, the answer.
    """

    kind: str
    request: int
    branch: tuple[tuple[int, int], ...] = ()
    token_id: int | None = None
    logp: float | None = None
    forced: bool = False
    text: str | None = None
    branches: int | None = None
    trajectory: Trajectory | None = None


class TextPieces:
    """Text of a growing list of tokens, in pieces that never cut a character."""

    def __init__(self, tokenizer):
        self._decode = lambda ids: tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        self._ids: list[int] = []  # from the last whole piece on, and that piece before them
        self._known = 0  # of `_ids`, those whose text was given out

    def add(self, token: int) -> str:
        """The text that this token completes."""
        self._ids.append(token)
        before = self._decode(self._ids[: self._known])
        text = self._decode(self._ids)
        incomplete = text.endswith("\N{REPLACEMENT CHARACTER}")  # a character's first bytes, or
        if incomplete and len(self._ids) - self._known < 4:  # bytes that are none at all
            return ""
        self._ids, self._known = self._ids[self._known :], len(self._ids) - self._known
        return text[len(before) :]
