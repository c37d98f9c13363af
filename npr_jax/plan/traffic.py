"""What a compiled program moves through a chip's main memory, read from its optimised text.

XLA's own `cost_analysis` cannot say it: it counts a loop's body once, what lies in fast memory like
what does not, and all of a kernel's operands, however little of them the kernel brings.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping

from npr_jax.plan.hlo import ITEM_BYTES, computations, trips

_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"}
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """A line of a computation; `shape` and `rest` (operands and attributes) as they are written."""

    name: str
    shape: str
    kind: str
    operands: tuple[str, ...]
    rest: str
    is_root: bool

    def called(self, attribute: str) -> list[str]:
        """Names of the computations that an attribute lists."""
        found = re.search(rf"\b{attribute}=(\{{[^}}]*\}}|%?[\w.\-]+)", self.rest)
        return re.findall(r"[\w.\-]+", found[1]) if found else []


class Program:
    """The optimised text of a program for a TPU.

    What an instruction moves is what it reads of operands and writes of results in main memory;
    arrays in the chip's fast memory (`S(1)` and higher in their layout) move nothing. Of an operand
    that is only sliced or gathered from, the slices count; of a result that is an operand with
    something written into it, what is written. Sizes are without padding.

    Args:
      kernels: bytes of one call of each Pallas kernel, by the name given to it: what a kernel
        brings is known to it alone. A kernel that is not named raises KeyError.
      choose: of the bytes of a conditional's branches, those that count; `max` or `min`.
    """

    def __init__(self, text: str, kernels: Mapping[str, float], choose: Callable = max):
        self.kernels, self.choose = kernels, choose
        self.lines = computations(text)
        self.parts = {name: _parse(lines) for name, lines in self.lines.items()}
        entry = re.search(r"^ENTRY %?([\w.\-]+)", text, re.M)
        assert entry is not None
        self.entry = entry[1]

    def bytes(self) -> tuple[float, float]:
        """(bytes outside of the loop of which the text does not say how often it runs, bytes of one
        run of that loop's body); such a loop is not inside another."""
        once, each = 0.0, 0.0
        for instruction in self.parts[self.entry].values():
            if instruction.kind == "while" and trips(instruction.rest, self.lines) is None:
                each += sum(self._run(name) for name in self._loop(instruction))
            else:
                once += self._moved(self.entry, instruction)
        return once, each

    def written(self, least: float) -> list[str]:
        """Instructions that write at least so many bytes to main memory, with what they make: in a
        step that copies neither weights nor pool, none."""
        return [
            f"{instruction.name}: {instruction.kind} {instruction.shape}"
            for name in self._reached(self.entry)
            for instruction in self.parts[name].values()
            if not self._is_control(instruction) and self._writes(name, instruction) >= least
        ]

    def _reached(self, name: str) -> Iterable[str]:
        """The computation, and those that its loops, conditionals and calls run."""
        yield name
        for instruction in self.parts[name].values():
            for attribute in ("body", "condition", "branch_computations", "to_apply"):
                if self._is_control(instruction):
                    for called in instruction.called(attribute):
                        yield from self._reached(called)

    @staticmethod
    def _is_control(instruction: Instruction) -> bool:
        return instruction.kind in ("while", "conditional", "call")

    @staticmethod
    def _loop(instruction: Instruction) -> list[str]:
        return instruction.called("body") + instruction.called("condition")

    @functools.cache  # noqa: B019 - a program lives as long as its account
    def _run(self, name: str) -> float:
        return sum(self._moved(name, instruction) for instruction in self.parts[name].values())

    def _moved(self, where: str, instruction: Instruction) -> float:
        match instruction.kind:
            case "while":
                times = trips(instruction.rest, self.lines)
                if times is None:
                    raise ValueError(f"loop {instruction.name}: the text does not say how often")
                return times * sum(self._run(name) for name in self._loop(instruction))
            case "conditional":
                return self.choose(map(self._run, instruction.called("branch_computations")))
            case "call":
                return sum(map(self._run, instruction.called("to_apply")))
            case "custom-call" if "tpu_custom_call" in instruction.rest:
                return self.kernels[re.sub(r"[.\d]*$", "", instruction.name)]
        return self._reads(where, instruction) + self._writes(where, instruction)

    def _reads(self, where: str, instruction: Instruction) -> float:
        if instruction.kind in _FREE or instruction.kind.endswith("-done"):
            return 0.0
        return sum(
            min(hbm_bytes(shape), self._used(instruction, number))
            for number, name in enumerate(instruction.operands)
            if hbm_bytes(shape := self.parts[where][name].shape)
        )

    def _used(self, instruction: Instruction, number: int) -> float:
        """Bytes that an instruction reads of its operand of that number."""
        match instruction.kind:
            case "dynamic-slice" | "slice" | "gather" if number == 0:
                return all_bytes(instruction.shape)
            case "slice-start" | "dynamic-slice-start" if number == 0:
                return all_bytes(_started(instruction.shape))
            case "dynamic-update-slice" | "scatter" if number == 0:
                return 0.0
            case "fusion":
                (name,) = instruction.called("calls")
                return self._used_inside(name, number)[0]
        return math.inf

    @functools.cache  # noqa: B019
    def _used_inside(self, name: str, number: int) -> tuple[float, bool]:
        """The same of a fusion's computation, and whether its result is the operand itself."""
        part = self.parts[name]
        given = next(i for i in part.values() if i.kind == "parameter" and _number(i) == number)
        same, total = {given.name}, 0.0
        for instruction in part.values():  # written before they are used
            for at, operand in enumerate(instruction.operands):
                if operand not in same:
                    continue
                match instruction.kind:
                    case "bitcast":
                        same.add(instruction.name)
                    case "fusion":
                        (inner,) = instruction.called("calls")
                        used, passed = self._used_inside(inner, at)
                        total += used
                        if passed:
                            same.add(instruction.name)
                    case _:
                        total += self._used(instruction, at)
        return total, any(i.is_root and i.name in same for i in part.values())

    def _writes(self, where: str, instruction: Instruction) -> float:
        kind = instruction.kind
        if kind in _FREE or kind.endswith("-done"):
            return 0.0
        if kind == "copy-start":  # (result, operand, semaphore)
            return hbm_bytes(_arrays(instruction.shape)[0])
        if kind.endswith("-start"):
            return hbm_bytes(_started(instruction.shape))
        if kind == "fusion":
            (name,) = instruction.called("calls")
            made = self._made(self.parts[name])
        else:
            made = [self._new(self.parts[where], instruction)]
        shapes = _arrays(instruction.shape)
        made = made if len(made) == len(shapes) else [math.inf] * len(shapes)
        return sum(min(hbm_bytes(s), new) for s, new in zip(shapes, made, strict=True))

    def _made(self, part: dict[str, Instruction]) -> list[float]:
        """Bytes that are new in each result of a fusion."""
        root = next(i for i in part.values() if i.is_root)
        roots = [part[name] for name in root.operands] if root.kind == "tuple" else [root]
        return [self._new(part, instruction) for instruction in roots]

    def _new(self, part: dict[str, Instruction], instruction: Instruction) -> float:
        match instruction.kind:
            case "bitcast":
                return self._new(part, part[instruction.operands[0]])
            case "dynamic-update-slice":
                return all_bytes(part[instruction.operands[1]].shape)
            case "scatter":
                return all_bytes(part[instruction.operands[2]].shape)
            case "fusion":
                (name,) = instruction.called("calls")
                made = self._made(self.parts[name])
                return made[0] if len(made) == 1 else math.inf
        return math.inf


def hbm_bytes(shape: str) -> float:
    """Bytes of a shape's arrays, as it is written in a program, that lie in main memory."""
    return sum(all_bytes(array) for array in _arrays(shape) if not re.search(r"S\([1-9]", array))


def all_bytes(shape: str) -> float:
    """Bytes of all of a shape's arrays."""
    return sum(
        ITEM_BYTES[kind] * math.prod(int(dim) for dim in filter(None, dims.split(",")))
        for kind, dims, _ in _ARRAY.findall(shape)
        if kind in ITEM_BYTES
    )


def _arrays(shape: str) -> list[str]:
    return [match[0] for match in _ARRAY.finditer(shape)]


def _started(shape: str) -> str:
    """The result of what runs beside others, ((operands), result, semaphore), or it alone."""
    return _arrays(shape[_closing(shape[1:]) + 1 :])[0] if shape.startswith("((") else shape


def _number(parameter: Instruction) -> int:
    return int(parameter.rest.partition(")")[0])


_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")


def _parse(lines: list[str]) -> dict[str, Instruction]:
    found = {}
    for line in lines:
        match = _LINE.match(line)
        if match is None:
            continue
        root, name, text = match.groups()
        end = _closing(text) + 1 if text.startswith("(") else text.index(" ")
        shape, rest = text[:end], text[end:].lstrip()
        kind, _, rest = rest.partition("(")
        inside = rest[: _closing("(" + rest) - 1]
        operands = tuple(re.findall(r"%([\w.\-]+)", inside))
        found[name] = Instruction(name, shape, kind, operands, rest, bool(root))
    return found


def _closing(text: str) -> int:
    """Where the parenthesis closes with which the text begins."""
    depth = 0
    for at, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return at
    raise ValueError(f"no end of {text[:80]!r}")
