"""Blocks of trials: the first that ends with a result, told in tokens, cuts the others off, whoever
draws faster; and what the engine writes is what a parser reads."""

import dataclasses
import functools

import bigram
import fake_device
import numpy as np
import pytest
from bigram import GC, GO, NL, PC, PO, SC, SO, TAGS, TC, TO
from conftest import examples, spread
from engine_checks import recount, same
from fake_device import CONFIGS, FAILURE, TRIAL, TRIALS, check_answer, engine_on_fake_device
from hypothesis import given, settings
from hypothesis import strategies as st
from test_engine_rules import ASKED, CONFIG, gap
from test_regrow import equal, in_pieces, paused_and_whole, whole

from npr_jax.base.config import load_config
from npr_jax.decode import Engine, SamplingParams
from npr_jax.train import beta, papo, zero
from npr_jax.train.packing import loss_mask
from npr_jax.tree import Rules, TraceError, layout, parse
from npr_jax.tree.format import check_format

RULES, ALL = TRIALS[0], Rules()
PROMPTS = [[12, 13, 9 + n % 14, 20 + n % 3] for n in range(max(90, examples(90)))]
SAMPLING = SamplingParams(max_tokens=160)
ROOMY = dataclasses.replace(CONFIGS[0], pages=800)


pytestmark = pytest.mark.usefixtures("plans_without_numbers")


def table(**rates):
    """Of answers most blocks of which are trials, half of whose steps fail."""
    found = bigram.table(**rates)
    found[PO], found[PC] = 0, 0
    found[PO, [TRIAL, 10]] = 0.85, 0.15
    found[PC, [PO, GC]] = 0.62, 0.38
    found[FAILURE, SC] = 0.6  # half of the steps end with it
    return found


@pytest.fixture
def drawn(monkeypatch):
    """What the fake device draws from."""
    probabilities = table(eos=0.006, nested=0.006, end_step=0.12, illegal=0.002)
    monkeypatch.setattr(fake_device, "_TABLE", np.cumsum(probabilities, axis=1))


def name(rules) -> str:
    return f"{rules.join} {rules.fork} {rules.positions}"


def joined(answer):
    """Of every joined block of trials: the block, its steps' tokens in the engine's form, and how
    many the shortest with a result has, or None; by hand."""
    ids = answer.token_ids.tolist()
    for block in answer.layout.blocks:
        plans = [ids[start:end] for start, end in block.plans]
        if block.takeaway is None or not all(TRIAL in plan for plan in plans):
            continue
        steps = [ids[start:end] for start, end in block.branches]
        lengths = []
        for (_, end), step in zip(block.steps, steps, strict=True):
            said = [token for token in step[4:-1] if token != NL]
            if not answer.forced[end - 1] and said and said[-1] != FAILURE:
                lengths.append(len(step))
        yield block, steps, min(lengths, default=None)


def check_trials(answers) -> int:
    """Steps are cut where they must be and nowhere else; how many."""
    cut = 0
    for answer in answers:
        for block, steps, first in joined(answer):
            for (_, end), step in zip(block.steps, steps, strict=True):
                assert step[-1] == SC and SC not in step[:-1] and GO not in step
                closed_by_engine = bool(answer.forced[end - 1])
                cut += closed_by_engine
                if first is None:
                    assert not closed_by_engine
                elif closed_by_engine:
                    assert len(step) == first + 1
                else:
                    assert len(step) <= first
                assert not loss_mask(answer.layout)[end - 1] or not closed_by_engine
    return cut


