"""Where the problems of an evaluation come from, and how a row becomes one.

    file of your own | DIR/NAME.jsonl | one file of a data set on the hub --> rows --> Question

A row of your own is {"problem", "answer"}, with "id" and "choices" if you like; rows of the hub are
brought to this form first. What is read where, and what was never fetched: docs/benchmarks.md.
"""

import csv
import functools
import hashlib
import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

from npr_jax.base.files import hub_error, read_text, reading
from npr_jax.data.sources import FORMS, BadRow, Form, parse_row, read_rows, short

ENDINGS = (".jsonl", ".jsonl.gz")
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class Question(NamedTuple):
    """A problem as it is asked, and its reference answer: a letter where there are choices."""

    id: str
    problem: str
    answer: str


class Benchmark(NamedTuple):
    """A benchmark of the registry.

    Attributes:
      hub, revision, file: id of a data set on the Hugging Face hub, commit, and file.
      own: brings a row of that file to the form of a row of one's own.
      local: other names, without ending, that its file has in a directory of local files.
    """

    hub: str
    revision: str
    file: str
    own: Callable[[dict], dict]
    local: tuple[str, ...] = ()


class Source(NamedTuple):
    """The questions of one benchmark, and where they were read."""

    name: str
    questions: list[Question]
    origin: str


def _columns(problem: str, answer: str, id: str | None = None) -> Callable[[dict], dict]:
    """Rows that only have other names for the same."""

    def own(row: dict) -> dict:
        found = {"problem": _get(row, problem), "answer": _get(row, answer)}
        return found | ({"id": _get(row, id)} if id else {})

    return own


def _gsm8k(row: dict) -> dict:
    problem = FORMS["gsm8k"].parse(row)
    return {"problem": problem.problem, "answer": problem.answer}


def _olympiad(row: dict) -> dict:
    answers = _get(row, "final_answer")
    if not isinstance(answers, list) or len(answers) != 1:
        raise BadRow("no answer", f'"final_answer" is {short(answers)}, needed is a list of one')
    return {"id": _get(row, "id"), "problem": _get(row, "question"), "answer": answers[0]}


def _zebralogic(row: dict) -> dict:
    return {
        "id": _get(row, "id"),
        "problem": f"{_get(row, 'puzzle')}\n\n{_get(row, 'question')}",
        "answer": _get(row, "answer"),
        "choices": _get(row, "choices"),
    }


def _gpqa(row: dict) -> dict:
    names = ("Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")
    choices = [str(_get(row, name)).strip() for name in names]
    return {
        "id": _get(row, "Record ID"),
        "problem": _get(row, "Question"),
        "answer": choices[0],
        "choices": choices,
    }


def _get(row: dict, key: str) -> Any:
    if key not in row:
        raise BadRow("wrong type", f"there is no {key!r}; the row has {short(list(row))}")
    return row[key]


