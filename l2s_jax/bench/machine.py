"""What the machine is: a figure without its processor says little."""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Iterable
from importlib import metadata

# The flags of /proc/cpuinfo that say which products a CPU has, and how they are called.
_SETS = (
    ("amx_bf16", "AMX with bfloat16"),
    ("avx512_bf16", "AVX-512 with bfloat16"),
    ("avx512_vnni", "AVX-512 with VNNI"),
    ("avx512f", "AVX-512"),
    ("avx_vnni", "AVX2 with VNNI"),
    ("avx2", "AVX2"),
    ("asimd", "NEON"),
)
_BFLOAT16 = ("amx_bf16", "avx512_bf16", "bf16")


def cores() -> int:
    """How many CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpuinfo(*keys: str) -> str:
    """The first value of any of these keys; "" where the system doesn't tell."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        for line in file:
            key, _, value = line.partition(":")
            if key.strip() in keys:
                return value.strip()
    return ""


def _flags() -> set[str]:
    return set(_cpuinfo("flags", "Features").split())


def has_fast_bfloat16() -> bool:
    """Whether the CPU has products in bfloat16; without them they are slower than in float32."""
    return not _flags().isdisjoint(_BFLOAT16)


def cpu() -> dict[str, str]:
    """Its name, and its widest instruction set."""
    flags = _flags()
    found = [name for flag, name in _SETS if flag in flags]
    return {
        "cpu": _cpuinfo("model name") or platform.processor() or platform.machine(),
        "instruction_set": found[0] if found else "unknown",
    }


def versions(libraries: Iterable[str]) -> dict[str, str]:
    """Python's, and those of the libraries that are there."""
    found = {"python": platform.python_version()}
    for name in libraries:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found
