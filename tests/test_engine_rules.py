"""Rules of fork, join and positions in the engine: what it computes is one forward over the whole
text under the layout's hidden intervals, whoever else is there, and what is hidden is freed."""

import dataclasses
import functools

import bigram
import engine_checks
import fake_device
import jax
import numpy as np
import pytest
from bigram import GC, GO, PC, PO, SC, TAGS, TC
from conftest import examples, spread
from engine_checks import recount, same
from fake_device import CONFIGS, PROMPTS, RULES, check_answer, engine_on_fake_device

from npr_jax.decode import Engine, SamplingParams
from npr_jax.decode.replay import replayed_request
from npr_jax.decode.scheduler import Scheduler
from npr_jax.model import token_logp
from npr_jax.train.packing import Example, loss_mask, make_rows
from npr_jax.tree import Rules, layout, parse

CONFIG = dataclasses.replace(engine_checks.CONFIG, pages=400, table_pages=128)
ASKED = [[12, 13, 20], [22], list(range(10, 21)) * 3]
SAMPLING = SamplingParams(n=4, max_tokens=120, seed=(1, 2, 3))
MARKER, DEPTH = RULES[-1].marker, 14
HIDING = [rules for rules in RULES if rules.hide and rules.positions == "max"]
STRICTEST = Rules("last", "fresh", "sum", MARKER)


pytestmark = pytest.mark.usefixtures("plans_without_numbers")


def name(rules) -> str:
    return f"{rules.join} {rules.fork} {rules.positions}"


@functools.cache
def model():
    return bigram.model(eos=0.0, illegal=0.0, nested=0.1)


def engine(rules, **changes) -> Engine:
    return Engine(model(), dataclasses.replace(CONFIG, rules=rules, **changes))


@functools.cache
def sampled(rules):
    return engine(rules).generate(ASKED, SAMPLING)


@functools.partial(jax.jit, static_argnums=0)
def score(config, params, rows):
    layout = (rows[name] for name in ("tokens", "positions", "hidden", "pred"))
    return token_logp(config, params, *layout)


def gap(answers, attention="blockwise"):
    """The largest difference between the engine's log-probs of sampled tokens and those of forward
    passes over whole texts, the answers to a prompt behind it, and several of these in a row."""
    groups: dict[bytes, list[Example]] = {}
    for a in answers:
        example = Example(a.token_ids, a.layout, loss_mask(a.layout), 1.0, a.logp)
        groups.setdefault(a.token_ids[: a.prompt_len].tobytes(), []).append(example)
    rows = make_rows([*groups.values()], 512, DEPTH)
    config = dataclasses.replace(model().config, attention=attention, attention_block=64)
    largest = 0.0
    for row in rows:
        logp = score(config, model().params, {k: x[None] for k, x in row.items()})
        largest = max(
            largest, np.abs(np.asarray(logp)[0] - row["old_logp"])[row["loss_mask"]].max()
        )
    return largest


def joined(answers) -> int:
    return sum(block.takeaway is not None for a in answers for block in a.layout.blocks)


@pytest.mark.parametrize("attention", ["blockwise", "dense"])
@pytest.mark.parametrize("rules", spread(RULES[1:], 1), ids=name)
def test_log_probs_are_those_of_one_forward(rules, attention):
    answers = sampled(rules)
    assert joined(answers) > 15 and max(a.layout.depth for a in answers) > 1
    assert gap(answers, attention) < 1e-4
    if attention == "blockwise":
        again = engine(rules, attention="gather").replay(answers)
        assert gap(again) < 1e-4
        for answer, other in zip(answers, again, strict=True):
            np.testing.assert_array_equal(answer.layout.hidden, other.layout.hidden)
            np.testing.assert_array_equal(answer.layout.positions, other.layout.positions)


def test_each_rule_changes_log_probs():
    """So the others notice if one is not followed."""
    answers, other = sampled(STRICTEST), Rules(marker=None)
    for rules in (
        Rules("last", "fresh", "max", MARKER),
        Rules("last", "trunk", "sum", MARKER),
        Rules("all", "fresh", "sum"),
        other,
    ):
        laid = [
            dataclasses.replace(
                a,
                layout=layout(
                    len(a.token_ids), a.layout.blocks, a.prompt_len, a.forced, rules, a.token_ids
                ),
            )
            for a in answers
        ]
        assert gap(laid) > 1e-2, rules


