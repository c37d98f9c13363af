"""Loading and saving: safetensors both ways, tokenizers, and the rows of the tags."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from conftest import read_golden, shared_path
from safetensors.numpy import load_file, save_file

import npr_jax
from npr_jax.data.prompts import prompt_ids
from npr_jax.model import PRESETS, ModelConfig, init_params
from npr_jax.model.hf import read_params, write
from npr_jax.model.pretrained import Model, save
from npr_jax.model.tokenizer import DEMO_SYMBOLS, add_tags, demo_tokenizer, has_tags, text_ids
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


@pytest.mark.parametrize("dtype", ["int8", "int32", "float16", "x", None])
def test_a_dtype_that_no_weights_have_is_refused(saved, dtype):
    for source in ("tiny", saved[0]):
        with pytest.raises(ValueError, match=rf"dtype is {dtype!r}, needed is 'float32' or 'bfl"):
            npr_jax.load(source, dtype=dtype)


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


@pytest.fixture
def saved(tmp_path):
    """The directory of a model with a tokenizer, and a function that changes one of its files."""
    save(npr_jax.load("tiny", seed=1), tmp_path)

    def change(name, edit):
        path = tmp_path / name
        if name.endswith(".safetensors"):
            tensors = load_file(path)
            edit(tensors)
            save_file(tensors, path)
        else:
            values = json.loads(path.read_text()) if path.exists() else {}
            edit(values)
            path.write_text(json.dumps(values))

    return tmp_path, change


def refused(directory, *words, dtype="float32"):
    with pytest.raises(ValueError) as caught:
        npr_jax.load(directory, dtype=dtype)
    for word in words:
        assert word in str(caught.value)


NORM = "model.layers.1.input_layernorm.weight"


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_that_are_not_finite_are_named_with_their_file(saved, bad, dtype):
    directory, change = saved
    change("model.safetensors", lambda t: t[NORM].put(5, bad))
    refused(directory, "model.safetensors", NORM, "1 values that are not finite", dtype=dtype)


def test_a_weight_too_large_for_the_dtype_is_not_finite(saved):
    directory, change = saved
    change("model.safetensors", lambda t: t.update({NORM: np.full(96, 1e300)}))
    refused(directory, NORM, "96 values that are not finite in float32")


def rewrite_header(path, name, dtype):
    """Gives a tensor another dtype of the same size per value, and leaves its bytes."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header[name]["dtype"] = dtype
    new = json.dumps(header).encode()
    path.write_bytes(len(new).to_bytes(8, "little") + new + data[8 + size :])


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL"])
def test_tensors_of_dtypes_that_cannot_be_weights_are_named(saved, dtype):
    directory, change = saved
    change("model.safetensors", lambda t: t.update({NORM: np.zeros(96, np.uint8)}))
    rewrite_header(directory / "model.safetensors", NORM, dtype)
    refused(directory, "model.safetensors", NORM, f"dtype {dtype}", "F32, F16, BF16")


def test_a_file_that_is_not_whole_is_named(saved):
    directory, _ = saved
    path = directory / "model.safetensors"
    data = path.read_bytes()
    for cut in (data[:-1], data[:1000], data[:4], b""):
        path.write_bytes(cut)
        refused(directory, str(path), "no whole safetensors file")
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    refused(directory, str(path), "git-lfs")
    for name in ("config.json", "generation_config.json"):
        text = (directory / name).read_text()
        twins = text.replace("{", '{"a": 1, "a": 2,', 1)
        for broken in (text[:-3], "[]", "\xff", '{"temperature": NaN}', "[" * 10**5, twins):
            (directory / name).write_bytes(broken.encode("latin-1"))
            refused(directory, str(directory / name))
        (directory / name).write_text(text)
    (directory / "tokenizer.json").write_text("{")
    refused(directory, "the tokenizer in", str(directory))


