"""A real engine of a toy model behind the server: log-probs are the trainer's, and an answer is its
own, whatever else is asked."""

import concurrent.futures
import contextlib
import dataclasses
import functools

import bigram
import engine_checks
import jax
import numpy as np
import pytest
from conftest import optimised
from serve_toy import CONFIG, Digits, serving

from npr_jax.decode import Engine, SamplingParams
from npr_jax.model.score import logits, token_logp

COMPLETION = "/v1/completions"
TOP = 20
ENGINE = dataclasses.replace(
    engine_checks.CONFIG, lanes=16, pages=800, page_size=8, max_logprobs=TOP
)
SIZE = 80  # of rows that the trainer scores
RNG = np.random.default_rng(0)
PROMPT = RNG.integers(9, 23, 21).tolist()
TRUNK, SEED = [12, 13, 20], 4  # whose answer has branches
TIE = 1e-4


pytestmark = pytest.mark.usefixtures("plans_without_numbers")


class Pairs(Digits):
    """Two tokens each have one text, as parts of characters have."""

    def decode(self, ids, clean_up_tokenization_spaces=True) -> str:
        return super().decode([token - token % 2 for token in ids])


@functools.cache
def model():
    return dataclasses.replace(bigram.model(), tokenizer=Digits())


@pytest.fixture(scope="module")
def server():
    with serving(CONFIG, engine=Engine(model(), ENGINE)) as running:
        yield running


@functools.cache
def trainer(ids: tuple):
    """The trainer's log-probs f32[T] of a line of text, and those f32[T, V] of all tokens at each
    place; of the first it has none."""
    tokens, hidden = np.zeros((1, SIZE), np.int32), np.zeros((1, SIZE, 2, 2), np.int32)
    tokens[0, : len(ids)] = ids
    positions = np.arange(SIZE, dtype=np.int32)[None]
    args = model().config, model().params, tokens, positions, hidden
    logp = jax.jit(token_logp, static_argnums=0)(*args, positions - 1)
    rows = jax.nn.log_softmax(jax.jit(logits, static_argnums=0)(*args)[0])
    return np.asarray(logp)[0, : len(ids)], np.roll(np.asarray(rows), 1, axis=0)[: len(ids)]


def check(told: dict, ids: list[int], first: int, k: int):
    """What is told of ids[first:] and their likeliest, beside the trainer; returns for how many it
    was clear that they are the likeliest, and for how many that they are not."""
    logp, rows = trainer(tuple(ids))
    assert [int(token) for token in told["tokens"]] == ids[first:]
    found = told["token_logprobs"]
    for place, (value, top) in enumerate(zip(found, told["top_logprobs"], strict=True), first):
        if place == first:
            assert value is None and top is None
            continue
        assert abs(value - logp[place]) < 1e-5
        best = np.sort(rows[place])[::-1]
        assert k <= len(top) <= k + 1 and top[f"{ids[place]:02d}"] == value
        np.testing.assert_allclose(sorted(top.values())[::-1][:k], best[:k], atol=1e-4)
        if k and best[0] - best[1] > TIE:
            assert (value == max(top.values())) == (ids[place] == rows[place].argmax())
    start = first + 1
    whole = logp[start:].sum(dtype=np.float64)
    assert abs(sum(found[1:]) - whole) < 1e-5 * max(1, abs(whole) / 10)  # of float32
    greedy = rows[start:].argmax(1) == ids[start:]
    return np.array([greedy.sum(), (~greedy).sum()])


@pytest.mark.parametrize("k", [0, 1, 5, TOP])
def test_log_probs_are_the_trainers(server, k):
    """Of prompts as lm-eval asks for them and of answers; a token is told to be the likeliest
    exactly if it is. Ids and text are begun once, whether they bring the beginning or not."""
    counts, text = np.zeros(2, int), Digits().decode(PROMPT)
    for prompt, first in ((PROMPT, 1), ([0, *PROMPT], 0), (text, 1), ("00" + text, 0)):
        for temperature in (0, 1):
            options = {"logprobs": k, "echo": True, "seed": 5, "temperature": temperature}
            options |= {"max_tokens": 40, "parallel": False}
            answer = server.post(COMPLETION, prompt=prompt, **options)
            (choice,) = answer["choices"]
            assert answer["usage"]["prompt_tokens"] == 1 + len(PROMPT)
            told = choice["logprobs"]
            drawn = [int(token) for token in told["tokens"]][1 - first + len(PROMPT) :]
            counts += check(told, [0, *PROMPT, *drawn], first, k)
    assert (counts > 20).all()


