"""The demo's report: one self-contained HTML file with table, curves, a tree and the settings."""

import html
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from npr_jax.demo.evaluate import RATES
from npr_jax.metrics import read_metrics
from npr_jax.tree import TagIds, TreeLayout, parse

COLORS = ("#2a78d6", "#e07b39", "#3a9d5d", "#a259c4")  # told apart in light and dark
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
    (output / "curves.svg").write_text(_beside(charts[:3]), encoding="utf-8")
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


def chart(
    title: str,
    lines: Mapping[str, Sequence[tuple[float, float]]],
    bounds: tuple[float, float] | None = None,
) -> str:
    """An SVG of lines over steps: {label: [(step, value), ...]}; `bounds` of the y axis."""
    width, height, left, top, bottom = 380, 240, 46, 30, 46
    points = [point for line in lines.values() for point in line]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" font-family="system-ui, sans-serif" font-size="11" fill="#808080">',
        f'<text x="{left}" y="16" font-size="13">{html.escape(title)}</text>',
    ]
    if points:
        low_x, high_x = min(x for x, _ in points), max(x for x, _ in points)
        low_y, high_y = bounds or (min(y for _, y in points), max(y for _, y in points))
        span_x, span_y = (high_x - low_x) or 1, (high_y - low_y) or 1

        def place(x: float, y: float) -> str:
            px = left + (x - low_x) / span_x * (width - left - 12)
            py = height - bottom - (y - low_y) / span_y * (height - top - bottom)
            return f"{px:.1f},{py:.1f}"

        for fraction in (0, 0.5, 1):
            value = low_y + fraction * span_y
            y = place(low_x, value).split(",")[1]
            parts.append(
                f'<line x1="{left}" x2="{width - 12}" y1="{y}" y2="{y}" stroke="#808080" '
                f'stroke-opacity="0.3"/><text x="{left - 4}" y="{y}" text-anchor="end" '
                f'dominant-baseline="middle">{value:.3g}</text>'
            )
        for x, anchor, word in ((low_x, "start", "step "), (high_x, "end", "")):
            px = place(x, low_y).split(",")[0]
            parts.append(
                f'<text x="{px}" y="{height - bottom + 14}" text-anchor="{anchor}">{word}{x:g}'
                "</text>"
            )
        for i, (label, line) in enumerate(lines.items()):
            color = COLORS[i % len(COLORS)]
            path = " ".join(place(x, y) for x, y in line)
            parts.append(
                f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.8"/>'
            )
            x, y = left + (i % 2) * 165, height - 16 + (i // 2) * 12
            parts.append(f'<text x="{x}" y="{y}" fill="{color}">{html.escape(label)}</text>')
    return "".join([*parts, "</svg>"])


def _beside(charts: Sequence[str]) -> str:
    """Charts next to each other in one SVG."""
    moved = "".join(f'<g transform="translate({390 * i},0)">{c}</g>' for i, c in enumerate(charts))
    size = f'viewBox="0 0 {390 * len(charts)} 240" width="{390 * len(charts)}" height="240"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{moved}</svg>'


def _sections(ids: Sequence[int], tree: TreeLayout) -> list[list[tuple[int, int]]]:
    """The response from top to bottom: one span of trunk text, or a block's branches."""
    sections, start = [], tree.prompt_len
    for block in tree.blocks:
        if block.depth == 0 and block.steps:
            sections += [[(start, block.guideline_close + 1)], list(block.branches)]
            start = block.join
    return [*sections, [(start, len(ids))]]


def tree_svg(ids: Sequence[int], prompt_len: int, tags: TagIds) -> str:
    """An answer as SVG: the trunk above and below, the branches of a block as columns between."""
    tree = parse(ids, prompt_len, tags, allow_open=True)
    char, line, gap = 7.3, 17, 18
    parts, y, right = [], 22.0, 0.0
    drawn = [[(0, prompt_len)], *_sections(ids, tree)]
    columns = [[_lines(ids, tree, span, tags) for span in section] for section in drawn]
    widths = [
        [max((sum(len(t) for t, _ in text) for text in column), default=1) for column in section]
        for section in columns
    ]
    total = max(sum(char * (w + 3) for w in section) + gap * len(section) for section in widths)
    for section, sizes in zip(columns, widths, strict=True):
        x = (total - sum(char * (w + 3) for w in sizes) - gap * (len(sizes) - 1)) / 2
        tall = max(len(column) for column in section) * line + 12
        for column, size in zip(section, sizes, strict=True):
            wide = char * (size + 3)
            parts.append(
                f'<rect x="{x:.0f}" y="{y - 15:.0f}" width="{wide:.0f}" height="{tall:.0f}" rx="5" '
                f'fill="{COLORS[0]}" fill-opacity="{0.16 if len(section) > 1 else 0.06}"/>'
            )
            for i, text in enumerate(column):
                spans = "".join(
                    f'<tspan fill="{"#909090" if forced else COLORS[0]}">{html.escape(t)}</tspan>'
                    for t, forced in text
                )
                parts.append(
                    f'<text x="{x + char:.0f}" y="{y + i * line:.0f}" xml:space="preserve">'
                    f"{spans}</text>"
                )
            right = max(right, x + wide)
            x += wide + gap
        y += tall + 8
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {right + 8:.0f} {y:.0f}" '
        f'width="{right + 8:.0f}" height="{y:.0f}" font-family="ui-monospace, monospace" '
        f'font-size="12">{"".join(parts)}</svg>'
    )


def _lines(ids, tree: TreeLayout, span, tags: TagIds) -> list[list[tuple[str, bool]]]:
    """The text of a span as lines of (text, forced) runs."""
    lines: list[list[tuple[str, bool]]] = [[]]
    for i in range(*span):
        first, *rest = tags.decode([ids[i]]).split("\n")
        for number, piece in enumerate([first, *rest]):
            if number:
                lines.append([])
            if piece:
                lines[-1].append((piece, bool(tree.forced[i])))
    return [text for text in lines if text] or [[]]


def draw_tree(ids: Sequence[int], prompt_len: int, tags: TagIds) -> str:
    """An answer as plain text, the branches of a block as columns."""
    tree = parse(ids, prompt_len, tags, allow_open=True)
    out = [tags.decode(ids[:prompt_len])]
    for section in _sections(ids, tree):
        columns = [
            ["".join(text for text, _ in line) for line in _lines(ids, tree, span, tags)]
            for span in section
        ]
        widths = [max(map(len, column)) for column in columns]
        for i in range(max(map(len, columns))):
            cells = [
                (column[i] if i < len(column) else "").ljust(width)
                for column, width in zip(columns, widths, strict=True)
            ]
            out.append(("| " if len(cells) > 1 else "") + " | ".join(cells).rstrip())
    return "\n".join(out)
