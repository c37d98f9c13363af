"""`npr-jax data prepare`: a raw file becomes a data set, and what is bad in it is set aside.

    rows --> good: ArrayRecord (tfds) | bad: rejected.jsonl --> renamed into place when whole

A directory of prepared problems holds the tfds files, `rejected.jsonl`, and `prepared.json`: what
it was made from, and the report.
"""

import dataclasses
import hashlib
import tempfile
from pathlib import Path
from typing import TextIO

import pydantic
import tensorflow_datasets as tfds

from npr_jax.base.files import json_text, sync_all, writing
from npr_jax.base.progress import Progress
from npr_jax.data.builders import BUILDERS
from npr_jax.data.prompts import prompt_ids
from npr_jax.data.sources import FORMS, BadRow, Form, Problem, Row, open_source, parse_row

SHOWN = 5  # lines per reason in a report; the reject file has all


@dataclasses.dataclass(frozen=True)
class Report:
    """What was made of a file.

    Attributes:
      made_from: name of the form, version, sha256 of the unpacked file, tokenizer and limit; the
        same again gives the same data set.
      source: the file's path, as given.
      problems: rows kept.
      bad: reason -> rows set aside.
      first: reason -> where and what, of the first few.
    """

    made_from: dict
    source: str
    problems: int
    bad: dict[str, int]
    first: dict[str, list[str]]

    def lines(self, directory: str | Path) -> list[str]:
        """The report as text."""
        total = sum(self.bad.values())
        lines = [
            f"{directory}, made from {self.source}: problems {self.problems}, bad rows {total}"
        ]
        for reason, count in self.bad.items():
            first = self.first.get(reason, [])
            lines += [f"  {reason}: {count}", *(f"    {text}" for text in first)]
            if count > len(first):
                lines.append(f"    and {count - len(first)} more")
        if total:
            lines.append(f"all of them are in {Path(directory) / 'rejected.jsonl'}")
        return lines


def prepare(
    name: str,
    source: str | Path,
    output: str | Path,
    tokenizer: str | None = None,
    max_prompt_tokens: int | None = None,
) -> Report:
    """Makes the directory `output` of the problems in `source`, or finds it made from the same.

    Args:
      name: of the form, a key of FORMS.
      tokenizer, max_prompt_tokens: directory or hub id, and the longest prompt to keep, as the
        stages count it. Both or neither.

    Raises:
      ValueError: there is no such form, no row is good, or `output` holds something else. Nothing
        is written then, and what was there is left as it was.
      FileNotFoundError: there is no source.
    """
    if name not in FORMS:
        raise ValueError(f"data set {name!r} is unknown; there are {', '.join(FORMS)}")
    if (tokenizer is None) != (max_prompt_tokens is None):
        raise ValueError("--tokenizer and --max-prompt-tokens go together: give both or neither")
    if max_prompt_tokens is not None and max_prompt_tokens < 1:
        raise ValueError(f"--max-prompt-tokens is {max_prompt_tokens}, needed is 1 or more")
    output = Path(output)
    checksum, size = _checksum(name, source)
    made_from = {
        "name": name,
        "version": str(BUILDERS[name].VERSION),
        "sha256": checksum,
        "tokenizer": tokenizer,
        "max_prompt_tokens": max_prompt_tokens,
    }
    if report := _made(output, made_from):
        return report
    place = output.resolve()  # a link may lead there, and stays
    if place == Path.cwd():
        raise ValueError(
            f"--output {output} is the directory you are in, and what is made would replace it: "
            "give one of its own"
        )
    encoder = None
    if tokenizer is not None:
        from npr_jax.model.pretrained import load_tokenizer

        encoder = load_tokenizer(tokenizer)
    # Beside the output, so that renaming works; a killed run leaves no more than this folder.
    prefix = f".{place.name}.incomplete-"
    with writing(output, "give another --output"):
        place.parent.mkdir(parents=True, exist_ok=True)
        space = tempfile.TemporaryDirectory(prefix=prefix, dir=place.parent)
    with space as folder:
        rejected = Path(folder) / "rejected.jsonl"
        with (
            rejected.open("w", encoding="ascii") as file,
            Progress(f"prepare {name}", size, "byte") as progress,
        ):
            sieve = _Sieve(FORMS[name], file, progress, encoder, max_prompt_tokens)
            tfds.disable_progress_bar()
            builder = BUILDERS[name](source=source, keep=sieve, data_dir=folder)
            try:
                builder.download_and_prepare()
            except AssertionError:  # what tfds makes of no examples
                if sieve.problems:
                    raise
        if not sieve.problems:
            raise ValueError(_nothing(name, source, sieve))
        report = Report(made_from, str(source), sieve.problems, sieve.bad, sieve.first)
        made = Path(builder.data_dir)
        rejected.rename(made / rejected.name)
        text = json_text(dataclasses.asdict(report), indent=1)
        (made / "prepared.json").write_text(text + "\n", encoding="utf-8")
        sync_all(made)
        try:
            made.rename(place)
        except OSError:
            if not _made(output, made_from):  # another process may have been first
                raise
    return report


