"""What an evaluation reports of the figures of its answers: pure functions on the host.

    figures of the answers to each problem --summarize--> {metric: value, low, high}

Every metric is a sum over the problems divided by another, so that one bootstrap over problems
serves all of them. Definitions: docs/metrics.md.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from npr_jax.answers import equal
from npr_jax.evaluate.judge import Figures

RESAMPLES, LEVEL = 10_000, 0.95


class Timing(NamedTuple):
    """Wall-clock seconds of decoding, and what was decoded in them."""

    seconds: float = 0.0
    answers: int = 0
    tokens: int = 0

    def __add__(self, other: "Timing") -> "Timing":
        return Timing(
            self.seconds + other.seconds, self.answers + other.answers, self.tokens + other.tokens
        )


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Unbiased estimate of the chance that one of k answers is right (Chen et al. 2021), from
    `correct` right ones among `samples`. ValueError for k > samples."""
    if not 1 <= k <= samples:
        raise ValueError(f"k is {k}, needed is 1 to {samples} (samples)")
    return 1 - math.comb(samples - correct, k) / math.comb(samples, k)


def majority(
    predictions: Sequence[str | None],
    correct: Sequence[bool],
    same: Callable[[str, str], bool] = equal,
    weights: Sequence[float] | None = None,
) -> float:
    """1 if the answer given most often is right, else 0; of t answers given equally often each
    counts 1/t. None gives no vote; without votes it is 0. With `weights`, none below 0, votes count
    so much each.

    Predictions go, in order, to the first group whose first member is `same`; a group is right if
    that member is.
    """
    groups: list[list] = []  # [first member, is it right, votes]
    counts = [1] * len(predictions) if weights is None else weights
    for prediction, right, weight in zip(predictions, correct, counts, strict=True):
        if prediction is None:
            continue
        group = next((g for g in groups if g[0] == prediction or same(prediction, g[0])), None)
        if group is None:
            groups.append(group := [prediction, right, 0])
        group[2] += weight
    most = max((votes for _, _, votes in groups), default=0)
    winners = [right for _, right, votes in groups if votes == most]
    return sum(winners) / len(winners) if winners else 0.0


