"""What branches get beside their answer's advantage: brute force, and what PAPO makes of it."""

import dataclasses

import numpy as np
import pytest
from conftest import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from test_collect import FakeEngine, FakeFeed, judged
from test_stages import Cut, config, cut_after, weights, without_times
from test_tree import TAGS, traces
from train_toy import encode, tiny

from npr_jax.base.config import load_config
from npr_jax.data.problems import Problem
from npr_jax.demo.steps import label_branches, label_steps
from npr_jax.demo.sums import Teacher, draw, write
from npr_jax.evaluate.steps import find_labels, label_blocks
from npr_jax.train import ask, papo
from npr_jax.train.advantages import branch_credit, differ
from npr_jax.tree import parse

SUMS = "npr_jax.demo.steps"


def brute_force(paths, labels):
    """Token by token: for each branch around it, its label less the mean of its siblings'."""
    credit = []
    for path in paths:
        total = 0.0
        for block, branch in path:
            own = labels[block]
            others = [1 if x else -1 for i, x in enumerate(own) if i != branch]
            if others and None not in own:
                total += (1 if own[branch] else -1) - sum(others) / len(others)
        credit.append(total)
    return credit


@given(traces(), st.data())
@settings(max_examples=examples(150), deadline=None)
def test_credit_equals_brute_force(trace, data):
    tokens, prompt_len, paths = trace
    tree = parse(tokens, prompt_len, TAGS)
    label = st.sampled_from([True, True, False, False, None])
    labels = [
        data.draw(st.lists(label, min_size=len(b.steps), max_size=len(b.steps)))
        for b in tree.blocks
    ]
    credit = branch_credit(tree, labels)
    np.testing.assert_allclose(credit, brute_force(paths, labels), atol=1e-12)
    np.testing.assert_array_equal(branch_credit(parse(tokens, prompt_len, TAGS), labels), credit)
    assert differ(labels) == any(
        None not in own and len(own) > 1 and 0 < sum(own) < len(own) for own in labels
    )
    # Whatever the labels, the trunk gets nothing.
    assert not credit[[not path for path in paths]].any()


def test_credit_by_hand():
    """Three branches, the second of which is wrong and has two of its own."""
    model = tiny()
    inner = "<guideline><plan>1:A</plan><plan>2:B</plan></guideline>"
    inner += "<step>1:A</step><step>2:B</step><takeaway>S</takeaway>"
    text = "<guideline><plan>1:A</plan><plan>2:B</plan><plan>3:C</plan></guideline>"
    text += f"<step>1:A</step><step>2:B{inner}</step><step>3:C</step><takeaway>S</takeaway>"
    ids, prompt_len = encode(model, "A?", text)
    tree = parse(ids, prompt_len, model.tags)
    told = []

    def label(problem, branches):
        told.append((problem, branches))
        return [True, False, True, False, True]

    labels = label_blocks(label, "A?", ids, tree, model.tags)
    assert told == [("A?", ["1:A", f"2:B{inner}", "3:C", "1:A", "2:B"])]
    assert labels == [[True, False, True], [False, True]]
    credit = branch_credit(tree, labels)
    outer, nested = tree.blocks
    values = [set(credit[start:end]) for start, end in outer.steps]
    assert values == [{1.0}, {-2.0, -4.0, 0.0}, {1.0}]  # -2, and in its own branches -2 or 2 more
    assert [set(credit[start:end]) for start, end in nested.steps] == [{-4.0}, {0.0}]
    assert not branch_credit(tree, [[True, None, False], [True, True]]).any()


class Feed(FakeFeed):
    """Problems with a text."""

    def __init__(self, texts):
        self.texts = texts

    def problem(self, place):
        return Problem(self.texts[place], "0")


