"""Devices of several slices: which slice each is of, and how a mesh lies over them.

Chips of a slice have links to each other. Slices, and what stands for them elsewhere, have only the
data center's network (DCN) between them, which is slower by far.
"""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.experimental import mesh_utils


class Numbered:
    """A device that stands for one of a slice: in plans for CPU devices, which are of none."""

    def __init__(self, device: Any, slice_index: int):
        self.device, self.slice_index = device, slice_index

    def __getattr__(self, name: str) -> Any:
        return getattr(self.device, name)


def check(slices: int, devices: Sequence[Any], process_is_granule: bool) -> None:
    """Checks that the devices are of so many slices, as many of each.

    On TPUs one slice is checked too. A GPU may say of what it is, and nobody has to ask.

    Raises:
      ValueError: other slices, or devices that are of none.
    """
    if slices == 1 and devices[0].platform != "tpu":
        return
    name = "process_index" if process_is_granule else "slice_index"
    if not hasattr(devices[0], name):
        if slices == 1:
            return
        raise ValueError(
            f"config.mesh.slices={slices}: {devices[0].device_kind} devices are of no slice (they "
            "have no slice_index); expected 1, or config.mesh.process_is_granule=True, for which "
            "each process is a slice"
        )
    if slices == 1 and process_is_granule:
        return
    sizes = collections.Counter(getattr(device, name) for device in devices)
    if len(sizes) != slices or len(set(sizes.values())) != 1:
        what = "process" if process_is_granule else "slice"
        raise ValueError(
            f"config.mesh.slices={slices}: there are {len(devices)} devices, "
            f"{', '.join(f'{count} of {what} {index}' for index, count in sorted(sizes.items()))}; "
            "expected so many slices, with as many devices each"
        )


def arranged(
    shape: Sequence[int], slices: int, devices: Sequence[Any], process_is_granule: bool
) -> np.ndarray:
    """The devices in this shape; the first axis goes slice by slice, and each slice is whole.

    Axes lie along those of a slice where they can, else along parts of them.
    """
    if slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    inner, outer = [shape[0] // slices, *shape[1:]], [slices] + [1] * (len(shape) - 1)
    found = mesh_utils.create_hybrid_device_mesh(
        inner,
        outer,
        devices,
        process_is_granule=process_is_granule,
        allow_split_physical_axes=True,
    )
    real = np.empty(found.shape, object)
    for place, device in np.ndenumerate(found):
        real[place] = device.device if isinstance(device, Numbered) else device
    return real
