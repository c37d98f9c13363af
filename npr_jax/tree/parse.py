"""Token ids become a tree: the tags, and the one automaton that reads them.

    token ids --Automaton--> blocks --layout--> TreeLayout

Nothing else in the package parses tags.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from numbers import Integral

import numpy as np

from npr_jax.tree.layout import Block, TreeLayout, framing, layout
from npr_jax.tree.rules import MARKS, PAPER, Rules

TAG_NAMES = (
    "<guideline>",
    "</guideline>",
    "<plan>",
    "</plan>",
    "<step>",
    "</step>",
    "<takeaway>",
    "</takeaway>",
)
MAX_HEADERS = 64  # step headers made for a tokenizer; more branches than that cannot be forced


class TraceError(ValueError):
    """A trace is not a tree. `index`: the token at fault (or the length, at an early end)."""

    def __init__(self, index: int, reason: str):
        super().__init__(f"token {index}: {reason}")
        self.index = index
        self.reason = reason


@dataclasses.dataclass(frozen=True)
class TagIds:
    """Token ids of the eight tags, of white space, and of the text that the engine forces.

    Inside a text, `step_headers[i - 1]` are the ids of "\\n<step>\\n{i}:" and `takeaway_header`
    those of "\\n<takeaway>\\n"; `decode` turns ids into text, and `encode` what stands inside a
    text into ids. A tokenizer gives them. The layout of a trace needs none of the four; the numbers
    of its plans, the engine and a marker do.
    """

    guideline_open: int
    guideline_close: int
    plan_open: int
    plan_close: int
    step_open: int
    step_close: int
    takeaway_open: int
    takeaway_close: int
    whitespace: frozenset[int]
    step_headers: tuple[tuple[int, ...], ...] = ()
    takeaway_header: tuple[int, ...] = ()
    decode: Callable[[Sequence[int]], str] | None = dataclasses.field(default=None, compare=False)
    encode: Callable[[str], tuple[int, ...]] | None = dataclasses.field(default=None, compare=False)

    @property
    def ids(self) -> tuple[int, ...]:
        """The eight tag ids in the order of TAG_NAMES."""
        return tuple(getattr(self, field.name) for field in dataclasses.fields(self)[:8])

    def text(self, ids: Sequence[int]) -> str:
        """The text of ids; raises ValueError where no tokenizer has made these TagIds."""
        if self.decode is None:
            raise ValueError("these TagIds know no text, needed are TagIds.from_tokenizer")
        return self.decode(ids)

    def resolved(self, rules: Rules) -> Rules:
        """The rules with the ids of their tokens. Raises ValueError where a text is not one token,
        or is a tag, or white space in place of a failure."""
        found = {name: self._mark(name, getattr(rules, name)) for name in MARKS}
        if found["failure"] in self.whitespace:
            raise ValueError(
                f"failure is {rules.failure!r}, which is white space: needed is a token that says "
                "something"
            )
        return dataclasses.replace(rules, **found)

    def _mark(self, name: str, mark: str | int | None) -> int | None:
        """The id of the token that is that rule."""
        if isinstance(mark, str):
            if self.encode is None:
                raise ValueError(
                    f"{name} is {mark!r}, but there is no tokenizer to read it: set it to the id "
                    "of a token"
                )
            ids = self.encode(mark)
            if len(ids) != 1:
                raise ValueError(
                    f"{name} is {mark!r}, which the tokenizer splits into {len(ids)} tokens, "
                    "needed is a text of 1"
                )
            token = ids[0]
        else:
            token = mark
        if token in self.ids:
            raise ValueError(
                f"{name} is {mark!r}, the tag {TAG_NAMES[self.ids.index(token)]}: needed is a "
                f"token that {'plans' if name == 'trial' else 'steps'} hold"
            )
        return token

    @classmethod
    def from_tokenizer(cls, tokenizer) -> "TagIds":
        """Reads the ids from a transformers tokenizer; raises ValueError where it splits a tag."""

        def encode(text: str) -> tuple[int, ...]:
            return tuple(tokenizer.encode(text, add_special_tokens=False))

        def decode(ids: Sequence[int]) -> str:
            return tokenizer.decode(
                list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
            )

        for name in TAG_NAMES:
            if len(encode(name)) != 1:
                raise ValueError(
                    f"the tokenizer splits {name} into {len(encode(name))} tokens, needed is 1: "
                    "load the model with them (npr_jax.load(..., tags=True))"
                )
        tags = tuple(encode(name)[0] for name in TAG_NAMES)
        # Some tokenizers add a space where a text starts, and take it off again: what stands inside
        # a text is what it is behind a tag.
        before, known = TAG_NAMES[0], len(decode(tags[:1]))
        pieces = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
        blank = [i for i, piece in enumerate(pieces) if not piece.strip()]

        def header(text: str) -> tuple[int, ...]:
            return encode(before + text)[1:]

        def inside(text: str) -> tuple[int, ...]:
            ids = header(text)
            while len(ids) > 1 and decode([tags[0], *ids[1:]])[known:] == text:
                ids = ids[1:]  # it was the space
            return ids

        return cls(
            *tags,
            whitespace=frozenset(i for i in blank if decode([tags[0], i])[known:].isspace()),
            step_headers=tuple(header(f"\n<step>\n{i}:") for i in range(1, MAX_HEADERS + 1)),
            takeaway_header=header("\n<takeaway>\n"),
            decode=decode,
            encode=inside,
        )


# The automaton's states. TEXT: a line of text, the trunk or the body of a step.
TEXT, GUIDELINE, PLAN, STEPS, TAKEAWAY = ("text", "guideline", "plan", "steps", "takeaway")
_WHITESPACE = 8  # the kinds 0..7 are the tags in the order of TAG_NAMES


class OpenBlock:
    """A block while it is being read; spans are [start, end] with None for an open end."""

    def __init__(self, start: int, depth: int):
        self.start, self.depth = start, depth
        self.guideline_close: int | None = None
        self.join: int | None = None
        self.end: int | None = None
        self.takeaway: list | None = None
        self.plans: list[list] = []
        self.steps: list[list] = []

    def close(self, num_tokens: int) -> Block:
        """The block's spans; what is still open ends at `num_tokens`."""

        def run(span):
            return (span[0], num_tokens if span[1] is None else span[1])

        return Block(
            self.start,
            self.guideline_close,
            tuple([run(span) for span in self.plans]),
            tuple([run(span) for span in self.steps]),
            num_tokens if self.join is None else self.join,
            run(self.takeaway) if self.takeaway else None,
            num_tokens if self.end is None else self.end,
            self.depth,
        )


