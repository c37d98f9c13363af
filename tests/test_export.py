"""Exports: any checkpoint of a run as a model directory, and never of another model."""

import functools
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_checks import OPTIMIZER, TEXT, content, flip, same

from npr_jax.model.pretrained import load, publish_model, save
from npr_jax.runs.checkpoint import Checkpoints
from npr_jax.runs.directory import claim, claim_inputs
from npr_jax.train.export import export
from npr_jax.train.inputs import model_content
from npr_jax.train.optimizer import new_state


def test_a_checkpoint_is_exported_as_a_model(tmp_path, monkeypatch):
    """Of a run of one loop, and of Beta, whose checkpoints are those of `fit`; paths are relative
    as a user writes them."""
    monkeypatch.chdir(tmp_path)
    started = load("tiny", seed=0, tags=True)
    for name, text, inside in (("zero", "", "."), ("beta", "fit: {}\n", "fit")):
        run = claim(Path(name), f"model: tiny\nseed: 0\n{text}")
        states = {}
        with Checkpoints(run / inside / "checkpoints", TEXT, keep=3) as checkpoints:
            for step in (2, 4):
                params = jax.tree.map(functools.partial(jnp.add, step), started.params)
                state = new_state(params, OPTIMIZER)
                states[step] = jax.tree.map(np.array, state.params)
                checkpoints.save(step, state, {})
        before = content(run)
        assert export(run, Path(f"{name}-last")) == 4
        assert export(run, tmp_path / f"{name}-2", 2) == 2
        assert content(run) == before
        for step, output in ((4, "last"), (2, "2")):
            found = load(tmp_path / f"{name}-{output}")
            used = slice(len(found.tokenizer))  # the rest of the table is padding
            assert np.array_equal(found.params["embed"][used], states[step]["embed"][used])
            assert same(found.params["layers"], states[step]["layers"])
            assert found.tags == started.tags
    with pytest.raises(ValueError, match=r"no checkpoint of step 3, there are 2, 4"):
        export(run, tmp_path / "x", 3)
    with pytest.raises(ValueError, match=r"beta-2 is there already"):
        export(run, tmp_path / "beta-2", 2)
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(ValueError, match=r"link is there already"):
        export(run, tmp_path / "link", 2)
    with pytest.raises(ValueError, match=r"no config\.yaml"):
        export(tmp_path, tmp_path / "x")
    with pytest.raises(ValueError, match=r"has no checkpoint: there is none in"):
        export(claim(tmp_path / "empty", "model: tiny\nseed: 0\n"), tmp_path / "x")
    flip(run / "fit" / "checkpoints" / "2")
    with pytest.raises(ValueError, match=r"2 is damaged .*take another step"):
        export(run, tmp_path / "x", 2)
    (run / "config.yaml").write_text("model: no/such\nseed: 0\nfit: {}\n")
    with pytest.raises(FileNotFoundError, match="--model DIR"):
        export(run, tmp_path / "x")
    assert export(run, tmp_path / "x", start="tiny") == 4


@pytest.fixture
def unfinished(tmp_path):
    """A run that has no `final` yet, of a model with files that say more than we do."""
    source, run = tmp_path / "model", tmp_path / "run"
    save(load("tiny", tags=True), source)
    for name, more in (
        ("config.json", {"bos_token_id": 1, "pad_token_id": 0}),
        ("generation_config.json", {"temperature": 0.6, "top_k": 20}),
    ):
        change(source / name, more)
    started = load(source, tags=True)
    claim(run, f"model: {source}\nseed: 0\n")
    claim_inputs(run, {"model": model_content(str(source), started)})
    with Checkpoints(run / "checkpoints", TEXT, keep=1) as checkpoints:
        checkpoints.save(2, new_state(started.params, OPTIMIZER), {})
    return run


def change(path, values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_an_export_keeps_what_its_source_says_as_final_does(unfinished, tmp_path):
    export(unfinished, tmp_path / "out")
    publish_model(load(tmp_path / "model", tags=True), unfinished / "final")
    export(unfinished, tmp_path / "out-2")
    assert content(tmp_path / "out").keys() > {tmp_path / "out" / "config.json"}
    for name, data in content(unfinished / "final").items():
        for output in ("out", "out-2"):
            assert (tmp_path / output / name.name).read_bytes() == data, name


@pytest.mark.parametrize("output", ["final", "fit/x", "../run/x"])
def test_an_export_into_its_run_is_refused(unfinished, output):
    with pytest.raises(ValueError, match=r"(x|final) is in .*run, .*outside of it"):
        export(unfinished, unfinished / output)
    assert not (unfinished / output).exists()


def test_the_model_of_an_export_is_the_one_that_the_run_began_with(unfinished, tmp_path):
    same, other = tmp_path / "same", tmp_path / "other"
    shutil.copytree(tmp_path / "model", same)
    save(load("tiny", seed=1, tags=True), other)
    with pytest.raises(ValueError, match=r"other is not the model that .*: its content is weights"):
        export(unfinished, tmp_path / "x", start=str(other))
    assert export(unfinished, tmp_path / "out", start=str(same)) == 2
    yarn = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 2048}
    change(other / "config.json", {"rope_scaling": yarn})
    shutil.copy(same / "model.safetensors", other)
    with pytest.raises(
        ValueError, match=r'its content is weights \w+ {.*"yarn".*, needed is weigh'
    ):
        export(unfinished, tmp_path / "x", start=str(other))
    publish_model(load(same, tags=True), unfinished / "final")
    assert export(unfinished, tmp_path / "out-2", start=str(same)) == 2
    tokenizer = json.loads((same / "tokenizer.json").read_text())["model"]
    vocab = tokenizer["vocab"]
    vocab["0"], vocab["1"] = vocab["1"], vocab["0"]
    for name, values, message in (
        ("config.json", {"rope_theta": 5e5, "rope_parameters": None}, "rope_theta is 500000.0, ne"),
        ("tokenizer.json", {"model": tokenizer | {"vocab": vocab}}, "tokenizer is another, needed"),
    ):
        shutil.copytree(tmp_path / "model", tmp_path / name)
        change(tmp_path / name / name, values)
        with pytest.raises(ValueError, match=f"is not the model that .*: its {message}"):
            export(unfinished, tmp_path / "x", start=str(tmp_path / name))
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "text, message",
    [
        ("model: tiny\n", "seed is None, needed is an integer"),
        ("model: null\nseed: 0\n", "model is None, needed is a text"),
        ("model: tiny\nseed: 0\nfit: null\n", "fit is None, needed are keys"),
        ("model: tiny\nseed: 0\ncheckpoints: 5\n", "checkpoints is 5, needed is a text or null"),
        ("model: tiny\nseed: 0\nfit: {checkpoints: []}\n", r"checkpoints is \[\], needed is a"),
    ],
)
def test_a_config_that_cannot_be_exported_is_named(tmp_path, text, message):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match=rf"config\.yaml is no config of zero, .*: {message}"):
        export(tmp_path, tmp_path.with_name("x"))
