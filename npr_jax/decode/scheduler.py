"""Who runs: lanes for sequences, pages for their tables, answers that wait and answers that yield.

Answers keep their order of arrival as priority. The oldest always runs; short of pages, first what
is cached of old prompts goes, then the youngest answer gives its own back and is computed again
later from its tokens.

An answer whose pages do not fit yet does not hold up later ones that do: of the first WINDOW that
wait those start that fit. But no answer is passed more than PATIENCE times in all, by a later one
that starts before it; from then on none behind it starts before it does.

Invariants: a page's count is the number of live segments that list it, and a segment's count is
the number of tables that list it; only a sequence's last segment grows, and no other table lists
it. So forks and joins count segments, whatever the length of what is shared.

Only here is written who has which lane and which page, who is running, and the pool's counts
(docs/architecture.md: who writes which field).
"""

import bisect
import math
import operator
from collections import abc

from npr_jax.decode.config import EngineConfig
from npr_jax.decode.pages import PagePool
from npr_jax.decode.sequence import Request, Segment, Sequence

_PRIORITY, _ARRIVAL = operator.attrgetter("path"), operator.attrgetter("id")
WINDOW = 64  # answers that wait, of which the pages are counted in a visit
PATIENCE = 16  # times that an answer can be passed


class Scheduler:
    """Lanes and pages of one replica, on the host; its lanes are numbered from `first_lane`.

    A lane is a slot of the batch: what one row of the compiled step decodes.
    """

    def __init__(self, config: EngineConfig, first_lane: int = 0):
        self.config, self.first_lane = config, first_lane
        self.pages = PagePool(config.pages)
        self.lanes: list[Sequence | None] = [None] * config.lanes
        self.running: list[Request] = []
        self.stats = dict.fromkeys(("preemptions", "cached_tokens"), 0)
        # Answers that have not started, or were preempted, by order of arrival.
        self.waiting: list[Request] = []

    @property
    def bound(self) -> list[Sequence]:
        """The sequences that have a lane, by priority."""
        return sorted(filter(None, self.lanes), key=_PRIORITY)

    def unready(self) -> list[Sequence]:
        """The sequences with a lane that lack something of their tables, and have the pages for it,
        by priority. Once it lacks nothing a sequence is ready as long as it keeps its lane."""
        found = [sequence for sequence in self.lanes if sequence and not sequence.ready]
        for sequence in found:
            sequence.ready = not any(map(sequence.lacks, sequence.table))
            if sequence.ready:
                self._need(sequence, ())
        found = [sequence for sequence in found if not sequence.ready]
        found = [x for x in found if not x.needed or any(map(x.lacks, x.needs))]
        return sorted(found, key=_PRIORITY)

    @property
    def num_requests(self) -> int:
        """Answers that are not finished."""
        return len(self.running) + len(self.waiting)

    def add(self, request: Request) -> None:
        """Queues an answer by its order of arrival."""
        bisect.insort(self.waiting, request, key=_ARRIVAL)

    def admit(self) -> None:
        """Gives free lanes to running answers, then to waiting ones whose pages fit."""
        if None not in self.lanes:
            return
        growing = [sequence for request in self.running for sequence in request.growing()]
        self._bind([sequence for sequence in growing if sequence.lane is None])
        passed: list[Request] = []
        for request in self.waiting[:WINDOW]:
            if None not in self.lanes or any(r.passed == PATIENCE for r in passed):
                return
            if not self._start(request):
                passed.append(request)
                continue
            for other in passed:
                other.passed += 1

    def _start(self, request: Request) -> bool:
        """Starts an answer, unless others run and its pages do not fit beside theirs."""
        request.running = True
        found = 0
        for table in request.tables():
            self.hold(table)
            found += sum(self.adopt(segment, table[-1]) for segment in table)
        for sequence in request.growing():
            self._find_needs(sequence)
        if self.running and self._pages_to_start(request) > self.pages.num_available:
            self._drop_all(request)
            return False
        self.waiting.remove(request)
        self.running.append(request)
        self.found_cached(request, found)
        self._bind(list(request.growing()))
        return True

    def found_cached(self, request: Request, count: int) -> None:
        """So many tokens that an answer needs were there."""
        self.stats["cached_tokens"] += count
        if not request.preempted:  # else they are its own
            request.cached += count

    def _bind(self, sequences: list[Sequence]) -> None:
        free = [i for i, sequence in enumerate(self.lanes) if sequence is None]
        sequences = sorted(sequences, key=_PRIORITY)
        for lane, sequence in zip(free, sequences, strict=False):
            self.lanes[lane] = sequence
            sequence.lane = self.first_lane + lane
            sequence.ready = False
            self.begin_epoch(sequence)

    def begin_epoch(self, sequence: Sequence) -> None:
        """What was asked for this sequence before is no longer of its lane."""
        sequence.epoch += 1
        sequence.pending = 0

    def _pages_to_start(self, request: Request) -> int:
        """Pages an answer takes at first: its known tokens, and N steps of each sequence."""
        size, sequences = self.config.page_size, list(request.growing())
        segments = {id(segment): segment for sequence in sequences for segment in sequence.needs}
        known = sum(math.ceil(len(s.tokens) / size) - len(s.pages) for s in segments.values())
        return known + len(sequences) * (1 + math.ceil(self.config.steps / size))

    def reserve(self) -> list[tuple[Request, str]]:
        """Pages for every lane's known tokens, those being drawn and the steps to come; the oldest
        answer first. A lane that gets fewer waits at the end of its table.

        Returns the answers that cannot go on, with why.
        """
        exhausted: list[tuple[Request, str]] = []
        for sequence in self.bound:
            if sequence.needed:
                self._find_needs(sequence)
            want = min(sequence.left, sequence.pending + self.config.steps)
            while sequence.lane is not None:  # else its answer was preempted or given up
                lack = self._grow(sequence, want)
                if lack is None:
                    break
                if lack == "pages" and len(self.running) > 1:
                    self._preempt(max(self.running, key=lambda request: request.id))
                elif want > 1:
                    want //= 2
                elif sequence.pending:
                    break
                else:
                    exhausted.append((sequence.request, f"no {lack} left"))
                    self._free_lanes(sequence.request)
        return exhausted

    def _grow(self, sequence: Sequence, steps: int) -> str | None:
        """Allocates what the sequence's table lacks; says what is short if it cannot have it."""
        size, tail = self.config.page_size, sequence.tail
        need = -(-(len(tail.tokens) + steps - 1) // size)
        if sequence.ready and need <= len(tail.pages):
            return None
        total, listed = 0, {*sequence.table} if sequence.needed else ()
        for segment in sequence.needs:
            pages = need if segment is tail else -(-len(segment.tokens) // size)
            total += 0 if listed and segment not in listed else pages
            if total > self.config.longest_table:
                return f"room in a table of {self.config.longest_table} pages"
            if pages > len(segment.pages):
                new = self.pages.allocate(pages - len(segment.pages))
                if new is None:
                    return "pages"
                segment.pages.extend(new)
                segment.row = None
        return None

    def release(self, sequence: Sequence) -> None:
        """Takes the sequence off its lane, and the pages reserved for steps it did not take, or of
        tokens that it has lost."""
        self._free_lane(sequence)
        self._need(sequence, ())
        segment = sequence.items[-1]
        if isinstance(segment, Segment):
            keep = math.ceil(len(segment.tokens) / self.config.page_size)
            self.pages.drop(segment.pages[keep:])
            del segment.pages[keep:]
            segment.computed = min(segment.computed, len(segment.tokens))
            segment.row = None

    def _free_lane(self, sequence: Sequence) -> None:
        if sequence.lane is not None:
            self.lanes[sequence.lane - self.first_lane] = None
            sequence.lane = None

    def take(self, sequence: Sequence) -> None:
        """Holds the table of a sequence that goes on in a new segment."""
        self.hold(sequence.table)
        self._find_needs(sequence)

    def _find_needs(self, sequence: Sequence) -> None:
        """Holds what a sequence's table is computed from, and is not in it, until it is computed:
        branches whose bodies are hidden. There need not be pages for all of it at once. First comes
        what is before the hidden part of another copy; then that gives its pages back."""
        if not self.config.rules.hide:
            return
        order, listed = sequence.order(), {*sequence.table}
        if len(order) == len(listed):
            self._need(sequence, ())
            return
        copied = False
        for count, segment in enumerate(order):
            if copied and segment not in listed and sequence.lacks(segment):
                self._need(sequence, order, count)
                return
            copied |= bool(segment.pieces) and sequence.lacks(segment) > 0
        self._need(sequence, order, len(order))

    def _need(self, sequence: Sequence, needed: tuple[Segment, ...], count: int = 0) -> None:
        """From now on the sequence needs these segments, and first so many of them."""
        self.hold(needed)
        self.drop(sequence.needed)
        sequence.needed, sequence.stage = needed, needed[:count]

    def hold(self, table: abc.Sequence[Segment]) -> None:
        """One more table lists these segments."""
        for segment in table:
            segment.refs += 1

    def drop(self, table: abc.Sequence[Segment]) -> None:
        """One table less; a segment in no table loses its pages, and its keys with them: the last
        first, as pages of cached text are found through those before."""
        for segment in reversed(table):
            segment.refs -= 1
            if segment.refs == 0:
                self.pages.drop(segment.pages)
                segment.pages, segment.computed, segment.published = [], 0, 0
                segment.row = None

    def next_page(self, segment: Segment) -> tuple[int, tuple[int, ...]] | None:
        """What identifies the next whole page of plain text to be computed: the page before, and
        its tokens. None where the segment is not plain, is inside a page, or ends before its end;
        or the text before it is not published."""
        size, index = self.config.page_size, segment.published
        if not segment.plain or segment.computed != index * size:
            return None
        tokens = tuple(segment.tokens[index * size : (index + 1) * size])
        before, number = segment, index
        if not index and segment.before:
            (before,) = segment.before
            number = before.published
            if number * size != len(before.tokens):
                return None
        last = before.pages[number - 1] if number else 0
        return (last, tokens) if len(tokens) == size and self.pages.leads_on(last) else None

    def adopt(self, segment: Segment, tail: Segment) -> int:
        """Takes the pages of a live segment that others have computed, instead of computing them,
        but not that with the last token of the `tail` of a table, whose key is written when the
        next is drawn, nor any while tokens of its prompt are to be scored; returns how many tokens
        they hold. Those of an answer that was forked are taken all, or none: nothing is written to
        a page that the other still fills."""
        size, found = self.config.page_size, 0
        if segment.to_score:
            return 0
        if segment.of is not None:
            count = len(segment.tokens)
            if segment.pages or segment.of.computed < count:
                return 0
            segment.pages = segment.of.pages[: -(-count // size)]
            for page in segment.pages:
                self.pages.hold(page)
            segment.computed, segment.row = count, None
            return count
        end = len(segment.tokens) - (segment is tail)
        while segment.computed + size <= end and (key := self.next_page(segment)):
            page = self.pages.find(*key)
            if page is None:
                break
            self._share(segment, page)
            segment.computed += size
            found += size
        return found

    def _share(self, segment: Segment, page: int) -> None:
        index = segment.published
        self.pages.hold(page)
        if index < len(segment.pages):
            self.pages.drop([segment.pages[index]])
        segment.pages[index : index + 1] = [page]
        segment.row = None
        segment.published += 1

    def computed(self, segment: Segment, count: int) -> None:
        """`count` more tokens of a segment are in its pages; whole pages of plain text are
        published, or replaced where another answer has computed the same in the meantime."""
        goal = segment.computed + count
        size = self.config.page_size
        segment.computed = segment.published * size
        while segment.computed + size <= goal and (key := self.next_page(segment)):
            page = self.pages.find(*key)
            if page is not None:
                self._share(segment, page)
            else:
                self.pages.publish(*key, segment.pages[segment.published])
                segment.published += 1
            segment.computed += size
        segment.computed = goal

    def publish(self, request: Request) -> None:
        """Lets prompts find the text of an answer before its first fork, as the next turn of a
        conversation goes on from it. What is behind a fork, nobody finds."""
        for item in request.trunk.items:
            if isinstance(item, Segment) and item.plain:
                self.computed(item, 0)

    def stop(self, request: Request) -> None:
        """Takes an answer off its lanes and pages, or off the queue."""
        self._free_lanes(request)
        if request.running:
            self._drop_all(request)
            self.running.remove(request)
        elif request in self.waiting:
            self.waiting.remove(request)

    def _drop_all(self, request: Request) -> None:
        """The answer's tables hold pages no longer."""
        for sequence in request.growing():
            self._need(sequence, ())
        for table in request.tables():
            self.drop(table)
        request.running = False

    def reset(self) -> None:
        """Takes everything off lanes, pages and queue, whatever state they are in."""
        for request in self.running:
            request.running = False
        evictions = self.pages.evictions
        self.pages = PagePool(self.config.pages)
        self.lanes = [None] * self.config.lanes
        self.pages.evictions = evictions
        self.running, self.waiting = [], []

    def _free_lanes(self, request: Request) -> None:
        for sequence in request.growing():
            self._free_lane(sequence)

    def _preempt(self, request: Request) -> None:
        """The answer gives its pages back; later its tokens are computed again by prefill."""
        self.stop(request)
        request.preempted += 1
        self.stats["preemptions"] += 1
        self.add(request)
