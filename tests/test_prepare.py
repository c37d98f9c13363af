"""`npr-jax data prepare`: every bad row is accounted for, and a data set is there whole or not."""

import gzip
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from test_datasets import PUBLISHED
from train_toy import write_problems

from npr_jax.data import prepare as module
from npr_jax.data.prepare import prepare
from npr_jax.data.problems import Problem, read_problems
from npr_jax.model.pretrained import load, load_tokenizer
from npr_jax.train.rollout import encode_problems

ROWS = [  # (line, why it is bad)
    (b'{"problem": "A:1+1?", "answer": 2}', None),
    (b'{"problem": "\xff", "answer": 1}', "not UTF-8"),
    (b'{"problem": "B:1+2?"', "not JSON"),
    (b'{"problem": "", "answer": 1}', "empty problem"),
    ('{"problem": "é", "answer": ""}'.encode(), "no answer"),
    (b'{"problem": "C:1+2?", "answer": "3"}', None),
    (b'{"problem": "C", "answer": [3]}', "wrong type"),
    (b'{"problem": "A:1+1;B:1+2;C:1+2?", "answer": 8}', "over-long"),
    (b"nothing\x00\x80", "not UTF-8"),
]
GOOD = [Problem("A:1+1?", "2"), Problem("C:1+2?", "3")]


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "raw.jsonl"
    path.write_bytes(b"\n".join(row for row, _ in ROWS) + b"\n")
    return path


def files(directory):
    return {path.name: path.read_bytes() for path in Path(directory).iterdir()}


def run(*args, **kwargs):
    command = [sys.executable, "-m", "npr_jax", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, **kwargs)


def test_bad_rows_are_counted_shown_and_kept(source, tmp_path):
    output = tmp_path / "out"
    report = prepare("jsonl", source, output, "tiny", 10)
    assert read_problems(output) == GOOD
    bad = [(number, *row) for number, row in enumerate(ROWS, 1) if row[1]]
    assert report.problems == 2 and sum(report.bad.values()) == len(bad)
    rejected = [json.loads(x) for x in (output / "rejected.jsonl").read_text("ascii").splitlines()]
    assert [
        (r["line"], r["text"].encode("utf-8", "surrogateescape"), r["reason"]) for r in rejected
    ] == bad
    text = "\n".join(report.lines(output))
    for number, _, reason in bad:
        assert f"  {reason}: {report.bad[reason]}\n" in text and f" line {number}: " in text
    assert f"problems 2, bad rows {len(bad)}" in text and "rejected.jsonl" in text


def test_a_report_shows_the_first_few_of_many(tmp_path):
    source = tmp_path / "raw.jsonl"
    source.write_text('{"problem": "x", "answer": 1}\n' + "{}\n" * 1000)
    lines = prepare("jsonl", source, tmp_path / "out").lines("out")
    assert (
        len(lines) == 9 and lines[1] == "  empty problem: 1000" and lines[-2] == "    and 995 more"
    )
    assert len((tmp_path / "out" / "rejected.jsonl").read_text().splitlines()) == 1000


def test_the_same_again_is_the_same(source, tmp_path):
    first = prepare("jsonl", source, tmp_path / "one")
    before = files(tmp_path / "one")
    assert prepare("jsonl", source, tmp_path / "one") == first
    assert files(tmp_path / "one") == before
    assert prepare("jsonl", source, tmp_path / "two") == first
    assert files(tmp_path / "two") == before
    packed = tmp_path / "raw.gz"
    packed.write_bytes(gzip.compress(source.read_bytes()))
    again = prepare("jsonl", packed, tmp_path / "one")  # unpacked it is the same source
    assert again == first


