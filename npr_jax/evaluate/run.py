"""`npr-jax eval`: decodes benchmarks into files of traces, and sums these up.

    questions x samples --engine--> OUT/traces/RUN.jsonl, OUT/timing.jsonl --> OUT/results.json

A run is a benchmark decoded one way: RUN is the benchmark's name, or NAME.sequential for the
baseline. Every answer has a seed of its own, of the setting's seed, benchmark, problem and sample,
so that it does not depend on what else is decoded, nor on where an evaluation was cut off.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar

from npr_jax.base.compile_cache import DEFAULT_CACHE, use_cache
from npr_jax.base.config import dump_config
from npr_jax.base.fields import Checked, Count, CountOrZero, Dtype
from npr_jax.base.files import cut_half_line, json_text
from npr_jax.base.progress import Progress
from npr_jax.base.seeds import seed_of
from npr_jax.data.benchmarks import Question, Source, read_benchmark, split
from npr_jax.data.prompts import INSTRUCTION, prompt_ids
from npr_jax.decode import Engine, EngineConfig, SamplingParams, Trajectory
from npr_jax.evaluate.generate import check_model, compile_all
from npr_jax.evaluate.judge import Figures, judge
from npr_jax.evaluate.probing import (
    Probed,
    Prober,
    ProbingConfig,
    append_probes,
    read_probes,
    write_pools,
)
from npr_jax.evaluate.results import TIMING, Run, begin, sum_up
from npr_jax.evaluate.traces import make_trace, read_traces, write_traces
from npr_jax.evaluate.verdicts import StepHead
from npr_jax.model.pretrained import load
from npr_jax.runs.directory import alone_in, claim

# What may change from call to call: every answer that is there stays what it would be.
_FREE = ("benchmarks", "samples", "data", "baseline", "compilation_cache")


@dataclasses.dataclass(frozen=True)
class EvalConfig(Checked):
    """What to evaluate, and how.

    Attributes:
      model: directory, hub id or preset.
      benchmarks: names of the registry, or NAME=FILE (npr_jax/data/benchmarks.py).
      output: the directory that gets everything.
      samples (answers): to each problem.
      data: a directory of local files, which come before the hub; or null.
      baseline: decode the same problems sequentially too, for the speed-ups.
      instruction: what is asked of a model with a chat template, after the problem.
      dtype: of weights and cache.
      engine: what decodes the answers.
      sampling: how they are sampled.
      probe (tokens): after how many, again and again, a sequential answer is asked what it would
        say now; pools/NAME.json records it for `npr-jax scout`. 0 is never.
      probing: how, and what is decided of it.
      step_words: two words that the model has learnt to say behind a branch, for right and wrong
        (`step_words` of Beta): traces then have the branches' scores, and votes are weighed by
        them, too; null: none.
      compilation_cache: where compiled programs are kept for the next run; null keeps none.
    """

    command: ClassVar[str] = "eval"

    model: str
    benchmarks: tuple[str, ...]
    output: str
    samples: Count = 8
    data: str | None = None
    baseline: bool = False
    instruction: str = INSTRUCTION
    dtype: Dtype = "float32"
    engine: EngineConfig = dataclasses.field(default_factory=EngineConfig)
    sampling: SamplingParams = dataclasses.field(default_factory=SamplingParams)
    probe: CountOrZero = 0
    probing: ProbingConfig = dataclasses.field(default_factory=ProbingConfig)
    step_words: tuple[str, ...] | None = None
    compilation_cache: str | None = str(DEFAULT_CACHE)

    def __post_init__(self):
        super().__post_init__()
        names = [split(text)[0] for text in self.benchmarks]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"benchmarks is {list(self.benchmarks)}, needed are different ones")
        if self.sampling.n != 1:
            raise ValueError(f"sampling.n is {self.sampling.n}, needed is 1: set samples instead")
        if not isinstance(self.sampling.seed, int):
            raise ValueError(f"sampling.seed is {self.sampling.seed}, needed is one integer")
        if self.baseline and not self.sampling.parallel:
            raise ValueError(
                "baseline is true and sampling.parallel false: the baseline decodes sequentially, "
                "so there would be nothing to compare it with"
            )
        self.probing.check(self.probe, self.sampling)
        if self.step_words is not None and (self.baseline or not self.sampling.parallel):
            raise ValueError(
                f"step_words is given, with baseline {self.baseline} and sampling.parallel "
                f"{self.sampling.parallel}, needed are false and true: a sequential answer has no "
                "branches to score"
            )


def evaluate(config: EvalConfig, tell: Callable[[str], None] = lambda line: None) -> dict:
    """Decodes what is missing, and returns what it writes to results.json (docs/benchmarks.md).

    Raises:
      ValueError: the output belongs to another setting or to other problems, a row of a benchmark
        is bad, a prompt does not fit, the model cannot be decoded so, or another command is writing
        to the output.
      FileNotFoundError: a benchmark or the model is not to be had.
    """
    sources = [read_benchmark(text, config.data) for text in config.benchmarks]
    with alone_in(config.output):
        return _evaluate(config, sources, tell)


def _evaluate(config: EvalConfig, sources: list[Source], tell: Callable[[str], None]) -> dict:
    output = claim(config.output, dump_config(config), _FREE)
    if config.compilation_cache:
        use_cache(config.compilation_cache)
    model = load(config.model, dtype=config.dtype)
    check_model(model, config.model, config.sampling, config.instruction, tell)
    # Answers are scored one by one, as they finish.
    head = None if config.step_words is None else StepHead(model, config.step_words, rows=1)
    engine = Engine(model, config.engine)
    results = begin(output, config)
    groups = [_runs(engine, source, config) for source in sources]
    found = [[_resume(output, run) for run in runs] for runs in groups]
    ready = False
    for source, runs, answers in zip(sources, groups, found, strict=True):
        for run, done in zip(runs, answers, strict=True):
            todo = _missing(run, done, config.samples)
            if config.probe:
                whole = {record["id"] for record in read_probes(output, run.name)}
                if any(id not in whole for id, _ in done):  # cut off within a question
                    _forget(output, run, done, whole)
                    todo = _missing(run, done, config.samples)
            if todo and not ready:
                _get_ready(engine, run, config, tell)
                ready = True
            if todo:
                _decode(engine, run, todo, done, config, output, head)
        probes = None
        if config.probe:
            what = runs[0].name, source.questions, config.probe, config.probing
            probes = write_pools(output, *what)
        sum_up(results, output, runs, answers, config.samples, probes)
    return results


def _forget(output: Path, run: Run, done: dict[tuple[str, int], Figures], whole: set[str]) -> None:
    """Leaves the answers to `whole` questions alone: those to one are probed together."""
    path = _path(output, run)
    write_traces(path, [trace for trace in read_traces(path) if trace.id in whole])
    for name in [name for name in done if name[0] not in whole]:
        del done[name]


def _get_ready(engine: Engine, run: Run, config: EvalConfig, tell: Callable[[str], None]) -> None:
    """Compiles, and decodes a little, so that no clock sees what happens once."""
    compile_all(engine, tell)
    limit = min(config.sampling.max_tokens, 2 * engine.config.steps)
    prompt = next(iter(run.prompts.values()))
    engine.generate([prompt], dataclasses.replace(config.sampling, max_tokens=limit))


def _runs(engine: Engine, source: Source, config: EvalConfig) -> list[Run]:
    prompts = {}
    for question in source.questions:
        prompt = prompt_ids(engine.tokenizer, question.problem, config.instruction)
        name = f"the prompt of {source.name}/{question.id}"
        prompts[question.id] = engine.check(prompt, config.sampling, name)
    runs = [Run(source.name, source, config.sampling.parallel, prompts)]
    if config.baseline:
        runs.append(Run(f"{source.name}.sequential", source, False, prompts))
    return runs


def _path(output: Path, run: Run) -> Path:
    return output / "traces" / f"{run.name}.jsonl"


def _resume(output: Path, run: Run) -> dict[tuple[str, int], Figures]:
    """The figures of the answers that are there; a last one that was not written whole is cut."""
    path = _path(output, run)
    if not path.exists():
        return {}
    cut_half_line(path)
    questions, done = {question.id: question for question in run.source.questions}, {}
    for number, trace in enumerate(read_traces(path), 1):
        question = questions.get(trace.id)
        if question is None or question[1:] != (trace.problem, trace.reference):
            raise ValueError(
                f"{path}:{number} answers problem {trace.id!r}, which {run.source.origin} does "
                "not have, or not so: set another output"
            )
        done[trace.id, trace.sample] = trace.figures
    return done


def _missing(run: Run, done: dict, samples: int) -> list[tuple[Question, int]]:
    asked = ((question, i) for question in run.source.questions for i in range(samples))
    return [(question, i) for question, i in asked if (question.id, i) not in done]


def _decode(
    engine: Engine,
    run: Run,
    todo: Sequence[tuple[Question, int]],
    done: dict[tuple[str, int], Figures],
    config: EvalConfig,
    output: Path,
    head: StepHead | None = None,
) -> None:
    """Decodes `todo`, appends each answer to the run's file as it finishes, and adds its
    figures to `done`.

    The clock is the engine's, which stands still while answers are judged. Its reading goes to
    timing.jsonl with every answer, so that a run which is cut off and gone on with adds up.
    """
    name = run.source.name
    seed = config.sampling.seed
    assert isinstance(seed, int)  # or there would be no such config
    seeds = tuple(seed_of(seed, name, question.id, i) for question, i in todo)
    sampling = dataclasses.replace(config.sampling, parallel=run.parallel, seed=seeds)
    engine.drop_prefix_cache()  # or the second run of a benchmark would find prompts computed
    over: list[list[Probed]] = []  # questions whose answers have ended, and their probes
    prober = Prober(engine, config.probing, config.probe, over.append) if config.probe else None
    prompts = [run.prompts[question.id] for question, _ in todo]
    requests = engine.submit(prompts, sampling, prober and prober.hear)
    of_request = dict(zip(requests, todo, strict=True))
    if prober:
        prober.follow(requests, [(question.id, i) for question, i in todo])
    questions = {question.id: question for question, _ in todo}
    path, timing = _path(output, run), output / TIMING
    path.parent.mkdir(exist_ok=True)
    if timing.exists():
        cut_half_line(timing)
    with (
        path.open("a", encoding="utf-8") as file,
        timing.open("a", encoding="utf-8") as times,
        Progress(run.name, len(todo) + len(done), "answer", len(done)) as progress,
    ):
        since = begun = engine.stats()["seconds"]
        tokens, right = 0, sum(figures.right for figures in done.values())

        def write(question: Question, i: int, trajectory: Trajectory) -> None:
            nonlocal since, tokens, right
            (answer,) = judge(engine, [trajectory], [question.answer])
            about = {"benchmark": name, "id": question.id, "sample": i}
            scored = [(trajectory.token_ids, trajectory.layout)]
            scores = head.scores(scored)[0] if head else None
            trace = make_trace(answer, engine.tokenizer, question, **about, scores=scores)
            file.write(trace.dumps() + "\n")
            file.flush()
            figures = done[question.id, i] = trace.figures if head else answer.figures
            now = engine.stats()["seconds"]
            record = {"run": run.name, "seconds": now - since, "tokens": figures.tokens}
            times.write(json_text(record) + "\n")
            times.flush()
            since, tokens, right = now, tokens + figures.tokens, right + figures.right
            progress.advance(1, {"right": right / len(done), "tokens/s": tokens / (now - begun)})

        def write_probed() -> None:
            while over:
                group = over.pop()
                for answer in group:
                    assert answer.trajectory is not None  # it has ended
                    write(questions[answer.question], answer.sample, answer.trajectory)
                append_probes(output, run.name, group, config.probe)

        for event in engine.stream(tokens=False):
            if event.kind == "finish" and not prober:
                assert event.trajectory is not None  # it has finished
                write(*of_request[event.request], event.trajectory)
            write_probed()
        write_probed()
