"""The step head: verdicts are leaves that change nothing else, and scores go where they should."""

import dataclasses
import json
import re
from collections import Counter

import bigram
import jax.numpy as jnp
import numpy as np
import pytest
import report_toy as toy
from test_cold_start import lines_of, settings
from test_evaluate import ROWS, branching
from test_evaluate import config as eval_config
from test_evaluate import write as write_rows
from train_toy import examples, tiny

from npr_jax.decode import fork_join
from npr_jax.evaluate import run as evaluation
from npr_jax.evaluate.run import evaluate
from npr_jax.evaluate.statistics import majority
from npr_jax.evaluate.traces import read_trace, read_traces
from npr_jax.evaluate.verdicts import StepHead, answer_score, closed, word_ids
from npr_jax.model import token_logp
from npr_jax.model.score import logits
from npr_jax.train import beta
from npr_jax.train.packing import make_row
from npr_jax.train.verdicts import with_verdicts
from npr_jax.tree import parse

WORDS = ("+", "*")


def test_a_score_is_the_softmax_of_two_logits_behind_the_step():
    model = tiny()
    head, answers = StepHead(model, WORDS), []
    for e in examples(model, 11, groups=3):
        answers.append((e.token_ids, e.layout))
    cut = answers[0][0][:-30]
    answers.append((cut, parse(cut, answers[0][1].prompt_len, model.tags, allow_open=True)))
    found = head.scores(answers)
    for (ids, tree), scores in zip(answers, found, strict=True):
        columns = (jnp.asarray(x)[None] for x in (ids, tree.positions, tree.hidden))
        z = logits(model.config, model.params, *columns)
        for ends, own in zip(closed(tree), scores, strict=True):
            for end, score in zip(ends, own, strict=True):
                assert ids[end] == model.tags.step_close
                right, wrong = (float(z[0, end, word]) for word in head.ids)
                assert score == pytest.approx(1 / (1 + np.exp(wrong - right)), abs=1e-5)
    assert len(found[0][0]) == 3 and found[-1] == [[]]
    assert answer_score([[0.5, 0.5], [0.1]]) == pytest.approx(0.025) and answer_score([]) == 1


def test_verdicts_change_no_other_token():
    """In one row with another example that shares the prompt: losses and gradients are made of
    log-probs, and those of all other tokens are the same."""
    model = tiny()
    words = word_ids(model.tokenizer, WORDS)
    e, other = examples(model, 2, groups=2)
    other = dataclasses.replace(e, token_ids=e.token_ids.copy())
    told = with_verdicts(e, [[True, False]], words)
    size = len(e.layout)
    assert told.token_ids[size:].tolist() == list(words) and told.loss_mask[size:].all()
    assert told.layout.pred[size:].tolist() == closed(e.layout)[0]
    assert len(with_verdicts(e, [[None, None]], words).layout) == size
    assert with_verdicts(e, [[None, True]], words).token_ids[size:].tolist() == [words[0]]

    def logp(document):
        row = make_row([document], 512, 4)
        columns = (row[name][None] for name in ("tokens", "positions", "hidden", "pred"))
        return np.asarray(token_logp(model.config, model.params, *columns))[0]

    without, having = logp([e, other]), logp([told, other])
    np.testing.assert_allclose(having[:size], without[:size], atol=1e-5)
    rest = slice(size, size + len(other.layout) - e.layout.prompt_len)
    np.testing.assert_allclose(having[size + 2 :][: rest.stop - size], without[rest], atol=1e-5)
    assert (having[size : size + 2] < 0).all()


def test_what_is_no_verdict_is_refused():
    model = tiny()
    for words in (["+"], ["+", "+"], ["12", "+"], ["", "+"], ["+", "*", "="]):
        with pytest.raises(ValueError, match=r"step_words is .* one token each"):
            word_ids(model.tokenizer, words)
    (e,) = examples(model, 1, groups=2)
    for labels in ([[True]], [], [[True, False], [True]]):
        with pytest.raises(ValueError, match=r"the layout has joined \[2\]"):
            with_verdicts(e, labels, (1, 2))


def test_beta_learns_verdicts_beside_what_it_learns(tmp_path, monkeypatch):
    """Its examples are those without, but for the verdicts, and it trains on them."""
    lines, made = lines_of(12), []
    for line in lines[::2]:  # their second value is wrong
        line["response"] = re.sub(r"(2:B:\d\+\d=)\d", r"\g<1>?", line["response"])
    made_by = beta.Fit

    def spy(load, examples, *more):
        made.append(examples)
        return made_by(load, examples, *more)

    monkeypatch.setattr(beta, "Fit", spy)
    on = ["branch_labels=npr_jax.demo.steps", 'step_words=["+", "*"]']
    for name, changes in (("off", []), ("on", on)):
        beta.run(settings(tmp_path, lines, *changes, output=name), lambda metrics: None)
    off, judged = made
    words = word_ids(tiny().tokenizer, WORDS)
    verdicts = [
        tuple(one.token_ids[len(e.token_ids) :]) for e, one in zip(off, judged, strict=True)
    ]
    assert sorted(verdicts) == sorted([words, (words[0], words[0])] * 6)
    for e, one, (_, second) in zip(off, judged, verdicts, strict=True):
        wrong = "?" in tiny().tokenizer.decode(e.token_ids[-60:]).split("step")[-2]
        assert np.array_equal(one.token_ids[: len(e.token_ids)], e.token_ids)
        assert (second == words[1]) == wrong
    assert (tmp_path / "on/final").exists()
    with pytest.raises(ValueError, match=r"step_words was null, is "):
        beta.run(settings(tmp_path, lines, *on, output="off"))


