"""The engine: many answers at once, forked and joined over one paged KV pool.

One visit of the host, repeated until every answer is finished:

    admit     waiting answers and sequences without a lane get lanes, oldest answer first
    reserve   pages for the tokens known, those pending and N steps more; short of pages, cached
              prompts go, then the youngest answer waits
    prefill   the known tokens whose keys are missing: prompts, headers, a sequence's last tag
    decode    asks for N steps of all lanes in one compiled call; a lane freezes at a tag that is an
              event
    advance   reads what the call *before* has drawn, while the device works on this one: the
              automaton reads the tokens; fork, join, or end a sequence

Invariants: a page's count is the number of live segments that list it; only a sequence's last
segment grows, and no other table lists it; nothing depends on what else is in the batch.

Who may write which field of a request, a sequence or a segment is said in sequence.py; `Engine`
itself writes its unfinished requests, its events, and the pending step.
"""

import dataclasses
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from jax.sharding import Mesh

from npr_jax.base.compile_cache import compilations
from npr_jax.base.files import json_text
from npr_jax.decode.config import EngineConfig
from npr_jax.decode.fork_join import ForkJoin
from npr_jax.decode.outputs import Event, TextPieces, Trajectory, make_trajectory
from npr_jax.decode.replay import Replay, replayed_request
from npr_jax.decode.requests import RequestMaker, penalised
from npr_jax.decode.runner import PendingStep, Runner
from npr_jax.decode.sampling import SamplingParams
from npr_jax.decode.scheduler import Scheduler
from npr_jax.decode.sequence import Request
from npr_jax.decode.stats import Clock


