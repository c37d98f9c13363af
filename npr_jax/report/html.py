"""A report as one index.html that fetches nothing: tables, charts, settings, and a viewer.

Answers are packed one by one into the page, and unpacked by the viewer when they are opened. All
text of a model reaches the page as JSON in ASCII; what stands in the HTML itself is escaped.
"""

import html
import json
import math
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path

import numpy as np

from npr_jax.base.files import json_text, write_atomically, writing
from npr_jax.base.progress import Scalar
from npr_jax.evaluate.judge import Figures
from npr_jax.report.alarms import alarms
from npr_jax.report.content import Content, read
from npr_jax.report.curves import curve_charts
from npr_jax.report.lines import visible
from npr_jax.report.svg import Point, chart, histogram, nice_step

# Not even a script that got into the page could send anything anywhere.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
_BASELINE = ".sequential"  # how files of a sequential baseline end
_BINS = 8  # of the charts of accuracy and of lengths


def write(directory: str | Path, most: int = 1000) -> Path:
    """Writes `directory`/index.html about what is there (`content.read`); returns its path."""
    return write_page(Path(directory) / "index.html", page(read(directory, most)))


def write_page(path: Path, text: str) -> Path:
    """Puts a page where it belongs, as a whole."""
    with writing(path, "make room there, or report on a copy of the directory"):
        write_atomically(path, text.encode())
    return path


def page(content: Content, sections: Mapping[str, str] | None = None) -> str:
    """The page; `sections` are further ones by their titles, as HTML, before all others."""
    found = dict(sections or {})
    if content.results and "benchmarks" in content.results:
        found["Summary"] = summary_table(content.results["benchmarks"])
    elif content.figures and not content.curves:
        found["Summary"] = (
            "<p>There is no results.json yet: this is what the answers so far tell.</p>"
        )
    if content.curves:
        found["Alarms"] = alarm_list(content.curves)
        found["Learning curves"] = curve_charts(content.curves)
    elif content.figures:
        found["Answers in figures"] = answer_charts(content.figures)
    if content.packed:
        found["Answers"] = viewer(content)
    found["Settings"] = settings(content)
    names = {title: title.lower().replace(" ", "-") for title in found}
    links = "".join(f'<a href="#{name}">{title}</a>' for title, name in names.items())
    body = "".join(
        f'<section id="{names[title]}"><h2>{title}</h2>{inside}</section>'
        for title, inside in found.items()
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(content.title)} · npr_jax</title><style>{_asset('viewer.css')}</style>"
        f'</head><body><header class="top"><h1>{escape(content.title)}</h1>'
        f"<nav>{links}</nav></header><main>{body}</main></body></html>\n"
    )


def alarm_list(curves: Mapping[str, Sequence[Mapping[str, Scalar]]]) -> str:
    """What is wrong with runs, by their directories, or that nothing is."""
    items = [
        f"<li><strong>{escape(f'{name}: ' if name else '')}{escape(alarm.name)}</strong>, step "
        f"{alarm.step}: {escape(alarm.text)}</li>"
        for name, metrics in curves.items()
        for alarm in alarms(metrics)
    ]
    if not items:
        return "<p>None.</p>"
    return f'<ul class="alarms">{"".join(items)}</ul>'


def escape(text: str) -> str:
    """Text for HTML, whatever it holds."""
    return html.escape(visible(text))


def summary_table(benchmarks: Mapping[str, Mapping]) -> str:
    """A row per metric, a column per benchmark, intervals below the values."""
    names = dict.fromkeys(name for b in benchmarks.values() for name in b["metrics"])
    rows = {
        "problems": [f"{found['problems']:,}" for found in benchmarks.values()],
        "samples": [str(found["samples"]) for found in benchmarks.values()],
    } | {
        name: [_measured(found["metrics"].get(name)) for found in benchmarks.values()]
        for name in names
    }
    heads = "".join(f'<th scope="col">{escape(benchmark)}</th>' for benchmark in benchmarks)
    body = "".join(
        f'<tr><th scope="row">{escape(name.replace("_", " "))}</th>'
        + "".join(f"<td>{cell}</td>" for cell in cells)
        + "</tr>"
        for name, cells in rows.items()
    )
    return (
        '<div class="wide" tabindex="0" role="region" aria-label="Summary"><table><thead><tr>'
        f"<td></td>{heads}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _measured(metric: Mapping | None) -> str:
    if metric is None or metric.get("value") is None:
        return "–"
    value, bounds = number(metric["value"]), [metric.get("low"), metric.get("high")]
    ends = [number(bound) for bound in bounds if bound is not None]
    # Of no width, the interval is the one number that stands there already.
    return f"{value}<small>{' to '.join(ends)}</small>" if len(set(ends)) > 1 else value


def number(value: float) -> str:
    """Three digits that count, or all of a whole number."""
    if value == int(value) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3f}" if abs(value) < 1 else f"{value:.3g}"


