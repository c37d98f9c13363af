"""The scheduler as a state machine, against a small plain model, on a device in plain Python.

Hypothesis picks the rules: submit (with callbacks that abort, submit or raise), abort, visits,
preempt, swap weights, drop the cache, close the stream, a device that fails. What the table of the
fake device draws makes the forks and joins. The model knows who is unfinished and what an
undisturbed answer is; every count is recounted after each rule. Rules of fork, join and positions
are drawn too.

The sample in `make test` has one seed, the long run in `make nightly` a new one each time. A
failure names it: NPR_SEED=... pytest tests/test_engine_machine.py -m "" runs the same again.
"""

import contextlib
import dataclasses
import functools
import os
from collections import Counter

import bigram
import numpy as np
import pytest
from engine_checks import recount
from fake_device import CONFIGS, PROMPTS, SOME_RULES, check_answer, engine_on_fake_device
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from npr_jax.decode import SamplingParams
from npr_jax.decode.pages import PagePool
from npr_jax.decode.scheduler import Scheduler

ACTS = ("nothing", "abort", "abort another", "submit", "raise")


pytestmark = pytest.mark.usefixtures("plans_without_numbers")


def sampling_of(config, size: int, n: int = 1) -> SamplingParams:
    budget = min(90, (config.pages - 8) * config.page_size - 20)
    return SamplingParams(n=n, max_tokens=budget - size * budget // 9)


def prompt_of(number: int) -> list[int]:
    return [*PROMPTS[number % len(PROMPTS)], 9 + number // 5 % 14]


@functools.cache
def undisturbed(config, number: int, size: int):
    """The answer of an engine that does nothing else and has room."""
    roomy = dataclasses.replace(config, pages=600, table_pages=config.pages - 1)
    (answer,) = engine_on_fake_device(roomy).generate(
        [prompt_of(number)], sampling_of(config, size)
    )
    return answer


@dataclasses.dataclass
class Asked:
    """What the model knows of a request."""

    number: int  # of its prompt
    size: int  # of its budget
    act: str
    at: int  # the event at which it acts
    heard: list = dataclasses.field(default_factory=list)
    end: str | None = None  # the only reason that may be


class Machine(RuleBasedStateMachine):
    happened: Counter

    @initialize(config=st.sampled_from(CONFIGS), rules=SOME_RULES)
    def begin(self, config, rules):
        self.config = dataclasses.replace(config, rules=rules)
        self.engine = engine_on_fake_device(self.config)
        self.scheduler = self.engine.schedulers[0]
        self.asked: dict[int, Asked] = {}
        self.unfinished: set[int] = set()
        self.stream = None
        self.weights = 1
        self.failing = False
        self.wrong: list[AssertionError] = []  # found in callbacks, whose errors the engine keeps
        self.ask(77, 0, 3, "nothing", 0)

    def ask(self, number, size, n, act, at):
        asked = Asked(number, size, act, at)
        requests = self.engine.submit(
            [prompt_of(number)], sampling_of(self.config, size, n), self.hear
        )
        for request in requests:
            assert request not in self.asked
            self.asked[request] = dataclasses.replace(asked, heard=[])
        self.unfinished |= set(requests)

    def hear(self, event):
        """Every callback."""
        try:
            self.told(event)
        except AssertionError as error:
            self.wrong.append(error)

    def told(self, event):
        """The model is told, and may act."""
        asked = self.asked[event.request]
        assert event.request in self.unfinished
        assert event.kind == "finish" or asked.end is None, "more than a finish after the end"
        asked.heard.append(event)
        if event.kind == "finish":
            self.unfinished.remove(event.request)
            self.judge(asked, event.trajectory)
        if len(asked.heard) == asked.at:
            self.happened[asked.act] += 1
            getattr(self, "do_" + asked.act.replace(" ", "_"))(event.request, asked)

    def do_nothing(self, request, asked):
        pass

    def do_abort(self, request, asked):
        asked.end = "aborted"
        assert self.engine.abort(request) == (request in self.unfinished)

    def do_abort_another(self, request, asked):
        others = [other for other in self.unfinished if self.asked[other].end is None]
        if others:
            self.abort(max(others))

    def do_submit(self, request, asked):
        self.ask(asked.number + 1, asked.size, 1, "nothing", 0)

    def do_raise(self, request, asked):
        if asked.heard[-1].kind != "finish":
            # Its finish is no longer told to it.
            self.unfinished.remove(request)
        raise KeyError("of the caller")

    def judge(self, asked, answer):
        self.happened[answer.finish_reason] += 1
        if self.failing and answer.finish_reason in ("error", "aborted"):
            return
        if answer.finish_reason == "error" or asked.end:
            assert answer.finish_reason == asked.end
            return
        check_answer(answer)
        calm = undisturbed(self.config, asked.number, asked.size)
        if answer.finish_reason != "pages_exhausted":
            assert answer.finish_reason == calm.finish_reason
            np.testing.assert_array_equal(answer.token_ids, calm.token_ids)
        tokens = [event.token_id for event in asked.heard if event.kind == "token"]
        assert sorted(tokens) == sorted(answer.response_ids.tolist())
        joins = sum(event.kind == "join" for event in asked.heard)
        assert joins == sum(block.takeaway is not None for block in answer.layout.blocks)

    def abort(self, request):
        self.asked[request].end = "aborted"
        assert self.engine.abort(request)
        assert not self.engine.abort(request)

    @rule(
        number=st.integers(0, 60),
        size=st.integers(0, 7),
        n=st.integers(1, 3),
        act=st.sampled_from(ACTS),
        at=st.integers(1, 25),
    )
    def submit(self, number, size, n, act, at):
        self.ask(number, size, n, act, at)

    @rule(events=st.integers(1, 400), tokens=st.booleans())
    def listen(self, events, tokens):
        if self.stream is None:
            self.stream = self.engine.stream(tokens=tokens)
        for _ in range(events):
            if next(self.stream, None) is None:
                self.stream = None
                assert not self.unfinished
                return

    @rule(pick=st.integers(0, 255))
    def abort_one(self, pick):
        if self.unfinished:
            self.abort(sorted(self.unfinished)[pick % len(self.unfinished)])

    @rule(pick=st.integers(0, 255))
    def preempt(self, pick):
        running = self.scheduler.running
        if running:
            self.scheduler._preempt(running[pick % len(running)])

    @rule()
    def drop_the_cache(self):
        self.engine.drop_prefix_cache()

    @rule()
    def swap_weights(self):
        params = bigram.model().params
        new = params | {"final_norm": params["final_norm"] * 0 + self.weights + 1}
        if self.unfinished:
            with pytest.raises(RuntimeError, match="are unfinished"):
                self.engine.set_params(new)
        elif self.stream is None:
            self.engine.set_params(new)
            self.weights += 1

    @rule(number=st.integers(0, 60))
    def generate(self, number):
        """Others go on beside it, or it is refused beside a stream."""
        prompts, sampling = [prompt_of(number)], sampling_of(self.config, 5)
        if self.stream is not None:
            with pytest.raises(RuntimeError, match="already running a stream"):
                self.engine.generate(prompts, sampling)
            return
        (answer,) = self.engine.generate(prompts, sampling)
        if answer.finish_reason != "pages_exhausted":
            calm = undisturbed(self.config, number, 5)
            np.testing.assert_array_equal(answer.token_ids, calm.token_ids)

    @precondition(lambda self: self.stream is not None)
    @rule(rarely=st.integers(0, 3))
    def close(self, rarely):
        if rarely:
            return
        for request in self.unfinished:
            self.asked[request].end = self.asked[request].end or "aborted"
        before = set(self.unfinished)
        self.stream.close()
        self.stream = None
        assert not before & self.unfinished

    @precondition(lambda self: self.unfinished and self.stream is None)
    @rule(rarely=st.integers(0, 3))
    def the_device_fails(self, rarely):
        if rarely:
            return
        runner = self.engine.runner
        steps = runner._steps

        def fail(*_):
            raise MemoryError("no more")

        runner._steps = runner._prompt_steps = steps._replace(prefill=fail, decode=fail)
        self.failing = True
        with contextlib.suppress(MemoryError):  # what is pending may have been the end of all
            list(self.engine.stream())
        runner._steps = runner._prompt_steps = steps
        self.failing = False
        assert self.scheduler.pages.num_held == 0

    @invariant()
    def counts_add_up(self):
        if self.wrong:
            raise self.wrong[0]
        recount(self.scheduler)
        known = {request for request in self.engine._requests if request in self.asked}
        assert known == self.unfinished
        held = {request.id for request in self.scheduler.running + self.scheduler.waiting}
        assert held == self.unfinished

    def teardown(self):
        if not hasattr(self, "engine"):
            return
        for _ in range(4):  # a callback may have asked for more at the last finish
            if self.stream is None:
                self.stream = self.engine.stream(tokens=False)
            for _ in self.stream:
                pass
            self.stream = None
        if self.wrong:
            raise self.wrong[0]
        assert not self.unfinished, "somebody starved"
        recount(self.scheduler)
        assert self.scheduler.pages.num_held == 0
        stats = self.engine.stats()
        for name in ("forks", "joins", "preemptions", "evictions", "cached_tokens", "visits"):
            self.happened[name] += int(stats[name])


def run(number: int, examples: int, steps: int, phases=tuple(Phase)) -> Counter:
    number = int(os.environ.get("NPR_SEED", number))
    machine = seed(number)(type("Machine", (Machine,), {"happened": Counter()}))
    options = settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        database=None,
        phases=phases,
        suppress_health_check=list(HealthCheck),
    )
    try:
        run_state_machine_as_test(machine, settings=options)
    except BaseException as error:
        error.add_note(f"again: NPR_SEED={number}")
        raise
    return machine.happened


@pytest.mark.slow
def test_the_engine_is_as_the_model_says(report):
    happened = run(4, 20, 30, (Phase.generate,))
    report(", ".join(f"{n} {name}" for name, n in sorted(happened.items())))
    for name in ("forks", "joins", "cached_tokens", "aborted"):
        assert happened[name] > 0, name
    assert sum(happened[act] for act in ACTS) > 0


@pytest.mark.nightly
def test_the_engine_is_as_the_model_says_for_long(report):
    happened = run(int.from_bytes(os.urandom(4), "little"), 3000, 60)
    report(", ".join(f"{n} {name}" for name, n in sorted(happened.items())))
    for name in ("forks", "joins", "preemptions", "evictions", "cached_tokens", "aborted", *ACTS):
        assert happened[name] > 0, name


def faults():
    """Mistakes that the machine must notice."""
    drop = PagePool.drop

    def hold_too_few(self, table):
        for segment in table[:-1] if len(table) > 2 else table:
            segment.refs += 1

    def free_too_early(self, pages):
        drop(self, pages)
        self._free += [page for page in pages[:1] if self.refs[page] > 0]

    def forget_nothing(self):
        pass

    yield Scheduler, "hold", hold_too_few
    yield PagePool, "drop", free_too_early
    yield PagePool, "forget", forget_nothing


@pytest.mark.parametrize(
    "owner, name, fault", list(faults()), ids=lambda x: getattr(x, "__name__", x)
)
def test_the_machine_notices_a_fault(monkeypatch, owner, name, fault):
    monkeypatch.setattr(owner, name, fault)
    with pytest.raises((AssertionError, ExceptionGroup, IndexError, KeyError)):
        run(1, 25, 25, (Phase.generate,))