class Engine:
    """Decodes with a model (`npr_jax.load`); see `generate`, `submit`, `stream` and `replay`.

    On a mesh with axes (data, tensor) every replica of `data` has lanes and pages of its own, heads
    are split over `tensor`, and every process must make the same calls in the same order.
    """

    def __init__(self, model, config: EngineConfig | None = None, mesh: Mesh | None = None):
        self.config = config = config or EngineConfig()
        self.model_config, self.tokenizer, self.tags = model.config, model.tokenizer, model.tags
        if self.tags is not None and self.tags.step_headers:
            known = len(self.tags.step_headers)
            if config.max_branches > known:
                raise ValueError(
                    f"max_branches is {config.max_branches}, at most {known} have headers"
                )
        self.runner = Runner(model.config, model.params, config, mesh)
        self.schedulers = [Scheduler(config, r * config.lanes) for r in range(self.runner.replicas)]
        self._maker = RequestMaker(model, config, self.runner.fold, self.runner.replicas)
        self._counts = {"sampled_tokens": 0, "forks": 0, "joins": 0}
        parts = (config, self.tags, self.schedulers, self.runner.fold)
        self._fork_join = ForkJoin(*parts, self._finish, self._emit, self._counts)
        self._replay = Replay(*parts, self._finish, self._emit, self._counts)
        self._requests: dict[int, Request] = {}  # unfinished
        self._events: deque[Event] = deque()
        self._pending: PendingStep | None = None
        self._running = self._tokens_wanted = False
        self._clock = Clock()

    def stats(self) -> dict[str, float]:
        """Figures since the start, but for the first line, which is of now.

        lanes_busy, lanes, pages_free, pages_cached, pages_held, unfinished;
        visits, decode_steps, sampled_tokens, prefill_calls, prefill_tokens, cached_tokens (of
        prompts, not computed again), evictions, forks, joins, preemptions, compilations (of the
        process, since the engine was made);
        seconds (of visits), tokens_per_s, host_us_per_visit, host_share (of the time in which the
        host does not wait), and device_wait_share: the part of the time in which the device may
        have had nothing to do (an upper bound).
        """
        figures = {
            "lanes_busy": sum(len(s.bound) for s in self.schedulers),
            "lanes": len(self.schedulers) * self.config.lanes,
        }
        for name in ("free", "cached", "held"):
            figures[f"pages_{name}"] = sum(getattr(s.pages, f"num_{name}") for s in self.schedulers)
        figures["unfinished"] = len(self._requests)
        figures |= self.runner.stats | self._counts
        for name in ("preemptions", "cached_tokens"):
            figures[name] = sum(s.stats[name] for s in self.schedulers)
        figures["evictions"] = sum(s.pages.evictions for s in self.schedulers)
        return figures | self._clock.figures(figures["sampled_tokens"])

    def write_stats(self, path: str | Path) -> None:
        """Appends `stats()` to a file as one line of JSON."""
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(json_text({"time": time.time()} | self.stats()) + "\n")

    def set_params(self, params) -> None:
        """Swaps the weights (same shapes and dtypes, so nothing compiles), and forgets the cached
        prompts, which the old ones computed.

        Raises RuntimeError while answers are unfinished.
        """
        if self._requests:
            raise RuntimeError(
                f"{len(self._requests)} answers are unfinished: swap weights after them"
            )
        self.runner.set_params(params)
        self.drop_prefix_cache()

    def drop_prefix_cache(self) -> None:
        """Forgets the cached prompts."""
        for scheduler in self.schedulers:
            scheduler.pages.forget()

    def submit(
        self,
        prompts: Sequence[str | Sequence[int]],
        sampling: SamplingParams | None = None,
        on_event: Callable[[Event], None] | None = None,
    ) -> list[int]:
        """Queues `sampling.n` answers to every prompt, also while others are decoded (`stream`
        and `generate` decode them); returns their request ids, n of a prompt together.

        `on_event` is called with every event of these answers; where it raises, the answer ends
        with the finish reason `error`.

        Raises:
          ValueError: a prompt is empty, has an id that does not exist, or could not fit the empty
            pool even without branches; then nothing is queued.
        """
        groups = self._maker.groups(prompts, sampling or SamplingParams())
        return [request for group in groups for request in self._queue(group, on_event)]

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        sampling: SamplingParams | None = None,
        progress: Callable[[int, int], None] | None = None,
        on_event: Callable[[Event], None] | None = None,
    ) -> list[Trajectory]:
        """Answers every prompt `sampling.n` times: a list in the order of the prompts, n together.

        `progress(done, total)` is called after every answer; `on_event` as in `submit`, whose
        errors this raises too.
        """
        self._refuse_second_stream()
        requests = self.submit(prompts, sampling, on_event)
        return self._answers(requests, progress)

    def stream(
        self,
        prompts: Sequence[str | Sequence[int]] = (),
        sampling: SamplingParams | None = None,
        tokens: bool = True,
    ) -> Iterator[Event]:
        """Decodes these prompts and all that was submitted, and yields events as they happen:
        every token, fork, join and finish; without `tokens`, all but the first.

        More may be submitted, and answers aborted, between two events. Closing the iterator
        aborts what is unfinished. Raises what `submit` raises, at once.
        """
        self._refuse_second_stream()
        if len(prompts):  # else the model may be one without tags, of which parallel is refused
            self.submit(prompts, sampling)
        return self._stream(tokens)

    def abort(self, request: int | None = None) -> bool:
        """Ends one answer, or all, with the finish reason `aborted`; its lanes and pages are free
        when this returns. Returns whether there was anything to end."""
        all_of_them = list(self._requests.values())
        found = all_of_them if request is None else [self._requests.get(request)]
        found = [request for request in found if request]
        for request in found:
            self._finish(request, "aborted", "by the caller")
        return bool(found)

    def replay(self, traces: Sequence, parallel: bool = True) -> list[Trajectory]:
        """Feeds given ids instead of samples, one a step, through the same forks and joins.

        A trace is a Trajectory or a pair (token ids, prompt length), which is parsed (a cut-off one
        too). Header tokens are written at once, as forced; every other token of the response gets
        its raw log-prob. `parallel=False` replays the same ids as one line of text.
        """
        self._refuse_second_stream()
        requests = [
            replayed_request(self._maker, trace, parallel, f"trace {i}")
            for i, trace in enumerate(traces)
        ]
        return self._answers([i for request in requests for i in self._queue([request], None)])

    def warmup(
        self,
        sampling: SamplingParams | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> dict[str, float]:
        """Compiles every shape this engine can need for such sampling.

        `progress(done, total)` is called after each program. Returns how many `programs` there are,
        how many of what they are made of were `compiled` now and how many read `from_cache` (see
        `npr_jax.base.compile_cache.use_cache`), and the `seconds`.
        """
        begun, before = time.perf_counter(), compilations()
        programs = self.runner.warmup(sampling is not None and penalised(sampling), progress)
        now = compilations()
        return {
            "programs": programs,
            "compiled": now.compiled - before.compiled,
            "from_cache": now.from_cache - before.from_cache,
            "seconds": time.perf_counter() - begun,
        }

    def check(
        self, prompt: str | Sequence[int], sampling: SamplingParams, name: str = "the prompt"
    ) -> list[int]:
        """The ids of a prompt; raises the ValueError with which `generate` would refuse it."""
        return self._maker.check(prompt, sampling, name)

    def _queue(self, group: list[Request], on_event) -> list[int]:
        """The requests of one prompt go to the replica with the fewest unfinished ones."""
        replica = min(range(len(self.schedulers)), key=lambda r: self.schedulers[r].num_requests)
        for request in group:
            request.replica, request.on_event = replica, on_event
            self._requests[request.id] = request
            self.schedulers[replica].add(request)
        return [request.id for request in group]

    def _refuse_second_stream(self) -> None:
        if self._running:
            raise RuntimeError("this engine is already running a stream: finish or close it first")

    def _answers(self, requests: list[int], progress=None) -> list[Trajectory]:
        answers: dict[int, Trajectory] = {}
        wanted, others = set(requests), []
        for event in self._stream(tokens=False):
            if event.request not in wanted:
                others.append(event)
            elif event.kind == "finish":
                answers[event.request] = event.trajectory
                if progress:
                    progress(len(answers), len(requests))
        self._events.extend(others)  # what was submitted before is for the next stream
        return [answers[request] for request in requests]

    def _stream(self, tokens: bool) -> Iterator[Event]:
        self._running, self._tokens_wanted = True, tokens
        try:
            while self._requests or self._events:
                while self._events:
                    yield self._events.popleft()
                if self._requests:
                    self._visit()
        finally:  # an abandoned stream leaves nothing behind
            self.abort()
            self._pending = None
            self._events.clear()
            self._running = False

    def _visit(self) -> None:
        self._clock.begin(self._pending)
        self._admit()
        self._reserve()
        bound = self._bound()
        if self._pending and any(sequence.request.penalised for sequence in bound):
            self._advance()  # a penalty needs every token of the sequence
            bound = [sequence for sequence in bound if sequence.lane is not None]
        self._clock.look(self._pending)
        self.runner.prefill(self.schedulers)
        pending = self.runner.decode(bound)
        self._clock.asked(self._pending)
        self._advance()
        self._pending = pending
        self._clock.end()

    def _admit(self) -> None:
        for scheduler in self.schedulers:
            scheduler.admit()

    def _reserve(self) -> None:
        for scheduler in self.schedulers:
            for request, why in scheduler.reserve():
                self._finish(request, "pages_exhausted", why)

    def _bound(self) -> list:
        """The sequences that have a lane."""
        return [sequence for scheduler in self.schedulers for sequence in scheduler.bound]

    def _advance(self) -> None:
        """Waits for the pending step, and lets its sequences grow by what was drawn."""
        pending, self._pending = self._pending, None
        if not pending:
            return
        self._clock.wait()
        output = pending.read()
        self._clock.go_on()
        first = self.runner.stats["decode_steps"]
        self.runner.stats["decode_steps"] += int(output.steps.max())
        figures = (output.tokens, output.logp, output.logp_sampled, output.margin)
        columns = [figure.tolist() for figure in figures]
        for sequence, epoch, most in pending.sequences:
            lane, request = sequence.lane, sequence.request
            if lane is None or sequence.epoch != epoch:
                continue  # it has ended, or will draw the same again
            sequence.pending -= most
            count = int(output.count[lane])
            if not count:
                continue
            sequence.tail.computed += count
            drawn = (column[lane][:count] for column in columns)
            growth = self._replay if request.tree else self._fork_join
            growth.advance(sequence, *drawn, list(range(first, first + count)))
            if output.frozen[lane] and sequence.lane is not None:
                sequence.epoch += 1  # the tag was no event: the lane goes on
                sequence.pending = 0
            if request.failure and request.id in self._requests:
                self._finish(request, "error", "")

    def _emit(self, sequence, kind: str, tokens=(), logp=None, **what) -> None:
        """Makes events of what happens to a sequence, if somebody listens."""
        request = sequence.request
        wanted = self._tokens_wanted if kind == "token" else self._running
        if not (request.on_event or wanted):
            return
        try:
            if kind != "token":
                self._tell(request, Event(kind, request.id, sequence.branch, **what))
            for i, token in enumerate(tokens):
                if self.tokenizer is not None and sequence.text is None:
                    sequence.text = TextPieces(self.tokenizer)
                event = Event(
                    kind,
                    request.id,
                    sequence.branch,
                    token_id=token,
                    logp=0.0 if logp is None else logp[i],
                    forced=logp is None,
                    text=sequence.text and sequence.text.add(token),
                )
                self._tell(request, event)
        except Exception as error:  # of the caller's or the tokenizer's: only this answer ends
            request.failure = request.failure or f"{type(error).__name__}: {error}"

    def _tell(self, request: Request, event: Event) -> None:
        if self._tokens_wanted or event.kind != "token":
            self._events.append(event)
        if request.on_event and not request.failure:
            request.on_event(event)

    def _finish(self, request: Request, reason: str, detail: str) -> None:
        """Makes the trajectory, and lets go of lanes and pages."""
        if request.failure:
            reason, detail = "error", request.failure
        answer = make_trajectory(request, reason, detail, self.tokenizer)
        self.schedulers[request.replica].stop(request)
        del self._requests[request.id]
        event = Event("finish", request.id, trajectory=answer)
        self._events.append(event)
        if request.on_event and not request.failure:
            try:
                request.on_event(event)
            except Exception as error:
                failed = f"{type(error).__name__}: {error}"
                answer = dataclasses.replace(answer, finish_reason="error", detail=failed)
                self._events[-1] = dataclasses.replace(event, trajectory=answer)
