"""Strict YAML configs: a file (or preset) plus `--set a.b=c` overrides become a frozen dataclass.

    text --(YAML 1.2 scalars)--> nested dict --(overrides)--> keys checked --(pydantic)--> dataclass

Every key and value is checked against the dataclass' annotations (base/fields.py). An unknown key,
a wrong type or a value that the dataclass itself refuses is a ValueError that names the file, the
dotted key, the value seen and what is needed.
"""

import dataclasses
import functools
import json
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin

import pydantic
import yaml

from npr_jax.base.fields import hints, is_config, meanings, wanted
from npr_jax.base.files import read_text

T = TypeVar("T")

# Scalars as in YAML 1.2's core schema. PyYAML's own are those of 1.1, where 1e-6 is a string,
# 010 is eight, 1:30 is ninety and `no` is false.
_SCALARS = {
    "tag:yaml.org,2002:bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "tag:yaml.org,2002:null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "tag:yaml.org,2002:int": (r"[-+]?(0|[1-9][0-9_]*)", "-+0123456789"),
    "tag:yaml.org,2002:float": (
        r"[-+]?(\.[0-9]+|[0-9][0-9_]*\.[0-9]*|[0-9][0-9_]*(?=[eE]))([eE][-+]?[0-9]+)?"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
}


# What a config is made of: JSON's types, under whatever tag they are written.
_TAGS = {*_SCALARS, *(f"tag:yaml.org,2002:{name}" for name in ("str", "seq", "map"))}


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict = {}  # noqa: RUF012  (PyYAML's own protocol)

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):  # ten lines of them stand for a billion values
            event = self.peek_event()
            raise yaml.MarkedYAMLError(
                None, None, f"*{event.anchor}: a config has no aliases", event.start_mark
            )
        return super().compose_node(parent, index)

    def construct_object(self, node, deep=False):
        if node.tag.startswith("tag:yaml.org,2002:") and node.tag not in _TAGS:
            name = node.tag.replace("tag:yaml.org,2002:", "!!")
            raise yaml.constructor.ConstructorError(
                None, None, f"{name} is no type of a config", node.start_mark
            )
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError) as error:  # 5,000 digits, !!int x, !!int ""
            raise yaml.constructor.ConstructorError(
                None, None, f"{node.value!r:.40} is no {node.tag.split(':')[-1]}", node.start_mark
            ) from error

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is not a string", key_node.start_mark
                )
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Keeps the resolvers of YAML 1.1 too: what looks special in either version is quoted."""

    def ignore_aliases(self, data):
        return True


for _tag, (_pattern, _first) in _SCALARS.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_tag, re.compile(rf"(?:{_pattern})\Z"), list(_first))


def config_path(name: str | Path) -> Path:
    """Path of a config: `name` itself if it is a file, else the preset `configs/<name>.yaml`.

    Presets are found in a checkout (also installed with `pip install -e`) and in an installed
    wheel, where they are package data. Raises ValueError with the presets there are.
    """
    path = Path(name)
    if path.is_file():
        return path
    package = Path(__file__).parents[1]
    root = package / "configs"
    if not root.is_dir():
        root = package.parent / "configs"
    preset = root / f"{str(name).removesuffix('.yaml')}.yaml"
    if preset.is_file():
        return preset
    known = sorted(p.relative_to(root).with_suffix("").as_posix() for p in root.rglob("*.yaml"))
    raise ValueError(f"config {str(name)!r}: no such file, and no preset; presets: {known}")


def load_config(
    cls: type[T],
    path_or_name: str | Path | None,
    overrides: Sequence[str] = (),
    options: Mapping[str, tuple[str, Any]] | None = None,
) -> T:
    """Reads a YAML config into the frozen dataclass `cls` (fields may be dataclasses themselves).

    Args:
      cls: a stdlib dataclass; its annotations are the schema, its defaults fill what is missing.
      path_or_name: a YAML file or the name of a preset (`config_path`); None: no file at all.
      overrides: `a.b=value` strings, value in YAML, applied in order after the file.
      options: {key: (what was typed, value)} of options of the command line, applied last.

    Types are strict: an int is fine for a float, a string for an int is not, a list gives a tuple.
    Raises ValueError as the module says.
    """
    path, raw = "", None
    if path_or_name is not None:
        path = config_path(path_or_name)
        raw = _parse(read_text(path, "a config as YAML"), str(path))
    raw = {} if raw is None else raw
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: needs a mapping of keys to values, got {raw!r}")
    typed: dict[tuple[str, ...], str] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not all(key.split(".")):
            raise ValueError(f"--set {override}: needs the form a.b=value")
        keys = tuple(key.split("."))
        _assign(raw, keys, _parse(text, f"--set {override}"), override)
        typed[keys] = f"--set {override}"
    for key, (text, value) in (options or {}).items():
        _check_text(value, f"{text}: {key}")
        raw[key], typed[key,] = value, text

    def where(loc: tuple, message: str | None = None) -> str:
        """The file, and what was typed about this key, or about the keys that a message names."""
        keys = tuple(map(str, loc))
        related = [
            f" {text}"
            for k, text in typed.items()
            if k[: len(keys)] == keys[: len(k)]
            and (message is None or re.search(rf"\b{re.escape(k[-1])}\b", message))
        ]
        return f"{path}{''.join(related)}".strip()

    unknown = [
        f"{where(loc)}: {_dotted(loc)}: {message}" for loc, message in _unknown_keys(cls, raw, ())
    ]
    if unknown:
        raise ValueError("\n".join(unknown))
    try:
        # JSON rather than Python mode: strict about scalars, yet lists may become tuples.
        return _adapter(cls).validate_json(json.dumps(raw), strict=True)
    except pydantic.ValidationError as error:
        lines = []
        for item in error.errors():
            loc, seen, message = item["loc"], item["input"], item["msg"]
            context = item.get("ctx", {})
            key = _dotted(loc)
            if item["type"] == "value_error":  # a rule of the dataclass, which names the values
                message = str(context["error"])
                named = not key or re.match(rf"{re.escape(key)}\b", message)
                message = message if named else f"{key}: {message}"
                lines.append(f"{where(loc, message)}: {message}")
            elif (need := _required(cls, loc)) and (item["type"] == "missing" or seen is None):
                lines.append(f"{where(loc)}: {key} is missing, needed is {need}")
            elif item["type"] == "literal_error":
                need = context["expected"]
                lines.append(f"{where(loc)}: {key} is {seen!r}, needed is {need}")
            elif item["type"] == "unfit":
                lines.append(f"{where(loc)}: {key} is {seen!r}, {message}")
            else:
                lines.append(f"{where(loc)}: {key}: {message}, got {seen!r}")
        raise ValueError("\n".join(lines)) from error


def dump_config(config: Any) -> str:
    """The whole config, defaults included, as YAML that `load_config` reads back equal."""
    return to_yaml(_adapter(type(config)).dump_python(config, mode="json"))


def to_yaml(values: dict) -> str:
    """Plain values as YAML in which every scalar is read back as what it is."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


