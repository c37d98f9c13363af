"""Many coroutines on one engine: each gets what it would get alone, and whatever happens to one, or
to the engine, nobody waits for ever and nothing is held."""

import asyncio
import dataclasses
import time

import bigram
import numpy as np
import pytest
from engine_checks import recount
from fake_device import CONFIGS, PROMPTS, check_answer, engine_on_fake_device

from npr_jax.decode import SamplingParams
from npr_jax.decode.async_engine import AsyncEngine, Full, Stopped

CONFIG = dataclasses.replace(CONFIGS[0], pages=60)
LONG = SamplingParams(max_tokens=160, parallel=False)
MANY = [[10, 12], [17], [12, 16], [18, 12], [12, 22]]  # whose lines are long


pytestmark = pytest.mark.usefixtures("plans_without_numbers")


def run(coroutine):
    """Its result; what hangs fails."""
    return asyncio.run(asyncio.wait_for(coroutine, 60))


def idle(engine) -> None:
    for scheduler in engine.schedulers:
        recount(scheduler)
        assert not scheduler.num_requests and not scheduler.pages.num_held


async def all_of(answers) -> list:
    return [event for events in [some async for some in answers] for event in events]


def finished(events) -> list:
    return [event.trajectory for event in events if event.kind == "finish"]


def test_everyone_gets_what_it_would_get_alone():
    rng = np.random.default_rng(0)
    asked = [
        (
            PROMPTS[int(rng.integers(len(PROMPTS)))],
            SamplingParams(n=int(rng.integers(1, 4)), seed=i, max_tokens=60),
        )
        for i in range(30)
    ]
    engine = engine_on_fake_device(CONFIG)

    async def one(server, number):
        await asyncio.sleep(0.002 * (number % 7))
        prompt, sampling = asked[number]
        async with await server.submit([prompt], sampling) as answers:
            return answers.requests, await all_of(answers)

    async def everyone():
        async with AsyncEngine(engine) as server:
            found = await asyncio.gather(*(one(server, i) for i in range(len(asked))))
            assert server.num_unfinished == 0 and server.healthy
        assert not server.healthy and server.error is None
        return found

    found = run(everyone())
    idle(engine)
    alone = engine_on_fake_device(CONFIG)
    for (prompt, sampling), (requests, events) in zip(asked, found, strict=True):
        assert {event.request for event in events} == set(requests)
        answers = {e.request: e.trajectory for e in events if e.kind == "finish"}
        for request, expected in zip(requests, alone.generate([prompt], sampling), strict=True):
            np.testing.assert_array_equal(answers[request].token_ids, expected.token_ids)
            told = [e for e in events if e.request == request and e.kind == "token"]
            assert len(told) == len(expected.response_ids)
            check_answer(answers[request])


def test_a_visit_is_told_in_one_call(monkeypatch):
    engine, calls = engine_on_fake_device(CONFIG), []

    async def everyone():
        loop = asyncio.get_running_loop()
        call = loop.call_soon_threadsafe

        def counted(do, *arguments):
            calls.append(do)
            return call(do, *arguments)

        monkeypatch.setattr(loop, "call_soon_threadsafe", counted)
        async with AsyncEngine(engine) as server:
            answers = await asyncio.gather(*(server.submit([p], LONG) for p in MANY))
            events = await asyncio.gather(*map(all_of, answers))
            told = [do for do in calls if do == server._hear]
            assert 1 < len(told) <= engine.stats()["visits"] < sum(map(len, events)) / 8

    run(everyone())


def test_who_leaves_aborts_its_answers_alone():
    engine = engine_on_fake_device(CONFIG)

    async def leave(server):
        async with await server.submit([MANY[0]], dataclasses.replace(LONG, n=3)) as answers:
            async for _ in answers:
                break
        return await all_of(answers)

    async def stay(server):
        async with await server.submit([MANY[2]], LONG) as answers:
            return await all_of(answers)

    async def everyone():
        async with AsyncEngine(engine) as server:
            left, stayed = await asyncio.gather(leave(server), stay(server))
            assert server.num_unfinished == 0
            return left, stayed

    left, stayed = run(everyone())
    assert {answer.finish_reason for answer in finished(left)} == {"aborted"}
    assert finished(stayed)[0].finish_reason != "aborted"
    idle(engine)


