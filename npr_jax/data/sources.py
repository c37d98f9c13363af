"""Raw files of problems, in the form in which each data set is published.

file (plain or gzip) --> rows: lines of JSONL, or items of a JSON list --> Problem or BadRow
"""

import contextlib
import gzip
import json
import math
import re
import zlib
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any, BinaryIO, Generic, NamedTuple, TypeVar, cast

from npr_jax.answers import find_boxed
from npr_jax.base.files import reading, without_twins

MAX_DEPTH = 100  # of lists and objects in a row; what is deeper is no problem of anybody

REASONS = ("not UTF-8", "not JSON", "wrong type", "empty problem", "no answer", "over-long")


class Problem(NamedTuple):
    """A problem and its reference answer (LaTeX or plain, without `\\boxed`), and how hard it is
    among others: a larger `level` is harder."""

    problem: str
    answer: str
    level: int = 0


class Written(float):
    """A number with a point or an exponent, which keeps the `text` that it was written as: a float
    gives 1e-05 for 0.00001, and rounds a long one. An integer is exact anyway."""

    text: str

    def __new__(cls, text: str):
        made = super().__new__(cls, text)
        made.text = text
        return made

    @property
    def plain(self) -> str | None:
        """As it was written, but for an exponent, which is no Euler's number as in an answer 2e-3.
        None where it is beyond a float's: 1e-999999999 would be a gigabyte of zeros."""
        _, e, exponent = self.text.lower().partition("e")
        if not e:
            return self.text
        return f"{Decimal(self.text):f}" if 0 < float(f"1e{exponent}") < math.inf else None


