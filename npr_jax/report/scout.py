"""The page of `npr-jax scout`: policies beside each other, and what their answers said over time.

The picture of a question is a matrix, a row for each answer and a column for each probe, in the
first trial of one policy.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from npr_jax.base.config import dump_config
from npr_jax.base.files import writing
from npr_jax.evaluate.policies import NOTHING, Outcome, PolicyConfig, Table, orders, tabulate, vote
from npr_jax.evaluate.pools import PoolQuestion
from npr_jax.evaluate.scout import Result
from npr_jax.report.content import Content
from npr_jax.report.html import escape, page, write_page
from npr_jax.report.svg import Point, chart, nice_step

_WIDE, _TALL, _GAP = 10, 8, 6  # of a cell; between the vote and the answers
_LEFT, _TOP, _RIGHT, _BOTTOM = 36, 18, 14, 20  # margins
_LABEL = 5  # columns that a number of tokens takes
_HUES = 8  # classes of viewer.css: the right answer, six others, and the rest
_REST = _HUES - 1
_OPEN = 3  # pictures that are not folded


def write(
    directory: Path,
    title: str,
    questions: Sequence[PoolQuestion],
    results: Sequence[Result],
    shown: Sequence[int],
) -> Path:
    """Writes `directory`/index.html; returns its path.

    Args:
      title: of the page.
      results: of the policies; the last one is drawn.
      shown: numbers, from 1, of the questions that are drawn.
    """
    config = results[-1].config
    pictures = "".join(
        _picture(number, questions[number - 1], config, place < _OPEN)
        for place, number in enumerate(shown)
    )
    sections = {
        "Policies": _policies(results),
        "Answers over time": f"{_key(config)}{pictures}",
    }
    content = Content(title)
    content.settings = {result.config.name: dump_config(result.config) for result in results}
    with writing(directory, "give another directory"):
        directory.mkdir(parents=True, exist_ok=True)
    return write_page(directory / "index.html", page(content, sections))


def _policies(results: Sequence[Result]) -> str:
    """The table of policies, and accuracy against tokens."""
    heads = ("accuracy %", "sequential", "total", "sequential with probes", "total with probes")
    head = "".join(f'<th scope="col">{name}</th>' for name in heads)
    rows = "".join(
        f'<tr><th scope="row">{escape(result.config.name)}</th><td>{result.accuracy:.2f}</td>'
        + "".join(f"<td>{count:,}</td>" for count in result[3:])
        + "</tr>"
        for result in results
    )
    config = results[0].config
    charts = []
    for name, free, charged in (
        ("one after another", "sequential", "sequential_with_probes"),
        ("all", "total", "total_with_probes"),
    ):
        lines = {
            result.config.name: [
                Point(getattr(result, free), result.accuracy, result.config.name),
                Point(getattr(result, charged), result.accuracy),
            ]
            for result in results
        }
        span = (0, 1.05 * max(getattr(result, charged) for result in results))
        charts.append(chart(f"accuracy (%) by tokens, {name}", lines, None, "tokens", span))
    return (
        f"<p>{results[0].questions} questions, {config.answers} answers to each, mean of "
        f"{config.trials} trials; tokens of a question. Probes are free as in the published "
        f"numbers, or cost {config.probe_tokens} tokens each, which moves a point to the right.</p>"
        '<div class="wide" tabindex="0" role="region" aria-label="Policies"><table><thead><tr>'
        f"<td></td>{head}</tr></thead>"
        f'<tbody>{rows}</tbody></table></div><div class="charts">{"".join(charts)}</div>'
    )


def _key(config: PolicyConfig) -> str:
    """What the marks of the pictures mean."""
    marks = (
        (_swatch("c0", '<path class="gold" d="M1 6H13"/>'), "the right answer: a line through it"),
        (_swatch("none"), "no answer"),
        (_swatch("c1 end"), "what a branch ended with"),
        (_swatch("c1 off"), "recorded, and not read by the policy"),
        (_swatch("", '<path class="mark" d="M4 3l6 6m0 -6l-6 6"/>'), "dropped"),
        (_swatch("", '<path class="mark stop" d="M7 0V12"/>'), "all stopped"),
    )
    items = "".join(f"<li>{swatch} {text}</li>" for swatch, text in marks)
    return (
        f"<p>Policy <code>{escape(config.name)}</code>, its first trial: a row for each answer, a "
        "column for each probe; above them what the vote says. Point at a cell to read it.</p>"
        f'<ul class="legend matrix">{items}</ul>'
    )


def _picture(number: int, question: PoolQuestion, config: PolicyConfig, unfolded: bool) -> str:
    """A question, what happened to it, its matrix, and which colour is which answer."""
    table = tabulate(question)
    order = orders(len(question.branches), config.answers, 1)
    outcome = config.run(table, order)
    said = table.names[int(outcome.answer[0])]
    right = bool(outcome.answer[0] == table.gold)
    sequential, total = (int(tokens[0]) for tokens in outcome.bill())
    told = f"{'✓ right' if right else '✗ wrong'}: {_named(said)}"
    told += "" if right else f", reference {_named(question.gold)}"
    told += f"; {sequential:,} tokens one after another, {total:,} in all"
    if dropped := int(outcome.pruned.sum()):
        told += f"; {dropped} dropped"
    if outcome.stopped[0]:
        told += f"; stopped at {int(outcome.seen.max()) * table.interval:,} tokens"
    hues = _hues(table, order[0])
    return (
        f"<details{' open' if unfolded else ''}><summary>Question {number}: {escape(told)}"
        f'</summary><p class="text">{escape(question.question)}</p><div class="matrix">'
        f"{matrix_svg(table, order[0], outcome, hues, f'Question {number}: {told}')}</div>"
        f"{_legend(table, order[0], outcome, hues)}</details>"
    )


def _named(answer: str | None) -> str:
    """An answer in a line, shortened."""
    if answer is None:
        return "no answer"
    return answer if len(answer) <= 60 else f"{answer[:57]}..."


def _hues(table: Table, order: np.ndarray) -> dict[int, str]:
    """The class of each code: the right answer first, then the most frequent ones."""
    counts = Counter()
    for branch in order:
        counts.update(table.codes[branch, : table.probes[branch] + 1].tolist())
    del counts[NOTHING], counts[table.gold]
    others = (code for code, _ in counts.most_common())
    ranks = {table.gold: 0} | {code: min(rank, _REST) for rank, code in enumerate(others, 1)}
    return {code: f"c{rank}" for code, rank in ranks.items()} | {NOTHING: "none"}


def _legend(table: Table, order: np.ndarray, outcome: Outcome, hues: dict[int, str]) -> str:
    """The answers that have a colour of their own, and how many branches said them last."""
    seen = outcome.seen[0]
    last = table.codes[order, np.maximum(seen, 1) - 1]
    votes = Counter(last[(seen > 0) & ~outcome.pruned[0]].tolist())
    items, rest = [], [code for code, hue in hues.items() if hue == f"c{_REST}"]
    for code, hue in hues.items():
        if code == NOTHING or code in rest:
            continue
        line = '<path class="gold" d="M1 6H13"/>' if code == table.gold else ""
        items.append((_swatch(hue, line), _named(table.names[code]), votes[code]))
    if rest:
        total = sum(votes[code] for code in rest)
        items.append((_swatch(f"c{_REST}"), f"{len(rest)} other answers", total))
    texts = "".join(f"<li>{swatch} {escape(name)}: {n}</li>" for swatch, name, n in items)
    return f'<ul class="legend matrix"><li>votes at the end</li>{texts}</ul>'


def _swatch(classes: str, marks: str = "") -> str:
    cell = f'<rect class="{classes}" x="1" y="1" width="12" height="10"/>' if classes else ""
    return f'<svg width="14" height="12" aria-hidden="true">{cell}{marks}</svg>'


def matrix_svg(
    table: Table, order: np.ndarray, outcome: Outcome, hues: dict[int, str], label: str
) -> str:
    """What each branch said at each probe, as an SVG.

    Args:
      order: i32[N], the branches, from top to bottom.
      outcome: of one trial with them.
      hues: classes of viewer.css by code.
      label: what the picture says, for those who do not see it.
    """
    probes, seen, pruned = table.probes[order], outcome.seen[0], outcome.pruned[0]
    columns = int(probes.max(initial=0)) + 1
    read = int(seen.max(initial=0))
    top = _TOP + _TALL + _GAP
    wide, tall = _LEFT + _WIDE * (columns + 1) + _RIGHT, top + _TALL * len(order) + _BOTTOM
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {tall}" width="{wide}" '
        f'height="{tall}" role="img" aria-label="{escape(label)}">'
    ]
    said = [_said(table, order, outcome, column) for column in range(read)]
    parts.append(_text(0, _TOP + _TALL, "vote"))
    parts += _row(table, said, read, _TOP, "vote", hues)
    for row, (branch, length, until) in enumerate(zip(order, probes, seen, strict=True)):
        y, name = top + _TALL * row, f"{row + 1}"
        *codes, final = table.codes[branch, : length + 1].tolist()
        parts += _row(table, codes, int(until), y, name, hues)
        ended = f"{name}, ended after {int(table.tokens[branch]):,} tokens"
        hue = f"{hues[final]} end{'' if until > length else ' off'}"
        parts.append(_cell(table, final, hue, int(length), 1, y, ended))
        if pruned[row]:
            x, size = _LEFT + _WIDE * int(until) + 1, _TALL - 2
            parts.append(
                f'<path class="mark" d="M{x} {y}l{size} {size}m0 -{size}l-{size} {size}"/>'
            )
    step = nice_step(len(order), 5)
    for number in range(0, len(order) + 1, max(1, round(step))):
        row = max(number, 1)
        parts.append(_text(_LEFT - 6, top + _TALL * row - 1, f"{row}", "end"))
    step = max(_LABEL, round(nice_step(columns, 8)))
    for column in range(0, columns + 1, step):
        x = _LEFT + _WIDE * column
        middle = "start" if column == 0 else "middle"
        parts.append(_text(x, tall - 6, f"{column * table.interval:,}", middle))
    if outcome.stopped[0]:
        x = _LEFT + _WIDE * read
        parts.append(f'<path class="mark stop" d="M{x} {_TOP - 4}V{tall - _BOTTOM}"/>')
        side = "end" if 2 * x > wide else "start"
        parts.append(_text(x, _TOP - 6, f"stop at {read * table.interval:,} tokens", side))
    return "".join([*parts, "</svg>"])


def _said(table: Table, order: np.ndarray, outcome: Outcome, column: int) -> int:
    """What the vote said when each branch had got to that column, or to its end."""
    seen = outcome.seen[0]
    now = table.codes[order, np.minimum(column, np.maximum(seen, 1) - 1)]
    voting = ~(outcome.pruned[0] & (seen <= column + 1)) & (seen > 0)
    return int(vote(now[None], voting[None])[0])


def _row(
    table: Table, codes: Sequence[int], until: int, y: int, name: str, hues: dict[int, str]
) -> list[str]:
    """Runs of equal cells, each as one rectangle; those from column `until` on were not read."""
    parts, begin = [], 0
    for end in range(1, len(codes) + 1):
        if end < len(codes) and codes[end] == codes[begin] and end != until:
            continue
        tokens = f"{(begin + 1) * table.interval:,}"
        tokens += f" to {end * table.interval:,}" if end - begin > 1 else ""
        hue = hues[codes[begin]] + ("" if begin < until else " off")
        title = f"{name}, {tokens} tokens"
        parts.append(_cell(table, codes[begin], hue, begin, end - begin, y, title))
        begin = end
    return parts


def _cell(table: Table, code: int, hue: str, column: int, columns: int, y: int, title: str) -> str:
    """A rectangle with what it says, and the line through it where that is right."""
    x, wide, tall = _LEFT + _WIDE * column, _WIDE * columns - 1, _TALL - 1
    text = escape(f"{title}: {_named(table.names[code])}")
    drawn = f'<rect class="{hue}" x="{x}" y="{y}" width="{wide}" height="{tall}">'
    drawn += f"<title>{text}</title></rect>"
    if code == table.gold:
        off = " off" if hue.endswith("off") else ""
        drawn += f'<path class="gold{off}" d="M{x} {y + tall / 2:g}h{wide}"/>'
    return drawn


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}">{escape(text)}</text>'
