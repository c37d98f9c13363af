"""Batch inference: bad lines cost nothing but themselves, and a run goes on where it was cut."""

import dataclasses
import json
import re
import subprocess
import sys

import pytest
from train_toy import tiny

from npr_jax.base.config import load_config
from npr_jax.base.files import cut_half_line
from npr_jax.data.prompts import prompt_ids
from npr_jax.decode import Engine, SamplingParams
from npr_jax.evaluate.generate import GenerateConfig, generate
from npr_jax.model.pretrained import save

GOOD = [{"problem": "A:1+2;B:3+4?"}, {"prompt": "A:1*1?", "id": "x7"}, {"problem": "B:9+9?"}]
BAD = [
    b"{",
    b'["problem"]',
    b'{"question": "A:1+2?"}',
    b'{"problem": ""}',
    b'{"problem": 7}',
    b'{"problem": "A?", "prompt": "A?"}',
    b'{"problem": "\xff\xfe"}',
    b'{"problem": "' + b"A" * 5000 + b'"}',
    b'{"prompt": "\xd0\x96"}',  # not in the tokenizer's alphabet: nothing is left of it
    b'{"prompt": "\\ud800"}',
]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("generate")
    save(tiny(), home / "model")
    lines = [json.dumps(row).encode() for row in GOOD]
    text = b"\n".join([lines[0], *BAD, b"", *lines[1:]]) + b"\n"
    (home / "input.jsonl").write_bytes(text)
    return home


def config(**sampling):
    settings = load_config(
        GenerateConfig,
        "generate",
        [
            "engine.lanes=4",
            "engine.pages=64",
            "sampling.max_tokens=24",
            "compilation_cache=null",
        ],
    )
    return dataclasses.replace(
        settings, sampling=dataclasses.replace(settings.sampling, **sampling)
    )


def records(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_answers_and_bad_lines(home, tmp_path):
    warnings, target = [], tmp_path / "answers.jsonl"
    counts = generate(home / "model", home / "input.jsonl", target, config(n=2), warnings.append)
    assert counts == (2 * len(GOOD), len(BAD))
    assert [int(w.split(":")[1]) for w in warnings] == list(range(2, 2 + len(BAD)))
    found = sorted(records(target), key=lambda r: (r["line"], r["sample"]))
    assert [(r["line"], r["sample"]) for r in found] == [
        (line, sample) for line in (1, 13, 14) for sample in (0, 1)
    ]
    assert [r["input"] for r in found[::2]] == GOOD
    assert {r["finish_reason"] for r in found} <= {"stop", "length", "malformed", "invalid_block"}

    # The answer to a line depends on that line only.
    model = tiny()
    engine = Engine(model, config().engine)
    prompt = prompt_ids(model.tokenizer, GOOD[0]["problem"])
    sampling = dataclasses.replace(config(n=2).sampling, seed=1)
    texts = [answer.text for answer in engine.generate([prompt], sampling)]
    assert texts == [record["text"] for record in found[:2]]


def test_a_cut_off_run_goes_on(home, tmp_path):
    def run(target):
        return generate(home / "model", home / "input.jsonl", target, config(n=2), lambda _: None)

    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    run(whole)
    lines = whole.read_bytes().splitlines(keepends=True)
    cut.write_bytes(b"".join(lines[:2]) + lines[2][:40])
    assert run(cut) == (len(lines) - 2, len(BAD))
    assert sorted(cut.read_bytes().splitlines()) == sorted(whole.read_bytes().splitlines())
    assert run(cut) == (0, len(BAD))  # everything is there already
    other = records(cut)[0] | {"input": {"problem": "something else"}}
    cut.write_text(json.dumps(other) + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match="give another output file"):
        run(cut)


def test_seed_must_be_one_number():
    with pytest.raises(ValueError, match=r"sampling\.seed"):
        GenerateConfig(sampling=SamplingParams(seed=(1, 2)))


def test_a_second_run_compiles_nothing_and_says_so(home, tmp_path):
    script = (
        "import sys; from npr_jax.cli import main; sys.argv = ['npr-jax', *sys.argv[1:]]; main()"
    )
    said = []
    for run in range(2):
        command = ["generate", "--model", home / "model", "--input", home / "input.jsonl"]
        command += ["--output", tmp_path / f"{run}.jsonl"]
        for change in (
            f"compilation_cache={tmp_path / 'cache'}",
            f"stats={tmp_path / 'stats.jsonl'}",
            "engine.lanes=2",
            "sampling.max_tokens=8",
        ):
            command += ["--set", change]
        done = subprocess.run(
            [sys.executable, "-c", script, *map(str, command)], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        said.append(done.stderr)
    assert "compile: 1/4 programs" in said[0]
    assert re.search(r"compile: \d+ compiled, 0 from the cache", said[0])
    assert "compile: nothing had to be compiled" in said[1]
    assert records(tmp_path / "0.jsonl") == records(tmp_path / "1.jsonl")
    stats = records(tmp_path / "stats.jsonl")
    assert len(stats) == 2 and all(row["sampled_tokens"] > 0 for row in stats)


@pytest.mark.parametrize("whole", [0, 1, 5, (1 << 20) - 1, 1 << 20, (1 << 20) + 1])
@pytest.mark.parametrize("half", [0, 1, (1 << 20) - 1, 1 << 20, 3 << 20])
def test_half_a_line_is_cut_off_wherever_it_starts(whole, half, tmp_path):
    kept = b"x" * (whole - 1) + b"\n" if whole else b""
    path = tmp_path / "lines"
    path.write_bytes(kept + b"y" * half)
    cut_half_line(path)
    assert path.read_bytes() == kept
