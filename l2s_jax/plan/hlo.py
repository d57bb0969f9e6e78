"""Collectives of a compiled program, and what it reads and writes, from its text in HLO."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Container, Mapping
from typing import NamedTuple

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_ARRAY = re.compile(r"\b(pred|bf16|[a-z]+\d+\w*)\[([\d,]*)\](\{[^}]*\})?")
_ASSIGNED = re.compile(
    r"^\s*(?P<root>ROOT )?%?(?P<name>[\w.\-]+) = (?P<shape>\(.*?\)|\S+) (?P<kind>[a-z][\w\-]*)\("
    r"(?P<operands>[^()]*)\)(?P<rest>.*)$"
)
_SLICES = ("dynamic-slice", "slice", "gather")
# They move nothing, or what they call does and is counted there.
_FREE = {
    "after-all",
    "bitcast",
    "call",
    "conditional",
    "constant",
    "get-tuple-element",
    "opt-barrier",
    "parameter",
    "partition-id",
    "tuple",
    "while",
}


class _Instruction(NamedTuple):
    name: str
    shape: str
    kind: str
    operands: tuple[str, ...]  # names; of a parameter its number
    called: tuple[str, ...]  # computations
    line: str
    is_root: bool


# By the name of the computation.
_Computations = Mapping[str, list[_Instruction]]


class Collective(NamedTuple):
    """A collective operation of one device.

    bytes: of the larger of what it takes and what it gives. group: devices that take part together.
    times: how often it runs.
    """

    kind: str
    bytes: int
    group: int
    times: int

    @property
    def sent(self) -> float:
        """Bytes that a device sends, at the least, each time.

        As in Chan et al. 2007, "Collective communication: theory, practice, and experience",
        table 1: an all-reduce is a reduce-scatter and an all-gather.
        """
        if self.kind == "collective-permute":
            return self.bytes
        return self.bytes * (self.group - 1) / self.group * (1 + (self.kind == "all-reduce"))


def collectives(text: str) -> list[Collective]:
    """The collectives in a compiled program's text, those in loops as often as the loop turns.

    Of a loop those of its body: what its condition adds up are a few bytes.
    """
    program, entry = _parsed(text)
    times = _times(program, entry)
    conditions = set(re.findall(r"\bcondition=%?([\w.\-]+)", text))
    found: dict[str, Collective] = {}
    for name, instructions in program.items():
        for one in instructions:
            kind = one.kind.removesuffix("-start")
            if kind not in KINDS or not times[name] or name in conditions:
                continue
            moved, group = _size(_result(one)), _group(one.line)
            if name.startswith("all-reduce-scatter"):  # an all-reduce of which one part is kept
                kind = "reduce-scatter"
            elif kind == "reduce-scatter":
                moved *= group
            if group > 1 or kind == "collective-permute":
                # Parts of one asynchronous operation share its channel.
                found[kind + _channel(one.line)] = Collective(kind, moved, group, times[name])
    return list(found.values())


def _channel(line: str) -> str:
    """What an instruction has in common with the other parts of one collective."""
    channel = re.search(r"channel_id=(\d+)", line)
    return channel[0] if channel else line


def loop_turns(text: str) -> list[int]:
    """Turns of each loop of a program that is in no other loop; 1 where they are not known."""
    program, entry = _parsed(text)
    return [_turns(one, program) for one in program[entry] if one.kind == "while"]


def memory_bytes(text: str, *, only_loops: bool = False) -> int:
    """Bytes that a program's instructions read from main memory and write to it, in loops as often
    as they turn; with `only_loops`, those in loops.

    Of what is sliced or gathered, the part counts. Arrays take up whole tiles. What the compiler
    keeps in a memory of its own (TPU: on the chip, memory space 1) is not in main memory.
    """
    program, entry = _parsed(text)
    times = _times(program, entry, ("while", "conditional", "call"))
    total = 0
    carried: set[str] = set()
    for name, count in times.items():
        # The compiler has each of these called from one place, so that more often is in a loop.
        if only_loops and count == 1:
            continue
        shapes = {one.name: one.shape for one in program[name]}
        for one in program[name]:
            if one.kind == "fusion" and one.called:
                # Several fusions may carry a collective on, which gives its result once.
                for inner in program[one.called[0]]:
                    if inner.kind in KINDS and _channel(inner.line) not in carried:
                        carried.add(_channel(inner.line))
                        total += _in_main_memory(inner.shape) * count
            if one.kind not in _FREE and not one.kind.endswith("-done"):
                total += _moved(one, shapes, program) * count
    return total


def _parsed(text: str) -> tuple[_Computations, str]:
    """The instructions of each computation, and the name of the one that a run begins with."""
    lines: dict[str, list[str]] = {}
    entry = name = ""
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            name = match[2]
            lines[name] = []
            entry = name if match[1] else entry
        elif name:
            lines[name].append(line)

    def instruction(line: str) -> _Instruction | None:
        match = _ASSIGNED.match(re.sub(r"/\*.*?\*/", "", line))
        if not match:
            return None
        called = re.findall(r"[{=, ]%([\w.\-]+)", match["rest"])
        return _Instruction(
            match["name"],
            match["shape"],
            match["kind"],
            tuple(re.findall(r"%?([\w.\-]+)", match["operands"])),
            tuple(name for name in called if name in lines),
            line,
            bool(match["root"]),
        )

    return {
        name: [one for one in map(instruction, inside) if one] for name, inside in lines.items()
    }, entry


def _times(
    program: _Computations, entry: str, kinds: Container[str] | None = None
) -> dict[str, int]:
    """How often each computation runs; with `kinds`, only calls by such instructions count."""
    times: dict[str, int] = defaultdict(int)

    def visit(name: str, count: int) -> None:
        times[name] += count
        for one in program[name]:
            if kinds is None or one.kind in kinds:
                turns = _turns(one, program) if one.kind == "while" else 1
                for called in one.called:
                    visit(called, count * turns)

    visit(entry, 1)
    return times


def _moved(one: _Instruction, shapes: Mapping[str, str], program: _Computations) -> int:
    """Bytes that an instruction reads and writes in main memory; of what it slices, the slice's."""
    operands = [shapes.get(name, "") for name in one.operands]
    kind, shape = one.kind.removesuffix("-start"), _result(one)
    if kind in _SLICES:
        return _copied(shape, operands[0], shape)
    if kind == "dynamic-update-slice":
        return _copied(operands[1], operands[1], operands[0])
    if kind == "copy":
        return _in_main_memory(one.shape) + (kind == one.kind) * _in_main_memory(operands[0])
    if kind == "fusion" and one.called:
        inside = one.called[0]
        read = sum(_read(inside, i, program) for i, x in enumerate(operands) if _in_main_memory(x))
        return read + _written(inside, shape, program)
    return _in_main_memory(shape) + sum(map(_in_main_memory, operands))