def test_tokens_of_one_text_do_not_hide_the_likeliest(server, monkeypatch):
    """The value at a text is that of the likeliest token."""
    monkeypatch.setattr(server.server.asker, "tokenizer", Pairs())
    _, rows = trainer((0, *PROMPT))
    body = {"echo": True, "logprobs": TOP, "max_tokens": 0}
    (choice,) = server.post(COMPLETION, prompt=PROMPT, **body)["choices"]
    found = choice["logprobs"]["top_logprobs"][1:]
    np.testing.assert_allclose([max(top.values()) for top in found], rows[2:].max(1), atol=1e-5)


def told_of(answer: dict) -> tuple[list[int], list[float]]:
    (choice,) = answer["choices"]
    told = choice["logprobs"]
    return [int(token) for token in told["tokens"]], told["token_logprobs"]


@pytest.mark.slow
@pytest.mark.parametrize("exact", [False, True])
def test_the_same_request_is_answered_the_same_alone_and_among_64_others(exact):
    """The same tokens up to a tie; in exact mode the same bits."""
    sizes = dict(lanes=8, table_pages=128, max_logprobs=0)
    with optimised() if exact else contextlib.nullcontext():
        engine = Engine(model(), dataclasses.replace(ENGINE, exact=exact, **sizes))
        (made,) = engine.generate([[0, *TRUNK]], SamplingParams(max_tokens=150, seed=SEED))
        assert len(made.layout.blocks) > 1 and len(made.response_ids) > 60
        options = {"temperature": 1, "logprobs": 0}
        body = {"prompt": TRUNK, "max_tokens": 150, "seed": SEED} | options
        bodies = [
            {"prompt": RNG.integers(9, 23, RNG.integers(1, 40)).tolist(), "seed": seed}
            | options
            | {"max_tokens": int(RNG.integers(20, 100))}
            for seed in range(64)
        ]
        bodies.insert(32, body)
        with serving(CONFIG, engine=engine) as running:
            ids, logp = told_of(running.post(COMPLETION, **body))
            with concurrent.futures.ThreadPoolExecutor(len(bodies)) as pool:
                answers = list(pool.map(lambda one: running.post(COMPLETION, **one), bodies))
            among, logp_among = told_of(answers[32])
    assert ids == made.response_ids.tolist()
    np.testing.assert_array_equal(np.float32(logp), made.logp[made.prompt_len :])
    if exact:
        assert (among, logp_among) == (ids, logp)
        return
    length = min(len(ids), len(among))
    end = next((i for i in range(length) if ids[i] != among[i]), length)
    if not len(ids) == len(among) == end:  # they part at a tie
        before = slice(made.prompt_len, made.prompt_len + end + 1)
        assert made.margin[before][made.logp[before] < 0].min() < TIE
    np.testing.assert_allclose(logp_among[:end], logp[:end], atol=1e-4)


def test_pieces_of_branches_have_the_likeliest_of_their_tokens(server):
    body = {"prompt": TRUNK, "seed": SEED, "max_tokens": 120, "logprobs": 3}
    pieces = server.stream(COMPLETION, **body, stream_branches=True)
    assert all(piece["choices"][0]["logprobs"] is None for piece in pieces)
    events = [piece["choices"][0]["branch"] for piece in pieces]
    tokens = [token for event in events for token in event.get("tokens", ())]
    assert any(token["forced"] for token in tokens) and any(event["branch"] for event in events)
    for token in tokens:
        if token["forced"]:
            assert "top" not in token
        else:
            best = dict(token["top"])
            assert len(best) == 3 and best.get(token["id"], token["logprob"]) == token["logprob"]
