"""Writes the pictures of docs/images that are drawn from layouts alone: rules.svg.

python scripts/write_pictures.py
"""

import html
from pathlib import Path

from npr_jax.demo.sums import Sum, ideal
from npr_jax.model.tokenizer import demo_tokenizer
from npr_jax.report.visibility import visibility_svg
from npr_jax.tree import Rules, TagIds, parse

RULES = Path(__file__).parents[1] / "docs" / "images" / "rules.svg"
SIZE, GAP, TITLE = 300, 24, 24  # pixels


def rules_svg() -> str:
    """What each token of an answer of the demo sees, by the paper's rules and by others."""
    tokenizer = demo_tokenizer()
    tags = TagIds.from_tokenizer(tokenizer)
    one = Sum((("+", 7, 4), ("*", 6, 2), ("+", 3, 5)))
    prompt = tokenizer.encode(one.problem)
    ids = [*prompt, *tokenizer.encode(ideal(one), add_special_tokens=False)]
    shown = (
        ("join: all, fork: trunk", Rules()),
        ("join: last (=)", Rules(join="last", marker="=")),
        ("join: last (=), fork: fresh", Rules(join="last", fork="fresh", marker="=")),
    )
    width, height = len(shown) * (SIZE + GAP) - GAP, SIZE + TITLE
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" font-family="ui-monospace, monospace" font-size="13" fill="#808080">'
    ]
    for number, (title, rules) in enumerate(shown):
        tree = parse(ids, len(prompt), tags, rules=tags.resolved(rules))
        at = number * (SIZE + GAP)
        parts.append(f'<text x="{at}" y="{TITLE - 9}">{html.escape(title)}</text>')
        parts.append(f'<g transform="translate({at} {TITLE})">{visibility_svg(tree, SIZE)}</g>')
    return "".join([*parts, "</svg>"])


if __name__ == "__main__":
    RULES.write_text(rules_svg() + "\n", encoding="utf-8")