class BadRow(ValueError):
    """A row that gives no problem; `reason` is one of REASONS."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


class Row(NamedTuple):
    """`number`: line of the file or item of its list, from 1. `end`: bytes of the file so far."""

    number: int
    raw: bytes
    end: int


_T = TypeVar("_T")


class Form(NamedTuple, Generic[_T]):
    """How a data set is written down: what its rows are, and where a row has what."""

    unit: str
    parse: Callable[[Any], _T]


def read_rows(path: str | Path, unit: str, needed: str = "") -> Iterator[Row]:
    """The rows of a file; blank lines are none.

    Args:
      path: plain or gzip, whatever its name.
      unit: "line" (JSONL) or "item" (of one JSON list).
      needed: what the file should be, for messages.

    Raises ValueError for a gzip file or a list that breaks off, and as `open_source` does.
    """
    needed = needed or ("one JSON list" if unit == "item" else "JSONL: one JSON object a line")
    with open_source(path, needed) as file:
        yield from _lines(file) if unit == "line" else _items(file.read(), path)


@contextlib.contextmanager
def open_source(path: str | Path, needed: str) -> Iterator[BinaryIO]:
    """The file's bytes, unpacked if it is gzip.

    Raises ValueError if that breaks off; FileNotFoundError, IsADirectoryError or another OSError,
    which says what is `needed`, if it cannot be read; ValueError for a pipe.
    """
    with reading(path, needed), Path(path).open("rb") as file:
        packed = file.peek(2)[:2] == b"\x1f\x8b"
        try:
            yield cast(BinaryIO, gzip.GzipFile(fileobj=file)) if packed else file
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path} is no whole gzip file: {error}; get it anew") from error


def parse_row(raw: bytes, form: Form[_T]) -> _T:
    """The problem of one row; raises BadRow."""
    return form.parse(parse_json(raw))


def parse_json(raw: bytes) -> Any:
    """The value of one row, which can be written as JSON again; raises BadRow.

    Numbers with a point or an exponent are `Written`.
    It is no text where it holds half a surrogate pair, and no JSON with NaN, with a key that is
    there twice, or with lists in lists beyond MAX_DEPTH.
    """
    try:
        value = json.loads(
            raw.decode(),
            parse_float=Written,
            parse_constant=_no_constant,
            object_pairs_hook=without_twins,
        )
        if _deeper(value, MAX_DEPTH):
            raise ValueError(f"lists and objects are nested more than {MAX_DEPTH} deep")
        json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair is no text
    except UnicodeError as error:
        raise BadRow("not UTF-8", f"not UTF-8: {error}") from error
    except RecursionError as error:
        raise BadRow("not JSON", "not valid JSON: nested too deep") from error
    except ValueError as error:
        raise BadRow("not JSON", f"not valid JSON: {error}") from error
    return value


def _lines(file: BinaryIO) -> Iterator[Row]:
    end = 0
    for number, line in enumerate(file, 1):
        end += len(line)
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")  # a byte order mark
        if line.strip():
            yield Row(number, line.rstrip(b"\r\n"), end)


# A string, to its end or that of a file that breaks off; or a character that divides a list.
_MARKS = re.compile(r'"(?:[^"\\]++|\\.)*+"?|[\[\]{},]', re.DOTALL)


def _items(data: bytes, path: str | Path) -> Iterator[Row]:
    """A JSON list's items. They are found by their brackets and not parsed, so that what is wrong
    in one (bytes that are not UTF-8, a number too long, lists too deep) spoils no other."""
    text = data.decode("utf-8-sig", "surrogateescape")
    begin, number, depth = text.find("[") + 1, 0, 0
    if not begin or text[: begin - 1].strip():
        raise ValueError(f"{path} starts with {short(text[:80])}, needed is one JSON list")
    for mark in _MARKS.finditer(text, begin):
        if mark[0] in ("[", "{"):
            depth += 1
        elif depth and mark[0] in ("]", "}"):
            depth -= 1
        elif not depth and mark[0] in (",", "]"):
            item = text[begin : mark.start()].strip()
            if item or number or mark[0] == ",":
                number += 1
                end = len(data) * mark.end() // len(text)
                yield Row(number, item.encode("utf-8", "surrogateescape"), end)
            begin = mark.end()
            if mark[0] == "]":
                break
    else:
        raise ValueError(
            f"{path} ends in item {number + 1}, or a bracket or a quote there has no other: is the "
            "file whole?"
        )
    if rest := text[begin:].strip()[:80]:
        raise ValueError(f"{path}: {short(rest)} stands behind the list, needed is one JSON list")


def _no_constant(name: str):
    raise ValueError(f"{name} is no JSON value")


def _deeper(value: Any, depth: int) -> bool:
    """Whether lists and objects in `value` are nested more than `depth` deep."""
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list):
        return False
    return not depth or any(_deeper(item, depth - 1) for item in value)


def _own(row: Any) -> Problem:
    row = _object(row, "problem", "answer")
    return Problem(_text(row, "problem", "empty problem"), _answer(row), _level(row))


def _gsm8k(row: Any) -> Problem:
    row = _object(row, "question", "answer")
    problem = _text(row, "question", "empty problem")
    solution = _text(row, "answer", "no answer")
    answer = solution.rpartition("####")[2].strip().replace(",", "")
    if "####" not in solution or not answer:
        raise BadRow("no answer", f'"answer" has nothing after "####": {short(solution)}')
    return Problem(problem, answer)


def _math(row: Any) -> Problem:
    row = _object(row, "problem", "solution")
    problem = _text(row, "problem", "empty problem")
    solution = _text(row, "solution", "no answer")
    # A few solutions have `\fbox{2}`, or `$\boxed 2$` without braces.
    text = re.sub(r"\\boxed\s+([^\s{$]+)", r"\\boxed{\1}", solution.replace("\\fbox{", "\\boxed{"))
    boxes = find_boxed(text)
    if not boxes or not boxes[-1]:
        raise BadRow("no answer", f'"solution" has no \\boxed answer: {short(solution)}')
    return Problem(problem, boxes[-1], _level(row))


def _orz(row: Any) -> Problem:
    if not isinstance(row, list) or not all(isinstance(turn, dict) for turn in row):
        raise BadRow("wrong type", f"{short(row)} is no list of turns")
    turns = {str(turn.get("from")): turn for turn in reversed(row)}  # the first of each
    for speaker, key, missing in (
        ("human", "value", "empty problem"),
        ("assistant", "ground_truth", "no answer"),
    ):
        if turns.get(speaker, {}).get(key) is None:
            raise BadRow(missing, f'no turn "from" {speaker!r} has a {key!r}')
    problem = _text(turns["human"], "value", "empty problem")
    return Problem(problem, _answer(_object(turns["assistant"]["ground_truth"], "value"), "value"))


FORMS = {
    "orz57k": Form("item", _orz),
    "gsm8k": Form("line", _gsm8k),
    "math": Form("line", _math),
    "jsonl": Form("line", _own),
}


def _object(row: Any, *keys: str) -> dict:
    if not isinstance(row, dict):
        names = " and ".join(f'"{key}"' for key in keys)
        raise BadRow("wrong type", f"{short(row)} is no object with {names}")
    return row


def _text(row: dict, key: str, missing: str) -> str:
    value = row.get(key)
    if value is None or (isinstance(value, str) and not value.strip()):
        raise BadRow(missing, f'"{key}" is {short(value)}, needed is a text{_keys(row, key)}')
    if not isinstance(value, str):
        raise BadRow("wrong type", f'"{key}" is {short(value)}, needed is a text')
    return value


def _answer(row: dict, key: str = "answer") -> str:
    value = row.get(key)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, Written) and (plain := value.plain) is not None:
        return plain
    if value is None or (isinstance(value, str) and not value.strip()):
        reason = f'"{key}" is {short(value)}, needed is a text or a number{_keys(row, key)}'
        raise BadRow("no answer", reason)
    if not isinstance(value, str):
        raise BadRow("wrong type", f'"{key}" is {short(value)}, needed is a text or a number')
    return value


def _level(row: dict) -> int:
    """The "level" of a row, 0 without one. MATH writes it "Level 5", and "Level ?"."""
    value = row.get("level", 0)
    if isinstance(value, str) and (match := re.fullmatch(r"Level (\d{1,9}|\?)", value)):
        return 0 if match[1] == "?" else int(match[1])
    if type(value) is not int or not 0 <= value < 10**9:
        raise BadRow("wrong type", f'"level" is {short(value)}, needed is an integer from 0')
    return value


def _keys(row: dict, key: str) -> str:
    return "" if key in row else f"; the row has {short(list(row))}"


def short(value: Any) -> str:
    """`repr` of a value, cut to what fits a line."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
