"""Run directories: whose they are, what may change when a run goes on, what is refused."""

import copy
import functools
import json
import logging
import os
import re

import pytest
import yaml
from checkpoint_checks import TEXT, content, make_state

from npr_jax import demo
from npr_jax.base.config import dump_config
from npr_jax.base.mesh import AXES
from npr_jax.plan.plan import stage_config
from npr_jax.runs import directory as claims
from npr_jax.runs.checkpoint import Checkpoints
from npr_jax.runs.directory import SIZES, claim, claim_inputs
from npr_jax.train.rollout_cache import Pending


def begun(directory, text, final=False):
    """A run directory in which something has been done."""
    output = claim(directory, text)
    (output / "metrics.jsonl").write_text("{}\n")
    if final:
        (output / "final").mkdir()
    return output


def test_what_changes_no_number_may_change(tmp_path):
    old = "train: {micro_rows: 4, remat: dots}\nengine: {pages: 9, lanes: 2, max_depth: 1}\n"
    new = "train: {micro_rows: 1, remat: full}\nengine: {pages: 5, lanes: 1, max_depth: 1}\n"
    output = begun(tmp_path / "run", old)
    assert claim(output, new, SIZES) == output
    with pytest.raises(ValueError, match=r"engine\.max_depth was 1, is 2.*depends on that"):
        claim(output, new.replace("max_depth: 1", "max_depth: 2"), SIZES)
    with pytest.raises(ValueError, match=r"engine\.lanes was 1, is 2"):
        claim(output, old)  # of an evaluation: its figures tell of speed, too
    with Checkpoints(tmp_path / "c", old, keep=1) as checkpoints:
        checkpoints.save(1, make_state(1), {})
    with Checkpoints(tmp_path / "c", new, keep=1) as checkpoints:
        assert checkpoints.restore(make_state(0))[0] == 1
    pending = Pending(tmp_path / "p", old)
    pending.save(1, 7, [], {}, 0)
    assert Pending(tmp_path / "p", new).load(1, 7) is not None


@pytest.mark.parametrize("key", ["steps", "fit.steps", "fit.epochs"])
def test_a_run_can_be_made_longer_and_not_shorter_than_it_is(tmp_path, caplog, key):
    def text(number):
        *outer, name = key.split(".")
        return f"{outer[0]}: {{{name}: {number}}}\n" if outer else f"{name}: {number}\n"

    output = begun(tmp_path, text(10), final=True)
    before = content(output)
    with pytest.raises(ValueError, match=rf"{key} was 10, is 9.*{key}=10 or more"):
        claim(output, text(9))
    assert content(output) == before and (output / "final").exists()
    claim(output, text(20))
    assert not (output / "final").exists()
    assert (output / f"final-{key.split('.')[-1]}-10").exists()
    assert f"{key} was 10, is 20: the run goes on" in caplog.text
    claim(output, text(15))  # nothing was made of 20 yet


def test_inputs_may_move_where_their_content_is_known(tmp_path):
    old, new = "model: here\nseed: 1\n", "model: there\nseed: 1\n"
    output = begun(tmp_path / "run", old)
    with pytest.raises(ValueError, match=r"model was .*here.*, is .*there"):
        claim(output, new)  # a run of before contents were written down
    text = claim_inputs(output, {"model": "weights 1"})
    claim(output, new)
    assert claim_inputs(output, {"model": "weights 1"}) == text
    with pytest.raises(ValueError, match=r"inputs\.model was .*weights 1.*, is .*weights 2"):
        claim_inputs(output, {"model": "weights 2"})
    with Checkpoints(tmp_path / "c", old + text, keep=1) as checkpoints:
        checkpoints.save(1, make_state(1), {})
    with Checkpoints(tmp_path / "c", new + text, keep=1) as checkpoints:
        assert checkpoints.restore(make_state(0))[0] == 1
    with (
        Checkpoints(tmp_path / "c", new + text.replace("weights 1", "weights 2"), 1) as checkpoints,
        pytest.raises(ValueError, match=r"inputs\.model was"),
    ):
        checkpoints.restore(make_state(0))


