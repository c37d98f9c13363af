"""A trace read from its line is the answer that was decoded."""

import numpy as np
import pytest
from train_toy import tiny

from npr_jax.data.prompts import prompt_ids
from npr_jax.data.sources import Problem
from npr_jax.decode import Engine, EngineConfig, SamplingParams
from npr_jax.evaluate.judge import Answer
from npr_jax.evaluate.traces import make_trace, read_trace, read_traces


@pytest.fixture(scope="module")
def answers():
    model = tiny()
    text = (
        "<guideline>\n<plan>1:A</plan>\n<plan>2:B</plan>\n</guideline>\n<step>\n1:A:1+2=3\n</step>"
        "\n<step>\n2:B:3+4=7\n</step>\n<takeaway>\nS:3+7=0\n</takeaway>\n\\boxed{0}"
    )
    prompt = prompt_ids(model.tokenizer, "A:1+2;B:3+4?")
    engine = Engine(model, EngineConfig(lanes=4, pages=64))
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
    for trace, answer in zip(traces, answers, strict=True):
        tree = trace.layout
        for name in ("positions", "hidden", "pred", "forced"):
            assert np.array_equal(getattr(tree, name), getattr(answer.layout, name)), name
        assert trace.text.startswith(answer.text)  # and the end-of-text token
        sampled = ~answer.forced & (np.arange(len(tree)) >= trace.prompt_len)
        steps = np.array(trace.step)
        assert steps[sampled].min() == 0 and (steps[~sampled] == -1).all()
    assert traces[0].layout.num_branches == 2


def test_a_line_that_is_no_trace_is_named(tmp_path):
    path = tmp_path / "traces.jsonl"
    path.write_text('{"problem": "?"}\n')
    with pytest.raises(ValueError, match=r"traces.jsonl:1: this is no trace"):
        list(read_traces(path))
    with pytest.raises(ValueError):
        read_trace("[1]")
