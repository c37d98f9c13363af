"""The pages are true: links lead somewhere, commands exist and run, figures are the files'."""

import ast
import importlib
import itertools
import os
import pkgutil
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main
from typer.testing import CliRunner

from npr_jax.base.config import load_config
from npr_jax.cli import app
from npr_jax.train.configs import CONFIGS
from npr_jax.train.rollout import STAGES

OPTIMISED = True
ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PACKAGE = ROOT / "npr_jax"
CODE = sorted(PACKAGE.rglob("*.py"))
PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(ROOT.glob("docs/*.md"))]


def module(path: Path) -> str:
    """`npr_jax.room.name` of a file of the package."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def defined() -> dict[str, set[str]]:
    """The package's functions and classes: names, and where each can be imported from."""
    found: dict[str, set[str]] = {}
    trees = {path: ast.parse(path.read_text(encoding="utf-8")).body for path in CODE}
    for path, body in trees.items():
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.setdefault(node.name, set()).add(f"{module(path)}.{node.name}")
    for path, body in trees.items():
        for node in body if path.name == "__init__.py" else ():
            for alias in node.names if isinstance(node, ast.ImportFrom) else ():
                if alias.name in found:
                    found[alias.name].add(f"{module(path)}.{alias.name}")
    return found


def blocks(path: Path, language: str) -> list[str]:
    """The code blocks of a page in that language."""
    return re.findall(rf"```{language}\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)


def prose(path: Path) -> str:
    """A page without its code blocks."""
    return re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)


def commands(path: Path) -> list[list[str]]:
    """The commands of a page, as words, without comments and assignments: those of its shell
    blocks, and those of npr-jax and make in its text."""
    text = "\n".join(blocks(path, "sh")).replace("\\\n", " ")
    lines = [part for line in text.splitlines() for part in re.split(r" && | \| | 2>&1", line)]
    lines += re.findall(r"`((?:npr-jax|make) [^`]+)`", prose(path))
    found = (shlex.split(line, comments=True) for line in lines)
    bare = [list(itertools.dropwhile(re.compile(r"\w+=").match, words)) for words in found]
    return [words for words in bare if words]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(path)):
        if re.match(r"[a-z]+:", link):
            continue  # of the web
        name, _, anchor = link.partition("#")
        target = (path.parent / name) if name else path
        assert target.exists(), f"{path.name} links to {link}, which is not there"
        if anchor:
            heads = re.findall(r"^#+ (.*)", target.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}
            assert anchor in slugs, f"{path.name} links to {link}, {target.name} has {slugs}"


def test_every_page_is_in_the_index():
    index = (ROOT / "docs/index.md").read_text(encoding="utf-8")
    missing = [path.name for path in PAGES if path.name not in index and path.name != "index.md"]
    assert not missing


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_commands_exist(path):
    verbs = typer.main.get_command(app).commands
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for words in commands(path):
        files = [word for word in words if re.match(r"(scripts|bench|configs)/", word)]
        assert all((ROOT / name).is_file() for name in files), f"{path.name}: {words}"
        if files:  # a script that launches: a verb and what it takes may follow
            words = ["npr-jax", *itertools.dropwhile(lambda word: word not in verbs, words)]
        if words[0] == "npr-jax" and words[1:]:
            if words[1] == "--version":
                continue
            command, rest = verbs.get(words[1]), words[2:]
            assert command, f"{path.name}: npr-jax has no {words[1]}"
            if hasattr(command, "commands"):
                command, rest = command.commands[rest[0]], rest[1:]
            known = {option for parameter in command.params for option in parameter.opts}
            used = {word.split("=")[0] for word in rest if word.startswith("--")}
            assert used <= known, f"{path.name}: {words[1]} has no {sorted(used - known)}"
            if words[1] in STAGES and rest and not rest[0].startswith("--"):
                changes = [rest[i + 1] for i, word in enumerate(rest) if word == "--set"]
                load_config(CONFIGS[words[1]], rest[0], changes)
        elif words[0] == "make":
            asked = [word for word in words[1:] if "=" not in word]
            assert set(asked) <= targets, f"{path.name}: make has no {asked}"


def test_commands_that_need_no_data_run():
    asked = {tuple(words[1:]) for path in PAGES for words in commands(path)}
    run = [words for words in sorted(asked) if words[:1] in (("config",), ("--version",))]
    assert len(run) > 2
    for words in run:
        for stage in CONFIGS if "STAGE" in words else ("",):
            found = CliRunner().invoke(app, [stage if word == "STAGE" else word for word in words])
            assert found.exit_code == 0 and found.output, (words, found.output)


