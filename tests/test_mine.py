"""Mining: runs of parts are those that are independent, and an answer's tokens stay as they are."""

import dataclasses
import functools
import re

import jax
import numpy as np
import optax
import pytest
from conftest import optimised

from npr_jax.evaluate.traces import Trace, read_traces, write_traces
from npr_jax.model import token_loss
from npr_jax.model.pretrained import Model, load
from npr_jax.train.given import read_given
from npr_jax.train.mine import (
    _ITEMS,
    _LINES,
    _PARAGRAPHS,
    Framing,
    MineConfig,
    Miner,
    Structure,
    _merged,
    find,
    mine,
    parts,
)
from npr_jax.tree import Block, layout, parse

CONFIG = MineConfig(min_tokens=2, compilation_cache=None)


LETTERS = "ABCD"


def planted(rng: np.random.Generator) -> tuple[str, str, dict[int, set[int]]]:
    """A problem of the demo whose groups may take the value of an earlier one (by its letter), its
    answer, and which lines each line needs. Lines come in any order in which none comes too early:
    a model that has seen one order alone takes a line that comes first for the first group's."""
    values, problem, lines, sources = [], [], [], []
    for i in range(int(rng.integers(2, 5))):
        operands = [int(x) for x in rng.integers(10, size=2)]
        asked, source = [str(x) for x in operands], -1
        if i and rng.random() < 0.4:
            source, side = int(rng.integers(i)), int(rng.integers(2))
            operands[side], asked[side] = values[source], LETTERS[source]
        a, b = operands
        sources.append(source)
        values.append((a + b) % 10)
        problem.append(f"{LETTERS[i]}:{'+'.join(asked)}")
        lines.append(f"{LETTERS[i]}:{a}+{b}={values[-1]}")
    order: list[int] = []
    while len(order) < len(lines):
        ready = [i for i in range(len(lines)) if i not in order and sources[i] in (-1, *order)]
        order.append(int(rng.choice(ready)))
    needs = {k: {order.index(sources[i])} for k, i in enumerate(order) if sources[i] >= 0}
    needs[len(lines)] = {*range(len(lines))}
    total = sum(values) % 10
    texts = [lines[i] for i in order] + ["S:" + "+".join(map(str, values)) + f"={total}"]
    return ";".join(problem) + "?", "\n".join(texts) + f"\n\\boxed{{{total}}}", needs


def trained(steps: int, rows: int = 48, length: int = 80) -> Model:
    """The tiny model after as many steps on planted answers, as text."""
    rng, known = np.random.default_rng(1), model()
    config, params = known.config, known.params
    schedule = optax.warmup_cosine_decay_schedule(0.0, 3e-3, 50, steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule))

    def loss(params, tokens, lengths):
        place = jax.numpy.arange(length)
        inside = (place < lengths[:, None]) & (place > 0)
        columns = {
            "tokens": tokens,
            "positions": jax.numpy.broadcast_to(place, tokens.shape),
            "pred": jax.numpy.where(inside, place - 1, -1),
            "hidden": jax.numpy.zeros((*tokens.shape, 1, 2), "int32"),
        }
        total, _ = token_loss(config, params, columns, lambda logp, *_: (-logp.sum(), ({}, {})))
        return total / inside.sum()

    @jax.jit
    def step(params, state, tokens, lengths):
        value, gradient = jax.value_and_grad(loss)(params, tokens, lengths)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    state, tokenizer = optimizer.init(params), known.tokenizer
    for _ in range(steps):
        tokens, lengths = np.zeros((rows, length), np.int32), np.zeros(rows, np.int32)
        for row in range(rows):
            problem, text, _ = planted(rng)
            ids = [*tokenizer.encode(problem + text), tokenizer.eos_token_id]
            tokens[row, : len(ids)], lengths[row] = ids, len(ids)
        params, state, value = step(params, state, tokens, lengths)
    print(f"loss {value:.3f}")
    return dataclasses.replace(known, params=params)


@functools.cache
def model() -> Model:
    return load("tiny", tags=True)


