"""One optimizer step: micro-batches accumulated in one compiled call, one division, one clip.

    rows --stack--> batch --(gradients of sums, added)--> / count --clip--> AdamW --> new state

The division by the step's global count of loss tokens is the only one: k micro-batches give what
one batch gives, however their token counts differ.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from npr_jax.base.distributed import gather, group_size
from npr_jax.base.fields import Checked, Count, Dtype, PositiveOrZero, Range
from npr_jax.base.mesh import BATCH, batch_shards
from npr_jax.model import ModelConfig
from npr_jax.model.config import LoraConfig, Remat
from npr_jax.model.lora import base_of, init_adapters, joined, plain, trained
from npr_jax.model.pretrained import Model
from npr_jax.model.score import Figures, row_logp
from npr_jax.model.sharding import train_shardings
from npr_jax.train.batch import Batch
from npr_jax.train.deal import Shapes, shapes
from npr_jax.train.objective import Objective, cast, loss_sums
from npr_jax.train.optimizer import (
    OptimizerConfig,
    TrainState,
    make_optimizer,
    new_state,
    state_shardings,
)
from npr_jax.train.packing import Row, count_loss_tokens, stack


@dataclasses.dataclass(frozen=True)
class TrainConfig(Checked):
    """How every stage trains.

    Attributes:
      optimizer: AdamW and the rate of each step.
      row_len (tokens): of a row; the longest trace has to fit.
      row_lengths (lengths): that rows may have, even parts of row_len, so that fewer slots are
        empty; each one met takes a program that is compiled then. Where compiling takes longer than
        it saves, as for small models and short runs, 1: all rows have row_len.
      micro_rows (rows): whose activations exist at one time, on each part of the batch
        (mesh.data x mesh.fsdp parts).
      compute_dtype: of the forward and backward pass and of the engine; parameters and optimizer
        state are float32.
      remat: what the backward pass computes again: "none", "full" (a layer keeps its input) or
        "dots" (and its matrix products and what attention needs), the fastest on a CPU.
      gap_warn (nats): the mean gap between the sampler's log-probs and the trainer's, at the first
        optimizer step of a batch, above which a warning is given.
      gap_stop (nats): the same gap above which the run stops: then what is trained is not what was
        sampled.
      checkpoint_every (steps): between checkpoints: rollout batches, or optimizer steps of a fit.
      keep_checkpoints (checkpoints): how many of the last ones stay.
      keep_best (checkpoints): 1 keeps the best too: where there is `evaluate`, that with the
        largest `eval/score`, if it is above the baseline; else that with the largest `score` (mean
        reward, for which answers that are left out count as malformed), or lowest loss, both of
        the weights before the last update.
      max_nonfinite (steps): in a row without a finite update, after which the run stops.
      exact: the forward pass has the bits of an engine with `engine.exact`, so that the gap is 0
        until the first update of a batch; on one CPU device.
      lora: adapters that are trained in place of the model, which is frozen in compute_dtype; null
        trains the model. The run's `final` has them added to the model, and beside it, in
        `final/adapter`, the adapters alone as PEFT reads them.
    """

    optimizer: OptimizerConfig
    row_len: Count = 512
    row_lengths: Annotated[int, Range(ge=1, le=16)] = 8
    micro_rows: Count = 4
    compute_dtype: Dtype = "float32"
    remat: Remat = "dots"
    gap_warn: PositiveOrZero = 0.05
    gap_stop: PositiveOrZero = 0.5
    checkpoint_every: Count = 10
    keep_checkpoints: Count = 2
    keep_best: Annotated[int, Range(ge=0, le=1)] = 0
    max_nonfinite: Count = 3
    exact: bool = False
    lora: LoraConfig | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.exact and self.lora:
            raise ValueError(
                "exact is true and lora given, but exact is not for adapters: set exact to false, "
                "or lora to null"
            )

    def check(self, mesh: Mesh | None, name: str = "train") -> None:
        """Raises ValueError where rows cannot be split over the mesh, or where there is one and
        `exact` is not for it; `name`: of these settings."""
        if self.exact and (mesh is not None or jax.default_backend() != "cpu"):
            raise ValueError(
                f"{name}.exact is true on {jax.default_backend().upper()} with "
                f"{mesh.size if mesh else 1} devices: exact is for one CPU device, set it to false"
            )
        parts = mesh.shape["sequence"] if mesh else 1
        if self.row_len % parts:
            raise ValueError(
                f"{name}.row_len is {self.row_len}, needed is a multiple of mesh.sequence={parts}"
            )

    def shapes(self, mesh: Mesh | None) -> Shapes:
        """The shapes of micro-batches; one where `exact` asks each shape of the machine."""
        sequence = mesh.shape["sequence"] if mesh else 1
        return shapes(self.row_len, self.micro_rows, sequence, self.exact, self.row_lengths)

    def smaller(self, name: str = "train", need: int | None = None) -> str:
        """Which of these settings make a step need less memory; none of them changes a number of a
        run that goes on. `name`: of the settings; `need` (tokens): the least that a row may have,
        None if it may not change."""
        ways = ["a larger mesh.fsdp, mesh.sequence or mesh.tensor"]
        if need is not None and need < self.row_len:
            ways.insert(0, f"{name}.row_len={need} (it is {self.row_len})")
        if self.micro_rows > 1:
            ways.insert(0, f"{name}.micro_rows={self.micro_rows // 2} (it is {self.micro_rows})")
        if self.remat != "full":
            ways.insert(0, f"{name}.remat=full (it is {self.remat})")
        return f"set {', or '.join(ways)}"

    def model(self, config: ModelConfig) -> ModelConfig:
        """The model's config as it is trained."""
        attention = "exact" if self.exact else config.attention
        return dataclasses.replace(config, remat=self.remat, attention=attention, lora=self.lora)


