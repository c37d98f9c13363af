"""What is wrong with a run, told from its metrics alone.

A rule compares the mean of the last lines (at most five) that have a metric with a limit, or with
the mean of as many at the beginning, or with the best such mean so far. The limits are rough, for a
look at the run; nothing stops by them.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from npr_jax.base.progress import Scalar
from npr_jax.report.content import read_curves

WINDOW = 5  # lines of which a mean is taken
MOST_GAP = 0.05  # nats, the default of train.gap_warn
MOST_TRUNCATED, MOST_EQUAL = 0.3, 0.8
LEAST_ENTROPY, LEAST_WIDTH, LEAST_FORMAT = 0.1, 0.5, 0.5  # of the beginning; of the best


class Alarm(NamedTuple):
    """What is wrong, at which step it was last seen, and the figures that say so."""

    name: str
    step: int
    text: str


def alarms(metrics: Sequence[Mapping[str, Scalar]]) -> list[Alarm]:
    """The alarms of a run's lines of metrics, which are in order of their steps."""
    found = [
        _fall(metrics, "entropy", "collapse of entropy", LEAST_ENTROPY, best=False),
        _width(metrics),
        _fall(metrics, "format_rate", "collapse of format", LEAST_FORMAT),
        _rise(metrics, "logp_gap", "gap to the sampler's log-probs", MOST_GAP),
        _rise(metrics, "equal_share", "groups without a difference", MOST_EQUAL),
        _rise(metrics, "truncated", "truncated answers", MOST_TRUNCATED),
        _evaluation(metrics),
        _nonfinite(metrics),
    ]
    return [alarm for alarm in found if alarm]


def alarm_lines(directory: str | Path) -> list[str]:
    """The alarms of the runs in a directory, a line each."""
    return [
        f"ALARM {f'{name}: ' if name else ''}{alarm.name}, step {alarm.step}: {alarm.text}"
        for name, metrics in read_curves(Path(directory)).items()
        for alarm in alarms(metrics)
    ]


def _line(metrics: Sequence[Mapping[str, Scalar]], name: str) -> list[tuple[int, float]]:
    """(step, value) of a metric where it is a finite number."""
    found = []
    for row in metrics:
        step, value = row["step"], row.get(name)
        if isinstance(value, (int, float)) and math.isfinite(value):
            found.append((int(step), float(value)))
    return found


def _means(line: Sequence[tuple[int, float]]) -> list[float]:
    """The means of all windows, the first and the last lines together at least; shorter lines have
    windows of half their length, so that there is something to compare."""
    size = max(1, min(WINDOW, len(line) // 2))
    values = [value for _, value in line]
    return [sum(values[i : i + size]) / size for i in range(len(values) - size + 1)]


def _fall(metrics, name: str, title: str, share: float, best: bool = True) -> Alarm | None:
    """Below `share` of the best mean so far, or of the first one."""
    line = _line(metrics, name)
    means = _means(line)
    if len(line) < 2:
        return None
    before, which = (max(means), "was at best") if best else (means[0], "began with")
    if before > 0 and means[-1] < share * before:
        return Alarm(title, line[-1][0], f"{name} {which} {before:.3g}, is {means[-1]:.3g}")
    return None


def _rise(metrics, name: str, title: str, most: float) -> Alarm | None:
    line = _line(metrics, name)
    if line and (now := _means(line)[-1]) > most:
        return Alarm(title, line[-1][0], f"{name} is {now:.3g}, more than {most:g}")
    return None


def _width(metrics) -> Alarm | None:
    """Width is 1 for plain text: what counts is how far above that it is."""
    beyond = [{"step": step, "width": width - 1} for step, width in _line(metrics, "width")]
    found = _fall(beyond, "width", "collapse of width", LEAST_WIDTH)
    if found is None or max(_means(_line(beyond, "width"))) < 0.2:
        return None  # hardly anything forked before, either
    means = [1 + mean for mean in _means(_line(beyond, "width"))]
    return found._replace(text=f"width was at best {max(means):.3g}, is {means[-1]:.3g}")


def _evaluation(metrics) -> Alarm | None:
    line, baseline = _line(metrics, "eval/score"), _line(metrics, "eval/baseline")
    if line and baseline and line[-1][1] < baseline[-1][1]:
        text = f"eval/score is {line[-1][1]:.3g}, was {baseline[-1][1]:.3g} before the first step"
        return Alarm("worse than at the beginning", line[-1][0], text)
    return None


def _nonfinite(metrics) -> Alarm | None:
    bad = [step for step, value in _line(metrics, "nonfinite") if value]
    if bad:
        text = f"{len(bad)} of {len(metrics)} steps had an update that was not finite"
        return Alarm("not finite", bad[-1], text)
    return None
