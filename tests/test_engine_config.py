"""Numbers of sampling and of the engine's sizes: taken as what they are, or refused by name."""

import dataclasses
from unittest import mock

import bigram
import jax
import numpy as np
import pytest
from engine_checks import CONFIG
from fake_device import engine_on_fake_device

from npr_jax.decode import Engine, EngineConfig, SamplingParams, runner


@pytest.mark.parametrize(
    "field, value",
    [
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", -1),
        ("temperature", "1"),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("top_k", -1),
        ("top_k", 2.5),
        ("min_p", 1.0),
        ("repetition_penalty", 0.0),
        ("step_repetition_penalty", -2.0),
        ("max_tokens", -5),
        ("max_tokens", 0),
        ("max_tokens", 1e3),
        ("max_position", 0),
        ("n", 0),
        ("n", True),
        ("parallel", 1),
        ("seed", 1.5),
        ("seed", -1),
        ("stop_token_ids", (3, "x")),
        ("stop_token_ids", [3]),
    ],
)
def test_bad_sampling_is_refused_by_name(field, value):
    with pytest.raises(ValueError, match=rf"{field} is .*needed is"):
        SamplingParams(**{field: value})


def test_numbers_of_numpy_are_the_numbers_they_are():
    """(C3)"""
    engine = engine_on_fake_device(EngineConfig(pages=60))
    plain = SamplingParams(0.5, 0.75, 3, 0.25, 1.5, 1.25, 9, 99, 2, 3, False, (5, 6))
    given = SamplingParams(
        *(np.float32(x) for x in (0.5, 0.75)),
        np.int8(3),
        *(np.float16(x) for x in (0.25, 1.5, 1.25)),
        *(np.int64(x) for x in (9, 99, 2, 3)),
        False,
        (np.int64(5), np.uint16(6)),
    )
    assert given == plain and repr(given) == repr(plain)
    seeds = SamplingParams(n=2, max_tokens=30, seed=(np.int64(3), np.uint32(3)))
    assert all(type(seed) is int for seed in seeds.seed)
    for seed in (seeds, dataclasses.replace(seeds, seed=np.int64(3))):
        assert len(engine.generate([[12, 20]] * 2, seed)) == 4
    config = EngineConfig(lanes=np.int64(2), pages=np.int32(30))
    assert config == EngineConfig(lanes=2, pages=30) and type(config.lanes) is int


@pytest.mark.parametrize(
    "field, value",
    [
        ("temperature", 1e-40),  # 0 as float32, or infinite logits
        ("temperature", 1e300),
        ("temperature", None),
        ("top_p", float("nan")),
        ("top_k", 2**40),
        ("top_k", np.float32(2)),
        ("min_p", np.inf),
        ("repetition_penalty", 1e-300),
        ("step_repetition_penalty", 1e39),
        ("max_tokens", None),
        ("n", np.bool_(True)),
        ("seed", None),
        ("seed", np.array([1, 2])),
        ("seed", 2**32),
        ("stop_token_ids", None),
    ],
)
def test_numbers_that_float32_cannot_use_are_refused(field, value):
    with pytest.raises(ValueError, match=rf"{field} is .*needed is"):
        SamplingParams(**{field: value})


@pytest.mark.parametrize(
    "field, value, need",
    [
        ("lanes", 2.5, "an integer, 1 or more"),
        ("lanes", True, "an integer, 1 or more"),
        ("pages", 1, "an integer, 2 or more"),
        ("table_pages", None, "an integer, 0 or more"),
        ("steps", "8", "an integer, 1 or more"),
        ("cache_dtype", "float33", "'float32', 'bfloat16' or 'int8'"),
    ],
)
def test_bad_sizes_are_refused_by_name(field, value, need):
    with pytest.raises(ValueError, match=rf"{field} is {value!r}, needed is {need}"):
        EngineConfig(**{field: value})


@pytest.mark.parametrize("field", ["pages", "lanes", "steps"])
@pytest.mark.parametrize(
    "part, error",
    [
        ("Lanes", MemoryError("Unable to allocate 128. GiB")),
        (
            "pool_shape",
            jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: needed are 128. GiB"),
        ),
    ],
)
def test_sizes_that_memory_is_too_small_for_are_named(field, part, error, monkeypatch):
    """The host's for the lanes' tables, the device's for the pool."""
    monkeypatch.setattr(runner, part, mock.Mock(side_effect=error))
    with pytest.raises(ValueError, match=rf"engine\.{field}=99, .*128\. GiB.*: make some smaller"):
        Engine(bigram.model(), dataclasses.replace(CONFIG, **{field: 99}))


def test_ids_that_stop_count_once():
    engine = Engine(bigram.model(), CONFIG)
    sampling = SamplingParams(max_tokens=2, stop_token_ids=(9,) * 20)
    assert len(engine.generate([[12, 20]], sampling)) == 1
    with pytest.raises(ValueError, match=r"10 ids end .*engine\.max_stops is 8"):
        engine.generate([[12]], SamplingParams(stop_token_ids=tuple(range(9, 16)) * 2))


def test_widths_are_few_and_hold_a_line_a_block_and_all():
    for lanes in range(1, 300):
        for branches in (1, 2, 5, 16):
            widths = EngineConfig(lanes=lanes, max_branches=branches).widths
            assert widths == tuple(sorted(set(widths))) and len(widths) <= 8
            assert widths[0] == 1 and widths[-1] == lanes
    assert EngineConfig(lanes=64).widths == (1, 5, 20, 64)
    assert EngineConfig(lanes=16).widths == (1, 5, 16)
    assert len(EngineConfig(lanes=100_000, max_branches=1).widths) == 8