def begin(
    model: Model, config: TrainConfig, seed: int, mesh: Mesh | None = None
) -> tuple[Model, dict | None, TrainState]:
    """What a training begins with: the model as it is trained, without its parameters; the frozen
    base that `optimize` wants with `config.lora`, else None; and the state before the first step.

    On a mesh the model has been loaded onto it. Adapters that it has are merged first. `seed`: of
    the new ones.
    """
    model = model.merged()
    arch, params, base = dataclasses.replace(model.config, lora=config.lora), model.params, None
    if config.lora:
        shardings = mesh and train_shardings(arch, mesh)
        to_dtype = functools.partial(cast, dtype=config.compute_dtype)
        base = jax.jit(to_dtype, out_shardings=shardings and base_of(shardings))(params)
        make = functools.partial(init_adapters, arch)
        make = jax.jit(make, out_shardings=shardings and trained(arch, shardings))
        params = make(jax.random.key(seed))
    shardings = mesh and state_shardings(arch, config.optimizer, mesh)
    state = new_state(params, config.optimizer, shardings)
    return dataclasses.replace(model, config=arch, params={}), base, state


def optimize(
    state: TrainState,
    rows: Batch | Sequence[Row],
    model_config: ModelConfig,
    config: TrainConfig,
    objective: Objective,
    rate: float,
    mesh: Mesh | None = None,
    reference: dict | None = None,
    base: dict | None = None,
) -> tuple[TrainState, dict[str, float]]:
    """One optimizer step over `rows`: the new state (the old one is used up) and metrics.

    A `Batch` has rows of all processes that were dealt to all (`batch.make_batch`). Else each of
    several processes gives rows of its own, one at least (`packing.empty_row`), and all run as many
    micro-batches as the one with the most rows. All make the call together.

    `base`: of a model with adapters, which alone the state then has: the frozen parameters, in the
    dtype that computes, laid out as `train_shardings` says. `reference`: parameters of a model
    without adapters, of that dtype and laid out so too, for `objective.kl`; they may be the base.

    Metrics are means over the loss tokens that are computed, of all processes (`loss` over those
    that are not, too), beside `grad_norm` (before the clip), `loss_tokens` (all), `learning_rate`,
    what the batch says of its rows and, where the rows carry log-probs of the sampler, the mean and
    largest gap to them, `logp_gap` and `logp_gap_max`. Where the loss, the norm of its gradient or
    anything of the new state is not finite, `nonfinite` is 1 and the new state is the old one.

    Raises ValueError if there is no token to train on.
    """
    batch = rows if isinstance(rows, Batch) else _own_rows(rows, config.micro_rows, mesh)
    if not batch.computed:
        raise ValueError("none of the examples to compute has a token that counts in the loss")
    numbers = np.float32(batch.count), np.float32(rate)
    optimizer = dataclasses.replace(config.optimizer, learning_rate=0.0)  # it is an argument
    kind = model_config, optimizer, objective, config.compute_dtype, mesh
    frozen = () if base is None else (base,)
    parts = _placed(batch, mesh)
    if objective.kl:
        assert reference is not None
        add_logp = compiled_reference(plain(model_config), mesh)
        used = batch.used if batch.fused else None
        parts = (
            add_logp(reference, part, np.int32(used or part["tokens"].shape[0])) for part in parts
        )
    if batch.fused:
        (part,) = parts
        found = compiled_step(*kind)(state, part, np.int32(batch.used), *numbers, *frozen)
    else:
        add, total = compiled_sums(*kind), None
        for part in parts:
            total = add(state.params, part, total, *frozen)
        found = compiled_update(model_config, optimizer, mesh)(state, total, *numbers)
    state, sums, largest, norm, finite = found
    metrics = {name: float(value) / batch.computed for name, value in sums.items()}
    metrics["loss"] = float(sums["loss"]) / batch.count
    metrics |= {name: float(value) for name, value in largest.items()}
    metrics |= {"grad_norm": float(norm), "loss_tokens": batch.count, "learning_rate": rate}
    return state, {**metrics, **batch.figures, "nonfinite": int(not finite)}


