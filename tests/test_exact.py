"""Exact mode: the trainer's log-prob of every sampled token has the bits of the engine's."""

import dataclasses
import functools
import json
import re

import bigram
import engine_checks
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import examples, spread
from fake_device import RULES

from npr_jax.base.config import load_config
from npr_jax.decode import Engine, SamplingParams
from npr_jax.decode.attention import gather
from npr_jax.decode.regrow import Begun
from npr_jax.decode.runner import Runner
from npr_jax.kernels import exact
from npr_jax.model import exact as model_exact
from npr_jax.model import token_logp
from npr_jax.model.attention import dense, tree_attend
from npr_jax.runs.metrics import read_metrics
from npr_jax.train import papo
from npr_jax.train.objective import Objective, loss_sums
from npr_jax.train.optimizer import OptimizerConfig
from npr_jax.train.packing import Example, loss_mask, make_rows
from npr_jax.train.step import TrainConfig

OPTIMISED = True  # what is asked for here is asked of the programs that users run

CONFIG = dataclasses.replace(engine_checks.CONFIG, table_pages=128, exact=True)
VARIANTS = {
    "one lane": dict(lanes=1),
    "many lanes, long visits": dict(lanes=20, steps=16),
    "other chunks": dict(header_rows=1, header_chunk=1, prefill_rows=1, prefill_chunk=7),
    "other pages": dict(page_size=16),
    "preempted": dict(pages=60),
}
PROMPTS = [[12, 13, 20], [22], list(range(10, 21)) * 6]
ROW_LEN, DEPTH, DEEPEST = 512, 6, 16


pytestmark = pytest.mark.usefixtures("plans_without_numbers")


@functools.cache
def model(dtype="float32"):
    found = bigram.model()
    return dataclasses.replace(found, params=jax.tree.map(lambda x: x.astype(dtype), found.params))


@functools.cache
def sampled(dtype="float32", changes=(), exact=True):
    """Answers in groups of one prompt, and how many were preempted."""
    config = dataclasses.replace(CONFIG, exact=exact, **dict(changes))
    engine = Engine(model(dtype), config)
    params = SamplingParams(n=examples(10), max_tokens=100, seed=(1, 2, 3))
    answers = engine.generate(PROMPTS, params)
    groups = [answers[i : i + params.n] for i in range(0, len(answers), params.n)]
    return groups, engine.stats()["preemptions"]


@functools.partial(jax.jit, static_argnames=("config", "exact"))
def score(config, params, rows, exact):
    layout = (rows[name] for name in ("tokens", "positions", "hidden", "pred"))
    return token_logp(config, params, *layout, exact=exact)


def rows_of(groups, together=True, depth=DEPTH):
    """Rows [N, T, ...] of answers, of a group behind one prompt where they are `together`."""
    found = [
        [Example(a.token_ids, a.layout, loss_mask(a.layout), 1.0, a.logp) for a in g]
        for g in groups
    ]
    if not together:
        found = [[example] for group in found for example in group]
    rows = make_rows(found, ROW_LEN, depth)
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def unlike(groups, dtype="float32", exact=True, micro=2, **packing):
    """How many log-probs of the trainer differ from the engine's, in any bit; and how many are
    compared."""
    rows, differ, total = rows_of(groups, **packing), 0, 0
    for first in range(0, len(rows["tokens"]), micro):
        some = {name: x[first : first + micro] for name, x in rows.items()}
        logp = np.asarray(score(model(dtype).config, model(dtype).params, some, exact))
        mask = some["loss_mask"]
        differ += int((logp != some["old_logp"])[mask].sum())
        total += int(mask.sum())
    return differ, total


@pytest.mark.parametrize("dtype", spread(["float32", "bfloat16"]))
def test_the_trainer_has_the_bits_of_the_engine(dtype, report):
    groups, _ = sampled(dtype)
    differ, total = unlike(groups, dtype)
    report(f"{total} tokens")
    assert total > 50 * len(groups)
    assert max(answer.layout.depth for group in groups for answer in group) >= 2
    assert differ == 0
    assert unlike(groups, dtype, together=False, micro=3)[0] == 0


