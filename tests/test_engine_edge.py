"""The engine's edge: whatever a callback, a second consumer or an exception does, pages and
requests come back, and nobody else notices."""

import dataclasses
import functools

import bigram
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest
from engine_checks import CONFIG, recount, same
from fake_device import CONFIGS, PROMPTS, engine_on_fake_device
from hypothesis import given, settings
from toy_tokenizers import byte_level, sentencepiece_like

from npr_jax.decode import Engine, SamplingParams
from npr_jax.decode.outputs import KINDS
from npr_jax.decode.runner import PendingStep
from npr_jax.decode.text import TextPieces

SAMPLING = SamplingParams(n=3, max_tokens=80)


pytestmark = pytest.mark.usefixtures("plans_without_numbers")


@pytest.fixture
def engine():
    return engine_on_fake_device(CONFIG)


@functools.cache
def calm():
    """The answers that nothing disturbs."""
    return engine_on_fake_device(CONFIG).generate(PROMPTS, SAMPLING)


def idle(engine):
    """Nothing is held and the counts add up."""
    for scheduler in engine.schedulers:
        recount(scheduler)
        assert scheduler.pages.num_held == 0
        assert not scheduler.running and not scheduler.waiting and not scheduler.bound
    assert engine.stats()["unfinished"] == 0


def finishes(events):
    return {event.request: event.trajectory for event in events if event.kind == "finish"}


def equal(answer, other):
    np.testing.assert_array_equal(answer.token_ids, other.token_ids)
    assert answer.finish_reason == other.finish_reason


@pytest.mark.parametrize("kind", KINDS)
def test_a_callback_may_abort_its_own_answer_at_any_event(kind):
    """(D1, D2) At a finish nothing is left to abort."""
    ended = set()
    for round_ in range(12):
        engine, heard = engine_on_fake_device(dataclasses.replace(CONFIG, max_logprobs=1)), []

        def on_event(event, engine=engine, heard=heard):
            heard.append(event)
            if event.kind == kind:
                assert engine.abort(event.request) == (kind != "finish")
                assert not engine.abort(event.request)
                recount(engine.schedulers[0])

        prompt = [*range(9, 23)] * 3 + [20, 9 + round_]
        scored = dataclasses.replace(SAMPLING, prompt_logprobs=0)
        requests = engine.submit([prompt[:41]], scored, on_event)
        others = engine.submit(PROMPTS, SAMPLING)
        answers = finishes(engine.stream())
        for request in requests:
            own = [event.kind for event in heard if event.request == request]
            if kind in own[:-1]:
                assert own.index(kind) == len(own) - 2  # nothing but the finish follows
                assert answers[request].finish_reason == "aborted"
                ended.add(request)
        for request, answer in zip(others, calm(), strict=True):
            equal(answers[request], answer)
        idle(engine)
    assert len(ended) > 0 or kind == "finish"


def test_a_callback_may_abort_others_and_submit(engine):
    late = []

    def on_event(event):
        if event.kind == "fork" and not late:
            assert engine.abort(victims[1])
            late.extend(engine.submit([PROMPTS[0]], SAMPLING))

    first = engine.submit(PROMPTS, SAMPLING, on_event)
    victims = engine.submit([[12] * 9], dataclasses.replace(SAMPLING, max_tokens=90))
    answers = finishes(engine.stream())
    assert answers[victims[1]].finish_reason == "aborted"
    for request, answer in zip((*first, *late), (*calm(), *calm()[:3]), strict=True):
        equal(answers[request], answer)
    idle(engine)


def test_finish_callbacks_that_ask_again_and_again_do_not_hold_a_closing_stream(engine):
    again = []

    def on_event(event):
        if event.kind == "finish" and len(again) < 50:
            again.extend(engine.submit([PROMPTS[0]], SamplingParams(max_tokens=20), on_event))

    engine.submit(PROMPTS, SAMPLING, on_event)
    stream = engine.stream()
    next(stream)
    before = set(again)
    stream.close()
    asked = set(again) - before
    answers = finishes(engine.stream())  # what was asked for while it closed, and then
    assert asked and set(answers) == set(again) - before and len(again) == 50
    idle(engine)


