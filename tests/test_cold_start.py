"""Beta on answers that are given: which lines it takes, and that it learns them as any others."""

import dataclasses
import json
import random

import jax
import numpy as np
import pytest
from train_toy import encode, problem, tiny

from npr_jax import load
from npr_jax.base.config import load_config
from npr_jax.evaluate.traces import Trace
from npr_jax.model.pretrained import load_tokenizer
from npr_jax.train import beta
from npr_jax.train.fit import fit
from npr_jax.tree import TagIds

OPTIMISED = True


def lines_of(num, groups=2):
    rng = random.Random(0)
    rows = [problem(rng, groups) for _ in range(num)]
    return [{"problem": p, "answer": a, "response": r, "level": groups} for p, r, a in rows]


def settings(tmp_path, lines, *changes, output="run"):
    path = tmp_path / "scripted.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    paths = {"model": "tiny", "problems": str(path), "output": str(tmp_path / output)}
    small = ["sample.num_problems=0", "fit.steps=3", "fit.batch=4", "fit.train.row_len=256"]
    return load_config(
        beta.BetaConfig,
        "tiny_cold",
        [*(f"{key}={json.dumps(value)}" for key, value in paths.items()), *small, *changes],
    )


def records_of(config):
    tokenizer = load_tokenizer(config.model)
    return beta.given_records(config, tokenizer, TagIds.from_tokenizer(tokenizer))


def test_given_answers_are_records_like_those_that_are_sampled(tmp_path):
    lines, model = lines_of(20), tiny()
    records = records_of(settings(tmp_path, lines))
    assert sorted(r["problem"] for r in records) == sorted(line["problem"] for line in lines)
    for record in records:
        (line,) = [line for line in lines if line["problem"] == record["problem"]][:1]
        ids, prompt_len = encode(model, line["problem"], line["response"])
        assert record["accepted"] == [ids.tolist()] and record["prompt_len"] == prompt_len
        assert record["texts"] == [line["response"]]
    some = records_of(settings(tmp_path, lines, "sample.num_problems=7"))
    assert some == records[:7]
    other = records_of(settings(tmp_path, lines, "seed=1"))
    assert other != records and sorted(map(str, other)) == sorted(map(str, records))
    # Prompts that are too long are left out.
    mixed = lines + lines_of(5, groups=3)
    limit = f"sample.max_prompt_tokens={len(encode(model, lines[0]['problem'], '')[0]) - 1}"
    assert len(records_of(settings(tmp_path, mixed, limit))) == 20


@pytest.mark.parametrize(
    "line, changes, wanted",
    [
        ({"response": "5"}, [], r"jsonl:3: the response breaks the format: no <guideline> block"),
        ({"response": " "}, [], r'jsonl:3: "response" is \' \', needed is a text'),
        ({"response": None}, [], r'jsonl:3: "response" is None, needed is a text'),
        ({"level": "hard"}, [], r'jsonl:3: "level" is \'hard\', needed is an integer'),
        ({}, ["sample.max_tokens=9"], r"the response has \d+ tokens, sample\.max_tokens is 9"),
        ({}, ["sample.max_prompt_tokens=3"], r"all prompts of .* sample\.max_prompt_tokens=3"),
        ({}, ["engine.max_branches=1"], r"the response breaks the format: 2 plans, at most 1"),
        (
            {
                "response": "".join([lines_of(1)[0]["response"].partition("\\boxed")[0]] * 2)
                + "\\boxed{1}"
            },
            ["engine.max_blocks=1"],
            r"jsonl:3: the response has 2 blocks, engine\.max_blocks is 1",
        ),
    ],
)
def test_what_is_no_answer_to_learn_from_is_named(tmp_path, line, changes, wanted):
    lines = lines_of(4)
    lines[2] |= line
    with pytest.raises(ValueError, match=wanted):
        beta.run(settings(tmp_path, lines, *changes))


def trace_of(problem, answer, response, **changes):
    """A right answer as a trace, a token a piece."""
    tokenizer, model = load_tokenizer("tiny"), tiny()
    ids, prompt_len = encode(model, problem, response)
    count, ids = len(ids), ids.tolist()
    made = Trace(
        problem=problem,
        reference=answer,
        token_ids=ids,
        pieces=[tokenizer.decode([i]) for i in ids],
        prompt_len=prompt_len,
        logp=[-1.0] * count,
        step=list(range(count)),
        forced=[False] * count,
        blocks=(),
        prediction=answer,
        correct=True,
        violations=[],
        finish_reason="stop",
    )
    return dataclasses.replace(made, **changes)