@functools.cache
def _adapter(cls: type) -> pydantic.TypeAdapter:
    return pydantic.TypeAdapter(cls)


def _parse(text: str, source: str) -> Any:
    try:
        value = yaml.load(text, Loader=_Loader)
        _check_text(value, f"{source}: not valid YAML")
        return value
    except RecursionError as error:
        raise ValueError(f"{source}: not valid YAML: lists and mappings nested too deep") from error
    except yaml.MarkedYAMLError as error:
        assert error.problem is not None and error.problem_mark is not None
        reason = error.problem
        if error.context:
            reason += f", {error.context}"
        if error.context_mark:
            reason += f" that begins at {_place(error.context_mark)}"
        at = _place(error.problem_mark)
        raise ValueError(f"{source}: {at}: not valid YAML: {reason}") from error
    except yaml.reader.ReaderError as error:
        begun = text[: error.position].split("\n")
        at = f"line {len(begun)}, column {len(begun[-1]) + 1}"
        reason = f"the character {chr(error.character)!r} is not allowed"
        raise ValueError(f"{source}: {at}: not valid YAML: {reason}") from error


def _check_text(value: Any, where: str) -> None:
    """Raises ValueError where a value has no form in JSON, in which it is checked."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        reason = f"the text {error.object[error.start]!r} is half a surrogate pair, no UTF-8"
        raise ValueError(f"{where}: {reason}") from error


def _place(mark: yaml.Mark) -> str:
    return f"line {mark.line + 1}, column {mark.column + 1}"


def _assign(raw: dict, keys: tuple[str, ...], value: Any, override: str) -> None:
    for depth, key in enumerate(keys[:-1], start=1):
        if raw.get(key) is None:
            raw[key] = {}
        raw = raw[key]
        if not isinstance(raw, dict):
            parent = ".".join(keys[:depth])
            raise ValueError(f"--set {override}: {parent} is {raw!r}, which has no keys")
    raw[keys[-1]] = value


def _dotted(loc: tuple) -> str:
    return ".".join(map(str, loc))


def _required(cls: type, loc: tuple) -> str:
    """What has to be given at `loc`, where the key has no default; else ""."""
    owner = config = cls
    field = hint = None
    for key in loc:
        if not isinstance(key, str) or key not in (known := hints(config)):
            continue  # an item of a tuple, or of a dict
        (field,) = (field for field in dataclasses.fields(config) if field.name == key)
        owner, hint = config, known[key]
        config = next((x for x in (hint, *get_args(hint)) if is_config(x)), config)
    if field is None or not has_no_default(field):
        return ""
    need = wanted(hint)
    if dataclasses.is_dataclass(hint):
        least = [f.name for f in dataclasses.fields(hint) if has_no_default(f)]
        need = f"a mapping with {', '.join(least) or 'any of its keys'}"
    if meaning := meanings(owner).get(field.name):
        need += f" ({meaning.text.rstrip('.')})"
    command = getattr(cls, "command", "STAGE")
    return f"{need}; `npr-jax config {command}` prints every key with its meaning"


def has_no_default(field: dataclasses.Field) -> bool:
    """Whether a value has to be given."""
    return field.default is field.default_factory is dataclasses.MISSING


def _unknown_keys(hint: Any, value: Any, loc: tuple) -> Iterator[tuple[tuple, str]]:
    """(location, message) of each key in `value` that the annotation `hint` does not have.

    pydantic ignores unknown keys of a stdlib dataclass unless each class asks it not to.
    """
    origin, args = get_origin(hint), get_args(hint)
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        known = hints(hint)
        for key, item in value.items():
            if key in known:
                yield from _unknown_keys(known[key], item, (*loc, key))
            else:
                yield (*loc, key), f"unknown key, got {item!r}; valid keys here: {list(known)}"
    elif origin in (Union, types.UnionType):
        findings = [list(_unknown_keys(arg, value, loc)) for arg in args if _holds(arg, value)]
        yield from min(findings, key=len, default=[])
    elif origin in (tuple, list) and isinstance(value, list):
        same = origin is list or args[-1:] == (Ellipsis,)
        for i, item in enumerate(value):
            if same or i < len(args):
                yield from _unknown_keys(args[0 if same else i], item, (*loc, i))
    elif origin is dict and isinstance(value, dict):
        for key, item in value.items():
            yield from _unknown_keys(args[1], item, (*loc, key))


def _holds(hint: Any, value: Any) -> bool:
    """Whether this member of a union can be a container like `value`."""
    if isinstance(value, dict):
        return dataclasses.is_dataclass(hint) or get_origin(hint) is dict or hint is dict
    return isinstance(value, list) and get_origin(hint) in (tuple, list)
