"""Answers without a model, and directories like those of evaluations and training runs."""

import json
import random
import re

import numpy as np

from npr_jax.evaluate.traces import Trace
from npr_jax.tree import TAG_NAMES, TagIds, parse

# What no page may take for anything but text.
NASTY = "</script><img src=x onerror=alert(1)> \x00\u2028\u2029 \ud800 \u202e אבג & <b>\"'\x1b[31m"
_OUTSIDE = re.compile(
    r"""(?:src|href|action)\s*=\s*["']?+(?!#)|@import|url\(|https?://(?!www\.w3)"""
)
_WORD = re.compile(r"</?(?:guideline|plan|step|takeaway)>|\n|[^\S\n]?[^\s<]+|[^\S\n]|<")


def fetches(page: str) -> bool:
    """Whether a page names anything outside itself; packed answers name nothing."""
    return bool(_OUTSIDE.search(re.sub(r'<script type="text/plain".*?</script>', "", page)))


class Words:
    """A vocabulary that grows: a token per tag, line end, or word with the space before it."""

    def __init__(self):
        self.ids: dict[str, int] = {}
        names = self.encode("".join(TAG_NAMES))
        heads = tuple(tuple(self.encode(f"\n<step>\n{i}:")) for i in range(1, 9))
        space = frozenset(self.encode("\n "))
        self.tags = TagIds(*names, space, heads, tuple(self.encode("\n<takeaway>\n")))

    def encode(self, text: str) -> list[int]:
        return [self.ids.setdefault(piece, len(self.ids)) for piece in _WORD.findall(text)]


def made(problem: str, response: str, seed: int = 0, **about) -> Trace:
    """A trace whose branches were decoded side by side, a token a step, with random log-probs."""
    words, rng = Words(), random.Random(seed)
    prompt = words.encode(problem + "\n")
    ids = prompt + words.encode(response)
    names = list(words.ids)
    tree = parse(ids, len(prompt), words.tags, allow_open=True)
    sampled = ~tree.forced & (np.arange(len(ids)) >= len(prompt))
    sure = [rng.random() ** 5 for _ in ids]
    values = {
        "reference": "42",
        "prediction": "42",
        "correct": True,
        "violations": [],
        "finish_reason": "stop",
        "benchmark": "made24",
        "id": "made24-1",
    }
    return Trace(
        problem=problem,
        token_ids=ids,
        pieces=[names[i] for i in ids],
        prompt_len=len(prompt),
        logp=[round(-4 * x, 4) if s else 0.0 for x, s in zip(sure, sampled, strict=True)],
        step=[
            int(p) - len(prompt) if s else -1 for p, s in zip(tree.positions, sampled, strict=True)
        ],
        forced=tree.forced.tolist(),
        blocks=tree.blocks,
        **(values | about),
    )


def block(*steps: str, takeaway: str = "They agree.") -> str:
    """A block in canonical form."""
    plans = "\n".join(f"<plan>{i}: part {i} of the work</plan>" for i in range(1, len(steps) + 1))
    bodies = "".join(f"\n<step>\n{i}: {text}\n</step>" for i, text in enumerate(steps, 1))
    return f"<guideline>\n{plans}\n</guideline>{bodies}\n<takeaway>\n{takeaway}\n</takeaway>\n"


def nested(**about) -> Trace:
    """Two blocks, the second with a block inside its first branch."""
    inner = "Look closer.\n" + block("left of it", "right of it", takeaway="Both hold.")
    text = block("first thought\nin two lines", "second thought", "third")
    text += block(inner + "So it is.", "the other way") + "\\boxed{42}"
    return made("What is six times seven?", text, **about)


def long(tokens: int, seed: int = 0) -> Trace:
    """About that many tokens in three branches."""
    rng = random.Random(seed)
    body = "".join(
        rng.choice(["so", " the", " sum", " of", " x", "\n", " is", " 12", " hence"])
        for _ in range(tokens // 3)
    )
    return made("A long one?", block(body, body, body) + "\\boxed{42}", seed)


def write_traces(path, traces) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [t.dumps() for t in traces]
    path.write_text("\n".join([*lines, ""]), encoding="utf-8", errors="surrogatepass")


def evaluation(folder, per_file: int = 20):
    """A directory as `npr-jax eval` leaves it."""
    traces = []
    for i in range(per_file):
        steps = [f"thought {j} of {i}" for j in range(1, 2 + i % 4)]
        right = i % 3 != 0
        traces.append(
            made(
                f"Problem number {i}: what is it?",
                block(*steps) + f"\\boxed{{{i}}}",
                seed=i,
                id=f"made24-{i}",
                prediction=str(i),
                reference=str(i) if right else "7",
                correct=right,
            )
        )
    write_traces(folder / "traces" / "made24.jsonl", traces)
    plain = [
        made(f"Problem number {i}?", f"It is {i}.\n\\boxed{{{i}}}", i) for i in range(per_file)
    ]
    write_traces(folder / "traces" / "made24.sequential.jsonl", plain)
    metrics = {
        "avg@8": {"value": 0.6667, "low": 0.5, "high": 0.8125},
        "parallel_rate": {"value": 0.75},
        "tokens": {"value": 5123.4, "low": 4800, "high": 5400},
    }
    results = {
        "settings": {"model": "m<o>del", "samples": 8},
        "versions": {"jax": "0.10.2"},
        "device": "cpu",
        "benchmarks": {"made24": {"problems": 30, "samples": 8, "metrics": metrics}},
    }
    (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
    (folder / "config.yaml").write_text("model: m<o>del\nsamples: 8\n", encoding="utf-8")
    return folder
