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

Then it tells what happened: callbacks and consumers hear of a visit when it is over, where nothing
is being changed, so whatever they do or raise, lanes and pages are in order.

Invariants: a page's count is the number of live segments that list it; only a sequence's last
segment grows, and no other table lists it; what else is in the batch changes roundings alone.

docs/architecture.md says who writes which field.
"""

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import cast

from jax.sharding import Mesh

from npr_jax.base.files import json_text
from npr_jax.decode.config import EngineConfig
from npr_jax.decode.deal import deal_answers
from npr_jax.decode.fork_join import ForkJoin
from npr_jax.decode.outputs import NOT_FINITE, Event, Outputs, Trajectory
from npr_jax.decode.regrow import Begun, regrow
from npr_jax.decode.replay import Replay, replayed_request
from npr_jax.decode.requests import RequestMaker
from npr_jax.decode.runner import PendingStep, Runner
from npr_jax.decode.sampling import SamplingParams
from npr_jax.decode.scheduler import Scheduler
from npr_jax.decode.sequence import Request
from npr_jax.decode.stats import Clock, counted_compilations, of_schedulers
from npr_jax.tree.rules import MARKS


class Engine:
    """Decodes with a model (`npr_jax.load`); see `generate`, `submit`, `stream` and `replay`.

    On a mesh (data, tensor) every replica of `data` has lanes and pages of its own, heads are split
    over `tensor`, and every process must make the same calls in the same order. Raises ValueError
    where heads do not divide so, the tags have fewer headers than `max_branches`, or a token of
    `rules` is none.
    """

    def __init__(self, model, config: EngineConfig | None = None, mesh: Mesh | None = None):
        self.model_config, self.tokenizer, self.tags = model.config, model.tokenizer, model.tags
        self.config = config = _with_marks(config or EngineConfig(), model)
        known = len(self.tags.step_headers) if self.tags is not None else 0
        if known and config.max_branches > known:
            raise ValueError(f"max_branches is {config.max_branches}, at most {known} have headers")
        self.runner = Runner(model.config, model.params, config, mesh)
        self.schedulers = [Scheduler(config, r * config.lanes) for r in range(self.runner.replicas)]
        self._maker = RequestMaker(model, config)
        self._counts = {"sampled_tokens": 0, "forks": 0, "joins": 0}
        self._requests: dict[int, Request] = {}  # whose finish was not told yet
        self._outputs = Outputs(self.tokenizer, config.rules, self._end, self._requests)
        parts = (config, self.tags, self.schedulers, self._end, self._outputs.note, self._counts)
        self._fork_join, self._replay = ForkJoin(*parts), Replay(*parts)
        self._pending: PendingStep | None = None
        self._consumed = False  # by a stream, `generate` or `replay`
        self._clock = Clock()

    def stats(self) -> dict[str, float]:
        """Figures since the start, but for the first line, which is of now.

        lanes_busy, lanes, pages_free, pages_cached, pages_held, unfinished;
        visits, decode_steps, decode_rows (of all steps), decode_tokens, sampled_tokens (of those,
        what answers kept), occupancy (decode_tokens / decode_rows), prefill_calls, prefill_tokens,
        cached_tokens (of prompts, not computed again), evictions, forks, joins, preemptions,
        compilations (of the process, since the engine was made);
        seconds (of visits), tokens_per_s, host_us_per_visit, host_share (of the time in which the
        host does not wait), and device_wait_share: the part of the time in which the device may
        have had nothing to do (an upper bound).
        """
        counts = self.runner.stats | self._counts
        figures = {"unfinished": len(self._requests)} | counts | of_schedulers(self.schedulers)
        return figures | self._clock.figures(counts)

    def write_stats(self, path: str | Path) -> None:
        """Appends `stats()` to a file as one line of JSON."""
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(json_text({"time": time.time()} | self.stats()) + "\n")

    def set_params(self, params) -> None:
        """Swaps the weights, and forgets the cached prompts, which the old ones computed.

        An engine of a model with adapters takes three kinds, and compiles nothing again for any of
        them: all weights; the adapters alone (`lora.adapters_of`), beside which the others stay;
        and merged weights, or those of another model without adapters.

        Raises:
          RuntimeError: answers are unfinished.
          ValueError: a leaf is missing, or has another shape or dtype than before (so nothing
            compiles again); then the old weights stay.
        """
        if self._requests:
            count = len(self._requests)
            raise RuntimeError(f"{count} answers are unfinished: swap weights after them")
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

        `on_event` is called with every event of these answers, at the end of the visit in which it
        happened, where nothing is being changed: it may submit and abort, which takes effect at
        once. Where it raises, its answer ends with the finish reason `error`; what is no Exception
        (Ctrl-C, SystemExit) ends all answers so, and reaches the caller of what was decoding.

        Raises ValueError, and queues nothing, where a prompt is empty, is no text or known ids, or
        could not fit the empty pool even without branches, or the sampling cannot be done.
        """
        dealt = self._maker.dealt(prompts, sampling or SamplingParams(), self._loads())
        return self._queue(dealt, on_event)

    def fork(
        self,
        request: int,
        length: int,
        tokens: Sequence[int],
        sampling: SamplingParams,
        on_event: Callable[[Event], None],
    ) -> int:
        """Queues an answer that goes on behind the first `length` tokens of an unfinished answer's
        response, with `tokens`, on the pages that the other has computed; returns its request id.

        It is an answer of its own, whose prompt ends with `tokens`: the other draws what it would
        draw. Its events go to `on_event` alone, as of `submit`. Raises ValueError where the
        other is no unfinished answer, has branches, or not more than `length` tokens; where
        `sampling` asks for branches, for more than one answer, for log-probs of the prompt, or for
        other log-probs than the other's; and as `submit` does.
        """
        other = self._requests.get(request)
        if other is None:
            raise ValueError(f"request is {request}, needed is an answer whose finish was not told")
        made = self._maker.forked(other, length, tokens, sampling)
        dealt: list[list[Request]] = [[] for _ in self.schedulers]
        dealt[other.replica].append(made)
        (number,) = self._queue(dealt, on_event, quiet=True)
        return number

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        sampling: SamplingParams | None = None,
        progress: Callable[[int, int], None] | None = None,
        on_event: Callable[[Event], None] | None = None,
        samples: Sequence[range] | None = None,
        watch: Callable[[list[int], list[bool]], list[int]] | None = None,
        begun: Sequence[Begun | None] | None = None,
        pause: Sequence[int] | None = None,
    ) -> list[Trajectory]:
        """Answers every prompt `sampling.n` times: a list in the order of the prompts, n together.
        With `samples` only those answers to each prompt that have these numbers, of 0 to n - 1.
        With `begun` each answer goes on from one that was left, if it is not None: under the same
        weights, with the same prompt, seed and sampling, it becomes what it would have been. With
        `pause` each is aborted, if it has not ended, when all of its paths have so many tokens.

        Returns when these are done; what else was submitted is decoded beside them, and goes on
        with the next call. `progress(done, total)` is called after every answer; `on_event` as in
        `submit`. `watch(lengths, finished)` is called before every visit: how many tokens the
        longest path of each answer has so far, and which are finished; it returns the indices of
        those to abort. Raises what `submit` raises, RuntimeError beside a stream, and ValueError
        for what was begun by another prompt or config.
        """
        with self._consuming(tokens=True):
            sampling = sampling or SamplingParams()
            dealt = self._maker.dealt(prompts, sampling, self._loads(), samples)
            if begun is not None:
                requests = sorted(itertools.chain(*dealt), key=lambda request: request.id)
                for i, (request, left) in enumerate(zip(requests, begun, strict=True)):
                    if left is not None:
                        regrow(request, left, self.config, self.tags, f"begun: answer {i}")
            return self._answers(dealt, progress, on_event, watch, pause)

    def stream(
        self,
        prompts: Sequence[str | Sequence[int]] = (),
        sampling: SamplingParams | None = None,
        tokens: bool = True,
    ) -> Iterator[Event]:
        """Decodes these prompts and all that was submitted, and yields events as they happen:
        every token, fork, join and finish; without `tokens`, all but the first.

        The prompts are queued by the first `next`. More may be submitted, and answers aborted,
        between two events. Closing the iterator aborts what is unfinished. Raises what `submit`
        raises, and RuntimeError while there is another stream, at once.
        """
        dealt = self._maker.dealt(prompts, sampling or SamplingParams(), self._loads())
        events = self._stream(dealt, tokens)
        next(events)  # its first yield is empty: from there on it notices when it is closed
        return cast(Iterator[Event], events)

    def step(self) -> list[Event]:
        """One visit, if anything that was submitted is unfinished: all events since the last,
        those of tokens too. Raises RuntimeError beside a stream."""
        with self._consuming(tokens=True):
            if self._requests:
                self._visit()
            events = list(self._outputs.events)
            self._outputs.events.clear()
            return events

    def abort(self, request: int | None = None) -> bool:
        """Ends one answer, or all, with the finish reason `aborted`; its lanes and pages are free
        when this returns, and no event but its finish follows. Returns whether there was anything
        to end."""
        return self._abort(list(self._requests) if request is None else [request])

    def _abort(self, requests: list[int]) -> bool:
        found = map(self._requests.get, requests)
        ending = [answer for answer in found if answer and not answer.silent]
        for answer in ending:
            answer.silent = True
            self._end(answer, "aborted", "by the caller")
        try:
            self._outputs.deliver()
        finally:
            if not self._requests:
                self._pending = None
        return bool(ending)

    def replay(self, traces: Sequence, parallel: bool = True) -> list[Trajectory]:
        """Feeds given ids instead of samples, one a step, through the same forks and joins.

        A trace is a Trajectory or a pair (token ids, prompt length), which is parsed (a cut-off one
        too). Headers are written at once, as forced; every other token of the response gets its raw
        log-prob. `parallel=False` replays one line of text. Raises RuntimeError beside a stream;
        ValueError for what is no tree of known ids, lacks a prompt or a response or cannot fit.
        """
        with self._consuming(tokens=True):
            requests = [
                replayed_request(self._maker, trace, parallel, f"trace {i}")
                for i, trace in enumerate(traces)
            ]
            ones = [1] * len(requests)
            dealt = deal_answers(ones, ones, self._loads())
            return self._answers([[requests[part.prompt] for part in some] for some in dealt])

    def warmup(self, progress: Callable[[int, int], None] | None = None) -> dict[str, float]:
        """Compiles every shape this engine can need.

        `progress(done, total)` is called after each program. Returns how many `programs` there are,
        how many of what they are made of were `compiled` now and how many read `from_cache` (see
        `npr_jax.base.compile_cache.use_cache`), and the `seconds`. Raises RuntimeError while
        answers are being decoded.
        """
        if self._pending:
            raise RuntimeError("answers are being decoded: warm up before or after them")
        with self._guarded(), counted_compilations() as figures:
            figures["programs"] = self.runner.warmup(progress)
        return figures

    def check(
        self, prompt: str | Sequence[int], sampling: SamplingParams, name: str = "the prompt"
    ) -> list[int]:
        """The ids of a prompt; raises the ValueError with which `generate` would refuse it."""
        return self._maker.check(prompt, sampling, name)

    def _loads(self) -> list[int]:
        return [scheduler.num_requests for scheduler in self.schedulers]

    def _queue(self, dealt: list[list[Request]], on_event=None, quiet=False) -> list[int]:
        """Gives each replica its requests; the ids of all, which are numbered as asked for."""
        for replica, requests in enumerate(dealt):
            for request in requests:
                request.replica, request.on_event, request.quiet = replica, on_event, quiet
        ordered = sorted(itertools.chain(*dealt), key=lambda request: request.id)
        for request in ordered:
            self._requests[request.id] = request
            self.schedulers[request.replica].add(request)
        return [request.id for request in ordered]

    @contextlib.contextmanager
    def _consuming(self, tokens: bool):
        """Around what takes events out: there is one such at a time."""
        if self._consumed:
            raise RuntimeError("this engine is already running a stream: finish or close it first")
        self._consumed, self._outputs.tokens = True, tokens
        try:
            yield
        finally:
            self._consumed = False
            self._outputs.finished.clear()

    def _stream(self, dealt, tokens: bool) -> Iterator[Event | None]:
        events = self._outputs.events
        with self._consuming(tokens):
            yield  # for `stream`
            try:
                self._queue(dealt)
                while self._requests or events:
                    while events:
                        event = events.popleft()
                        if tokens or event.kind != "token":
                            yield event
                    if self._requests:
                        self._visit()
            finally:  # an abandoned stream leaves nothing behind
                try:
                    self.abort()
                finally:
                    events.clear()

    def _answers(
        self, dealt, progress=None, on_event=None, watch=None, pause=None
    ) -> list[Trajectory]:
        """Decodes until these requests are done; events of others stay for the next stream."""
        requests = self._queue(dealt, on_event, quiet=True)
        wanted = {*requests}
        answers: dict[int, Trajectory] = {}
        finished = self._outputs.finished
        try:
            while True:
                while finished:
                    event = finished.popleft()
                    if event.request not in wanted:  # of a fork
                        continue
                    assert event.trajectory is not None
                    answers[event.request] = event.trajectory
                    if progress:
                        progress(len(answers), len(requests))
                if len(answers) == len(requests):
                    return [answers[request] for request in requests]
                if watch and self._abort(self._unwanted(watch, requests, answers)):
                    continue
                if pause and self._abort(self._long_enough(pause, requests)):
                    continue
                self._visit()
        finally:
            self._abort(requests)

    def _unwanted(self, watch, requests: list[int], answers: dict[int, Trajectory]) -> list[int]:
        finished = [request in answers for request in requests]
        lengths = [
            answers[request].stats["critical_path"] if done else self._requests[request].length
            for request, done in zip(requests, finished, strict=True)
        ]
        return [requests[i] for i in watch(lengths, finished)]

    def _long_enough(self, pause: Sequence[int], requests: list[int]) -> list[int]:
        open_ = [(number, self._requests.get(request)) for number, request in enumerate(requests)]
        return [r.id for number, r in open_ if r and r.shortest >= pause[number]]

    @contextlib.contextmanager
    def _guarded(self):
        """Around what changes lanes and pages: if it raises, all that is unfinished ends with the
        reason `error`, and the engine is as new, since nobody knows what the pages hold."""
        try:
            yield
        except BaseException as error:
            self._pending = None
            for scheduler in self.schedulers:
                scheduler.reset()
            self.runner.reset()
            self._outputs.end_all(error)
            self._outputs.deliver()
            raise

    def _visit(self) -> None:
        self._clock.begin(self._pending)
        with self._guarded():
            for scheduler in self.schedulers:
                scheduler.admit()
                for request, why in scheduler.reserve():
                    self._end(request, "pages_exhausted", why)
            bound = [sequence for scheduler in self.schedulers for sequence in scheduler.bound]
            self._clock.look(self._pending)
            self.runner.prefill(self.schedulers)
            pending = self.runner.decode(bound)
            self._clock.asked(self._pending)
            self._advance()
            self._pending = pending
        self._outputs.deliver()
        self._clock.end()

    def _advance(self) -> None:
        """Waits for the pending step, and lets its sequences grow by what was drawn."""
        pending, self._pending = self._pending, None
        if not pending:
            return
        self._clock.wait()
        drawn = pending.read(self.runner.stats)
        self._clock.go_on()
        for sequence, most, frozen, finite, tokens, figures in drawn:
            sequence.pending -= most
            if not tokens:
                continue
            if not finite:  # then neither is what else the lane drew
                self._end(sequence.request, "error", NOT_FINITE)
                continue
            sequence.tail.computed += len(tokens)
            if sequence.request.scores is not None and not sequence.request.echoed:
                sequence.request.echoed = True
                self._outputs.note(sequence.request.trunk, "prompt")
            growth = self._replay if sequence.request.tree else self._fork_join
            growth.advance(sequence, tokens, figures)
            if frozen and sequence.lane is not None:  # the tag was no event: the lane goes on
                self.schedulers[sequence.request.replica].begin_epoch(sequence)

    def _end(self, request: Request, reason: str, detail: str) -> None:
        """An answer gives its lanes and pages back; its finish is told with the next delivery."""
        if request.end is None:
            scheduler = self.schedulers[request.replica]
            if reason != "error":
                scheduler.publish(request)
            scheduler.stop(request)
            self._fork_join.tell_undecided(request.trunk)
            self._outputs.note(request.trunk, "finish")
        request.end = reason, detail


def _with_marks(config: EngineConfig, model) -> EngineConfig:
    """The config, in which what its rules know tokens by are the ids of these."""
    if model.tags is None:  # nothing forks
        return config
    rules, vocab = model.tags.resolved(config.rules), model.config.vocab_size
    for name in MARKS:
        token = getattr(rules, name)
        if isinstance(token, int) and token >= vocab:
            raise ValueError(
                f"engine.rules.{name} is {token}, needed is the id of a token, below {vocab}"
            )
    return config if rules == config.rules else dataclasses.replace(config, rules=rules)
