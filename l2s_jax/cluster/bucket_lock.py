"""Who works in a workdir that is in a bucket: one job at a time, by objects in it.

Process 0 of a job holds DIR/.lock-NUMBER. It writes the object anew every few seconds; one that
nobody has written for a minute is stale. Whoever comes next creates the object of the next number,
which the store lets only one of those do who try at once. A holder that finds a higher number, or
its own object gone, or that could not write it for a minute, has lost the lock, and ends.

Between a minute without a sign of life and its end, a holder that was only frozen may write for as
long as one write takes.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import os
import re
import socket
import threading
import time
import uuid
from typing import Any

from l2s_jax import buckets
from l2s_jax.cluster import job

log = logging.getLogger(__name__)

LEASE_SECONDS = 60.0
BEAT_SECONDS = 5.0
_NAME = re.compile(r"\.lock-(\d+)")


def take(workdir: str, held: contextlib.ExitStack) -> None:
    """Holds the lock of `workdir` until `held` is closed.

    Raises:
      ValueError: who works there, if somebody does; or the bucket is not there, or not to be
        written.
    """
    workdir = workdir.rstrip("/")  # a key has each slash that is written
    buckets.check(workdir, write=True)
    own = _Holder(workdir)
    seen: tuple[int, Any] | None = None
    since = time.monotonic()
    while True:
        locks = _locks(workdir)
        if not locks:
            if own.create(1):
                break
            continue
        found = max(locks.items())
        if seen is None:
            log.info("%s: %s, if it is still there: waiting", workdir, _who(workdir, found[0]))
        elif found != seen:
            who = _who(workdir, found[0])
            raise ValueError(f"{workdir}: {who}; expected its end, or another --workdir")
        elif time.monotonic() - since > LEASE_SECONDS:
            if own.create(found[0] + 1):
                break
            continue
        seen = found
        time.sleep(BEAT_SECONDS / 5)
    held.callback(own.release)
    own.start()


def _locks(workdir: str) -> dict[int, Any]:
    """The locks there by number, each with what changes when it is written."""
    found = ((_NAME.fullmatch(name), facts) for name, facts in buckets.listing(workdir).items())
    return {int(match[1]): facts for match, facts in found if match}


def _who(workdir: str, number: int) -> str:
    try:
        who = "process {process} on {host} has been working there since {since}"
        return who.format_map(json.loads(buckets.read(f"{workdir}/.lock-{number}")))
    except (FileNotFoundError, ValueError, KeyError):
        return "another process is working there"


class _Holder:
    """This process, and its thread that says that it is still there."""

    def __init__(self, workdir: str):
        self._workdir, self._number, self._beat = workdir, 0, 0
        self._written = 0.0
        self._facts: dict[str, Any] = {
            "host": socket.gethostname(),
            "process": os.getpid(),
            "since": datetime.datetime.now().astimezone().isoformat(" ", "seconds"),
            "holder": uuid.uuid4().hex,
        }
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._beating, daemon=True)

    @property
    def _path(self) -> str:
        return f"{self._workdir}/.lock-{self._number}"

    def _content(self) -> bytes:
        return json.dumps({**self._facts, "beat": self._beat}).encode()

    def create(self, number: int) -> bool:
        """Whether the lock of this number is this process's now."""
        self._number, self._written = number, time.monotonic()
        return buckets.create(self._path, self._content())

    def start(self) -> None:
        """Begins to say that it is still there; locks of before go."""
        for number in _locks(self._workdir):
            if number < self._number:
                buckets.remove(f"{self._workdir}/.lock-{number}")
        self._thread.start()

    def release(self) -> None:
        """Gives the lock up."""
        self._done.set()
        if self._thread is not threading.current_thread() and self._thread.is_alive():
            self._thread.join(LEASE_SECONDS)
        with contextlib.suppress(OSError, ValueError):
            if self._is_own():
                buckets.remove(self._path)

    def _is_own(self) -> bool:
        with contextlib.suppress(FileNotFoundError):
            return json.loads(buckets.read(self._path))["holder"] == self._facts["holder"]
        return False

    def _beating(self) -> None:
        while not self._done.wait(BEAT_SECONDS):
            began = time.monotonic()
            # Only of a lock that is nearly stale can another one of the same number be there.
            is_late = began - self._written > LEASE_SECONDS / 2
            try:
                newest = max(_locks(self._workdir), default=0)
                if newest != self._number or (is_late and not self._is_own()):
                    self._end("another process has taken the workdir over")
                    return
                self._beat += 1
                buckets.write(self._path, self._content())
                self._written = began
            except (OSError, ValueError) as error:
                if time.monotonic() - self._written > LEASE_SECONDS:
                    self._end(f"the lock could not be written for a minute: {error}")

    def _end(self, why: str) -> None:
        if not self._done.is_set():
            self._done.set()
            job.end(f"{self._workdir}: {why}", job.LOST, tell=True)