def bootstrap(
    top: np.ndarray, bottom: np.ndarray, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Percentile intervals (95%) of M ratios of sums over P problems, resampled together.

    Args:
      top, bottom: f64[P, M]; ratio m is top[:, m].sum() / bottom[:, m].sum().

    Returns the bounds low f64[M], high f64[M]; a resample whose bottom is 0 counts for nothing.
    """
    rng, num = np.random.default_rng(seed), len(top)
    # So few rows at a time that they stay in the cache, and BLAS on one thread.
    ratios, chunk = [], max(1, 100_000 // top.size)
    for first in range(0, resamples, chunk):
        rows = min(chunk, resamples - first)
        drawn = rng.integers(num, size=(rows, num)) + num * np.arange(rows)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=rows * num).reshape(rows, num)
        counts = counts.astype(np.float64)
        with np.errstate(invalid="ignore"):  # 0 / 0
            ratios.append((counts @ top) / (counts @ bottom))
    edge = (1 - LEVEL) / 2
    low, high = np.nanquantile(np.concatenate(ratios), [edge, 1 - edge], axis=0)
    return low, high


def summarize(
    problems: Sequence[Sequence[Figures]], sequential: Sequence[Sequence[Figures]] | None = None
) -> dict[str, dict[str, float]]:
    """Every metric that needs no clock, {"value", "low", "high"} each; no bounds for one problem.
    One that no answer has is missing.

    Args:
      problems: the figures of the answers to each problem, the same number k for all.
      sequential: the same of a sequential run, for the speed-ups against it.
    """
    k = len(problems[0])
    if any(len(answers) != k for answers in problems):
        raise ValueError(
            f"problems have {sorted(set(map(len, problems)))} answers: one number only"
        )
    columns: dict[str, list[tuple[float, float]]] = {}  # a pair (top, bottom) for each problem

    def add(name: str, value: Callable[[Sequence[Figures]], float], per=lambda answers: 1) -> None:
        columns[name] = [(value(answers), per(answers)) for answers in problems]

    def total(field: str) -> Callable[[Sequence[Figures]], int]:
        return lambda answers: sum(getattr(answer, field) for answer in answers)

    def share(field: str) -> None:
        add(names.get(field, field), total(field), len)

    names = {"correct": f"avg@{k}", "formed": "format_rate", "truncated": "truncated_rate"}
    right = total("correct")
    share("correct")
    for j in (1 << i for i in range(k.bit_length())):
        add(f"pass@{j}", lambda answers, j=j: pass_at_k(k, right(answers), j))
    add(f"best@{k}", lambda answers: float(right(answers) > 0))
    add(
        f"maj@{k}",
        lambda answers: majority([a.prediction for a in answers], [a.right for a in answers]),
    )
    if all(answer.score is not None for answers in problems for answer in answers):
        add(f"weighted@{k}", _weighted)
    share("formed")
    add("parallel_rate", lambda answers: sum(a.parallel for a in answers), len)
    add("parallel_token_share", total("parallel_tokens"), total("tokens"))
    for field in ("blocks", "branches", "depth", "width", "tokens", "critical_path", "truncated"):
        share(field)
    add("speedup_critical_path", total("tokens"), total("critical_path"))

    # By themselves, for the last bits of an interval depend on what is resampled beside it.
    partial = {
        name: [_known(answers, name) for answers in problems]
        for name in ("block_place", "path_overlap")
    }
    if sequential is not None:
        pairs = list(zip(problems, sequential, strict=True))
        right_pairs = [tuple([a for a in answers if a.right] for answers in pair) for pair in pairs]
        partial["speedup_token_latency"] = [_token_latency(*pair) for pair in pairs]
        partial["speedup_token_latency_correct"] = [_token_latency(*pair) for pair in right_pairs]
    return _ratios(columns) | _ratios(partial)


def _weighted(answers: Sequence[Figures]) -> float:
    """The vote of answers with a score each, which it counts by."""
    weights = [answer.score or 0.0 for answer in answers]
    return majority([a.prediction for a in answers], [a.right for a in answers], weights=weights)


def _known(answers: Sequence[Figures], name: str) -> tuple[float, int]:
    """Sum and number of a figure that some of the answers have."""
    values = [value for answer in answers if (value := getattr(answer, name)) is not None]
    return sum(values), len(values)


def _token_latency(own: Sequence[Figures], sequential: Sequence[Figures]) -> tuple[float, int]:
    """A problem's mean critical path in the sequential run by that in this one; nothing where one
    of them has no answers."""
    ours, theirs = ([answer.critical_path for answer in run] for run in (own, sequential))
    if not (sum(ours) and sum(theirs)):
        return 0.0, 0
    return float(np.mean(theirs) / np.mean(ours)), 1


def _ratios(columns: Mapping[str, Sequence[tuple[float, float]]]) -> dict[str, dict[str, float]]:
    """Metrics from their pairs (top, bottom) for each problem: ratios of the sums, with bounds
    where there are several problems, and without those whose bottom is 0."""
    columns = {name: pairs for name, pairs in columns.items() if any(low for _, low in pairs)}
    if not columns:
        return {}
    pairs = np.array(list(columns.values()), float)  # [M, P, 2]
    top, bottom = pairs[..., 0].T, pairs[..., 1].T
    values = top.sum(0) / bottom.sum(0)
    found = {name: {"value": float(x)} for name, x in zip(columns, values, strict=True)}
    if len(top) > 1:
        for bounds, low, high in zip(found.values(), *bootstrap(top, bottom), strict=True):
            bounds |= {"low": float(low), "high": float(high)}
    return found


def speeds(own: Timing, sequential: Timing | None = None) -> dict[str, dict[str, float]]:
    """The metrics that need a clock: tokens/s, and the two speed-ups against a sequential run."""
    found = {}
    if own.seconds:
        found["tokens_per_s"] = own.tokens / own.seconds
    if own.seconds and sequential and sequential.seconds:
        rate = sequential.tokens / sequential.seconds
        found["speedup_tokens_per_s"] = found["tokens_per_s"] / rate
        found["speedup_wall_clock"] = (sequential.seconds / sequential.answers) / (
            own.seconds / own.answers
        )
    return {name: {"value": value} for name, value in found.items()}
