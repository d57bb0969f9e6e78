"""Local copies of what is in buckets, for libraries that read files of a disk.

They lie in ~/.cache/l2s_jax, or in what the environment variable L2S_JAX_CACHE names. A copy is
named by the content of what it is of, as the bucket tells it, so it is made once, and never
changes. Where the disk is full, the copies go that nobody has used for an hour, oldest first.
"""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import hashlib
import json
import os
import shutil
import socket
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence

import filelock

from l2s_jax import buckets

_KEPT_SECONDS = 3600.0
_TRIES = 3
# Of a model's folder, what is never read.
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack")


def folder() -> str:
    """Where copies lie."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return os.environ.get("L2S_JAX_CACHE") or os.path.join(home, "l2s_jax")


def scratch() -> str:
    """A new folder for what is on its way to a bucket; those of processes that are gone go."""
    own = f"scratch-{socket.gethostname()}-"
    os.makedirs(folder(), exist_ok=True)
    for name in os.listdir(folder()):
        process = name.removeprefix(own).partition("-")[0]
        if name.startswith(own) and process.isdigit() and not _is_there(int(process)):
            shutil.rmtree(os.path.join(folder(), name), ignore_errors=True)
    return tempfile.mkdtemp(prefix=f"{own}{os.getpid()}-", dir=folder())


def _is_there(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def local(path: str, patterns: Sequence[str] = ()) -> str:
    """A path on this machine's disk with the same content: of a disk, it is the path itself.

    Args:
      path: a file, or with `patterns` a folder.
      patterns: which files are wanted of a folder in a bucket.

    Raises:
      FileNotFoundError: a bucket has nothing there.
      ValueError: the disk has no room, or the bucket is not to be read.
    """
    if not buckets.is_bucket(path):
        return path
    path = path.rstrip("/")
    for _ in range(_TRIES):
        found = _found(path, patterns)
        copy = _copied(path, found, is_object=not patterns)
        if copy:
            return copy
    raise OSError(f"{path}: it changes while it is read")


def _found(path: str, patterns: Sequence[str]) -> dict[str, tuple[int, str]]:
    """Facts of the objects to copy by name, of which there is one at least."""
    if not patterns:
        return {os.path.basename(path): buckets.facts(path)}
    below = {
        name: facts
        for name, facts in buckets.objects(path).items()
        if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
        and not name.endswith(PICKLES)
    }
    if not below:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
    return below


def _copied(path: str, found: Mapping[str, tuple[int, str]], *, is_object: bool) -> str | None:
    """The copy; None where its objects have changed meanwhile."""
    digest = hashlib.sha256(json.dumps([path, found]).encode()).hexdigest()[:32]
    place = os.path.join(folder(), digest)
    name = os.path.basename(path)
    os.makedirs(folder(), exist_ok=True)
    with filelock.FileLock(f"{place}.lock"):
        if not os.path.isdir(place):
            _make_room(path, sum(size for size, _ in found.values()))
            temporary = f"{place}.{uuid.uuid4().hex}.tmp"
            try:
                inside = temporary if is_object else os.path.join(temporary, name)
                os.makedirs(inside)
                _fetch(path, found, inside, is_object)
                sizes = {each: os.path.getsize(os.path.join(inside, each)) for each in found}
                there = {name: buckets.facts(path)} if is_object else buckets.objects(path)
                if any(there.get(each) != found[each] for each in found) or any(
                    sizes[each] != found[each][0] for each in found
                ):
                    return None
                os.replace(temporary, place)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
        os.utime(place)
    return os.path.join(place, name)


def _fetch(path: str, names: Mapping[str, object], inside: str, is_object: bool) -> None:
    def fetch_one(name: str) -> None:
        file = os.path.join(inside, name)
        os.makedirs(os.path.dirname(file), exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # it has just been replaced
            buckets.fetch(path if is_object else f"{path}/{name}", file)
        if not os.path.exists(file):
            open(file, "wb").close()

    buckets.each(fetch_one, list(names))


def _make_room(path: str, needed: int) -> None:
    """Removes old copies until `needed` bytes are free.

    Raises:
      ValueError: they cannot be.
    """
    root = folder()
    entries = [
        entry
        for entry in os.scandir(root)
        if entry.is_dir() and not entry.name.startswith(("scratch-", "followed-"))
    ]
    for entry in sorted(entries, key=lambda entry: entry.stat().st_mtime):
        if shutil.disk_usage(root).free > needed:
            return
        if time.time() - entry.stat().st_mtime > _KEPT_SECONDS:
            shutil.rmtree(entry.path, ignore_errors=True)
    if (free := shutil.disk_usage(root).free) <= needed:
        raise ValueError(
            f"{path}: a local copy takes {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free in "
            f"{root}; expected more, or another folder in the environment variable L2S_JAX_CACHE"
        )
