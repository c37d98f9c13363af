"""What a report shows, read from the directory of an evaluation or of a training run.

    results.json             figures per benchmark      (an evaluation)
    traces/NAME.jsonl        answers, a `Trace` a line  (both)
    [*/[*/]]metrics.jsonl    learning curves            (a training run)
    config.yaml              settings                   (both)

All of them may still be growing: whole lines count. Answers are read one at a time; what a chart
needs is kept of all, the tokens of at most `most` of them.
"""

import base64
import dataclasses
import gzip
import math
from itertools import repeat
from pathlib import Path

import numpy as np

from npr_jax.base.files import json_text, read_text
from npr_jax.base.progress import Scalar
from npr_jax.evaluate.judge import Figures
from npr_jax.evaluate.results import read_results
from npr_jax.evaluate.traces import Trace, read_traces
from npr_jax.runs.metrics import read_metrics


@dataclasses.dataclass
class Content:
    """What is in a directory.

    Attributes:
      title: of the page.
      results: results.json of an evaluation.
      curves: lines of metrics by run directory, "" for the directory itself.
      figures: of every answer, by file of traces.
      rows, packed: of the answers in the viewer, the row of the list, and all of it.
      settings: YAML texts by name.
    """

    title: str
    results: dict | None = None
    curves: dict[str, list[dict[str, Scalar]]] = dataclasses.field(default_factory=dict)
    figures: dict[str, list[Figures]] = dataclasses.field(default_factory=dict)
    rows: list[dict] = dataclasses.field(default_factory=list)
    packed: list[str] = dataclasses.field(default_factory=list)
    settings: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def num_answers(self) -> int:
        """Of all that there are, shown or not."""
        return sum(map(len, self.figures.values()))


def read(directory: str | Path, most: int = 1000) -> Content:
    """The content of a directory; `most` answers get into the viewer.

    Raises ValueError where there is nothing to report, or a file is not what it should be.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise ValueError(f"{directory} is no directory: needed is that of an evaluation or a run")
    content = Content(directory.resolve().name)
    for path in sorted(directory.glob("config.yaml")):
        content.settings[path.name] = read_text(path, "config.yaml of a run")
    results = directory / "results.json"
    if results.exists():
        content.results = read_results(results)
    content.curves = read_curves(directory)
    add_traces(content, sorted(directory.glob("traces/*.jsonl")), most)
    if not (content.results or content.curves or content.figures):
        raise ValueError(
            f"{directory} has neither results.json nor metrics.jsonl nor traces/*.jsonl: needed is "
            "the directory of `npr-jax eval` or of a training run"
        )
    return content


def read_curves(directory: Path) -> dict[str, list[dict[str, Scalar]]]:
    """Lines of metrics by run directory, "" for the directory itself."""
    found = {}
    for pattern in ("", "*/", "*/*/"):
        for path in sorted(directory.glob(f"{pattern}metrics.jsonl")):
            name = path.parent.relative_to(directory).as_posix()
            found["" if name == "." else name] = read_metrics(path.parent)
    return found


def add_traces(content: Content, paths: list[Path], most: int) -> None:
    """Reads files of traces; each shows its share of `most`, spread over the whole file."""
    sizes = [_num_lines(path) for path in paths]
    for path, size, share in zip(paths, sizes, shares(sizes, most), strict=True):
        figures = content.figures[path.stem] = []
        for number, trace in zip(range(size), read_traces(path), strict=False):
            figures.append(trace.figures)
            if (number + 1) * share // size > number * share // size:
                content.rows.append(row_of(trace, path.stem))
                content.packed.append(pack(trace))


def shares(sizes: list[int], most: int) -> list[int]:
    """How many of each size are taken, together at most `most`: as equal as the sizes allow."""
    taken = [0] * len(sizes)
    left = min(most, sum(sizes))
    for rank, i in enumerate(sorted(range(len(sizes)), key=lambda i: sizes[i])):
        taken[i] = min(sizes[i], left // (len(sizes) - rank))
        left -= taken[i]
    return taken


def row_of(trace: Trace, name: str) -> dict:
    """An answer in the viewer's list; `name` is that of its file."""
    figures = trace.figures
    return {
        "group": name,
        "id": trace.id,
        "sample": trace.sample,
        "problem": trace.problem[:300],
        "prediction": (trace.prediction or "")[:100],
        "correct": trace.correct,
        "broken": len(trace.violations),
        "finish": trace.finish_reason,
        "tokens": figures.tokens,
        "critical": figures.critical_path,
        "width": figures.width,
        "branches": figures.branches,
        "depth": figures.depth,
    }


def pack(trace: Trace) -> str:
    """A trace for the page: JSON, gzip, base64. Numbers are made small before: log-probs in
    hundredths, steps as differences from one step per token, positions and flags as runs."""
    tree = trace.layout
    steps = np.array(trace.step, np.int64)
    begins = np.flatnonzero(np.diff(tree.positions, prepend=-2) != 1)
    edges = np.flatnonzero(np.diff(np.array(trace.forced, np.int8), prepend=0, append=0))
    values = {
        "problem": trace.problem,
        "reference": trace.reference,
        "prediction": trace.prediction,
        "correct": trace.correct,
        "violations": trace.violations,
        "finish": trace.finish_reason,
        "detail": trace.detail,
        "promptLen": trace.prompt_len,
        "ids": trace.token_ids,
        "pieces": trace.pieces,
        "logp": [round(100 * x) if math.isfinite(x) else None for x in trace.logp],
        "steps": np.diff(steps - np.arange(len(steps)), prepend=0).tolist(),
        "positions": [[int(i), int(tree.positions[i])] for i in begins],
        "forced": edges.reshape(-1, 2).tolist(),
        "blocks": [
            {
                "start": block.start,
                "fork": block.fork,
                "branches": block.branches,
                "join": block.join,
                "depth": block.depth,
            }
            | ({"scores": scores} if scores else {})
            for block, scores in zip(trace.blocks, trace.scores or repeat(None), strict=False)
            if block.branches
        ],
    }
    data = json_text(values, separators=(",", ":")).encode()  # ASCII, whatever the texts hold
    return base64.b64encode(gzip.compress(data, mtime=0)).decode()


def _num_lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(line.endswith(b"\n") for line in file)
