"""One answer in the terminal: branches as columns, tokens coloured by their log-prob."""

import math
from pathlib import Path

from rich.box import SQUARE
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from npr_jax.base.files import writing
from npr_jax.evaluate.traces import Trace, read_traces
from npr_jax.report.lines import Span, sections, visible
from npr_jax.report.svg import tree_svg
from npr_jax.report.visibility import visibility_svg
from npr_jax.tree import TreeLayout

# Least probability, and how tokens of it are shown; the pages of a report have the same steps.
LEVELS = ((0.9, ""), (0.5, "green"), (0.2, "yellow"), (0.05, "red"), (0.0, "bold white on red"))
FORCED, PROMPT = "dim italic", "dim"
_NARROW = 12  # characters; where columns would be narrower, branches stand below each other


def view(
    path: Path,
    number: int | None = None,
    name: str | None = None,
    sample: int = 0,
    svg: Path | None = None,
    visibility: Path | None = None,
    console: Console | None = None,
) -> list[Path]:
    """Prints one trace of a file, and writes its pictures; returns the paths of these.

    Args:
      number: which trace, from 1; or name and sample: the id of its problem, and which answer.
      svg: where the tree is drawn; visibility: where it is drawn what sees what.

    Raises ValueError for a file without such a trace, and for one that has none.
    """
    trace = find(path, number, name, sample)
    taken = {path.resolve()}
    for target in filter(None, (svg, visibility)):
        if target.resolve() in taken:
            raise ValueError(f"{target} is given twice, a picture would replace it: give another")
        taken.add(target.resolve())
    console = console or Console()
    console.print(draw(trace, console.width), highlight=False, markup=False, emoji=False)
    pictures = []
    for target, make in ((svg, tree_picture), (visibility, visibility_picture)):
        if target is not None:
            with writing(target, "give another file"):
                target.write_text(make(trace), encoding="utf-8")
            pictures.append(target)
    return pictures


def tree_picture(trace: Trace) -> str:
    """The tree as SVG."""
    return tree_svg(trace.pieces, trace.layout)


def visibility_picture(trace: Trace) -> str:
    """What attends to what as SVG."""
    return visibility_svg(trace.layout)


def find(path: Path, number: int | None, name: str | None, sample: int) -> Trace:
    """The trace of a file that is asked for; ValueError where there is none."""
    if number is not None and name is not None:
        raise ValueError("give --number or --id, not both")
    if name is None:
        number = 1 if number is None else number
        if number < 1:
            raise ValueError(f"--number is {number}, needed is 1 or more")
    count = 0
    for count, trace in enumerate(read_traces(path), 1):
        if count == number or (name is not None and (trace.id, trace.sample) == (name, sample)):
            return trace
    wanted = f"number {number}" if name is None else f"id {name!r}, sample {sample}"
    raise ValueError(f"{path} has {count} traces, none of them {wanted}")


def draw(trace: Trace, width: int) -> Group:
    """The whole answer, to be printed on a console of that width."""
    tree = trace.layout
    steps = max(trace.step, default=-1) + 1
    found = trace.figures
    figures = (
        f"{found.tokens} tokens, critical path {found.critical_path}, width {found.width}, "
        f"depth {found.depth}, {steps} decode steps, finished by {visible(trace.finish_reason)}"
    )
    title = " ".join(visible(x) for x in (trace.benchmark, trace.id, f"sample {trace.sample}") if x)
    parts = [
        Text(title, "bold"),
        Text(visible(trace.problem)),
        _legend(),
        Text(),
        *_line(trace, tree, (trace.prompt_len, len(tree)), 0, width),
        Text(),
        verdict(trace),
        Text(figures + (f" ({visible(trace.detail)})" if trace.detail else "")),
    ]
    return Group(*parts, *(Text(f"broken: {visible(v)}", "yellow") for v in trace.violations))


def verdict(trace: Trace) -> Text:
    """One line: what was found, what was to be found, and whether they are the same."""
    found = "no answer found" if trace.prediction is None else f"answer {visible(trace.prediction)}"
    if trace.correct is None:
        return Text(f"? {found}, nothing to compare it with")
    mark, style = ("✓ right", "bold green") if trace.correct else ("✗ wrong", "bold red")
    return Text(f"{mark}: {found}, reference {visible(trace.reference or '')}", style)


def style_of(logp: float) -> str:
    """The style of a sampled token."""
    p = math.exp(min(logp, 0.0)) if logp == logp else 0.0
    return next(style for least, style in LEVELS if p >= least)


def _legend() -> Text:
    text = Text("probability: ", PROMPT)
    for least, style in LEVELS:
        text.append(f"≥{least:g}" if least else "less", style)
        text.append("  ")
    return text.append("written by the engine", FORCED)


def _line(trace: Trace, tree: TreeLayout, span: Span, depth: int, width: int) -> list:
    """The renderables of the trunk or of a branch, from top to bottom."""
    parts: list = []
    for run, branches in sections(tree, span, depth):
        if run[0] < run[1]:
            parts.append(_text(trace, run))
        if branches:
            parts.append(_fork(trace, tree, branches, depth, width))
    return parts


def _fork(trace: Trace, tree: TreeLayout, branches: tuple[Span, ...], depth: int, width: int):
    share = (width - 1) // len(branches) - 3  # borders and padding
    beside = share >= _NARROW
    inner = share if beside else width - 4
    cells = [Group(*_line(trace, tree, branch, depth + 1, inner)) for branch in branches]
    table = Table(box=SQUARE, show_header=False, expand=True, show_lines=True, width=width)
    for _ in cells if beside else cells[:1]:
        table.add_column(ratio=1, overflow="fold")
    for row in [cells] if beside else [[cell] for cell in cells]:
        table.add_row(*row)
    return table


def _text(trace: Trace, span: Span) -> Text:
    """The tokens of a run without the line ends around it."""
    text = Text(overflow="fold")
    for i in range(*span):
        style = FORCED if trace.forced[i] else style_of(trace.logp[i])
        text.append(visible(trace.pieces[i]).expandtabs(4), style)
    plain = text.plain
    kept = plain.strip("\n")
    start = len(plain) - len(plain.lstrip("\n")) if kept else 0
    return text[start : start + len(kept)] if kept else Text()
