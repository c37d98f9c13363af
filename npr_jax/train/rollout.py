"""Rollouts: problems -> prompts -> engine -> judged trajectories -> examples to train on."""

import dataclasses
from collections import Counter
from collections.abc import Sequence

import numpy as np

from npr_jax.answers import equal_many, extract
from npr_jax.decode import Engine, SamplingParams, Trajectory
from npr_jax.format import Violation, check_format
from npr_jax.prompts import prompt_ids
from npr_jax.train.data import Problem, derive_seeds
from npr_jax.train.rows import Example

STAGES = ("zero", "beta", "papo")
ZERO, BETA, PAPO = range(3)  # in the seed paths of orders and rollouts, after the run's seed


@dataclasses.dataclass(frozen=True, eq=False)
class Rollout:
    """One answer with what the checks say of it."""

    trajectory: Trajectory
    violations: list[Violation]
    correct: bool


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
    answers: Sequence[str],
    sampling: SamplingParams,
    seed_path: Sequence[int],
) -> list[list[Rollout]]:
    """`sampling.n` judged answers to each prompt, grouped by prompt.

    The seeds come from `seed_path` alone and no prompt is cached, so that a resumed run samples
    the same.
    """
    engine.drop_prefix_cache()
    seeds = tuple(derive_seeds(len(prompts), *seed_path))
    trajectories = engine.generate(prompts, dataclasses.replace(sampling, seed=seeds))
    references = [answer for answer in answers for _ in range(sampling.n)]
    correct = equal_many(
        [(extract(t.text), ref) for t, ref in zip(trajectories, references, strict=True)]
    )
    limits = engine.config
    rollouts = [
        Rollout(
            trajectory,
            check_format(
                trajectory.token_ids, trajectory.prompt_len, engine.tags, limits.max_branches
            ),
            right,
        )
        for trajectory, right in zip(trajectories, correct, strict=True)
    ]
    return [rollouts[i : i + sampling.n] for i in range(0, len(rollouts), sampling.n)]


def sampled_example(trajectory: Trajectory, advantage: float) -> Example:
    """To train on what the policy sampled: neither the prompt nor what the engine forced."""
    mask = ~trajectory.forced
    mask[: trajectory.prompt_len] = False
    return Example(trajectory.token_ids, trajectory.layout, mask, float(advantage), trajectory.logp)


def summary(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Rates and means over rollouts: format, accuracy, both, parallel, lengths, finish reasons."""

    def mean(values) -> float:
        return float(np.mean(list(values)))

    stats = [rollout.trajectory.stats for rollout in rollouts]
    reasons = Counter(rollout.trajectory.finish_reason for rollout in rollouts)
    return {
        "format_rate": mean(not r.violations for r in rollouts),
        "accuracy": mean(r.correct for r in rollouts),
        "both_rate": mean(r.correct and not r.violations for r in rollouts),
        "parallel_rate": mean(r.trajectory.layout.width > 1 for r in rollouts),
        "response_tokens": mean(s["tokens"] for s in stats),
        "critical_path": mean(s["critical_path"] for s in stats),
        "branches": mean(s["branches"] for s in stats),
    } | {f"finish/{reason}": count / len(rollouts) for reason, count in sorted(reasons.items())}
