"""The part *facts*: the card, the versions, and the two ceilings that all tables are read against.

python -m benchmarks.gpu.facts --output=facts.json
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.gpu import part
from l2s_jax.bench import machine
from l2s_jax.bench.contestants import milliseconds
from l2s_jax.cluster.chips import chip_of

LIBRARIES = (
    *("jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin", "flax", "optax", "qwix"),
    *("orbax-checkpoint", "torch", "triton", "transformers", "numpy"),
)
QUERIED = ("name", "driver_version", "memory.total", "clocks.max.sm", "clocks.max.memory")


def card() -> dict[str, str]:
    """What nvidia-smi says of the first card; nothing where there is none."""
    if shutil.which("nvidia-smi") is None:
        return {}
    command = ["nvidia-smi", f"--query-gpu={','.join(QUERIED)}", "--format=csv,noheader"]
    found = subprocess.run(command, capture_output=True, text=True)
    if found.returncode:
        return {"nvidia-smi": (found.stderr or found.stdout).strip()}
    first = found.stdout.splitlines()[0].split(", ")
    return dict(zip(QUERIED, first, strict=True))


def rate(work: float, run: Callable[[], Any], repeats: int) -> float:
    """The median of `work` per second of a run, which was warmed up."""

    def finish() -> None:
        jax.block_until_ready(run())

    finish()
    return work / statistics.median(milliseconds(finish) for _ in range(repeats)) * 1e3


def copy_rate(size: int, repeats: int) -> float:
    """Bytes per second, read and written, of a copy of `size` bytes."""
    numbers = jax.random.normal(jax.random.key(0), (size // 4,), jnp.float32)
    copy = jax.jit(lambda numbers: -numbers)  # a plain copy might be left out
    return rate(2 * numbers.nbytes, lambda: copy(numbers), repeats)


def product_rate(width: int, repeats: int) -> float:
    """Operations per second of a bfloat16 product of two square matrices of random numbers."""
    a, b = (
        jax.random.normal(key, (width, width), jnp.bfloat16)
        for key in jax.random.split(jax.random.key(0))
    )
    product = jax.jit(jnp.matmul)
    return rate(2 * width**3, lambda: product(a, b), repeats)


def main() -> int:
    """Writes the facts; the exit status."""
    options = part.arguments(__doc__.splitlines()[0])
    result = part.Result(options.output)
    device = jax.devices()[0]
    facts = card()
    result.data.update(
        device=device.device_kind,
        versions=machine.versions(LIBRARIES),
        card=facts,
        cpu=machine.cpu(),
        cores=machine.cores(),
        memory=device.memory_stats() or {},
        xla_flags=os.environ.get("XLA_FLAGS", ""),
    )
    rows = [("device", device.device_kind), *facts.items(), *machine.cpu().items()]
    rows += [("CPU cores", str(machine.cores())), *machine.versions(LIBRARIES).items()]
    result.table("The machine", ("what", "which"), rows)

    size, width, repeats = (2**24, 256, 3) if options.rehearse else (2**32, 8192, 20)
    ceilings = {
        "copy_gb_per_s": copy_rate(size, repeats) / 1e9,
        "product_tflops": product_rate(width, repeats) / 1e12,
    }
    result.data["ceilings"] = ceilings
    chip = chip_of(device)
    published = (chip.hbm / 1e9, chip.flops / 1e12) if chip else (None, None)
    result.table(
        "Ceilings",
        ("what", "measured", "published"),
        [
            ("a large copy, GB/s read and written", ceilings["copy_gb_per_s"], published[0]),
            ("a large bfloat16 product, TFLOP/s", ceilings["product_tflops"], published[1]),
        ],
    )
    return part.finish(result, [])


if __name__ == "__main__":
    sys.exit(main())
