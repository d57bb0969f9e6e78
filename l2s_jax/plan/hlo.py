"""Collectives of a compiled program, and what it reads and writes, from its text in HLO."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from l2s_jax.plan.groups import groups_of, slices_of
from l2s_jax.plan.hlo_text import (
    Computations,
    Instruction,
    how_often,
    in_main_memory,
    one_turn,
    parsed,
    parts_of,
    result,
    size_of,
    stored,
    turns_of,
)

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_SLICES = ("dynamic-slice", "slice", "gather")
# Which operand is written in the place of a part of the first.
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}
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


class Collective(NamedTuple):
    """A collective operation of one device.

    bytes: of the larger of what it takes and what it gives. group: devices that take part together.
    times: how often it runs. slices: how many slices these are of.
    """

    kind: str
    bytes: int
    group: int
    times: int
    slices: int = 1

    @property
    def sent(self) -> float:
        """Bytes that a device sends within its slice, at the least, each time.

        As in Chan et al. 2007, "Collective communication: theory, practice, and experience",
        table 1: an all-reduce is a reduce-scatter and an all-gather.
        """
        if self.kind == "collective-permute":
            return self.bytes * (self.slices == 1)
        return self._share(self.group // self.slices) * self.bytes

    @property
    def sent_over_dcn(self) -> float:
        """Likewise to other slices, where each device of a slice sends its part of what all have.

        At the least, if what a slice can do within itself is done there before.
        """
        if self.kind == "collective-permute":
            return self.bytes * (self.slices > 1)
        return self._share(self.slices) * self.bytes / (self.group // self.slices)

    def _share(self, members: int) -> float:
        return (members - 1) / members * (1 + (self.kind == "all-reduce"))


def collectives(text: str, per_slice: int = 0, *, turn: bool = False) -> list[Collective]:
    """The collectives in a compiled program's text, those in loops as often as the loop turns.

    Of a loop those of its body: what its condition adds up are a few bytes. `per_slice` devices in
    a row are a slice; 0: all are one. Between slices, the TPU's compiler has the host send and
    receive what a collective moves. With `turn`, those of `one_turn`.
    """
    program, entry = one_turn(*parsed(text)) if turn else parsed(text)
    times = how_often(program, entry)
    conditions = set(re.findall(r"\bcondition=%?([\w.\-]+)", text))
    found: dict[str, Collective] = {}
    for name, instructions in program.items():
        for one in instructions:
            kind = one.kind.removesuffix("-start")
            if kind in ("send", "recv") and times[name] and (moved := _between_slices(one)):
                key, between = moved
                before = found.get(key, between)
                size = max(before.bytes, between.bytes)
                found[key] = between._replace(bytes=size, times=times[name])
                continue
            if kind not in KINDS or not times[name] or name in conditions:
                continue
            groups = groups_of(one.line)
            moved, group = size_of(result(one)), max(map(len, groups), default=1)
            if name.startswith("all-reduce-scatter"):  # an all-reduce of which one part is kept
                kind = "reduce-scatter"
            elif kind == "reduce-scatter":
                moved *= group
            if group > 1 or kind == "collective-permute":
                # Parts of one asynchronous operation share its channel.
                slices = slices_of(groups, per_slice) if per_slice else 1
                key = kind + _channel(one.line)
                found[key] = Collective(kind, moved, group, times[name], slices)
    return list(found.values())


def _channel(line: str) -> str:
    """What an instruction has in common with the other parts of one collective.

    Those within a `jax.shard_map` all have channel 1: the line of code tells them apart.
    """
    channel = re.search(r"channel_id=(\d+)", line)
    if not channel:
        return line
    source = re.search(r"metadata={[^}]*}", line)
    return channel[0] + (source[0] if source else "")


def _between_slices(one: Instruction) -> tuple[str, Collective] | None:
    """(what its parts have in common, the collective), if it is a transfer between slices."""
    kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', one.line)
    target = re.search(r'_xla_megascale_target="\{([\d,:]+)\}', one.line)
    name = re.search(r'_xla_host_transfer_rendezvous="([^"]+)"', one.line)
    if not (kind and target and name):
        return None
    ends = [part.split(":") for part in target[1].split(",")]
    slices = sum(int(end[-1]) - int(end[0]) + 1 for end in ends)
    moved = size_of(parts_of(one.shape)[0])
    kind = kind[1].lower().replace("_", "-")
    return name[1], Collective(kind, moved, slices, 1, slices)


def loop_turns(text: str) -> list[int]:
    """Turns of each loop of a program that is in no other loop; 1 where they are not known."""
    program, entry = parsed(text)
    return [turns_of(one, program) for one in program[entry] if one.kind == "while"]


def memory_bytes(text: str, *, only_loops: bool = False, turn: bool = False) -> int:
    """Bytes that a program's instructions read from main memory and write to it, in loops as often
    as they turn; with `only_loops`, those in loops; with `turn`, those of `one_turn`.

    Of what is sliced, gathered or scattered, the part counts. Arrays take up whole tiles. What the
    compiler keeps in a memory of its own (TPU: on the chip, memory space 1) is not in main memory.
    """
    program, entry = one_turn(*parsed(text)) if turn else parsed(text)
    times = how_often(program, entry, ("while", "conditional", "call"))
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
                        total += in_main_memory(inner.shape) * count
            if one.kind not in _FREE and not one.kind.endswith("-done"):
                total += _moved(one, shapes, program) * count
    return total


def _moved(one: Instruction, shapes: Mapping[str, str], program: Computations) -> int:
    """Bytes that an instruction reads and writes in main memory; of what it slices, the slice's."""
    operands = [shapes.get(name, "") for name in one.operands]
    kind, shape = one.kind.removesuffix("-start"), result(one)
    if kind in _SLICES:
        return _copied(shape, operands[0], shape)
    if kind in _UPDATES:
        update = operands[_UPDATES[kind]]
        return _copied(update, update, operands[0])
    if kind in ("send", "recv"):  # the other side is no memory of this device
        return in_main_memory(parts_of(one.shape)[0])
    if kind == "copy":
        return in_main_memory(one.shape) + (kind == one.kind) * in_main_memory(operands[0])
    if kind == "fusion" and one.called:
        inside = one.called[0]
        read = sum(_read(inside, i, program) for i, x in enumerate(operands) if in_main_memory(x))
        return read + _written(inside, shape, program)
    return in_main_memory(shape) + sum(map(in_main_memory, operands))


