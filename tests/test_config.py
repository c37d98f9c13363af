"""Configs are strict: what is written is what is used, or there is an error that names it."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from npr_jax.base.config import config_path, dump_config, load_config


@dataclass(frozen=True)
class Optimizer:
    rate: float
    betas: tuple[float, float] = (0.9, 0.95)
    kind: Literal["adamw", "sgd"] = "adamw"

    def __post_init__(self):
        if self.rate <= 0:
            raise ValueError(f"rate is {self.rate}, needs to be positive")


@dataclass(frozen=True)
class Sampling:
    top_k: int = 0


@dataclass(frozen=True)
class Config:
    steps: int
    optimizer: Optimizer
    name: str = "run"
    sampling: Sampling | None = None
    stages: tuple[Sampling, ...] = ()
    shares: dict[str, float] = field(default_factory=dict)
    by_name: dict[str, Sampling] = field(default_factory=dict)
    flag: bool = False
    folder: Path = Path("runs")


BASE = "steps: 3\noptimizer: {rate: 1e-6}\n"


def load(tmp_path, text=BASE, overrides=()):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    return load_config(Config, path, overrides)


def test_values_and_defaults(tmp_path):
    config = load(tmp_path, BASE + "stages: [{top_k: 5}]\nsampling: {top_k: 2}\n")
    assert config == Config(3, Optimizer(1e-6), sampling=Sampling(2), stages=(Sampling(5),))
    assert isinstance(config.stages, tuple)


@pytest.mark.parametrize(
    "text, value",
    [
        *[("1e-6", 1e-6), ("1E3", 1e3), ("2", 2.0), ("-.5e+1", -5.0), ("1_000.5", 1000.5)],
        *[("3.", 3.0), (".inf", math.inf)],
    ],
)
def test_number_forms_are_floats(tmp_path, text, value):
    config = load(tmp_path, overrides=[f"shares={{a: {text}}}"])
    assert config.shares == {"a": value} and isinstance(config.shares["a"], float)


@pytest.mark.parametrize("text", ["yes", "no", "on", "1:30", "010", "2026-01-02", "1.2.3", "e5"])
def test_yaml_1_1_oddities_are_strings(tmp_path, text):
    assert load(tmp_path, overrides=[f"name={text}"]).name == text


@pytest.mark.parametrize(
    "text, words",
    [
        ("steps: '3'\noptimizer: {rate: 1}", ["c.yaml", "steps", "valid integer", "'3'"]),
        ("steps: 3.0\noptimizer: {rate: 1}", ["steps", "valid integer", "3.0"]),
        ("steps: true\noptimizer: {rate: 1}", ["steps", "valid integer", "True"]),
        ("steps: 3\noptimizer: {rate: fast}", ["optimizer.rate", "valid number", "'fast'"]),
        ("steps: 3\noptimizer: {rate: 1, kind: x}", ["optimizer.kind", "'adamw' or 'sgd'", "'x'"]),
        ("steps: 3\noptimizer: {rate: 1, betas: [1]}", ["optimizer.betas.1"]),
        ("steps: 3\noptimizer: {rate: -1}", ["optimizer", "rate is -1", "positive"]),
        ("optimizer: {rate: 1}", ["steps", "required"]),
        (BASE + "flag: 'true'", ["flag", "valid boolean"]),
        (BASE + "stepz: 3", ["stepz", "unknown key", "'steps'"]),
        ("steps: 3\noptimizer: {rat: 1}", ["optimizer.rat", "unknown key", "'rate'"]),
        (BASE + "sampling: {topk: 1}", ["sampling.topk", "unknown key", "'top_k'"]),
        (BASE + "stages: [{top_k: 1}, {topk: 1}]", ["stages.1.topk", "unknown key"]),
        (BASE + "by_name: {a: {topk: 1}}", ["by_name.a.topk", "unknown key"]),
        (BASE + "steps: 4", ["'steps' is given twice"]),
        (BASE + "1: 4", ["key 1 is not a string"]),
        (BASE + "sampling: [", ["c.yaml", "not valid YAML"]),
        ("- 1", ["needs a mapping"]),
    ],
)
def test_errors_name_file_key_value_and_need(tmp_path, text, words):
    with pytest.raises(ValueError) as error:
        load(tmp_path, text)
    for word in ["c.yaml", *words]:
        assert word in str(error.value)


def test_every_error_is_listed(tmp_path):
    with pytest.raises(ValueError) as error:
        load(tmp_path, "steps: a\noptimizer: {rate: b}\n")
    assert "steps" in str(error.value) and "optimizer.rate" in str(error.value)


def test_overrides_apply_in_order_and_create_parents(tmp_path):
    config = load(
        tmp_path, overrides=["steps=4", "steps=5", "optimizer.rate=1e-3", "sampling.top_k=7"]
    )
    assert (config.steps, config.optimizer.rate, config.sampling) == (5, 1e-3, Sampling(7))


@pytest.mark.parametrize(
    "override, words",
    [
        ("optimizer.rat=1", ["--set optimizer.rat=1", "'rate', 'betas', 'kind'"]),
        ("optimiser.rate=1", ["--set optimiser.rate=1", "'optimizer'"]),
        ("steps.x=1", ["steps is 3, which has no keys"]),
        ("optimizer.rate=fast", ["--set optimizer.rate=fast", "valid number"]),
        ("steps", ["needs the form a.b=value"]),
        ("a..b=1", ["needs the form a.b=value"]),
        ("steps=[", ["--set steps=[", "not valid YAML"]),
        ("steps=", ["--set steps=", "valid integer", "None"]),
    ],
)
def test_override_errors_name_the_override(tmp_path, override, words):
    with pytest.raises(ValueError) as error:
        load(tmp_path, overrides=[override])
    for word in words:
        assert word in str(error.value)


texts = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), max_size=12)
rates = st.floats(min_value=1e-300, allow_infinity=True)


@example(Config(1, Optimizer(1e-6), name="1e-6"))
@example(Config(1, Optimizer(1e-6), name="010"))
@example(Config(1, Optimizer(1e-6), name="no"))
@example(Config(1, Optimizer(1e-6), name=""))
@settings(deadline=None)
@given(
    st.builds(
        Config,
        steps=st.integers(-(2**63), 2**63 - 1),
        optimizer=st.builds(Optimizer, rate=rates, betas=st.tuples(rates, rates)),
        name=texts,
        sampling=st.none() | st.builds(Sampling, st.integers(0, 9)),
        stages=st.lists(st.builds(Sampling, st.integers(0, 9)), max_size=2).map(tuple),
        shares=st.dictionaries(texts, st.floats(allow_nan=False), max_size=2),
    )
)
def test_dump_loads_back_equal(tmp_path_factory, config):
    path = tmp_path_factory.getbasetemp() / "dump.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    assert load_config(Config, path) == config


def test_presets_are_found_by_name():
    root = Path(__file__).parents[1] / "configs"
    for preset in root.rglob("*.yaml"):
        name = preset.relative_to(root).with_suffix("").as_posix()
        assert config_path(name).samefile(preset)
    with pytest.raises(ValueError, match=r"no-such-preset.*presets"):
        config_path("no-such-preset")