def test_another_source_or_setting_is_refused(source, tmp_path):
    output = tmp_path / "out"
    prepare("jsonl", source, output)
    before = files(output)
    other = tmp_path / "other.jsonl"
    other.write_text('{"problem": "x", "answer": 1}\n')
    with pytest.raises(ValueError, match=r"was prepared from .*raw.jsonl .*sha256 .*--output"):
        prepare("jsonl", other, output)
    with pytest.raises(ValueError, match="max_prompt_tokens was None, is 9"):
        prepare("jsonl", source, output, "tiny", 9)
    assert files(output) == before
    whole = json.loads(before["prepared.json"])
    for damaged in ("{", "null", *(json.dumps(whole | {key: 0.5}) for key in whole)):
        (output / "prepared.json").write_text(damaged)
        with pytest.raises(ValueError, match=r"prepared.json is damaged .*remove"):
            prepare("jsonl", source, output)


def test_a_directory_of_something_else_is_left_alone(source, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    for output in (tmp_path / "mine", source):
        with pytest.raises(ValueError, match="is there and no prepared data set"):
            prepare("jsonl", source, output)
    assert files(tmp_path / "mine") == {"thesis.tex": b"x"}
    (tmp_path / "empty").mkdir()
    assert prepare("jsonl", source, tmp_path / "empty").problems == 3


def test_an_output_that_cannot_be_replaced_is_refused_at_once(source, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(ValueError, match=r"--output \. is the directory you are in"):
        prepare("jsonl", source, ".")
    assert not list((tmp_path / "empty").iterdir())


@pytest.mark.parametrize("there", [False, True])
def test_a_link_leads_to_the_data_set(there, source, tmp_path):
    target = tmp_path / "disk" / "target"
    if there:
        target.mkdir(parents=True)
    (tmp_path / "link").symlink_to(target)
    assert prepare("jsonl", source, tmp_path / "link").problems == 3
    assert (tmp_path / "link").is_symlink() and len(read_problems(target)) == 3
    assert [path.name for path in target.parent.iterdir()] == ["target"]


@pytest.mark.parametrize(
    "data, message", [(b"{}\n[]\n", "all rows are bad as jsonl"), (b"", "no rows")]
)
def test_a_file_without_problems_is_an_error(data, message, tmp_path):
    source = tmp_path / "raw.jsonl"
    source.write_bytes(data)
    with pytest.raises(ValueError, match=message):
        prepare("jsonl", source, tmp_path / "sets" / "out")
    assert not list((tmp_path / "sets").iterdir())


@pytest.mark.parametrize("where", ["_Sieve._check_length", "sync_all"])
@pytest.mark.parametrize("how", ["SIGKILL", "SIGINT"])
def test_an_interrupted_preparation_leaves_nothing_to_read(where, how, source, tmp_path):
    code = (
        "import os, signal\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell may ignore it
        "from npr_jax.data import prepare as module\n"
        f"module.{where} = lambda *args: os.kill(os.getpid(), signal.{how})\n"
        f"module.prepare('jsonl', 'raw.jsonl', 'sets/out')\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, timeout=600
    )
    assert ended.returncode == -getattr(signal, how)
    assert not (tmp_path / "sets" / "out").exists()
    left = list((tmp_path / "sets").iterdir())
    assert len(left) == (how == "SIGKILL")
    for path in left:
        with pytest.raises(ValueError, match="without a prepared data set"):
            read_problems(path)
    assert prepare("jsonl", source, tmp_path / "sets" / "out").problems == 3
    assert len(read_problems(tmp_path / "sets" / "out")) == 3


def test_two_that_prepare_the_same_agree(source, tmp_path, monkeypatch):
    """The other process is done first, between this one's work and its renaming."""
    output, sync = tmp_path / "out", module.sync_all

    def late(directory):
        monkeypatch.setattr(module, "sync_all", sync)
        prepare("jsonl", source, output)
        sync(directory)

    monkeypatch.setattr(module, "sync_all", late)
    assert prepare("jsonl", source, output).problems == 3
    assert len(read_problems(output)) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "raw.jsonl"]


def test_length_is_what_the_stages_count(tmp_path):
    write_problems(tmp_path / "raw.jsonl", 20, groups=3)
    write_problems(tmp_path / "short.jsonl", 20, groups=1)
    with (tmp_path / "raw.jsonl").open("a") as file:
        file.write((tmp_path / "short.jsonl").read_text())
    model = load("tiny").with_tags()
    problems = read_problems(tmp_path / "raw.jsonl")
    kept, _ = encode_problems(model.tokenizer, problems, 10)
    assert 0 < len(kept) < len(problems)
    report = prepare("jsonl", tmp_path / "raw.jsonl", tmp_path / "out", "tiny", 10)
    assert read_problems(tmp_path / "out") == kept
    assert report.bad == {"over-long": len(problems) - len(kept)}


def test_a_models_tokenizer_is_read_without_its_weights(tmp_path):
    tokenizer = load("tiny").tokenizer
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).encode("A:1+1?") == tokenizer.encode("A:1+1?")
    with pytest.raises(ValueError, match="qwen3-4b has no tokenizer"):
        load_tokenizer("qwen3-4b")


