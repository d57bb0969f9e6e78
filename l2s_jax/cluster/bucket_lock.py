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
    buckets.check(workdir, write=True)
    own = _Holder(workdir)
    seen: tuple[int, bytes] | None = None
    since = time.monotonic()
    while True:
        found = _newest(workdir)
        if found is None:
            if own.create(1):
                break
            continue
        if seen is None:
            log.info("%s: %s, if it is still there: waiting", workdir, _who(found[1]))
        elif found != seen:
            raise ValueError(f"{workdir}: {_who(found[1])}; expected its end, or another --workdir")
        elif time.monotonic() - since > LEASE_SECONDS:
            if own.create(found[0] + 1):
                break
            continue
        seen = found
        time.sleep(BEAT_SECONDS / 5)
    held.callback(own.release)
    own.start()


def _numbers(workdir: str) -> list[int]:
    found = filter(None, map(_NAME.fullmatch, buckets.names(workdir)))
    return sorted(int(match[1]) for match in found)


def _newest(workdir: str) -> tuple[int, bytes] | None:
    """(number, content) of the lock that counts."""
    for number in reversed(_numbers(workdir)):
        with contextlib.suppress(FileNotFoundError):  # its holder has just gone
            return number, buckets.read(f"{workdir}/.lock-{number}")
    return None


def _who(content: bytes) -> str:
    try:
        who = "process {process} on {host} has been working there since {since}"
        return who.format_map(json.loads(content))
    except (ValueError, KeyError):
        return "another process is working there"


class _Holder:
    """This process, and its thread that says that it is still there."""

    def __init__(self, workdir: str):
        self._workdir, self._number, self._beat = workdir, 0, 0
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
        self._number = number
        return buckets.create(self._path, self._content())

    def start(self) -> None:
        """Begins to say that it is still there; locks of before go."""
        for number in _numbers(self._workdir):
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
        written = time.monotonic()
        while not self._done.wait(BEAT_SECONDS):
            try:
                if _numbers(self._workdir)[-1:] != [self._number] or not self._is_own():
                    self._end("another process has taken the workdir over")
                    return
                self._beat += 1
                buckets.write(self._path, self._content())
                written = time.monotonic()
            except (OSError, ValueError) as error:
                if time.monotonic() - written > LEASE_SECONDS:
                    self._end(f"the lock could not be written for a minute: {error}")

    def _end(self, why: str) -> None:
        if not self._done.is_set():
            self._done.set()
            job.end(f"{self._workdir}: {why}", job.LOST, tell=True)
