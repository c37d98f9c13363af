"""Online probing: answers stay what they are, and what is decided is what the pool says."""

import dataclasses
import functools
import json

import numpy as np
import pytest
from engine_checks import recount
from fake_device import CONFIGS, engine_on_fake_device
from train_toy import tiny

from npr_jax.base.config import load_config
from npr_jax.decode import SamplingParams
from npr_jax.evaluate.generate import GenerateConfig, generate
from npr_jax.evaluate.policies import tabulate
from npr_jax.evaluate.pools import read_pool
from npr_jax.evaluate.probing import Prober, ProbingConfig, pool_question
from npr_jax.evaluate.run import EvalConfig, evaluate
from npr_jax.evaluate.traces import read_traces
from npr_jax.model.pretrained import save

pytestmark = pytest.mark.usefixtures("plans_without_numbers")
EVERY = 4
PROMPTS = {"a": [12, 13, 20], "b": [22, 9], "c": [9, 14, 16, 22]}


class Toy:
    """A token is a character; 20 closes a box, 21 is the suffix."""

    def encode(self, text, add_special_tokens=True):
        assert text == "\\boxed{" and not add_special_tokens
        return [21]

    def decode(self, ids, **options):
        return "".join("}" if i == 20 else "12"[i % 2] for i in ids)

    def convert_ids_to_tokens(self, token):
        return str(token)


def config(decide: bool, **changes) -> ProbingConfig:
    return ProbingConfig(suffix="\\boxed{", max_tokens=5, decide=decide, T=4, k=3, W=2, **changes)


@functools.cache
def probed(decide: bool, shape=CONFIGS[0], samples: int = 6, **changes):
    """{question: its answers}, and the engine."""
    engine = engine_on_fake_device(dataclasses.replace(shape, pages=200), tokenizer=Toy())
    over: list = []
    prober = Prober(engine, config(decide, **changes), EVERY, over.append)
    asked = [(name, i) for name in PROMPTS for i in range(samples)]
    prompts = [[*PROMPTS[name], 9 + i] for name, i in asked]
    sampling = SamplingParams(parallel=False, max_tokens=70)
    prober.follow(engine.submit(prompts, sampling, prober.hear), asked)
    while engine._requests:
        engine.step()
        recount(engine.schedulers[0])
    assert engine.schedulers[0].pages.num_held == 0 and not prober._of and not prober._groups
    return {group[0].question: group for group in over}, engine


def alone(prompt, length: int):
    engine = engine_on_fake_device(CONFIGS[0])
    (answer,) = engine.generate([prompt], SamplingParams(parallel=False, max_tokens=length))
    return answer.response_ids.tolist()


def test_answers_are_what_they_are_and_probes_what_they_would_say_there():
    groups, _ = probed(decide=False)
    assert [len(group) for group in groups.values()] == [6, 6, 6]
    places = 0
    for question, group in groups.items():
        for answer in group:
            prompt = [*PROMPTS[question], 9 + answer.sample]
            response = answer.trajectory.response_ids.tolist()
            assert response == alone(prompt, 70)
            # One at every multiple before the last token, wherever a visit ended.
            assert len(answer.said) == (len(response) - 1) // EVERY
            spent = 0
            for number, said in enumerate(answer.said, 1):
                drawn = alone([*prompt, *response[: number * EVERY], 21], 5)
                spent += 1 + len(drawn)
                text, closes, _ = Toy().decode([i for i in drawn if i != 2]).partition("}")
                assert said == (text if closes else "")
            assert answer.tokens == spent
            places += len(answer.said)
    assert places > 50


@pytest.mark.parametrize("shape", CONFIGS[1:3])
def test_what_is_decided_is_what_the_whole_pool_says(shape):
    whole, _ = probed(decide=False)
    groups, _ = probed(decide=True, shape=shape)
    dropped = stopped = 0
    for question, group in groups.items():
        known = pool_question(whole[question], "", "", EVERY)
        order = np.arange(len(group), dtype=np.int32)[None]
        found = config(True).policy.run(tabulate(known), order)
        ended = found.seen[0] > [len(branch.probes) for branch in known.branches]
        for answer, seen, over, pruned, other in zip(
            group, found.seen[0], ended, found.pruned[0], whole[question], strict=True
        ):
            assert answer.dropped == (pruned or (bool(found.stopped[0]) and not over))
            response = answer.trajectory.response_ids.tolist()
            if answer.dropped:
                assert answer.said == other.said[:seen]
                assert response == other.trajectory.response_ids[: seen * EVERY].tolist()
                assert answer.trajectory.finish_reason == "aborted"
                dropped += 1
            else:
                assert answer.said == other.said
                assert response == other.trajectory.response_ids.tolist()
        # The pool that is left says the same again.
        left = pool_question(group, "", "", EVERY)
        again = config(True).policy.run(tabulate(left), order)
        np.testing.assert_array_equal(again.tokens, found.tokens)
        assert tabulate(left).names[again.answer[0]] == tabulate(known).names[found.answer[0]]
        stopped += bool(found.stopped[0])
    assert dropped > 3 and stopped


