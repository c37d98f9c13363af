"""The engine: many answers at once, forked and joined over one paged KV pool.

One visit of the host, repeated until every answer is finished:

    admit     waiting answers and lines without a lane get lanes, oldest answer first
    reserve   pages for the tokens known and for N steps; short of pages, the youngest answer waits
    prefill   the known tokens whose keys are missing: prompts, headers, a line's last tag
    decode    N steps of all lanes in one compiled call; a lane freezes at a tag that is an event
    advance   the automaton reads what was drawn: fork, join, or end a line

Invariants: a page's reference count is the number of tables that list it; only a line's last
segment grows, and no other table lists it; nothing depends on what else is in the batch.
"""

import math
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

from npr_jax.decode.config import EngineConfig
from npr_jax.decode.grow import NO_DEPTH_LIMIT, Grower
from npr_jax.decode.lines import Job, Line, Segment, flatten, script_of
from npr_jax.decode.runner import Runner, ready
from npr_jax.decode.sampling import SamplingParams
from npr_jax.decode.scheduler import Scheduler
from npr_jax.decode.trajectory import Trajectory
from npr_jax.tree import Automaton, layout, parse


class Engine:
    """Decodes with a model (`npr_jax.load`); see `generate`, `stream` and `replay`."""

    def __init__(self, model, config: EngineConfig | None = None):
        self.config = config = config or EngineConfig()
        self.model_config, self.tokenizer, self.tags = model.config, model.tokenizer, model.tags
        if self.tags is not None and self.tags.step_headers:
            known = len(self.tags.step_headers)
            if config.max_branches > known:
                raise ValueError(
                    f"max_branches is {config.max_branches}, at most {known} have headers"
                )
        self.runner = Runner(model.config, model.params, config)
        self.scheduler = Scheduler(config)
        self._grower = Grower(config, self.tags, self.scheduler, self.runner.fold, self._finish)
        self._finished: list[tuple[Job, Trajectory]] = []
        self._orders = self._visits = 0
        self._abort = False

    @property
    def stats(self) -> dict[str, int]:
        """Counters since the start: visits, decode_steps, sampled_tokens, prefill_calls,
        prefill_tokens, forks, joins, preemptions."""
        counts = {"visits": self._visits, "preemptions": self.scheduler.preemptions}
        return counts | self.runner.stats | self._grower.stats

    def set_params(self, params) -> None:
        """Swaps the weights (same shapes and dtypes, so nothing compiles)."""
        self.runner.params = params

    def abort(self) -> None:
        """Ends everything in flight at the next visit, with finish reason `aborted`."""
        self._abort = True

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        sampling: SamplingParams | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Trajectory]:
        """Answers every prompt `sampling.n` times: a list in the order of the prompts, n together.

        `progress(done, total)` is called after every answer.

        Raises:
          ValueError: a prompt is empty, or could not fit the empty pool even without branches.
        """
        sampling = sampling or SamplingParams()
        total = len(prompts) * sampling.n
        answers: list[Trajectory | None] = [None] * total
        for done, (index, answer) in enumerate(self.stream(prompts, sampling), 1):
            answers[index] = answer
            if progress:
                progress(done, total)
        return answers

    def stream(
        self, prompts: Sequence[str | Sequence[int]], sampling: SamplingParams | None = None
    ) -> Iterator[tuple[int, Trajectory]]:
        """Yields (prompt index * n + sample index, answer) in the order in which they finish."""
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
        jobs = []
        for prompt, seed in zip(ids, seeds, strict=True):
            shared = Segment(0, ())
            shared.append_known(prompt[:-1], forced=False)
            keys = self.runner.fold(
                np.asarray(jax.random.key_data(jax.random.key(seed))), sampling.n
            )
            jobs += [self._job(prompt, shared, sampling, key) for key in keys]
        yield from self._run(jobs)

    def replay(self, traces: Sequence, parallel: bool = True) -> list[Trajectory]:
        """Feeds given ids instead of samples, one a step, through the same forks and joins.

        A trace is a Trajectory or a pair (token ids, prompt length), which is parsed (a cut-off one
        too). Header tokens are written at once, as forced; every other token of the response gets
        its raw log-prob. `parallel=False` replays the same ids as one line of text.
        """
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
        answers = dict(self._run(jobs))
        return [answers[i] for i in range(len(jobs))]

    def warmup(self, sampling: SamplingParams | None = None) -> int:
        """Compiles every shape this engine can need for such sampling; returns how many."""
        return self.runner.warmup(sampling)

    def check(
        self, prompt: str | Sequence[int], sampling: SamplingParams, name: str = "the prompt"
    ) -> list[int]:
        """The ids of a prompt; raises the ValueError with which `generate` would refuse it."""
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ValueError(f"{name} is text, but the model has no tokenizer")
            prompt = self.tokenizer.encode(prompt)
        ids = [int(token) for token in prompt]
        if not ids:
            raise ValueError(f"{name} is empty, needed is at least one token")
        vocab = self.model_config.vocab_size
        if not 0 <= min(ids) <= max(ids) < vocab:
            raise ValueError(f"{name} has ids outside the vocabulary of {vocab}")
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
        if sampling.parallel and self.tags is not None:
            trunk.automaton = Automaton(self.tags, NO_DEPTH_LIMIT, index=len(prompt))
        return job

    def _run(self, jobs: list[Job]) -> Iterator[tuple[int, Trajectory]]:
        scheduler = self.scheduler
        if scheduler.running or scheduler.waiting:
            raise RuntimeError("this engine is already running a stream: finish or close it first")
        first = jobs[0].order if jobs else 0
        self._abort = False
        for job in jobs:
            scheduler.add(job)
        try:
            while scheduler.running or scheduler.waiting:
                self._visit()
                while self._finished:
                    job, answer = self._finished.pop(0)
                    yield job.order - first, answer
        finally:  # an abandoned stream leaves nothing behind
            self._finished.clear()
            scheduler.clear()

    def _visit(self) -> None:
        scheduler = self.scheduler
        self._visits += 1
        if self._abort:
            for job in [*scheduler.running, *scheduler.waiting]:
                self._finish(job, "aborted", "by the caller")
            scheduler.clear()
            return
        scheduler.admit()
        steps, exhausted = scheduler.reserve()
        for job, why in exhausted:
            self._finish(job, "pages_exhausted", why)
        self.runner.prefill(scheduler.active)
        steps = {line: count for line, count in steps.items() if ready(line)}
        if not steps:
            return
        drawn = self.runner.decode(steps)
        for line in steps:
            lane, count = line.lane, drawn.count[line.lane]
            figures = (drawn.tokens, drawn.logp, drawn.logp_sampled, drawn.margin)
            self._grower.advance(line, *(figure[lane, :count].tolist() for figure in figures))

    def _finish(self, job: Job, reason: str, detail: str) -> None:
        """Makes the trajectory, and lets go of lanes and pages."""
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
            text = self.tokenizer.decode(response, clean_up_tokenization_spaces=False)
        answer = Trajectory(
            token_ids=tokens,
            prompt_len=job.prompt_len,
            layout=tree,
            logp=column("logp", np.float32),
            logp_sampled=column("logp_sampled", np.float32),
            margin=column("margin", np.float32),
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
        self.scheduler.stop(job)
        self._finished.append((job, answer))
