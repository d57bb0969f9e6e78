"""A run as it is followed from afar: wandb and trackio.

Each is a process of its own (tracker_process.py), which gets what is logged over a pipe. So a
network that hangs, or a library that fails, costs the run nothing but one warning.
"""

from __future__ import annotations

import collections
import contextlib
import importlib.util
import json
import logging
import math
import os
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from l2s_jax import copies
from l2s_jax.files import absolute, is_bucket, is_file, make_folder, read_json, write_json
from l2s_jax.settings.following import TRACKERS

log = logging.getLogger(__name__)

_FILE = "trackers.json"
# More lines than that wait for no tracker.
_MOST_WAITING = 10_000
# That the end of a run waits for a tracker; then it goes on alone.
_PATIENCE_SECONDS = 20.0
_open: list[_Process] = []


def check(names: Sequence[str]) -> None:
    """Checks that what trackers need is installed.

    Raises:
      ValueError: a package is missing.
    """
    for name in names:
        package = TRACKERS[name]
        if package and importlib.util.find_spec(package) is None:
            raise ValueError(
                f"config.trackers={tuple(names)!r}: the package {package} is missing; expected "
                f"pip install 'l2s-jax[{name}]', or other trackers"
            )


class Trackers:
    """What process 0 tells the trackers of a run; each continues the run of the same workdir.

    Tags are STAGE/METRIC, and each stage has steps of its own.

    Attributes:
      tensorboard: whether stages write files for TensorBoard, which they do themselves.
    """

    def __init__(self, names: Sequence[str], workdir: str, config: Mapping[str, Any]):
        """`names`: of those in TRACKERS."""
        self.tensorboard = "tensorboard" in names
        self._processes: list[_Process] = []
        if not (names := [name for name in names if TRACKERS[name]]):
            return
        path = os.path.join(workdir, _FILE)
        if not is_file(path):
            make_folder(workdir)
            write_json(path, {"id": uuid.uuid4().hex[:8]})
        run = str(read_json(path)["id"])
        folder = os.path.abspath(workdir)
        if is_bucket(workdir):  # the trackers write to a disk
            folder = os.path.join(copies.folder(), f"followed-{run}")
            os.makedirs(folder, exist_ok=True)
        head = {
            "id": run,
            "name": os.path.basename(absolute(workdir)),
            "folder": folder,
            "config": config,
        }
        self._processes = [_Process(name, head) for name in names]
        _open.extend(self._processes)

    def metrics(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Values at a step of a stage; those that are not finite are left out."""
        finite = {key: value for key, value in values.items() if math.isfinite(value)}
        self._tell({"stage": stage, "step": int(step), "metrics": finite})

    def stage(self, name: str) -> None:
        """A stage begins, or goes on."""
        self._tell({"begun": name})

    def results(self, values: Mapping[str, Any]) -> None:
        """Numbers and texts that are found once, by name."""
        self._tell({"results": dict(values)})

    def _tell(self, message: dict[str, Any]) -> None:
        for process in self._processes:
            process.tell(message)


class _Process:
    """A tracker's process, and the thread that writes to its pipe."""

    def __init__(self, name: str, head: Mapping[str, Any]):
        self._name = name
        self._log = os.path.join(head["folder"], f"{name}.log")
        with open(self._log, "wb") as said:
            # Ctrl-C is for the run: the tracker ends when nothing more comes.
            self._child = subprocess.Popen(
                [sys.executable, "-m", "l2s_jax.training.tracker_process", name],
                stdin=subprocess.PIPE,
                stdout=said,
                stderr=said,
                start_new_session=True,
            )
        self._waiting: collections.deque[dict[str, Any] | None] = collections.deque([{**head}])
        self._some = threading.Semaphore(1)
        self._has_failed = False
        self._thread = threading.Thread(target=self._write, daemon=True)
        self._thread.start()

    def tell(self, message: dict[str, Any] | None) -> None:
        if self._has_failed:
            return
        if self._child.poll() is not None:
            self._fail(self._last_words())
        elif len(self._waiting) >= _MOST_WAITING:
            self._fail("it takes no more")
        else:
            self._waiting.append(message)
            self._some.release()

    def _write(self) -> None:
        pipe: Any = self._child.stdin
        with contextlib.suppress(OSError), pipe:
            while True:
                self._some.acquire()
                if (message := self._waiting.popleft()) is None:
                    return
                pipe.write(json.dumps(message).encode() + b"\n")
                pipe.flush()

    def _fail(self, why: str) -> None:
        self._has_failed = True
        log.warning("%s: %s; the run goes on without it", self._name, why)

    def _last_words(self) -> str:
        with open(self._log, encoding="utf-8", errors="replace") as file:
            lines = file.read().split("\n")
        said = [line.strip() for line in lines if line.strip()]
        return said[-1] if said else f"exit status {self._child.returncode}"

    def close(self, until: float) -> None:
        """Waits for what was told to be taken, not longer than `until` on the clock."""
        self.tell(None)
        if self._has_failed:
            return
        try:
            status = self._child.wait(max(until - time.monotonic(), 0.0))
        except subprocess.TimeoutExpired:
            self._fail(f"has not taken all within {_PATIENCE_SECONDS:.0f} s")
            # It may go on by itself: nobody waits for it.
            self._child.returncode = 0
            return
        if status:
            self._fail(self._last_words())


@contextlib.contextmanager
def closing() -> Iterator[None]:
    """Has the trackers that are opened within take all that they were told, at its end."""
    try:
        yield
    finally:
        until = time.monotonic() + _PATIENCE_SECONDS
        while _open:
            _open.pop().close(until)