@pytest.mark.parametrize(
    "changes, message",
    [
        (["branch_labels=npr_jax.demo.steps"], "set both, or both to null"),
        (['step_words=["+", "*"]'], "set both, or both to null"),
        (["sampler_model=tiny"], "needed are null and 'strict'"),
        (["layout=causal"], "needed are null and 'strict'"),
        (["train_forced=true"], "train_forced is true and step_words given"),
        (['step_words=["+", "+"]'], None),
    ],
)
def test_verdicts_that_beta_cannot_learn_are_refused(tmp_path, changes, message):
    on = ["branch_labels=npr_jax.demo.steps", 'step_words=["+", "*"]']
    if message is None:  # known when the tokenizer is
        with pytest.raises(ValueError, match=r"step_words is \['\+', '\+'\]"):
            beta.run(settings(tmp_path, lines_of(4), *on, *changes))
        return
    on = [] if "both" in message else on
    with pytest.raises(ValueError, match=message):
        settings(tmp_path, lines_of(4), *on, *changes)


def test_an_evaluation_keeps_scores_and_weighs_votes_by_them(tmp_path, monkeypatch):
    """Without a step head its answers are the same, and know nothing of scores."""
    monkeypatch.setattr(evaluation, "load", lambda *args, **kwargs: branching())
    monkeypatch.setattr(fork_join, "check_block", bigram.check_block_without_numbers)
    write_rows(tmp_path / "mine.jsonl", ROWS)
    small = {"samples": 8, "baseline": False, "step_words": list(WORDS)}
    on = evaluate(eval_config(tmp_path, tmp_path / "on", "sampling.max_tokens=64", **small))
    small["step_words"] = None
    off = evaluate(eval_config(tmp_path, tmp_path / "off", "sampling.max_tokens=64", **small))
    small["step_words"] = list(WORDS)
    path = "traces/mine.jsonl"
    assert '"scores"' not in (tmp_path / "off" / path).read_text()
    traces = {(t.id, t.sample): t for t in read_traces(tmp_path / "on" / path)}
    head, wide = StepHead(branching(), WORDS), 0
    for trace in read_traces(tmp_path / "off" / path):
        own = traces[trace.id, trace.sample]
        assert dataclasses.replace(own, scores=None) == trace
        (scores,) = head.scores([(trace.token_ids, trace.layout)])
        assert [len(x) for x in own.scores] == [len(x) for x in scores]
        for ours, theirs in zip(own.scores, scores, strict=True):
            assert ours == pytest.approx(theirs, abs=1e-4)
        assert own.figures == trace.figures._replace(score=answer_score(own.scores))
        wide += any(len(x) > 1 for x in scores)
    assert wide > 0
    metrics = on["benchmarks"]["mine"]["metrics"]
    weighted = []
    for id in sorted({id for id, _ in traces}):
        answers = [traces[id, i] for i in range(8)]
        votes = Counter()
        for one in answers:
            votes[one.prediction] += answer_score(one.scores)
        del votes[None]
        best = max(votes, key=votes.get) if votes else None
        weighted.append(any(one.correct for one in answers if one.prediction == best and votes))
    assert metrics["weighted@8"]["value"] == pytest.approx(np.mean(weighted))
    assert metrics.keys() - off["benchmarks"]["mine"]["metrics"].keys() == {"weighted@8"}
    for changes in ({"baseline": True}, {"sampling": {"parallel": False}}):
        with pytest.raises(ValueError, match="step_words is given"):
            eval_config(tmp_path, tmp_path / "no", **small | changes)


def test_votes_are_weighed():
    votes = ["1", "2", "2", None, "1"]
    right = [True, False, False, False, True]
    assert majority(votes, right) == 0.5
    assert majority(votes, right, weights=[0.9, 0.4, 0.6, 1.0, 0.2]) == 1
    assert majority(votes, right, weights=[0.9, 0.9, 0.6, 1.0, 0.2]) == 0
    assert majority(votes, right, weights=[1] * 5) == 0.5


@pytest.mark.parametrize(
    "scores", [[], [[0.5]], [[0.5, 1.5]], [[0.5, "1"]], "no", [[0.5, 0.5], []]]
)
def test_scores_of_other_branches_are_no_trace(scores):
    trace = toy.made("?", toy.block("a", "b"))
    line = json.loads(trace.dumps())
    assert read_trace(json.dumps(line | {"scores": [[0.25, 1]]})).figures.score == 0.25
    assert read_trace(json.dumps(line | {"scores": [[]]})).figures.score == 1
    with pytest.raises(ValueError, match="scores is"):
        read_trace(json.dumps(line | {"scores": scores}))
