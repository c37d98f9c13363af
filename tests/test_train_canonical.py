"""Canonical framing: contexts become the engine's, and nothing else changes."""

import random
import re

import numpy as np
import pytest
import transformers
from conftest import shared_path

from npr_jax.tree import TAG_NAMES, TagIds, TraceError, parse
from npr_jax.tree.canonical import canonical

SPACES = ("", "\n", "\n\n", " ", "\n \n\n")
INNER = ("", "\n", "\n\n", " ", "  \n")


@pytest.fixture(scope="module")
def qwen():
    tokenizer = transformers.AutoTokenizer.from_pretrained(shared_path("qwen3_tokenizer"))
    tokenizer.add_tokens(list(TAG_NAMES), special_tokens=True)
    return tokenizer, TagIds.from_tokenizer(tokenizer)


def make_block(rng, nested=False):
    num = rng.randint(1, 4)
    plans = "\n".join(f"<plan>{i}: look at part {i}</plan>" for i in range(1, num + 1))
    steps = ""
    for i in range(1, num + 1):
        inner = "\n" + make_block(rng) if nested and rng.random() < 0.4 else ""
        body = f"part {i} gives {rng.randint(0, 99)}{inner}\n"
        steps += f"{rng.choice(SPACES)}<step>{rng.choice(INNER)}{i}: {body}</step>"
    takeaway = f"{rng.choice(SPACES)}<takeaway>{rng.choice(INNER[:3])}so it is</takeaway>"
    return f"<guideline>\n{plans}\n</guideline>{steps}{takeaway}"


def rewrite_text(text):
    text = re.sub(r"\s*<step>\s*(\d+):", r"\n<step>\n\1:", text)
    return re.sub(r"\s*<takeaway>\s*", "\n<takeaway>\n", text)


@pytest.mark.parametrize("seed", range(20))
def test_headers_become_the_engines_and_the_rest_stays(qwen, seed):
    tokenizer, tags = qwen
    rng = random.Random(seed)
    prompt = "Use <step> and <takeaway> tags:"
    response = "\n".join(make_block(rng, seed % 2 == 1) for _ in range(rng.randint(1, 3)))
    response += "\nThe answer is \\boxed{7}."
    head = tokenizer.encode(prompt, add_special_tokens=False)
    ids = head + tokenizer.encode(response, add_special_tokens=False)
    done = canonical(ids, len(head), tags)
    assert tags.decode(done[: len(head)].tolist()) == prompt
    assert tags.decode(done[len(head) :].tolist()) == rewrite_text(response)
    tree = parse(done, len(head), tags)
    for block in tree.blocks:
        heads = [*zip([s for s, _ in block.branches], tags.step_headers, strict=False)]
        for start, header in [*heads, (block.join, tags.takeaway_header)]:
            assert tuple(done[start : start + len(header)].tolist()) == header
            assert tree.forced[start : start + len(header)].all()
    headers = sum(
        sum(map(len, tags.step_headers[: len(b.steps)])) + len(tags.takeaway_header)
        for b in tree.blocks
    )
    assert tree.forced.sum() == headers
    np.testing.assert_array_equal(canonical(done, len(head), tags), done)


def test_steps_without_their_number_are_refused(qwen):
    tokenizer, tags = qwen

    def attempt(step):
        text = f"<guideline><plan>1: a</plan></guideline><step>{step}</step><takeaway>t</takeaway>"
        return canonical(tokenizer.encode(text, add_special_tokens=False), 0, tags)

    for step in ("look", "2: look", "", "one: look", "11: look"):
        with pytest.raises(TraceError, match="step 1 starts with"):
            attempt(step)
    # ":\n" is one token: the colon cannot be forced without taking the newline along.
    with pytest.raises(TraceError, match="joins the prefix"):
        attempt("1:\nlook")
    with pytest.raises(TraceError):
        canonical(tokenizer.encode("<guideline>", add_special_tokens=False), 0, tags)
