"""The knobs of OpenAI's API beside an oracle in NumPy: what each token was drawn from."""

import dataclasses
import functools

import bigram
import jax
import numpy as np
import pytest
from engine_checks import CONFIG, same
from fake_device import CONFIGS, engine_on_fake_device

from npr_jax.decode import Engine, EngineConfig, SamplingParams
from npr_jax.decode.steps import add_seen
from npr_jax.model.score import logits

PROMPTS = [[12, 13, 20], [22], [20, 21, 22, 12, 13, 14] * 3]
BIASED = dataclasses.replace(CONFIG, max_logit_bias=4)
BASE = SamplingParams(n=2, max_tokens=70, seed=3, temperature=0.7)
KNOBS = {
    "min_tokens": {"min_tokens": 40},
    "min_tokens of stops": {"min_tokens": 12, "stop_token_ids": (21, 13), "ignore_eos": True},
    "bias": {"logit_bias": ((12, -100.0), (21, 3.0), (2, 1.5))},
    "presence": {"presence_penalty": 1.5},
    "frequency": {"frequency_penalty": 0.6},
    "more of the same": {"frequency_penalty": -0.3, "presence_penalty": -1.0},
    "all": {
        "presence_penalty": 0.7,
        "frequency_penalty": 0.2,
        "min_tokens": 30,
        "logit_bias": ((12, -100.0), (2, 9.0), (13, 1.0)),
        "repetition_penalty": 1.5,
        "step_repetition_penalty": 1.2,
        "top_k": 12,
    },
}
TIE = 1e-3


pytestmark = pytest.mark.usefixtures("plans_without_numbers")


@functools.cache
def model():
    return bigram.model(eos=0.03)


