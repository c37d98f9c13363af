"""How answers grow: what was drawn is read by the automaton, and sequences fork, join and end.

A branch that ends badly (end of text, no tokens left, an illegal tag) does not stop its siblings;
when all are done, the sequence above ends with the first such reason in the order of the plans.

Of a block of trials (tree/rules.py) the branch with the fewest tokens that ends with a result cuts
the others off at its length, whatever they have drawn behind it, and however they have ended there.
So what counts does not depend on who draws faster, and nobody hears of a trial before all have come
so far.
"""

from collections import abc

import numpy as np

from npr_jax.decode.config import EngineConfig
from npr_jax.decode.keys import branch_keys
from npr_jax.decode.scheduler import Scheduler
from npr_jax.decode.sequence import Fork, Piece, Request, Segment, Sequence, table_of
from npr_jax.tree import STEPS, Automaton, TagIds, TraceError
from npr_jax.tree.format import check_block

NO_DEPTH_LIMIT = 1 << 20  # the automaton's; the engine's own is asked when a guideline closes


class ForkJoin:
    """Advances sequences by what was drawn for them.

    `finish(request, reason, detail)` is called once for every answer, when its trunk has ended;
    `note(sequence, kind, **what)` hears what happens.
    """

    def __init__(
        self,
        config: EngineConfig,
        tags: TagIds | None,
        schedulers: abc.Sequence[Scheduler],
        finish: abc.Callable[[Request, str, str], None],
        note: abc.Callable[..., None],
        stats: dict[str, int],
    ):
        self.config, self.tags, self.schedulers = config, tags, schedulers
        self._finish, self._note, self._stats = finish, note, stats

    def advance(self, sequence: Sequence, tokens: list[int], figures: np.ndarray) -> None:
        """Takes the tokens drawn for a sequence, with their figures, and acts on the last."""
        request, automaton, tags = sequence.request, sequence.automaton, self.tags
        if sequence.stop is not None:
            try:
                count = self._searched(sequence, tokens)
            except Exception as error:  # the tokenizer's: only this answer fails
                self._finish(request, "error", f"{type(error).__name__}: {error}")
                return
            tokens, figures = tokens[:count], figures[:count]
        stopped = sequence.stop is not None and sequence.stop.found
        ended = not stopped and tokens[-1] in request.ends
        text = tokens[:-1] if ended else tokens
        keep, error = len(tokens), None
        if automaton is not None:
            begin = automaton.index
            try:
                automaton.read(text)
            except TraceError as found:
                error = found
                keep = min(found.index - begin + 1, len(text))
        if keep < len(tokens):
            tokens, figures = tokens[:keep], figures[:keep]
        self._append(sequence, tokens, figures)
        if error is not None:
            self._end(sequence, "malformed", error.reason)
        elif stopped:
            self._end(sequence, "stop", "")
        elif ended and automaton is not None and automaton.stack and sequence.parent is None:
            self._end(sequence, "malformed", "end of text inside a block")
        elif ended:
            self._end(sequence, "stop", "")
        elif automaton is not None and automaton.closed:
            self._branch_ended(sequence)
        elif (
            automaton is not None
            and tags is not None
            and automaton.state == STEPS
            and tokens[-1] == tags.guideline_close
        ):
            self._fork(sequence)
        else:
            self._check_limits(sequence)

    def _searched(self, sequence: Sequence, tokens: list[int]) -> int:
        """How many of these there are up to the one that completes a text which ends the line."""
        request, position = sequence.request, sequence.position
        for count, token in enumerate(tokens, 1):
            early = position + count < request.ends_from
            sequence.stop.add(token, known=early or token in request.ends)
            if sequence.stop.found:
                return count
        return len(tokens)

    def _grammar(self, sequence: Sequence) -> tuple[Automaton, TagIds]:
        """What reads a sequence that may fork, and the tags that it knows."""
        assert sequence.automaton is not None and self.tags is not None
        return sequence.automaton, self.tags

    def _append(self, sequence: Sequence, tokens: list[int], figures: np.ndarray) -> None:
        sequence.tail.append(tokens, figures)
        sequence.budget -= len(tokens)
        self._stats["sampled_tokens"] += len(tokens)
        if _trials(sequence) is None:
            self._note(sequence, "token", tokens=tokens, figures=figures)

    def _check_limits(self, sequence: Sequence) -> None:
        if sequence.left > 0:
            fork = _trials(sequence)
            if fork and fork.first is not None and len(sequence.tail.tokens) >= fork.first:
                sequence.cut = True
                self._branch_ended(sequence)
            return
        request = sequence.request
        if sequence.budget < 1:
            limit = request.sampling.max_tokens
            self._end(sequence, "length", f"max_tokens={limit} (the line's share)")
        else:
            self._end(sequence, "length", f"max_position={request.max_position}")

    def _fork(self, sequence: Sequence) -> None:
        """Starts the branches of the block that has just closed its guideline, or refuses it."""
        automaton, tags = self._grammar(sequence)
        block = automaton.stack[-1]
        num, own = len(block.plans), sequence.own_tokens()
        trials = self.config.rules.of_trials(own[start:end] for start, end in block.plans)
        problem = self._refuse_block(sequence)
        if problem:
            if self.config.on_invalid_block == "end":
                self._end(sequence, "invalid_block", problem)
            else:
                sequence.request.refused.append(problem)
                self._check_limits(sequence)
            return
        heads = tags.step_headers[:num]
        spare = sequence.budget - sum(map(len, heads))
        share = (spare - len(tags.takeaway_header)) // (num + 1)  # the join keeps one as well
        sequence.budget = spare - num * share
        self._note(sequence, "fork", branches=num)
        branches = []
        keys = branch_keys(sequence.key, num)
        for number, (key, head) in enumerate(zip(keys, heads, strict=True)):
            branch = Sequence(sequence.request, sequence, number, key)
            branch.budget = share
            branch.stop = sequence.stop and sequence.stop.of_branch()
            branch.automaton = Automaton(
                tags, NO_DEPTH_LIMIT, len(head), branch.depth, in_step=True, in_trial=trials
            )
            before = self._before_branch(sequence, block, number)
            self._start_segment(branch, list(head), sequence.position + 1, before)
            branches.append(branch)
        opens = [head.index(tags.step_open) for head in heads]
        self._wait(sequence, Fork(block, branches, opens, undecided=trials))

    def _refuse_block(self, sequence: Sequence) -> str | None:
        """Why the block that has just closed its guideline cannot be forked, or None."""
        (automaton, tags), config = self._grammar(sequence), self.config
        block, limit = automaton.stack[-1], sequence.request.max_position
        sampling, most, deepest = sequence.request.sampling, config.max_branches, config.max_depth
        if sampling.max_branches is not None:
            most = sampling.max_branches
        if sampling.max_depth is not None:
            deepest = sampling.max_depth
        broken = check_block(sequence.own_tokens(), block.close(automaton.index), tags, most)
        if broken:
            return broken.reason
        forks = sum(isinstance(item, Fork) for item in sequence.items)
        if config.max_blocks and forks >= config.max_blocks:
            return f"block {forks + 1} of a line, at most {config.max_blocks}"
        if sequence.depth >= deepest:
            return f"nested {sequence.depth + 1} deep, at most {deepest}"
        num = len(block.plans)
        heads = tags.step_headers[:num]
        spare = sequence.budget - sum(map(len, heads)) - len(tags.takeaway_header)
        if spare < num + 1:
            return f"{sequence.budget} tokens are left, too few for {num} steps and a takeaway"
        if sequence.position + max(map(len, heads)) + 1 >= limit:
            return f"max_position={limit} leaves no room for a step"
        return None

    def _before_branch(self, sequence: Sequence, block, number: int) -> tuple[Segment, ...]:
        """What the branch of that number sees beside itself, of a block that closes its guideline
        with the sequence's last token."""
        if self.config.rules.fork == "trunk":
            return sequence.table
        request, tail = sequence.request, sequence.tail
        pieces: list[Piece] = []
        for item in request.trunk.items:
            if isinstance(item, Segment) and item.start < request.prompt_len and item.tokens:
                pieces.append((item, 0, min(len(item.tokens), request.prompt_len - item.start)))
        begin, end = block.plans[number]
        # It is in the last segment, as a new one begins behind a block only.
        behind = len(tail.tokens) - 1 - block.guideline_close
        return table_of((), [*pieces, (tail, begin + behind, end + behind)])

    def _start_segment(self, sequence: Sequence, head: list[int], start: int, before) -> None:
        segment = Segment(start, before, before[-1].dtype)
        segment.append_known(head, forced=True)
        sequence.append(segment)
        if sequence.stop is not None:
            sequence.stop.wrote(head)
        self._note(sequence, "token", tokens=head)

    def _wait(self, sequence: Sequence, fork: Fork) -> None:
        """The sequence gives its lane up and waits for the branches of `fork`."""
        scheduler = self.schedulers[sequence.request.replica]
        scheduler.release(sequence)
        sequence.items.append(fork)
        sequence.waiting = True
        for branch in fork.branches:
            scheduler.take(branch)
        self._stats["forks"] += 1

    def _branch_ended(self, branch: Sequence) -> None:
        """A branch is done, well or not; after its last sibling the parent goes on or ends."""
        branch.done = True
        self.schedulers[branch.request.replica].release(branch)
        parent = branch.parent
        assert parent is not None  # the trunk has no close tag
        fork = parent.fork
        if fork.undecided:
            self._cut(fork)
        if not all(branch.done for branch in fork.branches):
            return
        if fork.undecided:
            self._decide(fork)
        failure = next((b.failure for b in fork.branches if b.failure), None)
        if failure:
            self._end(parent, *failure)
        else:
            self._resume(parent, fork)

    def _cut(self, fork: Fork) -> None:
        """Cuts trials off where the shortest that has a result has ended."""
        results = [len(x.tail.tokens) for x in fork.branches if self._has_result(x)]
        if not results:
            return
        fork.first = min(results)
        for branch in fork.branches:
            excess = len(branch.tail.tokens) - fork.first
            if excess < 0 or (excess == 0 and branch.done):
                continue
            branch.tail.shorten(fork.first)
            branch.budget += excess
            self._stats["sampled_tokens"] -= excess
            branch.cut, branch.done, branch.failure = True, True, None
            self.schedulers[branch.request.replica].release(branch)

    def _has_result(self, branch: Sequence) -> bool:
        """Whether a trial has ended, and with a result."""
        if not branch.done or branch.cut or branch.failure:
            return False
        _, tags = self._grammar(branch)
        body = branch.tail.tokens[len(tags.step_headers[branch.number]) : -1]
        return self.config.rules.has_result(body, tags.whitespace)

    def _decide(self, fork: Fork) -> None:
        """All trials have come as far as they will: the steps of those that were cut off are
        closed, and what they hold is told."""
        self._tell_trials(fork)
        for branch in fork.branches:
            if branch.cut:
                _, tags = self._grammar(branch)
                branch.tail.append_known([tags.step_close], forced=True)
                branch.budget -= 1
                self._note(branch, "token", tokens=[tags.step_close])

    def tell_undecided(self, sequence: Sequence) -> None:
        """Tells what trials have drawn, in a sequence that ends before they are decided."""
        if sequence.waiting:
            for branch in sequence.fork.branches:
                self.tell_undecided(branch)
            if sequence.fork.undecided:
                self._tell_trials(sequence.fork)

    def _tell_trials(self, fork: Fork) -> None:
        """Tells what trials have drawn, now that none of it can be lost."""
        fork.undecided = False
        for branch in fork.branches:
            figures = np.frombuffer(branch.tail.figures, branch.tail.dtype)
            drawn = int((~figures["forced"]).sum())
            if drawn:
                tokens = branch.tail.tokens[-drawn:]
                self._note(branch, "token", tokens=tokens, figures=figures[-drawn:].copy())

    def _resume(self, sequence: Sequence, fork: Fork) -> None:
        """The branches have reached their ends: on with the takeaway, if there is room."""
        automaton, tags = self._grammar(sequence)
        head, limit = list(tags.takeaway_header), sequence.request.max_position
        sequence.budget += sum(branch.budget for branch in fork.branches)
        if self._after(sequence, fork) + len(head) >= limit:
            self._end(sequence, "length", f"max_position={limit} leaves no room for a takeaway")
            return
        sequence.budget -= len(head)
        automaton.skip_steps()
        automaton.read(head)
        self._join(sequence, fork, head)
        self._check_limits(sequence)

    def _join(self, sequence: Sequence, fork: Fork, head: list[int]) -> None:
        """The sequence goes on after its branches, with a header, and sees them all, or what the
        rules leave of them."""
        old = [sequence.table, *(branch.table for branch in fork.branches)]
        pieces = [piece for branch in fork.branches for piece in self._kept(branch)]
        before, after = table_of(sequence.table, pieces), self._after(sequence, fork)
        fork.joined = True
        sequence.waiting = False
        path = 1 + max(branch.position - branch.late for branch in fork.branches)
        sequence.late = after - path
        self._note(sequence, "join")
        self._start_segment(sequence, head, after, before)
        scheduler = self.schedulers[sequence.request.replica]
        scheduler.take(sequence)
        for table in old:
            scheduler.drop(table)
        self._stats["joins"] += 1

    def _kept(self, branch: Sequence) -> list[Piece]:
        """What the sequence above sees of a branch after the join."""
        rules, segments = self.config.rules, branch.segments
        own = branch.table[len(segments[0].before) :]
        whole = [segment.whole for segment in own]
        if rules.join == "all":
            return whole
        body, cut = _hidden_body(branch, rules.marker)
        if body == cut:
            return whole
        for segment in segments:
            if cut < len(segment.tokens):
                break
            cut -= len(segment.tokens)
        last = segment, cut, len(segment.tokens)
        return [(segments[0], 0, body), last, *whole[own.index(segment) + 1 :]]

    def _after(self, sequence: Sequence, fork: Fork) -> int:
        """The position at which a sequence goes on after its branches."""
        ends = [branch.position for branch in fork.branches]
        if self.config.rules.positions == "max":
            return 1 + max(ends)
        return 1 + sequence.position + sum(end - sequence.position for end in ends)

    def _end(self, sequence: Sequence, reason: str, detail: str) -> None:
        """A sequence ends without reaching its own end: a branch lets its siblings run on."""
        if sequence.parent is None:
            self._finish(sequence.request, reason, detail)
            return
        inside = {"stop": "branch_eos", "length": "branch_length"}.get(reason, reason)
        detail = ": ".join(filter(None, (f"step {sequence.number + 1}", detail)))
        sequence.failure = inside, detail
        self._branch_ended(sequence)


def _trials(branch: Sequence) -> Fork | None:
    """The block of trials, not decided yet, that a branch is of."""
    if branch.parent is None or not branch.parent.waiting or not branch.parent.fork.undecided:
        return None
    return branch.parent.fork


def _hidden_body(branch: Sequence, marker: str | int | None) -> tuple[int, int]:
    """The run [begin, end) of a joined branch's own tokens from behind its header to its last
    marker outside its blocks; empty where there is none."""
    first, marked = branch.segments[0], np.array(branch.own_tokens()) == marker
    forced = np.frombuffer(first.figures, first.dtype)["forced"].tolist()
    begin = [*forced, False].index(False)
    marked[:begin] = False
    for item in branch.items:
        if isinstance(item, Fork):
            assert item.block.takeaway is not None  # it is joined
            marked[item.block.start : item.block.takeaway[1]] = False
    found = np.flatnonzero(marked)
    return begin, int(found[-1]) + 1 if len(found) else begin
