"""Charts and trees as SVG and as plain text, for every report."""

import html
from collections.abc import Mapping, Sequence

from npr_jax.tree import TagIds, TreeLayout, parse

COLORS = ("#2a78d6", "#e07b39", "#3a9d5d", "#a259c4")  # told apart in light and dark


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


def beside(charts: Sequence[str]) -> str:
    """Charts next to each other in one SVG."""
    moved = "".join(f'<g transform="translate({390 * i},0)">{c}</g>' for i, c in enumerate(charts))
    size = f'viewBox="0 0 {390 * len(charts)} 240" width="{390 * len(charts)}" height="240"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{moved}</svg>'


def sections(ids: Sequence[int], tree: TreeLayout) -> list[list[tuple[int, int]]]:
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
    drawn = [[(0, prompt_len)], *sections(ids, tree)]
    columns = [[text_lines(ids, tree, span, tags) for span in section] for section in drawn]
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


def text_lines(ids, tree: TreeLayout, span, tags: TagIds) -> list[list[tuple[str, bool]]]:
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
    for section in sections(ids, tree):
        columns = [
            ["".join(text for text, _ in line) for line in text_lines(ids, tree, span, tags)]
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
