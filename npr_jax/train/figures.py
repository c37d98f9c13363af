"""What a step of training has made of its devices: figures of all processes, for the metrics."""

import dataclasses
from collections.abc import Mapping

from jax.sharding import Mesh

from npr_jax.base.chips import memory, peak_flops
from npr_jax.base.distributed import gather
from npr_jax.base.progress import Scalar
from npr_jax.model import ModelConfig
from npr_jax.model.flops import row_work, work_flops
from npr_jax.train.batch import Batch

# Counts of an engine (`Engine.stats`) whose growth in a step is told, or what is made of it.
_COUNTS = ("preemptions", "cached_tokens", "prefill_tokens")
_ROWS = ("decode_tokens", "decode_rows")


def flops_of(config: ModelConfig, batch: Batch) -> float:
    """FLOPs that training on the tokens of this process's rows needs: neither what fills the rows
    up, nor what a mask hides, nor what is computed again (remat)."""
    config = dataclasses.replace(config, remat="none")
    total = 0.0
    for rows in batch.parts:
        row_len, depth, _ = rows["hidden"].shape[2:]
        hidden = rows["hidden"].reshape(-1, row_len, depth, 2)
        for work in map(row_work, hidden, rows["pred"].reshape(-1, row_len)):
            total += work_flops(config, *work)
    return total


def engine_counts(stats: Mapping[str, float]) -> dict[str, float]:
    """Of an engine's stats the counts that `figures` compares."""
    return {name: stats[name] for name in (*_COUNTS, *_ROWS)}


def figures(
    flops: float,
    seconds: float,
    mesh: Mesh | None,
    dtype: str,
    counts: Mapping[str, float] | None = None,
) -> dict[str, Scalar]:
    """Metrics of a step; all processes make the call together.

    Args:
      flops: that this process's rows needed (`flops_of`); seconds: in which all were trained.
      counts: what `engine_counts` have grown by in the step's rollout, where a process knows it.

    Returns:
      `train_flops`: of all rows; `mfu`: of the peak of all devices (`peak_flops`) the share that
      they took, where anything was trained; `memory/...` of the process that has most;
      `engine/occupancy`: of the rows that the engines have computed, the share that drew a token;
      `engine/preemptions`, `engine/cached_tokens`, `engine/prefill_tokens`.
    """
    parts = gather((flops, memory(), dict(counts or {})))
    total = sum(part for part, _, _ in parts)
    found: dict[str, Scalar] = {"train_flops": total}
    if total:
        found["mfu"] = total / (seconds * peak_flops(mesh, dtype))
    for name in parts[0][1]:
        found[name] = max(held.get(name, 0.0) for _, held, _ in parts)
    grown = {name: sum(known.get(name, 0.0) for *_, known in parts) for name in (*_COUNTS, *_ROWS)}
    if grown["decode_rows"]:
        found["engine/occupancy"] = grown["decode_tokens"] / grown["decode_rows"]
        found |= {f"engine/{name}": grown[name] for name in _COUNTS}
    return found
