"""Adapters beside frozen matrices: what they compute, that they alone are trained, where they live,
how they come to the engine, and PEFT's files of them."""

import dataclasses
import functools
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from train_toy import encode, examples, tiny, write_problems

from npr_jax.base.config import load_config
from npr_jax.base.mesh import MeshConfig, decode_mesh, local_decode_mesh, make_mesh
from npr_jax.decode import Engine, EngineConfig, SamplingParams
from npr_jax.model import PRESETS, forward, init_params, logits
from npr_jax.model.config import TARGETS, LoraConfig
from npr_jax.model.flops import work_flops
from npr_jax.model.lora import (
    adapters_of,
    base_of,
    init_adapters,
    joined,
    merge,
    plain,
    same_part,
    trained,
)
from npr_jax.model.peft import write_adapters
from npr_jax.model.pretrained import load, load_tokenizer, save
from npr_jax.model.sharding import decode_shardings, place_params, to_decode, train_shardings
from npr_jax.train import beta
from npr_jax.train.export import export
from npr_jax.train.objective import Objective, loss_sums
from npr_jax.train.optimizer import OptimizerConfig
from npr_jax.train.packing import make_rows, stack
from npr_jax.train.start import find_start
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
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
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
        pytest.param(MeshConfig(fsdp=8), marks=pytest.mark.nightly, id="fsdp"),
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


ENGINE = EngineConfig(lanes=4, pages=64, page_size=8, steps=4, max_depth=1)
GREEDY = SamplingParams(temperature=0.0, max_tokens=24)


def answers(engine):
    prompts = [list(engine.tokenizer.encode(text)) for text in ("A:1+2?", "A:3+4;B:5+5?")]
    return engine.generate(prompts, GREEDY)


def assert_alike(found, expected):
    """Answers have the same tokens up to the first whose margin is a tie, and the same log-probs
    until then."""
    for one, other in zip(found, expected, strict=True):
        size = min(len(one.token_ids), len(other.token_ids))
        differ = one.token_ids[:size] != other.token_ids[:size]
        until = int(np.argmax(differ)) if differ.any() else size
        assert until == size or other.margin[until] < 1e-3
        np.testing.assert_allclose(one.logp[:until], other.logp[:until], atol=1e-4)


def test_the_engine_decodes_adapters_as_merged_weights_and_compiles_nothing_for_new_ones():
    models = adapted(), adapted(seed=1), tiny()
    engine = Engine(models[0], ENGINE)
    expected = [answers(Engine(model.merged(), ENGINE)) for model in models]
    with pytest.raises(AssertionError):
        assert_alike(*expected[:2])
    assert_alike(answers(engine), expected[0])
    engine.set_params(adapters_of(models[1].params))  # taking them alone is compiled here
    for number, params in (
        (0, adapters_of(models[0].params)),
        (1, adapters_of(models[1].params)),
        (0, models[0].params),
        (1, models[1].merged().params),
        (2, models[2].params),
    ):
        before = engine.stats()["compilations"]
        engine.set_params(params)
        assert_alike(answers(engine), expected[number])
        assert engine.stats()["compilations"] == before
    with pytest.raises(ValueError, match=r"layers/\w+_a is missing, needed is float32"):
        engine.set_params({"layers": {}})
    with pytest.raises(ValueError, match=r"layers/\w+_a is .*no such leaf"):
        Engine(tiny(), ENGINE).set_params(models[0].params)
    with pytest.raises(ValueError, match=r"engine\.exact is true and the model has adapters"):
        Engine(models[0], dataclasses.replace(ENGINE, exact=True))


@pytest.mark.slow
def test_adapters_alone_go_from_a_training_mesh_to_the_engine():
    first, second = adapted(), adapted(seed=1)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    shardings = train_shardings(first.config, mesh)
    expected = answers(Engine(second.merged(), ENGINE))

    def decoded(params):
        placed = place_params(params, same_part(first.config, shardings, params))
        everywhere, here = decode_mesh(mesh), local_decode_mesh(mesh)
        return to_decode(first.config, placed, "float32", everywhere, here)

    whole = dataclasses.replace(first, params=decoded(first.params))
    engine = Engine(whole, ENGINE, local_decode_mesh(mesh))
    base = engine.runner.params["embed"]
    engine.set_params(decoded(adapters_of(second.params)))
    assert engine.runner.params["embed"] is base
    wanted = adapters_of(decode_shardings(first.config, local_decode_mesh(mesh)))
    for (path, x), sharding in zip(
        jax.tree.leaves_with_path(decoded(adapters_of(second.params))),
        jax.tree.leaves(wanted),
        strict=True,
    ):
        assert x.sharding.is_equivalent_to(sharding, x.ndim), path
    assert_alike(answers(engine), expected)


