"""Answers that Beta is given: texts in the tags, which a script wrote, or traces, as of mining."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from npr_jax.data.prompts import prompt_ids
from npr_jax.data.sources import FORMS, Problem, parse_json, parse_row, read_rows, short
from npr_jax.evaluate.traces import Trace, of_tokenizer, read_trace
from npr_jax.model.tokenizer import encode
from npr_jax.tree import TagIds, parse
from npr_jax.tree.canonical import canonical
from npr_jax.tree.format import check_format

_NEEDED = 'JSONL of "problem", "answer" and "response", or of traces: set problems'


class Given(NamedTuple):
    """An answer: `ids` are prompt and response, up to the end-of-text token; `where` is its file
    and line."""

    problem: Problem
    ids: list[int]
    prompt_len: int
    text: str
    where: str


def read_given(
    path: str | Path,
    tokenizer,
    tags: TagIds,
    max_branches: int,
    max_depth: int,
    wrong: bool = False,
) -> list[Given]:
    """The answers of a JSONL file, in its order.

    A line with `token_ids` is a trace, which is learnt token for token, with branches or without;
    one that is wrong is refused, but for `wrong`. Any other line has problem, answer and the text
    of a response, right or wrong, which has to keep the format. Raises ValueError with file and
    line for what is neither.
    """
    found = list(_answers(path, tokenizer, tags, max_branches, max_depth, wrong))
    if not found:
        raise ValueError(f"{path}: no answers, needed is one JSON object a line")
    return found


def _answers(
    path, tokenizer, tags: TagIds, max_branches: int, max_depth: int, wrong: bool
) -> Iterator[Given]:
    for row in read_rows(path, FORMS["jsonl"].unit, _NEEDED):
        where = f"{path}:{row.number}"
        try:
            if "token_ids" in parse_json(row.raw):
                given = _of_trace(read_trace(row.raw), tokenizer, where, wrong)
                _check_tree(given, tags, max_branches, max_depth)
            else:
                given = _of_text(row.raw, tokenizer, where)
                limits = max_branches, max_depth
                if broken := check_format(given.ids, given.prompt_len, tags, *limits):
                    raise ValueError(f"the response breaks the format: {broken[0].reason}")
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        yield given


def _of_text(raw: bytes, tokenizer, where: str) -> Given:
    problem, response = parse_row(raw, FORMS["jsonl"]), parse_json(raw).get("response")
    if not isinstance(response, str) or not response.strip():
        raise ValueError(f'"response" is {short(response)}, needed is a text')
    prompt = prompt_ids(tokenizer, problem.problem)
    ids = [*prompt, *encode(tokenizer, response), tokenizer.eos_token_id]
    return Given(problem, ids, len(prompt), response, where)


def _of_trace(trace: Trace, tokenizer, where: str, wrong: bool) -> Given:
    if (trace.correct is False and not wrong) or trace.finish_reason != "stop":
        raise ValueError(
            f"correct is {trace.correct} and finish_reason {trace.finish_reason!r}, needed are "
            "right answers that have ended",
        )
    if not of_tokenizer(trace, tokenizer):
        raise ValueError("the trace was made with another tokenizer than the model's")
    problem = Problem(trace.problem, trace.reference or "")
    ids, pieces = list(trace.token_ids), trace.pieces[trace.prompt_len :]
    if ids[-1] == tokenizer.eos_token_id:
        pieces = pieces[:-1]
    else:
        ids.append(tokenizer.eos_token_id)
    return Given(problem, ids, trace.prompt_len, "".join(pieces), where)


def _check_tree(given: Given, tags: TagIds, max_branches: int, max_depth: int) -> None:
    tokens = canonical(given.ids, given.prompt_len, tags, max_depth)
    for block in parse(tokens, given.prompt_len, tags, max_depth=max_depth).blocks:
        if len(block.steps) > max_branches:
            raise ValueError(
                f"a block of {len(block.steps)} branches, engine.max_branches is {max_branches}",
            )
