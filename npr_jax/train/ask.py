"""Answers to the next problems of a run, whole groups of them.

With `carry` an answer grows by so many tokens on each of its paths in a batch, and no more; what
has not ended goes on in the next one, and a group is given in the batch in which its last answer
ends. What an answer has at the end of a batch follows from numbers alone, not from lanes or hosts.
Its keys and values are computed anew under the next weights (decode/regrow.py). Groups under way
take the place of new problems, which come in the same order as ever.
"""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from npr_jax.base.distributed import gather, gather_all, group_rank, group_size
from npr_jax.base.parts import part
from npr_jax.base.seeds import derive_seeds
from npr_jax.decode import Engine, SamplingParams, Trajectory
from npr_jax.decode.deal import deal_answers
from npr_jax.decode.regrow import Begun
from npr_jax.evaluate.judge import Answer, judge
from npr_jax.train.carry import Carried, UnderWay
from npr_jax.train.rl import Feed, RLConfig
from npr_jax.train.rollout import generate, roll_out


class Answers(NamedTuple):
    """Answers of this process by the numbers of their groups and samples; where the problem of each
    group stands among all; how many groups were asked that are not here; and metrics of these."""

    answers: dict[tuple[int, int], Answer]
    places: list[int]
    late: int
    metrics: dict[str, float]


def ask(
    engine: Engine,
    feed: Feed,
    config: RLConfig,
    sampling: SamplingParams,
    seed_path: Sequence[int],
    step: int,
    wanted: int,
) -> Answers:
    """Answers of `wanted` groups, or with `carry` of those that have ended.

    Args:
      seed_path: of the answers to new problems.
      step: number of the batch, from 1.
    """
    if config.carry:
        return _with_carry(engine, feed, config, sampling, seed_path, step, wanted)
    first = feed.position
    prompts, references = feed.take(config.asked(wanted))
    found = roll_out(engine, prompts, references, sampling, seed_path, wanted, config.check)
    places = [*range(first, feed.position)]
    return Answers(found, places, len(prompts) - wanted, {})


def _with_carry(
    engine: Engine,
    feed: Feed,
    config: RLConfig,
    sampling: SamplingParams,
    seed_path: Sequence[int],
    step: int,
    wanted: int,
) -> Answers:
    """Answers of the groups that end, of those under way and of as many new ones as make them
    `wanted`. What has not ended is carried by the feed from here on."""
    engine.drop_prefix_cache()
    limit, carried, first = config.carry, feed.carried, feed.position
    problems = max(0, wanted - len(carried.groups))
    feed.take(problems)
    fresh = [
        UnderWay(first + i, seed, step) for i, seed in enumerate(derive_seeds(problems, *seed_path))
    ]
    groups = carried.groups + fresh
    entries = _dealt(groups, len(carried.groups), carried, sampling.n, step, limit)
    with part("rollout"):
        made = generate(
            engine,
            [feed.prompt(groups[number].place) for number, _, _ in entries],
            dataclasses.replace(sampling, seed=tuple(groups[n].seed for n, _, _ in entries)),
            samples=[range(sample, sample + 1) for _, sample, _ in entries],
            begun=[begun for *_, begun in entries],
            pause=[_allowed(groups[number], step, limit) for number, _, _ in entries],
        )
    numbers = {group.place: number for number, group in enumerate(groups)}
    found = {(numbers[place], i): answer for (place, i), answer in carried.answers.items()}
    found |= {(n, i): answer for (n, i, _), answer in zip(entries, made, strict=True)}
    going = Counter(
        number
        for number, i in found
        if not _is_over(found[number, i], _allowed(groups[number], step, limit))
    )
    open_ = Counter()
    for of_process in gather(going):
        open_ += of_process
    whole = dict(sorted((key, made) for key, made in found.items() if not open_[key[0]]))
    feed.carried = Carried(
        [groups[number] for number in sorted(open_)],
        {(groups[n].place, i): made for (n, i), made in found.items() if open_[n]},
    )
    expected = [feed.problem(groups[number].place).answer for number, _ in whole]
    with part("judge"):
        judged = judge(engine, list(whole.values()), expected, config.check)
    ages = [step - group.step for number, group in enumerate(groups) if not open_[number]]
    metrics = {
        "carried": sum(open_.values()),
        "carried_groups": len(open_),
        "carried_batches": float(np.mean(ages)) if ages else 0.0,
    }
    places = [group.place for group in groups]
    return Answers(dict(zip(whole, judged, strict=True)), places, len(open_), metrics)


def _allowed(group: UnderWay, step: int, limit: int) -> int:
    """Tokens that a path may have at the end of that batch."""
    return limit * (step - group.step + 1)


def _is_over(answer: Trajectory, tokens: int) -> bool:
    """Whether an answer has ended within so many tokens: what it drew behind them, while its other
    paths grew, is drawn anew."""
    return answer.finish_reason != "aborted" and answer.stats["critical_path"] <= tokens


def _dealt(
    groups: Sequence[UnderWay], old: int, carried: Carried, samples: int, step: int, limit: int
) -> list[tuple[int, int, Begun | None]]:
    """What this process decodes, in order of groups and samples: its own answers of the `old`
    groups that go on, those that nobody has any more, and its share of the new ones."""
    entries: list[tuple[int, int, Begun | None]] = []
    known = {*gather_all(list(carried.answers))}
    lost = 0
    for number, group in enumerate(groups[:old]):
        tokens = _allowed(group, step - 1, limit)
        for i in range(samples):
            answer = carried.answers.get((group.place, i))
            if answer is not None and not _is_over(answer, tokens):
                entries.append((number, i, Begun(answer, tokens)))
            elif (group.place, i) not in known:
                lost += 1
                if lost % group_size() == group_rank():
                    entries.append((number, i, None))
    loads = gather(len(entries))
    new = len(groups) - old
    for some in deal_answers([samples] * new, [1] * new, loads)[group_rank()]:
        entries += [(old + some.prompt, i, None) for i in some.samples]
    return entries
