"""The next turn of a conversation finds the text of the answer before it, as far as it is plain."""

import dataclasses

import bigram
import numpy as np
import pytest
from engine_checks import CONFIG, recount, same
from fake_device import CONFIGS, engine_on_fake_device

from npr_jax.decode import Engine, SamplingParams

PROMPT = [12, 13, 20, 9, 15, 11, 10, 14, 21, 9]
PLAIN = SamplingParams(max_tokens=30, parallel=False)
ROOMY = dataclasses.replace(CONFIGS[0], pages=600)


pytestmark = pytest.mark.usefixtures("plans_without_numbers")


def next_turn(engine, answer, sampling=PLAIN):
    """The answer that goes on from it, and how many tokens of its prompt were cached."""
    before = engine.stats()["cached_tokens"]
    (second,) = engine.generate([[*answer.token_ids.tolist(), 12]], sampling)
    return second, engine.stats()["cached_tokens"] - before


def test_the_next_turn_computes_what_is_new():
    engine, size = engine_on_fake_device(ROOMY), ROOMY.page_size
    (answer,) = engine.generate([PROMPT], PLAIN)
    for _ in range(3):
        second, cached = next_turn(engine, answer)
        assert cached == (len(answer.token_ids) - 1) // size * size > len(PROMPT)
        (cold,) = engine_on_fake_device(ROOMY).generate(
            [second.token_ids[: second.prompt_len]], PLAIN
        )
        np.testing.assert_array_equal(second.token_ids, cold.token_ids)
        recount(engine.schedulers[0])
        answer = second


def test_what_is_behind_a_fork_is_never_found():
    size, forked = ROOMY.page_size, 0
    for seed in range(9, 23):
        engine = engine_on_fake_device(ROOMY)
        (answer,) = engine.generate([[*PROMPT, seed]], SamplingParams(max_tokens=90))
        if not answer.layout.blocks:
            continue
        forked += 1
        before = answer.layout.blocks[0].fork
        second, cached = next_turn(engine, answer)
        assert cached == before // size * size > 0
        (cold,) = engine_on_fake_device(ROOMY).generate(
            [second.token_ids[: second.prompt_len]], PLAIN
        )
        np.testing.assert_array_equal(second.token_ids, cold.token_ids)
        recount(engine.schedulers[0])
    assert forked > 3


def test_an_answer_that_failed_is_not_found():
    def fail(event):
        raise KeyError("of the caller")

    engine, size = engine_on_fake_device(ROOMY), ROOMY.page_size
    (answer,) = engine.generate([PROMPT], PLAIN, on_event=fail)
    assert answer.finish_reason == "error" and len(answer.token_ids) > len(PROMPT) + size
    _, cached = next_turn(engine, answer)
    assert cached == (len(PROMPT) - 1) // size * size


@pytest.mark.slow
def test_the_next_turn_has_the_log_probs_of_a_cold_engine():
    engine, cold = (Engine(bigram.model(), CONFIG) for _ in range(2))
    (answer,) = engine.generate([PROMPT], PLAIN)
    sampling = SamplingParams(max_tokens=60, seed=2)
    second, cached = next_turn(engine, answer, sampling)
    assert cached > len(PROMPT)
    (expected,) = cold.generate([second.token_ids[: second.prompt_len].tolist()], sampling)
    assert same(expected, second) == 0


def test_an_answer_says_how_much_of_its_prompt_was_cached():
    engine = engine_on_fake_device(CONFIG)
    size = CONFIG.page_size
    prompt = [9 + i % 14 for i in range(3 * size + 1)]
    sampling = SamplingParams(max_tokens=3, parallel=False)
    for number, cached in ((1, 0), (1, 3 * size)):
        for answer in engine.generate([prompt] * number, sampling):
            assert answer.stats["cached"] == cached
    other = [*prompt[: 2 * size], *prompt[: size + 1]]
    (answer,) = engine.generate([other], sampling)
    assert answer.stats["cached"] == 2 * size
    assert engine.stats()["cached_tokens"] == 5 * size
