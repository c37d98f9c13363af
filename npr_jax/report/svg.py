"""Charts and trees as SVG and as plain text, for every report."""

import html
import itertools
import math
import unicodedata
from collections.abc import Mapping, Sequence
from typing import NamedTuple

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
_RIGHT, _DIGIT = 14, 6.4  # the margin on the right; the width of a digit
_LEAST = 1e-300  # of a spread that is drawn: a power of ten below it is no float any more
_TICKS = 5  # about so many on an axis


def nice_step(width: float, most: int) -> float:
    """The least 1, 2 or 5 times a power of ten of which at most `most` cover `width` > 0."""
    power = 10.0 ** math.floor(math.log10(width / most))
    return next(k * power for k in (1, 2, 5, 10, 20) if k * power * most >= width * (1 - 1e-9))


def nice_ticks(low: float, high: float, whole: bool = False) -> list[float]:
    """Round numbers a step apart, of which the first and the last enclose `low` <= `high`.

    `whole`: integers only.
    """
    if high - low < _LEAST:
        about = abs(low) / 10
        low, high = (low - about, high + about) if about > _LEAST else (0.0, 1.0)
    step = nice_step(high - low, _TICKS)
    step = max(1.0, step) if whole else step
    first, last = math.floor(low / step + 1e-6), math.ceil(high / step - 1e-6)
    return [i * step for i in range(first, max(last, first + 1) + 1)]


def tick_texts(ticks: Sequence[float]) -> list[str]:
    """The ticks of an axis as text, with the digits that tell them apart."""
    step = min((b - a for a, b in itertools.pairwise(ticks)), default=0.0)
    largest = max(map(abs, ticks))
    digits = -math.floor(math.log10(step) + 1e-9) if step > 0 else 0
    if largest == 0 or 1e-3 <= largest < 1e7:
        return [f"{x:,.{max(digits, 0)}f}" if abs(x) > step / 2 else "0" for x in ticks]

    power = math.floor(math.log10(largest) + 1e-9)
    unit = 10.0**power
    return [
        f"{x / unit:.{max(digits + power, 0)}f}e{power}" if abs(x) > step / 2 else "0"
        for x in ticks
    ]