class Automaton:
    """Reads one line of a response token by token and says at once where it stops being a tree.

    A line is the trunk, or (`in_step=True`) the inside of a branch, which ends with its own
    `</step>`; in that of a trial (`in_trial=True`) no block may begin. The parser reads a whole
    trace as one line; the engine gives each branch an automaton of its own and lets the trunk's
    skip the steps. Token indices count from `index`.

    Attributes: `state`; `index`, tokens read so far; `blocks`, all blocks begun; `stack`, the
    open ones; `closed`, whether the line's own `</step>` was read.
    """

    def __init__(
        self,
        tags: TagIds,
        max_depth: int = 8,
        index: int = 0,
        depth: int = 0,
        in_step: bool = False,
        in_trial: bool = False,
    ):
        self._kinds = dict.fromkeys(tags.whitespace, _WHITESPACE)
        self._kinds.update({token: kind for kind, token in enumerate(tags.ids)})
        self.max_depth, self.depth = max_depth, depth
        self.in_step, self.in_trial = in_step, in_trial
        self.state, self.index, self.closed = TEXT, index, False
        self.blocks: list[OpenBlock] = []
        self.stack: list[OpenBlock] = []

    def read(self, tokens: Iterable[int]) -> None:
        """Reads tokens; raises TraceError at the first that no tree can have there.

        The offending token is not taken: `index` and `state` are those before it.
        """
        kind_of, index, state = self._kinds.get, self.index, self.state
        for token in tokens:
            kind = kind_of(token)
            if kind is None:
                if state is GUIDELINE or state is STEPS:
                    self.index = index
                    where = "inside <guideline>" if state is GUIDELINE else "before a step"
                    raise TraceError(index, f"text {where}, where only white space may stand")
            elif kind < _WHITESPACE:
                self.index = index
                state = self.state = self._tag(kind)
            index += 1
        self.index = index

    def _tag(self, kind: int) -> str:
        """Takes a tag at `self.index` and returns the next state."""
        index = self.index
        block = self.stack[-1] if self.stack else None
        if self.closed:
            raise TraceError(index, f"{TAG_NAMES[kind]} after the end of the step")
        match self.state, kind:
            case "text", 0:
                if self.in_trial:
                    raise TraceError(index, "a block inside a trial")
                if self.depth + len(self.stack) >= self.max_depth:
                    raise TraceError(index, f"blocks nested deeper than {self.max_depth}")
                block = OpenBlock(index, self.depth + len(self.stack))
                self.blocks.append(block)
                self.stack.append(block)
                return GUIDELINE
            case "guideline", 2 if block:
                block.plans.append([index, None])
                return PLAN
            case "plan", 3 if block:
                block.plans[-1][1] = index + 1
                return GUIDELINE
            case "guideline", 1 if block:
                if not block.plans:
                    raise TraceError(index + 1, "a guideline without a plan has ended")
                block.guideline_close = index
                return STEPS
            case "steps", 4 if block:
                if len(block.steps) == len(block.plans):
                    raise TraceError(index, f"more steps than plans ({len(block.plans)})")
                block.steps.append([index, None])
                return TEXT
            case "text", 5 if block:
                block.steps[-1][1] = index + 1
                return STEPS
            case "text", 5 if self.in_step:
                self.closed = True
                return TEXT
            case "steps", 6 if block:
                if len(block.steps) < len(block.plans):
                    raise TraceError(
                        index, f"fewer steps ({len(block.steps)}) than plans ({len(block.plans)})"
                    )
                block.join = block.steps[-1][1]
                block.takeaway = [index, None]
                return TAKEAWAY
            case "takeaway", 7 if block and block.takeaway:
                block.takeaway[1] = block.end = index + 1
                self.stack.pop()
                return TEXT
        place = {
            TEXT: "in a step" if block or self.in_step else "in the text",
            GUIDELINE: "between plans",
            PLAN: "in a plan",
            STEPS: "before a step",
            TAKEAWAY: "in a takeaway",
        }[self.state]
        raise TraceError(index, f"{TAG_NAMES[kind]} {place}")

    def skip_steps(self) -> None:
        """The open block's steps ran elsewhere (the engine's branches): go on at its takeaway."""
        block = self.stack[-1]
        block.steps = [[self.index, self.index]] * len(block.plans)

    def finish(self, allow_open: bool = False) -> tuple[Block, ...]:
        """The blocks of the line; one that is still open is a TraceError, or is cut off here."""
        if self.stack and not allow_open:
            raise TraceError(
                self.index, f"the trace ends inside the block of token {self.stack[-1].start}"
            )
        if self.stack and self.state is STEPS:
            block = self.stack[-1]
            assert block.guideline_close is not None  # steps come after it
            after = block.steps[-1][1] if block.steps else block.guideline_close + 1
            if after < self.index:
                raise TraceError(after, "cut off in white space: a step's or the trunk's?")
        return tuple([block.close(self.index) for block in self.blocks])


