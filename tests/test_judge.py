"""What is said of a finished answer and what is counted of it, against cases worked out by hand."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from train_toy import encode, tiny

from npr_jax.data.sources import Problem
from npr_jax.decode import Engine, EngineConfig, SamplingParams
from npr_jax.evaluate.judge import NGRAM, count, judge, overlap
from npr_jax.evaluate.traces import Trace, make_trace, read_trace
from npr_jax.train.rollout import summary
from npr_jax.tree import Block, layout


def trace(num, prompt_len, *blocks, **fields):
    """A trace of `num` tokens; what the layout does not depend on is made up."""
    made = Trace(
        problem="?",
        reference="1",
        token_ids=[0] * num,
        pieces=["x"] * num,
        prompt_len=prompt_len,
        logp=[0.0] * num,
        step=[-1] * num,
        forced=[False] * num,
        blocks=blocks,
        **{
            "prediction": "1",
            "correct": True,
            "violations": [],
            "finish_reason": "stop",
        }
        | fields,
    )
    return read_trace(made.dumps())


def figures(*args, **fields):
    found = trace(*args, **fields).figures
    names = "tokens critical_path parallel_tokens blocks branches depth width"
    return tuple(getattr(found, name) for name in names.split())


# (start, guideline_close, plans, steps, join, takeaway, end, depth)
TWO = Block(2, 7, (), ((8, 11), (11, 16)), 16, (16, 18), 18, 0)
OUTER = Block(1, 3, (), ((4, 16), (16, 20)), 20, (20, 22), 22, 0)
INNER = Block(5, 7, (), ((8, 10), (10, 13)), 13, (13, 15), 15, 1)


@pytest.mark.parametrize(
    "args, expected",
    [
        ((9, 4), (5, 5, 0, 0, 0, 0, 1)),  # plain text
        # Trunk 2..7, the longer branch, 16..19: 6 + 5 + 4.
        ((20, 2, TWO), (18, 15, 8, 1, 2, 1, 2)),
        # Trunk 1..3; branch 4..7, its inner block 3, 13..15 (the other has 4); 20..23.
        ((24, 1, OUTER, INNER), (23, 3 + 4 + 3 + 3 + 4, 16, 2, 4, 2, 3)),
        # A block of one branch: nothing in parallel, but for the block within it.
        (
            (20, 1, OUTER._replace(steps=((4, 16),), join=16, takeaway=(16, 18), end=18), INNER),
            (19, 3 + 4 + 3 + 3 + 4, 5, 2, 3, 2, 2),
        ),
        # Two blocks one after the other.
        (
            (27, 2, TWO, Block(18, 20, (), ((21, 23), (23, 25)), 25, (25, 26), 26, 0)),
            (25, 6 + 5 + 2 + 3 + 2 + 2, 12, 2, 4, 1, 2),
        ),
        # Cut off inside the second branch.
        (
            (12, 1, Block(1, 3, (), ((4, 7), (7, 12)), 12, None, 12, 0)),
            (11, 3 + 5, 8, 1, 2, 1, 2),
        ),
    ],
    ids=["text", "block", "nested", "one-branch", "two-blocks", "truncated"],
)
def test_shapes(args, expected):
    assert figures(*args) == expected


def test_the_critical_path_is_the_critical_steps_of_parl():
    """Kimi K2.5 counts in every stage the steps of the main agent and those of its longest
    sub-agent, here (1; 5 3 2), (1; none) and (1; 4 4): (1 + 5) + 1 + (1 + 4) of 21. A stage's main
    step is the tag behind which its branches fork."""

    def stages(first, last):
        blocks, end = [], 0
        for branches in (first, (), last):
            ends = np.cumsum([end + 1, *branches]).tolist()
            steps = tuple(itertools.pairwise(ends))
            if steps:
                blocks.append(Block(end, end, (), steps, ends[-1], (ends[-1], ends[-1]), end, 0))
            end = ends[-1]
        return figures(end, 0, *blocks)[:2]

    assert stages((5, 3, 2), (4, 4)) == (21, 12)
    assert stages((3, 2, 3, 2), (4, 4)) == (21, 10)  # the five are split
    assert stages((5, 3, 2), (4, 4, 4)) == (25, 12)  # one more of four costs nothing


def test_tags_of_a_branch_are_a_part_of_it_here_and_not_in_threadweaver():
    """20 tokens, two of whose branches have 4 and 3 tokens between their tags."""
    block = Block(3, 5, (), ((6, 12), (12, 17)), 17, (17, 18), 18, 0)
    ours = trace(20, 0, block).figures
    assert (ours.tokens, ours.critical_path, ours.parallel_tokens) == (20, 9 + 6, 6 + 5)
    between = [end - start - 2 for start, end in block.steps]
    outside = 20 - sum(between)
    assert between == [4, 3] and outside + max(between) == 17  # of ThreadWeaver
    assert (20 - 17) / 20 == 0.15 and (20 - ours.critical_path) / 20 == 0.25  # shares off the path


@pytest.mark.parametrize(
    "a, b, expected",
    [
        ([1, 2, 3], [1, 2, 3], 1),
        ([1, 2, 3], [4, 5, 6], 0),
        ([1, 2], [2, 1], 0),  # the same tokens in another order
        ([1, 2, 3, 4], [2, 3, 4, 5], 2 * 2 / 6),
        ([1, 1, 1], [1, 1], 2 * 1 / 3),  # as often as both have it
        ([1], [1], 1),
        ([1], [1, 2], 0),
        ([], [], 1),
    ],
)
def test_overlap(a, b, expected):
    assert overlap(a, b) == overlap(b, a) == pytest.approx(expected)


RUNS = st.lists(st.integers(0, 3), min_size=NGRAM, max_size=12)


@given(RUNS, RUNS, st.integers(1, NGRAM))
def test_overlap_is_what_is_found_by_crossing_off(a, b, n):
    ours, left = ([run[i : i + n] for i in range(len(run) - n + 1)] for run in (a, b))
    total, shared = len(ours) + len(left), 0
    for gram in ours:
        if gram in left:
            left.remove(gram)
            shared += 1
    assert overlap(a, b, n) == pytest.approx(2 * shared / total)


def test_siblings_are_compared_by_what_was_sampled_in_them():
    """Three branches, each with a header of two tokens and a closing tag, then one that is alone,
    and two that never join."""
    header, close = [90, 91], [92]
    texts = [[1, 2, 3, 4], [2, 3, 4, 5], [6, 7, 8]]
    ids, steps = [50, 51, 52, 99], []
    for text in [*texts, [1, 2, 3], [1, 2], [1, 2]]:
        begin = len(ids)
        ids += [*header, *text, *close]
        steps.append((begin, len(ids)))
        if len(steps) in (3, 4):
            ids += [93, 94]  # takeaway, guideline
    forced = [token in header for token in ids]
    ends = [end for _, end in steps]
    first = Block(3, 3, (), tuple(steps[:3]), ends[2], (ends[2], ends[2] + 1), ends[2] + 1, 0)
    alone = Block(
        ends[2] + 1, ends[2] + 1, (), (steps[3],), ends[3], (ends[3], ends[3] + 1), ends[3] + 1, 0
    )
    opened = Block(ends[3] + 1, ends[3] + 1, (), tuple(steps[4:]), ends[5], None, ends[5], 0)

    def found(*blocks):
        tree = layout(len(ids), blocks, prompt_len=1, forced=np.array(forced))
        return count(ids, tree, "stop", True, None, None)

    whole = found(first, alone, opened)
    assert whole.path_overlap == pytest.approx((2 * 2 / 6 + 0 + 0) / 3)
    assert whole.block_place == (3 - 1) / (len(ids) - 1)
    assert found(alone).path_overlap is found(alone, opened).path_overlap is None
    assert found(opened).block_place == (ends[3] + 1 - 1) / (len(ids) - 1)
    assert found().block_place is None and found().path_overlap is None
    unforked = Block(3, 3, (), (), len(ids), None, len(ids), 0)  # cut off before it could
    assert found(unforked).block_place is None
    forced[steps[0][0] + 2] = True  # of the first text the engine wrote one token
    assert found(first).path_overlap == pytest.approx((2 * 2 / 5 + 0 + 0) / 3)


@pytest.mark.parametrize("reason", ["length", "branch_length", "pages_exhausted", "stop"])
def test_verdicts_are_those_of_the_trace(reason):
    found = trace(
        9, 4, finish_reason=reason, violations=["no"], correct=False, prediction=None
    ).figures
    assert found.prediction is None
    assert not found.correct and not found.formed
    assert found.truncated == (reason != "stop")


TEXT = (
    "<guideline>\n<plan>1:A</plan>\n<plan>2:B</plan>\n</guideline>\n<step>\n1:A:1+2=3\n</step>"
    "\n<step>\n2:B:3+4=7\n</step>\n<takeaway>\nS:3+7=0\n</takeaway>\n"
)


@pytest.mark.slow
def test_an_answer_is_judged_once_and_says_the_same_everywhere():
    """What training, an evaluation and a report count of an answer are the same figures."""
    model = tiny()
    engine = Engine(model, EngineConfig(lanes=4, pages=64))
    question = "A:1+2;B:3+4?"
    texts = (TEXT + "\\boxed{0}", TEXT + "\\boxed{3}", TEXT, "7")
    replayed = engine.replay([encode(model, question, text) for text in texts])
    answers = judge(engine, replayed, ["0"] * len(texts))
    assert [answer.prediction for answer in answers] == ["0", "3", None, None]
    assert [answer.correct for answer in answers] == [True, False, False, False]
    kinds = [[violation.kind for violation in answer.violations] for answer in answers]
    assert kinds == [[], [], ["no_boxed"], ["no_block"]]
    for answer, made in zip(answers, replayed, strict=True):
        written = make_trace(answer, model.tokenizer, Problem(question, "0"), id="a", sample=1)
        figures = read_trace(written.dumps()).figures
        assert figures == answer.figures
        engines = ("tokens", "critical_path", "branches", "width", "depth")
        assert {name: getattr(figures, name) for name in engines}.items() <= made.stats.items()
    found = summary(answers)
    assert found["accuracy"] == found["both_rate"] == 1 / 4 and found["format_rate"] == 1 / 2
    assert found["parallel_rate"] == 3 / 4 and found["broken/no_boxed"] == 1 / 4
    assert found["response_tokens"] == np.mean([len(made.response_ids) for made in replayed])


def test_without_tags_nothing_keeps_the_format():
    model = dataclasses.replace(tiny(), tags=None)
    engine = Engine(model, EngineConfig(lanes=4, pages=64))
    made = engine.generate([[3, 4]], SamplingParams(max_tokens=4, parallel=False))
    (answer,) = judge(engine, made, ["0"])
    assert [v.reason for v in answer.violations] == ["the tokenizer has no tags"]
    assert not answer.figures.formed and not answer.figures.parallel


def test_an_answer_that_ended_with_an_error_is_not_judged():
    model = dataclasses.replace(tiny(), tags=None)
    engine = Engine(model, EngineConfig(lanes=4, pages=64))
    (made,) = engine.generate([[3, 4]], SamplingParams(max_tokens=2, parallel=False))
    failed = dataclasses.replace(made, finish_reason="error", detail="what it was")
    with pytest.raises(FloatingPointError, match="ended with an error: what it was"):
        judge(engine, [made, failed], ["0", "0"])
