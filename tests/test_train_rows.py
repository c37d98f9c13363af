"""The batch format: packing and grouping change neither visibility nor what counts."""

import random

import numpy as np
import pytest
from train_toy import encode, example, problem, tiny

from npr_jax import tree
from npr_jax.train.packing import Example, count_loss_tokens, make_rows, stack


@pytest.fixture(scope="module")
def model():
    return tiny()


@pytest.fixture(scope="module")
def groups(model):
    """Four groups of 1 to 5 examples that share a prompt, with values that tell tokens apart."""
    rng, made = random.Random(0), []
    for size in (3, 1, 5, 2):
        prompt = problem(rng)[0]
        group = []
        for _ in range(size):
            response = problem(rng, rng.choice((1, 2, 3)))[1]
            length = len(encode(model, prompt, response)[0])
            values = np.array([rng.random() for _ in range(2 * length)], np.float32)
            group.append(
                example(
                    model, prompt, response, advantage=values[:length], old_logp=values[length:]
                )
            )
        made.append(group)
    return made


def rows_seen(row):
    """What each loss token is and sees: (token, position, seen (token, position) pairs, ...)."""
    num = len(row["tokens"])
    laid = tree.TreeLayout(row["positions"], row["hidden"], row["pred"], np.zeros(num, bool))
    visible = laid.visible()
    facts = []
    for t in np.flatnonzero(row["loss_mask"]):
        query = row["pred"][t]
        keys = np.flatnonzero(visible[query])
        facts.append(
            (
                int(row["tokens"][t]),
                int(row["positions"][query]),
                tuple(
                    zip(row["tokens"][keys].tolist(), row["positions"][keys].tolist(), strict=True)
                ),
                float(row["advantages"][t]),
                float(row["old_logp"][t]),
            )
        )
    return facts


@pytest.mark.parametrize("row_len", [112, 150, 256, 1024])
def test_every_token_sees_and_carries_what_it_does_alone(groups, row_len):
    rows = make_rows(groups, row_len, depth=3)
    assert all(row["tokens"].shape == (row_len,) for row in rows)
    assert all(row["hidden"].shape == (row_len, 3, 2) for row in rows)
    packed = sorted(fact for row in rows for fact in rows_seen(row))
    alone = [make_rows([[e]], len(e.token_ids), depth=3) for group in groups for e in group]
    assert packed == sorted(fact for (row,) in alone for fact in rows_seen(row))
    total = sum(int(e.loss_mask.sum()) for group in groups for e in group)
    assert count_loss_tokens(rows) == total == len(packed)


def test_a_shared_prompt_is_there_once(groups):
    (row,) = make_rows([groups[2]], 1024, depth=3)
    prompt_len = groups[2][0].layout.prompt_len
    used = prompt_len + sum(e.layout.total_len for e in groups[2])
    assert (row["pred"][:used] >= 0).sum() == used - 1 and (row["pred"][used:] == -1).all()
    prompt = groups[2][0].token_ids[:prompt_len].tolist()
    tokens = row["tokens"].tolist()
    assert sum(tokens[i : i + prompt_len] == prompt for i in range(len(tokens))) == 1


def test_best_fit_wastes_little(groups):
    singles = [[e] for group in groups for e in group]
    rows = make_rows(singles, 300, depth=3)
    assert len(rows) == -(-sum(len(e.layout) for (e,) in singles) // 300)


def test_errors_name_the_example(model, groups):
    with pytest.raises(ValueError, match=r"example \d of group 0 has \d+ tokens, a row has 30"):
        make_rows(groups, 30, depth=3)
    with pytest.raises(ValueError, match="examples 0 and 1 of group 0 have different prompts"):
        make_rows([[groups[0][0], groups[1][0]]], 512, depth=3)
    with pytest.raises(ValueError, match="need 3 hidden intervals per token, depth is 2"):
        make_rows(groups, 512, depth=2)
    one = groups[0][0]
    with pytest.raises(ValueError, match="loss_mask marks tokens of the prompt"):
        Example(one.token_ids, one.layout, np.ones(len(one.layout), bool))
    with pytest.raises(ValueError, match="old_logp has shape"):
        Example(one.token_ids, one.layout, one.loss_mask, 0.0, np.zeros(3))


def test_a_token_that_nothing_predicts_does_not_count():
    whole = Example(np.arange(5), tree.layout(5), np.ones(5, bool))
    (row,) = make_rows([[whole]], 8, depth=1)
    assert row["loss_mask"].tolist() == [False, True, True, True, True, False, False, False]


@pytest.mark.parametrize("num", [1, 2, 3, 5, 8, 9])
def test_stack_buckets_micro_batches(groups, num):
    rows = (make_rows([[e] for g in groups for e in g], 112, depth=3) * 2)[:num]
    used = -(-num // 2)
    batch = stack(rows, 2, used)
    micro = batch["tokens"].shape[0]
    assert micro >= used and micro & (micro - 1) == 0
    assert batch["hidden"].shape == (micro, 2, 112, 3, 2)
    assert batch["loss_mask"].sum() == batch["loss_mask"][:used].sum() == count_loss_tokens(rows)
