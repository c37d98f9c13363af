"""Configs are strict: what is written is what is used, or there is an error that names it."""

import dataclasses
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from npr_jax.base.config import config_path, dump_config, load_config
from npr_jax.base.fields import Checked, Range, hints, meanings
from npr_jax.base.mesh import MeshConfig
from npr_jax.base.reference import page, template
from npr_jax.decode import EngineConfig, SamplingParams
from npr_jax.runs.profile import ProfileConfig
from npr_jax.train.beta import SampleConfig
from npr_jax.train.configs import CONFIGS
from npr_jax.train.evaluation import EvaluateConfig
from npr_jax.train.optimizer import OptimizerConfig


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
        ("optimizer: {rate: 1}", ["steps is missing", "an integer"]),
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
        ("steps=", ["--set steps=", "steps is missing", "an integer"]),
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


def test_without_a_file_there_are_overrides():
    given = ["steps=3", "optimizer.rate=1"]
    assert load_config(Config, None, given) == Config(3, Optimizer(1))
    with pytest.raises(ValueError, match=r"^--set steps=x: steps: .*'x'$"):
        load_config(Config, None, [*given, "steps=x"])


def test_presets_are_found_by_name():
    root = Path(__file__).parents[1] / "configs"
    for preset in root.rglob("*.yaml"):
        name = preset.relative_to(root).with_suffix("").as_posix()
        assert config_path(name).read_bytes() == preset.read_bytes()
    with pytest.raises(ValueError, match=r"no-such-preset.*presets"):
        config_path("no-such-preset")


# What every key takes, in every config that there is.

FILL = {  # values for keys without a default
    "model": "m",
    "sampler_model": "m",
    "problems": "p",
    "output": "o",
    "benchmarks": ["aime25"],
    "steps": 4,
    "max_tokens": 64,
    "learning_rate": 1e-3,
    "fit": {"steps": 4},
    "train": {"row_len": 4096},
}


def filled(cls) -> dict:
    """The fewest keys that a config can be made of, as YAML would give them."""
    found = {}
    for f in dataclasses.fields(cls):
        hint = hints(cls)[f.name]
        if f.default is f.default_factory is dataclasses.MISSING:
            nested = filled(hint) if dataclasses.is_dataclass(hint) else None
            found[f.name] = FILL[f.name] if nested is None else nested | FILL.get(f.name, {})
    return found


def kinds(hint) -> set:
    """The types that an annotation is made of."""
    return set().union(*map(kinds, get_args(hint))) if get_args(hint) else {hint}


def numbers(cls, prefix="") -> list[str]:
    """Dotted keys of all numbers of a config."""
    found = []
    for name, hint in hints(cls).items():
        if dataclasses.is_dataclass(hint):
            found += numbers(hint, f"{prefix}{name}.")
        elif kinds(hint) & {int, float}:
            found.append(prefix + name)
    return found


NUMBERS = [(command, key) for command, cls in CONFIGS.items() for key in numbers(cls)]
VALUES = {
    "nan": math.nan,
    "inf": math.inf,
    "-inf": -math.inf,
    "negative": -4,
    "zero": 0,
    "huge": 10**40,
    "tiny": 1e-40,
}


def configs_of(cls) -> set[type]:
    """A config and all that it is made of."""
    nested = [hint for hint in hints(cls).values() if dataclasses.is_dataclass(hint)]
    return {cls}.union(*map(configs_of, nested))


BESIDE_NULL = {EvaluateConfig, ProfileConfig}
EVERY = sorted(BESIDE_NULL.union(*map(configs_of, CONFIGS.values())), key=lambda cls: cls.__name__)


def test_every_number_of_every_config_has_a_range():
    assert len(EVERY) == 18 and len(NUMBERS) > 150
    for cls in EVERY:
        assert issubclass(cls, Checked), cls
        for name, hint in hints(cls).items():
            if kinds(hint) & {int, float}:
                assert any(isinstance(kind, Range) for kind in kinds(hint)), (cls, name)


def where(config, key):
    for part in key.split("."):
        config = getattr(config, part)
    return config


