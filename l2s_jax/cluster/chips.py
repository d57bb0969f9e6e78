"""Chips, and their published peak rates."""

from __future__ import annotations

import dataclasses
import fnmatch
from typing import Any


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published peak rates of a chip.

    flops: dense bfloat16 operations per second. hbm: bytes per second. links: bytes per second over
    all of the chip's links to other chips, in and out together. kinds: what JAX calls it, as
    patterns of fnmatch.
    """

    flops: float
    hbm: float
    links: float
    kinds: tuple[str, ...]
    source: str


CHIPS = {
    "v5e": Chip(
        197e12,
        819e9,
        400e9,
        ("TPU v5 lite", "TPU v5e"),
        "https://docs.cloud.google.com/tpu/docs/v5e",
    ),
    "v5p": Chip(
        459e12,
        2765e9,
        1200e9,
        ("TPU v5", "TPU v5p"),
        "https://docs.cloud.google.com/tpu/docs/v5p",
    ),
    "v6e": Chip(
        918e12,
        1638e9,
        800e9,
        ("TPU v6 lite", "TPU v6e"),
        "https://docs.cloud.google.com/tpu/docs/v6e",
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
