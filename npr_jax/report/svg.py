"""Charts and trees as SVG and as plain text, for every report."""

import html
import unicodedata
from collections.abc import Mapping, Sequence

import numpy as np

from npr_jax.report.lines import Span, sections, text_lines, visible
from npr_jax.tree import TreeLayout

COLORS = (  # told apart in light and dark
    "#2a78d6",
    "#e07b39",
    "#3a9d5d",
    "#a259c4",
    "#c2456f",
    "#8a7a2e",
    "#2f9aa0",
    "#7a7f87",
)
_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 380, 240, 46, 30, 46  # of a chart, and of its margins


def chart(
    title: str,
    lines: Mapping[str, Sequence[tuple[float, float]]],
    bounds: tuple[float, float] | None = None,
    x_name: str = "step",
) -> str:
    """An SVG of lines: {label: [(x, y), ...]}; `bounds` of the y axis; `x_name` of the x axis.

    Few points are marked, so that a line of one is seen.
    """
    points = [point for line in lines.values() for point in line]
    if not points:
        return _frame(title, (0, 1), (0, 1), x_name, [])
    xs, ys = zip(*points, strict=True)
    span_x, span_y = (min(xs), max(xs)), bounds or (min(ys), max(ys))
    drawn = []
    for i, line in enumerate(lines.values()):
        color = COLORS[i % len(COLORS)]
        placed = [_place(x, y, span_x, span_y) for x, y in line]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
        drawn.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.8"/>')
        if len(line) <= 12:
            drawn += [
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.6" fill="{color}"/>' for x, y in placed
            ]
    return _frame(title, span_x, span_y, x_name, list(lines), drawn)


def histogram(
    title: str,
    values: Mapping[str, Sequence[float]],
    edges: Sequence[float],
    x_name: str,
    ticks: Sequence[float] | None = None,
) -> str:
    """An SVG of the shares of `values` between neighbouring `edges`, bars side by side per label;
    `ticks` of the x axis are by default its ends."""
    edges = np.asarray(edges, float)
    shares = {
        label: np.histogram(numbers, edges)[0] / max(len(numbers), 1)
        for label, numbers in values.items()
    }
    span_x = (float(edges[0]), float(edges[-1]))
    span_y = (0.0, max((float(share.max()) for share in shares.values()), default=0.0) or 1.0)
    drawn = []
    for i, share in enumerate(shares.values()):
        for low, high, y in zip(edges[:-1], edges[1:], share, strict=True):
            wide = (high - low) * 0.9 / len(shares)
            left, top = _place(low + (high - low) * 0.05 + i * wide, y, span_x, span_y)
            right, bottom = _place(low + (high - low) * 0.05 + (i + 1) * wide, 0.0, span_x, span_y)
            if y:
                drawn.append(
                    f'<rect x="{left:.1f}" y="{top:.1f}" width="{right - left:.1f}" '
                    f'height="{bottom - top:.1f}" fill="{COLORS[i % len(COLORS)]}"/>'
                )
    labels = list(values) if len(values) > 1 else []
    return _frame(title, span_x, span_y, x_name, labels, drawn, ticks)


def _place(x: float, y: float, span_x, span_y) -> tuple[float, float]:
    """Where a point of the data lies in the SVG."""
    right = (x - span_x[0]) / ((span_x[1] - span_x[0]) or 1)
    up = (y - span_y[0]) / ((span_y[1] - span_y[0]) or 1)
    return (
        _LEFT + right * (_WIDTH - _LEFT - 12),
        _HEIGHT - _BOTTOM - up * (_HEIGHT - _TOP - _BOTTOM),
    )