@pytest.mark.parametrize("command", CONFIGS)
def test_a_number_is_in_its_range_or_refused_by_name(command, tmp_path):
    """From YAML; and Python's constructor says the same of the same value."""
    path, cls = tmp_path / "c.yaml", CONFIGS[command]
    path.write_text(yaml.safe_dump(filled(cls)))
    good = load_config(cls, path)
    kept = 0
    for key in numbers(cls):
        *parents, name = key.split(".")
        owner = where(good, ".".join(parents)) if parents else good
        for value in VALUES.values():
            text = re.sub("nan|inf", r".\g<0>", str(value))
            python = told = None
            try:
                python = dataclasses.replace(owner, **{name: value})
            except ValueError as error:
                told = str(error)
                assert re.search(rf"\b{name} is {re.escape(repr(value))}|\b{name}\b.*needed", told)
            try:
                found = where(load_config(cls, path, [f"{key}={text}"]), key)
            except ValueError as error:
                assert f"--set {key}={text}" in str(error) and name in str(error)
                continue
            assert told is None, (key, value, told)
            assert found == getattr(python, name) == value and math.isfinite(found)
            kept += 1
    assert kept >= (1 if command == "mine" else 5)


@pytest.mark.parametrize(
    "command, setting, words",
    [
        ("zero", "max_refills=-1", "max_refills is -1, needed is an integer, 0 or more"),
        ("zero", "clip_high=.nan", "clip_high is nan, needed is a finite number, 0 or more"),
        ("zero", "clip_low=1.5", "clip_low is 1.5, needed is a finite number from 0, at most 1"),
        ("zero", "dual_clip=0.5", "dual_clip is 0.5, needed is a finite number above 1"),
        ("zero", "overlong_buffer=-3", "overlong_buffer is -3, needed is an integer, 0 or more"),
        ("zero", "overlong_penalty=-1.0", "overlong_penalty is -1.0, needed is a finite number, 0"),
        ("zero", "overlong_buffer=999", "overlong_buffer is 999, needed is max_tokens=64 at most"),
        ("papo", "train.optimizer.b1=1.0", "train.optimizer.b1 is 1.0, needed is a finite number"),
        ("papo", "train.optimizer.b2=1.5", "b2 is 1.5, needed is a finite number from 0, below 1"),
        ("papo", "train.optimizer.learning_rate=.inf", "train.optimizer.learning_rate is inf"),
        ("papo", "train.optimizer.eps=-1", "eps is -1, needed is a finite number above 0"),
        ("papo", "train.optimizer.eps=1e-50", "eps is 1e-50, needed is 0, or a number of 1e-30"),
        ("papo", "train.optimizer.weight_decay=.nan", "weight_decay is nan, needed is a finite"),
        ("beta", "sample.num_problems=-4", "sample.num_problems is -4, needed is an integer, 0"),
        ("beta", "sample.temperature=-1", "sample.temperature is -1, needed is"),
        ("beta", "fit.train.row_len=0", "fit.train.row_len is 0, needed is an integer, 1 or more"),
        (
            "eval",
            "sampling.top_p=0",
            "sampling.top_p is 0, needed is a finite number above 0",
        ),
        ("generate", "engine.pages=1", "engine.pages is 1, needed is an integer, 2 or more"),
        ("generate", "engine.lanes=10000000000", "engine.lanes is 10000000000, needed is an integ"),
        ("generate", "sampling.seed=[3, -1]", "needed is an integer from 0, below 4294967296"),
        ("papo", "mesh.tensor=0", "mesh.tensor is 0, needed is an integer, 1 or more, or -1"),
        ("papo", "objective=ppo", "objective is 'ppo', needed is 'papo' or 'dapo'"),
        ("papo", "train.remat=some", "train.remat is 'some', needed is 'none', 'full' or 'dots'"),
        ("generate", "dtype=float16", "dtype is 'float16', needed is 'float32' or 'bfloat16'"),
    ],
)
def test_what_is_out_of_range_is_told_with_key_value_and_need(command, setting, words, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(filled(CONFIGS[command])))
    with pytest.raises(ValueError) as error:
        load_config(CONFIGS[command], path, [setting])
    assert f"{path} --set {setting}: " in str(error.value) and words in str(error.value)
    assert len(str(error.value)) < 300


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda: OptimizerConfig(1e-3, b2=1.5),
            "b2 is 1.5, needed is a finite number from 0, below",
        ),
        (lambda: OptimizerConfig(1e-3, clip=0), "clip is 0, needed is a finite number above 0"),
        (lambda: OptimizerConfig("1e-3"), "learning_rate is '1e-3', needed is a finite number"),
        (lambda: OptimizerConfig(1e-3, eps=1e-50), "eps is 1e-50, needed is 0, or a number of"),
        (
            lambda: SampleConfig(max_tokens=8, num_problems=-4),
            "num_problems is -4, needed is an int",
        ),
        (lambda: MeshConfig(fsdp=-2), "fsdp is -2, needed is an integer, 1 or more, or -1"),
        (lambda: EngineConfig(lanes=True), "lanes is True, needed is an integer"),
        (lambda: EngineConfig(lanes=2.0), "lanes is 2.0, needed is an integer"),
        (lambda: EngineConfig(attention="flash"), "attention is 'flash', needed is 'gather'"),
        (lambda: EngineConfig(cache_dtype="f8"), "cache_dtype is 'f8', needed is 'float32', 'bf"),
        (lambda: SamplingParams(seed=(1, 2**32)), "seed is .*, needed is an integer from 0, below"),
        (lambda: SamplingParams(stop_token_ids=[3]), r"stop_token_ids is \[3\], needed is a tuple"),
        (
            lambda: SamplingParams(temperature=1e-40),
            "temperature is 1e-40, needed is 0, or a number",
        ),
    ],
)
def test_python_s_constructor_is_checked_too(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_numbers_of_numpy_are_taken_as_numbers():
    made = SamplingParams(temperature=np.float32(0.5), n=np.int64(2), seed=(np.uint32(3), 4))
    assert made == SamplingParams(temperature=0.5, n=2, seed=(3, 4))
    assert [type(x) for x in (made.temperature, made.n, *made.seed)] == [float, int, int, int]


# The first config of one's own.


def test_what_is_missing_is_told_with_its_meaning_and_the_command_that_tells_more(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("model: m\nproblems: p\noutput: o\nmax_tokens: 64\ntrain: {row_len: 4096}\n")
    with pytest.raises(ValueError) as error:
        load_config(CONFIGS["papo"], path)
    steps, optimizer = sorted(str(error.value).splitlines())
    assert "steps is missing, needed is an integer, 1 or more (until the end of the run)" in steps
    assert "train.optimizer is missing, needed is a mapping with learning_rate" in optimizer
    assert all("`npr-jax config papo`" in line for line in (steps, optimizer))


@pytest.mark.parametrize("command", CONFIGS)
def test_every_key_is_printed_as_yaml_that_can_be_used(command, tmp_path):
    """With what is required given: as it was begun with only that."""
    path, cls = tmp_path / "c.yaml", CONFIGS[command]
    text = template(cls)
    path.write_text(text, encoding="utf-8")
    needed = filled(cls)
    if command == "beta":
        needed["fit"]["train"].pop("row_len", None)
    given = [f"{key}={value}" for key, value in flat(needed)]
    assert load_config(cls, path, given) == load_config(cls, blank(tmp_path), given)
    printed = {key.strip() for key in re.findall(r"^ *[a-zA-Z]\w*(?=:)", text, re.MULTILINE)}
    assert printed == {name for part in configs_of(cls) for name in hints(part)}
    required = [key for key, _ in flat(filled(cls)) if not key.endswith("row_len")]
    assert text.count("REQUIRED:") == len([key for key in required if key != "fit.steps"])
    for part in configs_of(cls):
        assert set(meanings(part)) == set(hints(part)), f"{part} does not say what every key means"
    if required:
        with pytest.raises(ValueError, match=f"{required[0]} is missing, needed is"):
            load_config(cls, path)


def flat(values: dict, prefix: str = "") -> list[tuple[str, object]]:
    found = []
    for key, value in values.items():
        nested = isinstance(value, dict)
        found += flat(value, f"{prefix}{key}.") if nested else [(prefix + key, value)]
    return found


def blank(tmp_path):
    path = tmp_path / "blank.yaml"
    path.write_text("")
    return path


def test_the_page_of_all_keys_is_current():
    written = (Path(__file__).parents[1] / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert written.endswith(page(CONFIGS.values())), "run scripts/write_configuration.py"


@pytest.mark.parametrize(
    "text, words",
    [
        (
            "steps: 3\n\tname: x\n",
            "c.yaml: line 2, column 1: not valid YAML: found character '\\t'",
        ),
        ("steps: 3\nname: [1, 2\n", "line 3, column 1: not valid YAML: expected ',' or ']'"),
        (
            "steps: 3\nname: [1, 2\n",
            "while parsing a flow sequence that begins at line 2, column 7",
        ),
        ("steps: 3\nsteps: 4\n", "line 2, column 1: not valid YAML: key 'steps' is given twice"),
        ('name: "a\n', "not valid YAML: found unexpected end of stream"),
        ("name: \x00\n", "line 1, column 7: not valid YAML: the character"),
        (
            "steps: 3\nname: !!binary aGk=\n",
            "line 2, column 7: not valid YAML: !!binary is no type",
        ),
        ("name: !!set {a}\n", "line 1, column 7: not valid YAML: !!set is no type of a config"),
        ("name: !!timestamp x\n", "line 1, column 7: not valid YAML: !!timestamp is no type"),
        ("steps: !!int x\n", "line 1, column 8: not valid YAML: 'x' is no int"),
        ("name: !!bool x\n", "line 1, column 7: not valid YAML: 'x' is no bool"),
        ("steps: " + "9" * 5000, "c.yaml: line 1, column 8: not valid YAML: '999"),
        ("steps: " + "[" * 3000, "c.yaml: not valid YAML: lists and mappings nested too deep"),
        ('steps: !!int ""\n', "line 1, column 8: not valid YAML: '' is no int"),
        ("steps: !!int '-'\n", "line 1, column 8: not valid YAML: '-' is no int"),
        ('name: !!float ""\n', "line 1, column 7: not valid YAML: '' is no float"),
        ("name: &a [*a]\n", "line 1, column 11: not valid YAML: *a: a config has no aliases"),
        (
            "a: &a [1]\nb: [*a, *a]\n",
            "line 2, column 5: not valid YAML: *a: a config has no aliases",
        ),
        (
            'name: "\\ud83d"\n',
            "c.yaml: not valid YAML: the text '\\ud83d' is half a surrogate pair",
        ),
    ],
)
def test_what_is_no_yaml_is_told_with_line_column_and_reason(tmp_path, text, words):
    with pytest.raises(ValueError) as error:
        load(tmp_path, text)
    assert words in str(error.value)
    assert "\n" not in str(error.value) and ";" not in str(error.value)


def test_a_file_that_is_not_utf_8_is_named(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_bytes(b"name: \xff\n")
    with pytest.raises(ValueError, match=r"c\.yaml is not UTF-8"):
        load_config(Config, path)


def test_an_option_that_is_not_utf_8_is_named(tmp_path):
    """The shell hands any bytes on, and Python makes halves of surrogate pairs of them."""
    path = tmp_path / "c.yaml"
    path.write_text("steps: 3\n")
    options = {"name": ("--name ev\udcff", "ev\udcff")}
    with pytest.raises(ValueError) as error:
        load_config(Config, path, options=options)
    assert str(error.value).startswith("--name ev\udcff: name: the text '\\udcff' is half")


def test_errors_name_what_was_typed(tmp_path):
    options = {"model": ("--model m", "m"), "output": ("--output o", "o")}
    options["benchmarks"] = ("--benchmarks aime26", ["aime26"])
    with pytest.raises(ValueError) as error:
        load_config(CONFIGS["eval"], "eval", ["engine.lanes=8"], options)
    assert re.match(r"\S+eval\.yaml: benchmark 'aime26' is unknown", str(error.value))
    options["samples"] = ("--samples 0", 0)
    with pytest.raises(ValueError, match=r"eval\.yaml --samples 0: samples is 0, needed is"):
        load_config(CONFIGS["eval"], "eval", (), options)


def test_the_warm_up_of_zero_is_the_reference_s_ten_rollout_batches():
    config = load_config(CONFIGS["zero"], "qwen3_4b_zero")
    assert config.train.optimizer.warmup == 10 * config.minibatches == 80
    assert meanings(OptimizerConfig)["warmup"].unit == "optimizer steps"
