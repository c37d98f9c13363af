"""The public interface: names, parameters, defaults, options and keys are those of public.txt.

A program, a script or a YAML file of someone may rely on every line of that file.
"""

import dataclasses
import difflib
import importlib
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

import typer

from npr_jax.base.compile_cache import DEFAULT_CACHE
from npr_jax.cli import app
from npr_jax.evaluate.generate import GenerateConfig
from npr_jax.evaluate.run import EvalConfig
from npr_jax.serve.config import ServeConfig
from npr_jax.train.beta import BetaConfig
from npr_jax.train.papo import PapoConfig
from npr_jax.train.zero import ZeroConfig

FILE = Path(__file__).with_name("public.txt")
MODULES = {
    "npr_jax": None,  # all that it names
    "npr_jax.answers": None,
    "npr_jax.data.prompts": ("prompt_ids",),
    "npr_jax.decode": ("AsyncEngine", "Event"),
    "npr_jax.decode.async_engine": ("Answers",),
    "npr_jax.model": None,
    "npr_jax.train.advantages": ("batch_std", "group_std", "mean"),
    "npr_jax.tree": None,
}
CONFIGS = (ZeroConfig, BetaConfig, PapoConfig, GenerateConfig, EvalConfig, ServeConfig)
CHANGED = """the public interface is not what tests/public.txt says:

{}

If this was not meant, undo it. If it was:
- what is new goes under "Added" in CHANGELOG.md;
- what is gone or means something else goes under "Changed", and goes on working for a version: an
  old name of Python with a DeprecationWarning; an old key of a config or option of a command is
  refused with a message that has the new one, and a run begun with it can still go on;
- then write the file anew: python tests/test_public.py
"""


def test_the_public_interface_is_what_the_file_says():
    said, found = FILE.read_text(encoding="utf-8").splitlines(), list(interface())
    difference = difflib.unified_diff(said, found, "tests/public.txt", "now", n=0, lineterm="")
    assert said == found, CHANGED.format("\n".join(difference))


def interface() -> Iterator[str]:
    """The lines of the file."""
    for module, names in MODULES.items():
        yield f"# {module}"
        for name in names or sorted(importlib.import_module(module).__all__):
            yield from _described(name, getattr(importlib.import_module(module), name))
        yield ""
    yield "# commands: arguments, options; those in brackets may be left out"
    yield from _commands(typer.main.get_command(app), "npr-jax")
    yield ""
    yield "# configs of the commands: keys, and their defaults; those without have to be given"
    classes = list(CONFIGS)
    for cls in classes:  # grows by those that lie within
        yield f"{cls.__name__}:"
        for field in dataclasses.fields(cls):
            kind = get_type_hints(cls)[field.name]
            if dataclasses.is_dataclass(kind):
                classes += [kind] if kind not in classes else []
                yield f"  {field.name}: {kind.__name__}"
            else:
                yield f"  {field.name}{_default(field)}"


def _described(name: str, value: Any) -> Iterator[str]:
    """A function or class with its parameters, and the methods and properties of a class."""
    if not callable(value):
        yield name
        return
    yield name + _parameters(value)
    if inspect.isclass(value):
        for member, found in vars(value).items():
            plain = getattr(found, "__func__", found)  # of a classmethod
            if member.startswith("_") or member in _fields(value):
                continue
            yield f"{name}.{member}" + (_parameters(plain) if inspect.isroutine(plain) else "")


def _fields(cls: type) -> tuple[str, ...]:
    if dataclasses.is_dataclass(cls):
        return tuple(field.name for field in dataclasses.fields(cls))
    return getattr(cls, "_fields", ())


def _parameters(function) -> str:
    """As they are written, without annotations, which versions of Python write differently; of a
    long text its beginning."""
    signature = inspect.signature(function)
    parameters = [
        parameter.replace(
            annotation=inspect.Parameter.empty,
            default=x[:60] if isinstance(x := parameter.default, str) else x,
        )
        for parameter in signature.parameters.values()
        if parameter.name not in ("self", "cls")
    ]
    return str(inspect.Signature(parameters))


def _commands(command, name: str) -> Iterator[str]:
    if hasattr(command, "commands"):
        for verb, inner in command.commands.items():
            yield from _commands(inner, f"{name} {verb}")
        return
    words = [
        parameter.opts[0] if parameter.opts[0].startswith("-") else parameter.metavar
        for parameter in command.params
    ]
    needed = [parameter.required for parameter in command.params]
    yield " ".join(
        [name, *(word if must else f"[{word}]" for word, must in zip(words, needed, strict=True))]
    )


def _default(field: dataclasses.Field) -> str:
    if field.default is dataclasses.MISSING:
        return ""
    if field.default == str(DEFAULT_CACHE):
        return " = the user's cache"
    return f" = {field.default!r:.60}"


if __name__ == "__main__":
    sys.exit(FILE.write_text("\n".join(interface()) + "\n", encoding="utf-8") and 0)