def answer(problem: str, text: str, number: int = 0, **changes) -> Trace:
    """A right sequential answer, a token a character."""
    tokenizer = model().tokenizer
    prompt = tokenizer.encode(problem)
    ids = [*prompt, *tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
    pieces = [tokenizer.decode([i]) for i in ids]
    made = Trace(
        problem=problem,
        reference="1",
        token_ids=ids,
        pieces=pieces,
        prompt_len=len(prompt),
        logp=[-1.0] * len(ids),
        step=list(range(len(ids))),
        forced=[False] * len(ids),
        blocks=(),
        prediction="1",
        correct=True,
        violations=[],
        finish_reason="stop",
        id=str(number),
    )
    return dataclasses.replace(made, **changes)


def texts(trace: Trace, pattern) -> list[str]:
    found = parts(trace, pattern, CONFIG)
    assert [part.start for part in found[1:]] == [part.end for part in found[:-1]]
    assert found[0].start == trace.prompt_len and found[-1].end == len(trace.token_ids)
    return ["".join(trace.pieces[part.start : part.end]) for part in found]


def english(text: str, sizes=(1,)) -> Trace:
    """A trace whose pieces have these many characters, in turn."""
    pieces, place = [], 0
    while place < len(text):
        size = sizes[len(pieces) % len(sizes)]
        pieces.append(text[place : place + size])
        place += size
    blank = answer("1+1?", "1")
    ids, flags = list(range(len(pieces))), [False] * len(pieces)
    return dataclasses.replace(
        blank, token_ids=ids, pieces=pieces, prompt_len=0, logp=[], step=ids, forced=flags
    )


LIST = """We need three things.

1. The cost: 3 + 4
   is 7.
2. The weight: 2 * 2 = 4.
- A bullet
Then the sum.

So 11.
"""


def test_parts_are_lines_items_or_paragraphs_without_gaps():
    trace = english(LIST)
    assert texts(trace, _LINES) == re.findall(r"[^\n]+\n+(?:   (?=is))?", LIST)
    items = texts(trace, _ITEMS)
    assert items[:3] == [
        "We need three things.\n\n",
        "1. The cost: 3 + 4\n   is 7.\n",
        "2. The weight: 2 * 2 = 4.\n",
    ]
    assert items[3:] == ["- A bullet\nThen the sum.\n\n", "So 11.\n"]
    assert [text.count("\n\n") for text in texts(trace, _PARAGRAPHS)] == [1, 1, 0]


@pytest.mark.parametrize("pattern", [_LINES, _ITEMS, _PARAGRAPHS])
@pytest.mark.parametrize("sizes", [(2,), (3, 1), (5, 2, 7), (100,)])
def test_a_part_ends_where_a_token_does(pattern, sizes):
    trace = english(LIST, sizes)
    assert "".join(texts(trace, pattern)) == LIST
    whole = {*np.cumsum([len(text) for text in texts(english(LIST), pattern)])}
    assert {*np.cumsum([len(text) for text in texts(trace, pattern)])} <= whole


def test_titles_stand_behind_the_marker_and_end_before_punctuation():
    trace = english("1. The cost: 3\n- so\nA=5\n" + "x" * 30 + "\n")
    titles = [
        "".join(trace.pieces[part.title : part.body])
        for part in parts(trace, _LINES, dataclasses.replace(CONFIG, title_tokens=10))
    ]
    assert titles == ["The cost", "so", "A", "x" * 10]


def searched(num: int, found, config: MineConfig, needs: dict[int, set[int]]) -> Structure:
    """`find` with log-probs of which a part loses 1 nat a token where one that it needs is not
    seen, by the layout's own definition."""
    search = find(num, found, config, lambda run: False)
    tree = next(search)
    while True:
        seen, logp = tree.visible(), np.full(num, -2.0)
        for i, part in enumerate(found):
            if any(not seen[part.body, found[k].start] for k in needs.get(i, ())):
                logp[part.body : part.end] -= 1.0
        try:
            tree = search.send(logp)
        except StopIteration as end:
            return end.value


def by_definition(num_parts: int, needs: dict[int, set[int]]) -> list[tuple[int, int]]:
    """The runs [start, end): from the left, each as long as no part in it needs another in it."""
    runs, start = [], 0
    while start < num_parts - 3:
        end = start + 1
        while end < num_parts - 2 and not needs.get(end, set()) & {*range(start, end)}:
            end += 1
        if end - start > 1:
            runs.append((start, end))
            start = end + 1
        else:
            start += 1
    return runs


def test_runs_are_the_longest_of_which_no_part_needs_another():
    rng = np.random.default_rng(0)
    several = 0
    for _ in range(300):
        num = int(rng.integers(4, 12))
        text = "".join(f"{'ABCD'[i % 4]}:{'1' * int(rng.integers(3, 7))}\n" for i in range(num))
        trace = answer("1?", text)
        found = parts(trace, _LINES, CONFIG)[:num]
        found[-1] = found[-1]._replace(end=len(trace.token_ids))
        if rng.random() < 0.5:  # as behind a list's marker
            found = [part._replace(title=part.title + 1, body=part.body + 1) for part in found]
        chance = rng.choice([0.05, 0.2, 0.5])
        needs = {i: {k for k in range(i) if rng.random() < chance} for i in range(num)}
        config = dataclasses.replace(CONFIG, max_branches=100)
        structure = searched(len(trace.token_ids), found, config, needs)
        runs = by_definition(num, needs)
        assert [(found.index(r[0]), found.index(r[-1]) + 1) for r in structure.runs] == runs
        assert [found.index(part) for part in structure.takeaways] == [end for _, end in runs]
        several += len(runs) > 1
        tokens = len(trace.token_ids)
        inside = sum(found[end - 1].end - found[start].start for start, end in runs)
        assert structure.worth(tokens)[0] == pytest.approx(inside / tokens)
        framing = Framing(model().tokenizer, model().tags)
        ids = framing.framed(trace, structure)
        tree = parse(ids, trace.prompt_len, model().tags)  # else a TraceError
        assert [len(block.steps) for block in tree.blocks] == [end - start for start, end in runs]
        assert framing.joined(ids, trace.prompt_len) == trace.token_ids
    assert several > 30


def test_long_runs_are_merged_to_branches_of_about_one_length():
    trace = answer("1?", "".join("A:" + "1" * n + "\n" for n in (3, 9, 2, 2, 5, 5, 1)))
    run = tuple(parts(trace, _LINES, CONFIG)[:7])
    merged = _merged(run, 4)
    assert [part.end for part in merged[:-1]] == [part.start for part in merged[1:]]
    assert (merged[0].start, merged[-1].end) == (run[0].start, run[-1].end)
    lengths = [part.end - part.start for part in merged]
    assert len(merged) == 4 and max(lengths) == 18  # no cut into four is shorter
    assert _merged(run, 7) == run


def test_hidden_siblings_are_as_if_they_were_not_there():
    """What is measured: the log-probs of each part right behind the text before the run."""
    trace = answer("A:7+4;B:6*2?", "A:7+4=1\nB:6*2=2\nS:1+2=3\n\\boxed{3}")
    miner, found = Miner(model(), CONFIG), parts(trace, _LINES, CONFIG)
    search = find(len(trace.token_ids), found, CONFIG, lambda run: False)
    next(search)
    (logp,) = miner.score([(trace.token_ids, search.send(np.zeros(len(trace.token_ids))))])
    ids, first = trace.token_ids, found[0].start
    for part in found[:-1]:
        alone = [*ids[:first], *ids[part.start : part.end]]
        (known,) = miner.score([(alone, layout(len(alone)))])
        np.testing.assert_allclose(logp[part.start : part.end], known[first:], atol=1e-5)


def test_tags_in_a_text_and_long_answers_stay_as_they_are():
    plain = "A:7+4=1\nB:6*2=2\nS:1+2=3\n\\boxed{3}"
    traces = [
        answer("A:7+4?", plain),
        answer("A:7+4?", "<plan>A:7+4=1\nB:6*2=2\nC:1*1=1\nS:1+2=3\n\\boxed{3}"),
        answer("A:7+4?", plain + "1" * 60),
    ]
    config = dataclasses.replace(CONFIG, tau=100.0, max_tokens=64)
    made = [trace for trace, _ in Miner(model(), config).mine(traces)]
    assert [len(trace.blocks) for trace in made] == [1, 0, 0]
    assert made[1:] == traces[1:]


def test_a_file_is_mined_and_gone_on_with(tmp_path, monkeypatch):
    text = "A:7+4=1\nB:6*2=2\nC:1*1=1\nS:1+2=3\n\\boxed{3}"
    traces = [answer("A:7+4?", text, i) for i in range(7)]
    wrong = dataclasses.replace(traces[0], id="w", correct=False)
    source, target = tmp_path / "answers.jsonl", tmp_path / "out" / "mined.jsonl"
    write_traces(source, [wrong, *traces])
    config = dataclasses.replace(CONFIG, tau=100.0, rows=1)
    found = mine("tiny", source, target, config)
    assert found["answers"] == 8 and found["right"] == found["with_branches"] == 7
    assert found["branches"] == 3.0 and found["critical_path"] > 0
    tokens, inside = len(traces[0].token_ids) - traces[0].prompt_len, len("A:7+4=1\n") * 3
    assert found["parallel_tokens"] == pytest.approx(inside / tokens)
    whole, mined = target.read_bytes(), list(read_traces(target))
    assert not any(trace.violations for trace in mined)
    given = read_given(target, model().tokenizer, model().tags, 5, 1)  # Beta learns from it
    assert [one.ids for one in given] == [trace.token_ids for trace in mined]
    framing = Framing(model().tokenizer, model().tags)
    for trace, made in zip(traces, mined, strict=True):
        assert framing.joined(made.token_ids, made.prompt_len) == trace.token_ids
        assert "".join(made.pieces).replace("<eos>", "").endswith("\\boxed{3}")
    lines = whole.splitlines(keepends=True)
    target.write_bytes(b"".join(lines[:4]) + lines[4][:50])
    assert mine("tiny", source, target, config) == found and target.read_bytes() == whole
    monkeypatch.setattr("npr_jax.train.mine.Miner", None)  # nothing is left to be done
    assert mine("tiny", source, target, config) == found


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"correct": False}, "none that is right"),
        ({"pieces": ["1"] * 18}, "another tokenizer"),
        ({"token_ids": [1000] * 18}, "another tokenizer"),
        ({"blocks": (Block(7, 9, (), ((10, 12), (12, 14)), 14, None, 20, 0),)}, "with branches"),
    ],
)
def test_what_cannot_be_mined_is_named(tmp_path, changes, said):
    trace = answer("A:7+4?", "A:7+4=1\n\\boxed{3}")
    source, target = tmp_path / "answers.jsonl", tmp_path / "mined.jsonl"
    assert len(trace.token_ids) == 18
    write_traces(source, [dataclasses.replace(trace, **changes)])
    with pytest.raises(ValueError, match=said):
        mine("tiny", source, target, CONFIG)
    assert not target.exists()