def test_who_is_cancelled_while_asking_leaves_nothing(monkeypatch):
    engine, aborted = engine_on_fake_device(CONFIG), []
    abort = engine.abort

    def recorded(request=None):
        aborted.append(request)
        return abort(request)

    monkeypatch.setattr(engine, "abort", recorded)

    async def everyone():
        async with AsyncEngine(engine) as server:
            for prompt in ([*MANY[0]], [10**6]):  # one that is taken, one that is refused
                task = asyncio.create_task(server.submit([prompt], LONG))
                await asyncio.sleep(0)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            while server.num_unfinished:
                await asyncio.sleep(0.01)
            assert len(aborted) == 1  # it did not run to its end

    run(everyone())
    idle(engine)


def test_what_cannot_be_done_is_refused_as_by_the_engine():
    engine = engine_on_fake_device(CONFIG)

    async def everyone():
        async with AsyncEngine(engine, max_requests=4) as server:
            with pytest.raises(ValueError, match="outside the vocabulary"):
                await server.submit([[10**6]], LONG)
            assert server.num_unfinished == 0
            many = dataclasses.replace(LONG, n=3)
            async with await server.submit([MANY[0]], many):
                with pytest.raises(Full, match=r"3 answers .* 2 more .* max_requests=4"):
                    await server.submit([MANY[0]], dataclasses.replace(LONG, n=2))
                async with await server.submit([MANY[1]], LONG) as answers:
                    assert finished(await all_of(answers))

    run(everyone())
    idle(engine)


def test_an_engine_with_answers_of_others_is_refused():
    engine = engine_on_fake_device(CONFIG)
    engine.submit([MANY[0]], LONG)

    async def ask():
        async with AsyncEngine(engine) as server:
            answers = await server.submit([MANY[1]], LONG)
            return answers.requests, await all_of(answers)

    with pytest.raises(RuntimeError, match="1 answers of the engine are unfinished"):
        run(ask())
    engine.abort()  # whose finish nobody takes out
    requests, events = run(ask())
    assert {event.request for event in events} == set(requests)
    idle(engine)


@pytest.mark.parametrize("failing", [1, 2, 3, 7, 12])
@pytest.mark.parametrize("call", ["decode", "prefill"])
def test_a_failure_ends_every_answer_with_its_reason(call, failing):
    engine, calls = engine_on_fake_device(CONFIG), []
    steps = engine.runner._steps

    def fail(*arguments):
        calls.append(call)
        if len(calls) == failing:
            raise RuntimeError("the device is gone")
        return getattr(steps, call)(*arguments)

    engine.runner._steps = engine.runner._prompt_steps = steps._replace(**{call: fail})

    async def everyone():
        async with AsyncEngine(engine) as server:
            asked = (
                server.submit([p], dataclasses.replace(LONG, seed=i))
                for i, p in enumerate(MANY * 4)
            )
            asked = await asyncio.gather(*asked, return_exceptions=True)
            # Those that come when it has failed hear of it in another way.
            answers = [some for some in asked if not isinstance(some, Stopped)]
            late = [some for some in asked if isinstance(some, Stopped)]
            assert answers and all(some.__cause__ is server.error for some in late)
            events = await asyncio.gather(*map(all_of, answers))
            assert "the device is gone" in str(server.error) and not server.healthy
            with pytest.raises(Stopped) as refused:
                await server.submit([MANY[0]], LONG)
            assert refused.value.__cause__ is server.error
            return events

    events = run(everyone())
    found = [answer for some in events for answer in finished(some)]
    assert len(found) == len(events)
    ended = [answer for answer in found if answer.finish_reason == "error"]
    assert ended and all("the device is gone" in answer.detail for answer in ended)
    idle(engine)


