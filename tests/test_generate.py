"""Batch inference: bad lines cost nothing but themselves, and a run goes on where it was cut."""

import dataclasses
import errno
import gzip
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from train_toy import tiny

from npr_jax.base.config import load_config
from npr_jax.base.files import cut_half_line, lasting
from npr_jax.base.seeds import seed_of
from npr_jax.data.prompts import prompt_ids
from npr_jax.decode import Engine, SamplingParams
from npr_jax.evaluate import generate as module
from npr_jax.evaluate.generate import GenerateConfig, adding, generate
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
    b'{"prompt": "A?", "x": "\\ud83d"}',  # could not be written as text
    b'{"prompt": "A?", "\\udc00": 1}',
    b'{"prompt": "A?", "x": [NaN]}',
    b'{"prompt": "A?", "x": [1e999]}',  # could not be written as JSON
    b'{"prompt": "A?", "x": ' + b"9" * 5000 + b"}",
    b'{"prompt": "A?", "prompt": "B?"}',
    b'{"prompt": "A?", "x": ' + b"[" * 101 + b"]" * 101 + b"}",
    b"[" * 100_000,
    b"\x00\x00",
    b"\xff\xfe{\x00",
]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("generate")
    save(tiny(), home / "model")
    lines = [json.dumps(row).encode() for row in GOOD]
    text = b"\n".join([b"\xef\xbb\xbf" + lines[0] + b"\r", *BAD, b"", *lines[1:]]) + b"\n"
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


@pytest.mark.slow
def test_answers_and_bad_lines(home, tmp_path):
    warnings, target = [], tmp_path / "answers.jsonl"
    counts = generate(home / "model", home / "input.jsonl", target, config(n=2), warnings.append)
    assert counts == (2 * len(GOOD), len(BAD))
    assert [int(w.split(":")[1]) for w in warnings] == list(range(2, 2 + len(BAD)))
    found = sorted(records(target), key=lambda r: (r["line"], r["sample"]))
    assert [(r["line"], r["sample"]) for r in found] == [
        (line, sample) for line in (1, len(BAD) + 3, len(BAD) + 4) for sample in (0, 1)
    ]
    assert [r["input"] for r in found[::2]] == GOOD
    assert {r["finish_reason"] for r in found} <= {"stop", "length", "malformed", "invalid_block"}

    # The answer to a line depends on that line only.
    model = tiny()
    engine = Engine(model, config().engine)
    prompt = prompt_ids(model.tokenizer, GOOD[0]["problem"])
    sampling = dataclasses.replace(config(n=2).sampling, seed=seed_of(0, 1))
    texts = [answer.text for answer in engine.generate([prompt], sampling)]
    assert texts == [record["text"] for record in found[:2]]


@pytest.mark.slow
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


@pytest.mark.parametrize(
    "data, message",
    [
        (b"", "is empty"),
        (b"\xef\xbb\xbf\r\n\n", "is empty"),
        (b"\n{}\n", "no line of .* can be answered"),
        (b"[" + json.dumps(GOOD[0]).encode() + b"]", "no line of .* can be answered"),
        (gzip.compress(json.dumps(GOOD[0]).encode(), mtime=0)[:-9], "no whole gzip file"),
        (json.dumps({"prompt": "A" * 5000}).encode(), "no line of .* can be answered"),
    ],
)
def test_an_input_without_a_line_to_answer_is_an_error(data, message, home, tmp_path):
    (tmp_path / "in").write_bytes(data)
    with pytest.raises(ValueError, match=message):
        generate(home / "model", tmp_path / "in", tmp_path / "out", config(), lambda _: None)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


ANSWER = b'{"line": 1, "sample": 0, "input": {"problem": "A:1+2;B:3+4?"}}\n'


@pytest.mark.parametrize(
    "content, message",
    [
        (b"my notes", "out:1 is no answer"),
        (ANSWER + b"my notes", "out:2 is no answer"),
        (ANSWER + b'{"line": [1], "sample": 0, "input": 1}\n', "out:2 is no answer"),
        (ANSWER.replace(b"0", b"[0]"), "out:1 is no answer"),
        (b"\xff\n", "out:1 is no answer"),
        (b"[1]\n", "out:1 is no answer"),
        (b"7\n", "out:1 is no answer"),
        (b"\n", "out:1 is no answer"),
        (b'{"line": 1, "sample": 0, "input": 5}\n{"li', "out:1 answers another line"),
    ],
)
def test_an_output_of_something_else_is_left_as_it_is(content, message, home, tmp_path):
    (tmp_path / "out").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        generate("no model", home / "input.jsonl", tmp_path / "out", config(), lambda _: None)
    assert (tmp_path / "out").read_bytes() == content


def test_an_input_is_no_output(home, tmp_path):
    source = shutil.copy(home / "input.jsonl", tmp_path / "in")
    before = source.read_bytes()
    with pytest.raises(ValueError, match="is no answer"):
        generate("no model", source, source, config(), lambda _: None)
    assert source.read_bytes() == before


