"""Which devices take part in a collective together, from a compiled program's text in HLO."""

from __future__ import annotations

import math
import re

import numpy as np

_LISTED = re.compile(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{}]*\})\}")
_COUNTED = re.compile(r"replica_groups=\[([\d,]+)\](?:<=\[([\d,]+)\](?:T\(([\d,]+)\))?)?")
_OF_MESH = re.compile(
    r"replica_groups=mesh\[([^\]]*)\]"
    r"(?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? ?\{([^}]*)\}"
)


def groups_of(line: str) -> list[list[int]]:
    """The numbers of the devices of each group, in any of the ways that HLO writes them.

    Of `source_target_pairs` each pair is one. A line without groups has none.
    """
    if match := _COUNTED.search(line):
        shape = _numbers(match[1])
        return _counted(match[2] or match[1], match[3]).reshape(shape).tolist()
    if match := _OF_MESH.search(line):
        axes = re.findall(r"'([^']+)'=(\d+)", match[1])
        ids = _counted(match[2] or ",".join(size for _, size in axes), match[3])
        return _along(axes, match[4], ids)
    if match := _LISTED.search(line):
        return [_numbers(group) for group in re.findall(r"\{([\d,]+)\}", match[1])]
    return []


def _counted(shape: str, order: str | None) -> np.ndarray:
    """0, 1, 2, ... in this shape, with its axes in this order."""
    sizes = _numbers(shape)
    axes = _numbers(order) if order else range(len(sizes))
    return np.arange(math.prod(sizes)).reshape(sizes).transpose(axes)


def _along(axes: list[tuple[str, str]], parts: str, ids: np.ndarray) -> list[list[int]]:
    """Groups along parts of a mesh's axes; 'a':(2)4 is 4 of axis a, which has 2 before these."""
    wanted = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", parts)
    shape: list[int] = []
    along: list[int] = []
    for name, size in axes:
        done = 1
        chosen = [(int(before or 1), int(part or size)) for n, before, part in wanted if n == name]
        for before, part in sorted(chosen):
            along.append(len(shape) + 1)
            shape += [before // done, part]
            done = before * part
        shape.append(int(size) // done)
    others = [i for i in range(len(shape)) if i not in along]
    group = math.prod(shape[i] for i in along)
    return ids.reshape(shape).transpose(others + along).reshape(-1, group).tolist()


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]


def slices_of(groups: list[list[int]], per_slice: int) -> int:
    """Most slices that a group reaches over, of which each has so many devices in a row."""
    return max((len({one // per_slice for one in group}) for group in groups), default=1)
