"""Training checkpoints in a bucket: Orbax writes them to a local disk, and a thread sends them.

A step waits only for the local write, as it does without a bucket. Each process sends what it
wrote, and process 0 the marker, once all have. What lies in the bucket is what Orbax would have written there,
but that a job of several processes leaves the index over their parts to those who read.
"""

from __future__ import annotations

import glob
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import orbax.checkpoint as ocp
import tensorstore as ts

# Its client, with a store of values, has no public name.
from jax._src import distributed as runtime
from orbax.checkpoint.checkpoint_managers import preservation_policy

from l2s_jax import buckets
from l2s_jax.cluster import distributed
from l2s_jax.files import CannotWrite, read_json
from l2s_jax.training.checkpoint import NEWEST, Checkpoints

# Orbax writes it in the folder of a step.
_MARKER = "_CHECKPOINT_METADATA"
_PART = re.compile(r"(?:.*/)?ocdbt\.process_(\d+)/.*")
# Of a folder of an item: what joins the parts of processes.
_INDEX = re.compile(r"[^/]+/(manifest\.ocdbt|d/[^/]+)")


class BucketCheckpoints(Checkpoints):
    """As `Checkpoints`, of a folder in a bucket."""

    def __init__(self, directory: str, *, best_metric: str | None) -> None:
        self._bucket = directory
        self._root = tempfile.mkdtemp(prefix="l2s_jax-checkpoints-")
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
        metrics: Mapping[str, float] | None,
        before: Callable[[], None] | None = None,
        **items: Any,
    ) -> None:
        """As of `Checkpoints`; `before` is called before the checkpoint counts, by a thread."""
        self.wait()
        super().save(step, metrics=metrics, **items)
        ranked = metrics is not None and self._best_metric
        self._values[step] = metrics[self._best_metric] if ranked else None
        best = self._best() if self._best_metric else None
        kept = {*sorted(self._values)[-NEWEST:], best}
        gone = [one for one in self._values if one not in kept]
        for one in gone:
            del self._values[one]
        self._sent = self._sender.submit(self._send, step, gone, before)

    def _send(self, step: int, gone: list[int], before: Callable[[], None] | None) -> None:
        self._manager.wait_until_finished()
        folder, place = os.path.join(self._directory, str(step)), f"{self._bucket}/{step}"
        is_sent = False
        try:
            own = list(self._own(folder))
            buckets.each(lambda name: buckets.send(f"{folder}/{name}", f"{place}/{name}"), own)
            is_sent = True
        finally:
            _tell(f"{self._bucket}/{step}", is_sent)
        if not distributed.is_primary():
            return
        _wait_for_all(f"{self._bucket}/{step}")
        if before:
            before()
        buckets.send(os.path.join(folder, _MARKER), f"{place}/{_MARKER}")
        for one in gone:
            buckets.remove(f"{self._bucket}/{one}/{_MARKER}")
            buckets.remove_below(f"{self._bucket}/{one}")

    def _own(self, folder: str) -> Iterator[str]:
        """Names of the files that this process sends, but for the marker."""
        for name in buckets.files_below(folder):
            part = _PART.fullmatch(name)
            if part:
                if int(part[1]) == jax.process_index():
                    yield name
            elif (
                name != _MARKER
                and distributed.is_primary()
                and not (jax.process_count() > 1 and _INDEX.fullmatch(name))
            ):
                yield name

    def config(self, step: int) -> dict[str, Any]:
        """The config that `step` was saved with."""
        return json.loads(buckets.read(f"{self._bucket}/{step}/config/metadata"))

    def restore(
        self, step: int, *, params: Mapping[str, Any], opt: Any
    ) -> tuple[dict[str, Any], Any, dict[str, Any]]:
        """(params, opt, data) of `step`, placed as the abstract arrays given."""
        with tempfile.TemporaryDirectory(dir=self._root) as root:
            folder = os.path.join(root, str(step))
            buckets.fetch_folder(f"{self._bucket}/{step}", folder)
            for item in glob.glob(f"{folder}/*/"):
                if glob.glob(f"{item}ocdbt.process_*") and not os.path.exists(
                    f"{item}manifest.ocdbt"
                ):
                    _join_parts(item)
            with Checkpoints(root, best_metric=self._best_metric, **_alone()) as fetched:
                return fetched.restore(step, params=params, opt=opt)


def _alone() -> dict[str, Any]:
    """Options of Orbax where each process has a disk of its own."""
    options: dict[str, Any] = {"keep": preservation_policy.LatestN(1)}
    if jax.process_count() > 1:
        options["multiprocessing"] = ocp.options.MultiprocessingOptions(primary_host=None)
    return options


def _join_parts(item: str) -> None:
    """Writes the index over what each process wrote of an item, as Orbax does on a shared disk."""

    def opened(folder: str) -> Any:
        return ts.KvStore.open({"driver": "ocdbt", "base": f"file://{folder}"}).result()

    whole, change = opened(item), ts.Transaction(atomic=True)
    for part in sorted(glob.glob(f"{item}ocdbt.process_*/")):
        opened(part).experimental_copy_range_to(whole.with_transaction(change)).result()
    change.commit_async().result()


def _tell(what: str, is_sent: bool) -> None:
    """Tells process 0 whether this one has sent its part."""
    if client := runtime.global_state.client:
        key = f"l2s_jax/sent/{what}/{jax.process_index()}"
        client.key_value_set(key, json.dumps(is_sent), allow_overwrite=True)


def _wait_for_all(what: str) -> None:
    """Waits until all processes have sent their parts.

    Raises:
      OSError: one could not.
    """
    client = runtime.global_state.client
    for process in range(jax.process_count() if client else 0):
        key = f"l2s_jax/sent/{what}/{process}"
        if not json.loads(client.blocking_key_value_get(key, distributed.barrier_s * 1000)):
            raise OSError(f"process {process} could not send its part")
