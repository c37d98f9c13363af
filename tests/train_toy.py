"""Traces in the demo's alphabet, for the tests of training."""

import dataclasses
import json
import random

import numpy as np

import npr_jax
from npr_jax import tree
from npr_jax.model.pretrained import save
from npr_jax.train.fit import FitConfig, fit
from npr_jax.train.optimizer import OptimizerConfig
from npr_jax.train.packing import Example
from npr_jax.train.step import TrainConfig

GROUPS = "ABC"


def tiny(seed=0):
    """The tiny model with a tokenizer; only ids with a text can be sampled."""
    model = npr_jax.load("tiny", seed=seed)
    config = dataclasses.replace(model.config, vocab_size=len(model.tokenizer))
    return dataclasses.replace(model, config=config)


def problem(rng: random.Random, groups=2):
    """(prompt text, response text, answer) of sums modulo 10."""
    facts = [(name, rng.randrange(10), rng.randrange(10)) for name in GROUPS[:groups]]
    values = [(a + b) % 10 for _, a, b in facts]
    total = sum(values) % 10
    plans = "".join(f"<plan>{i}:{n}</plan>" for i, (n, _, _) in enumerate(facts, 1))
    steps = "".join(
        f"\n<step>\n{i}:{n}:{a}+{b}={v}</step>"
        for i, ((n, a, b), v) in enumerate(zip(facts, values, strict=True), 1)
    )
    sums = "+".join(map(str, values))
    text = f"<guideline>{plans}</guideline>{steps}\n<takeaway>\nS:{sums}={total}</takeaway>"
    prompt = ";".join(f"{n}:{a}+{b}" for n, a, b in facts) + "?"
    return prompt, text + "\\boxed{" + str(total) + "}", str(total)


def write_problems(path, num, seed=0, groups=1):
    rng = random.Random(seed)
    rows = [problem(rng, groups) for _ in range(num)]
    lines = [json.dumps({"problem": p, "answer": a}) for p, _, a in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return rows


def encode(model, prompt, response):
    """(ids, prompt_len), with bos and eos."""
    tokenizer = model.tokenizer
    head = [tokenizer.bos_token_id, *tokenizer.encode(prompt, add_special_tokens=False)]
    body = [*tokenizer.encode(response, add_special_tokens=False), tokenizer.eos_token_id]
    return np.array(head + body, np.int32), len(head)


def example(model, prompt, response, **fields):
    """A tree-laid example; every response token that is not forced counts."""
    ids, prompt_len = encode(model, prompt, response)
    laid = tree.parse(ids, prompt_len, model.tags)
    mask = ~laid.forced
    mask[:prompt_len] = False
    return Example(ids, laid, mask, **fields)


def make_home(home):
    """Puts problems into the directory, and two models that have nearly learnt them: one (`seed`)
    answers as plain text, the other (`tree`) in branches."""
    write_problems(home / "problems.jsonl", 64, groups=2)
    model = npr_jax.load("tiny")
    trees = examples(model, 8 * 100, groups=2)
    texts = []
    for e in trees:
        size, prompt_len = len(e.layout), e.layout.prompt_len
        plain = tree.layout(size, prompt_len=prompt_len)
        texts.append(Example(e.token_ids, plain, np.arange(size) >= prompt_len))
    train = TrainConfig(OptimizerConfig(6e-3, "cosine", 6e-4, warmup=5), 256, 2)
    for name, made in (("seed", texts), ("tree", trees)):
        trained = fit(model, made, FitConfig(train, batch=8, steps=100), home / "fit" / name)
        save(trained, home / name)
    return home


def examples(model, num, seed=0, groups=2):
    rng = random.Random(seed)
    return [example(model, *problem(rng, groups)[:2]) for _ in range(num)]
