"""The train step: one division, no dependence on packing, only what counts counts."""

import dataclasses
import math
import random
import re

import chex
import jax
import numpy as np
import pytest
from conftest import spread
from train_toy import example, examples, problem, tiny

from npr_jax.train.objective import Objective, loss_sums
from npr_jax.train.optimizer import OptimizerConfig, learning_rate, new_state
from npr_jax.train.packing import Example, make_rows, stack
from npr_jax.train.step import TrainConfig, compiled_step, optimize

DAPO = Objective("dapo")


@pytest.fixture(scope="module")
def model():
    return tiny()


@pytest.fixture(scope="module")
def groups(model):
    """Three groups of four with different prompts and lengths, advantages and old log-probs."""
    rng, made = random.Random(1), []
    for _ in range(3):
        prompt = problem(rng)[0]
        group = []
        for _ in range(4):
            one = example(model, prompt, problem(rng, rng.choice((1, 2)))[1])
            old = np.array([-3.6 + 0.2 * rng.random() for _ in range(len(one.layout))])
            group.append(dataclasses.replace(one, advantage=rng.uniform(-2, 2), old_logp=old))
        made.append(group)
    return made


def gradient(model, rows, objective=DAPO):
    """Loss sum and gradient of all rows as one batch, by plain differentiation."""
    batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    function = jax.jit(
        jax.value_and_grad(lambda p: loss_sums(p, batch, model.config, objective, "float32")[0])
    )
    return function(model.params)


def config(**fields):
    optimizer = OptimizerConfig(learning_rate=1e-3, **fields)
    return TrainConfig(optimizer, row_len=256, micro_rows=2)


@pytest.mark.parametrize(
    "objective", spread([DAPO, Objective("sft"), Objective("papo")], check=1, test=2), ids=str
)
def test_shared_prompts_give_the_same_loss_and_gradient(model, groups, objective):
    shared = gradient(model, make_rows(groups, 512, 3), objective)
    alone = gradient(model, make_rows([[e] for g in groups for e in g], 128, 3), objective)
    np.testing.assert_allclose(shared[0], alone[0], rtol=1e-5)
    chex.assert_trees_all_close(shared[1], alone[1], rtol=1e-4, atol=2e-4)


@pytest.mark.slow
def test_micro_batches_are_one_batch(model, groups):
    """Rows with unequal counts; the clip comes after the division, so it sees the same norm."""
    rows = make_rows([groups[0], groups[1][:1], groups[2][:2]], 256, 3)
    counts = [int(row["loss_mask"].sum()) for row in rows]
    assert len(rows) >= 2 and len(set(counts)) > 1
    loss, grads = gradient(model, rows)
    grads = jax.tree.map(lambda g: g / sum(counts), grads)
    norm = math.sqrt(sum(float((g**2).sum()) for g in jax.tree.leaves(grads)))
    results = []
    for micro_rows in (1, 2, 8):
        settings = dataclasses.replace(config(clip=norm / 2), micro_rows=micro_rows)
        state = new_state(model.params, settings.optimizer)
        state, metrics = optimize(state, rows, model.config, settings, DAPO, 1e-3)
        assert metrics["loss_tokens"] == sum(counts)
        np.testing.assert_allclose(metrics["loss"], loss / sum(counts), rtol=1e-5)
        np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)
        moments = state.opt_state[1].mu  # 0.1 of the clipped gradient
        chex.assert_trees_all_close(
            moments, jax.tree.map(lambda g: 0.1 * g / 2, grads), rtol=1e-3, atol=1e-6
        )
        results.append(moments)
    chex.assert_trees_all_close(*results, rtol=1e-4, atol=1e-8)


@pytest.mark.slow
def test_only_loss_tokens_have_a_say(model, groups):
    """What is forced, prompt, or padding may carry any advantage and log-prob."""
    rows = make_rows(groups, 512, 3)
    loss, grads = gradient(model, rows)
    rng = np.random.default_rng(0)
    changed = []
    for row in rows:
        noise = rng.normal(size=row["tokens"].shape).astype(np.float32) * 100
        keep = row["loss_mask"]
        changed.append(
            row | {name: np.where(keep, row[name], noise) for name in ("advantages", "old_logp")}
        )
    again = gradient(model, changed)
    assert again[0] == loss
    chex.assert_trees_all_equal(again[1], grads)
    # The same tokens, were they counted, would change the loss.
    counted = [row | {"loss_mask": row["pred"] >= 0} for row in changed]
    assert gradient(model, counted)[0] != loss


