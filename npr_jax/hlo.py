"""What a compiled program sends between devices, read from its text."""

import re

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_ITEM = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4}
_ITEM |= {"f32": 4, "s64": 8, "u64": 8, "f64": 8}
_COLLECTIVE = re.compile(
    r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(-start)?\("
)
_CALLED = re.compile(r"(?:calls|to_apply|body|branch_computations)=\{?%?([\w.\-]+(?:, %[\w.\-]+)*)")


def collective_bytes(text: str) -> float:
    """Bytes that each device receives from others while an optimised HLO module runs once.

    A loop counts as often as the compiler knows it to run, else once (the train step's loop over
    micro-batches). Ring algorithms are assumed: of a result in g parts, g - 1 come from others.
    """
    lines = _computations(text)
    entry = re.search(r"^ENTRY %?([\w.\-]+)", text, re.M)
    return _bytes_of(entry[1], lines, {}) if entry else 0.0


def _computations(text: str) -> dict[str, list[str]]:
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
        times = 1
        if " while(" in line and (count := re.search(r'known_trip_count":\{"n":"(\d+)"', line)):
            times = int(count[1])
        for called in _CALLED.findall(line):
            for part in called.split(", "):
                total += times * _bytes_of(part.lstrip("%"), lines, known)
    known[name] = total
    return total


def _received(kind: str, shape: str, asynchronous: bool, line: str) -> float:
    sizes = [
        _ITEM[kind_of] * _product(dims)
        for kind_of, dims in re.findall(r"(\w+)\[([\d,]*)\]", shape)
        if kind_of in _ITEM
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
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(match[1])
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return match[1].count(",") + 1
    return 2  # only the kinds that name pairs have no groups


def _product(dims: str) -> int:
    total = 1
    for dim in filter(None, dims.split(",")):
        total *= int(dim)
    return total
