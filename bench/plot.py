"""Charts as SVG for the figures of docs/images: lines, also on logarithmic axes, and dots."""

import html
import math
from collections.abc import Mapping, Sequence

COLORS = ("#2a78d6", "#e07b39", "#3a9d5d", "#a259c4")  # told apart in light and dark
WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 680, 360, 64, 44, 36, 190


Lines = Mapping[str, Sequence[tuple[float, float]]]


def log_chart(title: str, x_name: str, y_name: str, lines: Lines) -> str:
    """Lines of (x, y) points, all above 0, with ticks at powers of two and of ten."""
    ys = [math.log10(y) for line in lines.values() for _, y in line]
    ticks = [10.0**power for power in range(math.floor(min(ys)), math.ceil(max(ys)) + 1)]
    return _chart(title, x_name, y_name, lines, ticks, math.log2, math.log10)


def line_chart(title: str, x_name: str, y_name: str, lines: Lines) -> str:
    """Lines of (x, y) points, all above 0, with ticks at the whole numbers from 0."""
    top = math.ceil(max(y for line in lines.values() for _, y in line))
    return _chart(title, x_name, y_name, lines, list(range(top + 1)), float, float)


def _chart(title, x_name, y_name, lines: Lines, ticks, across_of, up_of) -> str:
    """Lines with a grid at `ticks` of y; the functions say where a value lies along an axis."""
    points = [point for line in lines.values() for point in line]
    x0, x1 = (f(across_of(x) for x, _ in points) for f in (min, max))
    y0, y1 = up_of(ticks[0]), up_of(ticks[-1])

    def place(x: float, y: float) -> tuple[float, float]:
        across = (across_of(x) - x0) / max(1e-9, x1 - x0)
        up = (up_of(y) - y0) / max(1e-9, y1 - y0)
        return (
            LEFT + across * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - up * (HEIGHT - BOTTOM - TOP),
        )

    def text(x: float, y: float, words: str, anchor: str = "middle", more: str = "") -> str:
        where = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
        return f"<text {where}{more}>{html.escape(words)}</text>"

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'width="{WIDTH}" height="{HEIGHT}" font-family="system-ui, sans-serif" font-size="12" '
        'fill="#777">',
        text(LEFT, 18, title, "start", ' font-weight="600"'),
        text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, x_name),
        text(LEFT - 8, TOP - 8, y_name, "end"),
    ]
    left = points[0][0]
    for tick in ticks:
        _, y = place(left, tick)
        parts.append(
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#8884"/>'
        )
        parts.append(text(LEFT - 8, y + 4, f"{tick:g}", "end"))
    for x in sorted({x for x, _ in points}):
        parts.append(text(place(x, ticks[0])[0], HEIGHT - BOTTOM + 18, f"{x:g}"))
    below = 0.0  # where the name before ends: from top to bottom, names keep apart
    for (name, line), color in sorted(
        zip(lines.items(), COLORS, strict=False), key=lambda entry: -entry[0][1][-1][1]
    ):
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in line))
        parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"/>')
        x, y = place(*line[-1])
        below = max(y + 4, below + 14)
        parts.append(text(x + 8, below, name, "start", f' style="fill:{color}"'))
    return "\n".join([*parts, "</svg>"]) + "\n"


def dot_chart(title: str, rows: Mapping[str, Sequence[float]]) -> str:
    """A row of dots for every name, values from 0 to 1, with a bar at their mean."""
    left, right, line = 300, 24, 26
    height, width = TOP + line * len(rows) + 34, 720

    def place(value: float) -> float:
        return left + value * (width - left - right)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" font-family="system-ui, sans-serif" font-size="12" fill="#777">',
        f'<text x="16" y="18" font-weight="600">{html.escape(title)}</text>',
    ]
    bottom = TOP + line * len(rows)
    for tick in (0, 0.25, 0.5, 0.75, 1):
        x = place(tick)
        parts.append(f'<line x1="{x}" x2="{x}" y1="{TOP}" y2="{bottom}" stroke="#8884"/>')
        parts.append(f'<text x="{x}" y="{bottom + 18}" text-anchor="middle">{tick:g}</text>')
    for number, (name, values) in enumerate(rows.items()):
        y, mean = TOP + line * (number + 0.5), place(sum(values) / len(values))
        parts.append(f'<text x="16" y="{y + 4}">{html.escape(name)}</text>')
        parts.append(
            f'<line x1="{mean:.1f}" x2="{mean:.1f}" y1="{y - 9}" y2="{y + 9}" '
            f'stroke="{COLORS[1]}" stroke-width="3"/>'
        )
        parts += [
            f'<circle cx="{place(v):.1f}" cy="{y}" r="4" fill="{COLORS[0]}" fill-opacity="0.6"/>'
            for v in values
        ]
    return "\n".join([*parts, "</svg>"]) + "\n"
