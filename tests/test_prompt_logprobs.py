"""Log-probs of prompts: those of the trainer, computed once, whatever is cached or preempted."""

import dataclasses
import functools

import bigram
import jax
import numpy as np
import pytest
from engine_checks import CONFIG
from fake_device import CONFIGS, check_scores, engine_on_fake_device

from npr_jax.decode import Engine, SamplingParams
from npr_jax.model.score import logits, token_logp

TOP = dataclasses.replace(CONFIG, max_logprobs=4)
RNG = np.random.default_rng(0)
LONG = RNG.integers(9, 23, 150).tolist()
PROMPTS = [LONG, [12, 13, 20], [22], LONG[:33], [*LONG[:100], 9, 9]]
SAMPLING = SamplingParams(n=2, max_tokens=30, seed=3, prompt_logprobs=3)


pytestmark = pytest.mark.usefixtures("plans_without_numbers")


@functools.cache
def model():
    return bigram.model()


@functools.cache
def trainer(prompt: tuple):
    """The trainer's log-probs f32[T] of a prompt, and all of the vocabulary f64[T, V]."""
    size, m = 160, model()
    tokens, hidden = np.zeros((1, size), np.int32), np.zeros((1, size, 2, 2), np.int32)
    tokens[0, : len(prompt)] = prompt
    positions = np.arange(size, dtype=np.int32)[None]
    args = m.config, m.params, tokens, positions, hidden
    logp = jax.jit(token_logp, static_argnums=0)(*args, positions - 1)
    rows = jax.nn.log_softmax(jax.jit(logits, static_argnums=0)(*args)[0])
    return np.asarray(logp)[0, : len(prompt)], np.asarray(rows, np.float64)


def check(answer, k):
    """The prompt of an answer beside the trainer."""
    prompt = answer.token_ids[: answer.prompt_len]
    logp, rows = trainer(tuple(prompt.tolist()))
    np.testing.assert_allclose(answer.logp[: len(prompt)], logp, atol=1e-5)
    assert answer.logp[0] == 0 and (answer.logp_sampled[: len(prompt)] == 0).all()
    if not k:
        assert answer.top_ids is None
        return
    assert (answer.top_ids[0] == -1).all() and (answer.top_logp[0] == 0).all()
    for t in range(1, len(prompt)):
        row, ids, top = rows[t - 1], answer.top_ids[t, :k], answer.top_logp[t, :k]
        np.testing.assert_allclose(top, np.sort(row)[::-1][:k], atol=1e-4)
        np.testing.assert_allclose(top, row[ids], atol=1e-4)
        (here,) = np.nonzero(ids == prompt[t])
        if len(here):
            assert top[here[0]].tobytes() == answer.logp[t].tobytes()


@pytest.mark.slow
def test_prompts_have_the_log_probs_of_the_trainer():
    """Over several chunks, beside others that find cached pages, and where these are there before:
    each token is scored once for all answers to its prompt."""
    engine = Engine(model(), TOP)
    engine.generate(PROMPTS, SamplingParams(max_tokens=5))
    assert engine.stats()["cached_tokens"] >= 0
    scored = counted(engine)
    ids = engine.submit(PROMPTS, SAMPLING)
    engine.submit(PROMPTS, SamplingParams(max_tokens=5, parallel=False))
    ids += engine.submit(PROMPTS, dataclasses.replace(SAMPLING, n=1, prompt_logprobs=0))
    ids += engine.submit(PROMPTS, dataclasses.replace(SAMPLING, n=1, logprobs=1))
    events = list(engine.stream())
    done = {event.request: event.trajectory for event in events if event.kind == "finish"}
    for number, request in enumerate(ids):
        check(done[request], 0 if 10 <= number < 15 else 3)
        if number >= 15:
            drawn = done[request].step >= 0
            assert (done[request].top_ids[drawn, 0] >= 0).all()
            assert (done[request].top_ids[drawn, 1:] == -1).all()
        own = [event for event in events if event.request == request]
        assert [event.kind for event in own].count("prompt") == 1 and own[0].kind == "prompt"
        told, answer = own[0].prompt, done[request]
        np.testing.assert_array_equal(told.token_ids, answer.token_ids[: answer.prompt_len])
        np.testing.assert_array_equal(told.logp, answer.logp[: answer.prompt_len])
        if told.top_ids.shape[1]:
            np.testing.assert_array_equal(told.top_ids, answer.top_ids[: answer.prompt_len])
            np.testing.assert_array_equal(told.top_logp, answer.top_logp[: answer.prompt_len])
    assert not any(e.kind == "prompt" for e in events if e.request not in ids)
    assert sum(scored) == 3 * sum(len(prompt) - 1 for prompt in PROMPTS)


