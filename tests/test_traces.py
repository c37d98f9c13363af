"""A trace read from its line is the answer that was decoded."""

import dataclasses
import json
import math

import numpy as np
import pytest
from train_toy import tiny

from npr_jax.data.prompts import prompt_ids
from npr_jax.data.sources import Problem
from npr_jax.decode import Engine, EngineConfig, SamplingParams
from npr_jax.evaluate.judge import Answer
from npr_jax.evaluate.traces import make_trace, read_trace, read_traces
from npr_jax.report.terminal import view
from npr_jax.tree import Rules

RULES = {
    "default": Rules(),
    "others": Rules("last", "fresh", "sum", ":"),
    "trials": Rules(trial=":", failure="1"),
}


@pytest.fixture(scope="module", params=RULES)
def answers(request):
    model = tiny()
    text = (
        "<guideline>\n<plan>1:A</plan>\n<plan>2:B</plan>\n</guideline>\n<step>\n1:A:1+2=3\n</step>"
        "\n<step>\n2:B:3+4=7\n</step>\n<takeaway>\nS:3+7=0\n</takeaway>\n\\boxed{0}"
    )
    prompt = prompt_ids(model.tokenizer, "A:1+2;B:3+4?")
    engine = Engine(model, EngineConfig(lanes=4, pages=64, rules=RULES[request.param]))
    replayed = engine.replay([([*prompt, *model.tokenizer.encode(text)], len(prompt))])
    sampled = engine.generate([prompt], SamplingParams(max_tokens=20, seed=3))
    return model, replayed + sampled


def test_what_is_written_is_read(answers, tmp_path):
    model, answers = answers
    question = Problem("A:1+2;B:3+4?", "0")
    traces = [
        make_trace(Answer(answer, [], "0", True), model.tokenizer, question, id=str(i))
        for i, answer in enumerate(answers)
    ]
    path = tmp_path / "traces.jsonl"
    path.write_text("".join(trace.dumps() + "\n" for trace in traces), encoding="utf-8")
    assert list(read_traces(path)) == traces
    assert all(("rules" in json.loads(t.dumps())) == (t.rules != Rules()) for t in traces)
    for trace, answer in zip(traces, answers, strict=True):
        tree = trace.layout
        assert tree.rules == answer.layout.rules == trace.rules
        for name in ("positions", "hidden", "pred", "forced"):
            assert np.array_equal(getattr(tree, name), getattr(answer.layout, name)), name
        assert trace.text.startswith(answer.text)  # and the end-of-text token
        sampled = ~answer.forced & (np.arange(len(tree)) >= trace.prompt_len)
        steps = np.array(trace.step)
        assert steps[sampled].min() == 0 and (steps[~sampled] == -1).all()
    assert traces[0].layout.num_branches == 2


WHOLE = {
    "problem": "?",
    "reference": None,
    "token_ids": [1, 2, 3],
    "pieces": ["a", "b", "c"],
    "prompt_len": 1,
    "logp": [0, -0.5, None],
    "step": [-1, 0, 1],
    "forced": [False, False, False],
    "blocks": [],
    "prediction": None,
    "correct": None,
    "violations": [],
    "finish_reason": "stop",
}
ANSWER = {"line": 1, "sample": 0, "input": {"problem": "1+1"}, "text": "2", "prediction": "2"}


@pytest.mark.parametrize(
    "line, message",
    [
        (json.dumps(ANSWER), "it lacks problem, reference, token_ids, "),
        ("{", "Expecting property name"),  # as results.json begins
        ("[1]", "it is list, needed is an object"),
        (json.dumps(WHOLE | {"score": 1}), "'score' is no key of one"),
        (json.dumps(WHOLE | {"problem": 1}), "problem is 1, needed is str"),
        (json.dumps(WHOLE | {"pieces": "abc"}), "pieces is 'abc', needed is list"),
        (json.dumps(WHOLE | {"pieces": ["a", None, "c"]}), "pieces holds what is no str"),
        (json.dumps(WHOLE | {"step": [0, 1]}), "its columns have .*'step': 2"),
        (json.dumps(WHOLE | {"prompt_len": 4}), "prompt_len is 4"),
        (json.dumps(WHOLE | {"prompt_len": True}), "prompt_len is True, needed is int"),
        (json.dumps(WHOLE | {"step": [-1, 0, 1 << 63]}), "step holds what is no int"),
        (json.dumps(WHOLE | {"logp": [0, 0, 10**400]}), "logp holds what is no float"),
        (json.dumps(WHOLE | {"logp": [0, 0, "1"]}), "logp holds what is no float"),
        (json.dumps(WHOLE | {"logp": 3}), "'int' object is not iterable"),
        (json.dumps(WHOLE | {"rules": {"join": "some"}}), "join is 'some', needed is 'all' or"),
        (json.dumps(WHOLE | {"rules": {"joins": "all"}}), "unexpected keyword argument 'joins'"),
        (json.dumps(WHOLE | {"rules": [1]}), "must be a mapping"),
        (json.dumps(WHOLE | {"blocks": [[0, 1]]}), "missing 6 required"),
        (json.dumps(WHOLE | {"blocks": [["0", 1, [], [], 3, None, 3, 0]]}), "blocks holds \\['0'"),
        (
            json.dumps(WHOLE | {"blocks": [[0, None, [], [[1, 2]], 3, None, 3, 0]]}),
            "None\\], needed",
        ),
        (json.dumps(WHOLE | {"blocks": [[0, 1, [[1]], [], 3, None, 3, 0]]}), "that is no pair"),
        (json.dumps(WHOLE | {"blocks": [[0, 1, [], [], 3, None, 3, 1]]}), "as deep or deeper"),
        (json.dumps(WHOLE | {"blocks": [[0, 1, [], [[2, 9]], 9, None, 9, 0]]}), "out of order"),
    ],
)
def test_a_line_that_is_no_trace_is_named_and_says_what_one_is(line, message, tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(
        ValueError, match=rf"answers\.jsonl:1: this is no trace: .*{message}"
    ) as caught:
        view(path)
    for part in ("A trace has the keys problem, reference,", "finish_reason; traces are the lines"):
        assert part in str(caught.value)
    assert "DIR/traces/*.jsonl" in str(caught.value)


def test_a_log_prob_that_is_no_number_is_null():
    """JSON has no NaN, and other programs refuse what Python would write for it."""
    trace = read_trace(json.dumps(WHOLE))
    assert trace.logp[:2] == [0.0, -0.5] and math.isnan(trace.logp[2])
    line = dataclasses.replace(trace, logp=[math.nan, -math.inf, -1.0]).dumps()
    assert json.loads(line, parse_constant=pytest.fail)["logp"] == [None, None, -1.0]
