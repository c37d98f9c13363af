"""Canonical framing: a sequential trace rewritten to the headers that the engine forces.

The engine starts every branch with "\\n<step>\\n{i}:" and every join with "\\n<takeaway>\\n". A
trace that was sampled sequentially may have other white space there. It is rewritten, as ids, so
that training contexts are exactly decoding contexts; no other token changes.
"""

import re
from collections.abc import Sequence

import numpy as np

from npr_jax.tree import TagIds, TraceError, parse

_NUMBER = re.compile(r"\s*(\d+)\s*:")
_LONGEST = 32  # tokens looked at for the number of a step


def canonical(
    token_ids: Sequence[int] | np.ndarray, prompt_len: int, tags: TagIds, max_depth: int = 8
) -> np.ndarray:
    """Ids i32[T'] of the same trace with canonical headers; applied again, it changes nothing.

    Args:
      token_ids: T ids, prompt and response; the prompt stays as it is.
      prompt_len: where the response starts.
      tags: of a tokenizer, with headers and `decode`.
      max_depth: levels of nested blocks that are accepted.

    Raises:
      TraceError: the response is no tree, a step does not start with its number and a colon, or
        the token that ends this prefix also holds text behind it.
    """
    tokens = np.asarray(token_ids, np.int32)
    edits: list[tuple[int, int, tuple[int, ...]]] = []  # (start, end, new ids), never overlapping
    for block in parse(tokens, prompt_len, tags, max_depth=max_depth).blocks:
        if len(block.steps) > len(tags.step_headers):
            raise TraceError(
                block.start, f"{len(block.steps)} steps, there are {len(tags.step_headers)} headers"
            )
        heads = zip(block.branches, block.steps, tags.step_headers, strict=False)
        for number, ((start, end), (step_open, _), header) in enumerate(heads, 1):
            edits.append((start, _number_end(tokens, step_open + 1, end - 1, number, tags), header))
        assert block.takeaway is not None  # complete blocks only
        content = block.takeaway[0] + 1
        while int(tokens[content]) in tags.whitespace:  # `</takeaway>` is none: this ends
            content += 1
        edits.append((block.join, content, tags.takeaway_header))
    parts, done = [], 0
    for start, end, header in sorted(edits):
        parts += [tokens[done:start], np.array(header, np.int32)]
        done = end
    return np.concatenate([*parts, tokens[done:]])


def _number_end(tokens, start: int, end: int, number: int, tags: TagIds) -> int:
    """Index after the prefix "{number}:" of the step body [start, end)."""
    for stop in range(start + 1, min(end, start + _LONGEST) + 1):
        text = tags.text(tokens[start:stop].tolist())
        match = _NUMBER.match(text)
        if match and int(match[1]) == number:
            if match.end() == len(text):
                return stop
            raise TraceError(stop - 1, f"a token joins the prefix of step {number} to its text")
        if match:
            break
    text = tags.text(tokens[start : min(end, start + 8)].tolist())
    raise TraceError(start, f"step {number} starts with {text[:16]!r}, not '{number}:'")
