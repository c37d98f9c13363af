"""Pools: many answers to each question, with what probes of each read on the way, in a file.

A pool is JSON, plain or gzip: a list of questions, each an object with

    question      the problem's text
    gold_answer   the right answer, a text
    probe_freq    tokens between two probes of an answer
    each_branch   its answers, each [probes, tokens, final answer]

A probe is the answer that was read after another `probe_freq` tokens, a text, or null where there
was none to read; so is the final answer. `tokens` are those of the whole answer. Other keys are
passed over. This is the form of the published pools of Parallel-Probe (arXiv 2602.03845).
"""

import gzip
import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from npr_jax.base.files import json_text, without_twins, write_atomically, writing
from npr_jax.data.sources import open_source

_NEEDED = "a pool: a JSON list of questions, plain or gzip (docs/scout.md)"
_WRAPPER = re.compile(r"\\(?:text|textbf|box|boxed)\{")


class Branch(NamedTuple):
    """One answer: what its probes read (None: nothing), its tokens, and what it ended with."""

    probes: Sequence[str | None]
    tokens: int
    final: str | None


class PoolQuestion(NamedTuple):
    """A question, its right answer, the tokens between two probes, and the recorded answers."""

    question: str
    gold: str
    interval: int
    branches: Sequence[Branch]


def read_pool(
    path: str | Path, clean: bool | None = None, tell: Callable[[str], None] = lambda line: None
) -> list[PoolQuestion]:
    """The questions of a file.

    Args:
      clean: whether all answers are cleaned (`clean_text`), which is done once before a pool is
        published. None: they are where one of them shows that they have not been.
      tell: gets a line about each thing that is odd about the file.

    Raises ValueError or OSError with the file, the number of the question, the value and what is
    needed.
    """
    with open_source(path, _NEEDED) as file:
        data = file.read()
    try:
        values = json.loads(data.decode("utf-8-sig"), object_pairs_hook=without_twins)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is neither JSON nor gzip of it: {error}") from error
    if not isinstance(values, list) or not values:
        found = "an empty list" if values == [] else f"{type(values).__name__}, no list"
        raise ValueError(f"{path} holds {found}; needed is {_NEEDED}")
    questions = []
    for number, value in enumerate(values, 1):
        try:
            questions.append(_question(value))
        except ValueError as error:
            raise ValueError(f"{path}: question {number}: {error}") from None
    if clean is None and (raw := _first_raw(questions)):
        tell(f"{path}: question {raw[0]} has the answer {raw[1]!r:.60}, so all are cleaned")
        clean = True
    if clean:
        questions = [_cleaned(question) for question in questions]
    if odd := _too_many_probes(questions):
        tell(f"{path}: {odd}")
    return questions


def write_pool(path: str | Path, questions: Iterable[PoolQuestion]) -> None:
    """Writes a pool as a whole, gzip where `path` ends with .gz; OSError names it if it cannot.

    It has final_answers_trace too, which the code published with Parallel-Probe asks for.
    """
    values = [
        {
            "question": question.question,
            "final_answers_trace": [branch.final for branch in question.branches],
            "each_branch": [
                [list(branch.probes), branch.tokens, branch.final] for branch in question.branches
            ],
            "gold_answer": question.gold,
            "probe_freq": question.interval,
        }
        for question in questions
    ]
    data = json_text(values).encode()
    with writing(path, "give another place"):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        packed = str(path).endswith(".gz")
        write_atomically(Path(path), gzip.compress(data, mtime=0) if packed else data)


def clean_text(text: str) -> str:
    r"""An answer as the authors of Parallel-Probe clean theirs, once, before they are counted: out
    of \text, \textbf, \box and \boxed; "No" for all that has "no" in it; else what follows the last
    "=", else the last "is"; else the text with \frac for \dfrac."""
    text = _unwrapped(text)
    if "no" in text.lower():
        return "No"
    for mark in ("=", "is"):
        if mark in text:
            return text.rpartition(mark)[2].strip()
    return text.replace("dfrac", "frac")


def _unwrapped(text: str) -> str:
    """The text without the commands around its parts; one that is not closed stays."""
    at = 0
    while match := _WRAPPER.search(text, at):
        at, inside = match.end(), match.end()
        depth, end = 1, inside
        while end < len(text) and depth:
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
        if not depth:
            text = text[: match.start()] + text[inside : end - 1] + text[end:]
            at = 0  # what is joined may be a command
    return text