@pytest.mark.parametrize("rules", spread(HIDING, 1), ids=name)
def test_answers_that_yield_are_the_same(rules, report):
    """What is hidden is computed again too, and freed again."""
    made = engine(rules, pages=60, table_pages=0)
    answers = made.generate(ASKED, SAMPLING)
    assert made.stats()["preemptions"] > 3 and made.schedulers[0].pages.num_held == 0
    alike = [(a, b) for a, b in zip(sampled(rules), answers, strict=True)]
    alike = [(a, b) for a, b in alike if b.finish_reason != "pages_exhausted"]
    report(f"{sum(same(a, b) for a, b in alike)} ties in {len(alike)} answers")
    assert len(alike) > 6 and gap(answers) < 1e-4


@pytest.fixture
def counts(monkeypatch):
    """How often hidden tokens were computed again, and how often not all of them at once."""
    found, need = {"again": 0, "stages": 0}, Scheduler._need

    def counted(self, sequence, needed, count=0):
        hidden = {*needed}.difference(sequence.table)
        found["again"] += any(not segment.computed for segment in hidden)
        found["stages"] += count < len(needed)
        need(self, sequence, needed, count)

    monkeypatch.setattr(Scheduler, "_need", counted)
    return found


def trace_of_bodies():
    """A prompt, then two blocks with long steps, of which little stands behind the last marker; the
    first step of the second block has a block of its own."""
    plans = lambda n: [GO, *[PO, 9, 10, PC] * n, GC]  # noqa: E731
    step = lambda i, *body: [*TAGS.step_headers[i - 1], *body, SC]  # noqa: E731
    take = [*TAGS.takeaway_header, 17, 18, TC]
    body = [14] * 17 + [MARKER, 15, 16]
    inner = [*plans(2), *step(1, *body), *step(2, *body), *take]
    ids = [12, 13, 20, 21, *plans(2), *step(1, *body), *step(2, *body), *take, 20, 22]
    ids += [*plans(2), *step(1, *body, *inner, 12, 12), *step(2, 12, 12), *take, 20, 21, 22]
    return ids, 4


@pytest.mark.parametrize("rules", spread([HIDING[1], STRICTEST]), ids=name)
def test_what_is_hidden_is_computed_again_a_block_at_a_time(rules, counts):
    """It need not fit beside what the blocks before have hidden."""
    ids, prompt_len = trace_of_bodies()
    made, visits = engine(rules, pages=60, steps=3), 0
    request = replayed_request(made._maker, (ids, prompt_len), True, "trace")
    made._queue([[request]], quiet=True)
    (scheduler,) = made.schedulers
    while made._requests:
        if scheduler.running and visits % 14 == 13:
            scheduler._preempt(request)
        made._visit()
        recount(scheduler)
        visits += 1
    answer = made._outputs.finished[-1].trajectory
    assert answer.finish_reason == "stop" and answer.token_ids.tolist() == ids
    assert gap([answer]) < 1e-4
    assert request.preempted > 3 and counts["again"] > 3 and counts["stages"] > 0


@pytest.mark.slow
def test_cached_prompts_change_nothing():
    made = engine(STRICTEST)
    first, again = made.generate(ASKED, SAMPLING), made.generate(ASKED, SAMPLING)
    assert made.stats()["cached_tokens"] > 20
    for answer, other in zip(first, again, strict=True):
        same(answer, other)
    before, longer = made.stats()["cached_tokens"], [[*ASKED[2], 20, 21]]
    answers = made.generate(longer, SamplingParams(n=3, max_tokens=60, seed=5))
    assert made.stats()["cached_tokens"] > before
    assert joined(answers) and gap(answers) < 1e-4


@pytest.mark.slow
def test_small_pages_are_copied_with_their_scales():
    answers = engine(STRICTEST, cache_dtype="int8").generate(ASKED, SAMPLING)
    assert joined(answers) > 5 and 1e-4 < gap(answers) < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("shape", spread([(2, 4), (4, 2)], test=1))
