"""What a run must not go on with, beside what is not finite."""

import logging
from collections.abc import Mapping

from npr_jax.metrics import Scalar

_log = logging.getLogger(__name__)


def check_gap(step: int, metrics: Mapping[str, Scalar], warn: float, stop: float) -> None:
    """Looks at the mean gap between the sampler's log-probs and the trainer's.

    Numerics alone make it about 1e-5 in float32 and a hundredth in bfloat16; a wrong mask, position
    or set of weights makes it large. Raises FloatingPointError above `stop`.
    """
    gap = metrics.get("logp_gap", 0.0)
    if metrics.get("nonfinite") or gap <= warn:
        return  # what is not finite was skipped, and NonfiniteGuard counts it
    said = (
        f"step {step}: the sampler's log-probs and the trainer's differ by {gap:.3g} in the mean "
        f"and {metrics['logp_gap_max']:.3g} at most"
    )
    if not gap <= stop:  # or it is no number
        raise FloatingPointError(
            f"{said}, more than train.gap_stop={stop}: what is trained is not what was sampled. "
            "The last checkpoint is from before this step; look for another compute_dtype, "
            "cache_dtype or attention in the engine, or raise train.gap_stop"
        )
    _log.warning("%s, more than train.gap_warn=%s", said, warn)
