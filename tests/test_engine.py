"""The engine against one tree-masked forward, against itself in other batches, and its pages."""

import dataclasses
import functools

import bigram
import engine_checks
import jax
import numpy as np
import pytest
from bigram import EOS, GC, GO, NL, PC, PO, SC, SO, TAGS, TC, TO
from conftest import EXAMPLES, spread
from engine_checks import recount, same

from npr_jax.decode import Engine, SamplingParams
from npr_jax.decode.steps import LaneState
from npr_jax.model import token_logp
from npr_jax.tree import layout, parse

CONFIG = dataclasses.replace(engine_checks.CONFIG, table_pages=128, header_rows=16)
PROMPTS = [[12, 13, 20], [GO, SC, TO, 21], [22], list(range(10, 21)) * 3]


pytestmark = pytest.mark.usefixtures("plans_without_numbers")


@functools.cache
def model(**rates):
    return bigram.model(**rates)


@functools.cache
def sampled():
    """A mixed bag of answers, and the engine that made them."""
    engine = Engine(model(), CONFIG)
    params = SamplingParams(n=6, max_tokens=120, seed=(1, 2, 3, 4))
    return engine.generate(PROMPTS, params)


def test_some_answers_to_a_prompt_are_those_among_all():
    wanted = [range(4, 6), range(0), range(1, 2), range(6)]
    params = SamplingParams(n=6, max_tokens=120, seed=(1, 2, 3, 4))
    engine = Engine(model(), CONFIG)
    found = engine.generate(PROMPTS, params, samples=wanted)
    expected = [sampled()[6 * p + i] for p, some in enumerate(wanted) for i in some]
    assert sum(same(a, b) for a, b in zip(expected, found, strict=True)) <= 1
    with pytest.raises(ValueError, match=r"samples holds range\(5, 7\), needed .* below n=6"):
        engine.generate(PROMPTS[:1], SamplingParams(n=6), samples=[range(5, 7)])
    with pytest.raises(ValueError, match="samples has 1 entries, needed are 4"):
        engine.generate(PROMPTS, SamplingParams(n=6), samples=[range(6)])


