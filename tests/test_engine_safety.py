"""The engine under pressure: pages that run out, hostile answers, bad requests, failing callbacks,
requests that come and go; and the same tokens all the while."""

import dataclasses
import functools
import json

import bigram
import numpy as np
import pytest
from bigram import EOS, GC, GO, NL, PC, PO, SC, SO, TC, TO
from conftest import examples, spread
from engine_checks import CONFIG, recount, same
from fake_device import check_answer, engine_on_fake_device

from npr_jax.decode import Engine, EngineConfig, SamplingParams, tables

VICTIM = (23, 24, 25, 26, 27)  # tokens that no hostile table touches


pytestmark = pytest.mark.usefixtures("plans_without_numbers")


@functools.cache
def model(**rates):
    return bigram.model(**rates)


def idle(engine):
    """Nothing is held and the counts add up."""
    for scheduler in engine.schedulers:
        recount(scheduler)
        assert scheduler.pages.num_held == 0
        assert not scheduler.running and not scheduler.waiting and not scheduler.bound


NUMBERS = bigram.STEP_NUMBERS
PLANS = {"open": ([20], [GO]), "plans": ([GO], [PO]), "plan": ([PO], [9]), "close": ([9], [PC])}
HOSTILE = {
    "opens blocks without end": (
        PLANS | {"enough": ([PC], [GC]), "again": (NUMBERS, [GO])},
        {"invalid_block"},
    ),
    "writes plans without end": (PLANS | {"more": ([PC], [PO])}, {"length"}),
    "writes too many plans": (
        PLANS | {"more": ([PC], [PO] * 8 + [GC])},
        {"invalid_block", "malformed", "length"},
    ),
    "never closes a step": (
        PLANS | {"enough": ([PC], [GC]), "on": ([*NUMBERS, 12], [12])},
        {"branch_length"},
    ),
    "repeats </step>": (
        PLANS | {"enough": ([PC], [GC]), "end": ([*NUMBERS, SC], [SC]), "t": ([NL, 17], [SC])},
        {"malformed"},
    ),
    "repeats </step> at once": ({"a": ([20, SC], [SC])}, {"malformed"}),
    "closes what it did not open": ({"a": ([20], [PC, TC])}, {"malformed"}),
    "a takeaway out of nowhere": ({"a": ([20], [TO])}, {"malformed"}),
    "tags inside a step": (
        PLANS | {"enough": ([PC], [GC]), "in": (NUMBERS, [12]), "tag": ([12], [PO, SO, TC])},
        {"malformed"},
    ),
    "a guideline without plans": ({"a": ([20], [GO]), "b": ([GO], [GC])}, {"malformed"}),
    "nothing but padding": ({"a": ([20, 0], [0])}, {"length"}),
    "nothing but the end": ({"a": ([20], [EOS])}, {"stop"}),
}


@pytest.mark.parametrize("name", spread(HOSTILE, test=5))
def test_hostile_answers_end_within_their_budget_and_nothing_else_notices(name):
    follows, reasons = HOSTILE[name]
    table = bigram.chain(**follows, victim=(VICTIM, VICTIM))
    engine = Engine(bigram.model(probabilities=table), CONFIG)
    sampling = SamplingParams(max_tokens=100, seed=7, n=4)
    alone = engine.generate([[23, 24]], sampling)
    engine.drop_prefix_cache()
    requests = engine.submit([[12, 20]], dataclasses.replace(sampling, max_tokens=150, top_p=0.9))
    victims = engine.submit([[23, 24]], sampling)
    answers = {e.request: e.trajectory for e in engine.stream(tokens=False) if e.kind == "finish"}
    for request in requests:
        answer = answers[request]
        assert answer.finish_reason in reasons, answer.detail
        assert len(answer.response_ids) <= 150
    for request, answer in zip(victims, alone, strict=True):
        assert same(answer, answers[request]) == 0
    idle(engine)