def parse(
    token_ids: Sequence[int] | np.ndarray,
    prompt_len: int,
    tags: TagIds,
    rule: str = "strict",
    max_depth: int = 8,
    allow_open: bool = False,
    rules: Rules = PAPER,
) -> TreeLayout:
    """Lays out a trace: `prompt_len` prompt tokens, which are plain text, then the response.

    Args:
      token_ids: T ids.
      prompt_len: where the response starts; tags before it are just text.
      tags: the ids of the tags and of white space.
      rule: "strict", or "reference" for the released trainer's masks and positions (complete
        blocks of one level).
      max_depth: levels of nested blocks that are accepted.
      allow_open: lay out a response that was cut off inside a block instead of refusing it.
      rules: of fork, join and positions, with the ids of their tokens (`TagIds.resolved`).

    Raises:
      TraceError: with the index of the first token at which the response is no tree.
      ValueError: `prompt_len` is not within the tokens, `rule` is another, or is "reference" with
        `allow_open` or with other rules than the defaults.
    """
    tokens = np.asarray(token_ids).tolist()
    if not isinstance(prompt_len, Integral) or not 0 <= prompt_len <= len(tokens):
        raise ValueError(f"prompt_len is {prompt_len}, needed is 0 to {len(tokens)} (tokens)")
    if rule not in ("strict", "reference"):
        raise ValueError(f"rule is {rule!r}, needed is 'strict' or 'reference'")
    if rule == "reference" and allow_open:
        raise ValueError("rule='reference' lays out complete traces only: allow_open must be False")
    if rule == "reference" and rules != PAPER:
        raise ValueError(f"rule='reference' has rules of its own: rules must be {PAPER}")
    automaton = Automaton(tags, max_depth, index=prompt_len)
    automaton.read(tokens[prompt_len:])
    blocks = automaton.finish(allow_open)
    # The spans give the forced tags; the canonical headers reach past them.
    forced = framing(len(tokens), blocks)
    for block in blocks:
        starts = [start for start, _ in block.branches]
        heads = list(zip(starts, tags.step_headers, strict=False))
        if block.takeaway:
            heads.append((block.join, tags.takeaway_header))
        for start, head in heads:
            if tuple(tokens[start : start + len(head)]) == head:
                forced[start : start + len(head)] = True
    if rules.trial is not None:
        _mark_cut(tokens, blocks, forced, rules, tags.whitespace)
    tree = layout(len(tokens), blocks, prompt_len, forced, rules, tokens)
    return tree if rule == "strict" else _reference(tree)


