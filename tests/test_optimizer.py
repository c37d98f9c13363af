"""The choices of optimizer: what they keep, how far from float32 they are, and where they lie."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from train_toy import examples, tiny

from npr_jax.base.mesh import MeshConfig, make_mesh
from npr_jax.model import PRESETS
from npr_jax.model.sharding import place_params, train_shardings
from npr_jax.train.objective import Objective
from npr_jax.train.optimizer import (
    OptimizerConfig,
    abstract_state,
    make_optimizer,
    new_state,
    state_shardings,
)
from npr_jax.train.packing import make_rows
from npr_jax.train.step import TrainConfig, optimize

CHOICES = [(n, m) for n in ("adamw", "lion") for m in ("float32", "bfloat16")]


def config(name="adamw", moments="float32", **changes):
    return OptimizerConfig(1e-3, name=name, moments=moments, **changes)


def moments(opt_state):
    return [x for x in jax.tree.leaves(opt_state) if x.ndim]


def size(tree):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def test_the_default_is_adamw_as_optax_has_it():
    params = {"w": jnp.arange(6.0).reshape(2, 3), "a_norm": jnp.ones(3)}
    grads = jax.tree.map(lambda x: jnp.cos(x) * 3, params)
    ours = make_optimizer(config(weight_decay=0.1))
    theirs = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(0.9, 0.95, 1e-8),
        optax.add_decayed_weights(0.1, mask={"w": True, "a_norm": False}),
    )
    states = ours.init(params), theirs.init(params)
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])
    for _ in range(3):
        (a, first), (b, second) = (
            o.update(grads, s, params) for o, s in zip((ours, theirs), states, strict=True)
        )
        states = first, second
        jax.tree.map(np.testing.assert_array_equal, (a, first), (b, second))


def test_moments_take_what_they_say_of_a_model_of_4b():
    arch = PRESETS["qwen3-4b"]
    plain = abstract_state(arch, config(), None)
    assert size(plain.opt_state) == 2 * size(plain.params) + 4
    for name, kind in CHOICES:
        state = abstract_state(arch, config(name, kind), None)
        share = (2 if name == "adamw" else 1) * (1 if kind == "float32" else 0.5)
        assert size(state.opt_state) == share * size(plain.params) + 4
        assert size(state.params) == size(plain.params)


def test_a_moment_that_decays_slowly_does_not_stand_still():
    """The second moment of a constant gradient, by chance and to the nearest number."""
    params = {"w": jnp.zeros(4096)}
    grads = {"w": jnp.full(4096, 0.01)}
    chance = make_optimizer(config(moments="bfloat16", b2=0.999, clip=1e9))
    state, nearest = chance.init(params), jnp.zeros((), jnp.bfloat16)
    update = jax.jit(chance.update)
    for _ in range(1000):
        _, state = update(grads, state, params)
        nearest = (0.999 * nearest.astype(jnp.float32) + 0.001 * 1e-4).astype(jnp.bfloat16)
    right = 1e-4 * (1 - 0.999**1000)
    (second,) = (x for x in moments(state) if float(jnp.max(jnp.abs(x))) < 1e-3)
    assert second.dtype == jnp.bfloat16
    assert float(jnp.mean(second.astype(jnp.float32))) == pytest.approx(right, rel=0.01)
    assert float(nearest) < 0.8 * right
    again = chance.init(params)
    for _ in range(1000):
        _, again = update(grads, again, params)
    jax.tree.map(np.testing.assert_array_equal, state, again)


def test_what_is_not_finite_stays_so():
    params, grads = {"w": jnp.zeros(3)}, {"w": jnp.array([jnp.nan, jnp.inf, 1.0])}
    rule = make_optimizer(config(moments="bfloat16", clip=1e9))
    _, state = rule.update(grads, rule.init(params), params)
    assert not any(np.isfinite(x.astype(jnp.float32)[:2]).any() for x in moments(state))


@functools.cache
def losses(name, kind):
    """Of twelve steps on four examples."""
    model, chosen, found = tiny(), config(name, kind), []
    rows = make_rows([[e] for e in examples(model, 4)], 256, 4)
    train, state = TrainConfig(chosen, row_len=256), new_state(model.params, chosen)
    rate = 1e-3 if name == "adamw" else 2e-4
    for _ in range(12):
        state, metrics = optimize(state, rows, model.config, train, Objective("sft"), rate)
        found.append(metrics["loss"])
    return np.array(found)


@pytest.mark.parametrize("name", ["adamw", "lion"])
def test_both_learn_and_bfloat16_stays_close(name):
    right, close = losses(name, "float32"), losses(name, "bfloat16")
    assert right[-1] < 0.9 * right[0]
    gap = np.max(np.abs(close - right) / right)
    print(f"{name}, moments in bfloat16: losses at most {gap:.2g} of themselves away")
    assert 0 < gap < 0.01


@pytest.mark.parametrize(("name", "kind"), CHOICES)
def test_moments_lie_where_their_parameters_do(name, kind):
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    model, chosen = tiny(), config(name, kind)
    shardings = state_shardings(model.config, chosen, mesh)
    params = place_params(model.params, train_shardings(model.config, mesh))
    state = new_state(params, chosen, shardings)
    split = [x.sharding.shard_shape(x.shape) for x in jax.tree.leaves(state.params)]
    number = 2 if name == "adamw" else 1
    assert [x.sharding.shard_shape(x.shape) for x in moments(state.opt_state)] == split * number
