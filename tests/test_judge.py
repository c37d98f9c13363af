"""What is said of a finished answer and what is counted of it, against cases worked out by hand."""

import dataclasses

import numpy as np
import pytest
from train_toy import encode, tiny

from npr_jax.data.sources import Problem
from npr_jax.decode import Engine, EngineConfig, SamplingParams
from npr_jax.evaluate.judge import judge
from npr_jax.evaluate.traces import Trace, make_trace, read_trace
from npr_jax.train.rollout import summary
from npr_jax.tree import Block


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
