"""How fast this machine reads: what the floor of a decoding step follows from."""

from __future__ import annotations

import statistics

import jax
import jax.numpy as jnp

from l2s_jax.bench.contestants import Case, Setup, milliseconds


class _Bandwidth:
    """A plain compiled product of one vector and one large matrix: bytes per second.

    It is asked as a contestant is, and answers with other things.
    """

    MEGABYTES = 512

    def __init__(self):
        # In float32 whatever the models are in: a CPU multiplies one row of bfloat16 more slowly
        # than it reads it.
        rows = 4096
        columns = self.MEGABYTES * 2**20 // (rows * 4)
        matrix = jax.random.normal(jax.random.key(0), (rows, columns), jnp.float32)
        vector = jnp.ones((1, rows), jnp.float32)
        product = jax.jit(lambda vector, matrix: vector @ matrix)
        self._run = lambda: jax.block_until_ready(product(vector, matrix))
        self._bytes = matrix.nbytes

    def prepare(self, case: Case) -> dict[str, str]:
        """What ours run on; nothing depends on the case."""
        self._run()
        return {"device": jax.devices()[0].device_kind, "platform": jax.default_backend()}

    def measure(self) -> dict[str, float]:
        seconds = statistics.median(milliseconds(self._run) for _ in range(5)) / 1e3
        return {"gb_per_s": self._bytes / seconds / 1e9}

    def reset_peak(self) -> None:
        """Nobody asks for it."""

    def peak_bytes(self) -> float | None:
        return None


def make(setup: Setup) -> _Bandwidth:
    """Needs nothing of the setup."""
    return _Bandwidth()
