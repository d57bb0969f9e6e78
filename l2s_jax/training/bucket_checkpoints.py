"""Training checkpoints in a bucket: Orbax writes them to a local disk, and a thread sends them.

A step waits only for the local write, as it does without a bucket. In a job process 0 gathers the
state and writes all of it, since the processes have no disk in common. What lies in the bucket is
what Orbax writes on a disk; `_CHECKPOINT_METADATA` is sent last, and says that a step is whole.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from l2s_jax import buckets, copies
from l2s_jax.cluster import distributed, sharding
from l2s_jax.files import CannotWrite, read_json
from l2s_jax.training.checkpoint import AVERAGE, CONFIG, NEWEST, OPT, Checkpoints
from l2s_jax.training.checksums import checksums

# Orbax writes it in the folder of a step.
_MARKER = "_CHECKPOINT_METADATA"


class BucketCheckpoints(Checkpoints):
    """As `Checkpoints`, of a folder in a bucket."""

    def __init__(self, directory: str, *, best_metric: str | None) -> None:
        self._bucket = directory
        self._root = copies.scratch()
        os.mkdir(os.path.join(self._root, "saved"))
        self._sender = ThreadPoolExecutor(1)
        self._sent: Future[None] | None = None
        local = os.path.join(self._root, "saved")
        super().__init__(local, best_metric=best_metric, **_alone())
        found = distributed.on_primary(self._found)
        self._values: dict[int, float | None] = {int(step): value for step, value in found.items()}

    def _found(self) -> dict[str, float | None]:
        """What ranks each whole checkpoint; what killed runs left of others is removed."""
        values: dict[str, float | None] = {}
        for name in filter(str.isdigit, buckets.names(self._bucket)):
            place = f"{self._bucket}/{name}"
            if not buckets.is_object(f"{place}/{_MARKER}"):
                buckets.remove_below(place)
                continue
            metrics = f"{place}/metrics/metrics"
            known = read_json(metrics) if buckets.is_object(metrics) else {}
            values[name] = known.get(self._best_metric) if self._best_metric else None
        return values

    def __exit__(self, kind: object = None, error: object = None, _: object = None) -> None:
        try:
            if error is None:
                self.wait()
            elif self._sent and jax.process_count() == 1 and not isinstance(error, CannotWrite):
                self._sent.exception()
            super().__exit__(kind, error)
        finally:
            self._sender.shutdown(wait=False, cancel_futures=True)
            if error is None or jax.process_count() == 1:
                shutil.rmtree(self._root, ignore_errors=True)

    @property
    def latest_step(self) -> int | None:
        """Step of the newest complete checkpoint."""
        return max(self._values, default=None)

    @property
    def best_step(self) -> int | None:
        """Step of the checkpoint to keep; waits for the one that is being written."""
        self.wait()
        return self._best() if self._best_metric else self.latest_step

    def _best(self) -> int | None:
        values = {step: value for step, value in self._values.items() if value is not None}
        # Of equal ones, the latest: as Orbax has it.
        return max(values, key=lambda step: (values[step], step), default=None)

    def wait(self) -> None:
        """Waits for the checkpoint that is being sent.

        Raises:
          CannotWrite: it could not be.
        """
        super().wait()
        if self._sent:
            sent, self._sent = self._sent, None
            try:
                sent.result()
            except (OSError, ValueError) as error:
                words = error.strerror if isinstance(error, OSError) else ""
                raise CannotWrite(
                    f"{self._bucket}: a checkpoint cannot be written: {words or error}"
                ) from error

    def save(
        self,
        step: int,
        *,
        trees: Mapping[str, Any],
        metrics: Mapping[str, float] | None,
        before: Callable[[], None] | None = None,
        again: bool = False,
        **others: Any,
    ) -> None:
        """As of `Checkpoints`; `before` is called before the checkpoint counts, by a thread."""
        self.wait()
        # All processes make the sums, each of its own part, so they come before the gathering.
        sums = checksums(trees)
        if jax.process_count() > 1:
            trees = sharding.gather_on_primary(trees)
        if distributed.is_primary():
            self._write(step, sums, trees=trees, metrics=metrics, **others)
        self._values[step] = metrics[self._best_metric] if metrics and self._best_metric else None
        best = self._best() if self._best_metric else None
        kept = {*sorted(self._values)[-NEWEST:], best}
        gone = [one for one in self._values if one not in kept]
        for one in gone:
            del self._values[one]
        if distributed.is_primary():
            self._sent = self._sender.submit(self._send, step, gone, before, again)

    def _send(
        self, step: int, gone: list[int], before: Callable[[], None] | None, again: bool
    ) -> None:
        self._manager.wait_until_finished()
        if again:
            self._remove(step)
        folder, place = os.path.join(self._directory, str(step)), f"{self._bucket}/{step}"
        names = [name for name in buckets.files_below(folder) if name != _MARKER]
        buckets.each(lambda name: buckets.send(f"{folder}/{name}", f"{place}/{name}"), names)
        if before:
            before()
        buckets.send(f"{folder}/{_MARKER}", f"{place}/{_MARKER}")
        for one in gone:
            self._remove(one)

    def _remove(self, step: int) -> None:
        buckets.remove(f"{self._bucket}/{step}/{_MARKER}")
        buckets.remove_below(f"{self._bucket}/{step}")

    def _saved_config(self, step: int) -> dict[str, Any]:
        return read_json(f"{self._place(step)}/config/metadata")

    def _place(self, step: int) -> str:
        return f"{self._bucket}/{step}"

    def _restored(
        self, step: int, trees: Mapping[str, Any], **others: Any
    ) -> tuple[dict[str, Any], Any]:
        with tempfile.TemporaryDirectory(dir=self._root) as root:
            place, items = self._place(step), {*trees, *others, CONFIG}
            if AVERAGE in items and not buckets.exists(f"{place}/{AVERAGE}"):
                items.add(OPT)
            buckets.fetch_folder(place, os.path.join(root, str(step)), items)
            with Checkpoints(root, best_metric=self._best_metric, **_alone()) as fetched:
                return fetched._restored(step, trees, **others)


def _alone() -> dict[str, Any]:
    """Options of Orbax where a process works by itself, on a disk of its own."""
    options: dict[str, Any] = {"keep": preservation_policy.LatestN(1)}
    if jax.process_count() > 1:
        own = jax.process_index()
        options["multiprocessing"] = ocp.options.MultiprocessingOptions(
            primary_host=own, active_processes={own}, barrier_sync_key_prefix=f"of{own}"
        )
    return options
