"""Collectives of a compiled program, from its text in HLO."""

from __future__ import annotations

import re
from collections import defaultdict
from typing import NamedTuple

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(rf"= (?P<shape>.*?) (?P<kind>{'|'.join(KINDS)})(?P<start>-start)?\(")
_ARRAY = re.compile(r"\b(pred|bf16|[a-z]+\d+\w*)\[([\d,]*)\]")
_CALLED = re.compile(
    r"(?:calls|body|true_computation|false_computation|called_computations|branch_computations)="
    r"(?:\{([^}]*)\}|%?([\w.\-]+))"
)


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
    """The collectives in a compiled program's text, those in loops as often as the loop turns."""
    computations, entry = _computations(text)
    times = _times(computations, entry)
    found: dict[str, Collective] = {}
    for name, lines in computations.items():
        for line in lines:
            match = _INSTRUCTION.search(line)
            if not match or not times[name]:
                continue
            kind, moved = match["kind"], _bytes(match["shape"], match["kind"], match["start"])
            group = _group(line)
            if name.startswith("all-reduce-scatter"):  # an all-reduce of which one part is kept
                kind = "reduce-scatter"
            elif kind == "reduce-scatter":
                moved *= group
            if group > 1 or kind == "collective-permute":
                # Parts of one asynchronous operation share its channel.
                channel = re.search(r"channel_id=(\d+)", line)
                key = channel[0] + kind if channel else f"{name}/{line}"
                found[key] = Collective(kind, moved, group, times[name])
    return list(found.values())


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    computations: dict[str, list[str]] = {}
    entry = name = ""
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            name = match[2]
            computations[name] = []
            entry = name if match[1] else entry
        elif name:
            computations[name].append(line)
    return computations, entry


def _times(computations: dict[str, list[str]], entry: str) -> dict[str, int]:
    """How often each computation runs."""
    times: dict[str, int] = defaultdict(int)

    def visit(name: str, count: int) -> None:
        times[name] += count
        for line in computations.get(name, ()):
            turns = _turns(computations, line) if " while(" in line else 1
            for several, one in _CALLED.findall(line):
                for called in re.findall(r"[\w.\-]+", several or one):
                    if called in computations:
                        visit(called, count * turns)

    visit(entry, 1)
    return times


def _turns(computations: dict[str, list[str]], line: str) -> int:
    """Turns of a loop that counts up to a constant; 1 where it is not known."""
    if known := re.search(r'known_trip_count":\{"n":"(\d+)"', line):
        return int(known[1])
    condition = re.search(r"condition=%?([\w.\-]+)", line)
    body = "\n".join(computations.get(condition[1], ())) if condition else ""
    limits = re.findall(r"= s32\[\]\S* constant\((\d+)\)", body)
    return int(limits[0]) if len(limits) == 1 and "direction=LT" in body else 1


def _bytes(shape: str, kind: str, start: str | None) -> int:
    """Bytes of an instruction's result, of a -start's what it will be."""
    if start and kind != "all-reduce":
        parts = _parts(shape)
        shape = parts[1] if len(parts) > 1 else shape
    return sum(
        _width(dtype) * _product(dimensions) // 8 for dtype, dimensions in _ARRAY.findall(shape)
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


def _product(dimensions: str) -> int:
    product = 1
    for size in filter(None, dimensions.split(",")):
        product *= int(size)
    return product


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