def forward_logp(tree, token_ids, params=None):
    """Raw log-probs of one tree-masked forward, padded to a few lengths to compile little."""
    m = model()
    size = -(-len(token_ids) // 64) * 64
    hidden = np.zeros((1, size, 6, 2), np.int32)
    hidden[0, : len(token_ids), : tree.hidden.shape[1]] = tree.hidden
    tokens, positions = np.zeros((2, 1, size), np.int32)
    pred = np.full((1, size), -1, np.int32)
    tokens[0, : len(token_ids)], positions[0, : len(token_ids)] = token_ids, tree.positions
    pred[0, : len(token_ids)] = tree.pred
    score = jax.jit(token_logp, static_argnums=0)
    out = score(m.config, params or m.params, tokens, positions, hidden, pred)
    return np.asarray(out)[0, : len(token_ids)]


def gap(answer, tree=None):
    """The largest difference between the engine's and the forward's log-probs of sampled tokens."""
    scored = ~answer.forced
    scored[: answer.prompt_len] = False
    logp = forward_logp(tree or answer.layout, answer.token_ids)
    return np.abs(logp - answer.logp)[scored].max()


def script_of_blocks():
    """Hand-made traces: nested, unequal branches, several blocks, cut off at many places."""
    plans = lambda n: [GO, *[PO, 9, PC] * n, GC]  # noqa: E731
    step = lambda i, *body: [*TAGS.step_headers[i - 1], *body, SC]  # noqa: E731
    take = [*TAGS.takeaway_header, 17, 18, TC]
    inner = [*plans(2), *step(1, 12, 13, 14, 15, 16, 12), *step(2, 13), *take]
    block = [*plans(3), *step(1, 12, *inner, 13), *step(2, 14), *step(3, *inner, *inner), *take]
    loose = [GO, NL, PO, PC, GC, SO, 12, SC, NL, NL, TO, TC]
    whole = [14, 15, *block, 12, *plans(1), *step(1, 12, 12, 12), *take, 13, *loose, *block, EOS]
    return [9, 10, SO, 11, *whole], 4


@pytest.mark.parametrize(("cache_dtype", "most"), [("bfloat16", 0.02), ("int8", 0.02)])
@pytest.mark.parametrize("attention", ["blockwise", "gather"])
def test_small_pages_change_log_probs_a_little(attention, cache_dtype, most):
    """int8 with its scales is no worse than bfloat16."""
    ids, prompt_len = script_of_blocks()
    gaps = []
    for dtype in (None, cache_dtype):
        config = dataclasses.replace(CONFIG, attention=attention, cache_dtype=dtype)
        (answer,) = Engine(model(), config).replay([(ids, prompt_len)])
        np.testing.assert_array_equal(answer.token_ids, ids)
        gaps.append(gap(answer))
    assert gaps[0] < 1e-4 < gaps[1] < most


@pytest.mark.slow
def test_replayed_traces_have_the_log_probs_of_one_forward():
    ids, prompt_len = script_of_blocks()
    engine = Engine(model(), CONFIG)
    (answer,) = engine.replay([(ids, prompt_len)])
    assert answer.token_ids.tolist() == ids
    assert (answer.layout.num_branches, answer.layout.depth, answer.layout.width) == (20, 2, 5)
    assert gap(answer) < 1e-4
    assert (answer.forced == parse(ids, prompt_len, TAGS).forced).all()
    (plain,) = engine.replay([(ids, prompt_len)], parallel=False)
    assert gap(plain) < 1e-4
    assert plain.layout.num_branches == 0
    assert engine.schedulers[0].pages.num_held == 0


@pytest.mark.slow
def test_cut_off_traces_can_be_replayed():
    ids, prompt_len = script_of_blocks()
    traces = []
    step = max(1, round(6 / EXAMPLES))
    for end in range(prompt_len + 1, len(ids), step):
        try:
            parse(ids[:end], prompt_len, TAGS, allow_open=True)
        except ValueError:
            continue
        traces.append((ids[:end], prompt_len))
    assert len(traces) > 90 // step
    answers = Engine(model(), CONFIG).replay(traces)
    for (tokens, _), answer in zip(traces, answers, strict=True):
        assert answer.token_ids.tolist() == tokens
        if not answer.forced[prompt_len:].all():
            assert gap(answer) < 1e-4


@pytest.mark.slow
def test_sampled_traces_have_the_log_probs_of_one_forward():
    answers = sampled()
    for answer in answers:
        assert gap(answer) < 1e-4
        assert (answer.logp[answer.forced] == 0).all()
        assert (answer.logp[: answer.prompt_len] == 0).all()
    reasons = {answer.finish_reason for answer in answers}
    assert {"stop", "malformed", "invalid_block"} <= reasons
    assert max(answer.layout.depth for answer in answers) >= 2
    assert sum(answer.layout.num_branches for answer in answers) > 40


@pytest.mark.slow
def test_a_wrong_position_or_a_visible_sibling_would_show():
    answer = max(sampled(), key=lambda a: a.layout.num_branches)
    tree = answer.layout
    start = next(b for b in tree.blocks if len(b.steps) > 1).branches[1][0]
    positions = tree.positions.copy()
    positions[start:] += 1
    assert gap(answer, dataclasses.replace(tree, positions=positions)) > 1e-3
    hidden = tree.hidden.copy()
    hidden[:start] = 0
    assert gap(answer, dataclasses.replace(tree, hidden=hidden)) > 1e-3


def test_the_layout_is_the_parse_of_the_tokens():
    whole = 0
    for answer in sampled():
        if answer.finish_reason == "stop":
            tree = parse(answer.token_ids, answer.prompt_len, TAGS)
            assert tree.blocks == answer.layout.blocks
            np.testing.assert_array_equal(tree.forced, answer.forced)
            np.testing.assert_array_equal(tree.hidden, answer.layout.hidden)
            whole += 1
    assert whole > 2


@pytest.mark.slow
def test_an_answer_does_not_depend_on_its_batch_lane_or_pages():
    params = SamplingParams(n=6, max_tokens=120, seed=(1, 2, 3, 4))
    changes = [
        {"lanes": 1, "steps": 1},
        {"lanes": 11, "pages": 400, "page_size": 3, "steps": 9},
        {"header_chunk": 16, "prefill_chunk": 4, "pages": 90},
    ]
    for change in changes:
        engine = Engine(model(), dataclasses.replace(CONFIG, **change))
        for answer, other in zip(sampled(), engine.generate(PROMPTS, params), strict=True):
            same(answer, other)
    alone = Engine(model(), CONFIG)
    for i in (3, 0):
        one = dataclasses.replace(params, seed=i + 1)
        for answer, other in zip(
            sampled()[6 * i : 6 * i + 6], alone.generate([PROMPTS[i]], one), strict=True
        ):
            same(answer, other)
            assert answer.token_ids.tolist() == other.token_ids.tolist()


@pytest.mark.parametrize("pages", spread([60, 200], test=1))
def test_pages_add_up_after_every_operation(monkeypatch, pages):
    engine = Engine(model(), dataclasses.replace(CONFIG, pages=pages, table_pages=0))
    counted = 0

    def counting(operation):
        def wrapped(*args):
            nonlocal counted
            result = operation(*args)
            recount(engine.schedulers[0])
            counted += 1
            return result

        return wrapped

    for owner, name in (
        (engine.schedulers[0], "admit"),
        (engine.schedulers[0], "reserve"),
        (engine._fork_join, "advance"),
        (engine._fork_join, "_fork"),
    ):
        monkeypatch.setattr(owner, name, counting(getattr(owner, name)))
    params = SamplingParams(n=5, max_tokens=150, seed=tuple(range(12)))
    answers = engine.generate([*PROMPTS, *PROMPTS, *PROMPTS], params)
    assert counted > 400
    assert engine.schedulers[0].pages.num_held == 0
    if pages == 60:
        assert engine.stats()["preemptions"] > 5
        roomy = Engine(model(), CONFIG).generate([*PROMPTS] * 3, params)
        for answer, other in zip(roomy, answers, strict=True):
            if other.finish_reason != "pages_exhausted":
                same(answer, other)


@pytest.mark.slow
def test_nothing_compiles_after_warmup():
    config = dataclasses.replace(CONFIG, table_pages=24)
    jax.clear_caches()  # of other tests
    engine = Engine(model(), config)
    engine.warmup()
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: compiled.append(name) if "backend_compile" in name else None
    )
    engine.generate(PROMPTS[:3], SamplingParams(n=5, max_tokens=60, seed=5))
    engine.generate(PROMPTS[:1], SamplingParams(n=1, max_tokens=9, temperature=0, parallel=False))
    engine.generate(PROMPTS[:3], SamplingParams(n=5, max_tokens=30, repetition_penalty=1.3))
    assert compiled == []
    jax.jit(lambda x: x * 3 + len(compiled))(np.float32(1))
    assert compiled  # the listener does listen