@pytest.mark.slow
def test_without_exact_it_has_not():
    groups, _ = sampled(exact=False)
    assert unlike(groups, exact=False)[0] > 0


@pytest.mark.parametrize("dtype", spread(["float32", "bfloat16"]))
@pytest.mark.parametrize("variant", spread(VARIANTS))
def test_answers_have_the_same_bits_whatever_the_engines_shapes(variant, dtype):
    groups, _ = sampled(dtype)
    others, preempted = sampled(dtype, tuple(VARIANTS[variant].items()))
    if variant == "preempted" and len(groups[0]) >= 10:
        assert preempted
    for group, other in zip(groups, others, strict=True):
        for answer, twin in zip(group, other, strict=True):
            np.testing.assert_array_equal(answer.token_ids, twin.token_ids)
            np.testing.assert_array_equal(answer.logp, twin.logp)


@pytest.mark.slow
def test_answers_that_go_on_have_the_same_bits():
    """They are left after every 9 tokens, and also preempted between."""
    params = SamplingParams(n=3, max_tokens=60, seed=(1, 2, 3))
    whole = Engine(model(), CONFIG).generate(PROMPTS, params)
    engine = Engine(model(), dataclasses.replace(CONFIG, pages=60))
    made, begun, calls = [], None, 0
    for limit in (*range(9, 60, 9), 1 << 30):
        made = engine.generate(PROMPTS, params, begun=begun, pause=[limit] * len(whole))
        begun = [
            Begun(answer, limit) if answer.finish_reason == "aborted" else None for answer in made
        ]
        calls += any(begun)
    for answer, twin in zip(whole, made, strict=True):
        np.testing.assert_array_equal(answer.token_ids, twin.token_ids)
        np.testing.assert_array_equal(answer.logp, twin.logp)
    assert calls > 3 and max(answer.layout.depth for answer in whole) > 0
    assert engine.stats()["preemptions"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("rules", spread(RULES[1:], test=2), ids=str)
def test_the_trainer_has_the_bits_under_any_rules(rules):
    """Whether kept keys are where they were computed, or copies; and also after a preemption."""
    changes = ("rules", rules), ("max_blocks", 4)
    groups, _ = sampled("float32", changes)
    assert unlike(groups, depth=DEEPEST)[0] == 0
    others, preempted = sampled("float32", (*changes, ("pages", 60)))
    assert preempted or len(groups[0]) < 10
    for group, other in zip(groups, others, strict=True):
        for answer, twin in zip(group, other, strict=True):
            np.testing.assert_array_equal(answer.token_ids, twin.token_ids)
            np.testing.assert_array_equal(answer.logp, twin.logp)


@pytest.mark.slow
def test_cached_prompts_have_the_same_bits():
    engine = Engine(model(), CONFIG)
    params = SamplingParams(n=3, max_tokens=60, seed=(1, 2, 3))
    first = engine.generate(PROMPTS, params)
    again = engine.generate(PROMPTS, params)
    assert engine.stats()["cached_tokens"] > 0
    for answer, twin in zip(first, again, strict=True):
        np.testing.assert_array_equal(answer.token_ids, twin.token_ids)
        np.testing.assert_array_equal(answer.logp, twin.logp)


@pytest.mark.parametrize("remat", spread(["dots", "none", "full"]))
def test_the_forward_pass_of_a_gradient_has_the_bits(remat):
    groups, _ = sampled()
    rows = {name: jnp.asarray(x[:2]) for name, x in rows_of(groups).items()}
    train = TrainConfig(OptimizerConfig(1e-3), remat=remat, exact=True)
    arch = train.model(model().config)
    step = jax.jit(
        lambda params: jax.grad(loss_sums, has_aux=True)(
            params, rows, arch, Objective("papo"), "float32"
        )
    )
    _, (_, largest) = step(model().params)
    assert float(largest["logp_gap_max"]) == 0


SMALL = ["engine.lanes=16", "engine.pages=256", "train.row_len=256", "max_prompt_tokens=16"]
SMALL += ["max_tokens=64", "prompts=4", "samples=4", "steps=2", "minibatches=2"]


@pytest.mark.slow
def test_the_gap_is_zero_before_the_first_update_of_every_batch(home, tmp_path):
    gaps = {}
    rules = "engine.rules={join: last, marker: '=', positions: sum}"
    variants = {"true": [], "false": [], "rules": [rules]}
    for name, more in variants.items():
        on = json.dumps(name != "false")
        paths = {
            "model": home / "tree",
            "problems": home / "problems.jsonl",
            "output": tmp_path / name,
        }
        changes = [f"{key}={json.dumps(str(value))}" for key, value in paths.items()]
        changes += [f"engine.exact={on}", f"train.exact={on}", *more]
        papo.run(
            load_config(papo.PapoConfig, "tiny_papo", [*SMALL, *changes]), lambda metrics: None
        )
        lines = [line for line in read_metrics(tmp_path / name) if not line["skipped"]]
        gaps[name] = [line["logp_gap"] for line in lines]
    assert gaps["true"] and not any(gaps["true"])
    assert gaps["rules"] and not any(gaps["rules"])
    assert any(gaps["false"])


def test_a_stage_is_exact_as_a_whole_or_not_at_all():
    paths = [f"{name}=x" for name in ("model", "problems", "output")]
    for changes, message in (
        (["train.exact=true"], "train.exact is true and engine.exact false"),
        (
            ["train.exact=true", "engine.exact=true", "layout=reference"],
            "train.exact is true and layout 'reference'",
        ),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            load_config(papo.PapoConfig, "tiny_papo", [*paths, *changes])


def arrays(rng, batch, length, heads, kv_heads, dim):
    shapes = [(batch, length, n, dim) for n in (heads, kv_heads, kv_heads)]
    q, k, v = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    hidden = np.zeros((batch, length, 2, 2), np.int32)
    third = length // 3
    hidden[:, third : third + 9, 0] = third + 9, length
    hidden[:, third + 9 : 2 * third, 1] = 2 * third, length - 5
    return q, k, v, hidden


@pytest.mark.parametrize(
    "shape", spread([(1, 300, 4, 2, 24), (2, 70, 3, 3, 8), (1, 250, 8, 2, 128)], check=1)
)
def test_attention_and_its_gradient_are_those_of_the_oracle(shape):
    q, k, v, hidden = arrays(np.random.default_rng(0), *shape)
    config = dataclasses.replace(model().config, attention="exact")

    def loss(attend):
        def f(q, k, v):
            out = attend(q, k, v)
            return jnp.sum(out * jnp.cos(jnp.arange(out.size)).reshape(out.shape)), out

        return jax.jit(jax.value_and_grad(f, (0, 1, 2), has_aux=True))(q, k, v)

    (_, out), gradients = loss(lambda *x: tree_attend(config, hidden)(*x, 0, None)[0])
    (_, wanted), wanted_gradients = loss(lambda *x: dense(*x, hidden))
    np.testing.assert_allclose(out, wanted, atol=1e-5)
    for got, want in zip(gradients, wanted_gradients, strict=True):
        np.testing.assert_allclose(got, want, atol=2e-5)


def test_attention_over_pages_is_that_of_the_oracle_and_reads_no_stranger():
    rng = np.random.default_rng(0)
    pool = rng.normal(size=(2, 9, 4, 4, 24)).astype(np.float32)
    pool[:, 8] = np.nan
    table = np.array([[1, 2, 3, 4, 8], [5, 1, 6, 8, 8]], np.int32)
    base = np.array([[0, 3, 7, 9, 13, 1 << 30], [0, 4, 5, 9, 1 << 30, 1 << 30]], np.int32)
    ranks = np.array([[9, 10, 11], [7, 8, -1]], np.int32)
    q = rng.normal(size=(2, 3, 4, 24)).astype(np.float32)
    arguments = q, pool, np.int32(1), table, base, ranks
    got, wanted = (np.asarray(jax.jit(f)(*arguments)) for f in (exact.paged, gather))
    seen = ranks >= 0
    np.testing.assert_allclose(got[seen], wanted[seen], atol=1e-5)


def test_powers_of_two_are_right_to_the_last_bits():
    x = np.linspace(0, 1, 10_001, dtype=np.float32)
    wanted = np.exp2(x.astype(np.float64))
    assert np.abs(np.asarray(jax.jit(exact._exp2)(x)) / wanted - 1).max() < 2e-7
    n = np.array([0, -1, -126, -127, -5000], np.float32)
    np.testing.assert_array_equal(exact._power(n), [1, 0.5, 2.0**-126, 0, 0])


def test_a_machine_whose_products_depend_on_the_rows_is_refused(monkeypatch):
    def shifted(w):
        return exact.Weights((w * np.float32(1 + 1e-6),), w.shape[1], least=2)

    monkeypatch.setattr(exact, "few_rows", shifted)
    with pytest.raises(ValueError, match=r"exact: 2 rows times weights \[96, 96\] have other bits"):
        Engine(model(), CONFIG)


def test_a_machine_whose_attention_depends_on_where_keys_lie_is_refused(monkeypatch):
    model_exact._attention_holds.cache_clear()
    add_keys = exact._add_keys

    def shifted(carry, q, k, v, seen):  # adds something for keys that are not seen
        return add_keys(carry, q, k, v + 1e-3 * jnp.mean(v, axis=-2, keepdims=True), seen)

    monkeypatch.setattr(exact, "_add_keys", shifted)
    with pytest.raises(ValueError, match="attention of head_dim=24 and 2 query heads a key head"):
        Engine(model(), CONFIG)
    model_exact._attention_holds.cache_clear()


def test_what_exact_is_not_for_is_refused_by_name():
    def make(**changes):
        return dataclasses.replace(CONFIG, **changes)

    with pytest.raises(ValueError, match="attention is 'gather' and exact true"):
        make(attention="gather")
    with pytest.raises(ValueError, match=r"engine\.cache_dtype is bfloat16 and engine.exact true"):
        Engine(model(), make(cache_dtype="bfloat16"))
    with pytest.raises(ValueError, match=r"engine\.page_size is 512 .* at most 256"):
        Engine(model(), make(page_size=512))
    mesh = jax.make_mesh((2, 1), ("data", "tensor"))
    with pytest.raises(ValueError, match=r"engine\.exact is true on a mesh of 2 devices"):
        Runner(model().config, model().params, CONFIG, mesh)
    train = TrainConfig(OptimizerConfig(1e-3), exact=True)
    with pytest.raises(ValueError, match=r"train\.exact is true on CPU with 2 devices"):
        train.check(mesh)
    wide = dataclasses.replace(model().config, head_dim=512)
    with pytest.raises(ValueError, match="head_dim 512: exact needs at most 48 and 256"):
        model_exact.require(wide, None, "engine.exact")


def test_off_leaves_the_programs_as_they_were():
    """Without exact no barrier and no layout of its own is in a program."""
    zeros = np.zeros((1, 64), np.int32)
    rows = dict.fromkeys(("tokens", "positions", "pred"), zeros) | {
        "hidden": np.zeros((1, 64, 1, 2), np.int32)
    }
    config, params = model().config, model().params
    on, off = (
        str(jax.make_jaxpr(lambda p: score(config, p, rows, exact))(params))  # noqa: B023
        for exact in (True, False)
    )
    assert "optimization_barrier" in on
    assert "optimization_barrier" not in off
