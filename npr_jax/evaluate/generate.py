"""Batch inference: a JSONL file of prompts to a JSONL file of answers, resumable line by line.

An input line is an object with "problem" (put into the model's chat template with the instruction)
or "prompt" (text that is continued as it is). Answers are appended as they finish.
"""

import contextlib
import dataclasses
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator
from io import FileIO
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from npr_jax.answers import extract
from npr_jax.base.compile_cache import DEFAULT_CACHE, use_cache
from npr_jax.base.fields import Checked, CountOrZero, Dtype
from npr_jax.base.files import alone, cut_half_line, reading, writing
from npr_jax.base.progress import Progress
from npr_jax.base.seeds import seed_of
from npr_jax.data.prompts import INSTRUCTION, prompt_ids
from npr_jax.data.sources import BadRow, parse_json, read_rows, short
from npr_jax.decode import Engine, EngineConfig, SamplingParams, Trajectory
from npr_jax.evaluate.probing import Probed, Prober, ProbingConfig
from npr_jax.model.pretrained import Model, load

_NEEDED = 'JSONL of "problem" or "prompt" (--input)'
_BEGINNING = b'{"line": '  # of every line that is written here


@dataclasses.dataclass(frozen=True)
class GenerateConfig(Checked):
    """How to decode.

    Attributes:
      dtype: of weights and cache.
      instruction: what is asked of a model with a chat template, after the problem.
      engine: what decodes the answers.
      sampling: how they are sampled; line k has its own seed, a digest of `sampling.seed` and k.
      compilation_cache: where compiled programs are kept for the next run; null keeps none.
      stats: a file of its own, to which the engine's statistics are added every ten seconds, as
        JSONL.
      probe (tokens): after how many, again and again, a sequential answer is asked what it would
        say now; its line has the `probes`. 0 is never.
      probing: how, and what is decided of it among the answers to a line.
    """

    command: ClassVar[str] = "generate"

    dtype: Dtype = "float32"
    instruction: str = INSTRUCTION
    engine: EngineConfig = dataclasses.field(default_factory=EngineConfig)
    sampling: SamplingParams = dataclasses.field(default_factory=SamplingParams)
    compilation_cache: str | None = str(DEFAULT_CACHE)
    stats: str | None = None
    probe: CountOrZero = 0
    probing: ProbingConfig = dataclasses.field(default_factory=ProbingConfig)

    def __post_init__(self):
        super().__post_init__()
        self.probing.check(self.probe, self.sampling)
        if not isinstance(self.sampling.seed, int):
            raise ValueError(f"sampling.seed is {self.sampling.seed}, needed is one integer")


class Request(NamedTuple):
    """A line of the input that can be answered."""

    line: int
    row: dict
    prompt: list[int]


def generate(
    model: str,
    source: Path,
    target: Path,
    config: GenerateConfig,
    warn: Callable[[str], None],
    tell: Callable[[str], None] = lambda line: None,
) -> tuple[int, int]:
    """Answers every line of `source` into `target`: returns (answers written, bad lines).

    `target` gets an object per answer: line (from 1), sample, input (the line's object), text,
    prediction (content of the last `\\boxed{}` or null), finish_reason, detail, figures, and with
    `config.probe` what its probes said (`probes`) and cost (`probe_tokens`). Lines
    that it already has answers to are skipped. A line that is no request, that the engine would
    refuse, or of which an answer ends with the reason `error`, is reported through `warn` by its
    number; such an answer is left out, and so asked for again by the next run. `tell` hears how
    compilation goes.

    Raises ValueError if no line of `source` can be answered, if `target` is anything but answers to
    these lines (it is left as it is), or if another process writes it; OSError where a file cannot
    be read or written.
    """
    for name, path in (("--input", source), ("--output", target)):
        if config.stats and Path(config.stats).resolve() == path.resolve():
            raise ValueError(f"stats is {config.stats}, the {name}: set another file for stats")
    rows, faults = read_lines(source)
    if not rows:
        raise _nothing(source, faults, warn)
    if config.stats:
        with writing(config.stats, "set another file for stats"):
            Path(config.stats).open("ab").close()
    with adding(target) as file:
        done = resume(target, rows)
        if config.compilation_cache:
            use_cache(config.compilation_cache)
        loaded = load(model, dtype=config.dtype)
        check_model(loaded, model, config.sampling, config.instruction, tell)
        engine = Engine(loaded, config.engine)
        requests = []
        for line, row in rows.items():
            try:
                requests.append(_request(line, row, engine, config))
            except ValueError as error:
                faults[line] = str(error)
        if not requests:
            raise _nothing(source, faults, warn)
        for line in sorted(faults):
            warn(f"{source}:{line}: {faults[line]}")
        written, failed = _answer(engine, requests, done, config, file, target, tell)
        for line in sorted(failed):
            warn(f"{source}:{line}: {failed[line]}")
        return written, len(faults) + len(failed)


