"""How configs declare their fields, and the one place where they are checked.

A config is a frozen dataclass on `Checked`. The annotation of a field says what it takes: its type,
a `Range` of numbers, `Literal` choices. Its entry in the docstring says what it means:

    Attributes:
      max_tokens (tokens): the most that an answer may have.

Rules that concern several fields are the `__post_init__` of a class, after that of `Checked`.
"""

import dataclasses
import functools
import inspect
import re
import types
from collections.abc import Callable
from numbers import Integral, Real
from typing import (
    Annotated,
    Any,
    Literal,
    NamedTuple,
    TypeGuard,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from pydantic_core import CoreSchema, PydanticCustomError, core_schema

# Integers are i32 and numbers f32 on a device, where quotients have to stay finite too.
_INTEGERS, _SMALLEST, _LARGEST = 2**31, 1e-30, 1e30


class Unfit(ValueError):
    """A value that a field does not take; its text is what is needed instead."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Range:
    """Which numbers a field takes, in `Annotated[int, Range(ge=1)]`; all numbers of the annotation.

    A number that is not finite is in no range. Nor is, unless a bound says otherwise, an integer
    that i32 does not hold, and a number that f32 does not hold well (0 and 1e-30 to 1e30 in size).

    Attributes:
      ge, gt, le, lt: bounds, as in pydantic.
      also: one number more.
    """

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    also: float | None = None

    def wanted(self, kind: type) -> str:
        """What is needed: "an integer, 1 or more", "a finite number above 0, at most 1"."""
        text = "an integer" if kind is int else "a finite number"
        sides = (("from", self.ge), ("above", self.gt), ("at most", self.le), ("below", self.lt))
        bounds = [f"{word} {bound}" for word, bound in sides if bound is not None]
        if len(bounds) == 1 and self.ge is not None:
            text += f", {self.ge} or more"
        elif bounds:
            text += " " + ", ".join(bounds)
        return text if self.also is None else f"{text}, or {self.also}"

    def take(self, kind: type, value: Any) -> int | float:
        """The number as Python's own `kind`. Raises Unfit for what is no number of the range."""
        if not _is_number(kind, value) or not (value == self.also or self._holds(value)):
            raise Unfit(self.wanted(kind))
        if kind is float and value != 0 and not _SMALLEST <= abs(value) <= _LARGEST:
            raise Unfit(f"0, or a number of {_SMALLEST:g} to {_LARGEST:g} in size")
        if kind is int and self.le is self.lt is None and not -_INTEGERS <= value < _INTEGERS:
            raise Unfit(f"an integer below {_INTEGERS} in size")
        return kind(value)

    def _holds(self, value: float) -> bool:
        return (
            (self.ge is None or self.ge <= value)
            and (self.gt is None or self.gt < value)
            and (self.le is None or value <= self.le)
            and (self.lt is None or value < self.lt)
        )

    def __get_pydantic_core_schema__(self, source: Any, handler: Callable) -> CoreSchema:
        """So that a bad number of a file is told by its own key."""

        def check(value: Any) -> Any:
            try:
                return _take(source, value, self)
            except Unfit as unfit:
                raise PydanticCustomError(
                    "unfit", "needed is {need}", {"need": str(unfit)}
                ) from None

        return core_schema.no_info_after_validator_function(check, handler(source))


def _is_number(kind: type, value: Any) -> bool:
    number = isinstance(value, Integral if kind is int else Real)
    return number and not isinstance(value, bool)


Count = Annotated[int, Range(ge=1)]
CountOrZero = Annotated[int, Range(ge=0)]
Seed = Annotated[int, Range(ge=0, lt=2**32)]
Share = Annotated[float, Range(ge=0, le=1)]
Positive = Annotated[float, Range(gt=0)]
PositiveOrZero = Annotated[float, Range(ge=0)]
Dtype = Literal["float32", "bfloat16"]


class Checked:
    """Base of every config: its fields are checked when it is made, however it is made.

    Raises ValueError with the field, the value seen and what is needed. Numbers of other libraries
    (numpy's) become Python's.
    """

    def __post_init__(self):
        for name, hint in hints(type(self)).items():
            value = getattr(self, name)
            try:
                object.__setattr__(self, name, _take(hint, value))
            except Unfit as unfit:
                raise ValueError(f"{name} is {value!r}, needed is {unfit}") from None


@functools.cache
def hints(cls: type) -> dict[str, Any]:
    """The annotations of a dataclass' fields, those of `Annotated` included."""
    found = get_type_hints(cls, include_extras=True)
    return {field.name: found[field.name] for field in dataclasses.fields(cls) if field.init}


def is_config(hint: Any) -> TypeGuard[type]:
    """Whether an annotation is a dataclass, which has keys of its own."""
    return dataclasses.is_dataclass(hint)


def config_in(hint: Any) -> type | None:
    """The dataclass that an annotation is, or is beside null."""
    found = (x for x in (hint, *get_args(hint)) if isinstance(x, type) and is_config(x))
    return next(found, None)


def wanted(hint: Any, bounds: Range | None = None) -> str:
    """What a field with this annotation takes, in words; of a dataclass, its name."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return wanted(args[0], _bounds(hint, bounds))
    if origin is Literal:
        *others, last = map(repr, args)
        return f"{', '.join(others)} or {last}" if others else last
    if origin in (Union, types.UnionType):
        return " or ".join(wanted(arg, bounds) for arg in args)
    if origin is tuple:
        if len({*args} - {...}) > 1:
            return f"a tuple of {len(args)}, {' and '.join(wanted(arg, bounds) for arg in args)}"
        return f"a tuple, of each {wanted(args[0], bounds)}"
    if hint in (int, float):
        return (bounds or Range()).wanted(hint)
    names = {bool: "true or false", str: "a text", types.NoneType: "null"}
    return names.get(hint, getattr(hint, "__name__", str(hint)))


def _take(hint: Any, value: Any, bounds: Range | None = None) -> Any:
    """`value` as a field with this annotation keeps it. Raises Unfit."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _take(args[0], value, _bounds(hint, bounds))
    if hint in (int, float):
        return (bounds or Range()).take(hint, value)
    if origin in (Union, types.UnionType):
        needs = []
        for arg in args:
            try:
                return _take(arg, value, bounds)
            except Unfit as unfit:
                needs.append(str(unfit))
        raise Unfit(" or ".join(needs))
    if origin is tuple and isinstance(value, tuple):
        kinds = args[:1] * len(value) if args[-1] is ... else args
        if len(kinds) != len(value):
            raise Unfit(wanted(hint, bounds))
        return tuple(_take(kind, item, bounds) for kind, item in zip(kinds, value, strict=True))
    if origin is Literal:
        right = any(value == arg and type(value) is type(arg) for arg in args)
    else:
        right = isinstance(value, origin or hint)
    if not right:
        raise Unfit(wanted(hint, bounds))
    return value


def _bounds(hint: Any, otherwise: Range | None) -> Range | None:
    return next((x for x in hint.__metadata__ if isinstance(x, Range)), otherwise)


class Meaning(NamedTuple):
    """What the docstring says of a field: its unit, "" where it has none, and its meaning."""

    unit: str
    text: str


_ENTRY = re.compile(r"^  (\w+(?:, \w+)*)(?: \(([^)]+)\))?:((?:.*\n)(?:(?:    .*)?\n)*)", re.M)


def meanings(cls: type) -> dict[str, Meaning]:
    """{field: meaning} from the "Attributes" of a config and of its bases."""
    found = {}
    for base in reversed(cls.__mro__):
        text = inspect.cleandoc(base.__dict__.get("__doc__") or "") + "\n"
        section = text.partition("Attributes:\n")[2]
        for names, unit, meaning in _ENTRY.findall(section):
            entry = Meaning(unit, " ".join(meaning.split()))
            found |= dict.fromkeys(names.split(", "), entry)
    return {name: found[name] for name in hints(cls) if name in found}
