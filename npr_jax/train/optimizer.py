"""The optimizer and its state, where it lives on a mesh, and the rate of each step."""

import dataclasses
import functools
import logging
import math
from typing import Annotated, Any, Literal, cast

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from npr_jax.base.fields import Checked, Positive, PositiveOrZero, Range
from npr_jax.model import ModelConfig, abstract_params
from npr_jax.model.lora import base_of, trained
from npr_jax.model.sharding import train_shardings

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig(Checked):
    """The optimizer, with a clip of the gradient's global norm.

    Attributes:
      name: "adamw", or "lion" (arXiv 2302.06675), which has one moment in place of two: half of the
        optimizer's memory. It steps by signs, so its learning rate is 3 to 10 times smaller and its
        weight decay as much larger.
      moments: dtype in which moments are kept between steps; they are computed in float32.
        "bfloat16" halves them: each is less than a 128th of itself away, up or down by chance,
        since a moment that decays slowly would stand still if it went to the nearest number.
      learning_rate: after the warm-up.
      schedule: "constant", or "cosine" down to `final_learning_rate` at the last step.
      final_learning_rate: where the cosine ends.
      warmup (optimizer steps): of linear warm-up; below 1 it is a fraction of all steps. A rollout
        batch has `minibatches` optimizer steps.
      b1: decay of AdamW's first moment; what Lion's step takes of its moment.
      b2: decay of AdamW's second moment, or of Lion's.
      eps: AdamW's, added to the root of the second moment; Lion has none.
      weight_decay: times the learning rate; norms and biases do not decay.
      clip: largest global norm of the gradient, taken after the division by the token count.
    """

    learning_rate: PositiveOrZero
    schedule: Literal["constant", "cosine"] = "constant"
    final_learning_rate: PositiveOrZero = 0.0
    warmup: PositiveOrZero = 0.0
    b1: Annotated[float, Range(ge=0, lt=1)] = 0.9
    b2: Annotated[float, Range(ge=0, lt=1)] = 0.95
    eps: Positive = 1e-8
    weight_decay: PositiveOrZero = 0.0
    clip: Positive = 1.0
    name: Literal["adamw", "lion"] = "adamw"
    moments: Literal["float32", "bfloat16"] = "float32"


@struct.dataclass
class TrainState:
    """float32 parameters, those alone that are trained (`lora.trained`), the optimizer's moments,
    and the optimizer steps done (i32)."""

    params: dict
    opt_state: optax.OptState
    step: jax.Array


def new_state(params: dict, config: OptimizerConfig, shardings: TrainState | None = None):
    """The state before the first step, of copies: the steps give the state's memory back.

    On a mesh `shardings` (`state_shardings`) are those of the result; the parameters have theirs.
    """
    return jax.jit(functools.partial(_state, config), out_shardings=shardings)(params)


def abstract_state(model_config: ModelConfig, config: OptimizerConfig, mesh: Mesh | None):
    """The state as ShapeDtypeStructs, with their shardings on a mesh."""
    state = _shapes(model_config, config)
    if mesh is None:
        return state
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        state,
        state_shardings(model_config, config, mesh),
    )


def abstract_base(model_config: ModelConfig, dtype: str, mesh: Mesh | None) -> dict | None:
    """The frozen base beside the state of a model with adapters, as ShapeDtypeStructs, with their
    shardings on a mesh; None beside that of another model."""
    if model_config.lora is None:
        return None
    base = base_of(abstract_params(model_config, dtype))
    if mesh is None:
        return base
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        base,
        base_of(train_shardings(model_config, mesh)),
    )


def state_shardings(model_config: ModelConfig, config: OptimizerConfig, mesh: Mesh) -> TrainState:
    """Where the state lives: the moments beside their parameters, the counts everywhere."""
    everywhere = NamedSharding(mesh, P())
    params = trained(model_config, train_shardings(model_config, mesh))
    state = _shapes(model_config, config)
    opt_state = optax.tree.map_params(
        make_optimizer(config),
        lambda _, sharding: sharding,
        state.opt_state,
        params,
        transform_non_params=lambda _: everywhere,
    )
    return TrainState(params, opt_state, cast(Any, everywhere))  # in the place of an array


