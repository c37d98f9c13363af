"""YaRN: against transformers (golden values), in and out of config.json, in engine and scoring."""

import dataclasses
import functools
import json

import bigram
import engine_checks
import jax
import numpy as np
import pytest
import transformers
from conftest import read_golden, shared_path

import npr_jax
from npr_jax.decode import Engine, SamplingParams, fork_join
from npr_jax.model import PRESETS, ModelConfig, Yarn, init_params, logits, token_logp
from npr_jax.model.pretrained import Model, save

GOLDEN = read_golden("yarn")
CASES = range(len(GOLDEN["cases"]))
CARD = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


@functools.cache
def golden_model():
    return npr_jax.load(shared_path(f"golden/{GOLDEN['model']}"))


def golden_hf(case) -> dict:
    hf = json.loads((shared_path(f"golden/{GOLDEN['model']}") / "config.json").read_text())
    if "rope_parameters" in case["config"]:
        del hf["rope_theta"], hf["rope_scaling"]
    return hf | {"max_position_embeddings": 64} | case["config"]


@pytest.mark.parametrize("number", CASES)
def test_angles_are_those_of_transformers(number):
    case = GOLDEN["cases"][number]
    config = ModelConfig.from_hf(golden_hf(case))
    assert config.yarn.scale == pytest.approx(case["scale"], rel=1e-12)
    ours = config.yarn.frequencies(config.rope_theta, config.head_dim)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, case["frequencies"], rtol=1.2e-7)  # the last bit of a few
    assert np.mean(ours == np.float32(case["frequencies"])) > 0.98


@pytest.mark.parametrize("number", [n for n in CASES if "logits" in GOLDEN["cases"][n]])
def test_logits_are_those_of_transformers_before_and_beyond_the_original_length(number):
    case = GOLDEN["cases"][number]
    config = ModelConfig.from_hf(golden_hf(case))
    positions, rows = np.int32(case["positions"]), case["rows"]
    length = config.yarn.original_max_position_embeddings
    assert positions[rows].min() < length < positions[rows].max()
    assert positions.max() == config.max_position_embeddings - 1

    def compute(config):
        tokens = np.int32(case["token_ids"])[None]
        hidden = np.zeros((*tokens.shape, 1, 2), np.int32)
        args = (golden_model().params, tokens, positions[None], hidden)
        return np.asarray(jax.jit(logits, static_argnums=0)(config, *args))[0, rows]

    np.testing.assert_allclose(compute(config), case["logits"], atol=1e-4)
    plain = compute(dataclasses.replace(config, yarn=None))
    assert np.abs(plain - case["logits"]).max(axis=1).min() > 0.1  # each row would show it


HF = golden_hf({"config": {"rope_theta": 1e6, "max_position_embeddings": 40960}})
NEW = {"rope_theta": None, "rope_scaling": None}


@pytest.mark.parametrize(
    "hf",
    [
        {"rope_scaling": CARD},
        {"rope_scaling": {"type": "yarn"} | {k: v for k, v in CARD.items() if k != "rope_type"}},
        {"rope_scaling": CARD | {"type": "yarn", "beta_fast": None, "attention_factor": None}},
        {"rope_scaling": CARD | {"factor": 4, "rope_theta": 1e6}, "rope_theta": None},
        NEW | {"rope_parameters": CARD | {"rope_theta": 1e6, "partial_rotary_factor": 1.0}},
        {"rope_parameters": CARD, "rope_scaling": CARD | {"beta_slow": 1}},
        # A card's line in a file of transformers 5, of which it makes yarn too.
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "rope_scaling": CARD},
        {"rope_scaling": CARD, "max_position_embeddings": 32768},
        {"rope_scaling": CARD, "max_position_embeddings": 131072},
        {"rope_scaling": CARD, "original_max_position_embeddings": 32768},
    ],
)
def test_files_of_all_kinds_say_the_same(hf):
    config = ModelConfig.from_hf(HF | hf)
    assert config.yarn == Yarn(factor=4, original_max_position_embeddings=32768)
    assert (config.rope_theta, config.max_position_embeddings) == (1e6, 131072)


