"""Replay: given ids take the place of samples, one a step, through the same forks and joins.

The trace's layout says beforehand where it forks, so no automaton reads; header tokens are written
at once, as forced; every other token of the response gets its raw log-prob.
"""

import dataclasses

import numpy as np

from npr_jax.decode.fork_join import ForkJoin
from npr_jax.decode.outputs import Trajectory
from npr_jax.decode.requests import RequestMaker
from npr_jax.decode.sampling import SamplingParams
from npr_jax.decode.sequence import Fork, Request, Segment, Sequence
from npr_jax.tree import Block, TreeLayout, layout, parse


@dataclasses.dataclass
class Script:
    """A sequence to be replayed: pieces of given tokens, of which the first `heads[i]` of piece i
    are a forced header, and after each piece a fork (none after a last one): its block, counted in
    the sequence's own tokens, where in each branch its `<step>` stands, and the branches. The last
    piece ends with `closed` forced tokens more."""

    pieces: list[list[int]]
    heads: list[int]
    forks: list[tuple[Block, list[int], list["Script"]]]
    closed: int = 0

    def drawn(self, number: int) -> slice:
        """What of a piece is not forced."""
        is_last = number + 1 == len(self.pieces)
        return slice(self.heads[number], len(self.pieces[number]) - (self.closed if is_last else 0))


class ReplayedSequence(Sequence):
    """A sequence whose tokens are known: `piece` is the piece of its script that it is in."""

    def __init__(self, request, parent, number, key, script: Script):
        super().__init__(request, parent, number, key)
        self.script, self.piece = script, 0

    def begin_piece(self) -> list[int]:
        """Sets what is given, and how much is left of it; returns the header."""
        piece, drawn = self.script.pieces[self.piece], self.script.drawn(self.piece)
        self.given, self.budget = piece[: drawn.stop], drawn.stop - drawn.start
        return piece[: drawn.start]


class Replay(ForkJoin):
    """Advances replayed sequences, and forks and joins them where their scripts say so."""

    def advance(self, sequence: Sequence, tokens: list[int], figures: np.ndarray) -> None:
        """Takes the given tokens with their figures; acts at the end of a piece."""
        assert isinstance(sequence, ReplayedSequence)
        self._append(sequence, tokens, figures)
        self._go_on(sequence)

    def _go_on(self, sequence: ReplayedSequence) -> None:
        script = sequence.script
        assert sequence.given is not None
        if len(sequence.tail.tokens) < len(sequence.given):
            return
        if sequence.piece == len(script.forks):
            if closed := script.pieces[-1][len(sequence.given) :]:
                sequence.tail.append_known(closed, forced=True)
                self._note(sequence, "token", tokens=closed)
            self._end(sequence, "stop", "replayed")
            return
        block, opens, children = script.forks[sequence.piece]
        self._note(sequence, "fork", branches=len(children))
        branches = []
        for number, child in enumerate(children):
            branch = ReplayedSequence(sequence.request, sequence, number, sequence.key, child)
            head = branch.begin_piece()
            before = self._before_branch(sequence, block, number)
            self._start_segment(branch, head, sequence.position + 1, before)
            branches.append(branch)
        self._wait(sequence, Fork(block, branches, opens))
        for branch in branches:
            self._go_on(branch)  # a trace may end inside a header

    def _resume(self, sequence: Sequence, fork: Fork) -> None:
        assert isinstance(sequence, ReplayedSequence)
        if sequence.piece + 1 == len(sequence.script.pieces):
            self._end(sequence, "stop", "replayed")  # the trace was cut off inside the block
            return
        sequence.piece += 1
        self._join(sequence, fork, sequence.begin_piece())
        self._go_on(sequence)  # a trace may end inside the header

    def _end(self, sequence: Sequence, reason: str, detail: str) -> None:
        if sequence.parent is None:
            self._finish(sequence.request, reason, detail)
        else:
            self._branch_ended(sequence)


