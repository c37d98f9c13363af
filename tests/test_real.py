"""Beside transformers and PEFT: greedy text of SmolLM2-135M-Instruct, and logits with adapters. Run
`make test-real`."""

import dataclasses
import json
import os
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import npr_jax
from npr_jax.model import ModelConfig, init_params, logits
from npr_jax.model.config import LoraConfig
from npr_jax.model.lora import init_adapters, joined
from npr_jax.model.pretrained import Model, load, save

TOKENS = 64
TIE = 1e-3  # logits closer than this may be ordered by the order of float32 sums


@pytest.fixture(scope="module")
def directory() -> Path:
    path = Path(os.environ.get("NPR_SMOLLM2", Path(__file__).parents[1] / "build/smollm2"))
    if not (path / "greedy.json").exists():
        message = f"{path}/greedy.json not found; `make test-real` makes it"
        # Who names the directory wants the test to run.
        (pytest.fail if "NPR_SMOLLM2" in os.environ else pytest.skip)(message)
    return path


def first_difference(ours: list[int], theirs: list[int]) -> int:
    """Index of the first token that differs or that only one has; the length if there is none."""
    same = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
    return min(len(ours), len(theirs)) if same is None else same


@pytest.mark.real
def test_greedy_text_is_that_of_transformers(directory, record_property):
    cases = json.loads((directory / "greedy.json").read_text(encoding="utf-8"))
    model = npr_jax.load(directory)
    engine = npr_jax.Engine(model, npr_jax.EngineConfig(lanes=5, pages=256, page_size=16))
    trajectories = engine.generate(
        [case["prompt_ids"] for case in cases],
        npr_jax.SamplingParams(temperature=0, max_tokens=TOKENS, parallel=False),
    )
    assert len(trajectories) == len(cases) == 10
    ties, wrong = [], []
    for i, (trajectory, case) in enumerate(zip(trajectories, cases, strict=True)):
        ids = [int(token) for token in trajectory.token_ids]
        assert ids[: trajectory.prompt_len] == case["prompt_ids"]
        ours, theirs = ids[trajectory.prompt_len :], case["token_ids"]
        at = first_difference(ours, theirs)
        if at == len(ours) == len(theirs):
            continue
        margin = case["margins"][at] if at < len(case["margins"]) else float("inf")
        found = f"question {i}, token {at}: {ours[at : at + 3]} for {theirs[at : at + 3]}"
        (ties if margin < TIE else wrong).append(f"{found}, margin {margin:.2g}")
    record_property("ties", ties)
    assert not wrong, f"{wrong}; ties: {ties}"


@pytest.mark.real
def test_the_tokenizer_and_chat_template_are_those_of_transformers(directory):
    tokenizer = npr_jax.load(directory).tokenizer
    for case in json.loads((directory / "greedy.json").read_text(encoding="utf-8")):
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": case["problem"]}],
            add_generation_prompt=True,
            return_dict=False,
        )
        assert ids == case["prompt_ids"]


@pytest.fixture
def peft():
    """Runs scripts/peft_logits.py where there is PEFT; returns the logits that it wrote."""
    root = Path(__file__).parents[1]
    python = Path(os.environ.get("NPR_REAL_PYTHON", root / ".venv-real/bin/python"))
    if not python.exists():
        message = f"{python} not found; `make test-real` makes it"
        (pytest.fail if "NPR_REAL_PYTHON" in os.environ else pytest.skip)(message)

    def run(model, adapter, ids, out, *options):
        script = root / "scripts/peft_logits.py"
        out.with_suffix(".json").write_text(json.dumps(np.asarray(ids).tolist()))
        arguments = [model, adapter, out.with_suffix(".json"), out, *options]
        subprocess.run([python, script, *arguments], check=True, timeout=600)
        return np.load(out)

    return run


def small_qwen3(path: Path) -> Path:
    """A Qwen3 of random weights in which no two sizes are equal."""
    config = ModelConfig.from_hf(
        {
            "model_type": "qwen3",
            "vocab_size": 300,
            "hidden_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "head_dim": 20,
            "intermediate_size": 112,
            "rope_theta": 5e6,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": False,
            "attention_bias": False,
            "max_position_embeddings": 512,
            "eos_token_id": 2,
        }
    )
    save(Model(config, init_params(config, jax.random.key(0))), path)
    return path


@pytest.mark.real
@pytest.mark.parametrize("kind", ["qwen3", "smollm2"])
def test_adapters_give_the_logits_of_transformers_with_peft(request, tmp_path, peft, kind):
    """Ours as PEFT reads them, and PEFT's as we read them; unmerged and merged."""
    if kind == "qwen3":
        base = small_qwen3(tmp_path / "base")
    else:
        base = request.getfixturevalue("directory")
    model, rng = load(base), np.random.default_rng(0)
    ids = rng.integers(3, 300, (2, 24))
    places = jnp.broadcast_to(jnp.arange(24), ids.shape), jnp.zeros((2, 24, 1, 2), jnp.int32)

    def assert_same(model, expected):
        for one in (model, model.merged()):
            found = logits(one.config, one.params, jnp.asarray(ids), *places)
            np.testing.assert_allclose(found, expected, atol=1e-4, rtol=1e-4)

    config = dataclasses.replace(model.config, lora=LoraConfig(6, 9.0))
    ours = init_adapters(config, jax.random.key(0))
    ours = jax.tree.map(lambda x: jnp.asarray(0.05 * rng.normal(size=x.shape), "float32"), ours)
    adapted = dataclasses.replace(model, config=config, params=joined(model.params, ours))
    save(adapted, tmp_path / "ours")
    assert_same(adapted, peft(base, tmp_path / "ours/adapter", ids, tmp_path / "ours.npy"))
    expected = peft(base, tmp_path / "theirs", ids, tmp_path / "theirs.npy", "--make")
    theirs = load(tmp_path / "theirs")
    assert theirs.config.lora is not None and theirs.config.lora.rank == 5
    assert_same(theirs, expected)
