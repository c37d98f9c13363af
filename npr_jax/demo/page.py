"""The demo's report: a page with its table and all that reports have, and two pictures."""

import html
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

from npr_jax.base.progress import numeric
from npr_jax.demo.table import cells
from npr_jax.evaluate.traces import Trace
from npr_jax.report import html as report
from npr_jax.report.content import read
from npr_jax.report.svg import beside, chart, tree_svg
from npr_jax.runs.metrics import read_metrics

RATES_OF = ("format_rate", "accuracy")
CHARTS = (  # of curves.svg: title, run, its metrics, bounds of the y axis (None: of the data)
    ("Zero: format and accuracy of its answers", "zero", RATES_OF, (0, 1)),
    ("PAPO: format and accuracy of its answers", "papo", RATES_OF, (0, 1)),
    ("PAPO: tokens and critical path", "papo", ("response_tokens", "critical_path"), None),
)
_WORDS = """A tiny model learns to reason in parallel: Zero finds the format, Beta learns real
branches, PAPO reinforces them. Every row is measured on problems that no stage saw.
Critical path: the tokens of an answer that have to be decoded one after the other.
On a CPU this small a model is bound by compute: no wall-clock gain is claimed."""


def write_page(
    output: Path,
    about: str,
    rows: Mapping[str, Mapping[str, float]],
    shown: Trace,
    settings: Mapping[str, str],
    seconds: Mapping[str, float],
) -> None:
    """Writes index.html, curves.svg and tree.svg to `output`.

    Args:
      output: holds the stages' run directories with their metrics, and traces of answers.
      about: the task, in plain words; rows: the table's rows by name.
      shown: the answer to draw.
      settings: YAML texts by stage; seconds: wall-clock by stage.
    """
    charts = []
    for title, stage, names, bounds in CHARTS:
        metrics = read_metrics(output / stage)
        lines = {
            f"{stage} {name}".replace("_", " "): [
                (numeric(m, "step"), numeric(m, name)) for m in metrics
            ]
            for name in names
        }
        charts.append(chart(title, lines, bounds))
    tree = tree_svg(shown.pieces, shown.layout)
    (output / "curves.svg").write_text(beside(charts), encoding="utf-8")
    (output / "tree.svg").write_text(tree, encoding="utf-8")
    content = read(output)
    content.title = "npr_jax demo"
    content.settings |= settings
    times = ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items())
    content.results = {
        "device": f"{platform.platform()}. Stages: {times}.",
        "versions": {name: version(name) for name in ("jax", "flax", "optax")},
    }
    words = f"<p>{html.escape(about)}</p><p>{_WORDS}</p>"
    sections = {
        "Results": f'{words}<div class="wide">{results_table(rows)}</div>',
        "One answer as a tree": "<p>Columns run side by side, and none sees another; grey tokens "
        f'are written by the engine.</p><div class="wide">{tree}</div>',
    }
    report.write_page(output / "index.html", report.page(content, sections))


def results_table(rows: Mapping[str, Mapping[str, float]]) -> str:
    """The table of the demo as HTML: a row per model and way of decoding."""
    names = next(iter(rows.values()))
    head = "".join(f'<th scope="col">{name.replace("_", " ")}</th>' for name in names)
    body = "".join(
        f'<tr><th scope="row">{html.escape(label)}</th>'
        + "".join(f"<td>{cell}</td>" for cell in cells(row))
        + "</tr>"
        for label, row in rows.items()
    )
    return (
        '<table><thead><tr><th scope="col">model and decoding</th>'
        f"{head}</tr></thead><tbody>{body}</tbody></table>"
    )