def test_adapters_are_saved_beside_the_merged_model_and_load_again(tmp_path):
    save(load("tiny", tags=True), tmp_path / "base")
    model = dataclasses.replace(adapted(SOME), base=str(tmp_path / "base"))
    save(model, tmp_path / "final")
    merged, found = load(tmp_path / "final"), load(tmp_path / "final" / "adapter")
    assert merged.config.lora is None and found.config.lora == SOME
    assert found.tags == model.tags and found.base == str(tmp_path / "base")
    chex.assert_trees_all_equal(adapters_of(found.params), adapters_of(model.params))
    used = slice(len(model.tokenizer))  # the rest of the table is padding
    for one, other in ((found.merged(), model.merged()), (merged, model.merged())):
        chex.assert_trees_all_equal(one.params["layers"], other.params["layers"])
        np.testing.assert_array_equal(one.params["embed"][used], other.params["embed"][used])
    assert len(load_tokenizer(tmp_path / "final" / "adapter")) == len(model.tokenizer)
    half = load(tmp_path / "final" / "adapter", dtype="bfloat16")
    moved = load("tiny", seed=1, adapter=tmp_path / "final" / "adapter")
    chex.assert_trees_all_equal(adapters_of(moved.params), adapters_of(model.params))
    chex.assert_trees_all_equal(base_of(moved.params), base_of(load("tiny", seed=1).params))
    with pytest.raises(ValueError, match="needed are adapters"):
        load("tiny", adapter=tmp_path / "final")
    assert {x.dtype for x in jax.tree.leaves(half.params)} == {jnp.dtype("bfloat16")}
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2))
    placed = load(tmp_path / "final" / "adapter", mesh=mesh)
    chex.assert_trees_all_equal(jax.device_get(placed.params), jax.device_get(found.params))
    for x, sharding in zip(
        jax.tree.leaves(placed.params),
        jax.tree.leaves(train_shardings(found.config, mesh)),
        strict=True,
    ):
        assert x.sharding.is_equivalent_to(sharding, x.ndim)


def test_the_files_are_in_peft_s_layout(tmp_path):
    model = dataclasses.replace(adapted(), base="tiny")
    write_adapters(tmp_path, model.config, model.params, model.base)
    said = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (said["r"], said["lora_alpha"], said["base_model_name_or_path"]) == (4, 8, "tiny")
    assert said["target_modules"] == list(TARGETS) and said["peft_type"] == "LORA"
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert len(tensors) == 2 * 7 * model.config.num_layers
    prefix = "base_model.model.model.layers.1"
    a = tensors[f"{prefix}.self_attn.k_proj.lora_A.weight"]
    b = tensors[f"{prefix}.mlp.down_proj.lora_B.weight"]
    np.testing.assert_array_equal(a, model.params["layers"]["wk_a"][1].T)
    np.testing.assert_array_equal(b, model.params["layers"]["w_down_b"][1].T)


