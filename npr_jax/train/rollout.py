"""Rollouts: problems -> prompts -> engine -> judged answers -> examples to train on."""

import contextlib
import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

import numpy as np
from jax.sharding import Mesh

from npr_jax.answers import equal
from npr_jax.answers.check import Check
from npr_jax.base.distributed import gather_all, group_rank, group_size
from npr_jax.base.mesh import decode_mesh, local_decode_mesh
from npr_jax.base.parts import part, tell
from npr_jax.base.seeds import derive_seeds
from npr_jax.data.problems import Problem
from npr_jax.data.prompts import prompt_ids
from npr_jax.decode import Engine, SamplingParams, Trajectory
from npr_jax.decode.deal import deal_answers
from npr_jax.evaluate.judge import Answer, judge
from npr_jax.model import ModelConfig
from npr_jax.model.sharding import to_decode
from npr_jax.train.objective import cast
from npr_jax.train.packing import Example, loss_mask
from npr_jax.train.race import Race

T = TypeVar("T")

STAGES = ("zero", "beta", "papo")
# In the seed paths of orders and rollouts, after the run's seed:
ZERO, BETA, PAPO, EVALUATION = range(4)


NOTHING_ENDED = "no group has all of its answers yet: they go on"

# metric of a rollout batch: of what it is the mean, of an answer's figures
_MEANS = {
    "format_rate": lambda figures: figures.formed,
    "accuracy": lambda figures: figures.correct,
    "both_rate": lambda figures: figures.correct and figures.formed,
    "parallel_rate": lambda figures: figures.parallel,
    "truncated": lambda figures: figures.truncated,
    "response_tokens": lambda figures: figures.tokens,
    "critical_path": lambda figures: figures.critical_path,
    "branches": lambda figures: figures.branches,
    "width": lambda figures: figures.width,
    "depth": lambda figures: figures.depth,
}
_PARTIAL = ("block_place", "path_overlap")  # means over the answers that have them


def encode_problems(
    tokenizer, problems: Sequence[Problem], max_tokens: int
) -> tuple[list[Problem], list[list[int]]]:
    """The problems whose prompts have at most `max_tokens` tokens, and these prompts.

    Raises ValueError if none is left.
    """
    prompts = [prompt_ids(tokenizer, problem.problem) for problem in problems]
    fits = [i for i, prompt in enumerate(prompts) if len(prompt) <= max_tokens]
    if not fits:
        raise ValueError(
            f"all {len(problems)} prompts are longer than max_prompt_tokens={max_tokens}; the "
            f"shortest has {min(map(len, prompts))}"
        )
    return [problems[i] for i in fits], [prompts[i] for i in fits]


def roll_out(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    references: Sequence[str],
    sampling: SamplingParams,
    seed_path: Sequence[int],
    first: int | None = None,
    check: Check = equal,
) -> dict[tuple[int, int], Answer]:
    """`sampling.n` judged answers to each prompt, by the numbers of prompt and sample from 0, in
    this order. Of several processes each decodes its own share of the answers, and gets these: as
    many as any other but for one, all to be as long as each other as far as anyone knows. With
    `first` the answers of so many prompts, those that are finished first (train/race.py). `check`
    says which are right.

    The seeds come from `seed_path` alone and no prompt is cached, so that a resumed run samples
    the same, on any number of processes.
    """
    engine.drop_prefix_cache()
    count = len(prompts)
    dealt = deal_answers([sampling.n] * count, [1] * count, [0] * group_size())
    own, seeds = dealt[group_rank()], derive_seeds(count, *seed_path)
    keys = [(some.prompt, sample) for some in own for sample in some.samples]
    race = Race(keys, count, first) if first is not None and first < count else None
    with part("rollout"):
        trajectories = generate(
            engine,
            [prompts[some.prompt] for some in own],
            dataclasses.replace(sampling, seed=tuple(seeds[some.prompt] for some in own)),
            [some.samples for some in own],
            race,
        )
    found = dict(zip(keys, trajectories, strict=True))
    if race:
        winners = race.winners([made.stats["critical_path"] for made in trajectories])
        found = {key: made for key, made in found.items() if key[0] in winners}
    expected = [references[number] for number, _ in found]
    with part("judge"):
        return dict(zip(found, judge(engine, list(found.values()), expected, check), strict=True))


