"""Texts that end a line: found wherever tokens begin and end, and nothing of them is told."""

import dataclasses

import bigram
import numpy as np
import pytest
from conftest import examples
from engine_checks import recount
from fake_device import CONFIGS, PROMPTS, check_answer, engine_on_fake_device
from hypothesis import given, settings
from hypothesis import strategies as st

from npr_jax.decode import SamplingParams
from npr_jax.decode.text import StopText

CONFIG = dataclasses.replace(CONFIGS[0], pages=200)
LINE = SamplingParams(max_tokens=60, parallel=False)


pytestmark = pytest.mark.usefixtures("plans_without_numbers")


class Digits:
    """Every token is two digits, so what is looked for may begin inside one."""

    def decode(self, ids, clean_up_tokenization_spaces=True):
        return "".join(f"{token:02d}" for token in ids)

    def convert_ids_to_tokens(self, token):
        return f"{token:02d}"


def engine_of(config=CONFIG):
    return engine_on_fake_device(config, tokenizer=Digits())


def cut(tokens: list[int], stops) -> tuple[int, str] | None:
    """How many tokens the line has and what it says, by the definition; None without an end."""
    for count in range(1, len(tokens) + 1):
        text = Digits().decode(tokens[:count])
        found = [text.find(stop) for stop in stops if stop in text]
        if found:
            return count, text[: min(found)]
    return None


STOPS = st.lists(st.text("0129", min_size=1, max_size=5), min_size=1, max_size=3)


@given(
    stops=STOPS,
    seed=st.integers(0, 20),
    first=st.integers(9, 22),
    least=st.sampled_from([0, 0, 1, 2, 3, 5, 9, 60]),
)
@settings(max_examples=examples(60), deadline=None)
def test_a_line_ends_before_the_first_of_the_texts(stops, seed, first, least):
    """Looked for in what it draws behind the first `min_tokens`."""
    engine = engine_of()
    prompt = [first, 9 + seed % 14]
    (free,) = engine.generate([prompt], LINE)
    ends = engine.model_config.eos_token_ids
    drawn = [token for token in free.response_ids.tolist() if token not in ends]
    sampling = dataclasses.replace(LINE, stop=tuple(stops), min_tokens=least)
    (request,) = engine.submit([prompt], sampling)
    events = list(engine.stream())
    answer = events[-1].trajectory
    told = "".join(event.text or "" for event in events if event.request == request)
    expected = cut(drawn[least:], stops)
    if expected:
        expected = least + expected[0], Digits().decode(drawn[:least]) + expected[1]
    if expected is None:
        np.testing.assert_array_equal(answer.token_ids, free.token_ids)
        assert (answer.text, answer.finish_reason) == (free.text, free.finish_reason)
    else:
        count, text = expected
        assert answer.response_ids.tolist() == drawn[:count]
        assert (answer.text, answer.finish_reason) == (text, "stop")
    ended = free.response_ids.tolist()[-1] in ends and expected is None
    assert told == answer.text + ("" if not ended else Digits().decode(free.response_ids[-1:]))
    check_answer(answer)
    recount(engine.schedulers[0])
    assert engine.schedulers[0].pages.num_held == 0


@given(
    tokens=st.lists(st.integers(0, 29), max_size=20),
    stops=st.lists(st.text("0129", min_size=1, max_size=5), min_size=1, max_size=3),
)
@settings(max_examples=examples(300), deadline=None)
def test_what_may_begin_a_text_is_kept_back_and_no_more(tokens, stops):
    line, told = StopText(Digits(), stops), ""
    for count, token in enumerate(tokens, 1):
        told += line.add(token)
        text = Digits().decode(tokens[:count])
        if line.found:
            break
        kept = text[len(told) :]
        assert told + kept == text
        assert not kept or any(stop.startswith(kept) for stop in stops)
        longer = range(len(kept) + 1, len(text) + 1)
        assert not any(stop.startswith(text[-n:]) for n in longer for stop in stops)
    expected = cut(tokens, stops)
    assert line.found == (expected is not None)
    assert told + line.flush() == (expected[1] if expected else Digits().decode(tokens))


def test_a_text_does_not_reach_across_what_the_engine_has_written():
    for written in ([], [30]):
        line = StopText(Digits(), ["1213"])
        line.add(12)
        line.wrote(written)
        line.add(13)
        assert line.found == (not written)


def test_a_branch_that_stops_lets_its_siblings_run_and_then_ends_the_answer():
    engine, seen = engine_of(), 0
    sampling = SamplingParams(max_tokens=90)
    prompts = [[*PROMPTS[n % len(PROMPTS)], 9 + n % 14] for n in range(60)]
    for free in engine.generate(prompts, sampling):
        if not free.layout.blocks:
            continue
        block = free.layout.blocks[0]
        begin, end = block.steps[0]
        drawn = [t for t in range(begin, end) if not free.forced[t]]
        if len(drawn) < 4:
            continue
        text = Digits().decode(free.token_ids[drawn[1:3]])
        prompt = free.token_ids[: free.prompt_len].tolist()
        (answer,) = engine.generate([prompt], dataclasses.replace(sampling, stop=(text,)))
        check_answer(answer)
        trunk = Digits().decode(free.token_ids[free.prompt_len : block.guideline_close + 1])
        if text in trunk:
            assert answer.finish_reason == "stop" and answer.text == trunk[: trunk.find(text)]
            continue
        assert answer.finish_reason == "branch_eos"
        assert len(answer.layout.blocks[0].steps) == len(block.steps)
        seen += 1
    assert seen > 3