BENCHMARKS = {
    "aime24": Benchmark(
        "HuggingFaceH4/aime_2024",
        "2fe88a2f1091d5048c0f36abc874fb997b3dd99a",
        "data/train-00000-of-00001.parquet",
        _columns("problem", "answer", "id"),
    ),
    "aime25": Benchmark(
        "math-ai/aime25",
        "563bb8404243c5f09de6ec262f2db674fe5bce9b",
        "test.jsonl",
        _columns("problem", "answer", "id"),
    ),
    "hmmt25": Benchmark(
        "MathArena/hmmt_feb_2025",
        "6fdc4277120810ff75aa22d2d5489b91f7a262a1",
        "data/train-00000-of-00001.parquet",
        _columns("problem", "answer", "problem_idx"),
        local=("hmmt_feb_2025",),
    ),
    "amc23": Benchmark(
        "math-ai/amc23",
        "80815d37005feb82cd7f8fbc6901d5d3eff43057",
        "test-00000-of-00001.parquet",
        _columns("question", "answer", "id"),
    ),
    "math500": Benchmark(
        "HuggingFaceH4/MATH-500",
        "6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be",
        "test.jsonl",
        _columns("problem", "answer", "unique_id"),
    ),
    "olympiad": Benchmark(
        "math-ai/olympiadbench",
        "4faaf1e6ec17d11a4218a9bf4c049ecaf954dd84",
        "test.parquet",
        _olympiad,
    ),
    "minerva": Benchmark(
        "math-ai/minervamath",
        "ee46ddc498933b1977577953250ca5c66be64f96",
        "test.jsonl",
        _columns("question", "answer"),
    ),
    "zebralogic": Benchmark(
        "WildEval/ZebraLogic",
        "0a473f5a0054835754ed156d5a79c6ce27178bb1",
        "mc_mode/test-00000-of-00001.parquet",
        _zebralogic,
    ),
    "gpqa": Benchmark(
        "Idavidrein/gpqa",
        "633f5ee89ab8ad4522a9f850766b73f62147ffdd",
        "gpqa_diamond.csv",
        _gpqa,
    ),
    "gsm8k": Benchmark(
        "openai/gsm8k",
        "740312add88f781978c0658806c59bc2815b9866",
        "main/test-00000-of-00001.parquet",
        _gsm8k,
        local=("gsm8k_test",),
    ),
}


def split(text: str) -> tuple[str, str | None]:
    """(name, path or None) of one item of `--benchmarks`: "aime25" or "mine=problems.jsonl"."""
    name, equals, path = text.partition("=")
    if equals and not (path and re.fullmatch(r"[A-Za-z0-9_-]+", name)):
        raise ValueError(
            f"benchmark {text!r} is not of the form NAME=FILE, with a name of letters, digits, "
            "_ and -"
        )
    if not equals and name not in BENCHMARKS:
        known = ", ".join(BENCHMARKS)
        raise ValueError(
            f"benchmark {name!r} is unknown; there are {known}, and NAME=FILE for one of your own"
        )
    return name, path or None


def read_benchmark(text: str, directory: str | Path | None = None) -> Source:
    """The questions of an item of `--benchmarks`; of `directory` before the hub.

    Raises ValueError with file and row for a row that is no question, and FileNotFoundError, which
    says where it looked, if there is no file.
    """
    name, path = split(text)
    if path is not None:
        return _read(name, Path(path), path)
    benchmark = BENCHMARKS[name]
    looked = []
    if directory is not None:
        for stem in (name, *benchmark.local):
            looked += [Path(directory) / f"{stem}{ending}" for ending in ENDINGS]
    for place in looked:
        if place.is_file():
            return _read(name, place, str(place))
    path = _download(name, benchmark, looked)
    origin = f"{benchmark.hub}@{benchmark.revision}:{benchmark.file}"
    return _read(name, path, origin, benchmark.own)


def _read(name: str, path: Path, origin: str, own=lambda row: row) -> Source:
    questions, seen = [], set()
    for number, raw in _rows(path):
        parse = functools.partial(_question, name=name, number=number, own=own)
        try:
            question = parse_row(raw, Form("line", parse))
        except BadRow as error:
            raise ValueError(f"{path}:{number}: {error}") from error
        if question.id in seen:
            raise ValueError(f"{path}:{number}: the id {question.id!r} is there twice")
        seen.add(question.id)
        questions.append(question)
    if not questions:
        raise ValueError(f"{path}: no problems, needed is one JSON object a line")
    return Source(name, questions, origin)


def _rows(path: Path) -> Iterator[tuple[int, bytes]]:
    """(number from 1, JSON) of each row of a file: parquet, CSV, or else JSONL, maybe gzip."""
    needed = 'JSONL of "problem" and "answer", parquet or CSV (--benchmarks NAME=FILE)'
    if path.suffix not in (".parquet", ".csv"):
        yield from ((row.number, row.raw) for row in read_rows(path, "line", needed))
        return
    read = _parquet if path.suffix == ".parquet" else _csv
    for number, row in enumerate(read(path, needed), 1):
        yield number, json.dumps(row, default=_plain).encode()