def _mark_cut(tokens: list[int], blocks: Sequence[Block], forced, rules: Rules, whitespace) -> None:
    """Marks the `</step>` of trials that were cut off as written by the engine: of those that are
    one token longer than the first with a result. Blocks that have not joined are left as they are.
    Raises TraceError at what no block of trials holds: a longer step, or a block inside one."""
    for block in blocks:
        plans = [tokens[start:end] for start, end in block.plans]
        if not block.takeaway or not rules.of_trials(plans):
            continue
        for other in blocks:
            if other.depth > block.depth and block.fork <= other.start < block.join:
                raise TraceError(other.start, "a block inside a trial")
        lengths = []
        for (start, end), (step_open, _) in zip(block.branches, block.steps, strict=True):
            body = step_open + 1
            while body < end and forced[body]:
                body += 1
            if rules.has_result(tokens[body : end - 1], whitespace):
                lengths.append(end - start)
        for start, end in block.branches if lengths else ():
            over = end - start - min(lengths)
            if over > 1:
                reason = f"a trial goes on behind token {min(lengths)}, where the first one ended"
                raise TraceError(start + min(lengths), reason)
            forced[end - 1] |= over == 1


def reference_depth(branches: int) -> int:
    """Hidden intervals per token under rule="reference", of blocks of up to that many branches."""
    return max(1, branches - 1)


def _reference(tree: TreeLayout) -> TreeLayout:
    """The released SFT trainer's mask and positions for the blocks of `tree`.

    Only the spans `<step>...</step>` are hidden, from later siblings' spans (siblings - 1
    intervals), so the separators leak. Every `<step>` restarts at p + 1, p being the position of
    `</guideline>`; the tokens between steps count on; `<takeaway>` stands at p + longest step + 1.
    Targets are the flat shift.
    """
    num_tokens = len(tree)
    for block in tree.blocks:
        if block.depth:
            raise TraceError(block.start, "rule='reference' has no nested blocks")
    siblings = max((len(block.steps) for block in tree.blocks), default=1)
    hidden = np.zeros((num_tokens, reference_depth(siblings), 2), np.int32)
    begins, starts = ([0], [0])  # of the runs of tokens that count up by one: index, position
    for block in tree.blocks:
        assert block.takeaway is not None  # complete blocks only
        base = starts[-1] + block.fork - 1 - begins[-1]
        for i, (start, end) in enumerate(block.steps):
            for d, later in enumerate(block.steps[i + 1 :]):
                hidden[start:end, d] = later
            begins.append(start)
            starts.append(base + 1)
        begins.append(block.takeaway[0])
        starts.append(base + 1 + max(end - start for start, end in block.steps))
    lengths = np.diff(np.array([*begins, num_tokens]))
    positions = np.arange(num_tokens) + np.repeat(np.subtract(starts, begins), lengths)
    pred = np.arange(-1, num_tokens - 1, dtype=np.int32)
    return dataclasses.replace(tree, hidden=hidden, positions=positions.astype(np.int32), pred=pred)
