"""The model against transformers (golden values), and the scoring of tokens."""

import dataclasses
import functools
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import shared_path, spread

import npr_jax
from npr_jax.model import (
    PRESETS,
    ModelConfig,
    init_params,
    logits,
    num_params,
    token_logp,
    token_logp_entropy,
    token_loss,
)
from npr_jax.model.config import REMAT, unknown_keys
from npr_jax.model.score import _chunked_loss
from npr_jax.tree import TagIds, layout, pack, parse

NAMES = ("a_tied_h4kv2", "b_untied_h8kv2", "c_tied_h8kv2", "d_untied_h4kv2")


@functools.cache
def golden(name):
    folder = shared_path(f"golden/qwen3_tiny/{name}")
    model = npr_jax.load(folder)
    arrays = dict(np.load(folder / "cases.npz"))
    vocab = model.config.vocab_size
    tags = TagIds(*range(vocab - 8, vocab), whitespace=frozenset({3}))
    return model, arrays, json.loads((folder / "cases.json").read_text()), tags


def score(model, ids, tree):
    """Logits and log-probs of one row, padded so that few shapes compile."""
    length = len(ids)
    row = pack([tree], -(-length // 192) * 192)
    tokens = np.zeros((1, len(row)), np.int32)
    tokens[0, :length] = ids
    hidden = np.zeros((1, len(row), 8, 2), np.int32)
    hidden[0, :, : row.hidden.shape[1]] = row.hidden
    args = (model.config, model.params, tokens, row.positions[None], hidden)
    out = jax.jit(logits, static_argnums=0)(*args)
    logp = jax.jit(token_logp, static_argnums=0)(*args, row.pred[None])
    return np.asarray(out[0, :length]), np.asarray(logp[0, :length])


@pytest.mark.parametrize(
    "case",
    spread([*((name, "blockwise") for name in NAMES), ("a_tied_h4kv2", "dense")], check=1, test=2),
)
def test_logits_are_those_of_transformers(case):
    name, attention = case
    model, arrays, info, tags = golden(name)
    config = dataclasses.replace(model.config, attention=attention, attention_block=64)
    model = dataclasses.replace(model, config=config)
    compared = 0
    for case in info["cases"]:
        key, variant = case["key"], case["variant"]
        if variant not in ("strict", "reference", "causal"):
            continue
        ids = arrays[f"{key}_input_ids"]
        if variant == "causal":
            tree = layout(len(ids), prompt_len=case["prompt_len"])
        else:
            tree = parse(ids, case["prompt_len"], tags, rule=variant)
        np.testing.assert_array_equal(tree.positions, arrays[f"{key}_position_ids"])
        np.testing.assert_array_equal(tree.visible(), arrays[f"{key}_mask"])
        out, logp = score(model, ids, tree)
        if f"{key}_logits" in arrays:
            np.testing.assert_allclose(out, arrays[f"{key}_logits"], atol=1e-4)
            compared += 1
        np.testing.assert_allclose(out[-1], arrays[f"{key}_last_logits"], atol=1e-4)
        flat = tree.pred[1:] == np.arange(len(ids) - 1)
        expected = arrays[f"{key}_next_logprobs"]
        np.testing.assert_allclose(logp[1:][flat], expected[flat], atol=1e-4)
    assert compared >= 3


@pytest.mark.parametrize("name", spread(NAMES, check=1, test=2))
def test_packed_and_batched_rows_are_those_of_transformers(name):
    model, arrays, _, tags = golden(name)
    segments = arrays["packed_segment_ids"].reshape(-1)
    ids = arrays["packed_input_ids"].reshape(-1)
    trees = []
    for segment in dict.fromkeys(segments.tolist()):
        own = ids[segments == segment]
        begin = (
            int(np.flatnonzero(np.isin(own, tags.ids))[0]) if np.isin(own, tags.ids).any() else 1
        )
        trees.append(parse(own, begin, tags))
    tree = pack(trees)
    np.testing.assert_array_equal(tree.positions, arrays["packed_position_ids"].reshape(-1))
    _, logp = score(model, ids, tree)
    flat = tree.pred[1:] == np.arange(len(ids) - 1)
    expected = arrays["packed_next_logprobs"].reshape(-1)[: len(ids) - 1]
    np.testing.assert_allclose(logp[1:][flat], expected[flat], atol=1e-4)
    batch = arrays["batch_input_ids"]
    hidden = np.zeros((*batch.shape, 1, 2), np.int32)
    positions = np.broadcast_to(np.arange(batch.shape[1], dtype=np.int32), batch.shape)
    out = logits(model.config, model.params, batch, positions, hidden)
    np.testing.assert_allclose(out, arrays["batch_logits"], atol=1e-4)


@pytest.mark.parametrize("name", spread(NAMES, check=1, test=2))
def test_loss_and_gradient_norm_are_those_of_transformers(name):
    model, arrays, info, tags = golden(name)
    case = next(c for c in info["cases"] if c["variant"] == "strict")
    key = case["key"]
    tree = parse(arrays[f"{key}_input_ids"], case["prompt_len"], tags)
    ids = arrays[f"{key}_input_ids"]
    mask = arrays[f"{key}_loss_mask"].astype(bool)
    if len(mask) == len(ids) and mask[0]:
        mask = np.r_[False, mask[:-1]]
    shift = np.arange(-1, len(ids) - 1, dtype=np.int32)  # the golden targets are flat
    row = dict(tokens=ids, positions=tree.positions, hidden=tree.hidden, pred=shift, mask=mask)
    row = {name: value[None] for name, value in row.items()}
    config = dataclasses.replace(model.config, logp_chunk=50)

    def measure(logp, entropy, columns):
        return -jnp.sum(jnp.where(columns["mask"], logp, 0)) / mask.sum(), ({}, {})

    loss = jax.value_and_grad(lambda params: token_loss(config, params, row, measure)[0])
    value, grads = jax.jit(loss)(model.params)
    np.testing.assert_allclose(value, case["loss_float64"], rtol=1e-5)
    norm = np.sqrt(sum(float(jnp.sum(g * g)) for g in jax.tree.leaves(grads)))
    np.testing.assert_allclose(norm, case["grad_norm_float64"], rtol=1e-4)


TINY = dataclasses.replace(PRESETS["tiny"], logp_chunk=7)
ROW = dict(
    tokens=np.random.default_rng(0).integers(0, 39, (2, 24), dtype=np.int32),
    positions=np.tile(np.arange(24, dtype=np.int32), (2, 1)),
    hidden=np.zeros((2, 24, 1, 2), np.int32),
    pred=np.tile(np.arange(-1, 23, dtype=np.int32), (2, 1)),
)


@functools.cache
def params():
    return init_params(TINY, jax.random.key(0))


@pytest.mark.slow
def test_token_logp_is_log_softmax_of_the_predictor():
    row = ROW | {"pred": ROW["pred"].copy()}
    row["pred"][0, 9] = 3
    row["pred"][1, 5] = -1
    logp, entropy = token_logp_entropy(TINY, params(), **row)
    table = jax.nn.log_softmax(
        logits(TINY, params(), row["tokens"], row["positions"], row["hidden"])
    )
    for b in range(2):
        for t in range(24):
            k = row["pred"][b, t]
            expected = table[b, k, row["tokens"][b, t]] if k >= 0 else 0.0
            np.testing.assert_allclose(logp[b, t], expected, atol=1e-5)
            spread = -jnp.sum(jnp.exp(table[b, k]) * table[b, k]) if k >= 0 else 0.0
            np.testing.assert_allclose(entropy[b, t], spread, atol=1e-4)


@pytest.mark.parametrize("remat", spread(REMAT, test=2))
def test_rematerialisation_and_chunks_change_nothing(remat):
    def grads(config):
        return jax.grad(lambda p: jnp.sum(token_logp(config, p, **ROW)))(params())

    changed = dataclasses.replace(TINY, remat=remat, logp_chunk=1000, attention_block=8)
    for a, b in zip(jax.tree.leaves(grads(TINY)), jax.tree.leaves(grads(changed)), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4)


def test_dots_keep_what_attention_needs():
    def loops(remat):
        config = dataclasses.replace(TINY, remat=remat, attention_block=8)
        grad = jax.grad(lambda p: jnp.sum(token_logp(config, p, **ROW)))
        return jax.jit(grad).lower(params()).as_text().count("stablehlo.while")

    assert loops("dots") == loops("none") < loops("full")


def test_dots_keep_two_arrays_of_the_mlp_per_layer():
    wide = dataclasses.replace(TINY, intermediate_size=160)  # a size that nothing else has

    def kept(remat):
        config = dataclasses.replace(wide, remat=remat)
        grad = jax.grad(lambda p: jnp.sum(token_logp(config, p, **ROW)))
        eqns = jax.make_jaxpr(grad)(init_params(wide, jax.random.key(0))).eqns
        layers = next(eqn for eqn in eqns if eqn.primitive.name == "scan")
        return sum(x.aval.shape[-1:] == (160,) for x in layers.outvars)

    assert kept("full") == 0 and kept("dots") == 2 < kept("none")


def test_gradients_of_weights_transpose_no_activations():
    wide = dataclasses.replace(TINY, intermediate_size=192)  # a size that nothing else has
    grad = jax.grad(lambda p: jnp.sum(token_logp(wide, p, **ROW)))
    text = jax.jit(grad).lower(init_params(wide, jax.random.key(0))).compile().as_text()
    tokens = ROW["tokens"].size
    assert f"[{tokens},192]" in text
    assert f"[192,{tokens}]" not in text


@pytest.mark.slow
def test_no_logits_of_a_whole_batch_exist():
    config = dataclasses.replace(
        TINY, vocab_size=5000, padded_vocab_size=5000, logp_chunk=64, attention_block=64
    )
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    row = {k: np.zeros((2, 256, *v.shape[2:]), np.int32) for k, v in ROW.items()}
    losses = (
        lambda p: jnp.sum(token_logp(config, p, **row)),
        lambda p: token_loss(config, p, row, lambda logp, *_: (jnp.sum(logp), ({}, {})))[0],
    )
    for loss in losses:
        text = jax.jit(jax.grad(loss)).lower(shapes).compile().as_text()
        assert "64,5000" in text
        for rows in ("512,5000", "256,5000", "8,64,5000"):
            assert rows not in text


def figures(logp, entropy, columns):
    """A loss that is no linear function of log-probs, with a column that takes part."""
    kept = columns["pred"] >= 0
    loss = jnp.sum(jnp.where(kept, columns["scale"] * jnp.exp(0.1 * logp), 0.0))
    return loss, ({"entropy": entropy.sum(), "kept": kept.sum()}, {"scale": columns["scale"].max()})


def scaled_row():
    scale = np.random.default_rng(1).normal(size=ROW["tokens"].shape).astype(np.float32)
    row = ROW | {"pred": ROW["pred"].copy(), "scale": scale}
    row["pred"][0, 9], row["pred"][1, 5] = 3, -1
    return row


@pytest.mark.slow
def test_token_loss_is_that_of_all_tokens_at_once():
    row = scaled_row()
    layout = {name: row[name] for name in ROW}

    def at_once(p):
        return figures(*token_logp_entropy(TINY, p, **layout), row)

    def by_chunks(p):
        return token_loss(TINY, p, row, figures)

    expected, expected_grads = jax.value_and_grad(at_once, has_aux=True)(params())
    assert row["tokens"].size % TINY.logp_chunk  # the last chunk is filled up
    for found in (by_chunks(params()), jax.value_and_grad(by_chunks, has_aux=True)(params())[0]):
        assert found[1][0]["kept"] == 45  # of 48 two start a row, and one has no predictor
        chex.assert_trees_all_close(found, expected, rtol=1e-5)
    # Twice the loss has twice the gradient.
    grads = jax.grad(lambda p: 2 * by_chunks(p)[0])(params())
    expected_grads = jax.tree.map(lambda g: 2 * g, expected_grads)
    chex.assert_trees_all_close(grads, expected_grads, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_the_head_s_gradient_is_added_up_in_float32():
    config = dataclasses.replace(TINY, vocab_size=64, padded_vocab_size=64, logp_chunk=16)
    keys = jax.random.split(jax.random.key(0), 3)
    weights = jax.random.normal(keys[0], (32, 64)).astype("bfloat16")
    x = jax.random.normal(keys[1], (1, 4096, 32)).astype("bfloat16")
    tokens = jax.random.randint(keys[2], (1, 4096), 0, 64)
    columns = {"tokens": tokens, "pred": jnp.zeros_like(tokens)}

    def gradient(config, weights, x):
        loss = _chunked_loss(config, lambda logp, *_: (-logp.sum(), ({}, {})), None)
        return jax.grad(lambda w: loss(w, x, columns)[0])(weights).astype("float32")

    whole = dataclasses.replace(config, logp_chunk=4096)
    exact = gradient(whole, weights.astype("float32"), x.astype("float32"))
    error = jnp.linalg.norm(gradient(config, weights, x) - exact) / jnp.linalg.norm(exact)
    assert error < 5e-3  # 2e-2 with a sum of 256 chunks in bfloat16


def test_token_loss_multiplies_with_the_vocabulary_three_times():
    """Logits, and the gradients of weights and rows; logits again would be a fourth."""
    config = dataclasses.replace(TINY, vocab_size=5000, padded_vocab_size=5000)
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))

    def products(function):
        lines = jax.jit(function).lower(shapes).as_text().splitlines()
        return sum("dot_general" in line and "x5000x" in line for line in lines)

    def loss(p):
        return token_loss(config, p, scaled_row(), figures)[0]

    assert products(loss) == 1
    assert products(jax.value_and_grad(loss)) == 3
    assert products(jax.value_and_grad(lambda p: jnp.sum(token_logp(config, p, **ROW)))) == 4


def test_padding_rows_are_never_likely():
    out = logits(TINY, params(), ROW["tokens"], ROW["positions"], ROW["hidden"])
    assert out.shape == (2, 24, 39)
    from npr_jax.model import head, unembed

    full = unembed(TINY, head(TINY, params()), jnp.ones((1, TINY.hidden_size)))
    assert full.shape == (1, 128)
    assert np.isneginf(full[0, 39:]).all()


def test_presets_have_the_published_sizes():
    billions = {"qwen3-0.6b": 0.6, "qwen3-1.7b": 1.7, "qwen3-4b": 4.0, "qwen3-8b": 8.2}
    for name, size in (billions | {"qwen3-14b": 14.8, "qwen3-32b": 32.8}).items():
        assert round(num_params(PRESETS[name]) / 1e9, 1) == size
    assert PRESETS["qwen3-4b-instruct-2507"].rope_theta == 5e6
    assert PRESETS["qwen3-4b"].rope_theta == 1e6
    assert num_params(TINY) < 300_000


HF = {
    "model_type": "qwen3",
    "vocab_size": 300,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "attention_bias": False,
    "rms_norm_eps": 1e-5,
    "rope_theta": 12345,
    "tie_word_embeddings": False,
    "max_position_embeddings": 100,
    "eos_token_id": [7, 9],
}


def test_config_from_hugging_face_and_back():
    config = ModelConfig.from_hf(HF)
    assert (config.rope_theta, config.eos_token_ids, config.padded_vocab_size) == (
        12345,
        (7, 9),
        384,
    )
    new_style = {k: v for k, v in HF.items() if k != "rope_theta"}
    new_style["rope_parameters"] = {"rope_type": "default", "rope_theta": 12345}
    assert ModelConfig.from_hf(new_style) == config
    assert ModelConfig.from_hf(config.to_hf()) == config
    for kind in ("llama", "qwen2"):
        other = ModelConfig.from_hf(HF | {"model_type": kind})
        assert (other.qk_norm, other.attention_bias) == (False, kind == "qwen2")
        assert ModelConfig.from_hf(other.to_hf()) == other


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"rope_theta": None}, "0 values of rope_theta"),
        ({"rope_theta": "1e6"}, "rope_theta is '1e6'"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8}}, "rope type is 'llama3'"),
        ({"rope_parameters": {"rope_theta": 1e6}}, "2 values of rope_theta"),
        ({"rope_parameters": {"rope_theta": 12345, "factor": 8}}, r"rope_parameters\.factor is 8"),
        ({"rope_scaling": {"factor": 8}}, r"rope_scaling\.factor is 8"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope type is 'linear'"),
        # The new key does not hide what the old one says, nor the new name of its type the old.
        (
            {"rope_parameters": {"rope_theta": 12345}, "rope_scaling": {"type": "dynamic"}},
            "'dynamic'",
        ),
        ({"rope_scaling": {"rope_type": "default", "type": "mrope"}}, "rope type is 'mrope'"),
        ({"rope_parameters": {"rope_theta": 12345, "partial_rotary_factor": 0.5}}, "partial"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 12345}}}, "full_attention"),
        ({"rope_parameters": {"rope_theta": 12345, "mrope_section": [1, 2]}}, "mrope_section"),
        ({"rope_scaling": [8]}, "rope_scaling is"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"head_dim": None}, "no 'head_dim'"),
        ({"rms_norm_eps": None}, "no 'rms_norm_eps'"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"model_type": "mamba"}, "model_type is 'mamba'"),
        ({"architectures": ["Qwen3ForSequenceClassification"]}, "architectures is"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"use_sliding_window": True, "sliding_window": 8}, "sliding-window"),
        ({"use_sliding_window": True}, "sliding-window"),
        ({"model_type": "llama", "sliding_window": 8}, "sliding-window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "layer_types"),
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"attention_bias": True}, "attention_bias"),
        ({"model_type": "llama", "attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0"),
        ({"logits_scaling": 8.0}, "logits_scaling is 8.0"),
        ({"no_rope_layers": [1, 0]}, "no_rope_layers"),
        ({"model_type": "llama", "qk_norm": True}, "qk_norm is True"),
        ({"num_experts": 8}, "num_experts is 8"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no'"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers is '2'"),
        ({"num_hidden_layers": 2.0}, "num_hidden_layers is 2.0"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"eos_token_id": 300}, "eos_token_id holds 300"),
        ({"eos_token_id": [7, "9"]}, "eos_token_id holds '9'"),
        ({"num_attention_heads": 3}, "multiple of num_kv_heads=2"),
        ({"model_type": "llama", "head_dim": None, "num_attention_heads": 10}, "no multiple of"),
        ({"model_type": ["qwen3"]}, r"model_type is \['qwen3'\]"),
        ({"model_type": {"a": 1}}, "model_type is {'a': 1}"),
        ({"architectures": 3}, "architectures is 3"),
        ({"no_rope_layers": 3}, "no_rope_layers is 3"),
        ({"rms_norm_eps": 1e300}, r"rms_norm_eps is 1e\+300, needed is a number from 1e-30 to 1e"),
        ({"rms_norm_eps": 1e-320}, "rms_norm_eps is 1e-320, needed is a number from 1e-30"),
        ({"num_hidden_layers": 10**7}, "num_hidden_layers is 10000000, needed is 10000 at most"),
        ({"max_position_embeddings": 2**31}, "max_position_embeddings is 2147483648, needed is 21"),
    ],
)
def test_configs_that_are_not_understood_are_refused(change, match):
    with pytest.raises(ValueError, match=match):
        ModelConfig.from_hf(HF | change)


