"""Adapters beside frozen matrices: what they compute, that they alone are trained, and where they
live."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from train_toy import examples, tiny

from npr_jax.base.mesh import MeshConfig, make_mesh
from npr_jax.model import PRESETS, forward, init_params, logits
from npr_jax.model.config import TARGETS, LoraConfig
from npr_jax.model.flops import work_flops
from npr_jax.model.lora import adapters_of, base_of, init_adapters, joined, merge, plain, trained
from npr_jax.model.sharding import place_params, train_shardings
from npr_jax.train.objective import Objective, loss_sums
from npr_jax.train.optimizer import OptimizerConfig
from npr_jax.train.packing import make_rows, stack
from npr_jax.train.step import TrainConfig, begin, optimize

LORA = LoraConfig(rank=4, alpha=8.0)
TRAIN = TrainConfig(OptimizerConfig(1e-3, weight_decay=0.1), row_len=256, micro_rows=2, lora=LORA)
SOME = LoraConfig(rank=3, alpha=2.0, targets=("v_proj", "down_proj"))


def adapted(lora=LORA, seed=0, std=0.05):
    """The tiny model with random adapters, of which B too is not 0."""
    model, rng = tiny(), np.random.default_rng(seed)
    config = dataclasses.replace(model.config, lora=lora)
    found = init_adapters(config, jax.random.key(seed))
    found = jax.tree.map(lambda x: jnp.asarray(std * rng.normal(size=x.shape), jnp.float32), found)
    return dataclasses.replace(model, config=config, params=joined(model.params, found))


def rows_of(model, num=5):
    made = [dataclasses.replace(e, advantage=1.0) for e in examples(model, num)]
    return make_rows([[e] for e in made], 256, 4)


def columns(model):
    row = rows_of(model)[0]
    return [row[name][None] for name in ("tokens", "positions", "hidden")]


@pytest.mark.parametrize("lora", [LORA, SOME], ids=["all", "some"])
def test_merged_weights_give_the_logits_of_adapters(lora):
    model = adapted(lora)
    found = logits(model.config, model.params, *columns(model))
    merged = model.merged()
    assert merged.config == plain(model.config) == tiny().config and merged.merged() is merged
    expected = logits(merged.config, merged.params, *columns(model))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    base = logits(tiny().config, tiny().params, *columns(model))
    assert np.abs(found - base).max() > 0.1  # so the adapters do something
    wanted = {f"{TARGETS[name]}_{part}" for name in lora.targets for part in "ab"}
    assert adapters_of(model.params)["layers"].keys() == wanted


def test_merging_rounds_once_to_the_dtype_of_the_adapters():
    model = adapted()
    base = jax.tree.map(lambda x: x.astype("bfloat16"), base_of(model.params))
    w = np.float64(base["layers"]["wk"])
    a, b = (np.float64(model.params["layers"][f"wk_{part}"]) for part in "ab")
    for dtype in ("float32", "bfloat16"):
        adapters = jax.tree.map(lambda x, to=dtype: x.astype(to), adapters_of(model.params))
        merged = merge(model.config, joined(base, adapters))
        assert {x.dtype for x in jax.tree.leaves(merged)} == {jnp.dtype(dtype)}
        a, b = (np.float64(adapters["layers"][f"wk_{part}"]) for part in "ab")
        exact = w + LORA.alpha / LORA.rank * (a @ b)
        tolerance = 2**-8 if dtype == "bfloat16" else 1e-6
        np.testing.assert_allclose(np.float64(merged["layers"]["wk"]), exact, tolerance, 1e-6)


def test_new_adapters_add_nothing_and_leave_the_model_as_it_is():
    config = dataclasses.replace(PRESETS["tiny"], lora=LORA)
    params = init_params(config, jax.random.key(3))
    chex.assert_trees_all_equal(base_of(params), init_params(PRESETS["tiny"], jax.random.key(3)))
    chex.assert_trees_all_equal(adapters_of(params), init_adapters(config, jax.random.key(3)))
    for name, x in adapters_of(params)["layers"].items():
        assert not x.any() if name.endswith("_b") else np.std(x) > 0
    row = columns(tiny())
    found, base = logits(config, params, *row), base_of(params)
    np.testing.assert_array_equal(found, logits(PRESETS["tiny"], base, *row))


def test_a_config_is_refused_that_names_no_target_or_one_twice():
    for targets in ((), ("q_proj", "q_proj"), ("lm_head",)):
        with pytest.raises(ValueError, match=r"targets is .*needed is .*q_proj"):
            LoraConfig(targets=targets)
    with pytest.raises(ValueError, match="set exact to false, or lora to null"):
        dataclasses.replace(TRAIN, exact=True)


def test_the_gradient_is_that_of_merged_weights_by_the_chain_rule():
    model = adapted()
    rows = jax.tree.map(lambda x: x[0], stack(rows_of(model), 2, 1))
    objective = Objective("papo")

    def unmerged(adapters):
        params = joined(base_of(model.params), adapters)
        return loss_sums(params, rows, model.config, objective, "float32")[0]

    def merged(params):
        return loss_sums(params, rows, plain(model.config), objective, "float32")[0]

    found = jax.grad(unmerged)(adapters_of(model.params))["layers"]
    whole = jax.grad(merged)(merge(model.config, model.params))["layers"]
    for name in TARGETS.values():
        a, b = model.params["layers"][f"{name}_a"], model.params["layers"][f"{name}_b"]
        d_a = LORA.scale * whole[name] @ b.swapaxes(1, 2)
        d_b = LORA.scale * a.swapaxes(1, 2) @ whole[name]
        for one, other in ((found[f"{name}_a"], d_a), (found[f"{name}_b"], d_b)):
            np.testing.assert_allclose(one, other, atol=1e-5 * np.abs(other).max(), rtol=1e-4)


def begun(mesh=None, train=TRAIN, params=None):
    model = tiny()
    if mesh is not None:
        params = place_params(model.params, train_shardings(model.config, mesh))
        model = dataclasses.replace(model, params=params)
    return begin(model, train, 0, mesh)


def training(objective, mesh=None, train=TRAIN, steps=6):
    """Losses, and what is left, of some steps on the same rows."""
    model, base, state = begun(mesh, train)
    config, rows, losses = train.model(model.config), rows_of(tiny()), []
    reference = base if objective.kl else None
    for _ in range(steps):
        state, metrics = optimize(
            state, rows, config, train, objective, 1e-2, mesh, reference, base
        )
        losses.append([metrics["loss"], metrics["grad_norm"], metrics.get("kl", 0.0)])
    return np.array(losses), jax.device_get(base), jax.device_get(state)


@functools.cache
def one_device(objective):
    return training(objective)


def test_adapters_alone_are_trained_and_have_moments():
    losses, base, state = one_device(Objective("sft"))
    chex.assert_trees_all_equal(base, jax.device_get(tiny().params))
    assert losses[-1, 0] < 0.9 * losses[0, 0]
    config = dataclasses.replace(tiny().config, lora=LORA)
    names = adapters_of(init_params(config, jax.random.key(0)))["layers"].keys()
    assert state.params["layers"].keys() == names and state.params.keys() == {"layers"}
    sizes = sum(x.size for x in jax.tree.leaves(state.params))
    assert sum(x.size for x in jax.tree.leaves(state.opt_state)) == 2 * sizes + 1  # and a count


def test_a_bfloat16_base_is_kept_in_bfloat16_and_adapters_in_float32():
    train = dataclasses.replace(TRAIN, compute_dtype="bfloat16")
    losses, base, state = training(Objective("sft"), train=train)
    assert {x.dtype for x in jax.tree.leaves(base)} == {jnp.dtype("bfloat16")}
    assert {x.dtype for x in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
    expected = jax.tree.map(lambda x: x.astype("bfloat16"), jax.device_get(tiny().params))
    chex.assert_trees_all_equal(base, expected)
    np.testing.assert_allclose(losses[:, 0], one_device(Objective("sft"))[0][:, 0], rtol=0.02)


def test_the_reference_of_kl_is_the_base():
    losses, *_ = one_device(Objective("dapo", kl=0.3))
    assert losses[0, 2] == 0 and losses[1, 2] > 0


def test_other_shapes_of_rows_give_the_same_sums():
    from npr_jax.train.batch import facts, make_batch
    from npr_jax.train.deal import ALL
    from npr_jax.train.packing import count_loss_tokens

    model, base, state = begun()
    made = examples(tiny(), 12)
    known = [facts(one, ALL, i) for i, one in enumerate(made)]
    batch = make_batch(known, dict(enumerate(made)), TRAIN.shapes(None), 1, 3, every=True)
    assert not batch.fused
    config = TRAIN.model(model.config)
    new, found = optimize(state, batch, config, TRAIN, Objective("sft"), 1e-2, base=base)
    rows = make_rows([[one] for one in made], 256, 3)
    assert found["loss_tokens"] == count_loss_tokens(rows)
    _, _, state = begun()
    other, expected = optimize(state, rows, config, TRAIN, Objective("sft"), 1e-2, base=base)
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    chex.assert_trees_all_close(new.params, other.params, atol=1e-4)


@pytest.mark.parametrize(
    "mesh",
    [
        pytest.param(MeshConfig(fsdp=2, tensor=2), id="fsdp-tensor"),
        pytest.param(MeshConfig(data=2, sequence=2, tensor=2), marks=pytest.mark.slow, id="all"),
        pytest.param(MeshConfig(fsdp=8), marks=pytest.mark.slow, id="fsdp"),
    ],
)
def test_on_a_mesh_it_is_what_it_is_on_one_device(mesh):
    objective = Objective("dapo", kl=0.3)
    expected, _, one = one_device(objective)
    found, base, many = training(objective, make_mesh(mesh))
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=1e-4)
    chex.assert_trees_all_equal(base, jax.device_get(tiny().params))
    chex.assert_trees_all_close(many.params, one.params, atol=1e-3)


def test_without_adapters_the_programs_are_those_of_a_model_that_knows_of_none():
    """Beside the model function as it was before adapters, line by line where they differ."""
    config, params = tiny().config, tiny().params
    row = [jnp.asarray(x) for x in columns(tiny())[:2]]

    def run(config):
        attend = lambda q, k, v, layer, state: (q, state)  # noqa: E731
        return str(jax.make_jaxpr(lambda p: forward(config, p, *row, attend, None))(params))

    text = run(config)
    assert text == run(dataclasses.replace(config, lora=None)) and text.count("dot_general") == 7
    assert trained(config, params) is params and joined(None, params) is params


def test_frozen_weights_have_no_gradient_to_be_computed():
    config = PRESETS["qwen3-4b"]
    tokens, pairs = 1000, 0
    with_lora = dataclasses.replace(config, lora=LoraConfig(16))
    full = work_flops(dataclasses.replace(config, remat="none"), tokens, pairs)
    some = work_flops(dataclasses.replace(with_lora, remat="none"), tokens, pairs)
    assert 2 / 3 < some / full < 2 / 3 + 0.01
