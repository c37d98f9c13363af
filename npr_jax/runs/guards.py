"""What a run must not go on with, beside what is not finite."""

import logging
from collections.abc import Mapping

from npr_jax.base.progress import Scalar, numeric

_log = logging.getLogger(__name__)


def check_gap(step: int, metrics: Mapping[str, Scalar], warn: float, stop: float) -> None:
    """Looks at the mean gap between the sampler's log-probs and the trainer's.

    Numerics alone make it about 1e-5 in float32 and a hundredth in bfloat16; a wrong mask, position
    or set of weights makes it large. Raises FloatingPointError above `stop`.
    """
    gap = numeric(metrics, "logp_gap", 0.0)
    if metrics.get("nonfinite") or gap <= warn:
        return  # what is not finite was skipped, and NonfiniteGuard counts it
    said = (
        f"step {step}: the sampler's log-probs and the trainer's differ by {gap:.3g} in the mean "
        f"and {metrics['logp_gap_max']:.3g} at most"
    )
    if age := metrics.get("rollout_age"):
        said += f" (also since the sampler's weights were {age} steps older)"
    if not gap <= stop:  # or it is no number
        raise FloatingPointError(
            f"{said}, more than train.gap_stop={stop}: what is trained is not what was sampled. "
            "The last checkpoint is from before this step; look for another compute_dtype, "
            "cache_dtype or attention in the engine, or raise train.gap_stop"
        )
    _log.warning("%s, more than train.gap_warn=%s", said, warn)


class NonfiniteGuard:
    """Stops a run after `limit` steps in a row in which no update was finite.

    A step without updates (there was nothing to train on) does not count. `in_a_row` is the whole
    state; checkpoints hold it.
    """

    def __init__(self, limit: int, in_a_row: int = 0):
        self.limit, self.in_a_row = limit, in_a_row

    def count(self, metrics: Mapping[str, Scalar]) -> dict[str, Scalar]:
        """Counts a step by its metrics; returns the metric that tells how many it is in a row, and
        why the step has changed nothing if so. Steps that are none of training give no metric."""
        if not metrics.keys() & {"nonfinite", "skipped"}:
            return {}
        if "nonfinite" in metrics:
            all_of_them = numeric(metrics, "nonfinite") > numeric(metrics, "off_policy_steps", 0)
            self.in_a_row = self.in_a_row + 1 if all_of_them else 0
            if all_of_them:
                reason = "the loss, its gradient or the new parameters are not finite"
                return {"nonfinite_in_a_row": self.in_a_row, "skipped_because": reason}
        return {"nonfinite_in_a_row": self.in_a_row}

    def check(self, step: int) -> None:
        """Raises FloatingPointError if `step` was the last that may be so."""
        if self.in_a_row >= self.limit:
            raise FloatingPointError(
                f"step {step}: the loss, its gradient or the parameters that it would have made "
                f"were not finite for {self.in_a_row} steps in a row "
                f"(train.max_nonfinite={self.limit}). They have not changed the parameters, and "
                "the last checkpoint is intact: look at the metrics before them, and begin anew "
                "with another train.optimizer, such as a lower learning_rate or clip"
            )
