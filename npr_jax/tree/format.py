"""The checks above the tree: is a block well numbered (the engine asks before it forks), and does
a whole response keep the format (reward, rejection sampling)?

Three levels, one automaton: `tree.parse` (is it a tree), `check_block` (and numbered, within the
limits), `check_format` (and nothing but blocks, then an answer in one `\\boxed{}`). All read token
ids; text is only decoded, never encoded.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from npr_jax.answers import find_boxed
from npr_jax.tree import Block, Rules, TagIds, TraceError, parse
from npr_jax.tree.rules import PAPER

_NUMBERED = re.compile(r"\s*(\d+)\s*:(.*)", re.DOTALL)


class Violation(NamedTuple):
    """One broken rule: its kind, the token at which it shows, and a sentence."""

    kind: str
    index: int
    reason: str


def check_block(
    token_ids: Sequence[int], block: Block, tags: TagIds, max_branches: int
) -> Violation | None:
    """The first rule that a block's plans break, or None.

    The plans are numbered 1..n in order ("1: ..."), none is empty, and n is at most `max_branches`.
    """
    num = len(block.plans)
    if num > max_branches:
        return Violation("too_many_plans", block.start, f"{num} plans, at most {max_branches}")
    return _check_numbers(token_ids, block.plans, tags, "plan")


def _check_numbers(token_ids, spans, tags: TagIds, name: str, cut=()) -> Violation | None:
    """Of the spans those that end with a token of `cut` may be empty."""
    for number, (start, end) in enumerate(spans, 1):
        text = tags.text(token_ids[start + 1 : end - 1])
        match = _NUMBERED.fullmatch(text)
        if match is None or int(match[1]) != number:
            return Violation(
                f"{name}_number",
                start,
                f"{name} {number} starts with {text[:12]!r}, not '{number}:'",
            )
        if not match[2].strip() and end - 1 not in cut:
            return Violation(f"empty_{name}", start, f"{name} {number} is empty")
    return None


def check_format(
    token_ids: Sequence[int] | np.ndarray,
    prompt_len: int,
    tags: TagIds,
    max_branches: int = 5,
    max_depth: int = 1,
    rules: Rules = PAPER,
) -> list[Violation]:
    """The rules that a response breaks; empty if it keeps the format.

    The response is one block or more with white space between, in which every plan, step and
    takeaway says something under its number; then any text, in which exactly one `\\boxed{}` is
    complete and not empty. By `rules` that know trials, what was cut off may say nothing, and no
    trial is longer than it can have come.
    """
    token_ids = list(token_ids)
    try:
        tree = parse(token_ids, prompt_len, tags, max_depth=max_depth, rules=rules)
    except TraceError as error:
        return [Violation("tree", error.index, error.reason)]
    if not tree.blocks:
        return [Violation("no_block", prompt_len, "no <guideline> block")]
    found = []
    closed = [end - 1 for block in tree.blocks for _, end in block.steps]
    cut = {last for last in closed if tree.forced[last]}
    after = prompt_len
    for block in tree.blocks:
        if block.depth == 0:
            stray = next(
                (i for i in range(after, block.start) if token_ids[i] not in tags.whitespace), -1
            )
            if stray >= 0:
                found.append(Violation("stray_text", stray, "text before a block"))
            after = block.end
        found.append(check_block(token_ids, block, tags, max_branches))
        found.append(_check_numbers(token_ids, block.steps, tags, "step", cut))
        assert block.takeaway is not None  # complete blocks only
        if not tags.text(token_ids[block.takeaway[0] + 1 : block.takeaway[1] - 1]).strip():
            found.append(Violation("empty_takeaway", block.takeaway[0], "the takeaway is empty"))
    boxes = find_boxed(tags.text(token_ids[after:]))
    if not boxes:
        found.append(
            Violation("no_boxed", len(token_ids), "no complete \\boxed{} after the blocks")
        )
    elif len(boxes) > 1:
        found.append(Violation("many_boxed", after, f"{len(boxes)} \\boxed{{}} after the blocks"))
    elif not boxes[0].strip(" \t\n{}"):
        found.append(Violation("empty_boxed", after, "the \\boxed{} is empty"))
    return [violation for violation in found if violation is not None]
