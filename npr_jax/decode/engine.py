"""The engine: many answers at once, forked and joined over one paged KV pool.

One visit of the host, repeated until every answer is finished:

    admit     waiting answers and lines without a lane get lanes, oldest answer first
    reserve   pages for the tokens known, those in flight and N steps more; short of pages, cached
              prompts go, then the youngest answer waits
    prefill   the known tokens whose keys are missing: prompts, headers, a line's last tag
    decode    asks for N steps of all lanes in one compiled call; a lane freezes at a tag that is an
              event
    advance   reads what the call *before* has drawn, while the device works on this one: the
              automaton reads the tokens; fork, join, or end a line

Invariants: a page's count is the number of live segments that list it; only a line's last segment
grows, and no other table lists it; nothing depends on what else is in the batch.
"""

import dataclasses
import json
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from numbers import Integral
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from npr_jax.base.compile_cache import compilations
from npr_jax.decode.config import EngineConfig
from npr_jax.decode.events import Event, TextPieces
from npr_jax.decode.grow import NO_DEPTH_LIMIT, Grower
from npr_jax.decode.lines import Job, Line, Segment, flatten, script_of
from npr_jax.decode.runner import Flight, Runner, penalised
from npr_jax.decode.sampling import SamplingParams
from npr_jax.decode.scheduler import Scheduler
from npr_jax.decode.trajectory import Trajectory
from npr_jax.tree import Automaton, layout, parse


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
        self._grower = Grower(
            config, self.tags, self.schedulers, self.runner.fold, self._finish, self._emit
        )
        self._jobs: dict[int, Job] = {}  # unfinished
        self._events: deque[Event] = deque()
        self._flight: Flight | None = None
        self._running = self._tokens_wanted = False
        self._orders = 0
        self._clock = _Clock()

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
            "lanes_busy": sum(len(s.active) for s in self.schedulers),
            "lanes": len(self.schedulers) * self.config.lanes,
        }
        for name in ("free", "cached", "held"):
            figures[f"pages_{name}"] = sum(getattr(s.pages, f"num_{name}") for s in self.schedulers)
        figures["unfinished"] = len(self._jobs)
        figures |= self.runner.stats | self._grower.stats
        for name in ("preemptions", "cached_tokens"):
            figures[name] = sum(s.stats[name] for s in self.schedulers)
        figures["evictions"] = sum(s.pages.evictions for s in self.schedulers)
        return figures | self._clock.figures(figures["sampled_tokens"])

    def write_stats(self, path: str | Path) -> None:
        """Appends `stats()` to a file as one line of JSON."""
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"time": time.time()} | self.stats()) + "\n")

    def set_params(self, params) -> None:
        """Swaps the weights (same shapes and dtypes, so nothing compiles), and forgets the cached
        prompts, which the old ones computed.

        Raises RuntimeError while answers are unfinished.
        """
        if self._jobs:
            raise RuntimeError(f"{len(self._jobs)} answers are unfinished: swap weights after them")
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
        sampling = sampling or SamplingParams()
        seeds = sampling.seed
        if isinstance(seeds, int):
            seeds = [seeds] * len(prompts)
        if len(seeds) != len(prompts):
            raise ValueError(f"seed has {len(seeds)} entries, needed is one, or {len(prompts)}")
        if sampling.parallel and (self.tags is None or self.tags.decode is None):
            raise ValueError(
                "parallel decoding needs a tokenizer with the eight tags; this model has none "
                "(parallel=False decodes it as plain text)"
            )
        ids = [self.check(prompt, sampling, f"prompt {i}") for i, prompt in enumerate(prompts)]
        # Fewer prompts than replicas: the answers to one are split among some of them.
        split = math.ceil(len(self.schedulers) / max(1, len(prompts)))
        size = math.ceil(sampling.n / split)
        requests = []
        for prompt, seed in zip(ids, seeds, strict=True):
            keys = self.runner.fold(
                np.asarray(jax.random.key_data(jax.random.key(seed))), sampling.n
            )
            for first in range(0, sampling.n, size):
                shared = Segment(0, ())
                shared.append_known(prompt[:-1], forced=False)
                group = [
                    self._job(prompt, shared, sampling, key) for key in keys[first : first + size]
                ]
                requests += self._queue(group, on_event)
        return requests

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
        jobs = list(self._jobs.values()) if request is None else [self._jobs.get(request)]
        jobs = [job for job in jobs if job]
        for job in jobs:
            self._finish(job, "aborted", "by the caller")
        return bool(jobs)

    def replay(self, traces: Sequence, parallel: bool = True) -> list[Trajectory]:
        """Feeds given ids instead of samples, one a step, through the same forks and joins.

        A trace is a Trajectory or a pair (token ids, prompt length), which is parsed (a cut-off one
        too). Header tokens are written at once, as forced; every other token of the response gets
        its raw log-prob. `parallel=False` replays the same ids as one line of text.
        """
        self._refuse_second_stream()
        jobs = []
        for i, trace in enumerate(traces):
            if isinstance(trace, Trajectory):
                ids, tree = trace.token_ids, trace.layout
            else:
                ids, prompt_len = trace
                if self.tags is None:
                    raise ValueError(
                        f"trace {i} is a pair of ids and prompt length, and the model has no "
                        "tokenizer whose tags could parse it: give a Trajectory with its layout"
                    )
                tree = parse(ids, prompt_len, self.tags, allow_open=True)
            ids = np.asarray(ids).tolist()
            if tree.prompt_len < 1 or tree.total_len < 1:
                raise ValueError(
                    f"trace {i} has {tree.prompt_len} prompt tokens and a response of "
                    f"{tree.total_len}, needed is at least one of each"
                )
            if not parallel:
                tree = layout(len(ids), prompt_len=tree.prompt_len)
            sampling = SamplingParams(
                temperature=0, max_tokens=max(1, tree.total_len), parallel=parallel
            )
            self._refuse(tree.prompt_len, sampling, f"trace {i}")
            shared = Segment(0, ())
            shared.append_known(ids[: tree.prompt_len - 1], forced=False)
            job = self._job(ids[: tree.prompt_len], shared, sampling, np.zeros(2, np.uint32))
            job.tree = tree
            job.trunk.script = script_of(ids, tree)
            jobs.append(job)
        return self._answers([request for job in jobs for request in self._queue([job], None)])

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
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ValueError(f"{name} is text, but the model has no tokenizer")
            prompt = self.tokenizer.encode(prompt)
        if isinstance(prompt, bytes) or not isinstance(prompt, Sequence | np.ndarray):
            raise ValueError(f"{name} is {type(prompt).__name__}, needed is text or token ids")
        if not len(prompt):
            raise ValueError(f"{name} is empty, needed is at least one token")
        vocab = self.model_config.vocab_size
        wrong = next((x for x in prompt if not _is_id(x, vocab)), None)
        if wrong is not None:
            raise ValueError(
                f"{name} holds {wrong!r}, needed are token ids from 0 to {vocab - 1} (outside the "
                f"vocabulary of {vocab})"
            )
        ids = [int(token) for token in prompt]
        for token in sampling.stop_token_ids:
            if token >= vocab:
                raise ValueError(f"stop_token_ids holds {token}, needed are ids below {vocab}")
        self._refuse(len(ids), sampling, name)
        return ids

    def _refuse(self, prompt_len: int, sampling: SamplingParams, name: str) -> None:
        """Refuses what could never fit an empty pool without any branch."""
        size = self.config.page_size
        limit = self._max_position(sampling)
        if prompt_len >= limit:
            raise ValueError(
                f"{name} has {prompt_len} tokens, but max_position is {limit}: shorten it or raise "
                "max_position"
            )
        tokens = min(prompt_len + sampling.max_tokens, limit)
        need = math.ceil((prompt_len - 1) / size) + math.ceil((tokens - prompt_len + 1) / size)
        have = self.config.longest_table
        if need > have:
            raise ValueError(
                f"{name} needs {need} pages of {size} for {prompt_len} prompt tokens and "
                f"max_tokens={sampling.max_tokens}; a line can have {have} (EngineConfig pages, "
                "table_pages)"
            )

    def _max_position(self, sampling: SamplingParams) -> int:
        limit = self.model_config.max_position_embeddings
        return limit if sampling.max_position is None else min(limit, sampling.max_position)

    def _job(self, prompt: list[int], shared: Segment, sampling: SamplingParams, key) -> Job:
        """An answer to be: the prompt without its last token is one segment, shared by n samples;
        the trunk's own segment starts with the last, from which its first token is drawn."""
        job = Job(self._orders, sampling, len(prompt), self._max_position(sampling))
        self._orders += 1
        eos = (*self.model_config.eos_token_ids, *sampling.stop_token_ids)
        job.ends = frozenset(eos)
        job.stops = eos
        if sampling.parallel and self.tags is not None:
            job.stops = (*eos, self.tags.guideline_close, self.tags.step_close)
        if len(job.stops) > self.config.max_stops:
            raise ValueError(
                f"{len(job.stops)} ids end or stop a line, max_stops is {self.config.max_stops}"
            )
        trunk = job.trunk = Line(job, None, 0, key)
        own = Segment(len(prompt) - 1, (shared,) if shared.tokens else ())
        own.append_known(prompt[-1:], forced=False)
        trunk.items = [shared, own]
        trunk.budget = sampling.max_tokens
        job.penalised = penalised(sampling)
        if sampling.parallel and self.tags is not None:
            trunk.automaton = Automaton(self.tags, NO_DEPTH_LIMIT, index=len(prompt))
        return job

    def _queue(self, group: list[Job], on_event) -> list[int]:
        """The jobs of one prompt go to the replica with the fewest unfinished ones."""
        replica = min(range(len(self.schedulers)), key=lambda r: self.schedulers[r].num_jobs)
        for job in group:
            job.replica, job.on_event = replica, on_event
            self._jobs[job.order] = job
            self.schedulers[replica].add(job)
        return [job.order for job in group]

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
            while self._jobs or self._events:
                while self._events:
                    yield self._events.popleft()
                if self._jobs:
                    self._visit()
        finally:  # an abandoned stream leaves nothing behind
            self.abort()
            self._flight = None
            self._events.clear()
            self._running = False

    def _visit(self) -> None:
        clock = self._clock
        clock.begin(self._flight)
        for scheduler in self.schedulers:
            scheduler.admit()
            for job, why in scheduler.reserve():
                self._finish(job, "pages_exhausted", why)
        lines = [line for scheduler in self.schedulers for line in scheduler.active]
        if self._flight and any(line.job.penalised for line in lines):
            self._land()  # a penalty needs every token of the line
            lines = [line for line in lines if line.lane is not None]
        clock.look(self._flight)
        self.runner.prefill(self.schedulers)
        flight = self.runner.decode(lines)
        clock.asked(self._flight)
        if self._flight:
            self._land()
        self._flight = flight
        clock.end()

    def _land(self) -> None:
        """Waits for the steps in flight, and lets their lines grow by what was drawn."""
        flight, self._flight = self._flight, None
        self._clock.wait()
        drawn = flight.read()
        self._clock.go_on()
        first = self.runner.stats["decode_steps"]
        self.runner.stats["decode_steps"] += int(drawn.steps.max())
        figures = (drawn.tokens, drawn.logp, drawn.logp_sampled, drawn.margin)
        columns = [figure.tolist() for figure in figures]
        for line, seat, most in flight.lines:
            lane = line.lane
            if lane is None or line.seat != seat:
                continue  # it has ended, or will draw the same again
            line.flying -= most
            count = int(drawn.count[lane])
            if not count:
                continue
            line.tail.computed += count
            drawn_by = (column[lane][:count] for column in columns)
            self._grower.advance(line, *drawn_by, list(range(first, first + count)))
            if drawn.frozen[lane] and line.lane is not None:
                line.seat += 1  # the tag was no event: the lane goes on
                line.flying = 0
            if line.job.failure and line.job.order in self._jobs:
                self._finish(line.job, "error", "")

    def _emit(self, line: Line, kind: str, tokens=(), logp=None, **what) -> None:
        """Makes events of what the grower reports, if somebody listens."""
        job = line.job
        if not (job.on_event or (self._tokens_wanted if kind == "token" else self._running)):
            return
        try:
            if kind != "token":
                self._tell(job, Event(kind, job.order, line.branch, **what))
            for i, token in enumerate(tokens):
                if self.tokenizer is not None and line.text is None:
                    line.text = TextPieces(self.tokenizer)
                event = Event(
                    kind,
                    job.order,
                    line.branch,
                    token_id=token,
                    logp=0.0 if logp is None else logp[i],
                    forced=logp is None,
                    text=line.text and line.text.add(token),
                )
                self._tell(job, event)
        except Exception as error:  # of the caller's or the tokenizer's: only this answer ends
            job.failure = job.failure or f"{type(error).__name__}: {error}"

    def _tell(self, job: Job, event: Event) -> None:
        if self._tokens_wanted or event.kind != "token":
            self._events.append(event)
        if job.on_event and not job.failure:
            job.on_event(event)

    def _finish(self, job: Job, reason: str, detail: str) -> None:
        """Makes the trajectory, and lets go of lanes and pages."""
        if job.failure:
            reason, detail = "error", job.failure
        segments, blocks = flatten(job.trunk, self.tags)

        def column(name: str, dtype) -> np.ndarray:
            return np.array([x for s in segments for x in getattr(s, name)], dtype)

        tokens, forced = column("tokens", np.int32), column("forced", bool)
        tree = job.tree
        if tree is None or len(tree) != len(tokens):
            tree = layout(len(tokens), blocks, job.prompt_len, forced)
        positions = np.concatenate([s.start + np.arange(len(s.tokens)) for s in segments])
        assert (positions == tree.positions).all(), "the engine left the layout's positions"
        response = tokens[job.prompt_len :].tolist()
        if response and response[-1] in job.ends:
            response = response[:-1]
        text = None
        if self.tokenizer is not None:
            try:
                text = self.tokenizer.decode(response, clean_up_tokenization_spaces=False)
            except Exception as error:  # only this answer fails
                reason, detail = "error", f"{type(error).__name__}: {error}"
        answer = Trajectory(
            token_ids=tokens,
            prompt_len=job.prompt_len,
            layout=tree,
            logp=column("logp", np.float32),
            logp_sampled=column("logp_sampled", np.float32),
            margin=column("margin", np.float32),
            step=column("step", np.int32),
            forced=forced,
            text=text,
            finish_reason=reason,
            detail=detail,
            stats={
                "tokens": tree.total_len,
                "critical_path": tree.critical_path_len,
                "branches": tree.num_branches,
                "width": tree.width,
                "depth": tree.depth,
                "sampled": int((~forced[job.prompt_len :]).sum()),
                "preempted": job.preempted,
                "refused_blocks": list(job.refused),
            },
        )
        self.schedulers[job.replica].stop(job)
        del self._jobs[job.order]
        event = Event("finish", job.order, trajectory=answer)
        self._events.append(event)
        if job.on_event and not job.failure:
            try:
                job.on_event(event)
            except Exception as error:
                failed = f"{type(error).__name__}: {error}"
                answer = dataclasses.replace(answer, finish_reason="error", detail=failed)
                self._events[-1] = dataclasses.replace(event, trajectory=answer)


