"""Policies over many answers to one question: how many are begun, when they end, what they say.

    question --tabulate--> Table;  Table, orders --a policy--> Outcome;  Outcome --bill--> tokens

Policies are pure functions of what was recorded (pools.py): they read probes as if they had been
made now, in S trials at a time, each with N of the answers in an order of its own. Five of them:

    sc     self-consistency (2203.11171): all N answers, then a vote
    asc    adaptive consistency (2305.11860): one by one, until the most frequent is sure enough
    esc    early-stopping self-consistency (2401.10480): window by window, until one is unanimous
    sac    each answer ends when n probes in a row read the same, then a vote
    probe  Parallel-Probe (2602.03845): answers that the vote contradicts are dropped on the way,
           and all end when the vote has stayed the same

They count as the code published with Parallel-Probe does, to the token. Of answers voted for
equally often the first counts, in the order of the branches that gave them.
"""

import dataclasses
import math
import random
from typing import Annotated, ClassVar, NamedTuple

import numpy as np

from npr_jax.base.fields import Checked, Count, CountOrZero, Range
from npr_jax.evaluate.pools import PoolQuestion

NOTHING = 0  # the code of no answer


class Table(NamedTuple):
    """The answers to one question as numbers, B branches with at most P probes.

    Attributes:
      names: texts of the codes, that of NOTHING first.
      gold: code of the right answer.
      interval: tokens between two probes.
      codes: i32[B, P + 1], what each probe read, then what the branch ended with, repeated.
      probes: i32[B], how many probes there are.
      tokens: i64[B], of the whole answers.
    """

    names: list[str | None]
    gold: int
    interval: int
    codes: np.ndarray
    probes: np.ndarray
    tokens: np.ndarray

    @property
    def final(self) -> np.ndarray:
        """i32[B], what the branches ended with."""
        return self.codes[:, -1]


def tabulate(question: PoolQuestion) -> Table:
    """A question as numbers; equal texts are equal answers."""
    known: dict[str | None, int] = {None: NOTHING}
    gold = known.setdefault(question.gold, len(known))
    probes = np.array([len(branch.probes) for branch in question.branches], np.int32)
    codes = np.empty((len(probes), int(probes.max(initial=0)) + 1), np.int32)
    for row, branch in zip(codes, question.branches, strict=True):
        row[:] = known.setdefault(branch.final, len(known))
        row[: len(branch.probes)] = [known.setdefault(x, len(known)) for x in branch.probes]
    tokens = np.array([branch.tokens for branch in question.branches], np.int64)
    return Table(list(known), gold, question.interval, codes, probes, tokens)


def orders(branches: int, answers: int, trials: int) -> np.ndarray:
    """i32[S, N], the branches of each trial: the first N of a shuffle seeded with its number."""
    drawn = []
    for seed in range(trials):
        order = list(range(branches))
        random.Random(seed).shuffle(order)
        drawn.append(order[:answers])
    return np.array(drawn, np.int32)


