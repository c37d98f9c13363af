"""How answers grow: what was drawn is read by the automaton, and lines fork, join and end.

A branch that ends badly (end of text, no tokens left, an illegal tag) does not stop its siblings;
when all are done, the line above ends with the first such reason in the order of the plans.
"""

from collections.abc import Callable, Sequence

from npr_jax.decode.config import EngineConfig
from npr_jax.decode.lines import Fork, Job, Line, Segment
from npr_jax.decode.scheduler import Scheduler
from npr_jax.tree import STEPS, Automaton, TagIds, TraceError
from npr_jax.tree.format import check_block

NO_DEPTH_LIMIT = 1 << 20  # the automaton's; the engine's own is asked when a guideline closes


class Grower:
    """Advances lines by what was drawn for them.

    `fold(key, n)` gives the keys of n branches; `finish(job, reason, detail)` is called once for
    every answer, when its trunk has ended; `emit(line, kind, **what)` hears what happens.
    """

    def __init__(
        self,
        config: EngineConfig,
        tags: TagIds | None,
        schedulers: Sequence[Scheduler],
        fold: Callable,
        finish: Callable[[Job, str, str], None],
        emit: Callable[..., None],
    ):
        self.config, self.tags, self.schedulers = config, tags, schedulers
        self._fold_keys, self._finish, self._emit = fold, finish, emit
        self.stats = {"sampled_tokens": 0, "forks": 0, "joins": 0}

    def advance(self, line: Line, tokens: list[int], *figures: list) -> None:
        """Takes the tokens drawn for a line, with log-probs, margins and steps, and acts on the
        last."""
        if line.script:
            line.tail.append(tokens, *figures)
            self.stats["sampled_tokens"] += len(tokens)
            self._emit(line, "token", tokens=tokens, logp=figures[0])
            self._advance_script(line)
            return
        job, automaton, tags = line.job, line.automaton, self.tags
        ended = tokens[-1] in job.ends
        text = tokens[:-1] if ended else tokens
        keep, error = len(tokens), None
        if automaton is not None:
            begin = automaton.index
            try:
                automaton.read(text)
            except TraceError as found:
                error = found
                keep = min(found.index - begin + 1, len(text))
        line.tail.append(tokens[:keep], *(figure[:keep] for figure in figures))
        line.budget -= keep
        self.stats["sampled_tokens"] += keep
        self._emit(line, "token", tokens=tokens[:keep], logp=figures[0])
        if error is not None:
            self._end(line, "malformed", error.reason)
        elif ended and automaton is not None and automaton.stack and line.parent is None:
            self._end(line, "malformed", "end of text inside a block")
        elif ended:
            self._end(line, "stop", "")
        elif automaton is not None and automaton.closed:
            self._branch_ended(line)
        elif (
            automaton is not None
            and automaton.state == STEPS
            and tokens[-1] == tags.guideline_close
        ):
            self._fork(line)
        else:
            self._check_limits(line)

    def _check_limits(self, line: Line) -> None:
        job = line.job
        if line.budget < 1:
            self._end(line, "length", f"max_tokens={job.sampling.max_tokens} (the line's share)")
        elif line.position + 1 >= job.max_position:
            self._end(line, "length", f"max_position={job.max_position}")

    def _fork(self, line: Line) -> None:
        """Starts the branches of the block that has just closed its guideline, or refuses it."""
        tags, block = self.tags, line.automaton.stack[-1]
        num = len(block.plans)
        problem = self._refuse_block(line)
        if problem:
            if self.config.on_invalid_block == "end":
                self._end(line, "invalid_block", problem)
            else:
                line.job.refused.append(problem)
                self._check_limits(line)
            return
        heads = tags.step_headers[:num]
        spare = line.budget - sum(map(len, heads))
        share = (spare - len(tags.takeaway_header)) // (num + 1)  # the join keeps one as well
        line.budget = spare - num * share
        self._emit(line, "fork", branches=num)
        branches = []
        for number, (key, head) in enumerate(
            zip(self._fold_keys(line.key, num), heads, strict=True)
        ):
            branch = Line(line.job, line, number, key)
            branch.budget = share
            branch.automaton = Automaton(
                tags, NO_DEPTH_LIMIT, index=len(head), depth=branch.depth, in_step=True
            )
            self._start_segment(branch, list(head), line.position + 1, line.table)
            branches.append(branch)
        self._wait(line, Fork(block, branches))

    def _refuse_block(self, line: Line) -> str | None:
        """Why the block that has just closed its guideline cannot be forked, or None."""
        automaton, tags, config = line.automaton, self.tags, self.config
        block = automaton.stack[-1]
        broken = check_block(
            line.own_tokens(), block.close(automaton.index), tags, config.max_branches
        )
        if broken:
            return broken.reason
        if line.depth >= config.max_depth:
            return f"nested {line.depth + 1} deep, at most {config.max_depth}"
        num = len(block.plans)
        heads = tags.step_headers[:num]
        spare = line.budget - sum(map(len, heads)) - len(tags.takeaway_header)
        if spare < num + 1:
            return f"{line.budget} tokens are left, too few for {num} steps and a takeaway"
        if line.position + max(map(len, heads)) + 1 >= line.job.max_position:
            return f"max_position={line.job.max_position} leaves no room for a step"
        return None

    def _start_segment(self, line: Line, head: list[int], start: int, before) -> None:
        segment = Segment(start, before)
        segment.append_known(head, forced=True)
        line.items.append(segment)
        self._emit(line, "token", tokens=head, logp=None)

    def _wait(self, line: Line, fork: Fork) -> None:
        """The line gives its lane up and waits for the branches of `fork`."""
        scheduler = self.schedulers[line.job.replica]
        scheduler.leave_lane(line)
        line.items.append(fork)
        line.waiting = True
        for branch in fork.branches:
            scheduler.hold(branch.table)
        self.stats["forks"] += 1

    def _branch_ended(self, line: Line) -> None:
        """A branch is done, well or not; the last of its siblings joins or ends the parent."""
        line.done = True
        self.schedulers[line.job.replica].leave_lane(line)
        parent = line.parent
        fork = parent.items[-1]
        if not all(branch.done for branch in fork.branches):
            return
        failure = next((b.failure for b in fork.branches if b.failure), None)
        script = parent.script
        if failure:
            self._end(parent, *failure)
        elif script and parent.piece + 1 == len(script.pieces):
            self._script_ended(parent)  # the trace was cut off inside the block
        else:
            self._join(parent, fork)

    def _join(self, line: Line, fork: Fork) -> None:
        """The trunk goes on after its branches and sees them all."""
        script = line.script
        if script:
            line.piece += 1
            head = script.pieces[line.piece][: script.heads[line.piece]]
        else:
            head = list(self.tags.takeaway_header)
        before = line.table
        old = [before, *(branch.table for branch in fork.branches)]
        start = 1 + max(branch.position for branch in fork.branches)
        line.budget += sum(branch.budget for branch in fork.branches)
        if not script:
            if start + len(head) >= line.job.max_position:
                limit = line.job.max_position
                self._end(line, "length", f"max_position={limit} leaves no room for a takeaway")
                return
            line.budget -= len(head)
            line.automaton.skip_steps()
            line.automaton.read(head)
        for branch in fork.branches:
            before += branch.table[len(old[0]) :]
        fork.joined = True
        line.waiting = False
        self._emit(line, "join")
        self._start_segment(line, head, start, before)
        scheduler = self.schedulers[line.job.replica]
        scheduler.hold(line.table)
        for table in old:
            scheduler.drop(table)
        self.stats["joins"] += 1
        if script:
            self._advance_script(line)  # a trace may end inside the header
        else:
            self._check_limits(line)

    def _advance_script(self, line: Line) -> None:
        """Replay: at the end of a piece, forks as the trace did, or ends the line."""
        script = line.script
        if len(line.tail.tokens) < len(script.pieces[line.piece]):
            return
        if line.piece < len(script.forks):
            self._emit(line, "fork", branches=len(script.forks[line.piece]))
            branches = []
            for number, child in enumerate(script.forks[line.piece]):
                branch = Line(line.job, line, number, line.key)
                branch.script = child
                head = child.pieces[0][: child.heads[0]]
                self._start_segment(branch, head, line.position + 1, line.table)
                branches.append(branch)
            self._wait(line, Fork(None, branches))
            for branch in branches:
                self._advance_script(branch)  # a trace may end inside a header
        else:
            self._script_ended(line)

    def _script_ended(self, line: Line) -> None:
        if line.parent is None:
            self._finish(line.job, "stop", "replayed")
        else:
            self._branch_ended(line)

    def _end(self, line: Line, reason: str, detail: str) -> None:
        """A line ends without reaching its own end: a branch lets its siblings run on."""
        if line.parent is None:
            self._finish(line.job, reason, detail)
            return
        inside = {"stop": "branch_eos", "length": "branch_length"}.get(reason, reason)
        line.failure = (inside, ": ".join(filter(None, (f"step {line.number + 1}", detail))))
        self._branch_ended(line)