def _answer(
    engine: Engine,
    requests: list[Request],
    done: set[tuple[int, int]],
    config: GenerateConfig,
    file: FileIO,
    target: Path,
    tell: Callable[[str], None],
) -> tuple[int, dict[int, str]]:
    """Answers what is not done, line by line into `file`; the number of answers written, and the
    lines of which one failed, with why."""
    asked = [(request, i) for request in requests for i in range(config.sampling.n)]
    before = sum((request.line, i) in done for request, i in asked)
    todo = [r for r in requests if any((r.line, i) not in done for i in range(config.sampling.n))]
    if todo:
        compile_all(engine, tell)
    first = config.sampling.seed
    assert isinstance(first, int)  # or there would be no such config
    sampling = dataclasses.replace(
        config.sampling, seed=tuple(seed_of(first, request.line) for request in todo)
    )
    written, told, failed = 0, time.monotonic(), {}
    with Progress("generate", len(asked), "answer", before) as progress:
        over: list[list[Probed]] = []  # lines whose answers have ended, and their probes
        prober = Prober(engine, config.probing, config.probe, over.append) if config.probe else None
        prompts = [request.prompt for request in todo]
        ids = engine.submit(prompts, sampling, prober and prober.hear)
        samples = [(request, i) for request in todo for i in range(config.sampling.n)]
        of_id = dict(zip(ids, samples, strict=True))
        if prober:
            prober.follow(ids, [(str(request.line), i) for request, i in samples])
        of_line = {str(request.line): request for request in todo}

        def write(request: Request, sample: int, answer: Trajectory, more: dict) -> None:
            nonlocal written, told
            if (request.line, sample) in done:
                return
            if answer.finish_reason == "error":
                failed[request.line] = f"answer {sample} failed: {answer.detail}"
                return
            line = json.dumps(_record(request, sample, answer) | more, ensure_ascii=False)
            with writing(target, "make room there, and run the same command again: it goes on"):
                write_all(file, line.encode() + b"\n")
            written += 1
            stats = engine.stats()
            progress.advance(1, {"tokens/s": stats["tokens_per_s"]})
            if config.stats and time.monotonic() - told > 10:
                engine.write_stats(config.stats)
                told = time.monotonic()

        def write_probed() -> None:
            for answer in itertools.chain(*over):
                assert answer.trajectory is not None  # it has ended
                more = {"probes": answer.said, "probe_tokens": answer.tokens}
                write(of_line[answer.question], answer.sample, answer.trajectory, more)
            over.clear()

        for event in engine.stream(tokens=False):
            if event.kind == "finish" and not prober:
                assert event.trajectory is not None  # it has finished
                write(*of_id[event.request], event.trajectory, {})
            write_probed()
        write_probed()
    if config.stats:
        engine.write_stats(config.stats)
    return written, failed


def check_model(
    model: Model,
    name: str,
    sampling: SamplingParams,
    instruction: str,
    tell: Callable[[str], None],
) -> None:
    """Raises ValueError, before anything is compiled, if the model cannot answer problems with such
    sampling; tells if an instruction is given that will not be used."""
    if model.tokenizer is None:
        raise ValueError(f"{name} has no tokenizer, and texts need one")
    if model.tags is None and sampling.parallel:
        raise ValueError(
            f"the tokenizer of {name} has no tags, so it can be decoded sequentially only: "
            "--set sampling.parallel=false"
        )
    if instruction != INSTRUCTION and not model.tokenizer.chat_template:
        tell("the tokenizer has no chat template: problems are asked bare, without instruction")


def compile_all(engine: Engine, tell: Callable[[str], None]) -> None:
    """Compiles every shape before the first answer, and tells what that took."""

    def show(done: int, total: int) -> None:
        tell(f"compile: {done}/{total} programs")

    found = engine.warmup(show)
    if found["compiled"]:
        what = f"{found['compiled']} compiled, {found['from_cache']} from the cache"
    else:
        what = "nothing had to be compiled"
    tell(f"compile: {what}, {found['seconds']:.1f} s")


