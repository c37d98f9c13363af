"""Rows of 4,096 tokens are full: at least 95%, and no emptier than grain's best fit leaves them."""

import gzip
import json

import grain
import numpy as np
import pytest
import transformers
from conftest import shared_path

from npr_jax.train.packing import Example, make_rows
from npr_jax.tree import layout

ROW_LEN = 4096
PAD = 0


def gsm8k_lengths(num):
    """(prompt, answer) tokens of GSM8K's first training problems, by Qwen3's tokenizer."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(shared_path("qwen3_tokenizer"))
    with gzip.open(shared_path("benchmarks/gsm8k_train.jsonl.gz")) as file:
        rows = [json.loads(line) for _, line in zip(range(num), file, strict=False)]
    parts = [tokenizer([row[key] for row in rows])["input_ids"] for key in ("problem", "solution")]
    return [(len(prompt), len(answer)) for prompt, answer in zip(*parts, strict=True)]


def synthetic_lengths(num):
    """Log-normal, with the mean and spread of the lengths above."""
    rng = np.random.default_rng(0)
    return list(
        zip(
            np.exp(rng.normal(4.0, 0.35, num)).astype(int) + 1,
            np.exp(rng.normal(4.75, 0.45, num)).astype(int) + 1,
            strict=True,
        )
    )


def group(lengths, rng):
    """Examples behind one prompt; `lengths` is (prompt, answer, ...). No token is PAD."""
    prompt_len, *answers = lengths
    prompt = rng.integers(1, 9, prompt_len)
    made = []
    for answer in answers:
        ids = np.concatenate([prompt, rng.integers(1, 9, answer)])
        laid = layout(len(ids), prompt_len=prompt_len)
        made.append(Example(ids, laid, np.arange(len(ids)) >= prompt_len))
    return made


def fill(rows):
    return np.mean([row["tokens"] != PAD for row in rows])


def grain_rows(sizes):
    source = grain.MapDataset.source([{"x": np.ones(size, np.int32)} for size in sizes])
    packed = grain.experimental.BestFitPackIterDataset(
        source.to_iter_dataset(), length_struct={"x": ROW_LEN}, num_packing_bins=64
    )
    return sum(1 for _ in packed)


@pytest.mark.parametrize("lengths_of", [gsm8k_lengths, synthetic_lengths])
def test_rows_of_short_problems_are_full(lengths_of, report):
    lengths = lengths_of(1024)
    rng = np.random.default_rng(1)
    rows = make_rows([group(pair, rng) for pair in lengths], ROW_LEN, 1)
    assert sum((row["tokens"] != PAD).sum() for row in rows) == sum(map(sum, lengths))
    theirs = grain_rows(map(sum, lengths))
    report(f"{len(rows)} rows, {fill(rows):.1%} full; grain's best fit: {theirs} rows")
    assert fill(rows) >= 0.95
    assert len(rows) <= theirs


@pytest.mark.parametrize("samples", [4, 8, 16])
def test_rows_of_groups_are_full(samples, report):
    """Also where a group nearly fills a row, so that whole groups would leave much of it empty."""
    rng = np.random.default_rng(2)
    groups = [
        group([prompt, *np.maximum(1, answer * rng.lognormal(0.5, 0.25, samples)).astype(int)], rng)
        for prompt, answer in synthetic_lengths(96)
    ]
    rows = make_rows(groups, ROW_LEN, 2)
    report(f"{len(rows)} rows, {fill(rows):.1%} full")
    assert fill(rows) >= 0.95
    answers = sum(int(example.loss_mask.sum()) for made in groups for example in made)
    assert sum(int(row["loss_mask"].sum()) for row in rows) == answers