def test_an_interrupt_in_a_callback_leaves_nothing_held(engine):
    for number in (3, 30, 90):
        heard = []

        def on_event(event, number=number, heard=heard):
            heard.append(event)
            if len(heard) == number:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            engine.generate(PROMPTS, SAMPLING, on_event=on_event)
        idle(engine)
    for answer, other in zip(engine.generate(PROMPTS, SAMPLING), calm(), strict=True):
        equal(answer, other)


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("call", ["generate", "stream", "close", "abort"])
def test_an_interrupt_that_comes_back_reaches_the_caller_once(engine, call, kind, error):
    """Ctrl-C is one thing, a callback that raises SystemExit at every event another."""
    raised, heard = [], []

    def on_event(event):
        if (call in ("generate", "stream") and event.kind == kind) or event.kind == "finish":
            raised.append(event)
            raise error("enough")

    others = engine.submit([[12, 20]], SAMPLING, heard.append)
    with pytest.raises(error, match="enough"):
        if call == "generate":
            engine.generate(PROMPTS, SAMPLING, on_event=on_event)
        else:
            engine.submit(PROMPTS, SAMPLING, on_event)
            stream = engine.stream()
            for _ in range(9):
                next(stream)
            if call == "close":
                stream.close()
            if call == "abort":
                engine.abort()
            assert finishes(stream)
    assert len(raised) == 1
    idle(engine)
    assert set(finishes(heard)) == set(others)  # whose callback is another
    assert set(finishes(engine.stream())) <= set(others)
    assert engine._pending is None  # or no warmup could follow
    for answer, other in zip(engine.generate(PROMPTS, SAMPLING), calm(), strict=True):
        equal(answer, other)
    assert len(raised) == 1
    idle(engine)


def test_what_progress_raises_ends_only_what_was_asked_with_it(engine):
    kept = engine.submit(PROMPTS, SAMPLING)

    def progress(done, total):
        raise OSError("no terminal")

    with pytest.raises(OSError, match="no terminal"):
        engine.generate([[12, 20]] * 4, SAMPLING, progress)
    answers = finishes(engine.stream())
    assert list(answers) != [] and set(answers) == set(kept)
    for request, answer in zip(kept, calm(), strict=True):
        equal(answers[request], answer)
    idle(engine)


def test_a_second_stream_is_refused_when_it_is_made(engine):
    """(D3)"""
    first = engine.stream(PROMPTS, SAMPLING)
    for started in (False, True):
        with pytest.raises(RuntimeError, match="already running a stream"):
            engine.stream(PROMPTS, SAMPLING)
        with pytest.raises(RuntimeError, match="already running a stream"):
            engine.generate(PROMPTS, SAMPLING)
        with pytest.raises(RuntimeError, match="already running a stream"):
            engine.replay([])
        if not started:
            next(first)
    assert len(finishes(first)) == 3 * len(PROMPTS)
    idle(engine)


@pytest.mark.parametrize("end", ["close", "forget"])
def test_a_stream_that_was_not_begun_queues_nothing(engine, end):
    """(D4)"""
    kept = engine.submit([PROMPTS[0]], SAMPLING)
    stream = engine.stream(PROMPTS, SAMPLING)
    if end == "close":
        stream.close()
    del stream
    assert engine.stats()["unfinished"] == len(kept)
    assert set(finishes(engine.stream())) == set(kept)
    engine.set_params(bigram.model().params)
    idle(engine)


@pytest.mark.parametrize("prompts", ["1+2=", b"12", {12: 1}, 12, None, np.array(5)])
def test_prompts_that_are_no_list_are_refused(engine, prompts):
    """(D5)"""
    for call in (engine.generate, engine.submit, engine.stream):
        with pytest.raises(ValueError, match=rf"prompts is {type(prompts).__name__}, needed is a"):
            call(prompts)
    idle(engine)
    assert engine.generate([]) == []


