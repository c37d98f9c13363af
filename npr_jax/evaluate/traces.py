"""One answer as a file keeps it: what was decoded and when, and what is to be said of it.

A file of traces is JSONL, one `Trace` a line. It needs no model and no tokenizer to be read: every
token has its text beside its id, and the spans of the blocks give the layout back.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

import numpy as np

from npr_jax.base.files import reading, write_atomically, writing
from npr_jax.data.benchmarks import Question
from npr_jax.data.sources import Problem
from npr_jax.decode.text import TextPieces
from npr_jax.evaluate.judge import Answer, Figures, count
from npr_jax.evaluate.verdicts import answer_score
from npr_jax.tree import Block, Rules, TreeLayout, layout
from npr_jax.tree.rules import PAPER


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
      rules: of fork, join and positions, by which it was decoded; left out where they are the
        defaults.
      scores: what a step head says of each branch, in [0, 1], block by block, with [] for a block
        that has not joined; None where none was asked.
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
    rules: Rules = PAPER
    scores: list | None = None

    @functools.cached_property
    def layout(self) -> TreeLayout:
        """Positions, visibility and predictors of the tokens."""
        forced, ids = np.array(self.forced, bool), self.token_ids
        return layout(len(ids), self.blocks, self.prompt_len, forced, self.rules, ids)

    @functools.cached_property
    def figures(self) -> Figures:
        """What is counted of it."""
        formed = not self.violations
        found = count(
            self.token_ids,
            self.layout,
            self.finish_reason,
            formed,
            self.prediction,
            self.correct,
        )
        return found if self.scores is None else found._replace(score=answer_score(self.scores))

    @property
    def text(self) -> str:
        """Of the response."""
        return "".join(self.pieces[self.prompt_len :])

    def dumps(self) -> str:
        """One line of JSON, without its end; log-probs that are no numbers are null."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values["logp"] = [x if math.isfinite(x) else None for x in self.logp]
        rules = values.pop("rules")
        if rules != PAPER:
            values["rules"] = dataclasses.asdict(rules)
        if self.scores is None:
            del values["scores"]
        return json.dumps(values, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


_COLUMNS = ("token_ids", "pieces", "logp", "step", "forced")
_REQUIRED = tuple(
    field.name for field in dataclasses.fields(Trace) if field.default is dataclasses.MISSING
)


def make_trace(
    answer: Answer,
    tokenizer,
    problem: Problem | Question,
    benchmark: str = "",
    id: str = "",
    sample: int = 0,
    scores: list | None = None,
) -> Trace:
    """The trace of an answer to `problem`, with the `scores` of its branches; the rest says which
    answer it is."""
    made = answer.trajectory
    first = made.step[made.step >= 0].min(initial=np.iinfo(np.int32).max)
    text = TextPieces(tokenizer)
    pieces = [text.add(token) for token in made.token_ids.tolist()]
    pieces[-1] += text.flush()  # an answer may end inside a character
    return Trace(
        problem=problem.problem,
        reference=problem.answer,
        token_ids=made.token_ids.tolist(),
        pieces=pieces,
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
        rules=made.layout.rules,
        scores=scores and [[round(x, 4) for x in own] for own in scores],
    )


def read_trace(line: str | bytes) -> Trace:
    """A trace from its line; ValueError, which says what a trace is, where the line is none."""
    try:
        values = json.loads(line)
        if not isinstance(values, dict):
            raise ValueError(f"it is {type(values).__name__}, needed is an object")
        trace = Trace(**_fields(values))
        length, sizes = len(trace.layout), {name: len(getattr(trace, name)) for name in _COLUMNS}
        if set(sizes.values()) != {length} or not 0 <= trace.prompt_len <= length:
            raise ValueError(f"its columns have {sizes} entries, prompt_len is {trace.prompt_len}")
    except (TypeError, ValueError, IndexError, RecursionError) as error:
        raise ValueError(
            f"this is no trace: {error}. A trace has the keys {', '.join(_REQUIRED)}; traces are "
            "the lines of DIR/traces/*.jsonl, DIR being the output of `npr-jax eval` or of a stage"
        ) from error
    return trace


def _fields(values: dict[str, Any]) -> dict[str, Any]:
    """The fields of a trace from its JSON; ValueError or TypeError names what is wrong."""
    known: dict[str, Any] = {field.name: field.type for field in dataclasses.fields(Trace)}
    missing = [name for name in _REQUIRED if name not in values]
    if missing:
        raise ValueError(f"it lacks {', '.join(missing)}")
    if unknown := [name for name in values if name not in known]:
        raise ValueError(f"{', '.join(map(repr, unknown))} is no key of one")
    values = dict(values)
    values["logp"] = [math.nan if x is None else x for x in values["logp"]]
    if "rules" in values:
        values["rules"] = Rules(**values["rules"])
    values["blocks"] = blocks = tuple(_block(*block) for block in values["blocks"])
    if any(block.depth >= len(blocks) for block in blocks):  # the layout has a column for each
        raise ValueError(f"blocks holds {len(blocks)} blocks, one of them as deep or deeper")
    if values.get("scores") is not None:
        _check_scores(values["scores"], blocks)
    for name, value in values.items():
        kind, inner = known[name], None
        if get_origin(kind) in (list, tuple):
            kind, inner = get_origin(kind), get_args(kind)[0]
        if not _holds(value, kind):
            raise ValueError(
                f"{name} is {value!r:.60}, needed is {getattr(kind, '__name__', kind)}"
            )
        if inner is not None and not all(_holds(item, inner) for item in value):
            raise ValueError(f"{name} holds what is no {inner.__name__}")
    return values


def read_traces(path: str | Path) -> Iterator[Trace]:
    """The traces of a JSONL file; ValueError names a line that is none."""
    needed = "JSONL of traces: traces/NAME.jsonl of an evaluation or a run"
    with reading(path, needed), Path(path).open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield read_trace(line)
            except ValueError as error:
                raise ValueError(f"{path}:{number}: {error}") from error


def of_tokenizer(trace: Trace, tokenizer) -> bool:
    """Whether the tokens of a trace have its texts in this tokenizer."""
    text = TextPieces(tokenizer)
    try:
        pieces = [text.add(token) for token in trace.token_ids]
    except (OverflowError, IndexError, TypeError):  # no id of this tokenizer
        return False
    return "".join(pieces) + text.flush() == "".join(trace.pieces)


def write_traces(path: str | Path, traces: Iterable[Trace]) -> None:
    """Writes a file of traces as a whole; OSError names it where it cannot be written."""
    path, lines = Path(path), "".join(trace.dumps() + "\n" for trace in traces)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lines.encode())