class _Axes(NamedTuple):
    """The axes of a chart: their ticks, of which those of y span the chart, and the span of x."""

    x_name: str
    span_x: tuple[float, float]
    x_ticks: Sequence[float]
    y_ticks: Sequence[float]

    @property
    def left(self) -> float:
        """Where the y axis is: its numbers are never cut."""
        return max(_LEFT, 8 + _DIGIT * max(map(len, tick_texts(self.y_ticks))))

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Where a point of the data lies in the SVG."""
        low, high = self.span_x
        right = (x - low) / ((high - low) or 1) if high > low else 0.5
        up = (y - self.y_ticks[0]) / (self.y_ticks[-1] - self.y_ticks[0])
        return (
            self.left + right * (_WIDTH - self.left - _RIGHT),
            _HEIGHT - _BOTTOM - up * (_HEIGHT - _TOP - _BOTTOM),
        )


class Point(NamedTuple):
    """A point of a line; `note` is written above it."""

    x: float
    y: float
    note: str = ""


def chart(
    title: str,
    lines: Mapping[str, Sequence[tuple]],
    bounds: tuple[float, float] | None = None,
    x_name: str = "step",
    span_x: tuple[float, float] | None = None,
) -> str:
    """An SVG of lines: {label: [(x, y) or Point, ...]}; `bounds` of the y axis; `x_name` of the x
    axis, and its bounds, by default those of the points.

    Few points are marked, so that a line of one is seen.
    """
    points = [Point(*point) for line in lines.values() for point in line]
    if not points:
        return _frame(title, None, [])
    xs, ys = [point.x for point in points], [point.y for point in points]
    span_x = span_x or (min(xs), max(xs))
    whole = all(float(x).is_integer() for x in xs)
    axes = _Axes(
        x_name, span_x, _inside(span_x, whole), nice_ticks(*(bounds or (min(ys), max(ys))))
    )
    drawn = []
    for i, line in enumerate(lines.values()):
        color = COLORS[i % len(COLORS)]
        placed = [(*axes.place(*point[:2]), Point(*point).note) for point in line]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in placed)
        drawn.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.8"/>')
        if len(line) <= 12:
            drawn += [
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.6" fill="{color}"/>' for x, y, _ in placed
            ]
        for x, y, note in placed:
            if note:
                # Notes of the first line are above it, those of others below.
                beside = y - 6 if i == 0 and y - 6 > _TOP + 4 else y + 13
                drawn.append(
                    f'<text x="{x:.1f}" y="{beside:.1f}" font-size="9" text-anchor="middle" '
                    f'fill="{color}">{html.escape(note)}</text>'
                )
    return _frame(title, axes, list(lines), drawn)


def _inside(span: tuple[float, float], whole: bool) -> list[float]:
    """Round numbers within a span; its ends where there are none."""
    low, high = span
    slack = 1e-6 * (high - low)
    found = [x for x in nice_ticks(low, high, whole) if low - slack <= x <= high + slack]
    return found or sorted(set(span))


def histogram(
    title: str,
    values: Mapping[str, Sequence[float]],
    edges: Sequence[float] | np.ndarray,
    x_name: str,
    ticks: Sequence[float] | None = None,
) -> str:
    """An SVG of the shares of `values` between neighbouring `edges`, bars side by side per label;
    `ticks` of the x axis are by default round numbers."""
    edges = np.asarray(edges, float)
    shares = {
        label: np.histogram(numbers, edges)[0] / max(len(numbers), 1)
        for label, numbers in values.items()
    }
    span_x = (float(edges[0]), float(edges[-1]))
    highest = max((float(share.max()) for share in shares.values()), default=0.0) or 1.0
    axes = _Axes(x_name, span_x, ticks or _inside(span_x, False), nice_ticks(0.0, highest))
    drawn = []
    for i, share in enumerate(shares.values()):
        for low, high, y in zip(edges[:-1], edges[1:], share, strict=True):
            wide = (high - low) * 0.9 / len(shares)
            left, top = axes.place(low + (high - low) * 0.05 + i * wide, y)
            right, bottom = axes.place(low + (high - low) * 0.05 + (i + 1) * wide, 0.0)
            if y:
                drawn.append(
                    f'<rect x="{left:.1f}" y="{top:.1f}" width="{right - left:.1f}" '
                    f'height="{bottom - top:.1f}" fill="{COLORS[i % len(COLORS)]}"/>'
                )
    return _frame(title, axes, list(values) if len(values) > 1 else [], drawn)


def _frame(title: str, axes: _Axes | None, labels: Sequence[str], drawn: Sequence[str] = ()) -> str:
    """The SVG of a chart: title, axes, what is drawn, and a legend of two columns below."""
    height = _HEIGHT + 12 * max(0, (len(labels) + 1) // 2 - 2)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" '
        f'height="{height}" font-family="system-ui, sans-serif" font-size="11" fill="#808080" '
        f'role="img" aria-label="{html.escape(title)}">',
        f'<text x="{_LEFT}" y="16" font-size="13">{html.escape(title)}</text>',
    ]
    parts += _axes(axes) if axes else []
    parts += drawn
    for i, label in enumerate(labels):
        x, y = _LEFT + (i % 2) * 165, _HEIGHT - 16 + (i // 2) * 12
        color = COLORS[i % len(COLORS)]
        parts.append(f'<text x="{x}" y="{y}" fill="{color}">{html.escape(label)}</text>')
    return "".join([*parts, "</svg>"])


def _axes(axes: _Axes) -> list[str]:
    """Lines and numbers of the y axis, and the numbers of the x axis after its name."""
    parts = []
    for value, text in zip(axes.y_ticks, tick_texts(axes.y_ticks), strict=True):
        _, y = axes.place(axes.span_x[0], value)
        parts.append(
            f'<line x1="{axes.left:.1f}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}" '
            f'stroke="#808080" stroke-opacity="0.3"/><text x="{axes.left - 4:.1f}" y="{y:.1f}" '
            f'text-anchor="end" dominant-baseline="middle">{text}</text>'
        )
    below = _HEIGHT - _BOTTOM + 14
    free = 0.0  # where the next number may begin
    for i, (value, text) in enumerate(zip(axes.x_ticks, tick_texts(axes.x_ticks), strict=True)):
        text = text if i else f"{axes.x_name} {text}"
        x, _ = axes.place(value, axes.y_ticks[0])
        wide = _DIGIT * len(text)
        begin = min(max(x - wide / 2, 0.0), _WIDTH - wide)
        if begin >= free:
            free = begin + wide + _DIGIT
            parts.append(
                f'<text x="{begin + wide / 2:.1f}" y="{below}" text-anchor="middle">'
                f"{html.escape(text)}</text>"
            )
    return parts


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
