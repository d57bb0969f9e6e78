"""Chips, and their published peak rates."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Callable, Sequence
from typing import Any

# The least that a collective takes, whatever its size: one hop between two chips. An assumption of
# one figure for all TPUs, "typically around 1us" in Austin et al. 2025, "How to Scale Your Model",
# https://jax-ml.github.io/scaling-book/sharding; a large group takes several hops.
COLLECTIVE_S = 1e-6


def _at_16(shape: Sequence[int]) -> list[bool]:
    """Whether each axis of a v5e or v6e slice is a ring: those of 16 chips, as long as a Pod's.

    https://jax-ml.github.io/scaling-book/tpus: no wraps on smaller axes; 8x16 has one.
    """
    return [size == 16 for size in shape]


def _of_cubes(shape: Sequence[int]) -> list[bool]:
    """Likewise of a v5p slice: all, if it is made of whole cubes of 4x4x4.

    https://docs.cloud.google.com/tpu/docs/v5p: these have a full 3D torus.
    """
    return [all(size % 4 == 0 for size in shape)] * len(shape)


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published peak rates of a chip.

    flops: dense bfloat16 operations per second. hbm: bytes per second. links: bytes per second over
    all of the chip's links to other chips, in and out together. kinds: what JAX calls it, as
    patterns of fnmatch. ports: how many links they are, to neighbours along the axes of a slice;
    0: to a switch. rings: which axes of a slice of some shape wrap around. dcn: bytes per second
    that a chip sends to other slices, its share of the data center's network; 0: not known.
    """

    flops: float
    hbm: float
    links: float
    kinds: tuple[str, ...]
    source: str
    ports: int = 0
    rings: Callable[[Sequence[int]], list[bool]] = _at_16
    dcn: float = 0.0

    def least_links(self, shape: Sequence[int]) -> int:
        """Links of the chip that has the fewest in a slice of this shape: one in a corner.

        Along an axis it has one neighbour, or two where the axis is a ring.
        """
        axes = zip(shape, self.rings(shape), strict=True)
        return sum(1 + ring for size, ring in axes if size > 1)

    def sent_per_s(self, shape: Sequence[int]) -> float:
        """Bytes per second that such a chip sends at most, over all its links at once."""
        share = self.least_links(shape) / self.ports if self.ports else 1
        return self.links / 2 * share


CHIPS = {
    "v5e": Chip(
        197e12,
        819e9,
        400e9,
        ("TPU v5 lite", "TPU v5e"),
        "https://docs.cloud.google.com/tpu/docs/v5e",
        ports=4,
        rings=_at_16,
        dcn=6.4e12 / 256 / 8,  # 6.4 Tbps for a Pod of 256 chips
    ),
    "v5p": Chip(
        459e12,
        2765e9,
        1200e9,
        ("TPU v5", "TPU v5p"),
        "https://docs.cloud.google.com/tpu/docs/v5p",
        ports=6,
        rings=_of_cubes,
        dcn=50e9 / 8,
    ),
    "v6e": Chip(
        918e12,
        1638e9,
        800e9,
        ("TPU v6 lite", "TPU v6e"),
        "https://docs.cloud.google.com/tpu/docs/v6e",
        ports=4,
        rings=_at_16,
        dcn=25.6e12 / 256 / 8,  # 25.6 Tbps for a Pod of 256 chips
    ),
    "a100": Chip(
        312e12,
        2039e9,
        600e9,
        ("NVIDIA A100-SXM4-80GB",),
        "https://www.nvidia.com/en-us/data-center/a100/",
    ),
    # NVIDIA gives the rates of the next two with sparsity, which doubles them.
    "h100": Chip(
        989.5e12,
        3350e9,
        900e9,
        ("NVIDIA H100 80GB HBM3",),
        "https://www.nvidia.com/en-us/data-center/h100/",
    ),
    "h200": Chip(
        989.5e12,
        4800e9,
        900e9,
        ("NVIDIA H200*",),
        "https://www.nvidia.com/en-us/data-center/h200/",
    ),
}


def chip_of(device: Any) -> Chip | None:
    """The chip that a JAX device is, or None where its rates are not known here, as of a CPU."""
    for chip in CHIPS.values():
        if any(fnmatch.fnmatchcase(device.device_kind, kind) for kind in chip.kinds):
            return chip
    return None
