"""What attends to what in an answer, as an SVG of merged rectangles: queries down, keys across.

No [T, T] array is made. The keys are cut into runs of equal `hidden` intervals; such a run is one
triangle or rectangle for each stretch of queries that see it.
"""

import itertools

from npr_jax.report.svg import COLORS
from npr_jax.tree import TreeLayout

Rect = tuple[int, int, int, int]  # queries [q0, q1) see the keys [k0, k1)


def rectangles(tree: TreeLayout) -> list[Rect]:
    """Every visible (query, key) pair with key <= query is in exactly one rectangle.

    The pairs of a rectangle with key > query, in a triangle on the diagonal, are not visible.
    """
    total, found = len(tree), []
    cuts = {0, total, *(int(x) for x in _starts(tree))}
    edges = sorted(cuts)
    for k0, k1 in itertools.pairwise(edges):
        query = k0
        for start, end in sorted((int(s), int(e)) for s, e in tree.hidden[k0] if s < e):
            if query < start:
                found.append((query, start, k0, k1))
            query = max(query, end)
        if query < total:
            found.append((query, total, k0, k1))
    return found


def _starts(tree: TreeLayout):
    """Where the hidden intervals of a key differ from those of the key before it."""
    differs = (tree.hidden[1:] != tree.hidden[:-1]).any(axis=(1, 2))
    return differs.nonzero()[0] + 1


def visibility_svg(tree: TreeLayout, size: int = 720) -> str:
    """The picture, `size` pixels wide and high; the prompt's keys are drawn lighter."""
    total = max(len(tree), 1)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {total} {total}" width="{size}" '
        f'height="{size}" shape-rendering="crispEdges"><title>Query (down) by key (across): '
        f"coloured where the query sees the key</title>"
        f'<rect width="{total}" height="{total}" fill="#808080" fill-opacity="0.12"/>'
    ]
    for q0, q1, k0, k1 in rectangles(tree):
        opacity = 0.45 if k1 <= tree.prompt_len else 0.9
        paint = f'fill="{COLORS[0]}" fill-opacity="{opacity}"'
        if q0 >= k1:
            parts.append(f'<rect x="{k0}" y="{q0}" width="{k1 - k0}" height="{q1 - q0}" {paint}/>')
            continue
        # A run on the diagonal: key k is seen from query k on.
        parts.append(f'<path d="{_under_diagonal(q0, q1, k0, k1)}" {paint}/>')
    if 0 < tree.prompt_len < total:
        at = tree.prompt_len
        parts.append(
            f'<path d="M0 {at}H{total}M{at} 0V{total}" stroke="#808080" stroke-width="1" '
            f'vector-effect="non-scaling-stroke" stroke-dasharray="4 4" fill="none"/>'
        )
    return "".join([*parts, "</svg>"])


def _under_diagonal(q0: int, q1: int, k0: int, k1: int) -> str:
    """The pixels of a rectangle with key <= query. Up to 512 of them each query is a stair of its
    own; of more the diagonal is drawn straight, which is less than a pixel off."""
    if k1 - k0 > 512:
        return f"M{k0} {q0}L{k1} {k1}V{q1}H{k0}Z"
    stairs = "h1v1" * (k1 - k0)
    return f"M{k0} {q0}{stairs}V{q1}H{k0}Z"