def test_new_weights_come_between_answers():
    # The device fails where an entry of other weights is read.
    engine = engine_on_fake_device(CONFIG)
    begun = bigram.model().params
    norm = np.asarray(begun["final_norm"])
    params = [dict(begun, final_norm=np.full_like(norm, norm[0] + i)) for i in (1, 2)]

    async def ask(server, prompt, seed):
        async with await server.submit([prompt], dataclasses.replace(LONG, seed=seed)) as answers:
            (answer,) = finished(await all_of(answers))
            assert answer.finish_reason in ("stop", "length")
            return answers.version

    async def everyone():
        async with AsyncEngine(engine) as server:
            tasks, versions = [], []
            for number in range(12):
                prompt = MANY[number % len(MANY)]
                tasks.append(asyncio.create_task(ask(server, prompt, number)))
                await asyncio.sleep(0.005)
                if number in (3, 7):
                    swap = server.set_params(params[number // 4])
                    versions.append(asyncio.create_task(swap))
                    await asyncio.sleep(0)
            with pytest.raises(ValueError, match="final_norm"):
                await server.set_params(dict(params[0], final_norm=np.zeros(3, np.float32)))
            return await asyncio.gather(*versions), await asyncio.gather(*tasks)

    versions, answered = run(everyone())
    assert versions == [1, 2]
    assert answered == [0] * 4 + [1] * 4 + [2] * 4
    idle(engine)


@pytest.mark.parametrize("drain", [0.0, 30.0])
def test_it_stops_with_or_without_its_last_answers(drain):
    engine = engine_on_fake_device(CONFIG)

    async def everyone():
        server = AsyncEngine(engine)
        await server.__aenter__()
        answers = [await server.submit([prompt], LONG) for prompt in MANY]
        stopping = asyncio.create_task(server.stop(drain))
        await asyncio.sleep(0)
        with pytest.raises(Stopped):
            await server.submit([MANY[0]], LONG)
        events = await asyncio.gather(*map(all_of, answers))
        await stopping
        await server.stop()  # again does no harm
        return [answer.finish_reason for some in events for answer in finished(some)]

    reasons = run(everyone())
    assert len(reasons) == len(MANY)
    assert ("aborted" in reasons) == (drain == 0)
    idle(engine)


def slow(engine, monkeypatch):
    """Its visits take so long that something can happen between them."""
    step = engine.step
    monkeypatch.setattr(engine, "step", lambda: (time.sleep(0.03), step())[1])


def test_who_leaves_while_new_weights_are_waited_for_is_forgotten(monkeypatch):
    engine = engine_on_fake_device(CONFIG)
    slow(engine, monkeypatch)

    async def everyone():
        async with AsyncEngine(engine) as server:
            first = await server.submit([MANY[0]], LONG)
            swap = asyncio.create_task(server.set_params(dict(bigram.model().params)))
            task = asyncio.create_task(server.submit([MANY[2]], LONG))
            await server.stats()  # the thread knows of both
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await server.stats()
            assert server.num_unfinished <= 1 and not swap.done()
            (answer,) = finished(await all_of(first))
            await swap
            assert engine.stats()["sampled_tokens"] == len(answer.response_ids)

    run(everyone())
    idle(engine)


def test_figures_can_be_asked_for_until_the_end_and_after_it():
    engine = engine_on_fake_device(CONFIG)

    async def everyone():
        server = AsyncEngine(engine)
        async with server:
            answers = await server.submit([MANY[0]], LONG)
            stopping = asyncio.create_task(server.stop(30))
            await asyncio.sleep(0)
            assert (await server.stats())["unfinished"] == 1
            await all_of(answers)
            await stopping
        assert (await server.stats())["pages_held"] == 0

    run(everyone())


def test_a_second_stop_shortens_the_first(monkeypatch):
    engine = engine_on_fake_device(CONFIG)
    slow(engine, monkeypatch)

    async def everyone():
        async with AsyncEngine(engine) as server:
            answers = await server.submit([MANY[0]], LONG)
            stopping = asyncio.create_task(server.stop(60))
            await asyncio.sleep(0)
            await server.stop()
            await stopping
            (answer,) = finished(await all_of(answers))
            assert answer.finish_reason == "aborted"

    run(everyone())


def test_an_engine_that_cannot_even_abort_leaves_nobody_waiting(monkeypatch):
    engine = engine_on_fake_device(CONFIG)

    def fail(*_):
        raise RuntimeError("all is lost")

    async def everyone():
        async with AsyncEngine(engine) as server:
            answers = await server.submit([MANY[0]], LONG)
            monkeypatch.setattr(engine, "step", fail)
            monkeypatch.setattr(engine, "abort", fail)
            with pytest.raises(Stopped) as found:
                await all_of(answers)
            assert "all is lost" in str(found.value.__cause__)
            assert server.num_unfinished == 0 and not server.healthy

    run(everyone())