def test_a_mesh_gives_the_tokens_of_one_device(shape):
    mesh = jax.make_mesh(shape, ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    config = dataclasses.replace(CONFIG, rules=STRICTEST, lanes=4, pages=120)
    made = Engine(model(), config, mesh)
    answers = made.generate(ASKED, SAMPLING)
    assert sum(same(a, b) for a, b in zip(sampled(STRICTEST), answers, strict=True)) <= 1
    assert all(scheduler.pages.num_held == 0 for scheduler in made.schedulers)


@pytest.mark.slow
def test_nothing_compiles_after_warmup():
    jax.clear_caches()  # of other tests
    made = engine(STRICTEST, table_pages=40)
    plain = Engine(model(), dataclasses.replace(CONFIG, table_pages=40))
    assert made.warmup()["programs"] == plain.warmup()["programs"] + 1
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: compiled.append(name) if "backend_compile" in name else None
    )
    assert joined(made.generate(ASKED, SAMPLING)) > 15
    assert compiled == []


# ---- on a device in plain Python ----------------------------------------------------------------


@pytest.fixture
def joins(monkeypatch):
    """Most blocks of the fake device are joined."""
    table = bigram.table(eos=0.0, nested=0.1, end_step=0.25, illegal=0.0)
    monkeypatch.setattr(fake_device, "_TABLE", np.cumsum(table, axis=1))


