"""Evaluation in the loop: how good the weights are on problems that are not trained on.

The run's engine answers every problem as a rollout does, with the same seeds each time, and its
answers are judged as always. Nothing of it reaches the training, whose numbers stay what they are
without it; it is part of what a run resumes from.
"""

import dataclasses
from collections.abc import Mapping, Sequence

from npr_jax.answers import equal
from npr_jax.answers.check import Check
from npr_jax.base.fields import Checked, Count, CountOrZero
from npr_jax.base.parts import part
from npr_jax.base.progress import Scalar
from npr_jax.data.problems import Problem, read_problems
from npr_jax.decode import Engine, SamplingParams
from npr_jax.train.inputs import problems_content
from npr_jax.train.rollout import EVALUATION, encode_problems, roll_out, summary


@dataclasses.dataclass(frozen=True)
class EvaluateConfig(Checked):
    """When and on what a run is evaluated: before its first step, every so many, after the last.

    Attributes:
      every (steps): between evaluations; a multiple of `train.checkpoint_every`, so that what is
        evaluated is saved.
      problems: JSONL file of problems and answers, or a directory of `npr-jax data prepare`; none
        of them is among those that are trained on.
      samples (answers): to each problem.
      patience (evaluations): in a row without a better `eval/score`, after which the run ends; 0
        is off.
    """

    every: Count
    problems: str
    samples: Count = 1
    patience: CountOrZero = 0


class Evaluation:
    """The evaluations of a run. `record` is all its state, JSON values that a checkpoint holds:
    the score before the first step (`baseline`), the best one since and its step, how many
    evaluations there have been since then, and the step of the last one."""

    def __init__(
        self,
        config: EvaluateConfig,
        problems: Sequence[Problem],
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams,
        seed: int,
        check: Check = equal,
    ):
        self.config, self._prompts = config, prompts
        self._references = [problem.answer for problem in problems]
        self._sampling = dataclasses.replace(sampling, n=config.samples)
        self._seed, self._check = seed, check
        self.record: dict = {}

    def due(self, step: int, total: int) -> bool:
        """Whether the weights after `step` steps, of `total`, are to be evaluated."""
        return step % self.config.every == 0 or step == total

    def begin(self, engine: Engine, step: int) -> None:
        """Takes the weights that the engine has as the baseline, where there is none yet."""
        if not self.record:
            score = self._measure(engine)["eval/score"]
            self.record = {"baseline": score, "best": score, "best_step": step, "since": 0}

    def measure(self, engine: Engine, step: int) -> dict[str, Scalar]:
        """Metrics of the weights after `step` steps, which the engine has; goes into the record.

        `eval/score`: the share of answers that are right and keep the format; `eval/accuracy`,
        `eval/format_rate` and others of `summary`; `eval/baseline`; `eval/best`, `eval/best_step`;
        `eval/since_best`: evaluations without a better score.
        """
        metrics = self._measure(engine)
        score, record = metrics["eval/score"], self.record
        if score > record["best"]:
            self.record = record | {"best": score, "best_step": step, "since": 0}
        else:
            self.record = record | {"since": record["since"] + 1}
        return metrics | {
            "eval/baseline": self.record["baseline"],
            "eval/best": self.record["best"],
            "eval/best_step": self.record["best_step"],
            "eval/since_best": self.record["since"],
        }

    def is_over(self) -> bool:
        """Whether patience is at its end."""
        return 0 < self.config.patience <= self.record.get("since", 0)

    def value(self, metrics: Mapping[str, Scalar]) -> float | None:
        """By what the best checkpoint is chosen: the score of an evaluation, where it is better
        than the baseline; what is worse than the model that the run began with is no best."""
        if metrics.get("eval/best_step") != metrics.get("step"):
            return None
        score = metrics["eval/score"]
        assert isinstance(score, float)  # it is a mean
        return score

    def _measure(self, engine: Engine) -> dict[str, float]:
        """Answers all problems and sums up; processes make the call together."""
        with part("evaluate", whole=True):
            seeds = (self._seed, EVALUATION)
            found = roll_out(
                engine,
                self._prompts,
                self._references,
                self._sampling,
                seeds,
                check=self._check,
            )
            means = summary(list(found.values()))
        means["score"] = means.pop("both_rate")
        return {f"eval/{name}": mean for name, mean in means.items() if "/" not in name}


def evaluation_of(
    config: EvaluateConfig | None,
    tokenizer,
    trained: Sequence[Problem],
    max_prompt_tokens: int,
    sampling: SamplingParams,
    seed: int,
    check: Check = equal,
) -> tuple[Evaluation | None, dict[str, str]]:
    """The evaluations that a stage's config asks for, and what their problems hold, by its key.

    Raises ValueError where a problem is among those that are `trained` on.
    """
    if config is None:
        return None, {}
    path = config.problems
    given, known = read_problems(path), {_words(problem) for problem in trained}
    if shared := [problem.problem for problem in given if _words(problem) in known]:
        raise ValueError(
            f"evaluate.problems is {path}, and {len(shared)} of its {len(given)} problems are "
            f"trained on, such as {shared[0][:80]!r}: needed are others, so take them out of it, "
            "or out of problems"
        )
    problems, prompts = encode_problems(tokenizer, given, max_prompt_tokens)
    made = Evaluation(config, problems, prompts, sampling, seed, check)
    return made, {"evaluate.problems": problems_content(problems, prompts)}


def _words(problem: Problem) -> str:
    return " ".join(problem.problem.split())
