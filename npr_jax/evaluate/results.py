"""results.json of an evaluation, and the table that is shown of it."""

import importlib.metadata
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import yaml
from rich.table import Table

from npr_jax.config import dump_config
from npr_jax.evaluate.benchmarks import Source
from npr_jax.evaluate.metrics import Answer, Timing, speeds, summarize
from npr_jax.files import write_atomically
from npr_jax.mesh import describe

TIMING = "timing.jsonl"  # a line for each answer: run, seconds since the one before, tokens
_PACKAGES = ("jax", "jaxlib", "numpy", "transformers", "math-verify")


class Run(NamedTuple):
    """One benchmark decoded one way; files have its `name`. `prompts` are token ids by id."""

    name: str
    source: Source
    parallel: bool
    prompts: dict[str, list[int]]


def begin(output: Path, config) -> dict:
    """The results of an evaluation with what earlier calls have summed up in `output`."""
    path = output / "results.json"
    earlier = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return {
        "settings": yaml.safe_load(dump_config(config)),
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "device": describe(None),
        "benchmarks": earlier.get("benchmarks", {}),
    }


def sum_up(
    results: dict,
    output: Path,
    runs: Sequence[Run],
    answers: Sequence[dict[tuple[str, int], Answer]],
    samples: int,
) -> None:
    """Enters a benchmark into the results, and writes them. `runs` are the benchmark and, if there
    is one, its sequential baseline; `answers` have their answers by (id, sample)."""
    timings = [_timing(output, run) for run in runs]
    baseline = timings[1] if len(runs) > 1 else None
    for run, done, timing in zip(runs, answers, timings, strict=True):
        problems = [[done[id, i] for i in range(samples)] for id in run.prompts]
        compared = baseline if run is runs[0] else None
        results["benchmarks"][run.name] = {
            "problems": len(problems),
            "samples": samples,
            "origin": run.source.origin,
            "parallel": run.parallel,
            "metrics": summarize(problems) | speeds(timing, compared),
            "timing": timing._asdict(),
            "by_problem": [
                {"id": group[0].id, "correct": sum(a.correct for a in group), "samples": samples}
                for group in problems
            ],
        }
    write_atomically(output / "results.json", json.dumps(results, indent=1).encode())


def _timing(output: Path, run: Run) -> Timing:
    """What all processes that have decoded the run took together."""
    total, path = Timing(), output / TIMING
    if path.exists():
        for line in path.read_bytes().split(b"\n")[:-1]:
            record = json.loads(line)
            if record["run"] == run.name:
                total += Timing(record["seconds"], 1, record["tokens"])
    return total


def table(results: dict) -> Table:
    """A row for each benchmark with the metrics that are looked at first."""
    columns = {  # heading: (metric, format)
        "avg@k [95%]": ("avg@{k}", "{:.1%}"),
        "best@k": ("best@{k}", "{:.1%}"),
        "maj@k": ("maj@{k}", "{:.1%}"),
        "format": ("format_rate", "{:.1%}"),
        "parallel": ("parallel_rate", "{:.1%}"),
        "tokens": ("tokens", "{:.0f}"),
        "critical": ("critical_path", "{:.0f}"),
        "tokens/s": ("tokens_per_s", "{:.0f}"),
        "speed-up*": (
            ("speedup_tokens_per_s", "speedup_critical_path", "speedup_wall_clock"),
            "{:.2f}",
        ),
    }
    shown = Table(caption="* tokens/s, critical path, wall-clock (docs/metrics.md)")
    shown.add_column("benchmark")
    for heading in ("problems", "k", *columns):
        shown.add_column(heading, justify="right")
    for name, entry in results["benchmarks"].items():
        metrics, cells = entry["metrics"], []
        for metric, form in columns.values():
            names = [metric.format(k=entry["samples"])] if isinstance(metric, str) else metric
            values = [metrics.get(name) for name in names]
            cells.append(" ".join(form.format(v["value"]) if v else "-" for v in values))
        bounds = metrics[f"avg@{entry['samples']}"]
        if "low" in bounds:
            cells[0] += f" [{bounds['low']:.1%}, {bounds['high']:.1%}]".replace("%", "")
        shown.add_row(name, str(entry["problems"]), str(entry["samples"]), *cells)
    return shown
