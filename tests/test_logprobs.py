"""Log-probs of the likeliest tokens: those of one forward, with the bits of the token's own."""

import dataclasses
import functools

import bigram
import jax
import numpy as np
import pytest
from engine_checks import CONFIG, same

from npr_jax.decode import Engine, SamplingParams
from npr_jax.decode.regrow import Begun
from npr_jax.model.score import logits

PROMPTS = [[12, 13, 20], [22], list(range(10, 21)) * 3]
TOP = dataclasses.replace(CONFIG, max_logprobs=5)


pytestmark = pytest.mark.usefixtures("plans_without_numbers")


@functools.cache
def model():
    return bigram.model()


def rows_of(answer):
    """Raw log-probs f64[T, V] of every next token, from one forward."""
    tree, tokens, size = answer.layout, answer.token_ids, -(-len(answer.token_ids) // 64) * 64
    ids, positions = np.zeros((2, 1, size), np.int32)
    hidden = np.zeros((1, size, 6, 2), np.int32)
    ids[0, : len(tokens)], positions[0, : len(tokens)] = tokens, tree.positions
    hidden[0, : len(tokens), : tree.hidden.shape[1]] = tree.hidden
    m = model()
    rows = jax.jit(logits, static_argnums=0)(m.config, m.params, ids, positions, hidden)
    return np.asarray(jax.nn.log_softmax(rows[0].astype(np.float32)), np.float64)


def check(answer, k):
    """The likeliest tokens of an answer beside one forward; bits beside its own log-probs."""
    rows, drawn = rows_of(answer), np.flatnonzero(answer.step >= 0)
    assert answer.top_ids.shape == answer.top_logp.shape == (len(answer.token_ids), k)
    none = np.delete(np.arange(len(answer.token_ids)), drawn)
    assert (answer.top_ids[none] == -1).all() and (answer.top_logp[none] == 0).all()
    for t in drawn:
        row, ids, logp = rows[answer.layout.pred[t]], answer.top_ids[t], answer.top_logp[t]
        np.testing.assert_allclose(logp, np.sort(row)[::-1][:k], atol=1e-4)
        np.testing.assert_allclose(logp, row[ids], atol=1e-4)
        assert len({*ids.tolist()}) == k and (np.diff(logp) <= 0).all()
        (here,) = np.nonzero(ids == answer.token_ids[t])
        if len(here):
            assert logp[here[0]].tobytes() == answer.logp[t].tobytes()
        else:
            assert answer.logp[t] <= logp[-1]


@pytest.mark.slow
def test_the_likeliest_are_those_of_one_forward_with_the_bits_of_the_token():
    engine = Engine(model(), TOP)
    asked = [
        SamplingParams(n=3, max_tokens=70, seed=3, logprobs=5, repetition_penalty=1.3, top_p=0.9),
        SamplingParams(n=2, max_tokens=60, temperature=0, logprobs=1),
        SamplingParams(n=2, max_tokens=60, seed=4),
    ]
    ids = [engine.submit(PROMPTS, sampling) for sampling in asked]
    events = list(engine.stream())
    done = {event.request: event.trajectory for event in events if event.kind == "finish"}
    assert engine.stats()["forks"] > 3 and engine.stats()["joins"] > 3
    for request in ids[0]:
        check(done[request], 5)
    for request in ids[1]:
        check(done[request], 1)
        drawn = done[request].step >= 0
        assert (done[request].top_ids[drawn, 0] == done[request].token_ids[drawn]).all()
        assert (done[request].top_logp[drawn, 0] == done[request].logp[drawn]).all()
    for request in ids[2]:
        assert done[request].top_ids is None and done[request].top_logp is None
    for sampling, requests in zip(asked, ids, strict=True):
        for request in requests:
            told = [e for e in events if e.request == request and e.kind == "token"]
            answer = done[request]
            assert all((e.top is None) == (e.forced or not sampling.logprobs) for e in told)
            if sampling.logprobs:
                heard = sorted((e.token_id, e.logp, e.top) for e in told if e.top)
                rows = zip(answer.top_ids.tolist(), answer.top_logp.tolist(), strict=True)
                tops = [tuple(zip(*row, strict=True)) for row in rows]
                own = zip(answer.token_ids.tolist(), answer.logp.tolist(), tops, strict=True)
                drawn = np.flatnonzero(answer.step >= 0).tolist()
                own = list(own)
                assert heard == sorted(own[t] for t in drawn)


@pytest.mark.slow
def test_nothing_else_changes_the_likeliest():
    """Lanes, steps, pressure on pages; and tokens are those of an engine without."""
    sampling = SamplingParams(n=3, max_tokens=70, seed=3, logprobs=3)
    found = []
    for changes in ({}, {"pages": 40, "steps": 3}):
        engine = Engine(model(), dataclasses.replace(TOP, **changes))
        found.append(engine.generate(PROMPTS, sampling))
    assert engine.stats()["preemptions"]
    plain = dataclasses.replace(sampling, logprobs=0)
    found.append(Engine(model(), CONFIG).generate(PROMPTS, plain))
    ties = 0
    for ours, pressed, without in zip(*found, strict=True):
        ties += same(ours, without)
        if not same(ours, pressed):
            np.testing.assert_allclose(ours.top_logp, pressed.top_logp, atol=1e-4)
            gap = np.diff(ours.top_logp, axis=1, append=-99).max(axis=1) < -1e-3
            np.testing.assert_array_equal(ours.top_ids[gap, 0], pressed.top_ids[gap, 0])
        else:
            ties += 1
    assert ties <= 1


def test_more_than_the_engine_gives_is_refused_by_name():
    engine = Engine(model(), TOP)
    with pytest.raises(
        ValueError, match=r"logprobs is 6, engine.max_logprobs is 5, needed is at least 6"
    ):
        engine.check([12], SamplingParams(logprobs=6, parallel=False))
    with pytest.raises(ValueError, match=r"logprobs is 1, engine.max_logprobs is 0"):
        Engine(model(), CONFIG).check([12], SamplingParams(logprobs=1, parallel=False))
    with pytest.raises(ValueError, match="logprobs is 21, needed is an integer from 0, at most 20"):
        SamplingParams(logprobs=21)


@pytest.mark.slow
def test_answers_that_go_on_keep_the_likeliest():
    sampling, engine = SamplingParams(n=3, max_tokens=70, seed=3, logprobs=3), Engine(model(), TOP)
    whole = engine.generate(PROMPTS, sampling)
    left = engine.generate(PROMPTS, sampling, pause=[20] * len(whole))
    begun = [Begun(answer, 20) if answer.finish_reason == "aborted" else None for answer in left]
    assert any(begun)
    for ours, theirs in zip(whole, engine.generate(PROMPTS, sampling, begun=begun), strict=True):
        if not same(ours, theirs):
            np.testing.assert_allclose(ours.top_logp, theirs.top_logp, atol=1e-4)
    few = dataclasses.replace(sampling, logprobs=2)
    with pytest.raises(ValueError, match=r"whose top_ids is \[\d+, 3\], needed is \[\d+, 2\]"):
        engine.generate(PROMPTS, few, begun=begun)
