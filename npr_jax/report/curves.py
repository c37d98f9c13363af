"""Learning curves: every number that a run has logged, what belongs together in one chart."""

import html
import math
from collections.abc import Mapping, Sequence

import numpy as np

from npr_jax.base.progress import Scalar
from npr_jax.report.svg import chart

# (title, metrics or their prefixes, bounds of the y axis); what is in none has a chart of its own.
_CHARTS = (
    ("reward", ("reward",), None),
    ("parts of the reward", ("reward/",), None),
    ("rates", ("format_rate", "accuracy", "both_rate", "parallel_rate", "truncated"), (0, 1)),
    ("rejection sampling", ("accepted_rate", "covered_rate"), (0, 1)),
    ("tokens of an answer", ("response_tokens", "critical_path"), None),
    ("shape of an answer", ("branches", "width", "depth"), None),
    ("first block and overlap of siblings", ("block_place", "path_overlap"), (0, 1)),
    ("loss", ("loss",), None),
    ("entropy", ("entropy",), None),
    ("gradient norm", ("grad_norm",), None),
    ("gap to the sampler's log-probs", ("logp_gap", "logp_gap_max"), None),
    ("how answers finish", ("finish/",), (0, 1)),
    ("rules of the format that are broken", ("broken/",), (0, 1)),
    ("groups", ("groups", "groups_dropped", "groups_equal", "filtered"), None),
    (
        "evaluation",
        ("eval/score", "eval/baseline", "eval/best", "eval/accuracy", "eval/format_rate"),
        (0, 1),
    ),
    ("answers of the evaluation", ("eval/parallel_rate", "eval/truncated"), (0, 1)),
    ("tokens of its answers", ("eval/response_tokens", "eval/critical_path"), None),
    ("shape of its answers", ("eval/branches", "eval/width", "eval/depth"), None),
    ("first block and overlap in them", ("eval/block_place", "eval/path_overlap"), (0, 1)),
    ("evaluations", ("eval/best_step", "eval/since_best"), None),
    ("share of what the devices can do", ("mfu", "engine/occupancy", "slot_use"), (0, 1)),
    ("seconds of a step", ("rollout_seconds", "train_seconds", "seconds"), None),
    ("seconds on the critical path", ("seconds/",), None),
    ("bytes held", ("memory/",), None),
    ("the engine's counts", ("engine/",), None),
    ("share of groups without a difference", ("equal_share",), (0, 1)),
    ("share of time for rollouts", ("rollout_time_share",), (0, 1)),
    ("tokens a second", ("rollout_tokens_per_s", "train_tokens_per_s", "tokens_per_s"), None),
)
_POINTS = 300  # of a line; of longer ones neighbours are averaged


def curve_charts(curves: Mapping[str, Sequence[Mapping[str, Scalar]]]) -> str:
    """Charts as HTML, by run directory."""
    parts = []
    for name, metrics in curves.items():
        made = "".join(charts_of(metrics))
        title = f"<h3>{html.escape(name)}</h3>" if name else ""
        parts.append(f'{title}<div class="charts">{made or "<p>No step has ended yet.</p>"}</div>')
    return "".join(parts)


def charts_of(metrics: Sequence[Mapping[str, Scalar]]) -> list[str]:
    """One SVG per group of numbers that the lines have; text and what is not finite is left out."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in metrics:
        for name, value in row.items():
            if name != "step" and not isinstance(value, str) and math.isfinite(value):
                lines.setdefault(name, []).append((_number(row["step"]), value))
    charts, left = [], dict(lines)
    for title, wanted, bounds in _CHARTS:
        chosen = [
            name
            for want in wanted
            for name in sorted(left)
            if name == want or (want.endswith("/") and name.startswith(want))
        ]
        if chosen:
            labels = {_label(name): thinned(left.pop(name)) for name in chosen}
            charts.append(chart(title, labels, bounds))
    return charts + [chart(_label(name), {_label(name): thinned(x)}) for name, x in left.items()]


def thinned(line: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most 300 points, each the mean of its neighbours."""
    if len(line) <= _POINTS:
        return list(line)
    parts = np.array_split(np.array(line), _POINTS)
    means = [part.mean(axis=0) for part in parts]
    return [(float(x), float(y)) for x, y in means]


def _number(value: Scalar) -> float:
    assert not isinstance(value, str)  # steps are numbers
    return value


def _label(name: str) -> str:
    return name.replace("_", " ")
