"""A check of the user's own: found by its name, asked by the stages, refused where it is none."""

import dataclasses

import pytest
from test_collect import FakeEngine, FakeFeed, judged
from train_toy import tiny

from npr_jax.answers import equal
from npr_jax.answers.check import find_check
from npr_jax.answers.grade import check_many
from npr_jax.base.config import load_config
from npr_jax.decode import EngineConfig
from npr_jax.evaluate.judge import judge
from npr_jax.train import ask, beta, papo, zero

OPTIMISED = True


@pytest.fixture
def anagrams(tmp_path):
    path = tmp_path / "anagrams.py"
    path.write_text(
        "def check(prediction, reference):\n    return set(prediction) == {*reference}\n"
    )
    return str(path)


def test_a_check_is_found_by_its_file_or_module(anagrams):
    assert find_check(None) is equal
    check = find_check(anagrams)
    assert check("12", "2112") and not check("12", "3")
    assert find_check(anagrams) is check  # it was executed once
    assert check_many([("21", "12"), (None, "12"), ("3", "12")], check) == [True, False, False]


@pytest.mark.parametrize(
    "text, wanted",
    [
        (None, r"none\.py cannot be imported \(FileNotFoundError"),
        ("check = 3", r"has no function check\(prediction, reference\)"),
        ("def check(:", r"none\.py cannot be imported \(SyntaxError"),
        ("raise KeyError(7)", r"none\.py cannot be imported \(KeyError: 7\)"),
    ],
)
@pytest.mark.parametrize("stage", ["zero", "beta", "papo"])
def test_a_stage_without_its_check_is_refused(tmp_path, stage, text, wanted):
    path = tmp_path / "none.py"
    if text is not None:
        path.write_text(text)
    cls = {"zero": zero.ZeroConfig, "beta": beta.BetaConfig, "papo": papo.PapoConfig}[stage]
    with pytest.raises(ValueError, match=wanted):
        load_config(cls, f"tiny_{stage}", [f"checker={path}"])
    with pytest.raises(ValueError, match=r"nowhere\.at_all cannot be imported"):
        load_config(cls, f"tiny_{stage}", ["checker=nowhere.at_all"])


def test_answers_are_right_if_the_check_says_so(anagrams):
    model = tiny()
    engine = FakeEngine(model)
    engine.config = EngineConfig()
    one = dataclasses.replace(judged(model, True).trajectory, text="\\boxed{5}")
    found = [judge(engine, [one], ["55"], check)[0] for check in (equal, find_check(anagrams))]
    assert [(a.prediction, a.correct) for a in found] == [("5", False), ("5", True)]


def test_rollouts_ask_the_check_of_the_config(anagrams, monkeypatch):
    asked = []
    monkeypatch.setattr(ask, "roll_out", lambda *given, **named: asked.append(given) or {})
    for changes in ([], [f"checker={anagrams}"]):
        config = load_config(papo.PapoConfig, "tiny_papo", changes)
        ask.ask(None, FakeFeed(), config, None, (0,), 1, 2)
    assert [given[-1] for given in asked] == [equal, find_check(anagrams)]
    assert dataclasses.replace(config, checker=None).check is equal