@pytest.mark.parametrize("prompt", [np.array(12), "12", b"12", {12: 1}])
@pytest.mark.parametrize(
    "ids, match",
    [
        ([12, 9, -1], "-1 at 2"),
        ([12, 9.7], "9.7 at 1"),
        (np.array([12, 40]), r"np.int64\(40\) at 1"),
        ([10**30, 12], "10{30} at 0"),
    ],
)
def test_prompts_and_traces_hold_known_ids(engine, prompt, ids, match):
    """One rule for both."""
    for call, name, bad in (
        (engine.submit, "prompt 1", ids),
        (engine.replay, "trace 1", (ids, 1)),
        (engine.replay, "trace 1", dataclasses.replace(calm()[0], token_ids=ids)),
    ):
        good = ([12, 9], 1) if call == engine.replay else [12]
        with pytest.raises(ValueError, match=rf"{name} holds {match}, needed are token ids from 0"):
            call([good, bad])
    with pytest.raises(ValueError, match=rf"trace 0 is {type(prompt).__name__}, needed is"):
        engine.replay([(prompt, 1)])
    if not isinstance(prompt, str):
        with pytest.raises(ValueError, match=rf"prompt 0 is {type(prompt).__name__}, needed is"):
            engine.submit([prompt])
    with pytest.raises(ValueError, match="trace 0 is int, needed is a Trajectory"):
        engine.replay([5])
    with pytest.raises(ValueError, match=r"prompt_len is 1\.0, needed is 0 to 2"):
        engine.replay([([12, 9], 1.0)])
    idle(engine)


@pytest.mark.parametrize(
    "change, match",
    [
        (lambda p: p | {"embed": p["embed"].astype(jnp.bfloat16)}, "embed is bfloat16"),
        (lambda p: p | {"embed": p["embed"][:-1]}, r"embed is float32\[47, 96\], needed is .*48"),
        (lambda p: {k: x for k, x in p.items() if k != "unembed"}, "unembed is missing"),
        (lambda p: p | {"bias": p["embed"]}, "bias is .*needed is no such leaf"),
        (
            lambda p: p | {"layers": p["layers"] | {"wq": p["layers"]["wq"][:2]}},
            r"layers/wq is float32\[2, ",
        ),
    ],
)
def test_weights_of_another_form_are_refused_by_the_leaf(engine, change, match):
    """(D6)"""
    before = engine.runner.params
    with pytest.raises(ValueError, match=match):
        engine.set_params(change(bigram.model().params))
    assert engine.runner.params is before


def test_generate_returns_when_its_own_answers_are_done(engine):
    """(D7) Others go on with the next call, and no event of theirs is lost."""
    kept = engine.submit(PROMPTS, dataclasses.replace(SAMPLING, max_tokens=80))
    (short,) = engine.generate([[12, 20]], SamplingParams(max_tokens=1))
    assert short.finish_reason == "length"
    assert engine.stats()["unfinished"] > 0
    with pytest.raises(RuntimeError, match="being decoded: warm up before"):
        engine.warmup()
    events = list(engine.stream())
    for request, answer in zip(kept, calm(), strict=True):
        own = [event for event in events if event.request == request]
        equal(own[-1].trajectory, answer)
        told = sorted(event.token_id for event in own if event.kind == "token")
        assert told == sorted(answer.response_ids.tolist())
    idle(engine)


def test_check_refuses_what_submit_would(engine):
    """(D8)"""
    many = SamplingParams(stop_token_ids=tuple(range(9, 16)))
    plain = Engine(dataclasses.replace(bigram.model(), tags=None), CONFIG)
    for owner, sampling, match in (
        (engine, many, "10 ids end or stop a sequence .*max_stops is 8"),
        (plain, SamplingParams(), "needs a tokenizer with the eight tags"),
    ):
        with pytest.raises(ValueError, match=match):
            owner.check([12], sampling)
        with pytest.raises(ValueError, match=match):
            owner.submit([[12]], sampling)
    assert list(plain.stream()) == []  # nothing is asked, nothing is refused


class Bytes:
    """A tokenizer of which every token is one byte of a long character, a tag a whole one."""

    def decode(self, ids, **_):
        text, found, run = "\N{GRINNING FACE}".encode(), [], 0
        for token in ids:
            tag = token >= bigram.GO
            found.append(ord("|") if tag else text[run % 4])
            run = 0 if tag else run + 1
        return bytes(found).decode(errors="replace")

    def convert_ids_to_tokens(self, token):
        return "|"