def generate(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingParams,
    samples: Sequence[range],
    race: Race | None = None,
    **more: Any,
) -> list[Trajectory]:
    """`Engine.generate` with `more`, which tells how far it is."""
    begun, before = time.perf_counter(), engine.stats()["sampled_tokens"]

    def progress(done: int, total: int) -> None:
        rate = (engine.stats()["sampled_tokens"] - before) / (time.perf_counter() - begun)
        tell(f"{done}/{total} answers, {rate:.0f} tokens/s")

    return engine.generate(prompts, sampling, progress, samples=samples, watch=_watch(race), **more)


_given_up: Callable[[], bool] | None = None


@contextlib.contextmanager
def given_up_when(asked: Callable[[], bool]) -> Iterator[None]:
    """Rollouts in here end early, all answers aborted, where `asked` says so between two visits of
    the engine; nothing may come of them then."""
    global _given_up
    outer, _given_up = _given_up, asked
    try:
        yield
    finally:
        _given_up = outer


def _watch(race: Race | None) -> Callable[[list[int], list[bool]], list[int]] | None:
    asked = _given_up
    if asked is None:
        return race and race.watch

    def watch(lengths: list[int], finished: list[bool]) -> list[int]:
        if asked():
            return [i for i, done in enumerate(finished) if not done]
        return race.watch(lengths, finished) if race else []

    return watch


def of_all(values: Mapping[tuple[int, int], T]) -> dict[tuple[int, int], T]:
    """What the processes know of their answers, together, in order of prompts and samples."""
    return dict(sorted(gather_all(list(values.items()))))


class Shown(NamedTuple):
    """Answers for people to look at, by their samples' numbers: those of this process to one
    problem, which stands so many behind the first that the rollout batch has asked anew."""

    number: int = 0
    answers: Mapping[int, Answer] = MappingProxyType({})


def first_of(
    own: Mapping[tuple[int, int], Answer],
    everyones: Iterable[tuple[int, int]],
    places: Sequence[int],
    begun: int,
) -> Shown:
    """This process's `own` answers to the first problem that is answered by any.

    Args:
      places: of the problems among all; begun: of the first that was asked anew.
    """
    first = min(number for number, _ in everyones)
    mine = {i: answer for (number, i), answer in own.items() if number == first}
    return Shown(places[first] - begun, mine)


def engine_params(config: ModelConfig, params: dict, dtype: str, mesh: Mesh | None) -> dict:
    """A train state's parameters as the engine of this process decodes with them."""
    if mesh is None:
        return cast(params, dtype)
    local = local_decode_mesh(mesh)
    assert local is not None  # a mesh has one
    return to_decode(config, params, dtype, decode_mesh(mesh), local)


def sampled_example(
    trajectory: Trajectory, advantage: float | np.ndarray, train_forced: bool = False
) -> Example:
    """To train on what the policy sampled, and on request on what the engine wrote."""
    mask = loss_mask(trajectory.layout, train_forced)
    return Example(trajectory.token_ids, trajectory.layout, mask, advantage, trajectory.logp)


def summary(answers: Sequence[Answer]) -> dict[str, float]:
    """Rates and means over the answers of all processes: format, accuracy, both, parallel,
    truncated, lengths and shapes, and where any answer has forked the place of the first block and
    the overlap of siblings; reasons of finishing, and rules of the format that are broken."""
    everything = gather_all([(answer.figures, _causes(answer)) for answer in answers])
    counts = Counter(cause for _, causes in everything for cause in causes)
    means = {
        name: float(np.mean([value(figures) for figures, _ in everything]))
        for name, value in _MEANS.items()
    }
    for name in _PARTIAL:
        values = [x for figures, _ in everything if (x := getattr(figures, name)) is not None]
        if values:
            means[name] = float(np.mean(values))
    return means | {name: number / len(everything) for name, number in sorted(counts.items())}


def _causes(answer: Answer) -> set[str]:
    """Why it finished, and every kind of rule that it breaks, each once."""
    broken = {f"broken/{violation.kind}" for violation in answer.violations}
    return {f"finish/{answer.trajectory.finish_reason}", *broken}
