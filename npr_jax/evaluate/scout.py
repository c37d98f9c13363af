"""`npr-jax scout`: what policies get right and what they cost, by trials on a recorded pool.

pool, configs --scout--> Result for each policy --> a table, lines of JSON, a page
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table

from npr_jax.base.config import load_config
from npr_jax.base.fields import hints
from npr_jax.evaluate.policies import POLICIES, PolicyConfig, ProbeConfig, orders, tabulate
from npr_jax.evaluate.pools import PoolQuestion, read_pool


class Result(NamedTuple):
    """A policy on a pool, means over its questions and trials.

    Attributes:
      config: the policy's.
      questions: how many the pool has.
      accuracy: percent of answers that are the text of the right one, to two digits.
      sequential, total (tokens): one after another, and all, as published: what a probe forces and
        decodes is free. Fractions are cut off.
      sequential_with_probes, total_with_probes (tokens): the same with every probe charged for.
    """

    config: PolicyConfig
    questions: int
    accuracy: float
    sequential: int
    total: int
    sequential_with_probes: int
    total_with_probes: int

    def record(self) -> dict[str, Any]:
        """What `--json` prints of it."""
        return {
            "policy": self.config.name,
            "questions": self.questions,
            "accuracy": self.accuracy,
            "sequential_tokens": self.sequential,
            "total_tokens": self.total,
            "sequential_tokens_with_probes": self.sequential_with_probes,
            "total_tokens_with_probes": self.total_with_probes,
            "settings": dataclasses.asdict(self.config),
        }


def settings(policy: str | None, overrides: Sequence[str] = ()) -> list[PolicyConfig]:
    """The config of a policy, or of all; `overrides` (KEY=VALUE) go to those that have the key.

    Raises ValueError for a policy or a key that is not there, and for a value that does not fit.
    """
    if policy is not None and policy not in POLICIES:
        raise ValueError(f"--policy is {policy!r}, needed is one of {', '.join(POLICIES)}")
    names = list(POLICIES) if policy is None else [policy]
    keys = {name: list(hints(POLICIES[name])) for name in names}
    known = list(dict.fromkeys(key for name in names for key in keys[name]))
    chosen: dict[str, list[str]] = {name: [] for name in names}
    for override in overrides:
        key, equals, _ = override.partition("=")
        if equals and key.partition(".")[0] not in known:
            whose = policy or "any policy"
            raise ValueError(
                f"--set {override}: {key!r} is no key of {whose}; there are: {', '.join(known)}"
            )
        for name in names:
            if not equals or key.partition(".")[0] in keys[name]:
                chosen[name].append(override)
    return [load_config(POLICIES[name], None, chosen[name]) for name in names]


def read(
    path: str | Path,
    configs: Sequence[PolicyConfig],
    tell: Callable[[str], None] = lambda line: None,
) -> list[PoolQuestion]:
    """The questions of a pool, which have enough answers for trials of `configs`; otherwise as
    `read_pool`."""
    config = configs[0]  # what all policies take is the same for all
    questions = read_pool(path, config.clean, tell)
    least = min(len(question.branches) for question in questions)
    for number, question in enumerate(questions, 1):
        if (found := len(question.branches)) < config.answers:
            enough = f"the pool has enough for --set answers={least}" if least else "one at least"
            raise ValueError(
                f"{path}: question {number}: each_branch has {found} answers, needed are "
                f"{config.answers} (answers): {enough}"
            )
    longest = max(len(branch.probes) for question in questions for branch in question.branches)
    for config in configs:
        if isinstance(config, ProbeConfig) and longest > config.steps:
            tell(
                f"{path}: an answer has {longest} probes, and steps is {config.steps}: what has "
                "not ended by then is cut off"
            )
    return questions


def scout(
    questions: Sequence[PoolQuestion],
    configs: Sequence[PolicyConfig],
    advance: Callable[[], None] = lambda: None,
) -> list[Result]:
    """What each policy gets right on a pool, and its bills; `advance` is called after each question
    of each."""
    sums = np.zeros((len(configs), 5), np.int64)
    drawn: dict[tuple[int, int, int], np.ndarray] = {}
    for question in questions:
        table = tabulate(question)
        for row, config in zip(sums, configs, strict=True):
            sizes = (len(question.branches), config.answers, config.trials)
            if sizes not in drawn:
                drawn[sizes] = orders(*sizes)
            found = config.run(table, drawn[sizes])
            bills = (*found.bill(), *found.bill(config.probe_tokens))
            row += [np.sum(found.answer == table.gold), *map(np.sum, bills)]
            advance()
    results = []
    for config, (right, *tokens) in zip(configs, sums.tolist(), strict=True):
        runs = len(questions) * config.trials
        means = [total // runs for total in tokens]
        results.append(Result(config, len(questions), round(100 * right / runs, 2), *means))
    return results


def table(results: Sequence[Result]) -> Table:
    """A row for each policy."""
    first = results[0]
    found = Table(
        caption=f"{first.questions} questions, {first.config.answers} answers to each, mean of "
        f"{first.config.trials} trials. Tokens of a question, sequential and total: as published "
        f"(probes are free), and with {first.config.probe_tokens} tokens for every probe",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        caption_justify="left",
    )
    found.add_column("policy")
    for heading in ("accuracy %", "sequential", "total", "sequential + probes", "total + probes"):
        found.add_column(heading, justify="right")
    for result in results:
        tokens = result[3:]
        found.add_row(
            result.config.name, f"{result.accuracy:.2f}", *(f"{count:,}" for count in tokens)
        )
    return found
