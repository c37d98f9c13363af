"""How good a model is, decoded one way: the rows of the demo's table, and what they must show."""

import time
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from rich.table import Table

from npr_jax.answers import equal
from npr_jax.answers.check import Check
from npr_jax.decode import Engine, SamplingParams
from npr_jax.demo.task import Posed, Rows
from npr_jax.evaluate.judge import Answer
from npr_jax.train.rollout import roll_out, summary

MODES = ("sequential", "parallel")
# column: the metric of a rollout batch that it shows
RATES = {
    "format": "format_rate",
    "accuracy": "accuracy",
    "both": "both_rate",
    "parallel": "parallel_rate",
}
MEANS = {"tokens": "response_tokens", "critical_path": "critical_path"}
WHOLE = (*MEANS, "decode_steps", "seconds")
NO_MORE: Mapping[str, str] = MappingProxyType({})
EVALUATION = 99  # the seed path of these samples, apart from those of the stages


def evaluate(
    engine: Engine,
    problems: Sequence[Posed],
    prompts: Sequence[Sequence[int]],
    parallel: bool,
    max_tokens: int,
    seed: int,
    check: Check = equal,
    columns: Mapping[str, str] = NO_MORE,
) -> tuple[dict[str, float], list[Answer]]:
    """One answer to every problem at temperature 1: rates and means, of further `columns` as well,
    and the answers."""
    sampling = SamplingParams(max_tokens=max_tokens, parallel=parallel)
    references, seeds = [p.answer for p in problems], (seed, EVALUATION)
    engine.warmup()
    steps, begun = engine.stats()["decode_steps"], time.perf_counter()
    answers = roll_out(engine, prompts, references, sampling, seeds, check=check)
    seconds = time.perf_counter() - begun
    steps = engine.stats()["decode_steps"] - steps
    means = summary(list(answers.values()))
    row = {column: means[metric] for column, metric in {**RATES, **MEANS, **columns}.items()}
    return row | {"decode_steps": steps, "seconds": seconds}, list(answers.values())


def shortfalls(
    rows: Rows, checks: Sequence[tuple[str, Callable[[Rows], float], float]]
) -> list[str]:
    """What the demo should show (`Task.CHECKS`) and these rows do not, a sentence each."""
    return [
        f"{name}: {measure(rows):.3f}, needed is {least} or more"
        for name, measure, least in checks
        if measure(rows) < least
    ]


def table(rows: dict[str, dict[str, float]], num: int) -> Table:
    """The rows for a terminal; `num` is the number of problems."""
    made = Table(
        title=f"{num} fresh problems, one sampled answer each",
        box=None,  # 80 columns are just enough
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    for title in ("model", "decoded"):
        made.add_column(title, vertical="bottom")
    for title in next(iter(rows.values())):
        made.add_column(title.replace("_", "\n"), justify="right", vertical="bottom")
    for name, row in rows.items():
        made.add_row(*name.split(), *cells(row))
    return made


def cells(row: Mapping[str, float]) -> list[str]:
    """The figures of a row as text: counts and seconds whole, the others with two digits."""
    return [f"{value:.0f}" if name in WHOLE else f"{value:.2f}" for name, value in row.items()]