def test_settings_are_checked_first(source, tmp_path):
    for arguments, message in (
        (("orz", source), "'orz' is unknown; there are orz57k, gsm8k, math, jsonl"),
        (("jsonl", source, "tiny"), "both or neither"),
        (("jsonl", source, None, 5), "both or neither"),
        (("jsonl", source, "tiny", 0), "--max-prompt-tokens is 0"),
    ):
        name, path, *rest = arguments
        with pytest.raises(ValueError, match=message):
            prepare(name, path, tmp_path / "out", *rest)
    with pytest.raises(FileNotFoundError, match=r"none.jsonl"):
        prepare("jsonl", tmp_path / "none.jsonl", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_prints_the_report(source, tmp_path):
    result = run("data", "prepare", "jsonl", "--source", source, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "made from" in result.stdout and "line 2: not UTF-8" in result.stdout
    assert result.stderr == ""
    assert len(read_problems(tmp_path / "data" / "jsonl")) == 3


@pytest.mark.parametrize(
    "args, words",
    [
        (("nothing", "--source", "raw.jsonl"), ("nothing", "gsm8k")),
        (("gsm8k", "--source", "raw.jsonl"), ("raw.jsonl", "question", "jsonl")),
        (("jsonl", "--source", "none"), ("none",)),
        (("jsonl", "--source", "."), ("directory",)),
        (("orz57k", "--source", "raw.jsonl"), ("raw.jsonl", "JSON list")),
    ],
)
def test_a_users_error_is_one_line(args, words, source, tmp_path):
    result = run("data", "prepare", *args, cwd=tmp_path)
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert all(word in result.stderr for word in words), result.stderr
    assert not list(tmp_path.glob("data/*"))


@pytest.mark.slow
def test_the_documents_commands_run_and_print_what_it_says(tmp_path):
    """On small files of the names in docs/data.md, and the demo's tokenizer for the hub's."""
    text = (Path(__file__).parents[1] / "docs" / "data.md").read_text(encoding="utf-8")
    for name, form in (
        ("orz_math_57k_collected.json", "orz57k"),
        ("train.jsonl", "gsm8k"),
        ("math_train.jsonl", "math"),
    ):
        (tmp_path / name).write_bytes(PUBLISHED[form][0])
    long = {"problem": "1" * 1399, "answer": 1}
    rows = [row for row, reason in ROWS if reason is None]
    rows[1:1] = [b'{"problem": "x", "answer": ""}', rows[0], b'{"problem": "\xff", "answer": 1}']
    (tmp_path / "mine.jsonl.gz").write_bytes(
        gzip.compress(b"\n".join([*rows, json.dumps(long).encode()]))
    )
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    blocks = [block for block in blocks if block.startswith("npr-jax data")]
    script = 'set -eu\nnpr-jax() { "$PYTHON" -m npr_jax "$@"; }\n' + "".join(blocks)
    script = script.replace("Qwen/Qwen3-4B-Instruct-2507", "tiny")
    env = os.environ | {"PYTHON": sys.executable}
    result = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stderr
    made = {path.name for path in (tmp_path / "data").iterdir()}
    assert len(blocks) == 2 and made == {"orz57k", "gsm8k_train", "math", "mine", "short"}
    (printed,) = re.findall(r"prints\n\n```\n(.*?)```", text, re.DOTALL)
    assert printed in result.stdout
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert result.stdout == "4 A:1+1? 2 1\n"