def test_files_named_in_the_text_are_there():
    for path in PAGES:
        for name in re.findall(
            r"`((?:npr_jax|bench|tests|scripts|configs)/[\w/.]+\w)`", path.read_text()
        ):
            made = re.search(r"NAME|DIR", name)
            assert made or (ROOT / name).exists(), f"{path.name} names {name}"


def test_files_named_in_the_code_are_there():
    wrong = []
    for path in CODE:
        for name in re.findall(
            r"(?<![\w/.-])[\w/]+\.(?:py|md)\b", path.read_text(encoding="utf-8")
        ):
            there = (ROOT / name).is_file() or any(str(x).endswith(f"/{name}") for x in CODE)
            wrong += [] if there else [f"{path.name} names {name}"]
    assert not wrong


def test_names_in_the_text_are_there():
    """`npr_jax.room.module.name` anywhere; in backticks `module.name` as well, where the package
    has a function or class of that name (of keys and variables nobody can tell)."""
    places, modules, wrong = defined(), {module(path) for path in CODE}, []
    known = modules.union(*places.values())  # without an import, which takes long
    for path in [*PAGES, *CODE]:
        text = path.read_text(encoding="utf-8")
        for name in re.findall(r"(?<![\w/.~-])npr_jax(?:\.[A-Za-z_]\w*)+", text):
            try:
                _ = name in known or pkgutil.resolve_name(name)
            except (ImportError, AttributeError):
                wrong.append(f"{path.name} names {name}")
        for name in re.findall(r"`((?!npr_jax|self\.)[a-z]\w*(?:\.[A-Za-z]\w*)+)", text):
            homes = places.get(name.rpartition(".")[2])
            there = not homes or any(x.endswith(f".{name}") for x in homes | modules)
            wrong += [] if there else [f"{path.name} names {name}"]
    assert not wrong


def test_the_readme_is_short():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 150


def test_the_performance_page_says_what_the_results_say():
    command = [sys.executable, str(ROOT / "bench" / "table.py"), "--check"]
    assert subprocess.run(command).returncode == 0, "run bench/table.py"


SMALL = {  # of the stages as the README writes them
    "zero": "steps=1 prompts=4 samples=4 max_refills=0",
    "beta": "sample.num_problems=32 sample.batch=32 sample.tries=8 fit.steps=1",
    "papo": "steps=1 prompts=4 samples=4",
}


@pytest.mark.slow
def test_the_readme_runs(home, tmp_path):
    """As written, where the demo seems to have run: a small model in the place of its models. The
    stages are made short."""
    for stage, model in (("seed", "seed"), ("papo", "tree")):
        (tmp_path / f"runs/demo/{stage}").mkdir(parents=True)
        (tmp_path / f"runs/demo/{stage}/final").symlink_to(home / model)
    (tmp_path / "runs/demo/problems.jsonl").write_text((home / "problems.jsonl").read_text())

    def run(*command: str) -> str:
        environment = os.environ | {"PYTHON": sys.executable}
        found = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900
        )
        assert found.returncode == 0, found.stdout + found.stderr
        return found.stdout

    (code,) = blocks(README, "python")
    said = run(sys.executable, "-c", code)
    assert "branches" in said and "in a row" in said

    (shell,) = [block for block in blocks(README, "sh") if "npr-jax generate" in block]
    shell = shell.replace("source .venv/bin/activate\n", "").replace("--set steps=10 ", "")
    (serve,) = re.findall("npr-jax serve .*\n", shell)  # which does not end: test_serve_command.py
    shell = shell.replace(serve, "")
    for stage, changes in SMALL.items():
        command = f"npr-jax {stage} tiny_{stage}"
        assert command in shell
        shell = shell.replace(command, f"{command} --set " + " --set ".join(changes.split()))
    run("bash", "-c", 'set -eu\nnpr-jax() { "$PYTHON" -m npr_jax "$@"; }\n' + shell)
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 1
    for made in ("eval/results.json", "eval/index.html", "tiny_papo/index.html"):
        assert (tmp_path / "runs" / made).exists()
    assert (tmp_path / "exported/model.safetensors").exists()


def test_the_picture_of_the_rules_is_drawn_from_their_layouts(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    pictures = importlib.import_module("write_pictures")
    assert pictures.RULES.read_text(encoding="utf-8") == pictures.rules_svg() + "\n"
