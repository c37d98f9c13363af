"""Who runs: lanes for lines, pages for their tables, answers that wait and answers that yield.

Answers keep their order of arrival as priority. The oldest always runs; short of pages, first what
is cached of old prompts goes, then the youngest answer gives its own back and is computed again
later from its tokens.

Invariants: a page's count is the number of live segments that list it, and a segment's count is
the number of tables that list it; only a line's last segment grows, and no other table lists it.
So forks and joins count segments, whatever the length of what is shared.
"""

import heapq
import math
from collections.abc import Sequence

from npr_jax.decode.config import EngineConfig
from npr_jax.decode.lines import Job, Line, Segment
from npr_jax.decode.pages import PagePool


class Scheduler:
    """Lanes and pages of one replica, on the host; its lanes are numbered from `first_lane`."""

    def __init__(self, config: EngineConfig, first_lane: int = 0):
        self.config, self.first_lane = config, first_lane
        self.pages = PagePool(config.pages)
        self.lanes: list[Line | None] = [None] * config.lanes
        self.running: list[Job] = []
        self.stats = dict.fromkeys(("preemptions", "cached_tokens"), 0)
        self._waiting: list[tuple[int, Job]] = []  # a heap by order of arrival

    @property
    def waiting(self) -> list[Job]:
        """Answers that have not started, or were preempted."""
        return [job for _, job in self._waiting]

    @property
    def active(self) -> list[Line]:
        """The lines that have a lane, by priority."""
        return sorted(filter(None, self.lanes), key=lambda line: line.path)

    @property
    def num_jobs(self) -> int:
        """Answers that are not finished."""
        return len(self.running) + len(self._waiting)

    def add(self, job: Job) -> None:
        """Queues an answer by its order of arrival."""
        heapq.heappush(self._waiting, (job.order, job))

    def admit(self) -> None:
        """Gives free lanes to lines of running answers, then to waiting answers whose pages fit."""
        if None not in self.lanes:
            return
        self._seat([line for job in self.running for line in job.lines() if line.lane is None])
        while None in self.lanes and self._waiting:
            job = self._waiting[0][1]
            job.running = True
            found = 0
            for table in job.tables():
                self.hold(table)
                found += sum(self.adopt(segment) for segment in table)
            if self.running and self._pages_to_start(job) > self.pages.num_available:
                for table in job.tables():
                    self.drop(table)
                job.running = False
                return
            heapq.heappop(self._waiting)
            self.running.append(job)
            self.stats["cached_tokens"] += found
            self._seat(list(job.lines()))

    def _seat(self, lines: list[Line]) -> None:
        free = [i for i, line in enumerate(self.lanes) if line is None]
        for lane, line in zip(free, sorted(lines, key=lambda line: line.path), strict=False):
            self.lanes[lane] = line
            line.lane = self.first_lane + lane
            line.seat += 1
            line.flying = 0

    def _pages_to_start(self, job: Job) -> int:
        """Pages an answer takes at its first visit: its known tokens, and N steps of each line."""
        size, lines = self.config.page_size, list(job.lines())
        segments = {id(segment): segment for line in lines for segment in line.table}
        known = sum(math.ceil(len(s.tokens) / size) - len(s.pages) for s in segments.values())
        return known + len(lines) * (1 + math.ceil(self.config.steps / size))

    def reserve(self) -> list[tuple[Job, str]]:
        """Pages for every lane's known tokens, those being drawn and the steps to come; the oldest
        answer first. A lane that gets fewer waits at the end of its table.

        Returns the answers that cannot go on, with why.
        """
        exhausted: list[tuple[Job, str]] = []
        for line in self.active:
            want = min(line.left, line.flying + self.config.steps)
            while line.lane is not None:  # else its answer was preempted or given up in this loop
                lack = self._grow(line, want)
                if lack is None:
                    break
                if lack == "pages" and len(self.running) > 1:
                    self._preempt(max(self.running, key=lambda job: job.order))
                elif want > 1:
                    want //= 2
                elif line.flying:
                    break
                else:
                    exhausted.append((line.job, f"no {lack} left"))
                    self._leave_lanes(line.job)
        return exhausted

    def _grow(self, line: Line, steps: int) -> str | None:
        """Allocates what the line's table lacks; says what is short if it cannot have it."""
        size = self.config.page_size
        table, total = line.table, 0
        for segment in table:
            entries = len(segment.tokens) + (steps - 1 if segment is table[-1] else 0)
            need = math.ceil(entries / size)
            total += need
            if total > self.config.longest_table:
                return f"room in a table of {self.config.longest_table} pages"
            if need > len(segment.pages):
                pages = self.pages.allocate(need - len(segment.pages))
                if pages is None:
                    return "pages"
                segment.pages.extend(pages)
                segment.row = None
        return None

    def leave_lane(self, line: Line) -> None:
        """Takes the line off its lane and gives back pages reserved for steps it did not take."""
        self._stand_up(line)
        segment = line.tail
        if isinstance(segment, Segment):
            keep = math.ceil(len(segment.tokens) / self.config.page_size)
            self.pages.drop(segment.pages[keep:])
            del segment.pages[keep:]
            segment.row = None

    def _stand_up(self, line: Line) -> None:
        if line.lane is not None:
            self.lanes[line.lane - self.first_lane] = None
            line.lane = None

    def hold(self, table: Sequence[Segment]) -> None:
        """One more table lists these segments."""
        for segment in table:
            segment.refs += 1

    def drop(self, table: Sequence[Segment]) -> None:
        """One table less; a segment in no table loses its pages, and its keys with them."""
        for segment in table:
            segment.refs -= 1
            if segment.refs == 0:
                self.pages.drop(segment.pages)
                segment.pages, segment.computed, segment.published = [], 0, 0
                segment.row = None

    def next_page(self, segment: Segment) -> tuple[int, tuple[int, ...]] | None:
        """What identifies the next whole page of a prompt to be computed: the page before, and its
        tokens. None where the segment is no prompt, is inside a page, or ends before its end."""
        size, index = self.config.page_size, segment.published
        if segment.before or segment.start or segment.computed != index * size:
            return None
        before = segment.pages[index - 1] if index else 0
        tokens = tuple(segment.tokens[index * size : (index + 1) * size])
        if len(tokens) < size or not self.pages.leads_on(before):
            return None
        return before, tokens

    def adopt(self, segment: Segment) -> int:
        """Takes the pages of a live prompt that others have computed, instead of computing them;
        returns how many tokens they hold."""
        found = 0
        while (key := self.next_page(segment)) and (page := self.pages.find(*key)) is not None:
            self._share(segment, page)
            segment.computed += self.config.page_size
            found += self.config.page_size
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
        """`count` more tokens of a segment are in its pages; whole pages of a prompt are published,
        or replaced where another answer has computed the same in the meantime."""
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

    def stop(self, job: Job) -> None:
        """Takes an answer off its lanes and pages, or off the queue."""
        self._leave_lanes(job)
        if job.running:
            for table in list(job.tables()):
                self.drop(table)
            job.running = False
            self.running.remove(job)
        elif any(waiting is job for waiting in self.waiting):
            self._waiting = [(order, other) for order, other in self._waiting if other is not job]
            heapq.heapify(self._waiting)

    def _leave_lanes(self, job: Job) -> None:
        for line in job.lines():
            self._stand_up(line)

    def _preempt(self, job: Job) -> None:
        """The answer gives its pages back; later its tokens are computed again by prefill."""
        self.stop(job)
        job.preempted += 1
        self.stats["preemptions"] += 1
        self.add(job)
