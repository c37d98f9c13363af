"""results.json of an evaluation, and the tables that are shown of it."""

import importlib.metadata
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from rich.box import SIMPLE_HEAD
from rich.table import Table

from npr_jax.base.config import dump_config
from npr_jax.base.files import json_text, read_text, whole_lines, write_atomically
from npr_jax.base.mesh import describe
from npr_jax.data.benchmarks import Source
from npr_jax.evaluate.judge import Figures
from npr_jax.evaluate.statistics import Timing, speeds, summarize

TIMING = "timing.jsonl"  # a line for each answer: run, seconds since the one before, tokens
_BOUNDS = ("low", "high")  # of a metric's interval
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
    earlier = read_results(path) if path.exists() else {}
    return {
        "settings": yaml.safe_load(dump_config(config)),
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "device": describe(None),
        "benchmarks": earlier.get("benchmarks", {}),
    }


def read_results(path: Path) -> dict:
    """What a results.json holds. Raises ValueError with the file where it is no such file."""
    text = read_text(path, "results.json of `npr-jax eval`")
    try:
        results = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if fault := _fault(results):
        raise ValueError(f"{path} is no results.json of `npr-jax eval`: {fault}")
    return results


def _fault(results: Any) -> str | None:
    """What is wrong with what a results.json holds."""
    if not isinstance(results, dict):
        return f"it holds {type(results).__name__}, needed is an object"
    benchmarks = results.get("benchmarks", {})
    for name, found in (("benchmarks", benchmarks), ("versions", results.get("versions", {}))):
        if not isinstance(found, dict):
            return f"{name} is {type(found).__name__}, needed is an object"
    for name, entry in benchmarks.items():
        metrics = entry.get("metrics") if isinstance(entry, dict) else None
        if not isinstance(metrics, dict):
            return f"benchmarks.{name} has no object metrics"
        for key in ("problems", "samples"):
            if type(entry.get(key)) is not int:
                return f"benchmarks.{name}.{key} is {entry.get(key)!r:.40}, needed is an integer"
        for key, metric in metrics.items():
            parts = isinstance(metric, dict) and set(metric) in ({"value"}, {"value", *_BOUNDS})
            if not parts or not all(map(_is_figure, metric.values())):
                found = f"benchmarks.{name}.metrics.{key} is {metric!r:.60}"
                return f"{found}, needed are numbers: value, or value, low and high"
    return None


def _is_figure(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and abs(value) < 1e300)


def sum_up(
    results: dict,
    output: Path,
    runs: Sequence[Run],
    answers: Sequence[dict[tuple[str, int], Figures]],
    samples: int,
    probes: dict | None = None,
) -> None:
    """Enters a benchmark into the results, and writes them. `runs` are the benchmark and, if there
    is one, its sequential baseline; `answers` have the figures of theirs by (id, sample); `probes`:
    what was seen of them on the way, if they were probed."""
    timings = [_timing(output, run) for run in runs]
    problems = [
        [[done[id, i] for i in range(samples)] for id in run.prompts]
        for run, done in zip(runs, answers, strict=True)
    ]
    for number, run in enumerate(runs):
        # The benchmark itself is compared with its baseline.
        baseline = (problems[1], timings[1]) if number == 0 and len(runs) > 1 else (None, None)
        results["benchmarks"][run.name] = {
            "problems": len(run.prompts),
            "samples": samples,
            "origin": run.source.origin,
            "parallel": run.parallel,
            "metrics": summarize(problems[number], baseline[0])
            | speeds(timings[number], baseline[1]),
            "timing": timings[number]._asdict(),
            "by_problem": [
                {"id": id, "correct": sum(a.right for a in group), "samples": samples}
                for id, group in zip(run.prompts, problems[number], strict=True)
            ],
        }
    if probes is not None:
        results["benchmarks"][runs[0].name]["probes"] = probes
    write_atomically(output / "results.json", json_text(results, indent=1).encode())


def _timing(output: Path, run: Run) -> Timing:
    """What all processes that have decoded the run took together."""
    total, path = Timing(), output / TIMING
    if path.exists():
        for _, (name, timing) in whole_lines(path, "timing.jsonl of an evaluation", _timed):
            if name == run.name:
                total += timing
    return total


def _timed(record: dict) -> tuple[str, Timing]:
    seconds, tokens = record["seconds"], record["tokens"]
    if None in (seconds, tokens) or not (_is_figure(seconds) and _is_figure(tokens)):
        raise ValueError(f"seconds is {seconds!r:.60} and tokens {tokens!r:.60}, no numbers")
    return record["run"], Timing(seconds, 1, tokens)


def tables(results: dict) -> list[Table]:
    """What is looked at first, a row for each run: how good the answers are, and how fast."""
    good = _table(
        results,
        "n problems, k answers to each; rates in percent",
        {  # heading: metric
            "avg@k [95%]": "avg@{k}",
            "best@k": "best@{k}",
            "maj@k": "maj@{k}",
            "format": "format_rate",
            "parallel": "parallel_rate",
            "cut off": "truncated_rate",
        },
        100,
        1,
    )
    fast = _table(
        results,
        "speed-ups: critical path, and against the sequential run tokens/s and wall-clock",
        {
            "tokens": "tokens",
            "critical": "critical_path",
            "tokens/s": "tokens_per_s",
            "path x": "speedup_critical_path",
            "tokens/s x": "speedup_tokens_per_s",
            "clock x": "speedup_wall_clock",
        },
        1,
        2,
    )
    branches = _table(
        results,
        "place of the first block; overlap of siblings; speed-ups in token latency",
        {
            "blocks": "blocks",
            "branches": "branches",
            "place": "block_place",
            "overlap": "path_overlap",
            "latency x": "speedup_token_latency",
            "right x": "speedup_token_latency_correct",
        },
        1,
        2,
    )
    return [good, fast, branches]


def _table(results: dict, caption: str, columns: dict, scale: float, digits: int) -> Table:
    table = Table(caption=caption, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), caption_justify="left")
    table.add_column("benchmark", overflow="fold")
    for heading in ("n", "k", *columns):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, entry in results["benchmarks"].items():
        cells = [str(entry["problems"]), str(entry["samples"])]
        for heading, metric in columns.items():
            found = entry["metrics"].get(metric.format(k=entry["samples"]), {})
            value, *bounds = (found.get(part) for part in ("value", *_BOUNDS))
            ends = [f"{scale * bound:.{digits}f}" for bound in bounds if bound is not None]
            cells.append("-" if value is None else f"{scale * value:.{digits}f}")
            if "[" in heading and len(set(ends)) > 1:  # of no width, it is the number itself
                cells[-1] += f" [{', '.join(ends)}]"
        table.add_row(name.replace(".sequential", " seq"), *cells)
    return table