def _question(value: Any) -> PoolQuestion:
    """A question from its JSON; ValueError says what is wrong with it."""
    if not isinstance(value, dict):
        raise ValueError(f"it is {value!r:.60}, needed is an object")
    names = ("question", "gold_answer", "probe_freq", "each_branch")
    if missing := [name for name in names if name not in value]:
        raise ValueError(f"it lacks {', '.join(missing)}; needed are {', '.join(names)}")
    question, gold, interval, branches = (value[name] for name in names)
    for name, text in (("question", question), ("gold_answer", gold)):
        if not isinstance(text, str):
            raise ValueError(f"{name} is {text!r:.60}, needed is a text")
    if not _is_count(interval) or interval < 1:
        raise ValueError(f"probe_freq is {interval!r:.60}, needed is an integer, 1 or more")
    if not isinstance(branches, list):
        raise ValueError(f"each_branch is {branches!r:.60}, needed is a list")
    finals = value.get("final_answers_trace", branches)
    if not isinstance(finals, list) or len(finals) != len(branches):
        found = f"{len(finals)} answers" if isinstance(finals, list) else f"{finals!r:.60}"
        raise ValueError(
            f"final_answers_trace has {found}, needed are as many as each_branch: {len(branches)}"
        )
    return PoolQuestion(
        question, gold, interval, [_branch(x, number) for number, x in enumerate(branches, 1)]
    )


def _branch(value: Any, number: int) -> Branch:
    name = f"each_branch, item {number}"
    if not isinstance(value, list) or len(value) != 3:
        size = f" of {len(value)}" if isinstance(value, list) else ""
        raise ValueError(
            f"{name} is {value!r:.60}{size}, needed is a list of 3: probes, tokens, final answer"
        )
    probes, tokens, final = value
    if not isinstance(probes, list):
        raise ValueError(f"{name}: its probes are {probes!r:.60}, needed is a list")
    for at, probe in enumerate(probes, 1):
        if not _is_answer(probe):
            raise ValueError(f"{name}: probe {at} is {probe!r:.60}, needed is a text or null")
    if not _is_count(tokens):
        raise ValueError(f"{name}: its tokens are {tokens!r:.60}, needed is an integer, 0 or more")
    if not _is_answer(final):
        raise ValueError(f"{name}: its final answer is {final!r:.60}, needed is a text or null")
    return Branch(probes, tokens, final)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**31


def _is_answer(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _texts(question: PoolQuestion) -> Iterable[str]:
    """All answers to a question, the right one first."""
    yield question.gold
    for branch in question.branches:
        yield from (text for text in (*branch.probes, branch.final) if text is not None)


def _first_raw(questions: Sequence[PoolQuestion]) -> tuple[int, str] | None:
    """A text that shows that its pool has not been cleaned, after the number of its question.

    What follows a last "=" may still have a \\dfrac or an "is": these show nothing, and to clean
    such a text again would change it. That is why pools are not simply always cleaned.
    """
    known = set()
    for number, question in enumerate(questions, 1):
        for text in dict.fromkeys(_texts(question)):
            if text in known:
                continue
            known.add(text)
            if "=" in text or ("no" in text.lower() and text != "No") or _unwrapped(text) != text:
                return number, text
    return None


def _cleaned(question: PoolQuestion) -> PoolQuestion:
    """With all answers cleaned, and without the nulls that fill the rows of probes up."""
    texts: dict[str | None, str | None] = {text: clean_text(text) for text in _texts(question)}
    texts[None] = None
    branches = []
    for branch in question.branches:
        size = len(branch.probes)
        while size and branch.probes[size - 1] is None:
            size -= 1
        probes = [texts[probe] for probe in branch.probes[:size]]
        branches.append(Branch(probes, branch.tokens, texts[branch.final]))
    return question._replace(gold=clean_text(question.gold), branches=branches)


def _too_many_probes(questions: Sequence[PoolQuestion]) -> str | None:
    """Whether answers have more probes than their tokens have room for, which costs too much."""
    found = [
        (number, at, len(branch.probes), branch.tokens, question.interval)
        for number, question in enumerate(questions, 1)
        for at, branch in enumerate(question.branches, 1)
        if len(branch.probes) * question.interval >= branch.tokens + question.interval
    ]
    if not found:
        return None
    number, at, probes, tokens, interval = found[0]
    return (
        f"{len(found)} answers have more probes than tokens; the first is question {number}, "
        f"each_branch, item {at}: {probes} probes, {interval} tokens each, in {tokens} tokens"
    )
