"""Who runs: lanes for lines, pages for their tables, answers that wait and answers that yield.

Answers keep their order of arrival as priority. The oldest always runs; short of pages, the
youngest gives its own back and is computed again later from its tokens.

Invariants: a page's reference count is the number of tables that list it; only a line's last
segment grows, and no other table lists it.
"""

import heapq
import math
from collections.abc import Sequence

from npr_jax.decode.config import EngineConfig
from npr_jax.decode.lines import Job, Line, Segment
from npr_jax.decode.pages import PagePool


class Scheduler:
    """Lanes and pages of one engine, on the host."""

    def __init__(self, config: EngineConfig):
        self.config = config
        self.pages = PagePool(config.pages)
        self.lanes: list[Line | None] = [None] * config.lanes
        self.running: list[Job] = []
        self.preemptions = 0
        self._waiting: list[tuple[int, Job]] = []  # a heap by order of arrival

    @property
    def waiting(self) -> list[Job]:
        """Answers that have not started, or were preempted."""
        return [job for _, job in self._waiting]

    @property
    def active(self) -> list[Line]:
        """The lines that have a lane, by priority."""
        return sorted(filter(None, self.lanes), key=lambda line: line.path)

    def add(self, job: Job) -> None:
        """Queues an answer by its order of arrival."""
        heapq.heappush(self._waiting, (job.order, job))

    def clear(self) -> None:
        """Drops everything, running or waiting."""
        self._waiting.clear()
        for job in list(self.running):
            self.stop(job)

    def admit(self) -> None:
        """Gives free lanes to lines of running answers, then to waiting answers whose pages fit."""
        ready = [line for job in self.running for line in job.lines() if line.lane is None]
        self._seat(ready)
        while None in self.lanes and self._waiting:
            job = self._waiting[0][1]
            if self.running and self._pages_to_start(job) > self.pages.num_free:
                return
            heapq.heappop(self._waiting)
            job.running = True
            self.running.append(job)
            for table in job.tables():
                self.hold(table)
            self._seat(list(job.lines()))

    def _seat(self, lines: list[Line]) -> None:
        free = [i for i, line in enumerate(self.lanes) if line is None]
        for lane, line in zip(free, sorted(lines, key=lambda line: line.path), strict=False):
            line.lane, self.lanes[lane] = lane, line

    def _pages_to_start(self, job: Job) -> int:
        """Pages an answer takes at its first visit: its known tokens, and N steps of each line."""
        size, lines = self.config.page_size, list(job.lines())
        segments = {id(segment): segment for line in lines for segment in line.table}
        known = sum(math.ceil(len(s.tokens) / size) - len(s.pages) for s in segments.values())
        return known + len(lines) * (1 + math.ceil(self.config.steps / size))

    def reserve(self) -> tuple[dict[Line, int], list[tuple[Job, str]]]:
        """Pages for every lane's known tokens and its steps to come; the oldest answer first.

        Returns how many tokens each line may draw, and the answers that cannot go on, with why.
        """
        steps: dict[Line, int] = {}
        exhausted: list[tuple[Job, str]] = []
        for line in self.active:
            if line.lane is None:
                continue  # its answer was preempted or given up in this loop
            want = line.allowed(self.config.steps)
            while line.lane is not None:
                lack = self._grow(line, want)
                if lack is None:
                    steps[line] = want
                    break
                youngest = max(self.running, key=lambda job: job.order)
                if lack == "pages" and len(self.running) > 1:
                    self._preempt(youngest)
                elif want > 1:
                    want //= 2
                else:
                    exhausted.append((line.job, f"no {lack} left"))
                    self._leave_lanes(line.job)
        return {line: n for line, n in steps.items() if line.lane is not None}, exhausted

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
                pages = self.pages.allocate(need - len(segment.pages), segment.refs)
                if pages is None:
                    return "pages"
                segment.pages.extend(pages)
        return None

    def leave_lane(self, line: Line) -> None:
        """Takes the line off its lane and gives back pages reserved for steps it did not take."""
        if line.lane is not None:
            self.lanes[line.lane] = None
            line.lane = None
        segment = line.tail
        if isinstance(segment, Segment):
            keep = math.ceil(len(segment.tokens) / self.config.page_size)
            self.pages.drop(segment.pages[keep:])
            del segment.pages[keep:]

    def hold(self, table: Sequence[Segment]) -> None:
        """One more table lists these segments."""
        for segment in table:
            segment.refs += 1
            self.pages.add(segment.pages)

    def drop(self, table: Sequence[Segment]) -> None:
        """One table less; a segment in no table loses its pages, and its keys with them."""
        for segment in table:
            segment.refs -= 1
            self.pages.drop(segment.pages)
            if segment.refs == 0:
                segment.pages, segment.computed = [], 0

    def stop(self, job: Job) -> None:
        """Takes an answer off its lanes and pages."""
        self._leave_lanes(job)
        if job.running:
            for table in list(job.tables()):
                self.drop(table)
            job.running = False
            self.running.remove(job)

    def _leave_lanes(self, job: Job) -> None:
        for line in job.lines():
            if line.lane is not None:
                self.lanes[line.lane] = None
                line.lane = None

    def _preempt(self, job: Job) -> None:
        """The answer gives its pages back; later its tokens are computed again by prefill."""
        self.stop(job)
        job.preempted += 1
        self.preemptions += 1
        self.add(job)
