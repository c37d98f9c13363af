"""One answer as a file keeps it: what was decoded and when, and what is to be said of it.

A file of traces is JSONL, one `Trace` a line. It needs no model and no tokenizer to be read: every
token has its text beside its id, and the spans of the blocks give the layout back.
"""

import dataclasses
import functools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from npr_jax.base.files import write_atomically, writing
from npr_jax.data.benchmarks import Question
from npr_jax.data.sources import Problem
from npr_jax.decode.events import TextPieces
from npr_jax.evaluate.judge import Answer, Figures, count
from npr_jax.tree import Block, TreeLayout, layout


@dataclasses.dataclass(frozen=True)
class Trace:
    """One answer to one problem, T tokens in depth-first order, prompt and response.

    Attributes:
      problem, reference: as texts; reference is None where there is no answer to compare with.
      token_ids: T ids; pieces: T texts, which joined are the whole text (a character that spans
        several tokens stands at the last of them).
      prompt_len: tokens before the response.
      logp: T raw log-probs; 0 for what was not sampled.
      step: T decode steps, counted from the first of this answer; -1 for what was not sampled.
      forced: T flags, tokens that the engine wrote.
      blocks: spans of what was really forked.
      prediction: the answer found in the text, or None; correct: None without a reference.
      violations: rules of the format that it breaks, a sentence each.
      finish_reason, detail: the engine's.
      benchmark, id, sample: which answer to which problem this is.
    """

    problem: str
    reference: str | None
    token_ids: list[int]
    pieces: list[str]
    prompt_len: int
    logp: list[float]
    step: list[int]
    forced: list[bool]
    blocks: tuple[Block, ...]
    prediction: str | None
    correct: bool | None
    violations: list[str]
    finish_reason: str
    detail: str = ""
    benchmark: str = ""
    id: str = ""
    sample: int = 0

    @functools.cached_property
    def layout(self) -> TreeLayout:
        """Positions, visibility and predictors of the tokens."""
        forced = np.array(self.forced, bool)
        return layout(len(self.token_ids), self.blocks, self.prompt_len, forced)

    @functools.cached_property
    def figures(self) -> Figures:
        """What is counted of it."""
        formed = not self.violations
        return count(self.layout, self.finish_reason, formed, self.prediction, self.correct)

    @property
    def text(self) -> str:
        """Of the response."""
        return "".join(self.pieces[self.prompt_len :])

    def dumps(self) -> str:
        """One line of JSON, without its end."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return json.dumps(values, ensure_ascii=False, separators=(",", ":"))


def make_trace(
    answer: Answer,
    tokenizer,
    problem: Problem | Question,
    benchmark: str = "",
    id: str = "",
    sample: int = 0,
) -> Trace:
    """The trace of an answer to `problem`; the rest says which answer it is."""
    made = answer.trajectory
    first = made.step[made.step >= 0].min(initial=np.iinfo(np.int32).max)
    pieces = TextPieces(tokenizer)
    return Trace(
        problem=problem.problem,
        reference=problem.answer,
        token_ids=made.token_ids.tolist(),
        pieces=[pieces.add(token) for token in made.token_ids.tolist()],
        prompt_len=made.prompt_len,
        logp=[round(x, 4) for x in made.logp.tolist()],
        step=np.where(made.step < 0, -1, made.step - first).tolist(),
        forced=made.forced.tolist(),
        blocks=made.layout.blocks,
        prediction=answer.prediction,
        correct=answer.correct,
        violations=[violation.reason for violation in answer.violations],
        finish_reason=made.finish_reason,
        detail=made.detail,
        benchmark=benchmark,
        id=id,
        sample=sample,
    )


def read_trace(line: str | bytes) -> Trace:
    """A trace from its line; ValueError where the line is none."""
    try:
        values = json.loads(line)
        values["blocks"] = tuple(_block(*block) for block in values["blocks"])
        return Trace(**values)
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"this is no trace: {error}") from error


def read_traces(path: str | Path) -> Iterator[Trace]:
    """The traces of a JSONL file; ValueError names a line that is none."""
    with Path(path).open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield read_trace(line)
            except ValueError as error:
                raise ValueError(f"{path}:{number}: {error}") from error


def write_traces(path: str | Path, traces: Iterable[Trace]) -> None:
    """Writes a file of traces as a whole; OSError names it where it cannot be written."""
    path, lines = Path(path), "".join(trace.dumps() + "\n" for trace in traces)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lines.encode())


def _block(start, guideline_close, plans, steps, join, takeaway, end, depth) -> Block:
    spans = [tuple(tuple(span) for span in spans) for spans in (plans, steps)]
    takeaway = tuple(takeaway) if takeaway else None
    return Block(start, guideline_close, *spans, join, takeaway, end, depth)