def read_lines(source: Path) -> tuple[dict[int, dict], dict[int, str]]:
    """The lines of `source` by their number: the objects that ask for something, and for each of
    the others what is wrong with it. Raises as `data.sources.read_rows` does."""
    rows, faults = {}, {}
    for number, raw, _ in read_rows(source, "line", _NEEDED):
        try:
            rows[number] = _asking(parse_json(raw))
        except BadRow as error:
            faults[number] = str(error)
    return rows, faults


@contextlib.contextmanager
def adding(target: Path) -> Iterator[FileIO]:
    """The file that answers are added to, by one process at a time. What was made here and got no
    answer does not stay."""
    if target.exists():
        with reading(target, "a file to add answers to (--output)"):
            pass
    made = not target.exists()
    with writing(target, "give another --output"):
        target.parent.mkdir(parents=True, exist_ok=True)
        file = target.open("ab", buffering=0)  # nothing is left to be written when it is closed
    with file, alone(target):
        try:
            yield file
        finally:
            if made and not target.stat().st_size:
                target.unlink()


def resume(target: Path, rows: dict[int, dict]) -> set[tuple[int, int]]:
    """The (line, sample) that `target` holds; cuts off a last line that was not written whole.

    Raises ValueError for a file that holds anything but answers to `rows`, before it is changed.
    """
    done = set()
    # As bytes: a text may hold other line ends.
    *lines, half = target.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            same = rows.get(record["line"]) == record["input"]
            done.add((record["line"], record["sample"]))
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise _foreign(target, number) from error
        if not same:
            raise ValueError(
                f"{target}:{number} answers another line {record['line']} than the input has: "
                "give another output file"
            )
    if half[: len(_BEGINNING)] != _BEGINNING[: len(half)]:
        raise _foreign(target, len(lines) + 1)
    cut_half_line(target)
    return done


def _foreign(target: Path, number: int) -> ValueError:
    return ValueError(
        f"{target}:{number} is no answer of `npr-jax generate`, and answers are added to what the "
        "file has: give another --output"
    )


def _nothing(source: Path, faults: dict[int, str], warn: Callable[[str], None]) -> ValueError:
    """The error of an input without a line to answer; what is wrong with each goes to `warn`."""
    for line, fault in sorted(faults.items()):
        warn(f"{source}:{line}: {fault}")
    seen = f"no line of {source} can be answered" if faults else f"{source} is empty"
    return ValueError(f"{seen}, needed is {_NEEDED}")


def write_all(file: FileIO, data: bytes) -> None:
    """Writes `data` to an unbuffered file."""
    while data:  # a disk that is almost full takes a part
        data = data[file.write(data) :]


def _asking(row: Any) -> dict:
    """A row that asks for something; raises BadRow."""
    if not isinstance(row, dict) or ("problem" in row) == ("prompt" in row):
        raise BadRow("wrong type", 'needed is an object with either "problem" or "prompt"')
    name = "problem" if "problem" in row else "prompt"
    if not isinstance(row[name], str) or not row[name].strip():
        raise BadRow("wrong type", f'"{name}" is {short(row[name])}, needed is a text')
    if not _finite(row):
        raise BadRow("wrong type", "it holds a number beyond 1.8e308, which could not be written")
    return row


def _finite(value: Any) -> bool:
    if isinstance(value, dict | list):
        return all(map(_finite, value.values() if isinstance(value, dict) else value))
    return not isinstance(value, float) or math.isfinite(value)


def _request(line: int, row: dict, engine: Engine, config: GenerateConfig) -> Request:
    prompt = row.get("prompt")
    if prompt is None:
        prompt = prompt_ids(engine.tokenizer, row["problem"], config.instruction)
    return Request(line, row, engine.check(prompt, config.sampling))


def _record(request: Request, sample: int, answer: Trajectory) -> dict:
    assert answer.text is not None  # there is a tokenizer: `check_model`
    return {
        "line": request.line,
        "sample": sample,
        "input": request.row,
        "text": answer.text,
        "prediction": extract(answer.text),
        "finish_reason": answer.finish_reason,
        "detail": answer.detail,
        "tokens": answer.stats["tokens"],
        "critical_path": answer.stats["critical_path"],
        "branches": answer.stats["branches"],
    }