def _result(one: _Instruction) -> str:
    """The shape of what an instruction gives, of a -start of what it will."""
    # What is asynchronous has a tuple of its operands, its result and more for a shape. (A copy has
    # the result first, which is as large.)
    if not one.kind.endswith("-start") or one.kind == "all-reduce-start":
        return one.shape
    parts = _parts(one.shape) if one.shape.startswith("(") else []
    return parts[1] if len(parts) > 1 else one.shape


def _copied(what: str, source: str, target: str) -> int:
    """Bytes of `what`, once for each of the two places that is in main memory."""
    return _stored(what) * (bool(_in_main_memory(source)) + bool(_in_main_memory(target)))


def _read(computation: str, index: int, program: _Computations) -> int:
    """Bytes that a fused computation reads of its argument `index`."""
    inside = program[computation]
    for one in inside:
        if one.kind == "parameter" and one.operands == (str(index),):
            return _used(one, inside, program)
    return 0


def _used(source: _Instruction, inside: list[_Instruction], program: _Computations) -> int:
    """Bytes of `source`, within a fusion, that what is computed from it reads."""
    whole, read = _stored(source.shape), 0
    for one in inside:
        if source.name not in one.operands:
            continue
        if one.kind in _SLICES and one.operands[0] == source.name:
            read += _stored(one.shape)
        elif one.kind == "dynamic-update-slice" and one.operands[0] == source.name:
            continue  # written in place
        elif _carries_on(one, inside) or (one.kind == "tuple" and one.is_root):
            continue
        elif one.kind == "bitcast":
            read += _used(one, inside, program)
        elif one.kind == "fusion" and one.called:
            read += _read(one.called[0], one.operands.index(source.name), program)
        else:
            return whole
    return min(read, whole)


def _carries_on(one: _Instruction, inside: list[_Instruction]) -> bool:
    """Whether it is a part of a collective that a fusion begins, carries on or ends."""
    if one.kind == "custom-call":
        return any(other.kind in KINDS for other in inside)
    return one.kind in KINDS


