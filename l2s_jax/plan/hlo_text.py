"""A compiled program's text in HLO: its instructions, how often they run, how large arrays are."""

from __future__ import annotations

import functools
import math
import re
from collections import defaultdict
from collections.abc import Container, Mapping
from typing import NamedTuple

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_ARRAY = re.compile(r"\b(pred|bf16|[a-z]+\d+\w*)\[([\d,]*)\](\{[^}]*\})?")
_ASSIGNED = re.compile(
    r"^\s*(?P<root>ROOT )?%?(?P<name>[\w.\-]+) = (?P<shape>\(.*?\)|\S+) (?P<kind>[a-z][\w\-]*)\("
    r"(?P<operands>[^()]*)\)(?P<rest>.*)$"
)


class Instruction(NamedTuple):
    """One line of a computation."""

    name: str
    shape: str
    kind: str
    operands: tuple[str, ...]  # names; of a parameter its number
    called: tuple[str, ...]  # computations
    line: str
    is_root: bool


# By the name of the computation.
Computations = Mapping[str, list[Instruction]]


def parsed(text: str) -> tuple[Computations, str]:
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

    def instruction(line: str) -> Instruction | None:
        match = _ASSIGNED.match(re.sub(r"/\*.*?\*/", "", line))
        if not match:
            return None
        called = re.findall(r"[{=, ]%([\w.\-]+)", match["rest"])
        return Instruction(
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


def how_often(
    program: Computations, entry: str, kinds: Container[str] | None = None
) -> dict[str, int]:
    """How often each computation runs; with `kinds`, only calls by such instructions count."""
    times: dict[str, int] = defaultdict(int)

    def visit(name: str, count: int) -> None:
        times[name] += count
        for one in program[name]:
            if kinds is None or one.kind in kinds:
                turns = turns_of(one, program) if one.kind == "while" else 1
                for called in one.called:
                    visit(called, count * turns)

    visit(entry, 1)
    return times


def one_turn(program: Computations, entry: str) -> tuple[Computations, str]:
    """One turn of the longest loop that a program begins, as a program and where that begins.

    Of branches, of which a turn takes one, there is the shortest alone.
    """

    @functools.cache
    def length(name: str) -> int:
        """Instructions that a computation runs, those that it calls included."""
        return sum(1 + sum(map(length, one.called)) for one in program[name])

    def shortest(one: Instruction) -> Instruction:
        if one.kind != "conditional":
            return one
        return one._replace(called=(min(one.called, key=length),))

    loops = [one for one in program[entry] if one.kind == "while"]
    longest = max(loops, key=lambda one: sum(map(length, one.called)))
    body = max(longest.called, key=length)
    return {name: list(map(shortest, inside)) for name, inside in program.items()}, body


def turns_of(loop: Instruction, program: Computations) -> int:
    """Turns of a loop, taken to count from 0, up to a constant; 1 where that is not known."""
    if known := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.line):
        return int(known[1])
    parts = [re.search(rf"{part}=%?([\w.\-]+)", loop.line) for part in ("condition", "body")]
    condition, body = (program[part[1]] if part else [] for part in parts)
    limits = _constants(condition)
    if len(limits) != 1 or not any("direction=LT" in one.line for one in condition):
        return 1
    return -(-limits.popitem()[1] // _stride(condition, body))


def _stride(condition: list[Instruction], body: list[Instruction]) -> int:
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


def _constants(instructions: list[Instruction]) -> dict[str, int]:
    """The integers among a computation's instructions, by name."""
    return {
        one.name: int(one.operands[0])
        for one in instructions
        if one.kind == "constant"
        and one.shape.startswith(("s32[]", "u32[]"))
        and one.operands[0].isdigit()
    }


def result(one: Instruction) -> str:
    """The shape of what an instruction gives, of a -start of what it will."""
    # What is asynchronous has a tuple of its operands, its result and more for a shape. (A copy has
    # the result first, which is as large.)
    if not one.kind.endswith("-start") or one.kind == "all-reduce-start":
        return one.shape
    parts = parts_of(one.shape) if one.shape.startswith("(") else []
    return parts[1] if len(parts) > 1 else one.shape


def size_of(shape: str) -> int:
    """Bytes of an array or of all in a tuple."""
    return sum(
        _width(dtype) * math.prod(_numbers(sizes)) // 8 for dtype, sizes, _ in _ARRAY.findall(shape)
    )


def stored(shape: str) -> int:
    """As `size_of`, with the padding of the tiles in which a TPU stores arrays."""
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


def in_main_memory(shape: str) -> int:
    """As `stored`, of the arrays that lie in main memory."""
    return sum(stored(array[0]) for array in _ARRAY.finditer(shape) if "S(" not in (array[3] or ""))


def parts_of(shape: str) -> list[str]:
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
    return 8 if dtype == "pred" else int(re.findall(r"\d+", dtype)[0])


def _numbers(text: str) -> list[int]:
    """Of dimensions, a layout or a tile, as in 8,128; none of a scalar."""
    return [int(number) for number in text.split(",") if number]