class Outcome(NamedTuple):
    """What a policy did in S trials with N branches each.

    Attributes:
      answer: i32[S], the code that was chosen; NOTHING where no branch had an answer.
      tokens: i64[S, N], that each branch cost.
      seen: i32[S, N], how many of its entries of `Table.codes` were read; 0: it was not begun.
      probes: i32[S, N], how many of them were probes that were made for the policy.
      beside: branches that run at the same time; such groups run one after another.
      pruned: bool[S, N], whether a branch was dropped.
      stopped: bool[S], whether branches were stopped all at once, by what they said together.
    """

    answer: np.ndarray
    tokens: np.ndarray
    seen: np.ndarray
    probes: np.ndarray
    beside: int
    pruned: np.ndarray
    stopped: np.ndarray

    def bill(self, probe_tokens: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """(i64[S], i64[S]): tokens one after another, and all, where a probe costs so many."""
        tokens = self.tokens + probe_tokens * self.probes.astype(np.int64)
        starts = np.arange(0, tokens.shape[1], self.beside)
        return np.maximum.reduceat(tokens, starts, axis=1).sum(1), tokens.sum(1)


def vote(codes: np.ndarray, voting: np.ndarray) -> np.ndarray:
    """i32[S], the most frequent code of each row of `codes` i32[S, N] where `voting`, of equally
    frequent ones the first; NOTHING where nobody votes."""
    rows, size = np.arange(len(codes)), int(codes.max(initial=0)) + 1
    cells = rows[:, None] * size + codes
    counts = np.bincount(cells[voting], minlength=len(codes) * size)
    votes = np.where(voting, counts[cells], 0)
    return np.where(voting.any(1), codes[rows, votes.argmax(1)], NOTHING)


@dataclasses.dataclass(frozen=True)
class PolicyConfig(Checked):
    """What all policies take.

    Attributes:
      answers (answers): N, the branches of a question that a trial has.
      trials (trials): that are averaged; trial s shuffles the recorded answers with the seed s.
      probe_tokens (tokens): what a probe costs where it is charged for: by default nine that are
        forced (the tag that ends the thinking, an empty line, "The final answer is" and an open
        box) and four that are decoded (a short answer and its brace).
      clean: whether the answers of the pool are cleaned before they are counted; null does it where
        one of them shows that they have not been.
    """

    name: ClassVar[str] = ""

    answers: Count = 64
    trials: Count = 100
    probe_tokens: CountOrZero = 13
    clean: bool | None = None

    def run(self, table: Table, order: np.ndarray) -> Outcome:
        """The policy on one question; `order` i32[S, N] has the branches of each trial."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class ScConfig(PolicyConfig):
    """Self-consistency."""

    name: ClassVar[str] = "sc"

    def run(self, table: Table, order: np.ndarray) -> Outcome:
        return _whole(table, order, np.full(len(order), order.shape[1]), order.shape[1])


@dataclasses.dataclass(frozen=True)
class AscConfig(PolicyConfig):
    """Adaptive consistency.

    Attributes:
      threshold: it stops when the most frequent answer leads the second one with more than this
        confidence (`lead_confidence`).
    """

    name: ClassVar[str] = "asc"

    threshold: Annotated[float, Range(ge=0, le=1)] = 0.95

    def run(self, table: Table, order: np.ndarray) -> Outcome:
        trials, most = order.shape
        sure = np.zeros((most + 1, most + 1), bool)
        for first in range(most + 1):
            for second in range(min(first, most - first) + 1):
                sure[first, second] = lead_confidence(first, second) > self.threshold
        rows, asked = np.arange(trials), np.full(trials, most)
        counts = np.zeros((trials, len(table.names)), np.int32)
        leader, first, second = (np.zeros(trials, np.int32) for _ in range(3))
        for number in range(1, most + 1):
            code = table.final[order[:, number - 1]]
            counts[rows, code] += code != NOTHING
            count = counts[rows, code]
            second = np.where(code == leader, second, np.maximum(second, np.minimum(count, first)))
            leader, first = np.where(count > first, code, leader), np.maximum(first, count)
            ends = (first + second >= 2) & sure[first, second] & (asked == most)
            asked[ends] = number
        return _whole(table, order, asked, 1)


def lead_confidence(first: int, second: int) -> float:
    """P(p > 1/2) for p ~ Beta(first + 1, second + 1): that of two answers, counted so often, the
    first is the more frequent one (Aggarwal et al. 2023).

    The integral is a sum of binomial coefficients, which needs no approximation.
    """
    size = first + second + 1
    return sum(math.comb(size, j) for j in range(first + 1)) / 2**size


@dataclasses.dataclass(frozen=True)
class EscConfig(PolicyConfig):
    """Early-stopping self-consistency.

    Attributes:
      window (answers): that are begun together; it stops when all of them end alike. What is
        beyond the last whole window is not begun.
    """

    name: ClassVar[str] = "esc"

    window: Count = 8

    def __post_init__(self):
        super().__post_init__()
        if self.window > self.answers:
            raise ValueError(f"window is {self.window}, needed is at most answers: {self.answers}")

    def run(self, table: Table, order: np.ndarray) -> Outcome:
        windows = order.shape[1] // self.window
        codes = table.final[order[:, : windows * self.window]].reshape(-1, windows, self.window)
        given = codes != NOTHING
        highest = codes.max(2)
        alike = given.any(2) & (~given | (codes == highest[..., None])).all(2)
        number = np.where(alike.any(1), alike.argmax(1), windows - 1)
        found = _whole(table, order, (number + 1) * self.window, self.window)
        unanimous = highest[np.arange(len(order)), number]
        return found._replace(answer=np.where(alike.any(1), unanimous, found.answer))


@dataclasses.dataclass(frozen=True)
class SacConfig(PolicyConfig):
    """Self-consistency of answers that end when they repeat themselves.

    Attributes:
      n (probes): an answer ends when so many of its probes in a row have read the same.
    """

    name: ClassVar[str] = "sac"

    n: Count = 14

    def run(self, table: Table, order: np.ndarray) -> Outcome:
        at = np.arange(table.codes.shape[1])
        same = np.diff(table.codes, axis=1, prepend=-1) == 0
        in_a_row = at - np.maximum.accumulate(np.where(same, 0, at), axis=1) + 1
        ends = (in_a_row >= self.n) | (at >= table.probes[:, None])
        seen = ends.argmax(1) + 1
        answer = table.codes[np.arange(len(seen)), seen - 1][order]
        pruned, stopped = np.zeros(order.shape, bool), np.zeros(len(order), bool)
        answer = vote(answer, answer != NOTHING)
        return _probed(table, order, answer, seen[order], pruned, stopped)


@dataclasses.dataclass(frozen=True)
class ProbeConfig(PolicyConfig):
    """Parallel-Probe.

    Attributes:
      T (probes): all stop when the vote has been the same as before so many times in a row, so
        after T + 2 probes at the earliest; more than there are never stops. (Where the first vote
        is for nothing, that counts too.)
      k (probes): a branch is dropped when it has contradicted the vote so many times in a row; more
        than there are never drops one.
      W (probes): that go by before disagreement counts.
      steps (probes): what is not over after so many, and the first one, is cut off.
    """

    name: ClassVar[str] = "probe"

    T: CountOrZero = 40
    k: Count = 7
    W: CountOrZero = 15
    steps: Count = 100

    def run(self, table: Table, order: np.ndarray) -> Outcome:
        whole = table.probes[order] + 1
        seen = np.ones(order.shape, np.int32)
        pruned, against = np.zeros(order.shape, bool), np.zeros(order.shape, np.int32)
        before, stable = np.full(len(order), NOTHING), np.zeros(len(order), np.int32)
        running = np.ones(len(order), bool)
        for step in range(self.steps):
            seen += running[:, None] & ~pruned & (seen < whole)
            now = table.codes[order, seen - 1]
            said = vote(now, ~pruned)
            if step >= self.W:
                # Who is dropped had another answer, so the vote is the same without them, and of
                # those who gave it one is left.
                against = np.where(now == said[:, None], 0, against + 1)
                pruned |= running[:, None] & (seen < whole) & (against >= self.k)
            stable = np.where(running, np.where(said == before, stable + 1, 0), stable)
            before = np.where(running, said, before)
            running &= (stable < self.T) & ((seen < whole) & ~pruned).any(1)
            if not running.any():
                break
        stopped = ~running & np.any((seen < whole) & ~pruned, axis=1)
        return _probed(table, order, before, seen, pruned, stopped)


POLICIES: dict[str, type[PolicyConfig]] = {
    cls.name: cls for cls in (ScConfig, AscConfig, EscConfig, SacConfig, ProbeConfig)
}


def _whole(table: Table, order: np.ndarray, asked: np.ndarray, beside: int) -> Outcome:
    """The vote of the first `asked` i64[S] branches, which are decoded to their ends."""
    begun = np.arange(order.shape[1]) < asked[:, None]
    final = table.final[order]
    return Outcome(
        vote(final, begun & (final != NOTHING)),
        np.where(begun, table.tokens[order], 0),
        np.where(begun, table.probes[order] + 1, 0),
        np.zeros(order.shape, np.int32),
        beside,
        np.zeros(order.shape, bool),
        np.zeros(len(order), bool),
    )


def _probed(
    table: Table,
    order: np.ndarray,
    answer: np.ndarray,
    seen: np.ndarray,
    pruned: np.ndarray,
    stopped: np.ndarray,
) -> Outcome:
    """Of N branches beside each other of which `seen` i32[S, N] entries were read.

    A probe is charged with the tokens between two, though the last one of a branch may have come
    after fewer; what a branch ended with, with what is left of its tokens then.
    """
    made, whole = table.probes[order], table.tokens[order]
    probes = np.minimum(seen, made)
    rest = np.where(seen > made, np.maximum(whole - table.interval * made.astype(np.int64), 0), 0)
    tokens = table.interval * probes.astype(np.int64) + rest
    return Outcome(answer, tokens, seen, probes, order.shape[1], pruned, stopped)