def test_text_that_ends_inside_a_character_is_told():
    """(D9) Of a trunk and of a branch, whether the limit or the caller ends it."""
    engine = engine_on_fake_device(CONFIG, tokenizer=Bytes())
    cut = 0
    for max_tokens in range(1, 9):
        sampling = SamplingParams(n=2, max_tokens=max_tokens, parallel=False)
        heard = []
        answers = engine.generate(PROMPTS, sampling, on_event=heard.append)
        for number, answer in enumerate(answers):
            first = heard[0].request
            own = [event for event in heard if event.request == first + number]
            if answer.finish_reason == "length":  # else the text is without its end
                assert "".join(event.text or "" for event in own) == answer.text
                cut += bool(max_tokens % 4)
    assert cut > 9
    events = []
    for max_tokens in range(20, 80, 3):
        events += engine.stream(PROMPTS, dataclasses.replace(SAMPLING, max_tokens=max_tokens))
    ends = finishes(events)
    branches = {(e.request, e.branch) for e in events if e.kind == "token"}
    assert any(ends[request].finish_reason == "branch_length" for request, _ in branches)
    for request, branch in branches:
        own = [e for e in events if e.request == request and e.branch == branch]
        whole = Bytes().decode([e.token_id for e in own if e.kind == "token"])
        assert "".join(e.text or "" for e in own) == whole, (request, branch)
    stream, heard = engine.stream([[12, 20]], SamplingParams(max_tokens=50, parallel=False)), []
    for event in stream:
        heard.append(event)
        if len(heard) == 6:
            engine.abort()
    assert "".join(event.text or "" for event in heard) == heard[-1].trajectory.text
    pieces = TextPieces(Bytes())
    assert [pieces.add(1), pieces.flush(), pieces.flush()] == ["", "\ufffd", ""]


CHARACTERS = st.sampled_from(["a", " ", "\n", "\u00e9", "\u4e2d", "\U0001f600", "\ufffd"])
BYTES = st.sampled_from([0x00, 0x0A, 0x41, 0x80, 0x97, 0xBF, 0xC3, 0xE2, 0xED, 0xF0, 0xF4, 0xFF])


@pytest.mark.parametrize("scheme", ["bytes", "always", "first"])
@given(parts=st.lists(CHARACTERS | BYTES, max_size=30))
@settings(max_examples=300, deadline=None)
def test_pieces_of_text_are_the_text(scheme, parts):
    """Stray bytes cost no character beside them, and only a character's first bytes wait."""
    tokenizer, ids = toy_tokenizer(scheme), []
    for part in parts:
        text = isinstance(part, str)  # or a byte, which is its own id
        ids += tokenizer.encode(part, add_special_tokens=False) if text else [part]
    pieces, told = TextPieces(tokenizer), ""
    for i, token in enumerate(ids):
        told += pieces.add(token)
        if scheme == "bytes":
            whole = bytes(ids[: i + 1]).decode(errors="replace")
            assert told == whole[: len(whole) - whole.endswith("\ufffd")]
    assert told + pieces.flush() == tokenizer.decode(ids, clean_up_tokenization_spaces=False)


@functools.cache
def toy_tokenizer(scheme):
    return byte_level() if scheme == "bytes" else sentencepiece_like(scheme)


class Lost(RuntimeError):
    """What a device might raise."""


