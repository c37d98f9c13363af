"""What every key of a config is, from its declaration: as YAML to begin with, and as a page."""

import dataclasses
import textwrap
from collections.abc import Iterable, Iterator
from typing import Any

from npr_jax.base.config import has_no_default, to_yaml
from npr_jax.base.fields import Meaning, config_in, hints, is_config, meanings, wanted


def template(cls: type) -> str:
    """Every key of a config with its default; above it unit and meaning, and what it takes.

    YAML that `load_config` reads once the keys marked REQUIRED have a value.
    """
    lines = [
        f"# Every key of `npr-jax {cls.command}` with its default; what is REQUIRED has none.",
        *_entries(cls, None, ""),
    ]
    return "\n".join(lines) + "\n"


def page(classes: Iterable[type]) -> str:
    """The same of several configs as Markdown: a table for each, and one for each part of them."""
    parts: dict[str, type] = {}
    lines: list[str] = []
    for cls in classes:
        lines += [f"## npr-jax {cls.command}", "", *_table(cls, parts)]
    done: set[str] = set()
    while left := [key for key in parts if key not in done]:
        for key in left:
            lines += [f"## {key}", "", *_table(parts[key], parts)]
            done.add(key)
    return "\n".join(lines)


def _entries(cls: type, given: Any, indent: str) -> Iterator[str]:
    """Lines of the template for the keys of `cls`; the defaults are those of `given`, if it is."""
    for field, hint, meaning in _fields(cls):
        comment = f"{meaning.unit}: {meaning.text}" if meaning.unit else meaning.text
        yield ""
        yield from textwrap.wrap(
            comment, 98, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# "
        )
        required = given is None and has_no_default(field)
        value = None if required else _default(field, given)
        if is_config(hint):
            yield f"{indent}{field.name}:"
            yield from _entries(hint, value, f"{indent}  ")
        elif required:
            yield f"{indent}# REQUIRED: {wanted(hint)}"
            yield f"{indent}{field.name}:"
        else:
            inner = config_in(hint)
            yield f"{indent}# {_keys(inner) if inner else wanted(hint)}"
            yield textwrap.indent(to_yaml({field.name: value}).rstrip(), indent)


def _table(cls: type, parts: dict[str, type]) -> Iterator[str]:
    """The keys of `cls` as Markdown; those with keys of their own are added to `parts`."""
    yield "| key | default | takes | unit | meaning |"
    yield "| --- | --- | --- | --- | --- |"
    for field, hint, meaning in _fields(cls):
        if inner := config_in(hint):
            parts[field.name] = inner
            default, takes = "", f"[keys](#{field.name})"
            if not is_config(hint):
                default, takes = "`null`", f"{takes} or null"
        elif has_no_default(field):
            default, takes = "required", wanted(hint)
        else:
            default, takes = f"`{_inline(_default(field, None))}`", wanted(hint)
        cells = (f"`{field.name}`", default, takes, meaning.unit, meaning.text)
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
    yield ""


def _fields(cls: type) -> Iterator[tuple[dataclasses.Field, Any, Meaning]]:
    """The fields of a config, their annotations and their meanings."""
    known, said = hints(cls), meanings(cls)
    for field in dataclasses.fields(cls):
        yield field, known[field.name], said[field.name]


def _default(field: dataclasses.Field, given: Any) -> Any:
    if given is not None:
        return getattr(given, field.name)
    if field.default is not dataclasses.MISSING:
        return field.default
    assert field.default_factory is not dataclasses.MISSING
    return field.default_factory()


def _keys(cls: type) -> str:
    """What a key takes that has keys of its own, or none."""
    return f"null, or keys: {', '.join(hints(cls))}"


def _inline(value: Any) -> str:
    """A value as YAML in one line; the first words of a text of several."""
    if isinstance(value, str) and "\n" in value:
        return textwrap.shorten(value, 40, placeholder=" ...")
    if isinstance(value, tuple):
        return f"[{', '.join(map(_inline, value))}]"
    return to_yaml({"x": value}).strip().removeprefix("x: ")
