"""Files that grow, kept in a bucket: written to a local folder, and sent anew now and then."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import threading
from collections.abc import Sequence

from l2s_jax import buckets, copies
from l2s_jax.files import CannotWrite

log = logging.getLogger(__name__)

SECONDS = 30.0


class Mirror:
    """A local folder whose files are sent to a folder in a bucket.

    Attributes:
      local: the folder to write to.
    """

    def __init__(self, directory: str, names: Sequence[str]):
        """`names`: which files are fetched first, to go on in them."""
        self._directory = directory
        self._root = copies.scratch()
        # TensorBoard's writer names what it says by the folder.
        self.local = os.path.join(self._root, os.path.basename(directory))
        os.mkdir(self.local)
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                buckets.fetch(f"{directory}/{name}", os.path.join(self.local, name))
        self._sent: dict[str, tuple[int, int]] = {}
        self._lock = threading.Lock()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._send_now_and_then, daemon=True)
        self._thread.start()

    def send(self) -> None:
        """Sends the files that have changed since they were last sent.

        Raises:
          CannotWrite: one could not be.
        """
        with self._lock:
            for name in buckets.files_below(self.local):
                file = os.path.join(self.local, name)
                stat = os.stat(file)
                state = (stat.st_size, stat.st_mtime_ns)
                if self._sent.get(name) == state:
                    continue
                try:
                    buckets.send(file, f"{self._directory}/{name}")
                except (OSError, ValueError) as error:
                    raise CannotWrite(f"{self._directory}/{name}: {error}") from error
                self._sent[name] = state

    def _send_now_and_then(self) -> None:
        while not self._done.wait(SECONDS):
            try:
                self.send()
            except CannotWrite as error:  # a checkpoint, or the end, will tell
                log.debug("%s", error)

    def close(self) -> None:
        """Sends what is left, and removes the local folder.

        Raises:
          CannotWrite: as of `send`.
        """
        self._done.set()
        try:
            self.send()
        finally:
            shutil.rmtree(self._root, ignore_errors=True)