def replayed_request(maker: RequestMaker, trace, parallel: bool, name: str) -> Request:
    """The request that replays a trace: a Trajectory, or a pair (token ids, prompt length). It is
    laid out by the rules of this engine, whichever it was decoded by.

    Raises:
      ValueError: the trace is neither, holds what is no id of the vocabulary, is no tree, has no
        prompt or response, could not fit the empty pool, or is a pair and there are no tags to
        parse it with.
    """
    rules = maker.config.rules
    if isinstance(trace, Trajectory):
        ids, tree = maker.ids(trace.token_ids, name), trace.layout
        if tree.rules != rules:
            tree = layout(len(ids), tree.blocks, tree.prompt_len, tree.forced, rules, ids)
    else:
        try:
            given, prompt_len = trace
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{name} is {type(trace).__name__}, needed is a Trajectory, or a pair (token ids, "
                "prompt length)"
            ) from error
        ids = maker.ids(given, name)
        if maker.tags is None:
            raise ValueError(
                f"{name} is a pair of ids and prompt length, and the model has no tokenizer whose "
                "tags could parse it: give a Trajectory with its layout"
            )
        tree = parse(ids, prompt_len, maker.tags, allow_open=True, rules=rules)
    if tree.prompt_len < 1 or tree.total_len < 1:
        raise ValueError(
            f"{name} has {tree.prompt_len} prompt tokens and a response of {tree.total_len}, "
            "needed is at least one of each"
        )
    if not parallel:
        tree = layout(len(ids), prompt_len=tree.prompt_len, rules=rules)
    sampling = SamplingParams(temperature=0, max_tokens=tree.total_len, parallel=parallel)
    maker.refuse_too_long(tree.prompt_len, sampling, name)
    shared = Segment(0, ())
    shared.append_known(ids[: tree.prompt_len - 1], forced=False)
    shared.plain = True
    key = np.zeros(2, np.uint32)
    request = maker.make(ids[: tree.prompt_len], (shared,), sampling, key)
    script, plain = script_of(ids, tree), request.trunk
    request.tree, request.stops = tree, ()
    request.max_position = len(ids) + 1  # its own length is the only limit
    request.trunk = trunk = ReplayedSequence(request, None, 0, key, script)
    trunk.items, trunk.tail = plain.items, plain.tail
    trunk.begin_piece()
    return request


def script_of(tokens: list[int], tree: TreeLayout) -> Script:
    """Cuts a laid-out trace into the scripts of its trunk and branches; the prompt's last token and
    what follows belong to the trunk's first piece."""

    def sequence(begin: int, end: int, depth: int) -> Script:
        script = Script([], [], [])
        start = begin if depth else max(tree.prompt_len - 1, 0)
        above = begin  # tokens before these that are not the sequence's own
        for block in tree.blocks:
            if block.depth != depth or not start <= block.start < end or not block.steps:
                continue
            cut = block.fork
            script.pieces.append(tokens[start:cut])
            script.heads.append(head(start, cut))
            runs = list(zip(block.branches, block.steps, strict=True))
            opens = [step - branch for (branch, _), (step, _) in runs]
            children = [sequence(*branch, depth + 1) for branch, _ in runs]
            after = above + block.join - cut
            script.forks.append((_shift(block, above, after), opens, children))
            start, above = block.join, after
            if block.join == len(tree):
                return script
        script.pieces.append(tokens[start:end])
        script.heads.append(head(start, end))
        sampled = np.flatnonzero(~tree.forced[start:end])
        script.closed = end - start - int(sampled[-1]) - 1 if len(sampled) else 0
        return script

    def head(start: int, end: int) -> int:
        sampled = np.flatnonzero(~tree.forced[start:end])
        return int(sampled[0]) if len(sampled) else end - start

    script = sequence(0, len(tokens), 0)
    script.heads[0] = 1  # the prompt's last token
    return script


def _shift(block: Block, before: int, after: int) -> Block:
    """The block with less on what is counted of the sequence before and after its branches."""
    takeaway = block.takeaway
    assert block.guideline_close is not None  # it has steps
    return block._replace(
        start=block.start - before,
        guideline_close=block.guideline_close - before,
        plans=tuple((start - before, end - before) for start, end in block.plans),
        takeaway=takeaway and (takeaway[0] - after, takeaway[1] - after),
    )