def test_budgets_are_kept_and_given_back():
    for answer in sampled():
        assert len(answer.response_ids) <= 120
    answers = Engine(model(eos=0.0, illegal=0.0), CONFIG).generate(
        PROMPTS, SamplingParams(n=4, max_tokens=60, max_position=90, seed=3)
    )
    reasons = {answer.finish_reason for answer in answers}
    assert reasons & {"length", "branch_length"}
    for answer in answers:
        assert len(answer.response_ids) <= 60
        assert answer.layout.positions.max() < 90
        if answer.finish_reason == "length":
            assert len(answer.response_ids) == 60 or answer.layout.positions.max() == 89


def test_a_branch_that_ends_badly_does_not_stop_its_siblings():
    answers = [a for a in sampled() if a.finish_reason in ("branch_eos", "malformed")]
    open_blocks = [
        (answer, block)
        for answer in answers
        for block in answer.layout.blocks
        if block.takeaway is None and len(block.steps) > 1
    ]
    assert open_blocks
    for answer, block in open_blocks:
        ends = [answer.token_ids[end - 1] for _, end in block.steps]
        assert sum(end != SC for end in ends) >= 1
        assert block.join == len(answer.token_ids)


def test_refused_blocks_end_the_answer_or_go_on_as_text():
    ended = [a for a in sampled() if a.finish_reason == "invalid_block"]
    assert ended
    assert all(a.detail for a in ended)
    config = dataclasses.replace(CONFIG, max_branches=1, on_invalid_block="sequential")
    answers = Engine(model(), config).generate(
        PROMPTS, SamplingParams(n=6, max_tokens=120, seed=(1, 2, 3, 4))
    )
    assert not {a.finish_reason for a in answers} & {"invalid_block"}
    went_on = [a for a in answers if a.stats["refused_blocks"]]
    assert went_on
    for answer in answers:
        assert gap(answer) < 1e-4
        assert all(len(block.steps) == 1 for block in answer.layout.blocks)