@pytest.mark.slow
def test_loss_does_not_ask_for_forced_tokens(model):
    """The gradient into the logits of a forced token's predictor is zero.

    Two targets at a forced place: with the same context after it the loss could not tell them
    apart. Here the last forced token of a trace is its last token.
    """
    (one,) = examples(model, 1, seed=5)
    mask = one.loss_mask.copy()
    mask[-1] = False  # as if the last token were forced
    tokens = one.token_ids.copy()
    tokens[-1] = model.tags.plan_open
    losses = [
        gradient(model, make_rows([[Example(ids, one.layout, mask)]], 128, 2), Objective("sft"))
        for ids in (one.token_ids, tokens)
    ]
    assert losses[0][0] == losses[1][0]
    # Its embedding is input to nothing that counts, either.
    chex.assert_trees_all_equal(losses[0][1]["layers"], losses[1][1]["layers"])


@pytest.mark.slow
def test_empty_rows_and_unused_micro_batches_change_nothing(model, groups):
    rows = make_rows(groups[:1], 256, 3)
    settings = config()
    one, _ = optimize(
        new_state(model.params, settings.optimizer), rows, model.config, settings, DAPO, 1e-3
    )
    settings = dataclasses.replace(settings, micro_rows=len(rows) + 3)
    other, _ = optimize(
        new_state(model.params, settings.optimizer), rows, model.config, settings, DAPO, 1e-3
    )
    chex.assert_trees_all_close(one.opt_state[1].mu, other.opt_state[1].mu, rtol=1e-4, atol=1e-8)


def test_no_token_to_train_on_is_an_error_and_the_state_lives_on(model, groups):
    (row, *_) = make_rows(groups, 512, 3)
    row = row | {"loss_mask": np.zeros(512, bool)}
    state = new_state(model.params, config().optimizer)
    with pytest.raises(ValueError, match="none of the 1 rows has a token that counts"):
        optimize(state, [row], model.config, config(), DAPO, 1e-3)
    assert np.isfinite(jax.tree.leaves(state.params)[0]).all()


@pytest.mark.slow
def test_a_step_that_is_not_finite_changes_nothing(model, groups):
    good = make_rows(groups[:1], 256, 3)
    bad = [row | {"advantages": row["advantages"] * np.float32(np.inf)} for row in good]

    def train(*batches):
        state, numbers = new_state(model.params, config().optimizer), []
        for rows in batches:
            state, metrics = optimize(state, rows, model.config, config(), Objective("papo"), 1e-3)
            numbers.append(metrics["nonfinite"])
        return state, numbers

    once, _ = train(good, good)
    state, numbers = train(good, bad, bad, good)
    assert numbers == [0, 1, 1, 0]
    assert state.step == 2
    chex.assert_trees_all_equal(state, once)


@pytest.mark.slow
def test_a_step_whose_new_state_is_not_finite_changes_nothing(model, groups):
    """Loss and gradient are finite, and what the optimizer makes of them is not."""
    rows = make_rows(groups[:1], 256, 3)
    for weight_decay, rate in ((0.0, np.nan), (1.0, np.inf), (1e30, 1e20)):
        settings = config(weight_decay=weight_decay)
        state = new_state(model.params, settings.optimizer)
        before = jax.tree.map(np.array, state)
        state, metrics = optimize(state, rows, model.config, settings, Objective("papo"), rate)
        assert metrics["nonfinite"] == 1 and math.isfinite(metrics["grad_norm"])
        chex.assert_trees_all_equal(state, before)


@pytest.mark.slow
def test_a_step_does_not_copy_its_state(model, groups):
    """Moments are as large as the parameters, and the step has them to itself."""
    batch = stack(make_rows(groups[:1], 256, 3), 2, 1)
    state = new_state(model.params, config().optimizer)
    step = compiled_step(model.config, config().optimizer, DAPO, "float32", None)
    numbers = np.int32(1), np.float32(1), np.float32(1e-3)
    text = step.lower(state, batch, *numbers).compile().as_text()
    shape = ",".join(map(str, model.params["layers"]["w_gate"].shape))
    moments = re.findall(rf"(%state_opt_state\S*w_gate\S*) = f32\[{shape}\]\S* parameter", text)
    assert len(moments) == 2
    for name in moments:
        assert f"copy({name})" not in text


