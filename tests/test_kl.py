"""The divergence from a reference as a term of the loss."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from train_toy import examples, tiny

from npr_jax.base.mesh import MeshConfig, make_mesh
from npr_jax.model import token_logp
from npr_jax.model.score import row_logp
from npr_jax.model.sharding import place_params, train_shardings
from npr_jax.train import losses
from npr_jax.train.objective import Objective
from npr_jax.train.optimizer import OptimizerConfig, new_state, state_shardings
from npr_jax.train.packing import make_rows
from npr_jax.train.step import TrainConfig, optimize

CONFIG = TrainConfig(OptimizerConfig(1e-3), row_len=256, micro_rows=2)


def test_divergence_is_k3_and_has_its_gradient():
    rng = np.random.default_rng(0)
    logp, ref = -rng.exponential(1, (2, 50)).astype(np.float32)
    mask = rng.random(50) < 0.7
    r = (ref - logp)[mask].astype(np.float64)
    value, gradient = jax.value_and_grad(losses.divergence)(
        logp, jnp.where(mask, ref, jnp.nan), mask
    )
    np.testing.assert_allclose(value, np.sum(np.exp(r) - r - 1), rtol=1e-5)
    np.testing.assert_allclose(gradient[mask], 1 - np.exp(r), rtol=1e-4, atol=1e-6)
    assert not gradient[~mask].any()
    assert losses.divergence(logp, logp, mask) == 0


def rows_of(model, advantage=1.0):
    made = [dataclasses.replace(e, advantage=advantage) for e in examples(model, 5)]
    return make_rows([[e] for e in made], 256, 4)


def step(model, params, objective, rows, mesh=None, reference=None):
    shardings = mesh and state_shardings(model.config, CONFIG.optimizer, mesh)
    state = new_state(params, CONFIG.optimizer, shardings)
    state, metrics = optimize(state, rows, model.config, CONFIG, objective, 1e-3, mesh, reference)
    return jax.device_get(state.params), metrics


def test_the_loss_has_the_term_and_a_reference_that_is_the_policy_adds_nothing():
    model, other = tiny(), tiny(seed=1)
    rows = rows_of(model)
    plain, before = step(model, model.params, Objective("papo"), rows)
    same, metrics = step(model, model.params, Objective("papo", kl=0.3), rows, None, model.params)
    assert metrics["kl"] == 0 and metrics["loss"] == before["loss"]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), same, plain)
    moved, metrics = step(model, model.params, Objective("papo", kl=0.3), rows, None, other.params)
    total = count = 0.0
    for row in rows:
        columns = [row[name][None] for name in ("tokens", "positions", "hidden", "pred")]
        mask = row["loss_mask"]
        found = [token_logp(model.config, p, *columns)[0] for p in (model.params, other.params)]
        total += float(losses.divergence(*found, mask))
        count += mask.sum()
    assert metrics["kl"] == pytest.approx(total / count, rel=1e-5)
    assert metrics["loss"] == pytest.approx(before["loss"] + 0.3 * total / count, rel=1e-5)
    assert not np.array_equal(moved["embed"], plain["embed"])


def test_without_advantage_the_policy_goes_to_the_reference():
    model, other = tiny(), tiny(seed=1)
    rows, objective = rows_of(model, 0.0), Objective("dapo", kl=1.0)
    state, found = new_state(model.params, CONFIG.optimizer), []
    for _ in range(12):
        state, metrics = optimize(
            state, rows, model.config, CONFIG, objective, 3e-3, None, other.params
        )
        found.append(metrics["kl"])
    assert found[-1] < 0.5 * found[0]


@pytest.mark.slow
def test_on_a_mesh_it_is_what_it_is_on_one_device():
    model, other = tiny(), tiny(seed=1)
    rows, objective = rows_of(model), Objective("dapo", kl=0.3)
    expected, one = step(model, model.params, objective, rows, None, other.params)
    mesh = make_mesh(MeshConfig(fsdp=2, sequence=2, tensor=2))
    params, reference = (
        place_params(p, train_shardings(model.config, mesh)) for p in (model.params, other.params)
    )
    found, many = step(model, params, objective, rows, mesh, reference)
    assert many["kl"] == pytest.approx(one["kl"], rel=1e-4)
    assert many["loss"] == pytest.approx(one["loss"], rel=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), found, expected)


def test_log_probs_of_rows_are_those_of_tokens():
    model = tiny()
    rows = {name: np.stack([row[name] for row in rows_of(model)]) for name in rows_of(model)[0]}
    columns = [rows[name] for name in ("tokens", "positions", "hidden", "pred")]
    expected = token_logp(model.config, model.params, *columns)
    np.testing.assert_allclose(row_logp(model.config, model.params, rows), expected, atol=1e-5)