def _is_id(token, vocab: int) -> bool:
    return isinstance(token, Integral) and not isinstance(token, bool) and 0 <= token < vocab


class _Clock:
    """Where the host's time goes, and for how long the device may have had nothing to do."""

    def __init__(self):
        self.visits = self.seconds = self.waited = self.idle = 0
        self._compiled = compilations().compiled
        self._begun = self._wait_begun = self._busy = 0.0

    def begin(self, flight: Flight | None) -> None:
        """A visit begins."""
        now = time.perf_counter()
        if not flight or self._begun == 0.0:
            self._busy = now
        self._begun = now
        self.look(flight)

    def look(self, flight: Flight | None) -> None:
        """Notes whether the device is still busy with this flight."""
        if flight and not flight.landed():
            self._busy = time.perf_counter()

    def asked(self, flight: Flight | None) -> None:
        """New work is on its way: if the flight before has landed, the device has waited."""
        now = time.perf_counter()
        if not flight or flight.landed():
            self.idle += now - self._busy
        self._busy = now

    def wait(self) -> None:
        """The host waits for the device."""
        self._wait_begun = time.perf_counter()

    def go_on(self) -> None:
        """The device has answered."""
        now = time.perf_counter()
        self.waited += now - self._wait_begun
        self._busy = now  # the next flight was asked for before

    def end(self) -> None:
        """A visit ends."""
        self.visits += 1
        self.seconds += time.perf_counter() - self._begun

    def figures(self, tokens: int) -> dict[str, float]:
        """The part of `Engine.stats` that is about time."""
        seconds = self.seconds or 1.0
        return {
            "visits": self.visits,
            "compilations": compilations().compiled - self._compiled,
            "seconds": self.seconds,
            "tokens_per_s": tokens / seconds,
            "host_us_per_visit": 1e6 * (self.seconds - self.waited) / max(1, self.visits),
            "host_share": (self.seconds - self.waited) / seconds,
            "device_wait_share": self.idle / seconds,
        }
