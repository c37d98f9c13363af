"""An answer that goes on from the middle of another: on its pages, and without a trace in it."""

import dataclasses
import functools

import bigram
import numpy as np
import pytest
from engine_checks import CONFIG, recount

from npr_jax.decode import Engine, SamplingParams

pytestmark = [pytest.mark.usefixtures("plans_without_numbers"), pytest.mark.slow]
OPTIMISED = True  # as bits are compared
PROMPT, SUFFIX = [12, 13, 20, 21, 22, 14, 15], [20, 13, 21]
PLAIN = SamplingParams(parallel=False, ignore_eos=True, max_tokens=60, n=3, seed=5)
GREEDY = SamplingParams(parallel=False, temperature=0, max_tokens=6)
COLUMNS = ("token_ids", "logp", "logp_sampled", "margin", "forced")


def engine(**changes) -> Engine:
    changes = {"table_pages": min(128, changes.get("pages", 128))} | changes
    return Engine(bigram.model(), dataclasses.replace(CONFIG, exact=True, **changes))


def decode(made: Engine, every: int, disturb=lambda made: None):
    """The answers, and {(answer, length): what went on from there}."""
    requests, heard = made.submit([PROMPT], PLAIN), {}
    begun, answers = dict.fromkeys(requests, 0), {}
    while made._requests:
        for number, request in enumerate(requests):
            found = made._requests.get(request)
            while found and found.trunk.position - found.prompt_len >= begun[request] + every:
                begun[request] += every
                place = number, begun[request]

                def hear(event, place=place):
                    if event.kind == "finish":
                        heard[place] = event.trajectory

                made.fork(request, begun[request], SUFFIX, GREEDY, hear)
        disturb(made)
        for event in made.step():
            assert event.request in requests, "events of a fork are its callback's"
            if event.kind == "finish":
                answers[event.request] = event.trajectory
        recount(made.schedulers[0])
    assert made.schedulers[0].pages.num_held == 0
    return [answers[request] for request in requests], heard


def equal(a, b):
    for name in COLUMNS:
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), name)
    assert a.finish_reason == b.finish_reason and a.stats["tokens"] == b.stats["tokens"]


@functools.cache
def undisturbed() -> Engine:
    return engine()


def test_an_answer_is_what_it_would_be_and_so_is_what_goes_on_from_it():
    fresh = undisturbed()
    made = engine(pages=40)
    answers, heard = decode(made, 7)
    for answer, other in zip(fresh.generate([PROMPT], PLAIN), answers, strict=True):
        equal(answer, other)
    # An answer may end in the visit in which it passes the last place.
    assert 3 * (PLAIN.max_tokens // 7 - 1) <= len(heard) <= 3 * (PLAIN.max_tokens // 7)
    for (number, length), found in heard.items():
        prompt = [*answers[number].token_ids[: len(PROMPT) + length].tolist(), *SUFFIX]
        (again,) = fresh.generate([prompt], GREEDY)
        equal(again, found)
        assert found.token_ids[: len(prompt)].tolist() == prompt
        assert found.prompt_len == len(prompt)
    assert made.stats()["preemptions"] > 10


def test_nothing_of_the_answer_is_computed_again():
    made = undisturbed()
    made.drop_prefix_cache()
    before = made.stats()["prefill_tokens"]
    _, heard = decode(made, 10)
    spent = made.stats()["prefill_tokens"] - before
    # Of what goes on what was added, but its last token, whose key the first step writes.
    assert spent == len(PROMPT) - 1 + len(heard) * (len(SUFFIX) - 1)


def test_it_goes_on_when_the_answer_yields_or_ends():
    rng = np.random.default_rng(0)
    first = undisturbed()._maker._count

    def disturb(made):
        (scheduler,) = made.schedulers
        if scheduler.running and rng.random() < 0.2:
            scheduler._preempt(scheduler.running[int(rng.integers(len(scheduler.running)))])
        if scheduler.running and scheduler.running[0].length > 30:
            made.abort(first)

    answers, heard = decode(undisturbed(), 5, disturb)
    assert answers[0].finish_reason == "aborted" and len(heard) > 15
    fresh = undisturbed()
    for (number, length), found in heard.items():
        prompt = [*answers[number].token_ids[: len(PROMPT) + length].tolist(), *SUFFIX]
        equal(fresh.generate([prompt], GREEDY)[0], found)


def test_what_cannot_go_on_is_refused():
    made = undisturbed()
    (request,) = made.submit([PROMPT], dataclasses.replace(PLAIN, n=1))
    while made._requests[request].trunk.position < len(PROMPT) + 8:
        made.step()
    for length, tokens, changes, said in (
        (-1, SUFFIX, {}, "length is -1, needed is 0 to"),
        (50, SUFFIX, {}, "length is 50, needed is 0 to"),
        (3, [], {}, "tokens is empty"),
        (3, [40], {}, "outside the vocabulary"),
        (3, SUFFIX, {"parallel": True}, "parallel is True, needed is False"),
        (3, SUFFIX, {"n": 2}, "n is 2, needed is 1"),
        (3, SUFFIX, {"logprobs": 1}, "logprobs is 1, needed is 0"),
    ):
        with pytest.raises(ValueError, match=said):
            made.fork(request, length, tokens, dataclasses.replace(GREEDY, **changes), print)
    with pytest.raises(ValueError, match="request is 99"):
        made.fork(99, 3, SUFFIX, GREEDY, print)
    made.abort()
    with pytest.raises(ValueError, match=f"request is {request}"):
        made.fork(request, 3, SUFFIX, GREEDY, print)
    assert made.stats()["unfinished"] == 0