def test_what_another_has_written_is_kept(tmp_path):
    trace = answer("A:7+4?", "A:7+4=1\n\\boxed{3}")
    source, target = tmp_path / "answers.jsonl", tmp_path / "mined.jsonl"
    write_traces(source, [trace])
    other = (dataclasses.replace(trace, id="9").dumps() + "\n").encode()
    for kept in (other, b"x\n", 2 * (trace.dumps() + "\n").encode(), other + b"half", b"notes"):
        target.write_bytes(kept)
        with pytest.raises(ValueError, match=r"mined\.jsonl.*another --output"):
            mine("tiny", source, target, CONFIG)
        assert target.read_bytes() == kept


@pytest.mark.nightly
def test_planted_dependencies_are_found(report):
    """Of lines that a trained model puts beside each other hardly any needs another, and hardly any
    two are missed that a reader of the problem puts there."""
    rng = np.random.default_rng(0)
    known = [planted(rng) for _ in range(400)]
    traces = [answer(problem, text, i) for i, (problem, text, _) in enumerate(known)]
    config = dataclasses.replace(CONFIG, min_tokens=4)
    with optimised():
        reader = trained(600)
    made = Miner(reader, config).mine(traces)
    found, true, wrong = set(), set(), 0
    for number, ((_, structure), (_, _, needs)) in enumerate(zip(made, known, strict=True)):
        lines = parts(traces[number], _LINES, config)
        oracle = searched(len(traces[number].token_ids), lines, config, needs)
        for some, pairs in ((structure, found), (oracle, true)):
            for run in some.runs:
                places = [lines.index(part) for part in run]
                pairs |= {(number, i, k) for k in places for i in places if i < k}
        wrong += sum(i in needs.get(k, ()) for n, i, k in found if n == number)
    precision, recall = 1 - wrong / len(found), len(found & true) / len(true)
    report(f"{len(true)} pairs of lines, precision {precision:.3f}, recall {recall:.3f}")
    assert len(true) > 300 and precision >= 0.95 and recall >= 0.95
