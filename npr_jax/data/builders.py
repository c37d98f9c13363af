"""The data sets as tfds builders: ArrayRecord files of problem, answer, level and line, in the
source's order. No TensorFlow is needed to make or to read them.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from npr_jax.base.files import describe
from npr_jax.data.sources import FORMS, Problem, Row, parse_row, read_rows


class ProblemsBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Problems of one raw file, as split "train".

    Args:
      source: the file, plain or gzip, in the form of this data set (`FORMS`).
      keep: the problem of a row, or None to leave it out; by default a bad row is an error.
      kwargs: of tfds; `data_dir` among them.
    """

    VERSION = tfds.core.Version("1.1.0")
    # Where tfds looks for checksums of downloads, of which there are none; to find the place itself
    # tfds 4.9.10 imports importlib_resources, which it does not install.
    code_path = None

    def __init__(
        self,
        *,
        source: str | Path,
        keep: Callable[[Row], Problem | None] | None = None,
        **kwargs,
    ):
        self._source, self._keep = source, keep or self._parse
        super().__init__(file_format="array_record", **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "problem": tfds.features.Text(),
            "answer": tfds.features.Text(),
            "level": tfds.features.Scalar(np.int64),
            "line": tfds.features.Scalar(np.int64),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.__doc__,
            features=tfds.features.FeaturesDict(features),
            disable_shuffling=True,  # on disk; that of training is `problems.shuffled`
        )

    def _split_generators(self, dl_manager) -> dict:
        del dl_manager
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict]]:
        for row in read_rows(self._source, FORMS[self.name].unit):
            if (problem := self._keep(row)) is not None:
                yield row.number, {**problem._asdict(), "line": row.number}

    def _parse(self, row: Row) -> Problem:
        form = FORMS[self.name]
        try:
            return parse_row(row.raw, form)
        except ValueError as error:
            raise ValueError(f"{self._source}: {form.unit} {row.number}: {error}") from error

    def _log_download_bytes(self) -> None:
        """Says nothing: nothing is downloaded."""

    _log_download_done = _log_download_bytes


class Orz57k(ProblemsBuilder):
    """Open-Reasoner-Zero's 57k problems: a JSON list of conversations, human and assistant."""


class Gsm8k(ProblemsBuilder):
    """GSM8K: JSONL of `question` and `answer`, which ends in `#### ` and a number."""


class Math(ProblemsBuilder):
    """MATH: JSONL of `problem` and `solution`, which has the answer in `\\boxed{}`."""


class Jsonl(ProblemsBuilder):
    """JSONL of `problem` and `answer`."""


BUILDERS = {cls.__name__.lower(): cls for cls in (Orz57k, Gsm8k, Math, Jsonl)}


def read_prepared(directory: str | Path) -> list[Problem]:
    """The problems of a directory that one of the builders made, in the source's order.

    Raises ValueError if it is no such directory, or not whole.
    """
    directory = Path(directory)
    if not (directory / "dataset_info.json").exists():
        raise ValueError(
            f"{directory} is a directory without a prepared data set: make one with "
            "`npr-jax data prepare`"
        )
    try:
        for name in ("dataset_info.json", "features.json"):  # tfds' own errors are not clear
            kind = type(json.loads((directory / name).read_bytes())).__name__
            if kind != "dict":
                raise ValueError(f"{name} holds {kind}, needed is an object")
        builder: Any = tfds.builder_from_directory(directory)
        features = dict(builder.info.features)
        for name in ("problem", "answer"):
            if not isinstance(features.get(name), tfds.features.Text):
                raise ValueError(f"its rows have no text {name!r}")
        rows = builder.as_data_source(split="train")
        rows = [rows[i] for i in range(len(rows))]
        return [  # one from before there were levels has none
            Problem(row["problem"].decode(), row["answer"].decode(), int(row.get("level", 0)))
            for row in rows
        ]
    except Exception as error:  # of a damaged directory tfds raises errors of any class
        raise ValueError(
            f"{directory} is no whole data set of problems: {describe(error)}; remove it and make "
            "it anew with `npr-jax data prepare`"
        ) from error
