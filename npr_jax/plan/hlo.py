"""What a compiled program sends between devices, read from its text."""

import math
import re

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
ITEM_BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2}
ITEM_BYTES |= {"s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}
_COLLECTIVE = re.compile(
    r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(-start)?\("
)
_CALLED = re.compile(r"(?:calls|to_apply|body|branch_computations)=\{?%?([\w.\-]+(?:, %[\w.\-]+)*)")


def collective_bytes(text: str) -> float:
    """Bytes that each device receives from others while an optimised HLO module runs once.

    A loop counts as often as its text says that it runs, and once where only the program's input
    does (the train step's loop over micro-batches). Ring algorithms are assumed: of a result in g
    parts, g - 1 come from others.
    """
    lines = computations(text)
    entry = re.search(r"^ENTRY %?([\w.\-]+)", text, re.M)
    return _bytes_of(entry[1], lines, {}) if entry else 0.0


def computations(text: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    current: list[str] = []
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            current = found.setdefault(match[1], [])
        elif line.startswith(" "):
            current.append(line)
    return found


def _bytes_of(name: str, lines: dict[str, list[str]], known: dict[str, float]) -> float:
    if name in known:
        return known[name]
    total = 0.0
    for line in lines.get(name, ()):
        if match := _COLLECTIVE.search(line):
            total += _received(match[2], match[1], bool(match[3]), line)
            continue
        times = (trips(line, lines) or 1) if " while(" in line else 1
        for called in _CALLED.findall(line):
            for part in called.split(", "):
                total += times * _bytes_of(part.lstrip("%"), lines, known)
    known[name] = total
    return total


def trips(line: str, lines: dict[str, list[str]]) -> int | None:
    """How often a loop runs: from its line, or from `i < constant` and `i + constant`; None where
    neither says it."""
    if known := re.search(r'known_trip_count":\{"n":"(\d+)"', line):
        return int(known[1])
    condition, body = (
        "\n".join(lines[name])
        for part in ("condition", "body")
        for name in re.findall(rf"{part}=%?([\w.\-]+)", line)[:1]
    )
    compared = re.search(r"ROOT .* compare\(%?([\w.\-]+), %?([\w.\-]+)\), direction=LT", condition)
    if compared is None:
        return None
    end = _constant(compared[2], condition)
    index = re.search(rf"%?{re.escape(compared[1])} = .*get-tuple-element.*index=(\d+)", condition)
    if end is None or index is None:
        return None
    results = re.findall(r"ROOT .* tuple\((.*?)\)", body)[0]
    result = re.findall(r"%([\w.\-]+)", results)[int(index[1])]
    step = re.search(rf"%{re.escape(result)} = .* add\(%([\w.\-]+), %([\w.\-]+)\)", body)
    steps = [_constant(name, body) for name in step.groups()] if step else []
    return -(-end // next((step for step in steps if step), 1))


def _constant(name: str, text: str) -> int | None:
    found = re.search(rf"%?{re.escape(name)} = \S+ constant\((\d+)\)", text)
    return int(found[1]) if found else None


def _received(kind: str, shape: str, asynchronous: bool, line: str) -> float:
    sizes = [
        ITEM_BYTES[kind_of] * math.prod(int(dim) for dim in filter(None, dims.split(",")))
        for kind_of, dims in re.findall(r"(\w+)\[([\d,]*)\]", shape)
        if kind_of in ITEM_BYTES
    ]
    if asynchronous and kind in ("all-gather", "collective-permute"):  # (operands, results, ...)
        sizes = [max(sizes)]
    size, group = sum(sizes), _group_size(line)
    match kind:
        case "all-reduce":
            return 2 * size * (group - 1) / group
        case "reduce-scatter":
            return size * (group - 1)
        case "collective-permute":
            return size
        case _:
            return size * (group - 1) / group


def _group_size(line: str) -> int:
    if match := re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", line):
        sizes = dict(re.findall(r"('\w+')=(\d+)", match[1]))
        return math.prod(int(sizes[axis]) for axis in match[2].split(","))
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(match[1])
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return match[1].count(",") + 1
    return 2  # only the kinds that name pairs have no groups
