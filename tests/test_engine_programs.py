"""Random programs of submit, visit, abort, preempt and forget on a device in plain Python, under
all rules of fork, join and positions."""

import dataclasses
from collections import Counter

import fake_device
import numpy as np
import pytest
from conftest import examples
from fake_device import (
    CONFIGS,
    OPERATIONS,
    PROMPTS,
    SOME_RULES,
    Device,
    engine_on_fake_device,
    run_program,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from npr_jax.decode import SamplingParams
from npr_jax.decode.pages import PagePool
from npr_jax.decode.scheduler import Scheduler

PROGRAMS = examples(1000)
operation = st.tuples(st.sampled_from(OPERATIONS), st.integers(0, 255))


pytestmark = pytest.mark.usefixtures("plans_without_numbers")


def test_random_programs_keep_every_page_right(report):
    seen = Counter()

    @settings(
        max_examples=PROGRAMS, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(st.sampled_from(CONFIGS), SOME_RULES, st.lists(operation, min_size=8, max_size=30))
    def programs(config, rules, program):
        config = dataclasses.replace(config, rules=rules)
        stats = run_program(config, [("submit", 77), *program])
        seen.update({"programs": 1} | {k: int(v) for k, v in stats.items() if v == int(v)})

    programs()
    counted = "programs", "visits", "forks", "joins", "preemptions", "evictions"
    counted += "from_the_middle", "copied"
    report(", ".join(f"{seen[name]} {name}" for name in counted))
    assert seen["programs"] >= PROGRAMS and seen["from_the_middle"] > PROGRAMS / 20
    if PROGRAMS >= 500:  # of few programs hardly one comes to a join that hides something
        assert seen["copied"] > PROGRAMS
    if PROGRAMS >= 2000:  # a few programs have most evictions, so fewer say nothing
        names = "forks", "joins", "preemptions", "evictions", "cached_tokens", "ends_aborted"
        for name in (*names, "aborts_by_callbacks"):
            assert seen[name] > PROGRAMS / 20, name


@pytest.mark.parametrize("most", [1, 2])
def test_no_block_lies_deeper_than_max_depth(most):
    engine = engine_on_fake_device(dataclasses.replace(CONFIGS[0], pages=600, max_depth=most))
    prompts = [[*PROMPTS[n % len(PROMPTS)], 9 + n // 5 % 14] for n in range(60)]
    answers = engine.generate(prompts, SamplingParams(max_tokens=90))
    assert max(answer.layout.depth for answer in answers) == most
    assert any(f"nested {most + 1} deep, at most {most}" in answer.detail for answer in answers)


def test_a_request_has_limits_of_its_own():
    """Each of several in one engine; a block beyond them goes on as text, or ends the answer."""
    config = dataclasses.replace(CONFIGS[0], pages=600)
    prompts = [[*PROMPTS[n % len(PROMPTS)], 9 + n // 5 % 14] for n in range(40)]
    for mode in ("end", "sequential"):
        engine = engine_on_fake_device(dataclasses.replace(config, on_invalid_block=mode))
        ids = {
            (branches, depth): engine.submit(
                prompts, SamplingParams(max_tokens=90, max_branches=branches, max_depth=depth)
            )
            for branches, depth in ((None, None), (2, None), (None, 1), (None, 0), (1, 2))
        }
        done = {e.request: e.trajectory for e in engine.stream(tokens=False) if e.kind == "finish"}
        for (branches, depth), requests in ids.items():
            answers = [done[request] for request in requests]
            most = config.max_branches if branches is None else branches
            deepest = config.max_depth if depth is None else depth
            widths = [len(b.steps) for answer in answers for b in answer.layout.blocks]
            assert max((a.layout.depth for a in answers), default=0) <= deepest
            assert max(widths, default=0) <= most
            assert bool(widths) == (deepest > 0)
            reasons = {a.finish_reason for a in answers}
            refused = [text for a in answers for text in a.stats["refused_blocks"]]
            refused += [a.detail for a in answers if a.finish_reason == "invalid_block"]
            if mode == "sequential":
                assert "invalid_block" not in reasons
            if branches is not None:
                assert any(f"plans, at most {branches}" in text for text in refused)
            if depth == 0:
                assert any("nested 1 deep, at most 0" in text for text in refused)


def test_a_limit_above_that_of_the_engine_is_refused_by_name():
    engine = engine_on_fake_device(CONFIGS[0])
    with pytest.raises(ValueError, match=r"max_branches is 5, engine.max_branches is 4: raise it"):
        engine.submit([[12]], SamplingParams(max_branches=5))
    with pytest.raises(ValueError, match=r"max_depth is 4, engine.max_depth is 3: raise it"):
        engine.submit([[12]], SamplingParams(max_depth=4))


def faults():
    """Mistakes that the programs must notice."""

    def drop_too_early(self, pages):
        PAGE_DROP(self, pages)
        for page in pages[:1]:
            if self.refs[page] > 0:
                self._free.append(page)

    def forget_to_hold(self, page):
        self.refs[page] += 0

    def hold_once_too_few(self, table):
        for segment in table[:-1]:
            segment.refs += 1
        table[-1].refs += 1 if len(table) < 3 else 0

    def keep_reserved(self, sequence):
        self._free_lane(sequence)
        sequence.tail.pages = sequence.tail.pages[:1]

    yield PagePool, "drop", drop_too_early
    yield PagePool, "hold", forget_to_hold
    yield Scheduler, "hold", hold_once_too_few
    yield Scheduler, "release", keep_reserved


PAGE_DROP = PagePool.drop


@pytest.mark.parametrize(
    "owner, name, fault", list(faults()), ids=lambda x: getattr(x, "__name__", x)
)
def test_the_programs_notice_a_fault(monkeypatch, owner, name, fault):
    monkeypatch.setattr(owner, name, fault)
    rng = np.random.default_rng(0)
    with pytest.raises((AssertionError, ValueError, IndexError, KeyError)):
        for _ in range(60):
            picks = rng.integers(0, 256, (25, 2))
            program = [(OPERATIONS[a % len(OPERATIONS)], int(b)) for a, b in picks]
            run_program(CONFIGS[0], [("submit", 77), *program])


def test_the_programs_notice_a_wrong_fill(monkeypatch):
    seen = Device._seen

    def all_slots(self, rows, r, rank):
        tokens, positions = seen(self, rows, r, rank)
        return (tokens[1:], positions[1:]) if len(tokens) > 9 else (tokens, positions)

    monkeypatch.setattr(Device, "_seen", all_slots)
    with pytest.raises(AssertionError):
        for value in range(20):
            run_program(CONFIGS[0], [("submit", 77 + value)])


def test_lanes_that_wait_for_pages_stop_no_other(monkeypatch):
    """A visit ends when too few lanes are at work: those that cannot be do not count."""
    engine = engine_on_fake_device(dataclasses.replace(CONFIGS[0], pages=600))
    scheduler = engine.schedulers[0]
    sampling = SamplingParams(max_tokens=60, parallel=False)
    oldest, *others = engine.submit([[12, 13, 20]] * 4, sampling)
    grow = scheduler._grow

    def only_the_oldest(sequence, steps):
        known = len(sequence.tail.tokens) == 1
        return grow(sequence, steps if sequence.request.id == oldest else known and 1)

    monkeypatch.setattr(scheduler, "_grow", only_the_oldest)
    monkeypatch.setattr(fake_device, "draw", lambda tokens, positions: 20)
    for _ in range(60):
        if oldest not in engine._requests:
            break
        engine._visit()
    assert oldest not in engine._requests and set(engine._requests) == set(others)