def _written(computation: str, shape: str, program: _Computations) -> int:
    """Bytes that a fused computation with a result of this shape writes to main memory."""
    inside = {one.name: one for one in program[computation]}

    def written(one: _Instruction | None, shape: str) -> int:
        if one is None or one.kind == "parameter" or not _in_main_memory(shape):
            return 0
        if _carries_on(one, program[computation]):
            return 0
        if one.kind == "dynamic-update-slice":
            update = inside.get(one.operands[1])
            return _stored(update.shape) if update else 0
        if one.kind == "bitcast":
            return min(_stored(shape), written(inside.get(one.operands[0]), shape))
        if one.kind == "tuple":
            parts = zip(one.operands, _parts(shape), strict=True)
            return sum(written(inside.get(name), part) for name, part in parts)
        if one.kind == "fusion" and one.called:
            return _written(one.called[0], shape, program)
        return _in_main_memory(shape)

    return sum(written(one, shape) for one in inside.values() if one.is_root)


def _turns(loop: _Instruction, program: _Computations) -> int:
    """Turns of a loop, taken to count from 0, up to a constant; 1 where that is not known."""
    if known := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.line):
        return int(known[1])
    parts = [re.search(rf"{part}=%?([\w.\-]+)", loop.line) for part in ("condition", "body")]
    condition, body = (program[part[1]] if part else [] for part in parts)
    limits = _constants(condition)
    if len(limits) != 1 or not any("direction=LT" in one.line for one in condition):
        return 1
    return -(-limits.popitem()[1] // _stride(condition, body))


def _stride(condition: list[_Instruction], body: list[_Instruction]) -> int:
    """By how much a turn of a loop raises what its condition compares; 1 where it is not said."""
    compared = [m[1] for m in (re.search(r", index=(\d+)", one.line) for one in condition) if m]
    root = next((one for one in body if one.is_root), None)
    if len(compared) != 1 or root is None or root.kind != "tuple":
        return 1
    name = root.operands[int(compared[0])]
    counter = next((one for one in body if one.name == name), None)
    if counter is None or counter.kind != "add":
        return 1
    constants = _constants(body)
    return next((constants[name] for name in counter.operands if constants.get(name)), 1)


def _constants(instructions: list[_Instruction]) -> dict[str, int]:
    """The integers among a computation's instructions, by name."""
    return {
        one.name: int(one.operands[0])
        for one in instructions
        if one.kind == "constant"
        and one.shape.startswith(("s32[]", "u32[]"))
        and one.operands[0].isdigit()
    }


def _size(shape: str) -> int:
    """Bytes of an array or of all in a tuple."""
    return sum(
        _width(dtype) * math.prod(_numbers(sizes)) // 8 for dtype, sizes, _ in _ARRAY.findall(shape)
    )


def _stored(shape: str) -> int:
    """As `_size`, with the padding of the tiles in which a TPU stores arrays."""
    total = 0
    for dtype, dimensions, layout in _ARRAY.findall(shape):
        sizes = _numbers(dimensions)
        if tiled := re.match(r"\{([\d,]+):T\(([\d,]+)\)", layout):
            order, tile = map(_numbers, tiled.groups())
            # Both begin to count at the axis whose neighbours are neighbours in memory.
            for axis, size in zip(order, reversed(tile), strict=False):
                sizes[axis] = -(-sizes[axis] // size) * size
        total += _width(dtype) * math.prod(sizes) // 8
    return total


def _in_main_memory(shape: str) -> int:
    """As `_stored`, of the arrays that lie in main memory."""
    return sum(
        _stored(array[0]) for array in _ARRAY.finditer(shape) if "S(" not in (array[3] or "")
    )


def _parts(shape: str) -> list[str]:
    """The elements of a tuple's shape."""
    parts, depth, last = [], 0, 1
    for i, letter in enumerate(shape):
        depth += (letter in "([{") - (letter in ")]}")
        if depth == 1 and letter == ",":
            parts.append(shape[last:i])
            last = i + 1
    return [*parts, shape[last:]]


def _width(dtype: str) -> int:
    """Bits of a number."""
    return 8 if dtype == "pred" else int(re.search(r"\d+", dtype)[0])


def _numbers(text: str) -> list[int]:
    """Of dimensions, a layout or a tile, as in 8,128; none of a scalar."""
    return [int(number) for number in text.split(",") if number]


def _group(line: str) -> int:
    """Devices of each group, in any of the three ways that HLO writes them."""
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\]", line):
        return int(match[2])
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return match[1].count(",") + 1
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", line):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", match[1]))
        group = 1
        for name, part in re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", match[2]):
            group *= int(part or sizes[name])
        return group
    return 2 if "source_target_pairs" in line else 1
