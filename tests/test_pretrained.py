"""Loading and saving: safetensors both ways, tokenizers, and the rows of the tags."""

import dataclasses

import jax
import numpy as np
import pytest
from conftest import read_golden, shared_path
from safetensors.numpy import load_file, save_file

import npr_jax
from npr_jax.model import PRESETS, ModelConfig, init_params
from npr_jax.model.hf import read_params, write
from npr_jax.model.pretrained import Model, save
from npr_jax.model.tokenizer import DEMO_SYMBOLS, add_tags, demo_tokenizer
from npr_jax.tree import TAG_NAMES

CONFIGS = {
    "tied": dataclasses.replace(PRESETS["tiny"], head_dim=16, rope_theta=5e6),
    "untied": dataclasses.replace(PRESETS["tiny"], tie_word_embeddings=False, num_kv_heads=4),
    "llama": dataclasses.replace(PRESETS["tiny"], model_type="llama", qk_norm=False),
    "qwen2": dataclasses.replace(
        PRESETS["tiny"], model_type="qwen2", qk_norm=False, attention_bias=True
    ),
}


def equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("kind", CONFIGS)
def test_what_is_saved_is_loaded_and_transformers_reads_the_config(tmp_path, kind):
    import transformers

    config = CONFIGS[kind]
    params = init_params(config, jax.random.key(1))
    params = jax.tree.map(lambda x: x + 0.01, params)  # biases and norms off their defaults
    params["embed"] = params["embed"].at[config.vocab_size :].set(0)
    if "unembed" in params:
        params["unembed"] = params["unembed"].at[:, config.vocab_size :].set(0)
    save(Model(config, params), tmp_path)
    again = npr_jax.load(tmp_path)
    equal(again.params, params)
    kept = ("head_dim", "rope_theta", "tie_word_embeddings", "eos_token_ids", "qk_norm")
    for name in kept:
        assert getattr(again.config, name) == getattr(config, name)
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert theirs.rope_parameters["rope_theta"] == config.rope_theta
    assert theirs.head_dim == config.head_dim
    assert theirs.vocab_size == config.vocab_size
    shape = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"].shape
    assert shape == (config.vocab_size, config.hidden_size)


def test_sharded_checkpoints(tmp_path):
    config = CONFIGS["untied"]
    params = init_params(config, jax.random.key(1), "bfloat16")
    write(tmp_path, config, params, shard_bytes=100_000)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    assert not (tmp_path / "model.safetensors").exists()
    again = npr_jax.load(tmp_path, dtype="bfloat16")
    equal(again.params["layers"], params["layers"])
    assert again.params["embed"].dtype == "bfloat16"


def test_tensors_that_do_not_fit_are_named(tmp_path):
    config = CONFIGS["tied"]
    save(Model(config, init_params(config, jax.random.key(1))), tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.mlp.extra.weight"] = np.zeros(3, np.float32)
    tensors["model.norm.weight"] = np.zeros(5, np.float32)
    del tensors["model.layers.2.self_attn.k_proj.weight"]
    save_file(tensors, path)
    with pytest.raises(ValueError) as caught:
        read_params(tmp_path, config)
    message = str(caught.value)
    assert "3 tensors" in message
    assert "unexpected model.layers.0.mlp.extra.weight" in message
    assert "model.norm.weight has shape (5,), needed is (96,)" in message
    assert "missing model.layers.2.self_attn.k_proj.weight" in message


def test_a_tied_head_may_be_repeated_but_not_differ(tmp_path):
    config = CONFIGS["tied"]
    save(Model(config, init_params(config, jax.random.key(1))), tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}, path)
    npr_jax.load(tmp_path)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, path)
    with pytest.raises(ValueError, match="differs from the embedding"):
        npr_jax.load(tmp_path)


def test_what_is_not_there_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FileNotFoundError, match=r"no directory, none of the presets .*tiny"):
        npr_jax.load("nobody/nothing")
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        npr_jax.load(tmp_path)


def test_the_demo_alphabet(tmp_path):
    tokenizer = demo_tokenizer()
    assert len(tokenizer) == PRESETS["tiny"].vocab_size <= 64
    assert tokenizer.eos_token_id == PRESETS["tiny"].eos_token_ids[0]
    text = "A:7+4;B:6*2?" + "".join(TAG_NAMES) + "".join(DEMO_SYMBOLS) + "<eos>"
    ids = tokenizer.encode(text)
    assert len(ids) == 12 + 8 + len(DEMO_SYMBOLS) + 1
    assert tokenizer.decode(ids) == text
    model = npr_jax.load("tiny", seed=3)
    save(model, tmp_path)
    again = npr_jax.load(tmp_path)
    assert again.tokenizer.encode(text) == ids
    assert again.tags == model.tags
    assert again.tags.decode(ids) == text
    assert len(model.tags.step_headers[11]) == 6


@pytest.fixture(scope="module")
def qwen():
    import transformers

    cases = read_golden("tokenizer_cases")
    return transformers.AutoTokenizer.from_pretrained(shared_path("qwen3_tokenizer")), cases


def test_qwen3_tags_and_their_rows(qwen):
    tokenizer, cases = qwen
    config = dataclasses.replace(
        PRESETS["qwen3-0.6b"],
        hidden_size=8,
        head_dim=2,
        num_layers=1,
        intermediate_size=8,
        tie_word_embeddings=False,
    )
    params = init_params(config, jax.random.key(0))
    new, grown = add_tags(config, params, tokenizer)
    assert new == config  # 151936 rows hold the tags: nothing shrinks, nothing grows
    for tag, init in cases["npr_tag_init"].items():
        assert tokenizer.convert_tokens_to_ids(tag) == init["id"]
        for old, rows in (
            (params["embed"], grown["embed"]),
            (params["unembed"].T, grown["unembed"].T),
        ):
            mean = np.asarray(old)[init["base_ids"]].mean(0)
            np.testing.assert_allclose(rows[init["id"]], mean, atol=1e-6)
    same = np.setdiff1d(np.arange(151936), [i["id"] for i in cases["npr_tag_init"].values()])
    np.testing.assert_array_equal(grown["embed"][same], params["embed"][same])
    for case in cases["special"]:
        ids = tokenizer.encode(case["text"], add_special_tokens=False)
        assert ids == case["ids_with_npr_tags"]
    for case in cases["plain"][:200]:
        assert tokenizer.encode(case["text"], add_special_tokens=False) == case["ids"]
    assert add_tags(new, grown, tokenizer) == (new, grown)


def test_rows_are_added_where_they_are_missing(qwen):
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(shared_path("qwen3_tokenizer"))
    hf = dict(
        model_type="qwen3", vocab_size=len(tokenizer), hidden_size=8, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=4, intermediate_size=8,
        attention_bias=False, rms_norm_eps=1e-6, rope_theta=1e6, max_position_embeddings=64,
        tie_word_embeddings=True,
    )  # fmt: skip
    config = ModelConfig.from_hf(hf)
    model = Model(config, init_params(config, jax.random.key(0)), tokenizer).with_tags()
    assert model.config.vocab_size == config.vocab_size + 8
    assert model.params["embed"].shape[0] % 128 == 0
    assert model.with_tags() is model
    with pytest.raises(ValueError, match="no tokenizer"):
        Model(config, model.params).with_tags()