def test_the_first_result_cuts_the_others_off_there(drawn, report):
    """Step by step what the branches of an `all` join are, as far as they count."""
    ours = engine_on_fake_device(dataclasses.replace(ROOMY, rules=RULES)).generate(
        PROMPTS, SAMPLING
    )
    theirs = engine_on_fake_device(ROOMY).generate(PROMPTS, SAMPLING)
    blocks = shorter = last = 0
    assert check_trials(ours) > 10
    for one, other in zip(ours, theirs, strict=True):
        check_answer(one)
        whole, own = [*joined(other)], [*joined(one)]
        if not (whole and own and whole[0][0] == other.layout.blocks[0]):
            continue
        _, steps, first = whole[0]
        if any(GO in step for _, steps, _ in whole for step in steps):
            continue
        blocks += 1
        cuts = [first is not None and len(step) > first for step in steps]
        expected = [[*s[:first], SC] if c else s for s, c in zip(steps, cuts, strict=True)]
        assert own[0][1] == expected
        shorter += any(cuts)
        rest = all(first in (None, max(map(len, steps))) for _, steps, first in whole)
        if rest and all(block.takeaway for block in other.layout.blocks):
            # The winners are the last.
            last += any(first and len(steps) > 1 for _, steps, first in whole)
            np.testing.assert_array_equal(one.token_ids, other.token_ids)
            np.testing.assert_array_equal(one.layout.positions, other.layout.positions)
            np.testing.assert_array_equal(one.layout.hidden, other.layout.hidden)
            np.testing.assert_array_equal(one.forced, other.forced)
            np.testing.assert_array_equal(one.logp, other.logp)
            assert (one.finish_reason, one.detail) == (other.finish_reason, other.detail)
    report(f"{blocks} blocks, {shorter} with steps that are cut, {last} whose winner is the last")
    assert blocks > 15 and shorter > 3 and last > 2


def test_a_trial_that_ends_badly_has_no_result(monkeypatch):
    """Its answer ends, but its siblings run on as they would, up to a result."""
    probabilities = table(eos=0.006, nested=0.0, end_step=0.12, illegal=0.08)
    monkeypatch.setattr(fake_device, "_TABLE", np.cumsum(probabilities, axis=1))
    ours, theirs = (
        engine_on_fake_device(dataclasses.replace(ROOMY, rules=r)).generate(PROMPTS, SAMPLING)
        for r in (RULES, ALL)
    )
    seen = 0
    for one, other in zip(ours, theirs, strict=True):
        found = []
        for answer in (one, other):
            block, ids = next(iter(answer.layout.blocks), None), answer.token_ids.tolist()
            plans = [ids[start:end] for start, end in block.plans] if block else []
            if block and block.takeaway is None and RULES.of_trials(plans):
                found.append([ids[start:end] for start, end in block.branches])
        steps = found[-1] if found else []
        if len(found) < 2 or len(steps) < 2 or any(GO in step for step in steps):
            continue
        ends = [len(s) for s in steps if s[-1] == SC and s[-2] not in (FAILURE, *s[:4])]
        first = min(ends, default=999)
        assert found[0] == [s if len(s) <= first else [*s[:first], SC] for s in steps]
        seen += 1
    assert seen > 0


@pytest.mark.parametrize("number", [0, 2])
@pytest.mark.parametrize("rules", spread([TRIALS[0], TRIALS[-1], *TRIALS[1:-1]], 1, 2), ids=name)
def test_answers_do_not_depend_on_pages_lanes_visits_and_preemption(rules, number, drawn):
    config = dataclasses.replace(CONFIGS[number], rules=rules)
    calm = engine_on_fake_device(dataclasses.replace(config, pages=800)).generate(PROMPTS, SAMPLING)
    for lanes, steps in ((1, 1), (2, 7), (16, 3)):
        other = dataclasses.replace(config, pages=800, lanes=lanes, steps=steps)
        alike(calm, engine_on_fake_device(other).generate(PROMPTS, SAMPLING))
    rng, done = np.random.default_rng(number), []
    made = engine_on_fake_device(dataclasses.replace(config, pages=150))
    (scheduler,) = made.schedulers
    asked = made.submit(PROMPTS, SAMPLING)
    while made._requests:
        if scheduler.running and rng.random() < 0.15:
            scheduler._preempt(scheduler.running[int(rng.integers(len(scheduler.running)))])
        done += [e for e in made.step() if e.kind == "finish"]
        recount(scheduler)
    assert scheduler.pages.num_held == 0
    done = {event.request: event.trajectory for event in done}
    alike(calm, [done[request] for request in asked])
    assert check_trials(calm) > 10
    sampled = sum(answer.stats["sampled"] for answer in done.values())
    assert made.stats()["sampled_tokens"] == sampled


