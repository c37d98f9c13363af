"""Beta on answers that are given: which lines it takes, and that it learns them as any others."""

import json
import random

import jax
import numpy as np
import pytest
from train_toy import encode, problem, tiny

from npr_jax import load
from npr_jax.base.config import load_config
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
    ],
)
def test_what_is_no_answer_to_learn_from_is_named(tmp_path, line, changes, wanted):
    lines = lines_of(4)
    lines[2] |= line
    with pytest.raises(ValueError, match=wanted):
        beta.run(settings(tmp_path, lines, *changes))


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