@pytest.mark.slow
def test_overfits_a_tiny_batch_and_compiles_once(model):
    rows = make_rows([[e] for e in examples(model, 4, seed=2)], 256, 2)
    settings = config(eps=2e-8)  # of this test alone
    state = new_state(model.params, settings.optimizer)
    optimizer = dataclasses.replace(settings.optimizer, learning_rate=0.0)
    step_of = compiled_step(model.config, optimizer, Objective("sft"), "float32", None)
    before = step_of._cache_size()
    losses = []
    for step in range(60):
        state, metrics = optimize(
            state, rows, model.config, settings, Objective("sft"), min(1.0, step / 5) * 5e-3
        )
        losses.append(metrics["loss"])
    assert losses[0] > 2 and losses[-1] < 0.25, losses[::10]
    assert step_of._cache_size() == before + 1 == 1
    assert int(state.step) == 60


@pytest.mark.slow
def test_gap_to_the_sampler_is_measured(model, groups):
    """With old log-probs that are the model's own it is zero; one token off by 0.5 shows."""
    rows = make_rows(groups, 512, 3)
    batch = stack(rows, len(rows), 1)
    from npr_jax.model import token_logp

    flat = {name: value[0] for name, value in batch.items()}
    logp = np.asarray(
        token_logp(
            model.config,
            model.params,
            flat["tokens"],
            flat["positions"],
            flat["hidden"],
            flat["pred"],
        )
    )
    rows = [row | {"old_logp": logp[i].copy()} for i, row in enumerate(rows)]
    t = int(np.flatnonzero(rows[0]["loss_mask"])[3])

    def gaps():
        state = new_state(model.params, config().optimizer)
        metrics = optimize(state, rows, model.config, config(), Objective("papo"), 1e-3)[1]
        return metrics["logp_gap"] * metrics["loss_tokens"], metrics["logp_gap_max"]

    assert max(gaps()) < 1e-2 and gaps()[1] < 1e-4
    rows[0]["old_logp"][t] += 0.5
    np.testing.assert_allclose(gaps(), (0.5, 0.5), atol=1e-2)


@pytest.mark.slow
def test_bfloat16_computes_and_float32_is_kept(model, groups):
    rows = make_rows(groups, 512, 3)
    settings = dataclasses.replace(config(), compute_dtype="bfloat16")
    state = new_state(model.params, settings.optimizer)
    new, metrics = optimize(state, rows, model.config, settings, Objective("sft"), 1e-6)
    loss = gradient(model, rows, Objective("sft"))[0] / metrics["loss_tokens"]
    assert metrics["loss"] != loss and abs(metrics["loss"] - loss) < 0.05
    assert all(x.dtype == np.float32 for x in jax.tree.leaves(new.params))
    # Steps of 1e-6 would be lost in bfloat16.
    moved = jax.tree.map(lambda a, b: float(abs(a - b).max()), new.params, model.params)
    assert all(0 < x < 2e-6 for x in jax.tree.leaves(moved))


@pytest.mark.slow
def test_norms_do_not_decay(model):
    """Where the gradient is zero (unused rows), AdamW only decays; norms stay."""
    settings = config(weight_decay=0.5)
    state = new_state(model.params, settings.optimizer)
    rows = make_rows([examples(model, 1)], 256, 2)
    rows = [row | {"advantages": 0 * row["advantages"]} for row in rows]
    new, metrics = optimize(state, rows, model.config, settings, Objective("papo"), 0.1)
    assert metrics["grad_norm"] == 0
    chex.assert_trees_all_equal(new.params["final_norm"], model.params["final_norm"])
    chex.assert_trees_all_equal(new.params["layers"]["q_norm"], model.params["layers"]["q_norm"])
    chex.assert_trees_all_close(new.params["embed"], model.params["embed"] * 0.95, rtol=1e-5)
    chex.assert_trees_all_close(
        new.params["layers"]["wq"], model.params["layers"]["wq"] * 0.95, rtol=1e-5
    )


def test_schedules():
    cosine = OptimizerConfig(1.0, "cosine", final_learning_rate=0.1, warmup=4)
    rates = [learning_rate(cosine, step, 20) for step in range(20)]
    np.testing.assert_allclose(rates[:5], [0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[-1] == pytest.approx(0.1)
    assert rates == [
        learning_rate(dataclasses.replace(cosine, warmup=0.2), s, 20) for s in range(20)
    ]
    constant = OptimizerConfig(2.0, warmup=1)
    assert [learning_rate(constant, s, 3) for s in range(3)] == [1.0, 2.0, 2.0]
    with pytest.raises(ValueError, match="schedule is 'linear', needed is 'constant' or"):
        OptimizerConfig(1.0, "linear")