def alike(answers, others):
    for answer, other in zip(answers, others, strict=True):
        check_answer(other)
        if other.finish_reason == "pages_exhausted":
            continue
        np.testing.assert_array_equal(answer.token_ids, other.token_ids)
        np.testing.assert_array_equal(answer.forced, other.forced)
        assert (answer.finish_reason, answer.detail) == (other.finish_reason, other.detail)
        assert answer.layout.blocks == other.layout.blocks


def test_everybody_hears_of_what_stays_and_of_nothing_else(drawn):
    made = engine_on_fake_device(dataclasses.replace(ROOMY, rules=RULES, pages=120))
    told, trajectories = {}, {}
    for event in made.stream(PROMPTS, SAMPLING):
        if event.kind == "token":
            lines = told.setdefault(event.request, {})
            lines.setdefault(event.branch, []).append((event.token_id, event.forced))
        elif event.kind == "finish":
            trajectories[event.request] = event.trajectory
    assert check_trials(trajectories.values()) > 10
    for request, answer in trajectories.items():
        lines = told.get(request, {})
        pairs = zip(answer.token_ids.tolist(), answer.forced.tolist(), strict=True)
        found = sorted(pair for line in lines.values() for pair in line)
        assert found == sorted([*pairs][answer.prompt_len :])
        for number, block in enumerate(b for b in answer.layout.blocks if b.depth == 0):
            for branch, (start, end) in enumerate(block.branches):
                nested = any(start <= b.start < end for b in answer.layout.blocks)
                own = answer.token_ids[start:end].tolist()
                assert nested or [token for token, _ in lines[(number, branch),]] == own