@pytest.mark.parametrize(
    "yarn",
    [
        Yarn(4, 32768),
        Yarn(1.3, 101, attention_factor=1.5, beta_fast=8, beta_slow=2, truncate=False),
        Yarn(2, 64, mscale=1.5, mscale_all_dim=0.5),
    ],
)
def test_what_is_exported_is_read_again_here_and_by_transformers(tmp_path, yarn):
    config = dataclasses.replace(
        PRESETS["tiny"], yarn=yarn, max_position_embeddings=yarn.max_position_embeddings
    )
    assert ModelConfig.from_hf(config.to_hf()).yarn == yarn
    start, again = tmp_path / "start", tmp_path / "again"
    save(Model(config, init_params(config, jax.random.key(0))), start)
    # What a source says in other ways is not left beside it.
    hf = json.loads((start / "config.json").read_text()) | {"rope_parameters": None}
    hf |= {"original_max_position_embeddings": yarn.original_max_position_embeddings}
    (start / "config.json").write_text(json.dumps(hf | {"max_position_embeddings": 7}))
    model = npr_jax.load(start)
    assert model.config.yarn == yarn
    save(dataclasses.replace(model, config=config), again)
    assert npr_jax.load(again).config.yarn == yarn
    said = json.loads((again / "config.json").read_text())
    assert said["max_position_embeddings"] == yarn.max_position_embeddings
    assert "original_max_position_embeddings" not in said
    for keys in ({}, {"rope_scaling": None}, {"rope_parameters": None}):
        (again / "config.json").write_text(json.dumps(said | keys))
        theirs = transformers.AutoConfig.from_pretrained(again)
        assert theirs.rope_parameters == yarn.to_hf() | {"rope_theta": config.rope_theta}
    plain = dataclasses.replace(config, yarn=None, max_position_embeddings=7)
    save(dataclasses.replace(model, config=plain), again)
    said = json.loads((again / "config.json").read_text())
    assert said["rope_parameters"] == {"rope_type": "default", "rope_theta": config.rope_theta}
    assert "rope_scaling" not in said