def _own_rows(rows: Sequence[Row], micro_rows: int, mesh: Mesh | None) -> Batch:
    """This process's own rows, of which all run as many micro-batches as the fullest process."""
    size = micro_rows * batch_shards(mesh) // group_size()
    counts = gather((count_loss_tokens(rows), -(-len(rows) // size)))
    count, used = sum(count for count, _ in counts), max(used for _, used in counts)
    if not count:
        raise ValueError(f"none of the {len(rows)} rows has a token that counts in the loss")
    return Batch((stack(rows, size, used),), used, count, count, fused=True)


def _placed(batch: Batch, mesh: Mesh | None) -> Iterator[dict]:
    """The parts of a batch, where a mesh wants them."""
    for part in batch.parts:
        if mesh is None:
            yield part
        else:
            sharding = NamedSharding(mesh, _BATCH)
            yield {
                name: jax.make_array_from_process_local_data(sharding, values)
                for name, values in part.items()
            }


_BATCH = P(None, BATCH, "sequence")  # [M, B, T, ...] on a training mesh


Sums = tuple[dict, Figures]  # gradient, and figures, of the tokens so far


@functools.cache
def compiled_step(
    model_config: ModelConfig,
    config: OptimizerConfig,
    objective: Objective,
    compute_dtype: str,
    mesh: Mesh | None,
) -> Callable:
    """The compiled step(state, batch, used, count, rate), which uses the state up; of a model with
    adapters step(..., rate, base).

    Over batch [M, B, T, ...], of which the first `used` i32 micro-batches run; `count` f32 loss
    tokens, learning rate `rate` f32. Returns the new state, sums over loss tokens {name: f32},
    largest values {name: f32}, the norm of the gradient f32 before its clip, and whether loss, norm
    and new state are finite (bool); where they are not, the state is the old one.
    """
    shardings = None if mesh is None else state_shardings(model_config, config, mesh)
    gradient = _gradient(model_config, objective, compute_dtype, mesh, shardings)

    def step(state, batch, used, count, rate, base=None):
        total = _zeros(gradient, state.params, batch, base)
        total = _add(gradient, state.params, batch, used, total, base)
        return _finish(config, state, total, count, rate)

    if mesh is None:
        return jax.jit(step, donate_argnums=0)
    everywhere, batch = NamedSharding(mesh, P()), NamedSharding(mesh, _BATCH)
    return jax.jit(
        step,
        donate_argnums=0,
        in_shardings=(
            *(shardings, batch, everywhere, everywhere, everywhere),
            *_base_shardings(model_config, mesh),
        ),
        out_shardings=(shardings, everywhere, everywhere, everywhere, everywhere),
    )


@functools.cache
def compiled_reference(model_config: ModelConfig, mesh: Mesh | None) -> Callable:
    """The compiled add(params, batch, used): batch [M, B, T, ...] with the log-probs `ref_logp`
    f32[M, B, T] that these parameters give its tokens, of the first `used` i32 micro-batches."""

    def logp(params, batch, used):
        def one(i, found):
            rows = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), batch)
            new = row_logp(model_config, params, rows, mesh)
            return jax.lax.dynamic_update_index_in_dim(found, new, i, axis=0)

        return jax.lax.fori_loop(0, used, one, jnp.zeros(batch["tokens"].shape, jnp.float32))

    sharding = mesh and NamedSharding(mesh, _BATCH)
    compiled = jax.jit(logp, out_shardings=sharding)
    return lambda params, batch, used: batch | {"ref_logp": compiled(params, batch, used)}


@functools.cache
def compiled_sums(
    model_config: ModelConfig,
    config: OptimizerConfig,
    objective: Objective,
    compute_dtype: str,
    mesh: Mesh | None,
) -> Callable:
    """The compiled add(params, batch, total), which uses `total` up: `Sums` with all micro-batches
    of batch [M, B, T, ...] added; None is zero. Of a model with adapters add(..., total, base). A
    program for every shape of the batch, where `compiled_step` has all in one for one shape."""
    shardings = None if mesh is None else state_shardings(model_config, config, mesh)
    gradient = _gradient(model_config, objective, compute_dtype, mesh, shardings)

    def add(params, batch, total, base=None):
        return _add(gradient, params, batch, len(batch["tokens"]), total, base)

    sums = None
    if mesh is None or shardings is None:
        add = jax.jit(add, donate_argnums=2)
    else:
        everywhere, batch = NamedSharding(mesh, P()), NamedSharding(mesh, _BATCH)
        sums = shardings.params, everywhere
        add = jax.jit(
            add,
            donate_argnums=2,
            in_shardings=(shardings.params, batch, sums, *_base_shardings(model_config, mesh)),
            out_shardings=sums,
        )
    zeros: list[Callable] = []  # one for batches of every shape

    def start(params, batch, *base):
        if not zeros:
            like = jax.eval_shape(lambda: _zeros(gradient, params, batch, *base))
            make = functools.partial(jax.tree.map, lambda x: jnp.zeros(x.shape, x.dtype), like)
            zeros.append(jax.jit(make, out_shardings=sums))
        return zeros[0]()

    return lambda params, batch, total, *base: add(
        params, batch, start(params, batch, *base) if total is None else total, *base
    )


@functools.cache
def compiled_update(
    model_config: ModelConfig, config: OptimizerConfig, mesh: Mesh | None
) -> Callable:
    """The compiled update(state, total, count, rate), which uses the state up: what `compiled_step`
    does once it has the `Sums` of all micro-batches."""
    update = functools.partial(_finish, config)
    if mesh is None:
        return jax.jit(update, donate_argnums=0)
    shardings, everywhere = state_shardings(model_config, config, mesh), NamedSharding(mesh, P())
    return jax.jit(
        update,
        donate_argnums=0,
        in_shardings=(shardings, (shardings.params, everywhere), everywhere, everywhere),
        out_shardings=(shardings, everywhere, everywhere, everywhere, everywhere),
    )


def _gradient(
    model_config: ModelConfig,
    objective: Objective,
    compute_dtype: str,
    mesh: Mesh | None,
    shardings,
) -> Callable:
    """(params, batch, i, base) -> `Sums` of micro-batch i; the gradient is in `params`, beside
    which a model with adapters has a base."""

    def loss(params, base, *rest):
        return loss_sums(joined(base, params), *rest)

    @jax.named_scope("gradient")
    def gradient(params, batch, i, base=None):
        rows = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), batch)
        function = jax.grad(loss, has_aux=True)
        grads, figures = function(params, base, rows, model_config, objective, compute_dtype, mesh)
        if shardings is not None:  # or every device would hold the whole gradient
            grads = jax.lax.with_sharding_constraint(grads, shardings.params)
        return grads, figures

    return gradient