def _parquet(path: Path, needed: str) -> list[dict]:
    import pyarrow
    import pyarrow.parquet

    with reading(path, needed):
        data = path.read_bytes()
    try:
        table = pyarrow.parquet.read_table(pyarrow.BufferReader(data))
        for i, column in enumerate(table.columns):
            if pyarrow.types.is_float32(column.type):
                # By way of text: 0.1 is to be 0.1, and not the double nearest to its float.
                column = column.cast(pyarrow.string()).cast(pyarrow.float64())
                table = table.set_column(i, table.column_names[i], column)
        return table.to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as parquet: {error}") from error


def _csv(path: Path, needed: str) -> list[dict]:
    reader = csv.DictReader(io.StringIO(read_text(path, needed), newline=""), strict=True)
    try:
        rows = list(reader)
    except csv.Error as error:
        raise ValueError(f"{path} is no whole CSV file: {error}") from error
    names = reader.fieldnames or []
    if len(set(names)) < len(names):
        raise ValueError(f"{path} has a column twice: {short(names)}")
    for number, row in enumerate(rows, 1):
        if None in row:
            raise ValueError(
                f"{path}:{number}: {short(row[None])} stands behind the last column, "
                f"{short(names[-1])}; a text with a comma in it needs quotes"
            )
    return rows


def _plain(value: Any) -> Any:
    """What JSON has for a value of parquet that it does not have itself."""
    if isinstance(value, Decimal):
        return f"{value:f}"
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return {"bytes that are no UTF-8": len(value)}  # fine where nobody asks for it
    return str(value)  # dates and times


def _question(row: Any, name: str, number: int, own: Callable[[dict], dict]) -> Question:
    if isinstance(row, dict):  # if it is none, the next check says so
        row = own(row) | {"level": 0}  # theirs may be anything, and nobody asks for it
    problem, answer, _ = FORMS["jsonl"].parse(row)
    id = row.get("id", number)
    if isinstance(id, bool) or not isinstance(id, int | str) or id == "":
        raise BadRow("wrong type", f'"id" is {short(id)}, needed is a text or an integer')
    if "choices" in row:
        problem, answer = _lettered(problem, answer, row["choices"], f"{name}/{id}")
    return Question(str(id), problem, answer)


def _lettered(problem: str, answer: str, choices: Any, seed: str) -> tuple[str, str]:
    """The problem with lettered choices under it, and the right one's letter.

    Their order is as good as random, and fixed: by a digest of `seed` and the choice.
    """
    texts = isinstance(choices, list) and all(isinstance(choice, str) for choice in choices)
    if not texts or not 2 <= len(set(choices)) == len(choices) <= len(_LETTERS):
        raise BadRow(
            "wrong type",
            f'"choices" is {short(choices)}, needed are 2 to {len(_LETTERS)} different texts',
        )
    if answer not in choices:
        raise BadRow("no answer", f"the answer {short(answer)} is none of the choices")

    def order(choice: str) -> bytes:
        return hashlib.sha256(json.dumps([seed, choice]).encode()).digest()

    choices = sorted(choices, key=order)
    lines = [f"{letter}) {text}" for letter, text in zip(_LETTERS, choices, strict=False)]
    text = "\n".join([problem, "", *lines, "", "The answer is the letter of the right choice."])
    return text, _LETTERS[choices.index(answer)]


def _download(name: str, benchmark: Benchmark, looked: Sequence[Path]) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    hub, revision, file = benchmark.hub, benchmark.revision, benchmark.file
    try:
        return Path(hf_hub_download(hub, file, repo_type="dataset", revision=revision))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        places = " or ".join(map(str, looked)) or "no directory of local files (--data)"
        raise hub_error(
            f"benchmark {name}: looked for {places}; give its problems as JSONL of "
            f'"problem" and "answer" in --data DIR, named {name}{ENDINGS[0]}, or as --benchmarks '
            f"{name}=FILE. The hub gave no {file} of {hub}",
            error,
        ) from error