def test_what_the_engine_writes_is_not_searched():
    engine = engine_of()
    head = engine.tags.step_headers[0]
    stop = (Digits().decode(head), Digits().decode(engine.tags.takeaway_header))
    sampling = SamplingParams(max_tokens=90)
    prompts = [[*PROMPTS[n % len(PROMPTS)], 9 + n % 14] for n in range(30)]
    free = engine.generate(prompts, sampling)
    assert sum(answer.stats["branches"] for answer in free) > 9
    for answer, other in zip(
        free, engine.generate(prompts, dataclasses.replace(sampling, stop=stop)), strict=True
    ):
        np.testing.assert_array_equal(answer.token_ids, other.token_ids)


def test_a_tokenizer_that_fails_ends_the_answer_that_asked_it_alone():
    class Failing(Digits):
        def decode(self, ids, clean_up_tokenization_spaces=True):
            if 20 in ids:
                raise OSError("no text")
            return super().decode(ids)

    engine = engine_on_fake_device(CONFIG, tokenizer=Failing())
    prompts = [[9 + i] for i in range(14)]
    plain = [answer.token_ids for answer in engine_of().generate(prompts, LINE)]
    requests = engine.submit(prompts, dataclasses.replace(LINE, stop=("never",)))
    ended = {e.request: e.trajectory for e in engine.stream(tokens=False) if e.kind == "finish"}
    failed = 0
    for request, tokens in zip(requests, plain, strict=True):
        if 20 in tokens[1:]:
            failed += 1
            assert ended[request].finish_reason == "error"
            assert "no text" in ended[request].detail
        else:
            np.testing.assert_array_equal(ended[request].token_ids, tokens)
    assert 2 < failed < len(prompts) - 2
    recount(engine.schedulers[0])
    assert engine.schedulers[0].pages.num_held == 0


@pytest.mark.parametrize("stop", [(), ("9x",)])
def test_a_tokenizer_that_fails_at_any_time_ends_its_answer_and_no_other(stop):
    class Failing(Digits):
        calls = failing = 0

        def decode(self, ids, clean_up_tokenization_spaces=True):
            self.calls += 1
            if self.calls == self.failing:
                raise OSError("no text")
            return super().decode(ids)

    tokenizer, sampling = Failing(), SamplingParams(max_tokens=25, stop=stop)
    engine = engine_on_fake_device(CONFIG, tokenizer=tokenizer)
    while not tokenizer.calls or tokenizer.calls >= tokenizer.failing:
        tokenizer.calls, tokenizer.failing = 0, tokenizer.failing + 1
        engine.submit([[12], [13]], sampling)
        ended = [e.trajectory for e in engine.stream() if e.kind == "finish"]
        reasons = [answer.finish_reason for answer in ended]
        assert len(reasons) == 2 and reasons.count("error") <= 1
        recount(engine.schedulers[0])
    assert tokenizer.failing > 15


def test_what_may_begin_a_text_is_told_before_the_branches():
    """Of the trunk's tag: no text reaches across branches, so nothing of it is kept back."""
    tag, forks = f"{bigram.TAGS.guideline_close:02d}", 0
    for prompt in ([first, second] for first in range(9, 23) for second in (12, 20)):
        engine = engine_of()
        engine.submit([prompt], SamplingParams(max_tokens=160, stop=(tag + "x",)))
        told = ""
        for event in engine.stream():
            told = told + (event.text or "") if event.branch == () else told
            if event.kind == "fork" and event.branch == ():
                assert told.endswith(tag)
                forks += 1
    assert forks > 3


def test_what_cannot_be_looked_for_is_refused():
    with pytest.raises(ValueError, match="not empty"):
        SamplingParams(stop=("a", ""))
    engine = engine_on_fake_device(CONFIG)
    with pytest.raises(ValueError, match="no tokenizer"):
        engine.generate([[12]], dataclasses.replace(LINE, stop=("12",)))


def test_an_end_of_text_can_be_a_token_like_others():
    engine = engine_of()
    prompts = [[9 + i] for i in range(14)]
    free = engine.generate(prompts, LINE)
    endless = engine.generate(prompts, dataclasses.replace(LINE, ignore_eos=True))
    stopped = [answer for answer in free if answer.finish_reason == "stop"]
    assert len(stopped) > 5
    for answer, other in zip(free, endless, strict=True):
        assert other.finish_reason == "length" and len(other.response_ids) == LINE.max_tokens
        shared = len(answer.token_ids)
        np.testing.assert_array_equal(answer.token_ids, other.token_ids[:shared])
