"""Updates whose loss or gradient was not finite: the step skips them, here they are counted."""

from collections.abc import Mapping

from npr_jax.metrics import Scalar


class NonfiniteGuard:
    """Stops a run after `limit` steps in a row in which no update was finite.

    A step without updates (there was nothing to train on) does not count. `in_a_row` is the whole
    state; checkpoints hold it.
    """

    def __init__(self, limit: int, in_a_row: int = 0):
        self.limit, self.in_a_row = limit, in_a_row

    def count(self, metrics: Mapping[str, Scalar]) -> dict[str, int]:
        """Counts a step by its metrics; returns the metric that tells how many it is in a row."""
        if "nonfinite" in metrics:
            all_of_them = metrics["nonfinite"] > metrics.get("off_policy_steps", 0)
            self.in_a_row = self.in_a_row + 1 if all_of_them else 0
        return {"nonfinite_in_a_row": self.in_a_row}

    def check(self, step: int) -> None:
        """Raises FloatingPointError if `step` was the last that may be so."""
        if self.in_a_row >= self.limit:
            raise FloatingPointError(
                f"step {step}: the loss or its gradient was not finite for {self.in_a_row} steps "
                f"in a row (train.max_nonfinite={self.limit}). They have not changed the "
                "parameters, and the last checkpoint is intact: look at the metrics before them, "
                "and begin anew with a lower optimizer.learning_rate or optimizer.clip"
            )
