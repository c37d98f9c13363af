"""Rollouts: problems -> prompts -> engine -> judged trajectories -> examples to train on."""

import dataclasses
from collections import Counter
from collections.abc import Sequence

import numpy as np
from jax.sharding import Mesh

from npr_jax.answers import equal_many, extract
from npr_jax.base.distributed import gather_all, mine
from npr_jax.base.mesh import decode_mesh, local_decode_mesh
from npr_jax.base.seeds import derive_seeds
from npr_jax.data.problems import Problem
from npr_jax.data.prompts import prompt_ids
from npr_jax.decode import Engine, SamplingParams, Trajectory
from npr_jax.decode.trajectory import TRUNCATED
from npr_jax.evaluate.traces import Trace, make_trace
from npr_jax.model import ModelConfig
from npr_jax.model.sharding import to_decode
from npr_jax.train.packing import Example
from npr_jax.train.step import cast
from npr_jax.tree.format import Violation, check_format

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
    """`sampling.n` judged answers to each prompt, grouped by prompt; of several processes each
    decodes its own share of the prompts (`distributed.mine`), and gets the groups of these.

    The seeds come from `seed_path` alone and no prompt is cached, so that a resumed run samples
    the same.
    """
    engine.drop_prefix_cache()
    seeds = tuple(mine(derive_seeds(len(prompts), *seed_path)))
    prompts, answers = mine(prompts), mine(answers)
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


def engine_params(config: ModelConfig, params: dict, dtype: str, mesh: Mesh | None) -> dict:
    """A train state's parameters as the engine of this process decodes with them."""
    if mesh is None:
        return cast(params, dtype)
    return to_decode(config, params, dtype, decode_mesh(mesh), local_decode_mesh(mesh))


def sampled_example(trajectory: Trajectory, advantage: float) -> Example:
    """To train on what the policy sampled: neither the prompt nor what the engine forced."""
    mask = ~trajectory.forced
    mask[: trajectory.prompt_len] = False
    return Example(trajectory.token_ids, trajectory.layout, mask, float(advantage), trajectory.logp)


def trace_of(rollout: Rollout, tokenizer, problem: Problem, **about) -> Trace:
    """A rollout as a trace; `about`: its benchmark, id and sample."""
    return make_trace(
        rollout.trajectory,
        tokenizer,
        problem=problem.problem,
        reference=problem.answer,
        prediction=extract(rollout.trajectory.text),
        correct=rollout.correct,
        violations=[violation.reason for violation in rollout.violations],
        **about,
    )


def summary(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Rates and means over the rollouts of all processes: format, accuracy, both, parallel,
    truncated, lengths and shapes; reasons of finishing, and rules of the format that are broken."""
    facts = gather_all([_facts(rollout) for rollout in rollouts])
    reasons = Counter(f"finish/{fact.pop('finish_reason')}" for fact in facts)
    for fact in facts:  # an answer counts once for every kind of rule that it breaks
        reasons.update(f"broken/{kind}" for kind in fact.pop("broken"))
    means = {name: float(np.mean([fact[name] for fact in facts])) for name in facts[0]}
    return means | {name: count / len(facts) for name, count in sorted(reasons.items())}


def _facts(rollout: Rollout) -> dict:
    trajectory, formed = rollout.trajectory, not rollout.violations
    return {
        "format_rate": formed,
        "accuracy": rollout.correct,
        "both_rate": rollout.correct and formed,
        "parallel_rate": trajectory.layout.width > 1,
        "truncated": trajectory.finish_reason in TRUNCATED,
        "response_tokens": trajectory.stats["tokens"],
        "critical_path": trajectory.stats["critical_path"],
        "branches": trajectory.stats["branches"],
        "width": trajectory.layout.width,
        "depth": trajectory.layout.depth,
        "finish_reason": trajectory.finish_reason,
        "broken": {violation.kind for violation in rollout.violations},
    }
