"""Slices to compile for, and what fits on their devices.

The devices come from libtpu, which holds the TPU's whole compiler and needs no TPU for it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import os
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from l2s_jax.cluster import libtpu, sharding
from l2s_jax.cluster.chips import CHIPS, Chip
from l2s_jax.cluster.granules import Numbered

EXPECTED = "such as v5e:4x4, v5p:2x2x2, v6e:4x4, cpu:8, or v5e:4x4*2 for two slices"

# libtpu asks a Google Cloud VM's metadata server for what these say, and waits where there is none.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    # Compiling takes no TPU, so any number of processes may do it at once.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
}


@dataclasses.dataclass(frozen=True)
class Slice:
    """The devices of a topology, which are one a chip but for the oldest and newest TPUs.

    capacity: bytes of memory that the compiler may fill on one device. chip: None without
    published rates. slices: how many such slices there are; `devices` are those of all.
    """

    topology: str
    devices: Sequence[Any]
    capacity: int
    chip: Chip | None
    slices: int = 1

    @property
    def shape(self) -> tuple[int, ...]:
        """Chips along each axis of one slice."""
        shape = self.topology.partition(":")[2].partition("*")[0]
        return tuple(map(int, shape.split("x")))

    @property
    def per_slice(self) -> int:
        """Devices of each slice."""
        return len(self.devices) // self.slices

    @property
    def sent_per_s(self) -> float:
        """Bytes per second that the chip with the fewest links sends; 0 without published rates."""
        return self.chip.sent_per_s(self.shape) if self.chip else 0.0

    @property
    def platform(self) -> str:
        """Of its devices: "tpu" or "cpu"."""
        return self.devices[0].platform

    @property
    def chips(self) -> int:
        """Number of chips; of devices, on CPUs."""
        if self.platform == "cpu":
            return len(self.devices)
        return len({tuple(device.coords) for device in self.devices}) * self.slices


def open_slice(topology: str) -> Slice:
    """The slice of that name, "KIND:AxB" or "KIND:AxBxC" as libtpu names them, or "cpu:N".

    With *S behind it, S such slices. N CPU devices then stand for S slices of N / S.

    Raises:
      ValueError: there is no such slice, or nothing to compile for it with.
    """
    kind, _, rest = topology.partition(":")
    shape, _, times = rest.partition("*")
    if not kind or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*(\*[1-9]\d*)?", rest):
        raise ValueError(f"--topology={topology!r}: expected KIND:SHAPE, {EXPECTED}")
    slices = int(times or 1)
    if kind == "cpu":
        return _cpus(topology, shape, slices)
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(
            f"--topology={topology}: libtpu, the TPU's compiler, is not installed; "
            "pip install 'l2s-jax[tpu]' or 'jax[tpu]' brings it, and --topology=cpu:8 does without"
        )
    try:
        devices = _tpus(kind, shape, slices)
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0].removeprefix("INVALID_ARGUMENT: ")
        raise ValueError(
            f"--topology={topology}: libtpu has no such slice ({reason}); expected one {EXPECTED}, "
            "a single chip as 1x1, larger ones in whole hosts of 2x2"
        ) from None
    return Slice(topology, devices, _capacity(devices), CHIPS.get(kind), slices)


def alone(where: Slice, mesh: Mesh) -> Mesh:
    """A mesh of one process's devices, as a slice of their own; one of all devices as it is.

    For such a mesh a process compiles by itself, and the TPU's compiler knows of no other devices.
    """
    if where.platform == "cpu" or mesh.size == len(where.devices):
        return mesh
    places = np.array([device.coords for device in mesh.devices.flat])
    shape = (np.ptp(places, axis=0) + 1)[: len(where.shape)]
    devices = _tpus(where.topology.partition(":")[0], "x".join(map(str, shape)))
    return sharding.make_mesh(dict(mesh.shape), devices)


@functools.cache
def _tpus(kind: str, shape: str, slices: int = 1) -> Sequence[Any]:
    """The devices of so many slices, as libtpu has them: the same ones each time."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    libtpu.prepare()
    settings: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
    if kind == "v4":
        settings["chip_config_name"] = "megacore"  # one device per chip, as JAX has it on a v4
    if set(shape) <= set("1x"):
        settings["chips_per_host_bounds"] = (1, 1, 1)
    return topologies.get_topology_desc(f"{kind}:{shape}", "tpu", **settings).devices


def _cpus(topology: str, shape: str, slices: int) -> Slice:
    """Fake devices of this machine, which share its memory."""
    if not shape.isdigit():
        raise ValueError(f"--topology={topology}: expected a number of CPU devices, as in cpu:8")
    count = int(shape)
    if count % slices:
        raise ValueError(
            f"--topology={topology}: {slices} slices do not split {count} devices; expected a "
            f"multiple of {slices}, as in cpu:{-(-count // slices) * slices}*{slices}"
        )
    # JAX may run already, with as many as it was started with.
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", count)
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise ValueError(
            f"--topology={topology}: this process has {len(devices)} CPU devices already; expected "
            f"at most cpu:{len(devices)}"
        )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    used: list[Any] = list(devices[:count])
    if slices > 1:
        used = [Numbered(device, i * slices // count) for i, device in enumerate(used)]
    return Slice(topology, used, memory // count, None, slices)


def _capacity(devices: Sequence[Any]) -> int:
    """Bytes that the compiler may fill on a device: it says so when asked for far too many."""
    mesh = Mesh(devices[:1], ("x",))
    huge = jax.ShapeDtypeStruct((1 << 45,), "int8", sharding=NamedSharding(mesh, P()))
    try:
        jax.jit(lambda x: x + 1).lower(huge).compile()
    except jax.errors.JaxRuntimeError as error:
        if found := re.search(r"available HBM \(([\d.]+[KMGT]?)\)", str(error)):
            return parse_size(found[1])
        raise
    raise RuntimeError("the compiler took 32 TiB on one device")


def parse_size(text: str) -> int:
    """Bytes of a size as the TPU's compiler writes it: 15.75G."""
    factor = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
    return int(float(text.rstrip("KMGT")) * factor.get(text[-1], 1))
