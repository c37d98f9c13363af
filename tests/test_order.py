"""Who starts when: what does not fit holds up nothing that does, and is not passed for ever."""

import dataclasses

import numpy as np
import pytest
from conftest import examples
from engine_checks import recount
from fake_device import CONFIGS, engine_on_fake_device

from npr_jax.decode import SamplingParams
from npr_jax.decode import scheduler as module
from npr_jax.decode.scheduler import Scheduler

CONFIG = dataclasses.replace(CONFIGS[0], lanes=6, pages=40)  # of 4 tokens


pytestmark = pytest.mark.usefixtures("plans_without_numbers")


def prompt_of(length: int, first: int) -> list[int]:
    return [9 + (first + i * (1 + first % 5)) % 14 for i in range(length)]


@pytest.mark.parametrize("patience", [2, module.PATIENCE])
def test_no_answer_is_passed_more_often_than_the_bound(monkeypatch, patience):
    monkeypatch.setattr(module, "PATIENCE", patience)
    start, passed, largest = Scheduler._start, {}, []

    def watched(self, request):
        older = [other for other in self.waiting if other.id < request.id]
        started = start(self, request)
        for other in older if started else ():
            passed[other.id] = passed.get(other.id, 0) + 1
        return started

    monkeypatch.setattr(Scheduler, "_start", watched)
    rng = np.random.default_rng(0)
    for _ in range(examples(5)):
        passed.clear()
        engine, asked, answers = engine_on_fake_device(CONFIG), {}, {}
        for _ in range(12):
            for number in rng.integers(0, 255, rng.integers(1, 6)).tolist():
                prompt = prompt_of(int(rng.choice([2, 6, 90])), number)
                sampling = SamplingParams(max_tokens=20 + number % 30, seed=number)
                (request,) = engine.submit([prompt], sampling)
                asked[request] = prompt, sampling
            for _ in range(int(rng.integers(1, 6))):
                if engine._requests:
                    engine._visit()
                recount(engine.schedulers[0])
        events = engine.stream(tokens=False)
        answers = {e.request: e.trajectory for e in events if e.kind == "finish"}
        assert sorted(answers) == sorted(asked)
        largest.append(max(passed.values(), default=0))
        alone = engine_on_fake_device(dataclasses.replace(CONFIG, pages=600, lanes=1))
        for request, (prompt, sampling) in asked.items():
            (expected,) = alone.generate([prompt], sampling)
            if answers[request].finish_reason != "pages_exhausted":
                np.testing.assert_array_equal(answers[request].token_ids, expected.token_ids)
    assert max(largest) <= patience
    assert max(largest) == patience if patience == 2 else max(largest) > 2


def test_what_does_not_fit_holds_up_nothing_that_does():
    engine = engine_on_fake_device(CONFIG)
    sampling = SamplingParams(max_tokens=40, parallel=False)
    engine.submit([prompt_of(90, 0)], sampling)
    engine._visit()
    large, small = engine.submit([prompt_of(90, 1), prompt_of(3, 2)], sampling)
    engine._visit()
    running = {request.id for request in engine.schedulers[0].running}
    assert small in running and large not in running
    assert len(engine.generate([prompt_of(3, 5)], sampling)) == 1
    engine.abort()
    recount(engine.schedulers[0])