@pytest.fixture
def labels(tmp_path):
    """Branches are right where they say what the problem says, and unknown in the problem `?`."""
    path = tmp_path / "labels.py"
    path.write_text(
        "def label_branches(problem, branches):\n"
        "    told = [problem[2 * i] for i in range(len(branches))]\n"
        "    known = {'1': True, '0': False, '?': None}\n"
        "    return [known[x] for x in told]\n"
    )
    return str(path)


def collect(changes, groups, texts, monkeypatch, model):
    answers = {(n, i): one for n, group in enumerate(groups) for i, one in enumerate(group)}
    monkeypatch.setattr(ask, "roll_out", lambda *_: answers)
    settings = load_config(papo.PapoConfig, "tiny_papo", [f"prompts={len(groups)}", *changes])
    return papo.collect_groups(FakeEngine(model), Feed(texts), 1, settings)


@pytest.mark.parametrize(
    "changes",
    [(), ("layout=reference",), ("train_forced=true",), ("advantage=mean", "objective=dapo")],
    ids=["papo", "reference", "forced", "dapo"],
)
def test_papo_adds_the_credit_to_the_advantage(labels, changes, monkeypatch):
    model = tiny()
    groups = [[judged(model, right) for right in (True, False)] for _ in range(3)]
    texts = ["1,0", "1,1", "?,0"]
    off = collect(changes, groups, texts, monkeypatch, model)
    on = [*changes, f"branch_labels={labels}"]
    zero = collect(on, groups, texts, monkeypatch, model)
    half = collect([*on, "branch_credit=0.5"], groups, texts, monkeypatch, model)
    assert half.metrics["branches_right"] == 6 / 10  # of 12 two are not known
    assert half.metrics["branches_told_apart"] == 2 / 6
    for number in range(3):
        for base, same, ours in zip(
            off.groups[number], zero.groups[number], half.groups[number], strict=True
        ):
            for field in dataclasses.fields(base):
                if field.name != "layout":
                    one, other = getattr(base, field.name), getattr(same, field.name)
                    assert one.tobytes() == other.tobytes() and one.dtype == other.dtype
            expected = branch_credit(ours.layout, [[True, False]]) if number == 0 else 0
            np.testing.assert_allclose(ours.advantage - base.advantage, 0.5 * expected, atol=1e-6)
            assert np.array_equal(ours.loss_mask, base.loss_mask)
    told = ("branches_right", "branches_told_apart")
    assert {k: v for k, v in half.metrics.items() if k not in told} == off.metrics


def test_answers_of_equal_reward_are_trained_on_where_branches_differ(labels, monkeypatch):
    model = tiny()
    group = [[judged(model, False), judged(model, False), judged(model, False, reason="length")]]
    on = ["malformed=filter", f"branch_labels={labels}", "branch_credit=1"]
    made = collect(on, group, ["1,0"], monkeypatch, model)
    assert "skipped_because" not in made.metrics and len(made.groups[0]) == 2
    for example in made.groups[0]:
        (first, second), trunk = example.layout.blocks[0].branches, example.advantage.copy()
        assert (trunk[slice(*first)] == 2).all() and (trunk[slice(*second)] == -2).all()
        trunk[first[0] : second[1]] = 0
        assert not trunk.any()
    for changes, text in ((on, "1,1"), (on, "?,0"), ([*on, "branch_credit=0"], "1,0")):
        skipped = collect(changes, group, [text], monkeypatch, model)
        assert "2 whole trees are equal" in skipped.metrics["skipped_because"]


def test_what_is_no_whole_tree_has_no_credit(labels, monkeypatch):
    model = tiny()
    group = [[judged(model, True), judged(model, True, reason="length")]]
    on = ["malformed=penalty", f"branch_labels={labels}", "branch_credit=1"]
    whole, cut = collect(on, group, ["1,0"], monkeypatch, model).groups[0]
    assert len(set(whole.advantage)) == 3 and len(set(cut.advantage)) == 1