@pytest.mark.parametrize("number", [0, 2])
@pytest.mark.parametrize("rules", RULES[1:], ids=name)
def test_answers_do_not_depend_on_pages_lanes_and_preemption(rules, number, joins, counts):
    config = dataclasses.replace(CONFIGS[number], rules=rules)
    roomy = dataclasses.replace(config, pages=800)
    prompts = [[*PROMPTS[n % len(PROMPTS)], 20 + n // 5 % 3] for n in range(max(10, examples(10)))]
    sampling = SamplingParams(max_tokens=160)
    whole = engine_on_fake_device(roomy).generate(prompts, sampling)
    rng, done = np.random.default_rng(number), []
    made = engine_on_fake_device(dataclasses.replace(config, pages=120))
    (scheduler,) = made.schedulers
    made.submit(prompts, sampling)
    while made._requests:
        if scheduler.running and rng.random() < 0.15:
            scheduler._preempt(scheduler.running[int(rng.integers(len(scheduler.running)))])
        done += [e.trajectory for e in made.step() if e.kind == "finish"]
        recount(scheduler)
    assert scheduler.pages.num_held == 0 and joined(done) > len(prompts) / 2
    found = {answer.token_ids.tobytes(): answer for answer in done}
    for answer in whole:
        check_answer(answer)
        if answer.token_ids.tobytes() not in found:
            assert any(a.finish_reason == "pages_exhausted" for a in done)
    for answer in done:
        check_answer(answer)
    if rules.hide:
        assert counts["again"] > 3


def watched(config):
    """(pages held, tokens that the trunk's table lists) after every visit in which it can draw."""
    made, (ids, prompt_len) = engine_on_fake_device(config), trace_of_bodies()
    request = replayed_request(made._maker, (ids, prompt_len), True, "trace")
    made._queue([[request]])
    seen, (scheduler,) = [], made.schedulers
    while made._requests:
        made._visit()
        recount(scheduler)
        trunk = request.trunk
        if trunk.lane is not None and trunk.ready:
            tokens = [t for segment in trunk.table for t in segment.tokens]
            listed = sum(len(segment.pages) for segment in trunk.table)
            seen.append((scheduler.pages.num_held, listed, tokens))
    return seen, ids


def test_the_pages_of_hidden_bodies_are_freed_at_the_join():
    config = dataclasses.replace(CONFIGS[0], pages=200, steps=3)
    (all_, ids), (last, _) = (
        watched(dataclasses.replace(config, rules=rules)) for rules in (Rules(), HIDING[1])
    )
    assert HIDING[1] == Rules("last", marker=MARKER)
    for held, listed, _ in (*all_, *last):
        assert held == listed  # nothing is held that the trunk does not see
    tree = parse(ids, 4, TAGS, rules=HIDING[1])
    for (_, _, tokens), rules in ((all_[-1], Rules()), (last[-1], HIDING[1])):
        visible = parse(ids, 4, TAGS, rules=rules).visible()[-1]
        assert tokens == [t for t, sees in zip(ids, visible, strict=True) if sees][: len(tokens)]
    hidden = len(ids) - int(tree.visible()[-1].sum())
    assert hidden == 5 * 18  # of every step but the last what its marker ends
    size = config.page_size
    # Of each run of hidden entries all pages, but for the copies' own two that are not full.
    assert all_[-1][0] - last[-1][0] >= hidden // size - 8


def test_a_fresh_branch_lists_the_prompt_and_its_plan():
    made, (ids, prompt_len) = (
        engine_on_fake_device(
            dataclasses.replace(CONFIGS[0], pages=200, rules=Rules(fork="fresh"))
        ),
        trace_of_bodies(),
    )
    request = replayed_request(made._maker, (ids, prompt_len), True, "trace")
    made._queue([[request]])
    seen = set()
    while made._requests:
        made._visit()
        for line in request.growing():
            if line.depth:
                before = [t for s in line.segments[0].before for t in s.tokens]
                assert before == [*ids[:prompt_len], PO, 9, 10, PC]
                seen.add(line.path)
    assert len(seen) == 6


def test_lengths_are_tokens_of_a_path_whatever_the_positions():
    """By which answers are given up, or paused."""
    made = engine_on_fake_device(dataclasses.replace(CONFIGS[0], pages=200, rules=STRICTEST))
    ids, prompt_len = trace_of_bodies()
    request = replayed_request(made._maker, (ids, prompt_len), True, "trace")
    made._queue([[request]])
    lengths = []
    while made._requests:
        made._visit()
        lengths.append(request.length)
    tree = parse(ids, prompt_len, TAGS, rules=STRICTEST)
    assert lengths == sorted(lengths) and lengths[-1] == tree.critical_path_len
    assert tree.positions[-1] == len(ids) - 1 > prompt_len + lengths[-1]


def test_a_line_has_no_more_blocks_than_max_blocks(joins):
    config = dataclasses.replace(CONFIGS[0], pages=600, max_depth=2, max_blocks=2)
    config = dataclasses.replace(config, rules=Rules(fork="fresh"))
    prompts = [[*PROMPTS[n % len(PROMPTS)], 20 + n // 5 % 3] for n in range(15)]
    answers = engine_on_fake_device(config).generate(prompts, SamplingParams(max_tokens=200))
    assert any("block 3 of a line, at most 2" in answer.detail for answer in answers)
    needs = [(a.layout.hidden[..., 0] < a.layout.hidden[..., 1]).sum(1).max() for a in answers]
    assert 3 <= max(needs) <= config.rules.intervals(2, 2)


def test_what_does_not_go_together_is_refused():
    for rules, message in (
        (
            Rules("last", marker=40),
            r"engine.rules.marker is 40, needed is the id of a token, below",
        ),
        (Rules("last", marker=SC), "marker is 37, the tag </step>"),
        (Rules("last", marker="|"), r"marker is '\|', but there is no tokenizer"),
    ):
        with pytest.raises(ValueError, match=message):
            engine(rules)
    made = engine_on_fake_device(dataclasses.replace(CONFIGS[0], rules=Rules(positions="sum")))
    with pytest.raises(ValueError, match=r"min_tokens is 3 and engine.rules.positions 'sum'"):
        made.submit([[12]], SamplingParams(min_tokens=3))


def test_kept_keys_are_not_those_of_a_text_that_is_read_again(report):
    """They still carry what the trunk does not see."""
    (ids, prompt_len), rules = trace_of_bodies(), HIDING[1]
    tree = parse(ids, prompt_len, TAGS, rules=rules)
    sees = tree.visible()[-1]
    (kept,) = engine(rules).replay([(ids, prompt_len)])
    short = np.array(ids)[sees].tolist()
    places = np.flatnonzero(sees)
    read = parse(short, prompt_len, TAGS)
    again = layout(len(short), read.blocks, prompt_len, kept.forced[places])
    again = dataclasses.replace(again, positions=tree.positions[places])  # where they stand
    row = make_rows([[Example(np.array(short), again, loss_mask(again), 1.0)]], 512, DEPTH)[0]
    config = dataclasses.replace(model().config, attention="dense")
    logp = score(config, model().params, {k: x[None] for k, x in row.items()})
    behind = len(short) - 6  # of the last takeaway and the trunk
    differ = np.abs(np.asarray(logp)[0, behind : len(short)] - kept.logp[places][behind:])
    report(f"up to {differ.max():.3f} nats")
    assert gap([kept]) < 1e-4 < 1e-2 < differ.max()
