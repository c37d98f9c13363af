"""Batch inference: a JSONL file of prompts to a JSONL file of answers, resumable line by line.

An input line is an object with "problem" (put into the model's chat template with the instruction)
or "prompt" (text that is continued as it is). Answers are appended as they finish.
"""

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from npr_jax.answers import extract
from npr_jax.base.compile_cache import DEFAULT_CACHE, use_cache
from npr_jax.base.files import cut_half_line
from npr_jax.base.progress import Progress
from npr_jax.data.prompts import prompt_ids
from npr_jax.decode import Engine, EngineConfig, SamplingParams, Trajectory
from npr_jax.model.pretrained import load


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """How to decode.

    Attributes:
      dtype: of weights and cache, "float32" or "bfloat16".
      engine, sampling: see EngineConfig and SamplingParams; line k gets seed `sampling.seed` + k.
      compilation_cache: where compiled programs are kept for the next run; null keeps none.
      stats: a file to which the engine's statistics are added every ten seconds, as JSONL.
    """

    dtype: str = "float32"
    engine: EngineConfig = dataclasses.field(default_factory=EngineConfig)
    sampling: SamplingParams = dataclasses.field(default_factory=SamplingParams)
    compilation_cache: str | None = str(DEFAULT_CACHE)
    stats: str | None = None

    def __post_init__(self):
        if not isinstance(self.sampling.seed, int):
            raise ValueError(f"sampling.seed is {self.sampling.seed}, needed is one integer")


class Request(NamedTuple):
    """A good line of the input."""

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
    prediction (content of the last `\\boxed{}` or null), finish_reason, detail, and figures. Lines
    that it already has answers to are skipped. A line that is no request, or that the engine would
    refuse, is reported through `warn` by its number, and left out. `tell` hears how compilation
    goes.

    Raises ValueError if `target` holds answers to other lines.
    """
    if config.compilation_cache:
        use_cache(config.compilation_cache)
    loaded = load(model, dtype=config.dtype)
    engine = Engine(loaded, config.engine)
    requests, bad = read_requests(source, engine, config.sampling, warn)
    done = resume(target, {request.line: request.row for request in requests})
    samples = range(config.sampling.n)
    todo = [r for r in requests if any((r.line, i) not in done for i in samples)]
    sampling = dataclasses.replace(
        config.sampling, seed=tuple(config.sampling.seed + request.line for request in todo)
    )
    if todo:
        compile_all(engine, config.sampling, tell)
    written, told = 0, time.monotonic()
    with (
        target.open("a", encoding="utf-8") as file,
        Progress("generate", len(requests) * len(samples), "answer", len(done)) as progress,
    ):
        asked = [(request, sample) for request in todo for sample in samples]
        ids = engine.submit([request.prompt for request in todo], sampling)
        of_id = dict(zip(ids, asked, strict=True))
        for event in engine.stream(tokens=False):
            if event.kind != "finish":
                continue
            request, sample = of_id[event.request]
            if (request.line, sample) in done:
                continue
            record = _record(request, sample, event.trajectory)
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
            file.flush()
            written += 1
            stats = engine.stats()
            progress.advance(1, {"tokens/s": stats["tokens_per_s"]})
            if config.stats and time.monotonic() - told > 10:
                engine.write_stats(config.stats)
                told = time.monotonic()
    if config.stats:
        engine.write_stats(config.stats)
    return written, bad


def compile_all(engine: Engine, sampling: SamplingParams, tell: Callable[[str], None]) -> None:
    """Compiles every shape before the first answer, and tells what that took."""

    def show(done: int, total: int) -> None:
        tell(f"compile: {done}/{total} programs")

    found = engine.warmup(sampling, show)
    if found["compiled"]:
        what = f"{found['compiled']} compiled, {found['from_cache']} from the cache"
    else:
        what = "nothing had to be compiled"
    tell(f"compile: {what}, {found['seconds']:.1f} s")


def read_requests(
    source: Path, engine: Engine, sampling: SamplingParams, warn: Callable[[str], None]
) -> tuple[list[Request], int]:
    """The good lines of `source`, and how many are bad; each of these is named to `warn`."""
    if engine.tokenizer is None:
        raise ValueError("generate needs a model with a tokenizer; this directory has none")
    requests, bad = [], 0
    with Path(source).open("rb") as file:  # bytes: a line that is not UTF-8 is one bad line
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                requests.append(_request(number, line, engine, sampling))
            except ValueError as error:
                warn(f"{source}:{number}: {error}")
                bad += 1
    return requests, bad


def resume(target: Path, rows: dict[int, dict]) -> set[tuple[int, int]]:
    """The (line, sample) that `target` holds; cuts off a last line that was not written whole."""
    if not target.exists():
        return set()
    cut_half_line(target)
    done = set()
    # As bytes: a text may hold other line ends.
    for number, line in enumerate(target.read_bytes().split(b"\n")[:-1], 1):
        record = json.loads(line)
        if rows.get(record["line"]) != record["input"]:
            raise ValueError(
                f"{target}:{number} answers another line {record['line']} than the input has: "
                "give another output file"
            )
        done.add((record["line"], record["sample"]))
    return done


def _request(number: int, line: bytes, engine: Engine, sampling: SamplingParams) -> Request:
    try:
        row = json.loads(line.decode())
    except ValueError as error:
        raise ValueError(f"not valid JSON: {error}") from error
    if not isinstance(row, dict) or ("problem" in row) == ("prompt" in row):
        raise ValueError('needed is an object with either "problem" or "prompt"')
    name = "problem" if "problem" in row else "prompt"
    if not isinstance(row[name], str) or not row[name].strip():
        raise ValueError(f'"{name}" is {row[name]!r}, needed is a text')
    text = row[name]
    text.encode()  # raises for half of a surrogate pair, which JSON can hold and no tokenizer takes
    prompt = prompt_ids(engine.tokenizer, text) if name == "problem" else text
    prompt = engine.check(prompt, sampling)
    return Request(number, row, prompt)


def _record(request: Request, sample: int, answer: Trajectory) -> dict:
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