def test_a_run_from_before_a_key_was_there_goes_on(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(claims, "LATER", ("later",))
    output = begun(tmp_path, "seed: 1\n")
    claim(output, "seed: 1\nlater: 5\n")
    assert "begun without later; it is 5 now" in caplog.text
    with pytest.raises(ValueError, match="later was 5, is missing; other was missing, is 2"):
        claim(output, "seed: 1\nother: 2\n")


def test_a_config_of_which_a_part_is_gone_is_no_config_to_go_on_with(tmp_path):
    text = "seed: 1\nsteps: 3\nsampling: {max_tokens: 8}\nsamples: 1\n"
    output = begun(tmp_path, text, final=True)
    for part, message in (
        (
            "seed: 1\nsteps: 3\n",
            r"samples was missing, is 1; sampling\.max_tokens was missing, is 8",
        ),
        ("", r"config\.yaml is no config of a run"),
        (text.replace("steps: 3\n", ""), r"config\.yaml: steps is None, needed is the number"),
        (text.replace("3", "ten"), r"config\.yaml: steps is 'ten', needed is the number"),
    ):
        (output / "config.yaml").write_text(part)
        before = content(output)
        with pytest.raises(ValueError, match=message):
            claim(output, text)
        assert content(output) == before
    (output / "config.yaml").unlink()
    with pytest.raises(ValueError, match=r"holds final, and no config\.yaml that says of which"):
        claim(output, text)
    assert not (output / "config.yaml").exists()


def test_the_log_of_a_scheduler_may_be_there_before_the_run(tmp_path):
    (tmp_path / "slurm-1.out").write_text("it begins")
    claim(tmp_path, "seed: 0\n")
    assert (tmp_path / "config.yaml").exists()


@pytest.mark.parametrize("name, text", [("problems.jsonl", ""), ("config.yaml", "theme: dark\n")])
def test_a_directory_that_no_run_has_made_is_left_as_it_was(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    for begin in (lambda: claim(tmp_path, "seed: 0\n"), lambda: demo.run("sums", 0, tmp_path)):
        with pytest.raises(ValueError, match=f"{name}.*set another output"):
            begin()
    assert content(tmp_path) == {tmp_path / name: text.encode()}


def test_a_directory_in_which_nothing_was_done_is_free(tmp_path):
    (tmp_path / ".config.yaml.incomplete-npr-jax").write_text("se")  # a crash has left it
    for text in ("seed: 0\n", "seed: 1\n"):
        assert claim(tmp_path, text) == tmp_path
        assert (tmp_path / "config.yaml").read_text() == text


@pytest.mark.parametrize("ending", ["", "\n...\n", "\n\n"])
def test_a_config_ends_as_an_editor_leaves_it(tmp_path, ending):
    output = begun(tmp_path, "model: here\nseed: 1\n")
    claim_inputs(output, {"model": "weights 1"})
    (output / "config.yaml").write_text("model: here\nseed: 1" + ending)
    claim(output, "model: there\nseed: 1\n")


@pytest.mark.parametrize(
    "text", ["", "inp", "[1]", "inputs:\n", "inputs: [1]\n", "inputs: {model: 3}\n"]
)
def test_inputs_that_are_none_are_named(tmp_path, text):
    output = begun(tmp_path, "model: here\n")
    (output / "inputs.yaml").write_text(text)
    for go_on in (
        lambda: claim(output, "model: here\n"),
        lambda: claim_inputs(output, {"model": "weights 1"}),
    ):
        with pytest.raises(ValueError, match=r"inputs\.yaml(: inputs is| is no config of a run)"):
            go_on()
    assert (output / "inputs.yaml").read_text() == text


def test_the_configuration_of_a_run_is_never_half_written(tmp_path, monkeypatch):
    output = claim(tmp_path, TEXT)

    def crash(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", crash)
    with pytest.raises(KeyboardInterrupt):
        claims.claim(output, "seed: 1\n")
    assert (output / "config.yaml").read_text() == TEXT


# What may change when a stage goes on.
TRAIN = """micro_rows row_lengths remat gap_warn gap_stop max_nonfinite checkpoint_every
keep_checkpoints keep_best"""
ENGINE = """lanes pages page_size table_pages steps header_rows header_chunk prefill_rows
prefill_chunk max_stops attention"""
MAY = {
    "output",
    "checkpoints",
    "profile",
    "steps",
    "train.row_len",
    "mesh.slices",
    *(f"mesh.{axis}" for axis in (*AXES, "rollout")),
    *(f"train.{name}" for name in TRAIN.split()),
    *(f"engine.{name}" for name in ENGINE.split()),
}
MAY |= {f"fit.{key}" for key in MAY if key != "train.row_len"} | {"fit.epochs"}


def another(value):
    match value:
        case bool():
            return not value
        case int() | float():
            return value + 1
        case str():
            return value + "-2"
        case None:
            return "something"
    raise AssertionError(value)


@pytest.mark.parametrize("stage", ["zero", "beta", "papo"])
def test_every_key_may_change_or_says_why_it_may_not(tmp_path, stage):
    config = yaml.safe_load(dump_config(stage_config(stage, "tiny", ["output=here"])))
    output, inputs = tmp_path / "run", {key: f"{key} 1" for key in claims.INPUTS if key in config}
    begun(output, yaml.safe_dump(config))
    claim_inputs(output, inputs)
    keys = claims._flat(config)
    assert len(keys) > 50
    keys.pop("evaluate", None)  # null is none of its keys
    for key, value in keys.items():
        changed = copy.deepcopy(config)
        *outer, name = key.split(".")
        functools.reduce(dict.__getitem__, outer, changed)[name] = another(value)
        text = yaml.safe_dump(changed)
        if key in MAY or key in inputs:  # which have moved
            claim(output, text, SIZES)
            claim(output, yaml.safe_dump(config), SIZES)
            continue
        was, new = json.dumps(value), json.dumps(another(value))
        with pytest.raises(ValueError) as caught:
            claim(output, text, SIZES)
        told = re.search(
            rf"\({re.escape(f'{key} was {was}, is {new}')}: (.+)\), and", str(caught.value)
        )
        assert told and " " in told[1], caught.value
    for key, content_of in inputs.items():
        with pytest.raises(ValueError, match=rf"inputs\.{key} was .*: it holds something else"):
            claim_inputs(output, {key: content_of + "2"})


@pytest.fixture(autouse=True)
def warnings_are_seen(caplog):
    caplog.set_level(logging.WARNING)