LACKING = {"rope_type": "yarn", "factor": 4.0}


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"rope_scaling": LACKING}, "rope_scaling has no 'original_max_position_embeddings', need"),
        ({"rope_scaling": CARD | {"factor": None}}, "rope_scaling has no 'factor'"),
        ({"rope_scaling": CARD | {"factor": 0.5}}, r"rope_scaling\.factor is 0\.5, needed is a f"),
        (NEW | {"rope_parameters": CARD | {"factor": "4"}}, r"rope_parameters\.factor is '4', nee"),
        ({"rope_scaling": CARD | {"factor": 1e6}}, r"factor is 1000000\.0, .* below 2\*\*31: with"),
        (
            {"rope_scaling": CARD | {"original_max_position_embeddings": 64.5}},
            r"rope_scaling\.original_max_position_embeddings is 64\.5, needed is an integer, 1 or",
        ),
        ({"rope_scaling": CARD | {"beta_fast": 0}}, r"beta_fast is 0, needed is .* above 0"),
        ({"rope_scaling": CARD | {"beta_slow": 40}}, r"beta_fast is 32\.0, .* beta_slow=40\.0"),
        ({"rope_scaling": CARD | {"attention_factor": -1}}, "attention_factor is -1, needed is"),
        ({"rope_scaling": CARD | {"mscale": True}}, "mscale is True, needed is"),
        # None is false in transformers, and not the default.
        ({"rope_scaling": CARD | {"truncate": None}}, "truncate is None, needed is true or false"),
        ({"rope_scaling": CARD | {"finetuned": True}}, r"rope_scaling\.finetuned is True, supp"),
        ({"rope_scaling": CARD | {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
        ({"rope_scaling": CARD | {"type": "default"}}, "rope_type='yarn', type='default': remove"),
        ({"rope_scaling": CARD | {"rope_type": "llama3"}}, "rope type is 'llama3' .*'yarn'"),
        ({"rope_scaling": CARD | {"rope_type": ["yarn"]}}, r"rope type is \['yarn'\]"),
        ({"rope_scaling": CARD | {"rope_theta": 1e4}}, "2 values of rope_theta"),
        ({"rope_theta": 1.0, "rope_scaling": CARD}, "rope_theta is 1.0, needed is above 1 with"),
        (
            {"rope_parameters": CARD, "rope_scaling": CARD | {"factor": 2.0}},
            "rope_parameters is .*4.0.*, but rope_scaling is .*2.0.*: remove one",
        ),
        # Here transformers would take the plain one.
        ({"rope_parameters": CARD, "rope_scaling": {"rope_type": "default"}}, "remove one"),
        (
            {"rope_scaling": CARD, "max_position_embeddings": 262144},
            "is 262144, needed is 131072 at most: with yarn it is factor=4 times original.*=32768",
        ),
        (
            {"rope_scaling": CARD, "original_max_position_embeddings": 4096},
            "original_max_position_embeddings is 4096, but rope_scaling is .*: remove one",
        ),
    ],
)
def test_what_is_no_yarn_is_refused(change, match):
    with pytest.raises(ValueError, match=match):
        ModelConfig.from_hf(HF | change)


def test_positions_that_yarn_does_not_make_are_refused():
    with pytest.raises(ValueError, match="max_position_embeddings is 40960, needed is 131072: wi"):
        dataclasses.replace(PRESETS["qwen3-4b"], yarn=Yarn(4, 32768))


def scored_logp(model, answer):
    """Log-probs of one forward pass over the tree of an answer, padded to one length."""
    count, size, tree = len(answer.token_ids), 512, answer.layout
    hidden = np.zeros((1, size, 6, 2), np.int32)
    hidden[0, :count, : tree.hidden.shape[1]] = tree.hidden
    tokens, positions, pred = np.zeros((3, 1, size), np.int32)
    pred -= 1
    for array, values in ((tokens, answer.token_ids), (positions, tree.positions)):
        array[0, :count] = values
    pred[0, :count] = tree.pred
    score = jax.jit(token_logp, static_argnums=0)
    return np.asarray(score(model.config, model.params, tokens, positions, hidden, pred))[0, :count]


@pytest.mark.slow
def test_the_engine_computes_what_scoring_does_beyond_the_original_length(monkeypatch):
    monkeypatch.setattr(fork_join, "check_block", bigram.check_block_without_numbers)
    plain, yarn = bigram.model(eos=0.0, illegal=0.0), Yarn(4, 24, attention_factor=1.2)
    config = dataclasses.replace(
        plain.config, yarn=yarn, max_position_embeddings=yarn.max_position_embeddings
    )
    model = dataclasses.replace(plain, config=config)
    engine = Engine(model, engine_checks.CONFIG)
    prompts = [[12, 13, 20] * 10, [22]]
    sampling = SamplingParams(n=3, max_tokens=200, seed=(1, 2))
    (line,) = engine.generate(prompts[1:], SamplingParams(max_tokens=200, parallel=False))
    answers = [line, *engine.generate(prompts, sampling)]
    of_yarn, of_plain = [], []
    for answer in answers:
        drawn = ~answer.forced
        drawn[: answer.prompt_len] = False
        far = drawn & (answer.layout.positions >= 24)
        of_yarn += np.abs(scored_logp(model, answer) - answer.logp)[drawn].tolist()
        of_plain += np.abs(scored_logp(plain, answer) - answer.logp)[far].tolist()
    assert max(of_yarn) < 1e-4
    assert len(of_plain) > 100 and np.median(of_plain) > 1e-3
    assert sum(answer.layout.num_branches for answer in answers) > 10
    # The extended positions are the limit.
    assert (line.finish_reason, line.layout.positions.max()) == ("length", 95)
    with pytest.raises(ValueError, match="prompt 0 has 96 tokens, but max_position is 96"):
        engine.generate([[12] * 96])