def answer_charts(figures: Mapping[str, Sequence[Figures]]) -> str:
    """Accuracy against tokens, lengths and widths, a row of charts per benchmark."""
    parts = []
    names = dict.fromkeys(name.removesuffix(_BASELINE) for name in figures)
    for number, name in enumerate(names):
        found = {
            label: figures[key]
            for label, key in (("parallel", name), ("sequential", name + _BASELINE))
            if figures.get(key)
        }
        if not found:
            continue
        everything = [answer for group in found.values() for answer in group]
        longest = max(max(f.tokens for f in everything), 1)
        bin_size = max(1.0, nice_step(longest, 2 * _BINS))
        lengths = np.arange(math.ceil(longest / bin_size) + 1) * bin_size
        widest = max(f.width for f in everything)
        widths = np.arange(widest + 1) + 0.5
        ticks = range(1, widest + 1) if widest <= 16 else (1, widest)
        charts = [
            chart(
                "accuracy of answers by their length (number)",
                {label: accuracy_by_tokens(group) for label, group in found.items()},
                (0, 1),
                "tokens",
            ),
            histogram("share of answers by tokens", _each(found, "tokens"), lengths, "tokens"),
            histogram(
                "share of answers by critical path",
                _each(found, "critical_path"),
                lengths,
                "tokens",
            ),
            histogram(
                "share of answers by branches at one time",
                _each(found, "width"),
                widths,
                "width",
                ticks,
            ),
        ]
        parts.append(
            f"<details{' open' if number < 3 else ''}><summary>{escape(name)}, "
            f'{len(everything):,} answers</summary><div class="charts">{"".join(charts)}</div>'
            "</details>"
        )
    return "".join(parts)


def _each(found: Mapping[str, Sequence[Figures]], name: str) -> dict[str, list[int]]:
    return {label: [getattr(answer, name) for answer in group] for label, group in found.items()}


def accuracy_by_tokens(figures: Sequence[Figures]) -> list[Point]:
    """(mean tokens, accuracy, their number) of answers of like length, in at most eight bins of
    about equal size; answers of one length are in one bin."""
    judged = sorted((f for f in figures if f.correct is not None), key=lambda f: f.tokens)
    if not judged:
        return []
    tokens = np.array([f.tokens for f in judged])
    right = np.array([f.correct for f in judged])
    count = max(1, min(_BINS, len(judged) // 5))
    starts = np.unique(np.searchsorted(tokens, tokens[np.arange(count) * len(tokens) // count]))
    return [
        Point(float(tokens[part].mean()), float(right[part].mean()), str(len(part)))
        for part in np.split(np.arange(len(tokens)), starts[1:])
    ]


def settings(content: Content) -> str:
    """Device, versions, and the YAML texts, folded."""
    results, parts = content.results or {}, []
    if results.get("device"):
        parts.append(f"<p>{escape(str(results['device']))}</p>")
    if results.get("versions"):
        versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
        parts.append(f"<p>{escape(versions)}</p>")
    texts = dict(content.settings)
    if results.get("settings") and not texts:
        texts["settings"] = json.dumps(results["settings"], indent=2, ensure_ascii=False)
    for name, text in texts.items():
        parts.append(
            f"<details><summary>{escape(name)}</summary><pre>{escape(text)}</pre></details>"
        )
    return "".join(parts) or "<p>None are kept.</p>"


def viewer(content: Content) -> str:
    """The viewer's data and program; the program makes its own elements."""
    left = content.num_answers - len(content.packed)
    told = f"{len(content.packed):,} answers."
    if left:
        told = (
            f"{len(content.packed):,} of {content.num_answers:,} answers, spread evenly; {left:,} "
            "are left out of this page (<code>npr-jax report DIR --answers N</code> shows more)."
        )
    scripts = "".join(
        f'<script type="text/plain" id="answer-{i}">{packed}</script>'
        for i, packed in enumerate(content.packed)
    )
    program = "".join(map(_asset, ("trace.js", "answer.js", "viewer.js")))
    rows = _json(content.rows)
    return (
        f'<p>{told} Press <kbd>?</kbd> for the keys.</p><div id="viewer"></div>'
        "<noscript><p>The viewer needs JavaScript.</p></noscript>"
        f'<script type="application/json" id="rows">{rows}</script>{scripts}'
        f'<script type="module">{program}</script>'
    )


def _json(values) -> str:
    """JSON that ends no script element: ASCII, and no `<`."""
    return json_text(values, separators=(",", ":")).replace("<", "\\u003c")


def _asset(name: str) -> str:
    return files("npr_jax.report").joinpath(name).read_text(encoding="utf-8")