def test_shards_that_are_missing_or_hold_a_tensor_twice_are_named(tmp_path):
    config = CONFIGS["untied"]
    write(tmp_path, config, init_params(config, jax.random.key(1)), shard_bytes=100_000)
    first, second, *_ = sorted(tmp_path.glob("model-*.safetensors"))
    tensors, other = load_file(first), load_file(second)
    name = next(iter(tensors))
    save_file(other | {name: tensors[name]}, second)
    refused(tmp_path, f"{name} is in {first.name} and in {second.name}")
    second.unlink()
    refused(tmp_path, "model.safetensors.index.json", "missing", second.name)
    save_file(other, second)
    npr_jax.load(tmp_path)
    save_file(tensors, tmp_path / "model.safetensors")
    refused(tmp_path, "model.safetensors, and model.safetensors.index.json")
    (tmp_path / "model.safetensors").unlink()
    for weight_map in (None, {name: "../x.safetensors"}, {name: 1}, []):
        index = json.dumps({"weight_map": weight_map})
        (tmp_path / "model.safetensors.index.json").write_text(index)
        refused(tmp_path, "has no weight_map")


def test_a_missing_tensor_is_named_though_one_of_a_longer_name_is_unexpected(saved):
    directory, change = saved
    change("model.safetensors", lambda t: t.update({"base." + NORM: t.pop(NORM)}))
    refused(directory, f"unexpected base.{NORM}", f"missing {NORM}", "2 tensors")


@pytest.mark.parametrize("eos", [None, []])
def test_the_end_of_text_of_the_tokenizer_holds_where_no_file_names_one(saved, eos):
    directory, change = saved
    (directory / "generation_config.json").unlink()
    change("config.json", lambda c: c.update(eos_token_id=eos))
    model = npr_jax.load(directory)
    assert model.config.eos_token_ids == (model.tokenizer.eos_token_id,)
    save(model, directory / "again")
    for name in ("config.json", "generation_config.json"):
        assert json.loads((directory / "again" / name).read_text())["eos_token_id"] == 2
    change("tokenizer_config.json", lambda c: c.pop("eos_token"))
    refused(directory, "config.json has no eos_token_id", "tokenizer is None")


def test_end_of_text_ids_outside_the_vocabulary_are_refused(saved):
    directory, change = saved
    change("generation_config.json", lambda c: c.update(eos_token_id=[2, 39]))
    refused(directory, "generation_config.json", "eos_token_id holds 39", "from 0 to 38")


def test_an_export_says_of_tokens_and_sampling_what_its_source_said(saved):
    directory, change = saved
    sampling = {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "do_sample": True}
    ids = {"bos_token_id": 1, "pad_token_id": 0}
    change("generation_config.json", lambda c: c.update(sampling | ids, eos_token_id=[2, 0]))
    change("config.json", lambda c: c.update(ids, use_cache=True, torch_dtype="bfloat16"))
    source = npr_jax.load(directory)
    source.tokenizer.chat_template = "{{ messages[0]['content'] }}:"
    assert source.config.eos_token_ids == (2, 0)
    save(dataclasses.replace(source, params=source.params), directory / "again")
    again = npr_jax.load(directory / "again")
    assert again.config == source.config
    assert again.tokenizer.chat_template == source.tokenizer.chat_template
    generation = json.loads((directory / "again/generation_config.json").read_text())
    assert generation == sampling | ids | {"eos_token_id": [2, 0]}
    config = json.loads((directory / "again/config.json").read_text())
    assert config["eos_token_id"] == 2 and config["use_cache"] and config["dtype"] == "float32"
    assert config.items() >= ids.items() and "torch_dtype" not in config
    # What was changed on purpose is said in both.
    changed = dataclasses.replace(source.config, eos_token_ids=(0,))
    save(dataclasses.replace(source, config=changed), directory / "changed")
    for name in ("config.json", "generation_config.json"):
        assert json.loads((directory / "changed" / name).read_text())["eos_token_id"] == 0


def test_keys_that_are_not_known_are_told(saved, caplog):
    directory, change = saved
    change("config.json", lambda c: c.update(my_trick=2))
    npr_jax.load(directory)
    assert "not known and not used: my_trick" in caplog.text


