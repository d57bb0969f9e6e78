"""How fast this machine reads: what the floor of a decoding step follows from."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from l2s_jax.bench.contestants import milliseconds

ROWS = 4096


class Bandwidth:
    """Plain compiled programs that read so many bytes: how many they read per second.

    The bytes are as many as a model's step reads, since some of a small model's stay in the
    processor's cache from one step to the next.
    """

    def __init__(self):
        self._programs: dict[int, list[tuple[Callable[[], Any], int]]] = {}

    def facts(self) -> dict[str, Any]:
        """What ours run on."""
        return {"device": jax.devices()[0].device_kind, "platform": jax.default_backend()}

    def measure(self, sizes: Sequence[int]) -> list[float]:
        """Gigabytes per second for each of these numbers of bytes, of the fastest program."""
        for size in self._programs.keys() - set(sizes):
            del self._programs[size]
        rates = []
        for size in sizes:
            if size not in self._programs:
                self._programs[size] = _programs(size)
                for run, _ in self._programs[size]:
                    run()
            rates.append(
                max(
                    moved / statistics.median(milliseconds(run) for _ in range(5)) / 1e6
                    for run, moved in self._programs[size]
                )
            )
        return rates


def _programs(size: int) -> list[tuple[Callable[[], Any], int]]:
    """(a run, the bytes that it reads and writes) of one way or of two."""
    # In float32 whatever the models are in: a CPU multiplies one row of bfloat16 more slowly than
    # it reads it.
    matrix = jax.random.normal(jax.random.key(0), (ROWS, max(size // (4 * ROWS), 1)), jnp.float32)
    vector = jnp.ones((1, ROWS), jnp.float32)
    product = jax.jit(lambda vector, matrix: vector @ matrix)
    programs = [(lambda: jax.block_until_ready(product(vector, matrix)), matrix.nbytes)]
    if jax.default_backend() != "cpu":
        # An accelerator's best product of one row need not be its fastest way to read.
        reversed_sign = jax.jit(lambda matrix: -matrix)
        moved = 2 * matrix.nbytes
        programs.append((lambda: jax.block_until_ready(reversed_sign(matrix)), moved))
    return programs