@pytest.mark.parametrize("call", ["decode", "prefill", "read"])
@pytest.mark.parametrize("error", [Lost, KeyboardInterrupt])
def test_an_exception_of_the_device_leaves_an_engine_as_new(monkeypatch, call, error):
    """(D10) The pool was donated and did not come back."""
    engine = engine_on_fake_device(CONFIG)
    runner, heard, calls = engine.runner, [], []

    def failing(*args):
        calls.append(args)
        if len(calls) == 4:
            if call != "read":
                args[1].delete()  # the pool
            raise error("out of memory")
        return original(*args)

    if call == "read":
        original = PendingStep.read
        monkeypatch.setattr(PendingStep, "read", failing)
    else:
        original = getattr(runner._steps, call)
        runner._steps = runner._prompt_steps = runner._steps._replace(**{call: failing})
    others = engine.submit([[12, 20]], SAMPLING)
    with pytest.raises(error, match="out of memory"):
        engine.generate(PROMPTS, SAMPLING, on_event=heard.append)
    reasons = [e.trajectory.finish_reason for e in heard if e.kind == "finish"]
    assert len(reasons) == 3 * len(PROMPTS) and "error" in reasons and "aborted" not in reasons
    ends = finishes(engine.stream())
    assert set(ends) == set(others)
    details = {a.detail for a in ends.values() if a.finish_reason == "error"}
    assert details <= {f"{error.__name__}: out of memory"}
    idle(engine)
    for answer, other in zip(engine.generate(PROMPTS, SAMPLING), calm(), strict=True):
        equal(answer, other)
    idle(engine)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_an_answer_of_log_probs_that_are_not_finite_is_an_error(engine, value):
    decode, ends = engine.runner._steps.decode, set()

    def overflowing(*args):
        pool, *state, drawn = decode(*args)
        return (
            pool,
            *state,
            dataclasses.replace(drawn, logp=np.where(drawn.tokens == 22, value, -1)),
        )

    engine.runner._steps = engine.runner._steps._replace(decode=overflowing)
    for answer, other in zip(engine.generate(PROMPTS, SAMPLING), calm(), strict=True):
        if 22 in other.response_ids:
            assert answer.finish_reason == "error" and "are not finite" in answer.detail
            assert 22 not in answer.response_ids and np.isfinite(answer.logp).all()
        else:
            equal(answer, other)
        ends.add(answer.finish_reason)
    assert "error" in ends and len(ends) > 1
    idle(engine)


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["gather", "blockwise"])
def test_what_pages_held_before_reaches_no_answer(attention):
    """(D10, D11) On the real device: a pool that is lost, then one that is full of NaN."""
    engine = Engine(bigram.model(), dataclasses.replace(CONFIG, attention=attention))
    sampling = SamplingParams(n=2, max_tokens=60, seed=(1, 2))
    prompts = [[12, 13, 20], list(range(10, 21)) * 3]
    answers = engine.generate(prompts, sampling)
    steps = engine.runner._steps

    def lost(*args):
        steps.decode(*args)
        raise Lost("the network is gone")

    engine.runner._steps = steps._replace(decode=lost)
    with pytest.raises(Lost):
        engine.generate(prompts, sampling)
    engine.runner._steps = steps
    assert engine.stats()["pages_cached"] == 0
    for answer, other in zip(answers, engine.generate(prompts, sampling), strict=True):
        assert same(answer, other) == 0
    engine.drop_prefix_cache()
    engine.runner._pool = jnp.full_like(engine.runner._pool, jnp.nan)
    for answer, other in zip(answers, engine.generate(prompts, sampling), strict=True):
        assert same(answer, other) == 0
    idle(engine)


def test_a_replay_that_runs_out_of_pages_keeps_its_tree():
    roomy = engine_on_fake_device(dataclasses.replace(CONFIGS[0], pages=400))
    answers = roomy.generate(PROMPTS, dataclasses.replace(SAMPLING, n=8, max_tokens=90))
    answer = max(answers, key=lambda a: a.layout.num_branches)
    assert answer.layout.num_branches > 2
    need = -(-(answer.prompt_len + answer.layout.total_len) // 4) + 2
    cut = 0
    for pages in range(need - 6, need + 20):
        engine = engine_on_fake_device(dataclasses.replace(CONFIGS[0], pages=pages))
        try:
            (again,) = engine.replay([answer])
        except ValueError:
            continue  # it could not fit even without branches
        idle(engine)
        if again.finish_reason == "pages_exhausted":
            cut += 1
            assert len(again.layout) == len(again.token_ids) < len(answer.token_ids)
            assert again.layout.num_branches > 0
        else:
            np.testing.assert_array_equal(again.token_ids, answer.token_ids)
    assert cut > 0