def changed(path, **changes):
    said = json.loads(path.read_text())
    path.write_text(json.dumps(said | changes))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "use_dora is True, supported is none of it"),
        ({"bias": "all"}, "bias is 'all', supported is 'none'"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save is \['lm_head'\]"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern is"),
        ({"target_modules": ["q_proj", "lm_head"]}, "target_modules is .*supported is a list of"),
        ({"target_modules": ".*proj"}, "target_modules is '.*proj'"),
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA', supported is 'LORA'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"revision": "v2"}, "revision is 'v2'"),
        ({"some_new_thing": 3}, "some_new_thing is 3"),
        ({"r": 0}, "r is 0, needed is"),
        ({"lora_alpha": "8"}, "lora_alpha is '8', needed is"),
        ({"base_model_name_or_path": None}, "base_model_name_or_path is None, needed is"),
        ({"base_model_name_or_path": "no/such/place"}, "base_model_name_or_path: "),
        ({"r": 5}, r"q_proj.lora_A.weight has shape \(4, 96\), needed is \(5, 96\)"),
        ({"target_modules": ["q_proj"]}, "unexpected base_model.*k_proj.lora_A"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_what_is_not_supported_of_an_adapter_is_refused_by_name(tmp_path, change, message):
    model = adapted()
    write_adapters(tmp_path, model.config, model.params, "tiny")
    assert load(tmp_path).config.lora == LORA
    changed(tmp_path / "adapter_config.json", **change)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load(tmp_path)


def test_rank_stabilised_adapters_are_read_with_their_scale(tmp_path):
    model = adapted()
    write_adapters(tmp_path, model.config, model.params, "tiny")
    changed(tmp_path / "adapter_config.json", use_rslora=True, target_modules="all-linear")
    assert load(tmp_path).config.lora.scale == pytest.approx(LORA.alpha / LORA.rank**0.5)


def test_a_directory_of_adapters_and_a_model_is_refused(tmp_path):
    model = adapted()
    write_adapters(tmp_path, model.config, model.params, "tiny")
    save(tiny(), tmp_path)
    with pytest.raises(ValueError, match=r"a model or adapters to one\?"):
        load(tmp_path)
    write_adapters(tmp_path / "second", model.config, model.params, str(tmp_path / "first"))
    write_adapters(tmp_path / "first", model.config, model.params, "tiny")
    with pytest.raises(ValueError, match="has some too"):
        load(tmp_path / "second")
    (tmp_path / "first" / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no adapter_model\.safetensors"):
        load(tmp_path / "first")


def texts(path):
    return {file.name: file.read_bytes() for file in sorted(path.iterdir()) if file.is_file()}


@pytest.mark.slow
def test_beta_trains_adapters_of_the_seed_model_and_goes_on_where_it_stopped(tmp_path, monkeypatch):
    model = load("tiny", tags=True)
    save(model, tmp_path / "seed")
    rows = write_problems(tmp_path / "problems.jsonl", 4, groups=2)
    records = []
    for prompt, response, answer in rows:
        ids, prompt_len = encode(model, prompt, response)
        record = {"problem": prompt, "answer": answer, "prompt_len": prompt_len}
        records.append(record | {"tries": 1, "accepted": [ids.tolist()], "texts": [response]})
    monkeypatch.setattr(beta, "_sample_batch", lambda *_: (records, {}))

    def run(name, steps):
        paths = {"model": "seed", "sampler_model": "seed", "problems": "problems.jsonl"}
        changes = [f"{key}={tmp_path / value}" for key, value in paths.items()]
        changes += ["sample.batch=4", "sample.num_problems=4", f"fit.steps={steps}", "fit.batch=2"]
        changes += ["fit.train.lora.rank=4", "fit.train.row_len=256", f"output={tmp_path / name}"]
        changes += ["fit.train.compute_dtype=bfloat16", "fit.train.optimizer.schedule=constant"]
        config = load_config(beta.BetaConfig, "tiny_beta", changes)
        return beta.run(config, lambda _: None)

    final = run("whole", 4)
    run("cut", 2)
    assert texts(run("cut", 4)) == texts(final)
    assert texts(tmp_path / "cut/final/adapter") == texts(final / "adapter")
    merged, found = load(final), load(final / "adapter")
    assert found.base == str(tmp_path / "seed") and found.config.lora == LoraConfig(4)
    half = jax.tree.map(lambda x: x.astype("bfloat16"), base_of(found.params))
    expected = merge(found.config, joined(half, adapters_of(found.params)))
    chex.assert_trees_all_close(merged.params["layers"], expected["layers"], atol=1e-7)
    assert not np.array_equal(merged.params["layers"]["wq"], half["layers"]["wq"])
    export(tmp_path / "whole", tmp_path / "exported")
    assert texts(tmp_path / "exported") == texts(final)
    assert texts(tmp_path / "exported/adapter") == texts(final / "adapter")
    (tmp_path / "seed").rename(tmp_path / "moved")
    with pytest.raises(FileNotFoundError, match="needed for its tokenizer and base: say where"):
        export(tmp_path / "whole", tmp_path / "again")
    export(tmp_path / "whole", tmp_path / "again", start=str(tmp_path / "moved"))
    weights = tmp_path / "again" / "model.safetensors"
    assert weights.read_bytes() == (final / "model.safetensors").read_bytes()


def test_a_training_begins_with_the_merged_weights_of_adapters():
    model = adapted()
    new, base, state = begin(model, TRAIN, 0)
    assert new.config.lora == LORA and new.base is None
    chex.assert_trees_all_equal(base, model.merged().params)
    assert not any(x.any() for name, x in state.params["layers"].items() if name.endswith("_b"))
    new, base, state = begin(model, dataclasses.replace(TRAIN, lora=None), 0)
    assert new.config.lora is base is None
    chex.assert_trees_all_equal(state.params, model.merged().params)


def test_a_run_goes_on_from_one_with_the_same_adapters_alone(tmp_path):
    lora = {"rank": 4, "alpha": 8.0, "targets": list(LORA.targets)}
    for name, value in (("some", lora), ("none", None)):
        (tmp_path / name).mkdir()
        config = {"model": "tiny", "seed": 0, "train": {"lora": value}}
        (tmp_path / name / "config.yaml").write_text(json.dumps(config))
    keys = {"model", "seed", "train"}
    for name, given in (("some", LORA), ("none", None)):
        with pytest.raises(ValueError, match="has no checkpoint of step 3"):
            find_start(f"{tmp_path / name}@3", keys, TrainConfig(OptimizerConfig(1e-3), lora=given))
    for name, given in (("some", SOME), ("some", None), ("none", LORA)):
        with pytest.raises(ValueError, match=r"train\.lora is .*, needed is that of .*"):
            find_start(f"{tmp_path / name}@3", keys, TrainConfig(OptimizerConfig(1e-3), lora=given))