def _check_scores(scores: Any, blocks: tuple[Block, ...]) -> None:
    """Raises ValueError for scores that are not of these blocks' branches."""
    fits = (
        isinstance(scores, list)
        and len(scores) == len(blocks)
        and all(
            isinstance(own, list)
            and len(own) in (0, len(block.steps))
            and all(_holds(x, float) and 0 <= x <= 1 for x in own)
            for own, block in zip(scores, blocks, strict=True)
        )
    )
    if not fits:
        raise ValueError(f"scores is {scores!r:.60}, needed is one from 0 to 1 for each branch")


def _holds(value: Any, kind: Any) -> bool:
    """Whether a value of JSON is of that type; an integer is one that the arrays can hold."""
    if kind is int:
        return type(value) is int and abs(value) < 1 << 31
    return isinstance(value, kind) or (kind is float and _holds(value, int))


def _block(start, guideline_close, plans, steps, join, takeaway, end, depth) -> Block:
    plans, steps = (tuple(tuple(span) for span in spans) for spans in (plans, steps))
    takeaway = tuple(takeaway) if takeaway else None
    spans = [*plans, *steps, *([takeaway] if takeaway else [])]
    if any(len(span) != 2 for span in spans):
        raise ValueError("blocks holds a span that is no pair")
    numbers = [start, join, end, depth, *(x for span in spans for x in span)]
    if steps or guideline_close is not None:  # it may be cut off before, and has no steps then
        numbers.append(guideline_close)
    if not all(_holds(x, int) and x >= 0 for x in numbers):
        raise ValueError(f"blocks holds {numbers!r:.60}, needed are indices of tokens")
    return Block(start, guideline_close, plans, steps, join, takeaway, end, depth)