def _shapes(model_config: ModelConfig, config: OptimizerConfig) -> TrainState:
    params = trained(model_config, abstract_params(model_config))
    return jax.eval_shape(functools.partial(_state, config), params)


def _state(config: OptimizerConfig, params: dict) -> TrainState:
    # The copy is asked for: jit returns an argument as it is where a cast has nothing to do.
    params = jax.tree.map(lambda x: jnp.array(x, jnp.float32, copy=True), params)
    return TrainState(params, make_optimizer(config).init(params), jnp.zeros((), jnp.int32))


def warn_untrained(state: TrainState, steps: int) -> None:
    """Says so at the end of a run of that many steps if none of them has trained anything."""
    if not int(state.step):
        _log.warning(
            "none of the %d steps has trained anything: the model is the one that the run began "
            "with. metrics.jsonl says by step why (skipped_because)",
            steps,
        )


def learning_rate(config: OptimizerConfig, step: int, total: int) -> float:
    """The rate of the optimizer step `step`, counted from 0, of `total`."""
    warmup = config.warmup * total if config.warmup < 1 else config.warmup
    if step < warmup:
        return config.learning_rate * (step + 1) / (warmup + 1)
    if config.schedule == "constant":
        return config.learning_rate
    progress = min(1.0, (step - warmup) / max(1.0, total - 1 - warmup))
    low, high = config.final_learning_rate, config.learning_rate
    return low + (high - low) * 0.5 * (1.0 + math.cos(math.pi * progress))


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Everything of the optimizer but the rate."""
    if config.name == "lion":
        core = optax.scale_by_lion(config.b1, config.b2)
    else:
        core = optax.scale_by_adam(config.b1, config.b2, config.eps)
    return optax.chain(
        optax.clip_by_global_norm(config.clip),
        _in_bfloat16(core) if config.moments == "bfloat16" else core,
        optax.add_decayed_weights(config.weight_decay, mask=_decays),
    )


def _in_bfloat16(core: optax.GradientTransformation) -> optax.GradientTransformation:
    """The same, with its moments kept in bfloat16. Each goes to one of the two nearest numbers, to
    the nearer one more often, so that it is right on average; the step's number is the seed."""

    def cast(tree, dtype):
        return jax.tree.map(lambda x: x.astype(dtype) if _is_float(x) else x, tree)

    def rounded(state):
        leaves, structure = jax.tree.flatten(state)
        key = jax.random.fold_in(jax.random.key(0), state.count)
        keys = (jax.random.fold_in(key, i) for i in range(len(leaves)))
        return structure.unflatten(
            [_round(x, k) if _is_float(x) else x for x, k in zip(leaves, keys, strict=True)]
        )

    def update(updates, state, params=None):
        updates, state = core.update(updates, cast(state, jnp.float32), params)
        return updates, rounded(state)

    return optax.GradientTransformation(
        lambda params: cast(core.init(params), jnp.bfloat16), update
    )


def _is_float(x: jax.Array) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


def _round(x: jax.Array, key: jax.Array) -> jax.Array:
    """f32 to bfloat16, up or down by chance: on average what it was."""
    below = jax.random.bits(key, x.shape, jnp.uint16)  # the half that bfloat16 lacks
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + below
    kept = jax.lax.bitcast_convert_type(bits & jnp.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isfinite(x), kept, x).astype(jnp.bfloat16)


def _decays(params: dict) -> dict:
    """Which weights decay: the matrices. Layers are stacked, so names tell, not the rank."""

    def matrix(path, _) -> bool:
        name = path[-1].key
        return not name.endswith("norm") and name not in ("bq", "bk", "bv")

    return jax.tree.map_with_path(matrix, params)