@pytest.mark.nightly
def test_a_thousand_plans_end_by_the_budget():
    table = bigram.chain(**HOSTILE["writes plans without end"][0])
    config = dataclasses.replace(CONFIG, lanes=1, pages=260, page_size=16, steps=64)
    (answer,) = Engine(bigram.model(probabilities=table), config).generate(
        [[12, 20]], SamplingParams(max_tokens=3100, temperature=0)
    )
    assert (answer.token_ids == PO).sum() > 1000
    assert answer.finish_reason == "length"


@pytest.mark.slow
def test_pages_that_run_out_preempt_and_change_no_token(report):
    requests = [[12, 13, 20 + i % 3, *range(9, 9 + i % 7)] for i in range(40)]
    sampling = SamplingParams(max_tokens=150, seed=tuple(range(40)))
    nested = model(nested=0.12, eos=0.003)
    roomy = Engine(nested, dataclasses.replace(CONFIG, pages=4000, table_pages=100, lanes=16))
    undisturbed = roomy.generate(requests, sampling)
    largest = max(-(-len(a.token_ids) // CONFIG.page_size) for a in undisturbed)
    largest += max(a.layout.num_branches + 2 * len(a.layout.blocks) for a in undisturbed)
    config = dataclasses.replace(CONFIG, pages=int(1.2 * largest) + 1, table_pages=0, lanes=24)
    tight = Engine(nested, config)
    order = []
    tight.submit(requests, sampling)
    answers = {}
    for event in tight.stream(tokens=False):
        recount(tight.schedulers[0])
        if event.kind == "finish":
            answers[event.request] = event.trajectory
            order.append(event.request)
    ties = sum(same(answer, answers[i]) for i, answer in enumerate(undisturbed))
    depths = [answer.layout.depth for answer in undisturbed]
    preempted = tight.stats()["preemptions"]
    report(f"{preempted} preemptions, {ties} ties, pages {config.pages}, depth {max(depths)}")
    assert preempted >= 200
    assert ties <= 2
    assert max(depths) >= 2
    assert order.index(0) < 20  # the oldest is not the last to be served
    idle(tight)


@pytest.mark.slow
def test_the_same_tokens_whatever_happens_around(report):
    """Lanes, steps, chunks, page sizes, arrival order, aborts, cache state and pressure at once."""
    prompts = [[12, 13, 20], [22], list(range(10, 21)) * 3, [*list(range(10, 21)) * 3, 22]]
    sampling = SamplingParams(n=4, max_tokens=100, seed=(1, 2, 3, 4))
    undisturbed = Engine(model(), CONFIG).generate(prompts, sampling)
    sampled = np.concatenate([a.margin[a.logp != 0] for a in undisturbed])
    rng = np.random.default_rng(0)
    ties = runs = 0
    for attempt in range(examples(3)):
        lanes, steps, size = (int(rng.choice(x)) for x in ((1, 3, 9), (1, 4, 11), (3, 4, 8)))
        config = dataclasses.replace(
            CONFIG,
            lanes=lanes,
            steps=steps,
            page_size=size,
            pages=int(rng.choice((70, 400))),
            header_rows=int(rng.choice((1, 5))),
            prefill_chunk=int(rng.choice((4, 32))),
            attention=("blockwise", "gather")[attempt % 2],
        )
        engine = Engine(model(), config)
        if attempt % 3 == 1:
            engine.generate(prompts, SamplingParams(max_tokens=20))  # a warm cache
        answers = {}
        for i in rng.permutation(len(prompts)).tolist():
            one = dataclasses.replace(sampling, seed=i + 1)
            noise = engine.submit([[20, 21, 22]], SamplingParams(max_tokens=60, n=2, seed=99))
            for sample, request in enumerate(engine.submit([prompts[i]], one)):
                answers[request] = i * sampling.n + sample
        for number, event in enumerate(engine.stream(tokens=False)):
            if number == 5:
                engine.abort(noise[0])
            if event.kind == "finish" and event.request in answers:
                other = event.trajectory
                if other.finish_reason != "pages_exhausted":
                    ties += same(undisturbed[answers[event.request]], other)
                    runs += 1
        idle(engine)
    report(f"{runs} answers, {ties} ties, {len(sampled)} margins: least {sampled.min():.1e}")
    assert runs > 13 * examples(3)
    assert ties <= 2 * examples(3) / 3


@pytest.mark.slow
def test_equal_shapes_give_equal_bits(monkeypatch):
    # Or steps are wider with others, and rows read together with other rows.
    monkeypatch.setattr(EngineConfig, "widths", (CONFIG.lanes,))
    monkeypatch.setattr(tables, "_WORTH", 1 << 20)
    sampling = SamplingParams(n=3, max_tokens=80, seed=(5, 6))
    first = Engine(model(), CONFIG).generate([[12, 20], [22]], sampling)
    engine = Engine(model(), CONFIG)
    engine.submit([[13, 21]], SamplingParams(max_tokens=70, n=5, seed=8))
    requests = engine.submit([[12, 20], [22]], sampling)
    answers = {e.request: e.trajectory for e in engine.stream(tokens=False) if e.kind == "finish"}
    for request, answer in zip(requests, first, strict=True):
        np.testing.assert_array_equal(answer.token_ids, answers[request].token_ids)
        np.testing.assert_array_equal(answer.logp, answers[request].logp)


@pytest.mark.slow
def test_prompts_share_their_pages():
    prefix = list(range(9, 23)) * 4  # 56 tokens, 14 pages
    prompts = [[*prefix, 12, i] for i in range(9, 17)]
    sampling = SamplingParams(n=16, max_tokens=6, parallel=False)
    engine = Engine(model(), dataclasses.replace(CONFIG, lanes=32, pages=900))
    first = engine.generate(prompts, sampling)
    stats = engine.stats()
    # One prompt computes the common pages, every other prompt its own last token before the end.
    assert stats["prefill_tokens"] == len(prefix) + len(prompts)
    assert stats["cached_tokens"] == len(prefix) * (len(prompts) - 1)
    assert stats["pages_cached"] == len(prefix) // CONFIG.page_size
    again = engine.generate(prompts, sampling)
    assert engine.stats()["prefill_tokens"] == stats["prefill_tokens"] + len(prompts)
    for answer, other in zip(first, again, strict=True):
        assert same(answer, other) == 0
    engine.set_params(model().params)
    assert engine.stats()["pages_cached"] == 0
    idle(engine)


@pytest.mark.slow
def test_a_long_prompt_stalls_decoding_for_one_chunk_at_a_time(monkeypatch):
    config = dataclasses.replace(CONFIG, pages=400, lanes=4, header_rows=2)
    engine = Engine(model(eos=0.0, illegal=0.0), config)
    long, visits = list(range(9, 23)) * 12, []
    visit, call = engine._visit, engine.runner._prefill_call

    def counting_visit():
        visits.append([])
        visit()

    def counting_call(work, rows, chunk, *rest):
        pieces = [sum(n for _, n in run) for *_, run in work if not run[0][0].before]
        visits[-1].append((chunk, sum(-(-count // chunk) for count in pieces)))
        call(work, rows, chunk, *rest)

    monkeypatch.setattr(engine, "_visit", counting_visit)
    monkeypatch.setattr(engine.runner, "_prefill_call", counting_call)
    stream = engine.stream([[12, 20]] * 2, SamplingParams(max_tokens=150, parallel=False))
    for number, _ in enumerate(stream):
        if number == 10:
            engine.submit([[*long, 12], [13, *long]], SamplingParams(max_tokens=5, parallel=False))
    chunks = [[n for chunk, n in calls if chunk == config.prefill_chunk] for calls in visits]
    assert max(map(len, chunks)) == 1
    rows = -(-len(long) // config.prefill_chunk)  # of each prompt
    assert sum(map(len, chunks)) == -(-2 * rows // config.prefill_rows)
    assert {n for calls in chunks for n in calls} == {config.prefill_rows}  # no row is empty


@pytest.mark.parametrize(("length", "chunk", "rows"), [(16, 16, 1), (17, 16, 1), (18, 16, 2)])
def test_a_prompt_takes_no_more_rows_than_its_tokens_need(length, chunk, rows):
    # Its pages that others can adopt, and its last tokens, are one run of text.
    config = dataclasses.replace(CONFIG, header_rows=1, header_chunk=1, prefill_chunk=chunk)
    engine = engine_on_fake_device(config)
    prompts = [[9 + i, *[12] * (length - 1)] for i in range(6)]
    for answer in engine.generate(prompts, SamplingParams(max_tokens=3, parallel=False)):
        check_answer(answer)
    assert engine.stats()["prefill_tokens"] == 6 * (length - 1)
    assert engine.stats()["prefill_calls"] == -(-6 * rows // config.prefill_rows)


@pytest.mark.slow
def test_cached_prompts_go_before_answers_are_preempted():
    engine = Engine(model(), dataclasses.replace(CONFIG, pages=41))
    for i in range(9, 17):
        engine.generate([[i] * 40], SamplingParams(max_tokens=5, parallel=False))
    assert engine.stats()["evictions"] > 0
    assert engine.stats()["preemptions"] == 0
    idle(engine)


@pytest.mark.slow
def test_every_key_is_held_once():
    """Held pages = each tree token once, plus less than a page for each branch and trunk segment,
    plus what is reserved for the steps in flight and to come."""
    config = dataclasses.replace(CONFIG, lanes=16, pages=2000, table_pages=200, steps=3)
    engine = Engine(model(nested=0.1, eos=0.002), config)
    stream = engine.stream([[12, 13, 20] * 9], SamplingParams(n=6, max_tokens=200, seed=3))
    checked = 0
    for _ in stream:
        scheduler = engine.schedulers[0]
        tables = [table for request in scheduler.running for table in request.tables()]
        segments = {id(s): s for table in tables for s in table}.values()
        least = sum(-(-len(s.tokens) // config.page_size) for s in segments)
        tokens = sum(len(s.tokens) for s in segments)
        ahead = len(scheduler.bound) * -(-2 * config.steps // config.page_size)
        assert scheduler.pages.num_held <= least + ahead
        assert least * config.page_size <= tokens + len(segments) * (config.page_size - 1)
        checked += bool(tables)
    assert checked > 300


def test_events_tell_the_whole_answer():
    engine = Engine(model(), CONFIG)
    heard = []
    requests = engine.submit(
        [[12, 13, 20]], SamplingParams(n=5, max_tokens=100, seed=1), on_event=heard.append
    )
    events = list(engine.stream())
    assert heard == events
    silent = Engine(model(), CONFIG).generate(
        [[12, 13, 20]], SamplingParams(n=5, max_tokens=100, seed=1)
    )
    forks = 0
    for request, undisturbed in zip(requests, silent, strict=True):
        own = [event for event in events if event.request == request]
        answer = own[-1].trajectory
        assert [event.kind for event in own].count("finish") == 1
        np.testing.assert_array_equal(answer.token_ids, undisturbed.token_ids)
        lines = {}
        for event in own:
            if event.kind == "token":
                lines.setdefault(event.branch, []).append(event)
        # Depth-first: a line's tokens, with those of its branches where it forked.
        cuts = {}
        for i, event in enumerate(own):
            if event.kind == "fork":
                earlier = [e.kind for e in own[:i] if e.branch == event.branch]
                block, before = earlier.count("fork"), earlier.count("token")
                cuts[event.branch, before] = (block, event.branches)
                forks += 1

        def walk(branch, lines=lines, cuts=cuts):
            tokens = lines.get(branch, [])
            for i in range(len(tokens) + 1):
                if (branch, i) in cuts:
                    block, count = cuts[branch, i]
                    for number in range(count):
                        yield from walk((*branch, (block, number)))
                if i < len(tokens):
                    yield tokens[i]

        flat = list(walk(()))
        assert [e.token_id for e in flat] == answer.response_ids.tolist()
        np.testing.assert_allclose([e.logp for e in flat], answer.logp[answer.prompt_len :])
        assert [e.forced for e in flat] == answer.forced[answer.prompt_len :].tolist()
    assert forks > 3
    idle(engine)


def test_an_aborted_request_frees_everything_at_once():
    engine = Engine(model(eos=0.001), CONFIG)
    first, second = engine.submit([[12, 20]], SamplingParams(n=2, max_tokens=100, seed=4))
    events, aborted = [], False
    for event in engine.stream():
        events.append(event)
        if len(events) == 30 and not aborted:
            held = engine.schedulers[0].pages.num_held
            assert engine.abort(first)
            assert not engine.abort(first)
            recount(engine.schedulers[0])
            assert engine.schedulers[0].pages.num_held < held
            aborted = True
    ends = {e.request: e.trajectory for e in events if e.kind == "finish"}
    assert ends[first].finish_reason == "aborted"
    assert ends[second].finish_reason != "aborted"
    idle(engine)


@pytest.mark.slow
def test_a_request_that_waits_can_be_aborted():
    engine = Engine(model(), dataclasses.replace(CONFIG, lanes=1))
    requests = engine.submit([[12, 20]] * 3, SamplingParams(max_tokens=30))
    assert engine.abort(requests[2])
    answers = {e.request: e.trajectory for e in engine.stream() if e.kind == "finish"}
    assert answers[requests[2]].finish_reason == "aborted"
    assert len(answers[requests[2]].response_ids) == 0
    assert len(answers) == 3
    idle(engine)


class Broken:
    """A tokenizer that fails at one token."""

    def decode(self, ids, **_):
        if 16 in ids:
            raise RuntimeError("no such piece")
        return " ".join(map(str, ids))

    def convert_ids_to_tokens(self, token):
        return str(token)


def test_a_failure_in_one_request_stays_there():
    def fail(event):
        if event.kind == "token":
            raise KeyError("callback")

    calm = Engine(model(), CONFIG).generate([[12, 20]], SamplingParams(n=3, max_tokens=60, seed=2))
    engine = Engine(model(), CONFIG)
    broken = engine.submit([[12, 21]], SamplingParams(max_tokens=60, n=2), on_event=fail)
    late = engine.submit(
        [[13]], SamplingParams(max_tokens=9), on_event=lambda e: {}[e.kind] if e.trajectory else 0
    )
    good = engine.submit([[12, 20]], SamplingParams(n=3, max_tokens=60, seed=2))
    answers = {e.request: e.trajectory for e in engine.stream() if e.kind == "finish"}
    for request in (*broken, *late):
        assert answers[request].finish_reason == "error"
        assert "KeyError" in answers[request].detail
    for request, answer in zip(good, calm, strict=True):
        assert same(answer, answers[request]) == 0
    idle(engine)
    engine = Engine(dataclasses.replace(model(), tokenizer=Broken()), CONFIG)
    for tokens in (True, False):
        requests = engine.submit([[12, 20]], SamplingParams(n=8, max_tokens=60, seed=2))
        ends = {e.request: e.trajectory for e in engine.stream(tokens=tokens) if e.kind == "finish"}
        reasons = [ends[request].finish_reason for request in requests]
        assert "error" in reasons
        assert set(reasons) - {"error"}
        for request in requests:
            if ends[request].finish_reason != "error":
                assert ends[request].text is not None
    idle(engine)


def test_bad_requests_are_refused_and_the_batch_goes_on():
    calm = Engine(model(), CONFIG).generate([[12, 20]], SamplingParams(n=2, max_tokens=40, seed=2))
    engine = Engine(model(), CONFIG)
    good = engine.submit([[12, 20]], SamplingParams(n=2, max_tokens=40, seed=2))
    bad = {
        "empty": [],
        "holds -1": [12, -1],
        "holds 40": [12, 40],
        "holds 1.5": [12, 1.5],
        "holds 'a'": ["a"],
        "holds True": [True],
        "is int, needed": 7,
        "is bytes, needed": b"12",
        "is NoneType, needed": None,
        "max_position is 4096": [12] * 4096,
    }
    answers, tried = {}, 0
    for event in engine.stream():
        if tried < len(bad):
            match, prompt = list(bad.items())[tried]
            held = engine.schedulers[0].pages.num_held
            with pytest.raises(ValueError, match=rf"prompt 1 .*{match}"):
                engine.submit([[12], prompt])
            with pytest.raises(ValueError, match="stop_token_ids holds 99"):
                engine.submit([[12]], SamplingParams(stop_token_ids=(99,)))
            assert engine.schedulers[0].pages.num_held == held
            tried += 1
        if event.kind == "finish":
            answers[event.request] = event.trajectory
    assert tried == len(bad)
    assert set(answers) == set(good)  # nothing of a refused call was queued
    for request, answer in zip(good, calm, strict=True):
        assert same(answer, answers[request]) == 0
    idle(engine)


def test_requests_may_come_while_others_run():
    engine = Engine(model(), CONFIG)
    sampling = SamplingParams(max_tokens=60, seed=3)
    (alone,) = Engine(model(), CONFIG).generate([[22]], sampling)
    late = None
    answers = {}
    for event in engine.stream([[12, 20]], SamplingParams(n=4, max_tokens=60)):
        if late is None:
            (late,) = engine.submit([[22]], sampling)
        if event.kind == "finish":
            answers[event.request] = event.trajectory
    assert len(answers) == 5
    assert same(alone, answers[late]) == 0
    (early,) = engine.submit([[22]], sampling)
    assert len(engine.generate([[12, 20]], SamplingParams(max_tokens=30))) == 1
    (kept,) = [e for e in engine.stream() if e.kind == "finish"]  # generate took only its own
    assert kept.request == early and same(alone, kept.trajectory) == 0


@pytest.mark.slow
def test_weights_are_swapped_between_batches_only():
    other = bigram.model(seed=1)
    engine = Engine(model(), CONFIG)
    engine.warmup()
    stream = engine.stream([[12, 20]], SamplingParams(n=2, max_tokens=50))
    next(stream)
    with pytest.raises(RuntimeError, match="2 answers are unfinished"):
        engine.set_params(other.params)
    stream.close()
    engine.set_params(other.params)
    before = engine.stats()["compilations"]
    swapped = engine.generate([[12] * 30], SamplingParams(max_tokens=50, seed=1))
    assert engine.stats()["compilations"] == before
    fresh = Engine(other, CONFIG).generate([[12] * 30], SamplingParams(max_tokens=50, seed=1))
    np.testing.assert_array_equal(swapped[0].token_ids, fresh[0].token_ids)


def test_statistics_add_up_and_are_written(tmp_path):
    engine = Engine(model(), CONFIG)
    answers = engine.generate([[12, 20] * 10], SamplingParams(n=4, max_tokens=60))
    stats = engine.stats()
    assert stats["sampled_tokens"] == sum(a.stats["sampled"] for a in answers)
    assert stats["forks"] >= stats["joins"] > 0
    assert stats["pages_free"] + stats["pages_cached"] == CONFIG.pages - 1
    assert stats["lanes_busy"] == stats["unfinished"] == stats["pages_held"] == 0
    assert 0 < stats["host_us_per_visit"] < 1e6 * stats["seconds"]
    assert 0 <= stats["device_wait_share"] < 1
    for _ in range(2):
        engine.write_stats(tmp_path / "stats.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "stats.jsonl").read_text().splitlines()]
    assert len(rows) == 2 and rows[0]["forks"] == stats["forks"] and rows[0]["time"] > 0