def _copied(what: str, source: str, target: str) -> int:
    """Bytes of `what`, once for each of the two places that is in main memory."""
    return stored(what) * (bool(in_main_memory(source)) + bool(in_main_memory(target)))


def _read(computation: str, index: int, program: Computations) -> int:
    """Bytes that a fused computation reads of its argument `index`."""
    inside = program[computation]
    for one in inside:
        if one.kind == "parameter" and one.operands == (str(index),):
            return _used(one, inside, program)
    return 0


def _used(source: Instruction, inside: list[Instruction], program: Computations) -> int:
    """Bytes of `source`, within a fusion, that what is computed from it reads."""
    whole, read = stored(source.shape), 0
    for one in inside:
        if source.name not in one.operands:
            continue
        if one.kind in _SLICES and one.operands[0] == source.name:
            read += stored(one.shape)
        elif one.kind in _UPDATES and one.operands[0] == source.name:
            continue  # written in place
        elif _carries_on(one, inside) or (one.kind == "tuple" and one.is_root):
            continue
        elif one.kind == "bitcast":
            read += _used(one, inside, program)
        elif one.kind == "fusion" and one.called:
            index = one.operands.index(source.name)
            read += _read(one.called[0], index, program)
            if _gives_back(one.called[0], index, program):
                read += _used(one, inside, program)
        else:
            return whole
    return min(read, whole)


def _gives_back(computation: str, index: int, program: Computations) -> bool:
    """Whether a fused computation does nothing but give its argument `index` another shape."""
    inside = {one.name: one for one in program[computation]}
    one = next(one for one in inside.values() if one.is_root)
    while one.kind == "bitcast":
        one = inside[one.operands[0]]
    return one.kind == "parameter" and one.operands == (str(index),)


def _carries_on(one: Instruction, inside: list[Instruction]) -> bool:
    """Whether it is a part of a collective that a fusion begins, carries on or ends."""
    if one.kind == "custom-call":
        return any(other.kind in KINDS for other in inside)
    return one.kind in KINDS


def _written(computation: str, shape: str, program: Computations) -> int:
    """Bytes that a fused computation with a result of this shape writes to main memory."""
    inside = {one.name: one for one in program[computation]}

    def written(one: Instruction | None, shape: str) -> int:
        if one is None or one.kind == "parameter" or not in_main_memory(shape):
            return 0
        if _carries_on(one, program[computation]):
            return 0
        if one.kind in _UPDATES:
            update = inside.get(one.operands[_UPDATES[one.kind]])
            return stored(update.shape) if update else 0
        if one.kind == "bitcast":
            return min(stored(shape), written(inside.get(one.operands[0]), shape))
        if one.kind == "tuple":
            parts = zip(one.operands, parts_of(shape), strict=True)
            return sum(written(inside.get(name), part) for name, part in parts)
        if one.kind == "fusion" and one.called:
            return _written(one.called[0], shape, program)
        return in_main_memory(shape)

    return sum(written(one, shape) for one in inside.values() if one.is_root)