def counted(engine) -> list[int]:
    """How many tokens each call will score."""
    found, call = [], engine.runner._score_arguments

    def counting(*args):
        scored, arguments = call(*args)
        found.append(sum(len(at) for _, at, _ in scored))
        assert (np.asarray(arguments[-1]) >= 0).sum() == found[-1]
        return scored, arguments

    engine.runner._score_arguments = counting
    return found


@pytest.mark.parametrize("config", CONFIGS[:3])
def test_nothing_is_scored_twice_after_preemption(config):
    engine = engine_on_fake_device(config)
    scored, long = counted(engine), list(range(9, 23)) * 2
    sampling = SamplingParams(n=2, max_tokens=40, prompt_logprobs=0)
    ids = engine.submit([[*long, token] for token in range(9, 15)], sampling)
    done, visits = {}, 0
    while engine._requests:
        engine._visit()
        visits += 1
        running = engine.schedulers[0].running
        if visits % 3 == 0 and len(running) > 1:
            engine.schedulers[0]._preempt(running[-1])
        for event in engine._outputs.events:
            if event.kind == "finish":
                done[event.request] = event.trajectory
        engine._outputs.events.clear()
    assert engine.stats()["preemptions"] > 3
    for request in ids:
        assert done[request].finish_reason != "error" and len(done[request].response_ids)
        check_scores(done[request], True)
    assert sum(scored) == 6 * len(long)


@pytest.mark.slow
def test_nothing_compiles_after_warmup():
    jax.clear_caches()  # of other tests
    engine = Engine(model(), dataclasses.replace(TOP, table_pages=60))
    engine.warmup()
    before = engine.stats()["compilations"]
    engine.generate(PROMPTS, dataclasses.replace(SAMPLING, logprobs=4))
    engine.generate(PROMPTS, SamplingParams(max_tokens=5))
    assert engine.stats()["compilations"] == before


def test_scores_that_are_not_finite_end_the_answer():
    engine = engine_on_fake_device(CONFIGS[0])
    score = engine.runner._steps.score

    def spoiled(*args):
        pool, logp, *top = score(*args)
        return pool, np.where(args[-1] == 21, np.nan, logp), *top

    engine.runner._steps = engine.runner._steps._replace(score=spoiled)
    sampling = SamplingParams(max_tokens=9, prompt_logprobs=0)
    bad, good = engine.generate([[12, 21, 13, 9], [12, 20, 13, 9]], sampling)
    assert bad.finish_reason == "error" and "not finite" in bad.detail
    assert good.finish_reason != "error"


def test_an_engine_that_scores_no_prompts_says_so():
    sampling = SamplingParams(prompt_logprobs=0, parallel=False)
    with pytest.raises(ValueError, match=r"prompt_logprobs is 0, engine.max_logprobs is 0, needed"):
        Engine(model(), CONFIG).check([12], sampling)
    sampling = SamplingParams(prompt_logprobs=5, parallel=False)
    with pytest.raises(ValueError, match=r"prompt_logprobs is 5, engine.max_logprobs is 4, needed"):
        Engine(model(), TOP).check([12], sampling)
