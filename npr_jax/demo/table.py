"""How good a model is, decoded one way: the rows of the demo's table, and what they must show."""

import time
from collections.abc import Mapping, Sequence

from rich.table import Table

from npr_jax.data.problems import Problem
from npr_jax.decode import Engine, SamplingParams
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
EVALUATION = 99  # the seed path of these samples, apart from those of the stages


def evaluate(
    engine: Engine,
    problems: Sequence[Problem],
    prompts: Sequence[Sequence[int]],
    parallel: bool,
    max_tokens: int,
    seed: int,
) -> tuple[dict[str, float], list[Answer]]:
    """One answer to every problem at temperature 1: rates and means, and the answers."""
    sampling = SamplingParams(max_tokens=max_tokens, parallel=parallel)
    references, seeds = [p.answer for p in problems], (seed, EVALUATION)
    engine.warmup()
    steps, begun = engine.stats()["decode_steps"], time.perf_counter()
    answers = roll_out(engine, prompts, references, sampling, seeds)
    seconds = time.perf_counter() - begun
    steps = engine.stats()["decode_steps"] - steps
    means = summary(list(answers.values()))
    row = {column: means[metric] for column, metric in (RATES | MEANS).items()}
    return row | {"decode_steps": steps, "seconds": seconds}, list(answers.values())


# (what it shows, measured from the rows by name, at least)
CHECKS = (
    (
        "Zero raises the format rate",
        lambda r: r["zero sequential"]["format"] - r["seed sequential"]["format"],
        0.3,
    ),
    (
        "Zero raises the accuracy",
        lambda r: r["zero sequential"]["accuracy"] - r["seed sequential"]["accuracy"],
        0.1,
    ),
    (
        "Zero, decoded in parallel, loses half of its accuracy",
        lambda r: 0.5 * r["zero sequential"]["accuracy"] - r["zero parallel"]["accuracy"],
        0.0,
    ),
    ("Beta, in parallel, keeps the format", lambda r: r["beta parallel"]["format"], 0.95),
    (
        "Beta, in parallel, is as accurate as Zero",
        lambda r: r["beta parallel"]["accuracy"] - r["zero sequential"]["accuracy"],
        -0.03,
    ),
    (
        "PAPO adds accuracy",
        lambda r: r["papo parallel"]["accuracy"] - r["beta parallel"]["accuracy"],
        0.05,
    ),
    ("Beta runs in parallel", lambda r: r["beta parallel"]["parallel"], 0.99),
    ("PAPO runs in parallel", lambda r: r["papo parallel"]["parallel"], 0.99),
    (
        "The critical path is short (share of tokens saved)",
        lambda r: 1 - r["papo parallel"]["critical_path"] / r["papo parallel"]["tokens"],
        0.2,
    ),
)


def shortfalls(rows: dict[str, dict[str, float]]) -> list[str]:
    """What the demo should show and these rows do not, a sentence each."""
    return [
        f"{name}: {measure(rows):.3f}, needed is {least} or more"
        for name, measure, least in CHECKS
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
    """The figures of a row as text: rates with two digits, the others whole."""
    return [f"{value:.2f}" if name in RATES else f"{value:.0f}" for name, value in row.items()]
