"""The command line: what is listed works, help fits a screen, a user's error is one line."""

import re
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from npr_jax.cli import app

VERBS = ("zero", "beta", "papo", "generate", "eval", "view", "report", "plan", "data", "demo")
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


def test_help_is_quick():
    """No heavy module is imported before a verb runs."""
    code = (
        "import sys; from npr_jax.cli import app; "
        "sys.exit(bool({'jax', 'transformers', 'orbax'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=600).returncode == 0
