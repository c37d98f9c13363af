"""One device, eight host devices in several shapes, and two processes of four: the same tokens."""

import dataclasses
import functools
import json

import bigram
import engine_checks
import jax
import numpy as np
import pytest
import two_processes
from conftest import spread
from engine_checks import recount, same

from npr_jax.base.distributed import initialize
from npr_jax.decode import Engine, SamplingParams, fork_join
from npr_jax.model.params import Weight
from npr_jax.model.sharding import DECODE_RULES, decode_shardings, resolve

CONFIG = dataclasses.replace(engine_checks.CONFIG, lanes=4, pages=120, max_logprobs=2)
PROMPTS = [[12, 13, 20], [22], list(range(10, 21)) * 3]
PENALTIES = {"repetition_penalty": 1.2, "step_repetition_penalty": 1.5}
SHAPES = [(2, 4), (4, 2), (8, 1)]  # the model has 4 heads and 2 KV heads: 4 shards have too few


def decode_all(mesh):
    """Greedy and seeded answers, and the engine; run in every process of a mesh alike."""
    engine = Engine(bigram.model(), CONFIG, mesh)
    seeded = SamplingParams(n=4, max_tokens=100, seed=(1, 2, 3))
    answers = engine.generate(PROMPTS, seeded)
    answers += engine.generate(PROMPTS, SamplingParams(max_tokens=60, temperature=0, **PENALTIES))
    scored = SamplingParams(max_tokens=30, temperature=0, logprobs=2, prompt_logprobs=2)
    answers += engine.generate(PROMPTS, scored)
    return engine, answers


pytestmark = pytest.mark.usefixtures("plans_without_numbers")


@functools.cache
def one_device():
    return decode_all(None)[1]


@pytest.mark.slow
@pytest.mark.parametrize("shape", spread(SHAPES, test=1))
def test_a_mesh_gives_the_tokens_of_one_device(shape, report):
    undisturbed = one_device()
    mesh = jax.make_mesh(shape, ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    engine, answers = decode_all(mesh)
    ties = sum(same(a, b) for a, b in zip(undisturbed, answers, strict=True))
    report(f"{ties} ties in {len(answers)} answers")
    assert ties <= 1
    for ours, theirs in zip(undisturbed[-3:], answers[-3:], strict=True):
        begun = ours.prompt_len + 1  # the first token drawn, where nothing has parted yet
        np.testing.assert_allclose(ours.top_logp[:begun], theirs.top_logp[:begun], atol=1e-4)
        assert (theirs.top_ids[1:begun] >= 0).all()
    assert len(engine.schedulers) == shape[0]
    for scheduler in engine.schedulers:
        recount(scheduler)
        assert scheduler.pages.num_held == 0
    stats = engine.stats()
    assert stats["lanes"] == 4 * shape[0]
    assert stats["forks"] > 5
    pool = engine.runner._pool
    split = shape[1] if 2 % shape[1] == 0 else 1  # KV heads that do not divide are on every shard
    expected = (3, CONFIG.pages, CONFIG.page_size, 4 // split, 24)
    assert {s.data.shape for s in pool.addressable_shards} == {expected}
    wq = engine.runner.params["layers"][0]["wq"]
    assert wq.addressable_shards[0].data.shape == (96, 96 // shape[1])


@pytest.mark.slow
def test_every_replica_works_and_shares_its_prompts():
    mesh = jax.make_mesh((4, 1), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    engine = Engine(bigram.model(), CONFIG, mesh)
    prompt = list(range(9, 23)) * 2
    engine.generate([prompt], SamplingParams(n=16, max_tokens=8, parallel=False))
    assert engine.stats()["prefill_tokens"] == 4 * (len(prompt) - 1)  # once per replica
    assert all(scheduler.pages.num_cached for scheduler in engine.schedulers)
    engine.drop_prefix_cache()
    before = engine.stats()["prefill_tokens"]
    engine.generate([[*prompt, i] for i in range(9, 13)], SamplingParams(n=4, max_tokens=8))
    assert engine.stats()["prefill_tokens"] - before == 4 * len(prompt)


def test_replicas_get_answers_by_what_they_have_to_do():
    mesh = jax.make_mesh((4, 1), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    engine = Engine(bigram.model(), CONFIG, mesh)
    for prompts, n, loads in ((3, 2, [2, 1, 2, 1]), (1, 2, [2, 2, 2, 2]), (4, 3, [5, 5, 5, 5])):
        requests = engine.submit([[12, 13]] * prompts, SamplingParams(n=n, max_tokens=9))
        assert requests == sorted(requests) and len(requests) == prompts * n
        assert [scheduler.num_requests for scheduler in engine.schedulers] == loads


def test_layouts_that_cannot_be_are_refused():
    config = bigram.model().config
    mesh = jax.make_mesh((1, 8), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    with pytest.raises(ValueError, match="wo: heads=4 does not divide by tensor=8"):
        decode_shardings(config, mesh)
    weight = Weight((8, 8), ("heads", "mlp"), None)
    with pytest.raises(ValueError, match="two axes of w go to 'tensor'"):
        resolve("w", weight, {}, DECODE_RULES, mesh)
    with pytest.raises(ValueError, match="logical axis 'colour', for which there is no rule"):
        resolve("w", Weight((8,), ("colour",), None), {}, DECODE_RULES, mesh)
    with pytest.raises(ValueError, match="heads goes to 'rows'; the mesh has"):
        resolve("w", weight, {}, DECODE_RULES | {"heads": "rows"}, mesh)


@pytest.mark.nightly
def test_two_processes_give_the_tokens_of_one_device():
    first, second = (json.loads(out.splitlines()[-1]) for out in two_processes.run(__file__))
    assert first == second  # every process knows every answer
    ties = 0
    for answer, other in zip(one_device(), first, strict=True):
        arrays = {name: np.array(x) for name, x in other.items() if isinstance(x, list)}
        ties += same(answer, dataclasses.replace(answer, **(other | arrays)))
    assert ties <= 1


def _process() -> None:
    jax.config.update("jax_default_matmul_precision", "highest")
    initialize()
    fork_join.check_block = bigram.check_block_without_numbers
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    _, answers = decode_all(mesh)
    rows = [
        {
            "token_ids": a.token_ids.tolist(),
            "logp": a.logp.tolist(),
            "finish_reason": a.finish_reason,
        }
        for a in answers
    ]
    print(json.dumps(rows))


if __name__ == "__main__":
    _process()
