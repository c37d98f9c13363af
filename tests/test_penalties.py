"""Penalties: what a line sees is state on the device, in step with what the host knows."""

import dataclasses
import functools

import bigram
import jax
import numpy as np
import pytest
from engine_checks import CONFIG, same
from fake_device import CONFIGS, PROMPTS, engine_on_fake_device

from npr_jax.decode import Engine, SamplingParams, fork_join
from npr_jax.decode import lanes as lanes_module
from npr_jax.decode.scheduler import Scheduler
from npr_jax.model.score import logits

PENALTIES = {"repetition_penalty": 2.0, "step_repetition_penalty": 5.0}
SAMPLING = SamplingParams(n=3, max_tokens=70, seed=3, temperature=0.7, **PENALTIES)


pytestmark = pytest.mark.usefixtures("plans_without_numbers")


@functools.cache
def model():
    return bigram.model()


def mixed(config, **changes):
    """Answers with penalties, some with one inside steps alone, and answers without beside them."""
    engine = Engine(model(), dataclasses.replace(config, **changes))
    some = (SAMPLING, dataclasses.replace(SAMPLING, repetition_penalty=1.0, seed=9))
    plain = SamplingParams(n=3, max_tokens=70, seed=5)
    ids = [engine.submit([[12, 13, 20], [22]], sampling) for sampling in (*some, plain)]
    done = {e.request: e.trajectory for e in engine.stream(tokens=False) if e.kind == "finish"}
    return [[done[request] for request in group] for group in ids], engine.stats()


def expected(answer, inside: float, outside: float):
    """The log-prob of every sampled token, from one forward and what the layout lets it see."""
    tree, tokens, size = answer.layout, answer.token_ids, -(-len(answer.token_ids) // 64) * 64
    ids, positions = np.zeros((2, 1, size), np.int32)
    hidden = np.zeros((1, size, 6, 2), np.int32)
    ids[0, : len(tokens)], positions[0, : len(tokens)] = tokens, tree.positions
    hidden[0, : len(tokens), : tree.hidden.shape[1]] = tree.hidden
    m = model()
    rows = np.asarray(jax.jit(logits, static_argnums=0)(m.config, m.params, ids, positions, hidden))
    sampled = np.flatnonzero(~answer.forced)
    found = {}
    for t in sampled[sampled >= answer.prompt_len]:
        p, k = tree.pred[t], np.arange(tree.pred[t] + 1)
        cut = (tree.hidden[: p + 1, :, 0] <= p) & (p < tree.hidden[: p + 1, :, 1])
        sees = np.unique(tokens[k[~cut.any(axis=1)]])
        step = any(a <= t < b for block in tree.blocks for a, b in block.branches)
        penalty, row = inside if step else outside, rows[0, p].astype(np.float64)
        row[sees] = np.where(row[sees] > 0, row[sees] / penalty, row[sees] * penalty)
        row /= 0.7
        found[t] = row[tokens[t]] - row.max() - np.log(np.exp(row - row.max()).sum())
    return found


@pytest.mark.slow
def test_a_penalty_is_for_what_the_line_sees():
    groups, stats = mixed(CONFIG)
    assert stats["forks"] > 3 and stats["joins"] > 3
    for answers, outside in zip(groups[:2], (2.0, 1.0), strict=True):
        for answer in answers:
            found = expected(answer, 5.0, outside)
            at = list(found)
            np.testing.assert_allclose(answer.logp_sampled[at], list(found.values()), atol=1e-4)


@pytest.mark.slow
def test_nothing_else_changes_what_is_penalised(monkeypatch):
    """Whatever the pressure, lanes, steps and the tokens of one call that marks; and answers
    without penalties beside others are what they are alone."""
    monkeypatch.setattr(lanes_module, "MARKS", 7)
    undisturbed, _ = mixed(CONFIG, lanes=16, pages=600)
    monkeypatch.undo()
    monkeypatch.setattr(fork_join, "check_block", bigram.check_block_without_numbers)
    pressed, stats = mixed(CONFIG, lanes=6, pages=40, steps=3)
    assert stats["preemptions"]
    grow = Scheduler._grow  # pages for one step more, so that lanes wait at the ends of tables
    monkeypatch.setattr(Scheduler, "_grow", lambda self, line, steps: grow(self, line, 1))
    waiting, _ = mixed(CONFIG)
    ties = 0
    for ours, *others in zip(undisturbed, pressed, waiting, strict=True):
        for theirs in others:
            ties += sum(same(a, b) for a, b in zip(ours, theirs, strict=True))
    assert ties <= 1
    alone = Engine(model(), dataclasses.replace(CONFIG, lanes=16, pages=600)).generate(
        [[12, 13, 20], [22]], SamplingParams(n=3, max_tokens=70, seed=5)
    )
    ties = sum(same(a, b) for a, b in zip(alone, undisturbed[2], strict=True))
    assert ties <= 1


def test_a_penalty_stops_no_overlap():
    """The next step is asked for before the last is read, as ever."""
    found = []
    for penalty in (1.0, 1.5):
        engine = engine_on_fake_device(CONFIGS[0])
        engine.generate(PROMPTS, SamplingParams(n=3, max_tokens=60, repetition_penalty=penalty))
        found.append({k: v for k, v in engine.stats().items() if isinstance(v, int)})
        del found[-1]["compilations"]
    assert found[0] == found[1]
    assert found[0]["forks"] and found[0]["preemptions"]