def test_what_is_dropped_is_not_decoded():
    _, all_ = probed(decide=False)
    _, few = probed(decide=True)
    assert few.stats()["decode_tokens"] < 0.9 * all_.stats()["decode_tokens"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("probing")
    save(tiny(), place / "model")
    rows = [{"problem": f"A:{i}+4;B:6*{i}?", "answer": "3"} for i in range(4)]
    (place / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


def settings(place, output, *changes) -> EvalConfig:
    given = {
        "model": str(place / "model"),
        "benchmarks": [f"mine={place / 'mine.jsonl'}"],
        "output": str(output),
        "samples": 4,
        "compilation_cache": str(place / "cache"),
    }
    overrides = [f"{key}={json.dumps(value)}" for key, value in given.items()]
    overrides += ["dtype=float32", "engine={lanes: 8, pages: 200}"]
    overrides += ["sampling={max_tokens: 40, parallel: false}", "probe=6"]
    overrides += ["probing={T: 2, k: 2, W: 1, max_tokens: 4}"]
    return load_config(EvalConfig, "eval", [*overrides, *changes])


def texts(directory) -> dict[str, str]:
    names = ("traces/mine.jsonl", "pools/mine.json", "probes/mine.jsonl")
    found = {}
    for name in names:
        text = (directory / name).read_text()
        found[name] = "".join(sorted(text.splitlines())) if name.endswith("l") else text
    return found


def response_of(trace):
    return trace.sample, trace.id, trace.token_ids[trace.prompt_len :]


@pytest.mark.parametrize("decide", ["false", "true"])
def test_an_evaluation_records_pools_and_goes_on(place, tmp_path, decide):
    change = f"probing.decide={decide}"
    results = evaluate(settings(place, tmp_path / "whole", change))
    seen = results["benchmarks"]["mine"]["probes"]
    pool = read_pool(tmp_path / "whole/pools/mine.json")
    assert [question.gold for question in pool] == ["3"] * 4
    assert all(len(question.branches) == 4 for question in pool)
    assert seen["probes"] == sum(len(b.probes) for q in pool for b in q.branches) > 0
    traces = list(read_traces(tmp_path / "whole/traces/mine.jsonl"))
    assert len(traces) == 16
    if decide == "false":
        assert set(seen) == {"probes", "probe_tokens"}
        evaluate(settings(place, tmp_path / "plain", "probe=0"))
        plain = read_traces(tmp_path / "plain/traces/mine.jsonl")
        assert sorted(map(response_of, traces)) == sorted(map(response_of, plain))
    else:
        assert 0 < seen["total_tokens"] < seen["total_tokens_with_probes"]
        ended = [trace for trace in traces if trace.finish_reason == "aborted"]
        assert ended and all(len(t.token_ids) - t.prompt_len > 0 for t in ended)
    # Cut off within a question, and within a line.
    lines = (tmp_path / "whole/probes/mine.jsonl").read_text().splitlines(keepends=True)
    whole = texts(tmp_path / "whole")
    (tmp_path / "whole/probes/mine.jsonl").write_text("".join(lines[:2]) + lines[2][:9])
    again = evaluate(settings(place, tmp_path / "whole", change))
    assert texts(tmp_path / "whole") == whole
    assert again["benchmarks"]["mine"]["probes"] == seen


def test_what_cannot_be_probed_is_refused(place):
    with pytest.raises(ValueError, match=r"probe is 6 and sampling\.parallel true"):
        settings(place, "x", "sampling.parallel=true")
    with pytest.raises(ValueError, match="decide is true and probe 0"):
        settings(place, "x", "probe=0", "probing.decide=true")


def test_lines_of_generate_say_what_the_probes_said(place, tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(f'{{"problem": "A:{i}+4;B:6*{i}?"}}\n' for i in range(3)))
    overrides = ["dtype=float32", "engine={lanes: 8, pages: 200}", "probe=6"]
    overrides += ["sampling={max_tokens: 40, parallel: false, n: 3}", f"compilation_cache={place}"]
    overrides += ["probing={T: 2, k: 2, W: 1, max_tokens: 4, decide: true}"]
    config = load_config(GenerateConfig, "generate", overrides)
    assert generate(str(place / "model"), source, target, config, print) == (9, 0)
    lines = [json.loads(line) for line in target.read_text().splitlines()]
    for line in lines:
        whole = line["finish_reason"] != "aborted"
        places = (line["tokens"] - whole) // 6  # an answer that was dropped ends at a probe
        assert len(line["probes"]) == places and bool(line["probe_tokens"]) == bool(places)
    kept = target.read_text().splitlines(keepends=True)
    target.write_text("".join(kept[:4]))  # within the answers to a line
    assert generate(str(place / "model"), source, target, config, print) == (5, 0)
    assert sorted(target.read_text().splitlines(keepends=True)) == sorted(kept)