def test_a_group_shares_the_pages_of_its_prompt():
    engine = Engine(model(), dataclasses.replace(CONFIG, lanes=8))
    prompt = list(range(9, 20)) * 8
    held = []
    stream = engine.stream([prompt], SamplingParams(n=8, max_tokens=12, parallel=False))
    for _ in stream:
        held.append(engine.schedulers[0].pages.num_held)
    pages = -(-(len(prompt) - 1) // CONFIG.page_size)
    assert engine.stats()["prefill_tokens"] == len(prompt) - 1
    assert max(held) <= pages + 8 * -(-(12 + CONFIG.steps) // CONFIG.page_size)


def test_what_cannot_fit_is_refused_with_numbers():
    engine = Engine(model(), dataclasses.replace(CONFIG, pages=11, table_pages=0))
    with pytest.raises(ValueError, match=r"prompt 1 needs 12 pages of 4 .* can have 10"):
        engine.generate([[12], [12] * 9], SamplingParams(max_tokens=38))
    with pytest.raises(ValueError, match="max_position is 5"):
        engine.generate([[12] * 9], SamplingParams(max_position=5))
    with pytest.raises(ValueError, match="prompt 0 is empty"):
        engine.generate([[]])
    with pytest.raises(ValueError, match="outside the vocabulary of 40"):
        engine.generate([[40]])
    with pytest.raises(ValueError, match="no tokenizer"):
        engine.generate(["text"])
    with pytest.raises(ValueError, match="give a Trajectory"):
        Engine(dataclasses.replace(model(), tags=None), CONFIG).replay([([9, 10, 12], 2)])
    answers = engine.generate([[12], [13]], SamplingParams(max_tokens=30, n=3))
    assert {len(answers)} == {6}
    assert engine.schedulers[0].pages.num_held == 0


@pytest.mark.slow
def test_filters_and_penalties_shape_the_distribution():
    engine = Engine(model(), CONFIG)
    greedy = engine.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=20))
    for knobs in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 0.999999}):
        cut = engine.generate(PROMPTS, SamplingParams(**knobs, max_tokens=20, seed=9))
        for answer, other in zip(greedy, cut, strict=True):
            assert answer.token_ids.tolist() == other.token_ids.tolist()
            np.testing.assert_allclose(other.logp_sampled, 0, atol=1e-6)
    plain = SamplingParams(max_tokens=40, parallel=False, seed=1)
    for answer in engine.generate(PROMPTS, plain):
        np.testing.assert_allclose(answer.logp, answer.logp_sampled, atol=1e-6)
    greedy = dataclasses.replace(plain, temperature=0)
    strong = dataclasses.replace(greedy, repetition_penalty=50.0)
    distinct = [
        len(set(engine.generate([[12]], p)[0].token_ids.tolist())) for p in (greedy, strong)
    ]
    assert distinct[1] > distinct[0] + 3


