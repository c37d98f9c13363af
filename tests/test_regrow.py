"""Answers that go on from where they were left end as if they had never been left."""

import dataclasses

import bigram
import jax
import numpy as np
import pytest
from conftest import examples
from engine_checks import CONFIG, recount, same
from fake_device import CONFIGS, PROMPTS, RULES, engine_on_fake_device

from npr_jax.decode import Engine, SamplingParams
from npr_jax.decode.regrow import Begun

KINDS = (
    SamplingParams(max_tokens=90),
    SamplingParams(max_tokens=40, parallel=False),
)


pytestmark = pytest.mark.usefixtures("plans_without_numbers")


def in_pieces(engine, prompts, sampling, rng, share=0.3):
    """Answers that are left at random visits, and go on in new calls until they end; how often."""
    begun, rounds = [None] * (len(prompts) * sampling.n), 0
    while True:
        lasting = {i: left for i, left in enumerate(begun) if left is None or open_(left)}
        if not lasting:
            return begun, rounds

        def watch(lengths, finished, last=rounds > 30):
            unfinished = [i for i, done in enumerate(finished) if not done]
            return [i for i in unfinished if not last and rng.random() < share]

        numbers = sorted(lasting)
        found = engine.generate(
            [prompts[i // sampling.n] for i in numbers],
            dataclasses.replace(sampling, seed=tuple(7 + i // sampling.n for i in numbers)),
            samples=[range(i % sampling.n, i % sampling.n + 1) for i in numbers],
            watch=watch,
            begun=[left and Begun(left) for left in map(lasting.get, numbers)],
        )
        for i, answer in zip(numbers, found, strict=True):
            begun[i] = answer
        rounds += 1


def open_(answer):
    return answer.finish_reason == "aborted"


def whole(engine, prompts, sampling):
    seeds = tuple(range(7, 7 + len(prompts)))
    return engine.generate(prompts, dataclasses.replace(sampling, seed=seeds))


def equal(ours, theirs):
    for name in ("token_ids", "logp", "logp_sampled", "margin", "forced"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))
    assert (ours.layout.positions == theirs.layout.positions).all()
    assert ours.layout.blocks == theirs.layout.blocks
    assert (ours.finish_reason, ours.detail) == (theirs.finish_reason, theirs.detail)
    assert ours.stats["refused_blocks"] == theirs.stats["refused_blocks"]


@pytest.mark.parametrize("kind", range(len(KINDS)))
@pytest.mark.parametrize("number", range(len(CONFIGS)))
def test_answers_that_were_left_end_as_others(number, kind):
    left_and_whole(CONFIGS[number], number, kind)


@pytest.mark.parametrize("number", range(1, len(RULES)))
def test_under_any_rules_too(number):
    left_and_whole(dataclasses.replace(CONFIGS[0], rules=RULES[number]), number, 0)


def left_and_whole(config, number, kind):
    config = dataclasses.replace(config, pages=max(200, config.pages))
    sampling = dataclasses.replace(KINDS[kind], n=2)
    rng, left = np.random.default_rng(number), 0
    for first in range(0, max(4, examples(32)), 4):
        prompts = [[*PROMPTS[n % len(PROMPTS)], 9 + n % 14] for n in range(first, first + 4)]
        engine = engine_on_fake_device(config)
        ours, rounds = in_pieces(engine, prompts, sampling, rng)
        theirs = whole(engine_on_fake_device(config), prompts, sampling)
        for one, other in zip(ours, theirs, strict=True):
            if other.finish_reason != "pages_exhausted":
                equal(one, other)
        recount(engine.schedulers[0])
        left += rounds - 1
    assert left > 0


def test_blocks_were_left_everywhere():
    """In the guideline, in a branch beside one that has ended, nested, and behind a join."""
    config = dataclasses.replace(CONFIGS[0], pages=600, max_depth=3)
    places = set()
    rng = np.random.default_rng(3)
    for n in range(80):
        prompts = [[*PROMPTS[n % len(PROMPTS)], 9 + n % 14]]
        engine = engine_on_fake_device(config)
        seen = []

        def watch(lengths, finished, engine=engine, seen=seen):
            request = next(iter(engine._requests.values()))
            if rng.random() < 0.06:
                lines = list(request.growing())
                deepest = max((line.depth for line in lines), default=0)
                forks = [item for item in request.trunk.items if hasattr(item, "branches")]
                if forks and not forks[-1].joined:
                    done = any(branch.done for branch in forks[-1].branches)
                    seen.append("beside one that has ended" if done else "all grow")
                elif forks:
                    seen.append("behind a join")
                elif request.trunk.automaton.stack:
                    seen.append("in the guideline")
                if deepest > 1:
                    seen.append("nested")
                return [0]
            return []

        sampling = SamplingParams(max_tokens=90, seed=(7,))
        (answer,) = engine.generate(prompts, sampling, watch=watch)
        if open_(answer):
            places |= {*seen}
            (ours,) = engine.generate(prompts, sampling, begun=[Begun(answer)])
            equal(ours, *whole(engine_on_fake_device(config), prompts, sampling))
    assert places >= {
        "beside one that has ended",
        "all grow",
        "behind a join",
        "in the guideline",
        "nested",
    }


def test_blocks_that_were_refused_are_refused_again():
    """They are plain text from then on, and the answer says why."""
    config = dataclasses.replace(
        CONFIGS[0], pages=600, max_branches=2, on_invalid_block="sequential"
    )
    prompts = [[*PROMPTS[n % len(PROMPTS)], 9 + n % 14] for n in range(60)]
    ours, rounds = in_pieces(
        engine_on_fake_device(config), prompts, KINDS[0], np.random.default_rng(1), share=0.1
    )
    theirs = whole(engine_on_fake_device(config), prompts, KINDS[0])
    for one, other in zip(ours, theirs, strict=True):
        equal(one, other)
    assert rounds > 3 and sum(len(one.stats["refused_blocks"]) for one in ours) > 3


@pytest.mark.parametrize("rules", [RULES[0], RULES[-1]], ids=lambda rules: rules.join)
def test_a_pause_is_the_same_whatever_the_schedule(rules):
    prompts = [[*PROMPTS[n % len(PROMPTS)], 9 + n % 14] for n in range(24)]
    paused_and_whole(rules, prompts)


def paused_and_whole(rules, prompts):
    """Answers that grow by nine tokens a call, on engines with other lanes, visits and pages."""
    roomy = dataclasses.replace(CONFIGS[0], pages=600, max_depth=3, rules=rules)
    narrow = dataclasses.replace(roomy, lanes=2, steps=1, page_size=3)
    wide = dataclasses.replace(roomy, lanes=16, steps=7)
    sampling = SamplingParams(max_tokens=90)

    def pieces(config):
        """What counts of each answer after each call; then the answers."""
        answers, begun, told = {}, dict.fromkeys(range(len(prompts))), []
        for limit in range(9, 200, 9):
            found = engine_on_fake_device(config).generate(
                [prompts[i] for i in begun],
                dataclasses.replace(sampling, seed=tuple(7 + i for i in begun)),
                begun=[*begun.values()],
                pause=[limit] * len(begun),
            )
            for i, answer in zip([*begun], found, strict=True):
                counts = answer.layout.path_positions < answer.prompt_len + limit
                told.append((limit, i, answer.token_ids[counts & ~answer.forced].tolist()))
                if not open_(answer) and answer.stats["critical_path"] <= limit:
                    answers[i] = answer
                    del begun[i]
                else:
                    begun[i] = Begun(answer, limit)
            if not begun:
                return told, [answers[i] for i in range(len(prompts))]
        raise AssertionError("they do not end")

    told, answers = pieces(narrow)
    assert told[-1][0] > 36 and pieces(wide)[0] == told
    others = whole(engine_on_fake_device(wide), prompts, SamplingParams(max_tokens=90))
    for one, other in zip(answers, others, strict=True):
        equal(one, other)
    return answers


def test_what_was_begun_elsewhere_is_refused():
    engine = engine_on_fake_device(CONFIGS[0])
    prompts = [[*PROMPTS[n % len(PROMPTS)], 9 + n % 14] for n in range(20)]

    def watch(lengths, finished):
        return [i for i, length in enumerate(lengths) if length > 3 and not finished[i]]

    left = engine.generate(prompts, SamplingParams(max_tokens=60), watch=watch)
    number = next(i for i, answer in enumerate(left) if open_(answer))
    first, second, answer = prompts[number], prompts[number - 1], left[number]
    with pytest.raises(ValueError, match="begun: answer 0 goes on from an answer to another"):
        engine.generate([second], SamplingParams(max_tokens=60), begun=[Begun(answer)])
    other = engine_on_fake_device(dataclasses.replace(CONFIGS[0], rules=RULES[-1]))
    with pytest.raises(ValueError, match=r"from an answer with the rules Rules.*'all'"):
        other.generate([first], SamplingParams(max_tokens=60), begun=[Begun(answer)])
    with pytest.raises(ValueError, match="does not grow so here"):
        engine.generate([first], SamplingParams(max_tokens=2), begun=[Begun(answer)])
    assert engine.stats()["unfinished"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, {"repetition_penalty": 1.3, "top_p": 0.9}], ids=str)
def test_the_real_engine_goes_on_with_the_same_answers(report, more):
    engine = Engine(bigram.model(), CONFIG)
    prompts = [[12, 13, 20, 9, 15, 11, 10, 14, 21, 9 + n] for n in range(6)]
    sampling = SamplingParams(max_tokens=70, n=2, **more)
    theirs = whole(engine, prompts, sampling)
    ours, rounds = in_pieces(engine, prompts, sampling, np.random.default_rng(0), share=0.2)
    ties = sum(same(other, one) for one, other in zip(ours, theirs, strict=True))
    report(f"{len(ours)} answers in {rounds} calls, {ties} ties")
    assert rounds > 2 and ties <= 2
    assert more or sum(one.layout.num_branches for one in ours) > 4


@pytest.mark.slow
def test_they_go_on_at_any_replica(report):
    mesh = jax.make_mesh((4, 1), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    engine = Engine(bigram.model(), dataclasses.replace(CONFIG, lanes=3), mesh)
    prompts = [[12, 13, 20, 9, 15, 11, 10, 14, 21, 9 + n] for n in range(6)]
    sampling = SamplingParams(max_tokens=70, n=2)
    theirs = whole(Engine(bigram.model(), CONFIG), prompts, sampling)
    ours, rounds = in_pieces(engine, prompts, sampling, np.random.default_rng(1), share=0.2)
    ties = sum(same(other, one) for one, other in zip(ours, theirs, strict=True))
    report(f"{len(ours)} answers in {rounds} calls, {ties} ties")
    assert rounds > 2 and ties <= 2
    for scheduler in engine.schedulers:
        recount(scheduler)
        assert scheduler.pages.num_held == 0