def small_tokenizer(*tags, begin=False, unknown=None):
    """Letters, and some of the tags; `begin` and end of text around every text, if wanted."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<s>", "</s>", *([unknown] if unknown else []), *tags]
    words += list("/abcdefghijklmnopqrstuvwxyz")
    vocab = {word: i for i, word in enumerate(words)}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token=unknown))
    core.add_special_tokens(["<s>", "</s>", *tags])
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    if begin:
        core.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token=unknown
    )


def test_rows_that_a_checkpoint_has_trained_stay():
    tokenizer = small_tokenizer("<plan>", "</plan>")
    size = len(tokenizer)
    for tied in (True, False):
        tokenizer = small_tokenizer("<plan>", "</plan>")
        config = dataclasses.replace(
            PRESETS["tiny"], vocab_size=size, tie_word_embeddings=tied, num_layers=1
        )
        params = jax.tree.map(np.asarray, init_params(config, jax.random.key(0)))
        model = Model(config, params, tokenizer).with_tags()
        assert model.config.vocab_size == size + 6
        for old, new in ((params["embed"], model.params["embed"]),) + (
            () if tied else ((params["unembed"].T, model.params["unembed"].T),)
        ):
            np.testing.assert_array_equal(new[:size], old[:size])
            ids = tokenizer.encode("guideline")
            row = new[model.tags.guideline_open]
            np.testing.assert_allclose(row, old[ids].mean(0), atol=1e-6)


def test_a_tag_that_only_the_tokenizer_has_or_that_is_unknown_to_it_is_missing():
    full = small_tokenizer(*TAG_NAMES)
    assert has_tags(full) and has_tags(full, len(full)) and not has_tags(full, 9)
    assert not has_tags(small_tokenizer(unknown="<unk>"))
    # The checkpoint ends before the tags, of which only the tokenizer knows.
    tokenizer = small_tokenizer()
    size = len(tokenizer)
    tokenizer.add_tokens(["<other>", *TAG_NAMES], special_tokens=True)
    config = dataclasses.replace(PRESETS["tiny"], vocab_size=size, num_layers=1)
    params = init_params(config, jax.random.key(0))
    model = Model(config, params, tokenizer).with_tags()
    assert model.tags.guideline_open == size + 1 < model.config.vocab_size == size + 9
    embed = np.asarray(model.params["embed"])
    np.testing.assert_allclose(embed[size], embed[:size].mean(0), atol=1e-6)
    np.testing.assert_array_equal(embed[:size], params["embed"][:size])
    plan = embed[tokenizer.encode("plan", add_special_tokens=False)].mean(0)
    np.testing.assert_allclose(embed[model.tags.plan_open], plan, atol=1e-6)


def test_text_begins_once_and_does_not_end():
    plain, begun = small_tokenizer(), small_tokenizer(begin=True)
    assert begun.encode("ab") == [0, *plain.encode("ab"), 1]
    for text in ("ab", "<s>ab"):
        assert text_ids(begun, text) == [0, *plain.encode("ab")]
        assert prompt_ids(begun, text) == [0, *plain.encode("ab")]
    assert text_ids(plain, "ab") == plain.encode("ab")
    begun.chat_template = "{{ bos_token }}{{ messages[0]['content'] }}"
    assert prompt_ids(begun, "ab", "c") == [0, *plain.encode("abc")]


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


@pytest.mark.parametrize(
    "template",
    ["{% for %}", "{{ raise_exception('no') }}", "{{ messages[5].content }}", "{{ 1/0 }}"],
)
def test_a_chat_template_that_breaks_is_told(template):
    tokenizer = demo_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match="chat template cannot be used with a user's turn: "):
        prompt_ids(tokenizer, "1+1")


def test_a_text_or_a_tokenizer_that_cannot_be_encoded_is_named(saved, tmp_path):
    engine = npr_jax.Engine(npr_jax.load("tiny"))
    with pytest.raises(ValueError, match=r"prompt 0: the tokenizer cannot encode '.ud800A'"):
        engine.generate(["\ud800A"])
    directory, change = saved
    words = {"type": "WordLevel", "vocab": {"a": 0, "<eos>": 1}, "unk_token": "<none>"}
    change("tokenizer.json", lambda values: values.update(model=words, added_tokens=[]))
    (directory / "tokenizer_config.json").write_text('{"tokenizer_class": "TokenizersBackend"}')
    refused(directory, str(directory), "the tokenizer cannot encode '<guideline>'")
