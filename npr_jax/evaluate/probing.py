"""Online probing: what answers would say now, asked while they are decoded.

    answer --every so many tokens--> fork + suffix --a few tokens--> what it says --> a pool

After Parallel-Probe (arXiv 2602.03845, section 2.1). A probe is a fork (`Engine.fork`): it reads
the answer's own pages, is made to answer, and is dropped; the answer goes on as if nobody had
asked. What is decided of it is told in tokens: a column of probes counts when every answer that
goes on has reached it, whatever the device did first.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from npr_jax.answers import equal, extract
from npr_jax.base.fields import Checked, Count, CountOrZero
from npr_jax.base.files import cut_half_line, json_text, whole_lines
from npr_jax.data.benchmarks import Question
from npr_jax.decode import Engine, Event, SamplingParams, Trajectory
from npr_jax.evaluate.policies import ProbeConfig, tabulate
from npr_jax.evaluate.pools import Branch, PoolQuestion, write_pool
from npr_jax.tree import layout


@dataclasses.dataclass(frozen=True)
class ProbingConfig(Checked):
    """How answers are probed.

    Attributes:
      suffix: the text behind which a probe answers; with what it draws it holds a `\\boxed{}`.
      max_tokens (tokens): that a probe draws, greedily.
      decide: whether probes decide: answers that contradict the vote of their problem end, and all
        end when it stays the same; else all go on, and probes are recorded.
      T, k, W (probes): of the decisions, as in `npr-jax scout --policy probe`.
    """

    suffix: str = "\n\nThe final answer is \\boxed{"
    max_tokens: Count = 16
    decide: bool = False
    T: CountOrZero = 40
    k: Count = 7
    W: CountOrZero = 15

    def check(self, every: int, sampling: SamplingParams) -> None:
        """Raises ValueError where answers that are sampled so cannot be probed every so many
        tokens."""
        if every and sampling.parallel:
            raise ValueError(
                f"probe is {every} and sampling.parallel true: branches are parts of one answer "
                "and cannot be probed; set sampling.parallel=false, or probe=0"
            )
        if self.decide and not every:
            raise ValueError("probing.decide is true and probe 0: set probe to a number of tokens")

    @property
    def policy(self) -> ProbeConfig:
        """What decides."""
        return ProbeConfig(T=self.T, k=self.k, W=self.W)


@dataclasses.dataclass
class Probed:
    """An answer that is probed: its problem, its sample, what its probes have said (None: not yet
    told; "": nothing) and cost, its length so far, and its end."""

    question: str
    sample: int
    said: list[str | None] = dataclasses.field(default_factory=list)
    costs: list[int] = dataclasses.field(default_factory=list)  # of its probes, in tokens
    length: int = 0
    trajectory: Trajectory | None = None
    dropped: bool = False

    @property
    def done(self) -> bool:
        """Whether it has ended, and its probes are told."""
        return self.trajectory is not None and None not in self.said

    @property
    def tokens(self) -> int:
        """What the probes that count have cost."""
        return sum(self.costs[: len(self.said)])

    @property
    def known(self) -> int:
        """How many of its probes are told, from the first on."""
        return self.said.index(None) if None in self.said else len(self.said)


class Prober:
    """Probes answers of an engine at every multiple of `every` tokens, and ends those that the
    probes decide against.

    `complete(answers)` is called once for each question, when all of its answers have ended.
    """

    def __init__(
        self,
        engine: Engine,
        config: ProbingConfig,
        every: int,
        complete: Callable[[list[Probed]], None],
    ):
        if engine.tokenizer is None:
            raise ValueError("probes need a tokenizer, and this model has none")
        self.engine, self.config, self.every = engine, config, every
        self._complete = complete
        self._suffix = engine.tokenizer.encode(config.suffix, add_special_tokens=False)
        self._sampling = SamplingParams(temperature=0, max_tokens=config.max_tokens, parallel=False)
        self._of: dict[int, Probed] = {}  # by request, of answers and of probes
        self._groups: dict[str, list[Probed]] = {}

    def follow(self, requests: Sequence[int], asked: Sequence[tuple[str, int]]) -> None:
        """These requests, whose `on_event` is `hear`, answer (question, sample)."""
        for request, (question, sample) in zip(requests, asked, strict=True):
            answer = self._of[request] = Probed(question, sample)
            self._groups.setdefault(question, []).append(answer)

    def hear(self, event: Event) -> None:
        """What happens to an answer."""
        answer = self._of[event.request]
        if event.kind == "token":
            # With the token behind it the place's own is computed.
            if answer.length and not answer.length % self.every and not answer.dropped:
                self._ask(event.request, answer)
            answer.length += 1
        elif event.kind == "finish":
            answer.trajectory = event.trajectory
            self._look(answer.question)

    def _ask(self, request: int, answer: Probed) -> None:
        place = len(answer.said)
        answer.said.append(None)
        answer.costs.append(0)

        def hear(event: Event) -> None:
            if event.kind == "finish" and not answer.dropped:
                probe = event.trajectory
                assert probe is not None
                answer.costs[place] = len(self._suffix) + len(probe.response_ids)
                answer.said[place] = extract(self.config.suffix + (probe.text or "")) or ""
                self._look(answer.question)

        made = self.engine.fork(request, answer.length, self._suffix, self._sampling, hear)
        self._of[made] = answer

    def _look(self, question: str) -> None:
        """Decides what can be decided now, and tells of a question that is over."""
        group = self._groups[question]
        if self.config.decide:
            self._decide(group)
        if not all(answer.done for answer in group):
            return
        for answer in group:
            if answer.dropped:  # the device may have gone on for a while
                answer.trajectory = _cut(answer, len(answer.said) * self.every, self.engine)
        del self._groups[question]
        self._of = {name: answer for name, answer in self._of.items() if answer not in group}
        self._complete(group)

    def _decide(self, group: list[Probed]) -> None:
        policy = self.config.policy
        waited_for = [a.known for a in group if not (a.dropped or a.done)]
        if waited_for:
            if (columns := min(waited_for)) < 2:
                return
            policy = dataclasses.replace(policy, steps=columns - 1)
        table = tabulate(pool_question(group, "", "", self.every))
        found = policy.run(table, np.arange(len(group), dtype=np.int32)[None])
        for answer, seen, pruned in zip(group, found.seen[0], found.pruned[0], strict=True):
            # One that has ended on the device may still end earlier by what is decided.
            goes_on = found.stopped[0] and seen <= len(answer.said)
            if not answer.dropped and (pruned or goes_on):
                answer.dropped = True
                del answer.said[int(seen) :]
                for request in [name for name, other in self._of.items() if other is answer]:
                    self.engine.abort(request)


def _cut(answer: Probed, count: int, engine: Engine) -> Trajectory:
    """The first `count` tokens of the response of an answer that was dropped behind them."""
    made = answer.trajectory
    assert made is not None and engine.tokenizer is not None
    end = made.prompt_len + count
    columns = {
        field.name: value[:end]
        for field in dataclasses.fields(made)
        if isinstance(value := getattr(made, field.name), np.ndarray)
    }
    text = engine.tokenizer.decode(
        columns["token_ids"][made.prompt_len :].tolist(), clean_up_tokenization_spaces=False
    )
    figures = {"tokens": count, "critical_path": count, "sampled": count}
    return dataclasses.replace(
        made,
        **columns,
        layout=layout(end, (), made.prompt_len, columns["forced"]),
        text=text,
        finish_reason="aborted",
        detail="by its probes",
        stats=made.stats | figures,
    )


def pool_question(group: Sequence[Probed], question: str, gold: str, every: int) -> PoolQuestion:
    """What is recorded of the answers to a question; of one that was dropped, its probes."""
    branches = []
    for answer in group:
        said = [text or None for text in answer.said[: answer.known]]
        tokens, final = len(said) * every, None
        if answer.trajectory is not None and not answer.dropped:
            tokens = len(answer.trajectory.response_ids)
            final = extract(answer.trajectory.text or "")
        branches.append(Branch(said, tokens, final))
    return PoolQuestion(question, gold, every, branches)


# The records of an evaluation: probes/NAME.jsonl, a line for each question whose answers are there.


def _path(output: Path, name: str) -> Path:
    return output / "probes" / f"{name}.jsonl"


def append_probes(output: Path, name: str, group: Sequence[Probed], every: int) -> None:
    """Adds a question, whose answers have ended."""
    group = sorted(group, key=lambda answer: answer.sample)
    branches = pool_question(group, "", "", every).branches
    record = {
        "id": group[0].question,
        "branches": [list(branch) for branch in branches],
        "probe_tokens": [answer.tokens for answer in group],
    }
    path = _path(output, name)
    path.parent.mkdir(exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json_text(record) + "\n")


def read_probes(output: Path, name: str) -> Iterator[dict]:
    """The records that are there; one that was not written whole is cut off."""
    path = _path(output, name)
    if path.exists():
        cut_half_line(path)
        for _, record in whole_lines(path, "probes of an evaluation", dict):
            yield record


def write_pools(
    output: Path, name: str, questions: Iterable[Question], every: int, config: ProbingConfig
) -> dict[str, float]:
    """Writes pools/NAME.json, which `npr-jax scout` reads, and returns what was seen: how many
    probes there were and what they cost, and of decisions how often the vote is right and the
    tokens of a question, as Parallel-Probe counts them and with those of the probes."""
    records = {record["id"]: record for record in read_probes(output, name)}
    pool: list[PoolQuestion] = []
    figures: dict[str, float] = {"probes": 0, "probe_tokens": 0}
    decided = Counter[str]()
    for question in questions:
        record = records[question.id]
        branches = [Branch(*branch) for branch in record["branches"]]
        pool.append(PoolQuestion(question.problem, question.answer, every, branches))
        spent = np.array(record["probe_tokens"])
        figures["probes"] += sum(len(branch.probes) for branch in branches)
        figures["probe_tokens"] += int(spent.sum())
        if config.decide:
            table = tabulate(pool[-1])
            found = config.policy.run(table, np.arange(len(branches), dtype=np.int32)[None])
            said = table.names[found.answer[0]]
            decided["accuracy"] += said is not None and equal(said, question.answer)
            for tokens, kind in ((found.tokens[0], ""), (found.tokens[0] + spent, "_with_probes")):
                decided[f"sequential_tokens{kind}"] += int(tokens.max())
                decided[f"total_tokens{kind}"] += int(tokens.sum())
    write_pool(output / "pools" / f"{name}.json", pool)
    if not config.decide:
        return figures
    return figures | {key: value / len(pool) for key, value in decided.items()}
