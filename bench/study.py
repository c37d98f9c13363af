"""What studies of several seeds share: their command line, and results that can be gone on with."""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def results(path: Path) -> dict[str, Any]:
    """What was measured so far, by seed."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def add_result(path: Path, seed: int, result: Any, indent: int | None = 1) -> None:
    """Writes the result of a seed beside those that are there."""
    record = results(path) | {str(seed): result}
    path.write_text(json.dumps(record, indent=indent) + "\n", encoding="utf-8")


def main(
    about: str,
    run: Callable[[argparse.Namespace], None],
    table: Callable[[argparse.Namespace], None],
    seeds: Sequence[int],
    add: Callable[[argparse.ArgumentParser], Any] = lambda parser: None,
) -> None:
    """The command line of a study: `run` trains and measures what is missing of the seeds, `table`
    rewrites docs/recipe.md; `about`: its module's docstring; `add` adds further options of `run`.
    """
    parser = argparse.ArgumentParser(description=about.partition("\n")[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    work = verbs.add_parser("run", help="train and measure what is missing")
    work.add_argument("--runs", type=Path, default=Path("runs/recipe"))
    work.add_argument("--seeds", type=int, nargs="+", default=list(seeds))
    add(work)
    work.set_defaults(work=run)
    verbs.add_parser("table", help="rewrite docs/recipe.md").set_defaults(work=table)
    args = parser.parse_args()
    args.work(args)
