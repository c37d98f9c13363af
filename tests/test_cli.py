"""The command line: what is listed works, help fits a screen, a user's error is one line."""

import importlib.metadata
import os
import re
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from npr_jax.cli import app, main

VERBS = (
    *("zero", "beta", "papo", "generate", "eval", "serve", "mine", "export", "view", "report"),
    *("plan", "config", "data", "demo", "scout"),
)
COMMANDS = (*VERBS, "data prepare")


def run(*args, **kwargs):
    command = [sys.executable, "-m", "npr_jax", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, **kwargs)


def test_verbs_are_those_that_are_built():
    text = CliRunner().invoke(app, ["--help"]).output
    listed = re.findall(r"^  ([a-z]+) ", text.split("Commands:")[1], re.MULTILINE)
    assert sorted(listed) == sorted(VERBS)


@pytest.mark.parametrize("verb", COMMANDS)
def test_help_fits_a_screen(verb):
    result = CliRunner().invoke(app, [*verb.split(), "--help"])
    assert result.exit_code == 0
    lines = result.output.splitlines()
    assert len(lines) <= 24 and max(map(len, lines)) <= 80
    assert f"npr-jax {verb}" in result.output or f" {verb} [OPTIONS]" in result.output


@pytest.mark.parametrize(
    "args, words",
    [
        (["zero", "no_such_preset"], ("no_such_preset", "tiny_zero")),
        (["zero", "tiny_zero", "--set", "stepps=3"], ("stepps", "steps")),
        (["papo", "tiny_papo", "--set", "engine.lanes=many"], ("engine.lanes", "many")),
        (["beta", "tiny_beta", "--set", "fit.steps=0"], ("fit.steps", "fit.epochs")),
    ],
)
def test_a_users_error_is_one_line(args, words, tmp_path):
    result = run(*args, cwd=tmp_path)
    assert result.returncode == 2
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1
    assert all(word in result.stderr for word in words), result.stderr
    assert not list(tmp_path.iterdir())


GENERATE = ("generate", "--model", "tiny", "--input")
PREPARE = ("data", "prepare", "jsonl", "--source")


@pytest.mark.parametrize(
    "args, words",
    [
        ([*GENERATE, "none", "--output", "o"], ("there is no none in", "--input")),
        ([*GENERATE, ".", "--output", "o"], ("is a directory", "--input")),
        ([*GENERATE, "pipe", "--output", "o"], ("pipe", "needed is a file")),
        ([*GENERATE, "good/x", "--output", "o"], ("good/x cannot be read", "not a directory")),
        ([*GENERATE, "good", "--output", "/proc/x"], ("/proc/x cannot be written", "--output")),
        ([*GENERATE, "good", "--output", "."], ("is a directory", "--output")),
        ([*GENERATE, "good", "--output", "pipe"], ("pipe", "--output")),
        ([*GENERATE, "good", "--output", "good"], ("good:1 is no answer", "--output")),
        ([*GENERATE, "good", "--output", "o", "--instruction", "none"], ("none", "--instruction")),
        ([*GENERATE, "good", "--output", "o", "--instruction", "raw"], ("UTF-8", "--instruction")),
        ([*GENERATE, "good", "--output", "o", "--set", "stats=/proc/x"], ("/proc/x", "stats")),
        ([*GENERATE, "good", "--output", "o", "--model", "nope"], ("no nope in", "qwen3-4b")),
        ([*GENERATE, "good", "--output", "o", "--model", "good"], ("is a file", "directory")),
        ([*GENERATE, "good", "--output", "o", "--model", "./a/b"], ("a/b", "Hugging Face")),
        (["zero", "tiny_zero"], ("runs/demo/seed/final", "`npr-jax demo` first")),
        (["zero", "tiny_zero", "--set", "model=tiny"], ("problems.jsonl", "`npr-jax demo` first")),
        (["zero", "tiny_zero", "--set", "model=tiny", "--set", "problems=pipe"], ("pipe",)),
        (["zero", "tiny_zero", "--output", "/proc/x"], ("/proc/x cannot be written",)),
        (["zero", "raw"], ("raw", "UTF-8")),
        (["view", "none"], ("there is no none in", "traces/NAME.jsonl")),
        (["view", "."], ("is a directory", "traces/NAME.jsonl")),
        (["view", "pipe"], ("pipe", "traces/NAME.jsonl")),
        (["view", "good"], ("good:1", "lacks", "token_ids", "traces/*.jsonl")),
        ([*PREPARE, "none"], ("there is no none in", "--source")),
        ([*PREPARE, "."], ("is a directory", "--source")),
        ([*PREPARE, "pipe"], ("pipe", "--source")),
        ([*PREPARE, "good", "--output", "/proc/x"], ("/proc/x cannot be written", "--output")),
    ],
)
def test_a_file_that_cannot_be_used_is_named_in_one_line(args, words, tmp_path, monkeypatch, capfd):
    """As what it is, with what is needed there, in the command line's words; exit code 2."""
    (tmp_path / "good").write_text('{"problem": "A:1*1?"}\n')
    (tmp_path / "raw").write_bytes(b"\xff\xfe")
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["npr-jax", *args])
    with pytest.raises(SystemExit) as ending:
        main()
    said = capfd.readouterr()
    assert ending.value.code == 2 and not said.out
    *before, last = said.err.splitlines()
    assert last.startswith("error: ") and "Errno" not in last and "Traceback" not in said.err
    assert all(word in last for word in words), last
    assert all(" devices " in line for line in before), before
    assert not (tmp_path / "o").exists()


def test_version():
    result = CliRunner().invoke(app, ["--version"])
    assert result.exit_code == 0
    assert result.output == f"npr-jax {importlib.metadata.version('npr-jax')}\n"


def test_help_is_quick():
    """No heavy module is imported before a verb runs."""
    code = (
        "import sys; from npr_jax.cli import app; "
        "sys.exit(bool({'jax', 'transformers', 'orbax'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=600).returncode == 0


@pytest.mark.parametrize(
    "module, args, words",
    [
        (
            "npr_jax.evaluate.generate.generate",
            ["generate", "--model", "m", "--input", "i.jsonl", "--output", "o.jsonl"],
            "the answers so far are in o.jsonl",
        ),
        (
            "npr_jax.evaluate.run.evaluate",
            ["eval", "--model", "m", "--benchmarks", "aime25", "--output", "o"],
            "the answers so far are in o",
        ),
        ("npr_jax.train.papo.run", ["papo", "tiny_papo", "--output", "o"], "what is done is in o"),
        ("npr_jax.demo.run", ["demo", "--output", "o"], "what is done is in o"),
    ],
)
def test_ctrl_c_is_one_line_that_says_what_is_kept(monkeypatch, tmp_path, module, args, words):
    monkeypatch.chdir(tmp_path)

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, interrupted)
    result = CliRunner().invoke(app, args)
    assert result.exit_code == 130
    *_, line = result.stderr.splitlines()
    assert line == f"interrupted: {words}; the same command goes on"


@pytest.mark.parametrize("code", [2, 130, 143])
def test_the_process_ends_with_the_code_of_its_command(code):
    """What the launchers go by: 143 is tried again, 130 is not (docs/launch.md)."""
    text = f"import sys, npr_jax.cli as c; c.app = lambda **_: sys.exit({code}); c.main()"
    assert subprocess.run([sys.executable, "-c", text]).returncode == code