def _base_shardings(config: ModelConfig, mesh: Mesh) -> tuple:
    """Of the base of a model with adapters, which compiled functions then take last."""
    return (base_of(train_shardings(config, mesh)),) if config.lora else ()


def _zeros(gradient: Callable, params: dict, batch: dict, base: dict | None = None) -> Sums:
    shapes = jax.eval_shape(lambda: gradient(params, batch, 0, base))
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


def _add(
    gradient: Callable, params: dict, batch: dict, used, total: Sums, base: dict | None = None
) -> Sums:
    """`total` and the sums of the first `used` micro-batches."""

    def add(i, total):
        grads, (sums, largest) = gradient(params, batch, i, base)
        return (
            jax.tree.map(jnp.add, total[0], grads),
            (
                jax.tree.map(jnp.add, total[1][0], sums),
                jax.tree.map(jnp.maximum, total[1][1], largest),
            ),
        )

    return jax.lax.fori_loop(0, used, add, total)


def _finish(config: OptimizerConfig, state: TrainState, total: Sums, count, rate) -> tuple:
    """The division, the clip and the update; what `compiled_step` returns."""
    grads, (sums, largest) = total

    @jax.named_scope("optimizer")
    def update(state, grads, rate):
        updates, opt_state = make_optimizer(config).update(grads, state.opt_state, state.params)
        params = jax.tree.map(lambda p, u: p - rate * u, state.params, updates)
        return TrainState(params, opt_state, state.step + 1)

    grads = jax.tree.map(lambda g: g / count, grads)
    norm = optax.tree.norm(grads)
    # The new state is made twice: here it melts into the check, and no memory is taken for it.
    values = [norm, sums["loss"], *jax.tree.leaves(update(state, grads, rate))]
    finite = functools.reduce(jnp.logical_and, [jnp.isfinite(x).all() for x in values])
    # A branch, since choosing between new and old moments would copy the old ones first.
    new = jax.lax.cond(finite, update, lambda state, *_: state, state, grads, rate)
    return new, sums, largest, norm, finite
