"""The demo's report: one self-contained HTML file with table, curves, a tree and the settings."""

import html
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

from npr_jax.demo.evaluate import RATES
from npr_jax.metrics import read_metrics
from npr_jax.report.svg import beside, chart, tree_svg
from npr_jax.tree import TagIds

RATES_OF = ("format_rate", "accuracy")
CHARTS = (  # title, runs, metrics of each, bounds of the y axis (None: those of the data)
    ("Zero: format and accuracy of its answers", ("zero",), RATES_OF, (0, 1)),
    ("PAPO: format and accuracy of its answers", ("papo",), RATES_OF, (0, 1)),
    ("PAPO: tokens and critical path", ("papo",), ("response_tokens", "critical_path"), None),
    ("reward", ("zero", "papo"), ("reward",), None),
    ("entropy", ("zero", "papo"), ("entropy",), None),
    ("loss", ("seed", "beta/fit"), ("loss",), None),
)

_STYLE = """
:root { color-scheme: light dark; --line: #8886; --soft: #8882; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 62rem; padding: 0 1rem; }
table { border-collapse: collapse; } td, th { padding: .25rem .7rem; text-align: right; }
th:first-child, td:first-child { text-align: left; } tr { border-bottom: 1px solid var(--line); }
.wide { overflow-x: auto; } .charts { display: flex; flex-wrap: wrap; gap: 1rem; }
svg { max-width: 100%; height: auto; }
pre { background: var(--soft); padding: .6rem; overflow: auto; }
"""


def write_report(
    output: Path,
    rows: Mapping[str, Mapping[str, float]],
    shown: Mapping,
    tags: TagIds,
    settings: Mapping[str, str],
    seconds: Mapping[str, float],
) -> None:
    """Writes index.html, curves.svg and tree.svg to `output`.

    Args:
      output: holds the stages' run directories with their metrics.
      rows: the table's rows by name.
      shown: {"ids", "prompt_len"} of the answer to draw.
      settings: YAML texts by stage; seconds: wall-clock by stage.
    """
    charts = []
    for title, stages, names, bounds in CHARTS:
        lines = {}
        for stage in stages:
            metrics = read_metrics(output / stage)
            for name in names:
                points = [(m["step"], m[name]) for m in metrics if name in m]
                if points:
                    lines[f"{stage.split('/')[0]} {name}".replace("_", " ")] = points
        charts.append(chart(title, lines, bounds))
    tree = tree_svg(shown["ids"], shown["prompt_len"], tags)
    (output / "curves.svg").write_text(beside(charts[:3]), encoding="utf-8")
    (output / "tree.svg").write_text(tree, encoding="utf-8")
    versions = ", ".join(f"{name} {version(name)}" for name in ("jax", "flax", "optax"))
    times = ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items())
    text = "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8"/>',
            '<meta name="viewport" content="width=device-width"/><title>npr_jax demo</title>',
            f"<style>{_STYLE}</style></head><body><h1>npr_jax demo</h1>",
            "<p>A tiny model learns to reason in parallel: Zero finds the format, Beta learns real",
            "branches, PAPO reinforces them. Every row is measured on problems that no stage saw.",
            "Critical path: the tokens of an answer that have to be decoded one after the other.",
            "On a CPU this small a model is bound by compute: no wall-clock gain is claimed.</p>",
            f'<div class="wide">{_html_table(rows)}</div>',
            "<h2>Learning curves</h2>",
            f'<div class="charts">{"".join(charts)}</div>',
            "<h2>One answer as a tree</h2><p>Columns run side by side, and none sees another;",
            "grey tokens are written by the engine.</p>",
            f'<div class="wide">{tree}</div>',
            "<h2>Settings</h2>",
            f"<p>{html.escape(platform.platform())}, {versions}. Stages: {times}.</p>",
            *(
                f"<details><summary>{name}</summary><pre>{html.escape(text)}</pre></details>"
                for name, text in settings.items()
            ),
            "</body></html>",
        ]
    )
    (output / "index.html").write_text(text, encoding="utf-8")


def _html_table(rows) -> str:
    names = list(next(iter(rows.values())))
    head = "".join(f"<th>{name.replace('_', ' ')}</th>" for name in names)
    body = "".join(
        f"<tr><td>{html.escape(label)}</td>"
        + "".join(f"<td>{row[name]:{'.2f' if name in RATES else '.0f'}}</td>" for name in names)
        + "</tr>"
        for label, row in rows.items()
    )
    return f"<table><tr><th>model and decoding</th>{head}</tr>{body}</table>"