OF_THE_HUB = {  # as they are published, without what is read
    "Qwen/Qwen3-4B": {
        "architectures": ["Qwen3ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 7,
        "hidden_act": "silu", "initializer_range": 0.02, "max_window_layers": 36,
        "rope_scaling": None, "sliding_window": None, "torch_dtype": "bfloat16",
        "transformers_version": "4.51.0", "use_cache": True, "use_sliding_window": False,
    },
    "Qwen/Qwen2.5-Math-1.5B": {
        "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0,
        "max_window_layers": 21, "sliding_window": 4096, "use_mrope": False,
        "use_sliding_window": False, "head_dim": None,
    },
    "TinyLlama/TinyLlama-1.1B": {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "pretraining_tp": 1,
        "hidden_act": "silu", "rope_scaling": None, "head_dim": None,
    },
    "HuggingFaceTB/SmolLM2-135M-Instruct": {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "attention_dropout": 0.0,
        "is_llama_config": True, "mlp_bias": False, "pad_token_id": 2, "pretraining_tp": 1,
        "rope_interleaved": False, "rope_scaling": None, "head_dim": None,
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
    },
    "unsloth/Qwen3-4B": {"unsloth_fixed": True, "_attn_implementation_autoset": True},
    "transformers 5": {
        "rope_theta": None, "layer_types": ["full_attention", "full_attention"], "dtype": "float32",
        "rope_parameters": {"rope_theta": 12345, "rope_type": "default", "factor": 1.0},
    },
}  # fmt: skip


@pytest.mark.parametrize("name", OF_THE_HUB)
def test_published_configs_are_understood(name):
    hf = HF | OF_THE_HUB[name]
    assert ModelConfig.from_hf(hf).rope_theta == 12345
    assert unknown_keys(hf) == []


def test_keys_of_which_nothing_is_known_are_named():
    hf = HF | {"my_trick": 2, "my_other_trick": False, "hidden_dropout": 0.1}
    assert unknown_keys(hf) == ["hidden_dropout", "my_trick"]