@pytest.mark.parametrize(
    "text, message",
    [
        ("label_branches = 3", r"has no function label_branches\(problem, branches\)"),
        ("", r"has no function label_branches\(problem, branches\)"),
        ("1 +", "cannot be imported"),
    ],
)
def test_a_stage_without_its_labels_is_refused(tmp_path, text, message):
    path = tmp_path / "none.py"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_config(papo.PapoConfig, "tiny_papo", [f"branch_labels={path}"])
    with pytest.raises(ValueError, match=r"branch_credit is 0\.5 and branch_labels null"):
        load_config(papo.PapoConfig, "tiny_papo", ["branch_credit=0.5"])


@pytest.mark.parametrize("change", ["carry=24", "staleness=1"])
def test_credit_is_refused_with_what_is_not_tested(change):
    on = "branch_labels=npr_jax.demo.steps", "branch_credit=0.5"
    with pytest.raises(ValueError, match=r"branch_credit is 0\.5, carry \d+ and staleness \d:"):
        load_config(papo.PapoConfig, "tiny_papo", [*on, change])


@pytest.mark.parametrize("found", [[True], [True, 0.5], [True, "no"], [True, False, None]])
def test_labels_that_are_none_are_refused(found):
    model = tiny()
    answer = judged(model, True).trajectory
    with pytest.raises(ValueError, match="for 2 branches of 'A', needed is True, False or None"):
        label_blocks(lambda *_: found, "A", answer.token_ids, answer.layout, model.tags)


def test_branches_of_the_demo_are_labelled_as_its_steps():
    """In the teacher's answers a branch is one line."""
    rng, label = np.random.default_rng(0), find_labels(SUMS)
    assert label is label_branches
    model, wrong = tiny(), 0
    for number, task in enumerate(draw(300, rng)):
        answer = write(task, lambda fact, n=number: Teacher(n % 7).value(fact, rng), None, None)
        ids, prompt_len = encode(model, task.problem, answer)
        tree = parse(ids, prompt_len, model.tags)
        found = label_blocks(label, task.problem, ids, tree, model.tags)
        steps = label_steps(task.problem, answer)
        steps = [step.right for step in steps if step.text[0] not in "S\\"]  # no chain, no box
        assert [x for own in found for x in own] == steps
        wrong += steps.count(False)
    assert wrong > 50
    assert label("A:1+2;B:3*3?", ["1:A:1+2=3", "", "B:3*3=9\nB:3*3=9"]) == [True, False, False]


@pytest.mark.slow
def test_a_run_with_credit_resumes_to_the_same_bits(home, tmp_path):
    """It also learns something else than a run without, which labels change nothing of."""
    large = tmp_path / "large.py"  # this model's values are hardly ever right
    large.write_text(
        "def label_branches(problem, branches): return [b[-1] > '4' for b in branches]"
    )
    on = ("steps=3", f"branch_labels={large}")

    def run(name, *changes, end=None):
        return papo.run(config(home, "papo", tmp_path / name, *changes), end)

    whole = run("whole", *on, "branch_credit=0.5")
    with pytest.raises(Cut):
        run("cut", *on, "branch_credit=0.5", end=cut_after(2))
    assert weights(run("cut", *on, "branch_credit=0.5")) == weights(whole)
    assert without_times(tmp_path / "cut") == without_times(tmp_path / "whole")
    plain, labelled = run("plain", "steps=3"), run("labelled", *on)
    assert weights(plain) == weights(labelled) != weights(whole)
    told = {"branches_right", "branches_told_apart"}
    for line, other in zip(
        without_times(tmp_path / "labelled"), without_times(tmp_path / "plain"), strict=True
    ):
        assert line.keys() - other.keys() == told and 0 < line["branches_right"] < 1
        assert {k: v for k, v in line.items() if k not in told} == other
    with pytest.raises(ValueError, match=r"branch_credit was 0\.5, is 0\.0"):
        run("cut", *on)