def test_what_is_cut_off_is_freed(drawn):
    """Once the trunk goes on, nothing is held that it does not see."""
    made = engine_on_fake_device(dataclasses.replace(ROOMY, rules=RULES, steps=9))
    (scheduler,) = made.schedulers
    seen = 0
    for prompt in PROMPTS:
        made.submit([prompt], SAMPLING)
        while made._requests:
            made._visit()
            for request in made._requests.values():
                trunk = request.trunk
                if trunk.lane is not None and trunk.ready and len(trunk.segments) > 2:
                    listed = sum(len(segment.pages) for segment in trunk.table)
                    assert scheduler.pages.num_held == listed
                    size = scheduler.config.page_size
                    for segment in trunk.table[:-1]:
                        assert len(segment.pages) == -(-len(segment.tokens) // size)
                    seen += 1
        made._outputs.events.clear()
    assert seen > 20


def test_a_parser_reads_the_same_layout(drawn):
    answers = engine_on_fake_device(dataclasses.replace(ROOMY, rules=RULES)).generate(
        PROMPTS, SAMPLING
    )
    read = []
    for answer in answers:
        try:
            parse(answer.token_ids, answer.prompt_len, TAGS)
        except TraceError:
            continue
        tree = parse(answer.token_ids, answer.prompt_len, TAGS, rules=RULES)
        for field in ("positions", "hidden", "pred", "forced"):
            np.testing.assert_array_equal(getattr(tree, field), getattr(answer.layout, field))
        assert tree.blocks == answer.layout.blocks
        read += [answer] if check_trials([answer]) else []
    assert len(read) > 5
    made = engine_on_fake_device(dataclasses.replace(ROOMY, rules=RULES))
    again = made.replay([(answer.token_ids, answer.prompt_len) for answer in read])
    for one, other in zip(read, again, strict=True):
        np.testing.assert_array_equal(one.token_ids, other.token_ids)
        np.testing.assert_array_equal(one.forced, other.forced)
        assert other.layout.blocks == one.layout.blocks and check_trials([other])


@pytest.mark.parametrize("rules", [TRIALS[0], TRIALS[-1]], ids=name)
def test_answers_that_were_left_end_as_others(rules, drawn):
    config = dataclasses.replace(ROOMY, rules=rules)
    made, rng = engine_on_fake_device(config), np.random.default_rng(0)
    ours, rounds = in_pieces(made, PROMPTS[:40], SAMPLING, rng)
    theirs = whole(engine_on_fake_device(config), PROMPTS[:40], SAMPLING)
    for one, other in zip(ours, theirs, strict=True):
        equal(one, other)
    recount(made.schedulers[0])
    assert rounds > 3 and check_trials(ours) > 3


def test_a_pause_is_the_same_whatever_the_schedule(drawn):
    assert check_trials(paused_and_whole(RULES, PROMPTS[:40])) > 3


bodies = st.lists(st.sampled_from([12, FAILURE, NL, 14]), max_size=6)


def written(steps, trials):
    """A whole answer with these steps, of trials or not, behind one prompt token."""
    ids = [20, GO]
    for number in range(len(steps)):
        ids += [PO, TRIAL if trials or number else 10, 11, PC]
    return [*ids, GC, *(t for step in steps for t in step), *TAGS.takeaway_header, 17, TC, 20]


@given(st.lists(bodies, min_size=1, max_size=4), st.booleans())
@settings(max_examples=examples(100), deadline=None)
def test_a_parser_accepts_a_cut_trial_and_only_that(bodies, trials):
    steps = [[*TAGS.step_headers[i], *body, SC] for i, body in enumerate(bodies)]
    said = [[t for t in body if t != NL] for body in bodies]
    good = [s for s, x in zip(steps, said, strict=True) if x and x[-1] != FAILURE]
    first = min(map(len, good), default=99) if trials else 99
    over = [len(step) > first for step in steps]
    cut = [[*step[:first], SC] if long else step for step, long in zip(steps, over, strict=True)]
    ids = written(cut, trials)
    tree, plain = parse(ids, 1, TAGS, rules=RULES), parse(ids, 1, TAGS)
    closed = [bool(tree.forced[end - 1]) for _, end in tree.blocks[0].steps]
    assert closed == over
    differ = np.flatnonzero(tree.forced != plain.forced)
    assert differ.tolist() == [
        e - 1 for (_, e), long in zip(tree.blocks[0].steps, over, strict=True) if long
    ]
    np.testing.assert_array_equal(tree.positions, plain.positions)
    np.testing.assert_array_equal(tree.hidden, plain.hidden)
    if any(len(step) > first + 1 for step in steps):
        with pytest.raises(TraceError, match=f"goes on behind token {first}, where the first one"):
            parse(written(steps, trials), 1, TAGS, rules=RULES)


def test_no_block_is_inside_a_trial():
    inner = [GO, PO, 10, PC, GC, *TAGS.step_headers[0], 12, SC, *TAGS.takeaway_header, 17, TC]
    step = [*TAGS.step_headers[0], *inner, 14, SC]
    assert parse(written([step], False), 1, TAGS, rules=RULES).depth == 2 or TRIAL
    with pytest.raises(TraceError, match="token 11: a block inside a trial"):
        parse(written([step], True), 1, TAGS, rules=RULES)


def test_the_format_lets_a_cut_trial_be_empty():
    def decode(ids):
        names = {4: "1:", 5: "2:", TRIAL: "t", 10: "1: a", 11: "2: b", NL: "\n", 20: "\\boxed{1}"}
        return "".join(names.get(token, "x") for token in ids)

    tags = dataclasses.replace(TAGS, decode=decode)
    ids = [20, GO, PO, 10, TRIAL, PC, PO, 11, TRIAL, PC, GC]
    short, empty = [*TAGS.step_headers[0], 12, SC], [*TAGS.step_headers[1], NL, NL, SC]
    ids += [*short, *empty, *TAGS.takeaway_header, 17, TC, 20]
    assert check_format(ids, 1, tags, rules=RULES) == []
    (broken,) = check_format(ids, 1, tags)
    assert broken.kind == "empty_step"
    longer = [*ids]
    longer.insert(longer.index(SC) + 6, NL)
    (broken,) = check_format(longer, 1, tags, rules=RULES)
    assert broken.kind == "tree" and "goes on behind token 6" in broken.reason


@functools.cache
def model():
    return bigram.model(probabilities=table(eos=0.0, nested=0.0, end_step=0.25, illegal=0.0))


@functools.cache
def sampled(rules, **changes):
    """Answers, and how often one was preempted."""
    made = Engine(model(), dataclasses.replace(CONFIG, rules=rules, **changes))
    answers = made.generate(ASKED, dataclasses.replace(SAMPLING, n=6, seed=(1, 2, 3)))
    assert made.schedulers[0].pages.num_held == 0
    return answers, made.stats()["preemptions"]


@pytest.mark.parametrize("rules", spread([TRIALS[0], TRIALS[-1], *TRIALS[1:-1]], 1, 3), ids=name)
def test_log_probs_are_those_of_one_forward(rules, monkeypatch, report):
    monkeypatch.setattr("test_engine_rules.model", model)
    answers, _ = sampled(rules)
    report(f"{check_trials(answers)} cut")
    assert check_trials(answers) > 3 and gap(answers) < 1e-4
    again = Engine(model(), dataclasses.replace(CONFIG, rules=rules)).replay(answers)
    assert gap(again) < 1e-4
    for answer, other in zip(answers, again, strict=True):
        np.testing.assert_array_equal(answer.forced, other.forced)
        np.testing.assert_allclose(answer.logp, other.logp, atol=1e-4)
    others, preempted = sampled(rules, pages=60, table_pages=0)
    assert preempted
    kept = [(a, b) for a, b in zip(answers, others, strict=True)]
    kept = [(a, b) for a, b in kept if b.finish_reason != "pages_exhausted"]
    assert len(kept) > 6 and sum(same(a, b) for a, b in kept) < 3 and gap(others) < 1e-4


def test_what_does_not_go_together_is_refused():
    with pytest.raises(ValueError, match="trial is 9 and failure None, needed are both"):
        Rules(trial=9)
    with pytest.raises(ValueError, match="trial is '', needed is a text of one token"):
        Rules(trial="", failure=3)
    with pytest.raises(ValueError, match=r"on_invalid_block is 'sequential' and rules.trial 9"):
        dataclasses.replace(ROOMY, rules=RULES, on_invalid_block="sequential")
    for rules, message in (
        (Rules(trial=40, failure=13), "engine.rules.trial is 40, needed is the id of a token"),
        (
            Rules(trial=9, failure=SC),
            "failure is 37, the tag </step>: needed is a token that",
        ),
        (Rules(trial=SO, failure=13), "trial is 36, the tag <step>: needed is a token that plans"),
        (Rules(trial=9, failure=NL), "failure is 3, which is white space"),
        (Rules(trial="T", failure=13), "trial is 'T', but there is no tokenizer"),
    ):
        with pytest.raises(ValueError, match=message):
            engine_on_fake_device(dataclasses.replace(ROOMY, rules=rules))
    made = engine_on_fake_device(dataclasses.replace(ROOMY, rules=RULES))
    with pytest.raises(ValueError, match=r"stop is \['x'\] and engine.rules.trial 9: set stop"):
        made._maker.tokenizer = object()  # none is asked
        made._maker.check([12], SamplingParams(stop=("x",)), "prompt 0")
    for cls, preset in (
        (zero.ZeroConfig, "tiny_zero"),
        (papo.PapoConfig, "tiny_papo"),
        (beta.BetaConfig, "tiny_beta"),
    ):
        with pytest.raises(ValueError, match=r"engine.rules.trial is 't', needed is null"):
            load_config(cls, preset, ["engine.rules={trial: t, failure: none}"])


def test_without_a_joined_block_nothing_is_cut():
    """Blocks that are left open are laid out as they stand."""
    ids = written([[*TAGS.step_headers[0], 12, SC], [*TAGS.step_headers[1], 12, 12, 12, SC]], True)
    open_ = ids[: ids.index(TO)]
    tree = parse(open_[:-1], 1, TAGS, allow_open=True, rules=RULES)
    np.testing.assert_array_equal(tree.forced, parse(open_[:-1], 1, TAGS, allow_open=True).forced)
    assert layout(len(ids), tree.blocks, 1).rules == ALL