class _Sieve:
    """Keeps the good rows; counts the bad ones by reason, and writes them to the reject file."""

    def __init__(
        self, form: Form, rejected: TextIO, progress: Progress, tokenizer, max_tokens: int | None
    ):
        self._form, self._rejected, self._progress = form, rejected, progress
        self._tokenizer, self._max_tokens = tokenizer, max_tokens
        self.problems = 0
        self.bad: dict[str, int] = {}
        self.first: dict[str, list[str]] = {}

    def __call__(self, row: Row) -> Problem | None:
        """The row's problem, or None."""
        try:
            problem = parse_row(row.raw, self._form)
            self._check_length(problem)
            self.problems += 1
        except BadRow as error:
            problem = None
            self._reject(row, error)
        values = {"problems": self.problems, "bad": sum(self.bad.values())}
        self._progress.advance(row.end - self._progress.done, values)
        return problem

    def _check_length(self, problem: Problem) -> None:
        if self._tokenizer is None or self._max_tokens is None:
            return
        length = len(prompt_ids(self._tokenizer, problem.problem))
        if length > self._max_tokens:
            raise BadRow("over-long", f"the prompt has {length} tokens, above {self._max_tokens}")

    def _reject(self, row: Row, error: BadRow) -> None:
        self.bad[error.reason] = self.bad.get(error.reason, 0) + 1
        first = self.first.setdefault(error.reason, [])
        if len(first) < SHOWN:
            first.append(f"{self._form.unit} {row.number}: {error}")
        # Bytes that are not UTF-8 become \udc80 to \udcff: `encode("utf-8", "surrogateescape")`
        # of the text gives the bytes back.
        record = {
            "line": row.number,
            "reason": error.reason,
            "detail": str(error),
            "text": row.raw.decode("utf-8", "surrogateescape"),
        }
        self._rejected.write(json_text(record) + "\n")


def _nothing(name: str, source: str | Path, sieve: _Sieve) -> str:
    if not sieve.bad:
        return f"{source} has no rows"
    bad = "; ".join(
        f"{reason}: {count}, the first at {sieve.first[reason][0]}"
        for reason, count in sieve.bad.items()
    )
    text = f"{source}: all rows are bad as {name} ({bad})"
    if "over-long" in sieve.bad:  # so the form is right
        return text
    return f"{text}; other forms are {', '.join(form for form in FORMS if form != name)}"


def _checksum(name: str, source: str | Path) -> tuple[str, int]:
    """(sha256, length) of the unpacked file."""
    digest, size = hashlib.sha256(), 0
    needed = f"the raw file of {name} (--source)"
    with open_source(source, needed) as file:
        while block := file.read(1 << 20):
            digest.update(block)
            size += len(block)
    return digest.hexdigest(), size


def _made(output: Path, made_from: dict) -> Report | None:
    """The report of an output that was made from the same; None if there is none yet."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return None
    path = output / "prepared.json"
    if not path.is_file():
        raise ValueError(f"{output} is there and no prepared data set: give another --output")
    try:
        found = pydantic.TypeAdapter(Report).validate_json(path.read_bytes())
    except pydantic.ValidationError as error:
        fault = error.errors()[0]
        reason = ".".join(map(str, [*fault["loc"], fault["msg"]]))
        raise ValueError(f"{path} is damaged ({reason}): remove that directory") from error
    if found.made_from == made_from:
        return found
    changed = ", ".join(
        f"{key} was {found.made_from.get(key)}, is {made_from[key]}"
        for key in made_from
        if found.made_from.get(key) != made_from[key]
    )
    raise ValueError(
        f"{output} was prepared from {found.source} and not from this ({changed}): "
        "give another --output, or remove that directory"
    )
