"""Real weights: greedy text of SmolLM2-135M-Instruct equals transformers'. Run `make test-real`."""

import json
import os
from pathlib import Path

import pytest

import npr_jax

TOKENS = 64
TIE = 1e-3  # logits closer than this may be ordered by the order of float32 sums


@pytest.fixture(scope="module")
def directory() -> Path:
    path = Path(os.environ.get("NPR_SMOLLM2", Path(__file__).parents[1] / "build/smollm2"))
    if not (path / "greedy.json").exists():
        message = f"{path}/greedy.json not found; `make test-real` makes it"
        # Who names the directory wants the test to run.
        (pytest.fail if "NPR_SMOLLM2" in os.environ else pytest.skip)(message)
    return path


def first_difference(ours: list[int], theirs: list[int]) -> int:
    """Index of the first token that differs or that only one has; the length if there is none."""
    same = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
    return min(len(ours), len(theirs)) if same is None else same


@pytest.mark.real
def test_greedy_text_is_that_of_transformers(directory, record_property):
    cases = json.loads((directory / "greedy.json").read_text(encoding="utf-8"))
    model = npr_jax.load(directory)
    engine = npr_jax.Engine(model, npr_jax.EngineConfig(lanes=5, pages=256, page_size=16))
    trajectories = engine.generate(
        [case["prompt_ids"] for case in cases],
        npr_jax.SamplingParams(temperature=0, max_tokens=TOKENS, parallel=False),
    )
    assert len(trajectories) == len(cases) == 10
    ties, wrong = [], []
    for i, (trajectory, case) in enumerate(zip(trajectories, cases, strict=True)):
        ids = [int(token) for token in trajectory.token_ids]
        assert ids[: trajectory.prompt_len] == case["prompt_ids"]
        ours, theirs = ids[trajectory.prompt_len :], case["token_ids"]
        at = first_difference(ours, theirs)
        if at == len(ours) == len(theirs):
            continue
        margin = case["margins"][at] if at < len(case["margins"]) else float("inf")
        found = f"question {i}, token {at}: {ours[at : at + 3]} for {theirs[at : at + 3]}"
        (ties if margin < TIE else wrong).append(f"{found}, margin {margin:.2g}")
    record_property("ties", ties)
    assert not wrong, f"{wrong}; ties: {ties}"


@pytest.mark.real
def test_the_tokenizer_and_chat_template_are_those_of_transformers(directory):
    tokenizer = npr_jax.load(directory).tokenizer
    for case in json.loads((directory / "greedy.json").read_text(encoding="utf-8")):
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": case["problem"]}],
            add_generation_prompt=True,
            return_dict=False,
        )
        assert ids == case["prompt_ids"]
