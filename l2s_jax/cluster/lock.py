"""Who works in a workdir: one job at a time, by a file in it.

Process 0 of a job holds DIR/.lock and touches it every few seconds, by a thread of the package
filelock. One that is left by a process of the same host that is gone is taken over, and any that
nobody has touched, or written, for a minute. In a bucket it is as bucket_lock.py says.
"""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Iterator

import filelock

from l2s_jax.cluster import bucket_lock, distributed, job
from l2s_jax.files import UNFINISHED, is_bucket, is_unfinished, read_json, write_json

log = logging.getLogger(__name__)

_FILE, _HOLDER = ".lock", ".lock.json"
# What runs write in the workdir itself. Others may be writing there too, by names of their own.
_OURS = re.compile(r"(\.lock|\.shared|config|hashes|report|quality_latency|compare|dial)\.")
# Longer than a file server may hide a new time of a file.
LEASE_SECONDS = 60.0
_BEAT_SECONDS = 2.0


@contextlib.contextmanager
def of_job(workdir: str) -> Iterator[None]:
    """Keeps other jobs out of `workdir`, which is made if it is missing.

    Raises:
      ValueError: on all processes, who works there, if somebody does.
    """
    with job.before_end as held:
        distributed.on_primary(lambda: _take(workdir, held))
        yield


def _take(workdir: str, held: contextlib.ExitStack) -> None:
    """Holds the lock until `held` is closed."""
    if is_bucket(workdir):
        bucket_lock.take(workdir, held)
        return
    if not os.path.isdir(workdir):
        os.makedirs(workdir)
        held.callback(_remove_if_empty, workdir)
    path = os.path.join(workdir, _FILE)
    lease = filelock.SoftFileLease(
        path,
        lease_duration=LEASE_SECONDS,
        heartbeat_interval=_BEAT_SECONDS,
        on_compromise=lambda _: job.end(f"{workdir}: {_who(workdir)}", job.LOST, tell=True),
        thread_local=False,
    )
    seen: os.stat_result | None = None
    begun = time.monotonic()
    while True:
        with contextlib.suppress(filelock.Timeout):
            lease.acquire(timeout=0)
            break
        try:
            found = os.stat(path)
        except FileNotFoundError:  # its holder has just gone
            continue
        if seen is not None and found.st_mtime_ns != seen.st_mtime_ns:
            raise ValueError(f"{workdir}: {_who(workdir)}; expected its end, or another --workdir")
        if seen is None:
            log.info("%s: %s, if it is still there: waiting", workdir, _who(workdir))
        elif not found.st_size and time.monotonic() - begun > LEASE_SECONDS:
            _remove_empty(path, found)
        seen = found
        time.sleep(_BEAT_SECONDS / 10)
    held.callback(lease.release)
    holder = os.path.join(workdir, _HOLDER)
    since = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
    write_json(holder, {"host": socket.gethostname(), "process": os.getpid(), "since": since})
    held.callback(lambda: lease.compromise or _remove(holder))  # it may be the next one's
    _tidy(workdir)


def _remove_empty(path: str, found: os.stat_result) -> None:
    """Removes a lock whose process was killed before it wrote in it: filelock never does.

    Another process may have removed it, and taken the lock, meanwhile. What is not the file that
    was found goes back.
    """
    aside = f"{path}.{uuid.uuid4().hex}{UNFINISHED}"
    with contextlib.suppress(FileNotFoundError):
        os.rename(path, aside)
        if not os.path.samestat(os.stat(aside), found) or os.stat(aside).st_size:
            with contextlib.suppress(FileExistsError):
                os.link(aside, path)
        os.remove(aside)


def _tidy(workdir: str) -> None:
    """Removes what runs that were killed were writing, and nobody will finish."""
    for folder, folders, files in os.walk(workdir):
        for name in filter(is_unfinished, [*folders, *files]):
            path = os.path.join(folder, name)
            if folder == workdir and not _OURS.match(name):
                continue
            if os.path.isdir(path):
                shutil.rmtree(path, ignore_errors=True)
            else:
                _remove(path)
        # A folder with a lock of its own is another run's.
        folders[:] = [f for f in folders if not os.path.exists(os.path.join(folder, f, _FILE))]


def _remove(path: str) -> None:
    with contextlib.suppress(OSError):
        os.remove(path)


def _remove_if_empty(directory: str) -> None:
    with contextlib.suppress(OSError):
        os.rmdir(directory)


def _who(workdir: str) -> str:
    """Who works there, as far as is known."""
    try:
        found = read_json(os.path.join(workdir, _HOLDER))
        who = "process {process} on {host} has been working there since {since}"
        return who.format_map(found)
    except (ValueError, KeyError):
        return "another process is working there"