def test_traces_are_learnt_token_for_token(tmp_path):
    """With text before a block, which no response may have, and without any."""
    lines = lines_of(6)
    values = [(line["problem"], line["answer"], line["response"]) for line in lines]
    traces = [trace_of(p, a, ("A:", "", "B:A:")[i % 3] + r) for i, (p, a, r) in enumerate(values)]
    traces += [trace_of(p, a, f"\\boxed{{{a}}}") for p, a, _ in values]
    rows = [json.loads(trace.dumps()) for trace in traces]
    config = settings(tmp_path, [*rows, *lines])
    records, model = records_of(config), tiny()
    found = sorted(record["accepted"][0] for record in records)
    assert found == sorted(
        [*(t.token_ids for t in traces), *(t.token_ids for t in with_text(lines))]
    )
    texts = {tuple(r["accepted"][0]): r["texts"][0] for r in records}
    for trace in traces:
        assert texts[tuple(trace.token_ids)] == "".join(trace.pieces[trace.prompt_len : -1])
    made = beta.make_examples(records, model.tags)
    assert sorted(example.layout.width for example in made) == [1] * 6 + [2] * 12
    beta.run(config)


def with_text(lines):
    return [trace_of(line["problem"], line["answer"], line["response"]) for line in lines]


@pytest.mark.parametrize(
    "changes, wanted",
    [
        ({"correct": False}, r"jsonl:2: correct is False and finish_reason 'stop', needed are"),
        ({"finish_reason": "length"}, r"jsonl:2: correct is True and finish_reason 'length'"),
        ({"token_ids": None}, r"jsonl:2: this is no trace: token_ids is None"),
        ({"pieces": "x"}, r"jsonl:2: the trace was made with another tokenizer"),
    ],
)
def test_a_trace_that_is_nothing_to_learn_from_is_named(tmp_path, changes, wanted):
    traces = [json.loads(trace.dumps()) for trace in with_text(lines_of(3))]
    count = len(traces[1]["token_ids"])
    traces[1] |= {"pieces": ["x"] * count} if "pieces" in changes else changes
    with pytest.raises(ValueError, match=wanted):
        records_of(settings(tmp_path, traces))


def test_a_step_head_learns_from_wrong_traces_too(tmp_path):
    traces = [dataclasses.replace(trace, correct=False) for trace in with_text(lines_of(3))]
    words = 'step_words=["+", "*"]', "branch_labels=npr_jax.demo.steps"
    config = settings(tmp_path, [json.loads(trace.dumps()) for trace in traces], *words)
    assert len(records_of(config)) == 3


def test_a_trace_has_to_be_a_tree_of_no_more_branches_than_the_engine_takes(tmp_path):
    (line,) = lines_of(1, groups=3)
    (whole,) = with_text([line])
    response = line["response"].replace("</step>", "", 1)
    for trace, changes, wanted in (
        (whole, ["engine.max_branches=2"], r"jsonl:1: a block of 3 branches, engine\.max_branches"),
        (
            trace_of(line["problem"], line["answer"], response),
            [],
            r"jsonl:1: token \d+: <step> in a step",
        ),
    ):
        config = settings(tmp_path, [json.loads(trace.dumps())], *changes)
        with pytest.raises(ValueError, match=wanted):
            records_of(config)


def test_a_cold_start_goes_on_from_no_sampled_answers(tmp_path):
    with pytest.raises(ValueError, match=r"start is runs/b@3 and sampler_model null"):
        settings(tmp_path, lines_of(2), "start=runs/b@3")


def test_it_learns_the_trees_that_the_answers_are(tmp_path):
    """As `fit` does on the same examples; a run that is there is gone on with."""
    config = settings(tmp_path, lines_of(20))
    final = beta.run(config)
    model = load("tiny", seed=0).with_tags()
    made = beta.make_examples(records_of(config), model.tags)
    assert all(one.layout.width == 2 for one in made)
    expected = fit(model, made, config.fit, tmp_path / "fit", 0, "beta", depth=config.depth)
    ours, theirs, size = load(final).params, expected.params, len(model.tokenizer)
    assert np.array_equal(ours["embed"][:size], theirs["embed"][:size])  # the others are padding
    ours, theirs = (jax.tree.leaves({**params, "embed": 0}) for params in (ours, theirs))
    assert all(map(np.array_equal, ours, theirs))
    assert not (tmp_path / "run/accepted.jsonl").exists()
    assert beta.run(config) == final
    with pytest.raises(ValueError, match=r"inputs\.problems was .*, is"):
        (final / "config.json").unlink(), final.rename(tmp_path / "elsewhere")
        beta.run(settings(tmp_path, lines_of(12)))