def rows_of(answer):
    """Logits f64[T, V] of every next token, from one forward."""
    tree, tokens, size = answer.layout, answer.token_ids, -(-len(answer.token_ids) // 64) * 64
    ids, positions = np.zeros((2, 1, size), np.int32)
    hidden = np.zeros((1, size, 6, 2), np.int32)
    ids[0, : len(tokens)], positions[0, : len(tokens)] = tokens, tree.positions
    hidden[0, : len(tokens), : tree.hidden.shape[1]] = tree.hidden
    m = model()
    rows = jax.jit(logits, static_argnums=0)(m.config, m.params, ids, positions, hidden)
    return np.asarray(rows[0], np.float64)


def check(answer, s: SamplingParams):
    """Each token of an answer is drawn from what the words of SamplingParams say."""
    tree, tokens, rows = answer.layout, answer.token_ids, rows_of(answer)
    ends = {*s.stop_token_ids, *(() if s.ignore_eos else model().config.eos_token_ids)}
    for t in np.flatnonzero(answer.step >= 0):
        p, k = tree.pred[t], np.arange(tree.pred[t] + 1)
        cut = (tree.hidden[: p + 1, :, 0] <= p) & (p < tree.hidden[: p + 1, :, 1])
        sees, x = k[~cut.any(axis=1)], rows[p].copy()
        inside = any(a <= t < b for block in tree.blocks for a, b in block.branches)
        penalty = (inside and s.step_repetition_penalty) or s.repetition_penalty
        ids = np.unique(tokens[sees])
        x[ids] = np.where(x[ids] > 0, x[ids] / penalty, x[ids] * penalty)
        own = sees[sees >= answer.prompt_len]  # the prompt's are the first of the tokens
        counts = np.bincount(tokens[own], minlength=len(x))
        x -= s.presence_penalty * (counts > 0) + s.frequency_penalty * counts
        for token, bias in s.logit_bias:
            x[token] += bias
        if tree.positions[t] - answer.prompt_len < s.min_tokens:
            x[list(ends)] = -np.inf
            assert tokens[t] not in ends
        if s.temperature == 0:
            assert tokens[t] == x.argmax() or x.max() - x[tokens[t]] < TIE
            continue
        x /= s.temperature
        if s.top_k:
            x[np.argsort(-x, kind="stable")[s.top_k :]] = -np.inf
        expected = x[tokens[t]] - x.max() - np.log(np.exp(x - x.max()).sum())
        assert abs(expected - answer.logp_sampled[t]) < 2e-4


@functools.cache
def mixed(**changes):
    """Answers with each of the knobs, sampled and greedy, beside others; figures."""
    engine, ids = Engine(model(), dataclasses.replace(BIASED, **changes)), {}
    for name, knobs in KNOBS.items():
        for temperature in (0.7, 0.0):
            sampling = dataclasses.replace(BASE, temperature=temperature, **knobs)
            ids[name, temperature] = sampling, engine.submit(PROMPTS, sampling)
    ids["none", 0.7] = BASE, engine.submit(PROMPTS, BASE)
    done = {e.request: e.trajectory for e in engine.stream(tokens=False) if e.kind == "finish"}
    found = {key: (s, [done[request] for request in some]) for key, (s, some) in ids.items()}
    return found, engine.stats()


@pytest.mark.slow
@pytest.mark.parametrize("name", [*KNOBS, "none"])
def test_what_is_drawn_is_what_the_words_say(name):
    found, stats = mixed(lanes=16, pages=900)
    assert stats["forks"] > 5 and stats["joins"] > 3
    for (key, _), (sampling, answers) in found.items():
        if key == name:
            for answer in answers:
                check(answer, sampling)


@pytest.mark.slow
def test_nothing_else_changes_what_is_drawn():
    """Whatever the lanes, the steps of a visit, and the pressure on pages."""
    roomy, _ = mixed(lanes=16, pages=900)
    pressed, stats = mixed(pages=40, steps=3)
    assert stats["preemptions"]
    ties = 0
    for key, (_, answers) in roomy.items():
        ties += sum(same(a, b) for a, b in zip(answers, pressed[key][1], strict=True))
    assert ties <= 2


@pytest.mark.slow
def test_a_bias_is_for_the_lane_that_has_it():
    """A ban holds as long as its answer, and not for who gets the lane next."""
    engine = Engine(model(), dataclasses.replace(BIASED, lanes=1))
    banned = dataclasses.replace(BASE, n=1, parallel=False, logit_bias=((20, -100.0), (21, -100.0)))
    plain = dataclasses.replace(banned, logit_bias=())
    found = [engine.generate([[22]], sampling)[0] for sampling in (plain, banned, plain)]
    same(found[0], found[2])
    assert {20, 21} & {*found[0].response_ids.tolist()}
    assert not {20, 21} & {*found[1].response_ids.tolist()}


def test_counts_stop_at_the_largest_number():
    seen = np.zeros((2, 3), np.uint16)
    seen[0] = 65534, 65535, 1
    rows, tokens = np.array([0, 0, 0, 1, 2]), np.array([0, 1, 2, 0, 1])
    found = np.asarray(add_seen(jax.numpy.asarray(seen), rows, tokens))
    np.testing.assert_array_equal(found, [[65535, 65535, 2], [2, 0, 0]])


def test_what_cannot_be_is_refused_by_name():
    engine = engine_on_fake_device(dataclasses.replace(CONFIGS[0], max_logit_bias=2))
    for error, refused in (
        ("logit_bias has 1 entries, engine.max_logit_bias is 0: raise it", {}),
        ("logit_bias has 3 entries, engine.max_logit_bias is 2", {"max_logit_bias": 2}),
    ):
        engine = engine_on_fake_device(dataclasses.replace(CONFIGS[0], **refused))
        pairs = tuple((token, 1.0) for token in range(1 + refused.get("max_logit_bias", 0)))
        with pytest.raises(ValueError, match=error):
            engine.submit([[12]], SamplingParams(logit_bias=pairs))
    with pytest.raises(ValueError, match="logit_bias has the id 40, needed are ids below 40"):
        engine.submit([[12]], SamplingParams(logit_bias=((40, 1.0),)))
    for error, knobs in (
        ("min_tokens is 9, needed is at most max_tokens=8", {"min_tokens": 9, "max_tokens": 8}),
        ("presence_penalty is 2.1, needed is a finite number from -2", {"presence_penalty": 2.1}),
        ("logit_bias has 301 entries", {"logit_bias": tuple((i, 1.0) for i in range(301))}),
        ("logit_bias has 2 entries for 1 tokens", {"logit_bias": ((1, 1.0), (1, 2.0))}),
        ("logit_bias is .*needed is 0, or a number", {"logit_bias": ((1, float("inf")),)}),
        ("logit_bias is .*needed is a tuple", {"logit_bias": ((1, 2.0, 3.0),)}),
    ):
        with pytest.raises(ValueError, match=error):
            SamplingParams(**knobs)
    with pytest.raises(ValueError, match="max_logit_bias is 301"):
        EngineConfig(max_logit_bias=301)
