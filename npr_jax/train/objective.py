"""What a train step minimises, of laid-out rows."""

import dataclasses
import functools
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from npr_jax.base.fields import Checked, PositiveOrZero, Range, Share
from npr_jax.model import ModelConfig, token_loss
from npr_jax.model.score import Figures
from npr_jax.train import losses


@dataclasses.dataclass(frozen=True)
class Objective(Checked):
    """Which loss, with its hyper-parameters: those of "dapo", and the weight of the divergence from
    a reference (`losses.divergence`), whose log-probs the rows then have as `ref_logp`; and the
    bound of "papo"'s importance weights, 0 for none."""

    name: Literal["sft", "dapo", "papo"]
    clip_low: Share = 0.2
    clip_high: PositiveOrZero = 0.28
    dual_clip: Annotated[float, Range(gt=1)] = 10.0
    kl: PositiveOrZero = 0.0
    importance: PositiveOrZero = 0.0


def cast(params: dict, dtype: str) -> dict:
    """Parameters in the dtype that computes; the same arrays if they have it already."""
    return jax.tree.map(lambda x: x.astype(dtype), params)


def _loss(objective: Objective, logp: jax.Array, row: dict) -> losses.Loss:
    match objective.name:
        case "sft":
            return losses.sft(logp, row["loss_mask"])
        case "dapo":
            return losses.dapo(
                logp,
                row["old_logp"],
                row["advantages"],
                row["loss_mask"],
                objective.clip_low,
                objective.clip_high,
                objective.dual_clip,
            )
        case "papo":
            bound = objective.importance
            old_logp = row["old_logp"] if bound else None
            return losses.papo(logp, row["advantages"], row["loss_mask"], old_logp, bound)


def loss_sums(
    params: dict,
    rows: dict,
    model_config: ModelConfig,
    objective: Objective,
    compute_dtype: str,
    mesh: Mesh | None = None,
) -> tuple[jax.Array, Figures]:
    """Loss of rows [B, T] as a sum over their loss tokens; more sums; and largest values."""
    measure = functools.partial(_measure, objective)
    return token_loss(model_config, cast(params, compute_dtype), rows, measure, mesh)


def _measure(objective: Objective, logp, entropy, row: dict) -> tuple[jax.Array, Figures]:
    """Loss and figures of tokens with these log-probs and entropies."""
    mask = row["loss_mask"]
    loss, _, metrics = _loss(objective, logp, row)
    if objective.kl:
        metrics = metrics | {"kl": losses.divergence(logp, row["ref_logp"], mask)}
        loss = loss + objective.kl * metrics["kl"]
    sums = {"loss": loss, "entropy": jnp.where(mask, entropy, 0.0).sum(), **metrics}
    largest = {}
    if objective.name != "sft":
        gap = jnp.where(mask, jnp.abs(logp - row["old_logp"]), 0.0)
        sums["logp_gap"], largest["logp_gap_max"] = gap.sum(), gap.max()
    return loss, (sums, largest)