def _frame(
    title: str,
    span_x,
    span_y,
    x_name: str,
    labels: Sequence[str],
    drawn: Sequence[str] = (),
    ticks: Sequence[float] | None = None,
) -> str:
    """The SVG of a chart: title, axes, what is drawn, and a legend of two columns below."""
    height = _HEIGHT + 12 * max(0, (len(labels) + 1) // 2 - 2)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" '
        f'height="{height}" font-family="system-ui, sans-serif" font-size="11" fill="#808080" '
        f'role="img" aria-label="{html.escape(title)}">',
        f'<text x="{_LEFT}" y="16" font-size="13">{html.escape(title)}</text>',
    ]
    for fraction in (0, 0.5, 1) if drawn else ():
        value = span_y[0] + fraction * ((span_y[1] - span_y[0]) or 1)
        _, y = _place(span_x[0], value, span_x, span_y)
        parts.append(
            f'<line x1="{_LEFT}" x2="{_WIDTH - 12}" y1="{y:.1f}" y2="{y:.1f}" stroke="#808080" '
            f'stroke-opacity="0.3"/><text x="{_LEFT - 4}" y="{y:.1f}" text-anchor="end" '
            f'dominant-baseline="middle">{value:.3g}</text>'
        )
    ticks = ticks or sorted(set(span_x))
    for i, x in enumerate(ticks if drawn else ()):
        px, _ = _place(x, span_y[0], span_x, span_y)
        anchor = "middle" if span_x[0] < x < span_x[1] else "end" if i else "start"
        word = "" if i else f"{html.escape(x_name)} "
        parts.append(
            f'<text x="{px:.1f}" y="{_HEIGHT - _BOTTOM + 14}" text-anchor="{anchor}">'
            f"{word}{x:g}</text>"
        )
    parts += drawn
    for i, label in enumerate(labels):
        x, y = _LEFT + (i % 2) * 165, _HEIGHT - 16 + (i // 2) * 12
        color = COLORS[i % len(COLORS)]
        parts.append(f'<text x="{x}" y="{y}" fill="{color}">{html.escape(label)}</text>')
    return "".join([*parts, "</svg>"])


def beside(charts: Sequence[str]) -> str:
    """Charts next to each other in one SVG."""
    moved = "".join(f'<g transform="translate({390 * i},0)">{c}</g>' for i, c in enumerate(charts))
    size = f'viewBox="0 0 {390 * len(charts)} 240" width="{390 * len(charts)}" height="240"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{moved}</svg>'


_CHAR, _LINE, _GAP = 7.3, 17, 18  # width and height of a character, space between columns


def tree_svg(pieces: Sequence[str], tree: TreeLayout) -> str:
    """An answer as SVG: the trunk above and below, the branches of a block as columns between,
    and the same again inside a branch.

    Args:
      pieces: texts of the tokens; tree: their layout.
    """
    prompt = _text(pieces, tree, (0, tree.prompt_len), 88)
    answer = _line(pieces, tree, (tree.prompt_len, len(tree)), 0)
    wide, tall, drawn = _below([_boxed(prompt, 0.06), answer])
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide:.0f} {tall:.0f}" '
        f'width="{wide:.0f}" height="{tall:.0f}" font-family="ui-monospace, monospace" '
        f'font-size="12">{drawn}</svg>'
    )


# A drawing: its width, its height, and its SVG with the left upper corner at (0, 0).
Drawing = tuple[float, float, str]


def _line(pieces: Sequence[str], tree: TreeLayout, span: Span, depth: int) -> Drawing:
    """The trunk (depth 0) or a branch with all that it forks into."""
    parts = []
    for run, branches in sections(tree, span, depth):
        text = _text(pieces, tree, run, 48 if depth else 88)
        parts.append(text if depth else _boxed(text, 0.06))
        if branches:
            columns = [_line(pieces, tree, branch, depth + 1) for branch in branches]
            parts.append(_beside([_boxed(column, 0.16) for column in columns]))
    return _below(parts)


def _text(pieces: Sequence[str], tree: TreeLayout, span: Span, limit: int) -> Drawing:
    lines = text_lines(pieces, tree.forced, span, limit)
    drawn = []
    for i, line in enumerate(lines):
        spans = "".join(
            f'<tspan fill="{"#909090" if forced else COLORS[0]}">{html.escape(text)}</tspan>'
            for text, forced in line
        )
        drawn.append(f'<text y="{(i + 0.75) * _LINE:.0f}" xml:space="preserve">{spans}</text>')
    wide = max(sum(_cells(text) for text, _ in line) for line in lines)
    return _CHAR * max(wide, 1), _LINE * len(lines), "".join(drawn)


def _cells(text: str) -> int:
    """How many characters wide a text is: those of East Asia are two."""
    return sum(1 + (unicodedata.east_asian_width(c) in "WF") for c in text)


def _boxed(inside: Drawing, opacity: float) -> Drawing:
    wide, tall, drawn = inside[0] + 2 * _CHAR, inside[1] + 8, inside[2]
    return (
        wide,
        tall,
        f'<rect width="{wide:.0f}" height="{tall:.0f}" rx="5" fill="{COLORS[0]}" '
        f'fill-opacity="{opacity}"/><g transform="translate({_CHAR},4)">{drawn}</g>',
    )


def _beside(drawings: Sequence[Drawing]) -> Drawing:
    x, parts = 0.0, []
    for wide, _, drawn in drawings:
        parts.append(f'<g transform="translate({x:.0f},0)">{drawn}</g>')
        x += wide + _GAP
    return x - _GAP, max(tall for _, tall, _ in drawings), "".join(parts)


def _below(drawings: Sequence[Drawing]) -> Drawing:
    total, y, parts = max(wide for wide, _, _ in drawings), 0.0, []
    for wide, tall, drawn in drawings:
        parts.append(f'<g transform="translate({(total - wide) / 2:.0f},{y:.0f})">{drawn}</g>')
        y += tall + 8
    return total, y - 8, "".join(parts)


def draw_tree(pieces: Sequence[str], tree: TreeLayout) -> str:
    """An answer as plain text, the branches of a block as columns; inner blocks as they come."""
    out = [visible("".join(pieces[: tree.prompt_len]))]
    for run, branches in sections(tree, (tree.prompt_len, len(tree))):
        for spans in ([run], branches) if branches else ([run],):
            columns = [
                [
                    "".join(text for text, _ in line)
                    for line in text_lines(pieces, tree.forced, span)
                ]
                for span in spans
            ]
            widths = [max(map(len, column)) for column in columns]
            for i in range(max(map(len, columns))):
                cells = [
                    (column[i] if i < len(column) else "").ljust(width)
                    for column, width in zip(columns, widths, strict=True)
                ]
                out.append(("| " if len(cells) > 1 else "") + " | ".join(cells).rstrip())
    return "\n".join(out)