def test_abort_ends_everything_in_flight():
    engine = Engine(model(), CONFIG)
    answers = engine.generate(
        PROMPTS, SamplingParams(n=4, max_tokens=100), progress=lambda *_: engine.abort()
    )
    assert len(answers) == 16
    assert "aborted" in {a.finish_reason for a in answers}
    assert engine.schedulers[0].pages.num_held == 0
    assert engine.generate([[12]], SamplingParams(max_tokens=1))[0].finish_reason == "length"


def test_an_abandoned_stream_leaves_nothing_behind():
    engine = Engine(model(), CONFIG)
    stream = engine.stream(PROMPTS, SamplingParams(n=4, max_tokens=100))
    next(stream)
    with pytest.raises(RuntimeError, match="already running"):
        engine.generate(PROMPTS, SamplingParams(max_tokens=5))
    stream.close()
    assert engine.schedulers[0].pages.num_held == 0
    assert engine.generate(PROMPTS, SamplingParams(max_tokens=5))


def test_sequential_mode_is_plain_text():
    answers = Engine(model(), CONFIG).generate(
        PROMPTS, SamplingParams(n=3, max_tokens=60, parallel=False)
    )
    for answer in answers:
        plain = layout(len(answer.token_ids), prompt_len=answer.prompt_len)
        np.testing.assert_array_equal(answer.layout.positions, plain.positions)
        assert gap(answer) < 1e-4
        assert answer.finish_reason in ("stop", "length")


def test_a_lane_that_rests_stays_where_it_is():
    """A lane that waits at the end of its table goes on from there without a restart."""
    here, on = np.array([3, 3], np.int32), np.array([True, False])
    state = LaneState(here, here + 1, here + 2, here + 3, np.array([False, False]))
    moved = state.moved(on, stop=on, tokens=here * 0)
    found = [np.asarray(getattr(moved, field.name)).tolist() for field in dataclasses.fields(moved)]
    assert found == [[0, 3], [5, 4], [6, 5], [5, 6], [True, False]]


def test_a_step_computes_the_lanes_at_work_and_no_more():
    engine = Engine(model(eos=0.0, illegal=0.0), dataclasses.replace(CONFIG, steps=16))
    assert engine.config.widths == (1, 4, 6)
    sampling = SamplingParams(max_tokens=12, parallel=False)
    names = "decode_rows", "decode_steps", "decode_tokens"
    for requests, width in ((1, 1), (3, 4), (4, 4), (6, 6)):
        before = engine.stats()
        engine.generate([[12, 20]] * requests, sampling)
        after = engine.stats()
        rows, steps, drawn = (after[name] - before[name] for name in names)
        assert (rows, steps, drawn) == (width * 12, 12, requests * 12)


def test_rows_without_a_lane_draw_nothing():
    """The last lane is at work, of which such rows are copies."""
    engine = Engine(model(eos=0.0, illegal=0.0), dataclasses.replace(CONFIG, steps=4))
    lengths = [3, 3, 3, 12, 12, 12]
    for tokens in lengths:
        engine.submit([[12, 20]], SamplingParams(max_tokens=tokens, parallel=False))
    list(engine.stream(tokens=False))
    assert engine.stats()["decode_tokens"] == sum(lengths)


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 16, 64])
def test_lanes_do_not_rest_while_others_wait(steps):
    """Short lines, one after the other on few lanes, whatever the most steps of a visit."""
    engine = Engine(model(eos=0.0, illegal=0.0), dataclasses.replace(CONFIG, steps=steps))
    for tokens in np.random.default_rng(0).integers(3, 25, 60).tolist():
        engine.submit([[12, 20]], SamplingParams(max_tokens=tokens, parallel=False))
    list(engine.stream(tokens=False))
    assert engine.stats()["occupancy"] > 0.6