def test_statistics_have_a_file_of_their_own(home, tmp_path):
    source, target = Path(shutil.copy(home / "input.jsonl", tmp_path / "in")), tmp_path / "out"
    (tmp_path / "link").symlink_to(source)
    before = source.read_bytes()
    for stats, other in (("in", "--input"), ("link", "--input"), ("out", "--output")):
        settings = dataclasses.replace(config(), stats=str(tmp_path / "x" / ".." / stats))
        with pytest.raises(ValueError, match=rf"stats is .*{stats}, the {other}: set another"):
            generate("no model", source, target, settings, lambda _: None)
    assert source.read_bytes() == before and not target.exists()


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1])
def test_seeds_of_lines_and_runs_do_not_meet(home, tmp_path, monkeypatch, seed):
    """The next line of this run is not this line of the next; and every seed that a key takes."""
    asked = []
    monkeypatch.setattr(module, "load", lambda *args, **kwargs: tiny())
    monkeypatch.setattr(module, "compile_all", lambda *args: None)
    monkeypatch.setattr(Engine, "submit", lambda self, prompts, sampling, _: asked.append(sampling))
    with pytest.raises(TypeError):  # there are no ids
        generate("m", home / "input.jsonl", tmp_path / "out", config(seed=seed), lambda _: None)
    assert asked[0].seed == tuple(seed_of(seed, k) for k in (1, len(BAD) + 3, len(BAD) + 4))


def test_two_do_not_write_one_output(home, tmp_path):
    with adding(tmp_path / "out"):
        with pytest.raises(ValueError, match=r"another process is writing .*out"):
            generate("no model", home / "input.jsonl", tmp_path / "out", config(), print)
        assert (tmp_path / "out").exists()
    assert not (tmp_path / "out").exists()  # it got nothing


def test_a_disk_that_is_full_costs_one_answer(home, tmp_path, monkeypatch):
    """It is told with the file's name, and may pass; what is half a line is no harm."""
    target, write = tmp_path / "out", module.write_all

    def full(file, data):
        write(file, data[:30])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "write_all", full)
    with pytest.raises(OSError, match=r"out cannot be written \(no space left") as error:
        generate(home / "model", home / "input.jsonl", target, config(), lambda _: None)
    assert not lasting(error.value)
    monkeypatch.setattr(module, "write_all", write)
    counts = generate(home / "model", home / "input.jsonl", target, config(), lambda _: None)
    assert counts == (len(GOOD), len(BAD)) and len(records(target)) == len(GOOD)


def test_answers_that_fail_are_told_and_asked_again(home, tmp_path, monkeypatch):
    broken = tiny()
    broken.params["final_norm"] = broken.params["final_norm"] * float("nan")
    said, target, load = [], tmp_path / "out", module.load
    monkeypatch.setattr(module, "load", lambda *args, **kwargs: broken)
    counts = generate("broken", home / "input.jsonl", target, config(n=2), said.append)
    assert counts == (0, len(BAD) + len(GOOD))
    assert [int(line.split(":")[1]) for line in said[len(BAD) :]] == [1, len(BAD) + 3, len(BAD) + 4]
    assert all("log-probabilities are not finite" in line for line in said[len(BAD) :])
    monkeypatch.setattr(module, "load", load)
    counts = generate(home / "model", home / "input.jsonl", target, config(), said.append)
    assert counts == (len(GOOD), len(BAD))


def test_missing_folders_of_an_output_are_made(home, tmp_path):
    target = tmp_path / "a" / "b" / "out.jsonl"
    generate(home / "model", home / "input.jsonl", target, config(), lambda _: None)
    assert len(records(target)) == len(GOOD)


def test_a_model_without_tags_is_refused_at_once(home, tmp_path, monkeypatch):
    bare = dataclasses.replace(tiny(), tags=None)
    monkeypatch.setattr(module, "load", lambda *args, **kwargs: bare)
    with pytest.raises(ValueError, match=r"has no tags.*--set sampling.parallel=false"):
        generate("bare", home / "input.jsonl", tmp_path / "out", config(), lambda _: None)


def test_the_instruction_is_asked(home, tmp_path, monkeypatch):
    loaded = tiny()
    loaded.tokenizer.chat_template = "{{ messages[0]['content'] }}"
    monkeypatch.setattr(module, "load", lambda *args, **kwargs: loaded)
    asked = []

    def keep(engine, requests, *rest):
        asked.extend(requests)
        return 0, {}

    monkeypatch.setattr(module, "_answer", keep)
    settings = dataclasses.replace(config(), instruction="B:9+9?")
    generate("chat", home / "input.jsonl", tmp_path / "out", settings, lambda _: None)
    texts = {request.line: loaded.tokenizer.decode(request.prompt) for request in asked}
    assert texts[1] == GOOD[0]["problem"] + "\n\nB:9+9?"
    assert "B:9+9?" not in texts[len(BAD) + 3]  # a "prompt" is continued as it is


def test_seed_must_be_one_number():
    with pytest.raises(ValueError, match=r"sampling\.seed"):
        GenerateConfig(sampling=SamplingParams(seed=(1, 2)))


@pytest.mark.slow
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
        assert done.returncode == 4, done.stderr  # lines were left out
        said.append(done.stderr)
    assert re.search(r"compile: \d/7 programs", said[0])  # two prefills, tables, marks, two widths
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


def test_a_checkpoint_without_tokenizer_or_rows_of_tags_is_refused_at_once(home, tmp_path):
    model = tiny()
    bare = dataclasses.replace(model, tokenizer=None, tags=None)
    save(bare, tmp_path / "bare")
    # Tags that the checkpoint has no rows for are as good as none.
    cut = dataclasses.replace(model.config, vocab_size=10)
    save(dataclasses.replace(model, config=cut), tmp_path / "untagged")
    for name, words in (
        ("bare", "has no tokenizer"),
        ("untagged", r"has no tags.*--set sampling\.parallel=false"),
    ):
        told = []
        with pytest.raises(ValueError, match=words):
            generate(
                str(tmp_path / name),
                home / "input.jsonl",
                tmp_path / "answers.jsonl",
                config(),
                told.append,
                told.append,
            )
        assert not told
