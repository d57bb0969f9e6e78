"""The clock of a training: what its steps take, read without stalling the device."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from l2s_jax.cluster.chips import chip_of
from l2s_jax.training.finite import Watch
from l2s_jax.training.progress import MetricWriter, NoWriter
from l2s_jax.training.spent import KINDS

# What metrics.jsonl has of the clock: mean milliseconds of a step; real tokens of prompts and
# responses per second, over all devices; operations per second and device, in 10**12, as flops.py
# counts them, and their share of the chip's peak in bfloat16 (model FLOPs utilization), where that
# is known; share of the time that the loop waited for batches; seconds of compilation so far. Of a
# batch whose responses the model wrote, the prompts count as tokens, and the update as operations.
# At a validation: the shares of what the stage's time so far was spent on.
TIMES = (
    "step_ms", "tokens_per_s", "tflops_per_device", "mfu", "data_wait", "compile_s",
    *(f"time_{kind}" for kind in KINDS),
)  # fmt: skip

# Steps that the devices are given ahead of their results: enough that they never wait for the host,
# few enough that a run that is to end, and has to save its last step, does not wait for many.
_AHEAD = 2


class Meter:
    """Reads a step's metrics only once the next step is on its way, so that no device waits.

    Beside them it writes what a clock says of the steps since it last did (TIMES), compilation,
    validation and checkpoints left out.
    """

    def __init__(
        self,
        writer: MetricWriter | NoWriter,
        config: ConfigDict,
        mesh: Mesh,
        share: float,
        watch: Watch,
        has_own: bool = False,
    ):
        """Nothing is written yet.

        Args:
          writer: what it writes to.
          config: of a training, as config.*.train.
          mesh: of its devices.
          share: how many times the rows of this process the whole batch is.
          watch: looks at each step before anything of it is written. Where a run goes on after
            steps that are not finite, lines have their number until then as `skipped_steps`.
          has_own: whether the model writes some of the responses itself. Lines then have the share
            of such batches since the last line, and the last metrics of either kind of batch.
        """
        self._writer, self._watch = writer, watch
        self._may_skip = config.max_bad_steps > 0
        self._has_own = has_own
        self._every = config.log_every
        self._devices = mesh.size
        self._chip = chip_of(mesh.devices.flat[0])
        self._share = share
        self._compile_s = 0.0
        self._pending: tuple[int, dict[str, Any]] | None = None
        self._ahead: deque[dict[str, jax.Array]] = deque()
        self.restart()

    def restart(self) -> None:
        """Leaves what happened until now out of the next values."""
        self._start = time.perf_counter()
        self._steps, self._tokens, self._flops, self._waited = 0, 0, 0.0, 0.0
        self._batches = self._own = 0
        self._latest: dict[str, Any] = {}

    def state(self) -> dict[str, Any]:
        """What the next line will say of steps before this one, but for times; waits for them."""
        latest = {name: float(value) for name, value in jax.device_get(self._latest).items()}
        return {"batches": self._batches, "own": self._own, "latest": latest}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `state` gave."""
        self._batches, self._own = state["batches"], state["own"]
        self._latest = dict(state["latest"])

    def paused(self, seconds: float) -> None:
        """Leaves so many seconds, in which a checkpoint was saved, out of the next values."""
        self._start += seconds

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around the wait for a batch."""
        began = time.perf_counter()
        yield
        self._waited += time.perf_counter() - began

    @contextlib.contextmanager
    def compiling(self, *, first: bool) -> Iterator[None]:
        """Around the dispatch of a step; the first of its shape compiles before it."""
        began = time.perf_counter()
        yield
        if first:
            seconds = time.perf_counter() - began
            self._compile_s += seconds
            self._start += seconds

    def dispatched(
        self,
        step: int,
        metrics: dict[str, jax.Array],
        batch: Mapping[str, np.ndarray],
        flops: float,
        own: bool = False,
    ) -> None:
        """Takes note of a step that the devices have been given, and waits until few are ahead.

        Args:
          metrics: scalars of `update.train_step`, which may not be ready yet.
          batch: the rows of this process; bool [B, ...] under names that end in "_mask".
          flops: operations of the step, over all devices.
          own: whether the model wrote the responses, in the place of those of `batch`.

        Raises:
          NotFinite: too many steps in a row were not finite.
        """
        self.flush()
        self._watch.dispatched(step, metrics)
        others = ("response_mask",) if own else ()
        masks = (v for key, v in batch.items() if key.endswith("_mask") and key not in others)
        self._tokens += sum(int(mask.sum()) for mask in masks)
        self._steps += 1
        self._batches += 1
        self._flops += flops / self._devices
        self._own += own
        self._latest |= {name: value for name, value in metrics.items() if name != "skipped"}
        if step % self._every == 0:
            self._pending = step, self._latest
        self._writer.advance(step)
        self._ahead.append(metrics)
        if len(self._ahead) > _AHEAD:
            jax.block_until_ready(self._ahead.popleft())

    def flush(self) -> None:
        """Writes the metrics that are due.

        Raises:
          NotFinite: too many steps in a row were not finite.
        """
        if self._pending is None:
            return
        step, metrics = self._pending
        self._pending = None
        self._watch.look(step)
        values = {key: float(value) for key, value in jax.device_get(metrics).items()}
        if self._has_own:
            values["on_policy_share"] = self._own / self._batches
        if self._may_skip:
            values["skipped_steps"] = self._watch.skipped
        self._writer.write(step, values | self._times())
        self.restart()

    def _times(self) -> dict[str, float]:
        seconds = time.perf_counter() - self._start
        times = {
            "step_ms": seconds / self._steps * 1e3,
            "tokens_per_s": self._tokens * self._share / seconds,
            "tflops_per_device": self._flops / seconds / 1e12,
            "data_wait": self._waited / seconds,
            "compile_s": self._compile_s,
        }
        if self._chip:
            times["mfu"] = self._flops / seconds / self._chip.flops
        return times
