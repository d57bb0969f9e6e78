"""Buckets: objects at gs://BUCKET/KEY and s3://BUCKET/KEY, through fsspec.

An object appears as a whole when it has been sent. There are no folders, only keys that begin
alike, and nothing can be renamed: a folder is there when its marker is, the object that is sent
last. What fails by chance is tried again; what the store refuses is one line at once.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import fsspec

T = TypeVar("T")

# Of each scheme: the extra of this package that reads it, and the package that this brings.
_PACKAGES = {"gs": ("gs", "gcsfs"), "s3": ("s3", "s3fs")}
# Between tries, in seconds; each try has those of the store's own package within.
PAUSES = (0.2, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
_AT_ONCE = 8
_CHECK_SECONDS = 15.0
_NO_CREDENTIALS = ("NoCredentialsError", "DefaultCredentialsError", "PartialCredentialsError")
_REFUSED = re.compile(
    r"\b40[13]\b|accessdenied|invalidaccesskeyid|signaturedoesnotmatch|forbidden|unauthorized"
    r"|anonymous caller|invalid credentials"
)


def is_bucket(path: str | os.PathLike[str]) -> bool:
    """Whether a path is an object, or the beginning of some, in a bucket."""
    scheme, mark, _ = os.fspath(path).partition("://")
    return bool(mark) and scheme in _PACKAGES


def check_package(path: str) -> None:
    """Raises a ValueError unless the package is there that reads this bucket."""
    scheme = path.partition("://")[0]
    extra, package = _PACKAGES[scheme]
    try:
        fsspec.get_filesystem_class(scheme)
    except ImportError:
        raise ValueError(
            f"{path}: the package {package} is not installed; "
            f"expected pip install 'l2s-jax[{extra}]'"
        ) from None


@functools.cache
def _system(scheme: str) -> Any:
    # It logs with a traceback what is tried again, or said in one line.
    logging.getLogger(_PACKAGES[scheme][1]).setLevel(logging.CRITICAL)
    # What another process has written since is to be seen.
    return fsspec.filesystem(scheme, use_listings_cache=False, skip_instance_cache=True)


def _bucket_of(path: str) -> str:
    scheme, _, rest = path.partition("://")
    return f"{scheme}://{rest.partition('/')[0]}"


def _refusal(path: str, error: BaseException) -> str:
    """Why the store will never do it, in words; empty where another try may help."""
    bucket = _bucket_of(path)
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) and len(chain) < 9:
        chain.append(cause)
    # Addresses and keys may have any word and number in them.
    words = " ".join(str(one) for one in chain).lower().split()
    text = " ".join(word for word in words if "/" not in word)
    names = {type(one).__name__ for one in chain}
    if names & set(_NO_CREDENTIALS) or "unable to locate credentials" in text:
        return f"{path}: no credentials for {bucket} are found"
    if "bucket does not exist" in text or "nosuchbucket" in text:
        return f"{bucket}: no such bucket"
    is_refused = _REFUSED.search(text) and not isinstance(error, FileNotFoundError)
    status = str(getattr(error, "code", ""))
    if is_refused or isinstance(error, PermissionError) or status in ("401", "403"):
        return f"{path}: {bucket} does not let these credentials in: {_words(error)}"
    return ""


def _words(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _tried(path: str, act: Callable[[Any], T], pauses: Sequence[float] | None = None) -> T:
    """What `act` gives of the file system of a path; tried again where it fails by chance.

    Raises:
      FileNotFoundError, FileExistsError: as of a disk.
      ValueError: the store refuses it.
      OSError: it does not answer, or fails each time.
    """
    check_package(path)
    for pause in (*(PAUSES if pauses is None else pauses), None):
        try:
            return act(_system(path.partition("://")[0]))
        except FileExistsError:
            raise
        except Exception as error:
            if line := _refusal(path, error):
                raise ValueError(line) from error
            if isinstance(error, FileNotFoundError):
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path) from None
            if pause is None:
                raise OSError(
                    errno.EIO, f"the bucket's store failed each time: {_words(error)}", path
                ) from error
        time.sleep(pause)
    raise AssertionError("the last try returns or raises")


def check(path: str, *, write: bool = False) -> None:
    """Finds out within seconds whether a path's bucket is there and may be read, or written.

    Raises:
      ValueError: one line.
    """

    def look(system: Any) -> None:
        if write:
            probe = f"{path.rstrip('/')}/.probe-{os.getpid()}-{time.time_ns()}"
            system.pipe_file(probe, b"")
            system.rm_file(probe)
        else:
            system.ls(_bucket_of(path) + "/", detail=False)

    answer: Future[None] = Future()

    def ask() -> None:
        try:
            answer.set_result(_tried(path, look, ()))
        except Exception as error:
            answer.set_exception(error)

    # The store's own package may try for longer by itself; nobody waits for its thread at the end.
    threading.Thread(target=ask, daemon=True).start()
    try:
        answer.result(_CHECK_SECONDS)
    except TimeoutError:
        raise ValueError(
            f"{_bucket_of(path)}: cannot be reached: no answer within {_CHECK_SECONDS:g} s"
        ) from None
    except FileNotFoundError:
        # A folder that has nothing is none; a bucket that is missing is.
        if write:
            raise ValueError(f"{_bucket_of(path)}: no such bucket") from None
    except OSError as error:
        raise ValueError(f"{_bucket_of(path)}: cannot be reached: {error.strerror}") from None


def exists(path: str) -> bool:
    """Whether there is an object, or one below."""
    try:
        _tried(path, lambda system: system.info(path))
    except FileNotFoundError:
        return False
    return True


def is_object(path: str) -> bool:
    """Whether there is an object."""
    try:
        return _tried(path, lambda system: system.info(path))["type"] == "file"
    except FileNotFoundError:
        return False


def names(path: str) -> list[str]:
    """Names of what lies right below, sorted."""
    return sorted(listing(path))


def listing(path: str) -> dict[str, tuple[int, str] | None]:
    """As of `facts`, of what lies right below, by name; None of what has more below."""
    try:
        found = _tried(path, lambda system: system.ls(f"{path.rstrip('/')}/", detail=True))
    except FileNotFoundError:
        return {}
    own = path.rstrip("/").partition("://")[2]
    return {
        info["name"].rstrip("/").rpartition("/")[2]: (
            _facts(info) if info["type"] == "file" else None
        )
        for info in found
        if info["name"].strip("/") != own
    }


def objects(path: str) -> dict[str, tuple[int, str]]:
    """As of `facts`, of all objects below, by their names from there."""
    try:
        found = _tried(path, lambda system: system.find(f"{path.rstrip('/')}/", detail=True))
    except FileNotFoundError:
        return {}
    start = len(path.rstrip("/").partition("://")[2]) + 1
    return {name[start:]: _facts(info) for name, info in sorted(found.items()) if name[start:]}


def facts(path: str) -> tuple[int, str]:
    """(bytes, what differs where the content does) of an object.

    Raises:
      FileNotFoundError: there is none.
    """
    info = _tried(path, lambda system: system.info(path))
    if info["type"] != "file":
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
    return _facts(info)


def _facts(info: dict[str, Any]) -> tuple[int, str]:
    version = info.get("ETag") or info.get("etag") or info.get("md5Hash") or info.get("mtime")
    return int(info["size"]), str(version).strip('"')


def read(path: str) -> bytes:
    """The content of an object."""
    # In parts, s3fs would ask for the size first.
    alone = {"max_concurrency": 1} if path.startswith("s3://") else {}
    return _tried(path, lambda system: system.cat_file(path, **alone))


def write(path: str, content: bytes) -> None:
    """Replaces an object."""
    _tried(path, lambda system: system.pipe_file(path, content))


def create(path: str, content: bytes) -> bool:
    """Writes an object unless there is one, which one of those who try at once can do; whether.

    `content` has to be nobody else's: after an answer that was lost, it says whose the object is.
    """
    try:
        _tried(path, lambda system: system.pipe_file(path, content, mode="create"))
    except FileExistsError:
        try:
            return read(path) == content
        except FileNotFoundError:
            return False
    return True


def send(file: str, path: str) -> None:
    """Replaces an object by a local file."""
    _tried(path, lambda system: system.put_file(file, path))


def fetch(path: str, file: str) -> None:
    """Writes the content of an object to a local file."""
    _tried(path, lambda system: system.get_file(path, file))


def remove(path: str) -> None:
    """Removes an object, if there is one."""
    with contextlib.suppress(FileNotFoundError):
        _tried(path, lambda system: system.rm_file(path))


def remove_below(path: str) -> None:
    """Removes all objects below."""
    each(lambda name: remove(f"{path}/{name}"), list(objects(path)))


def send_folder(folder: str, path: str, last: str) -> None:
    """Replaces what lies below by the files of a local folder, the marker `last` at the end."""
    remove(f"{path}/{last}")
    found = list(files_below(folder))
    each(remove, [f"{path}/{name}" for name in objects(path) if name not in found])
    each(
        lambda name: send(os.path.join(folder, name), f"{path}/{name}"),
        [name for name in found if name != last],
    )
    send(os.path.join(folder, last), f"{path}/{last}")


def fetch_folder(path: str, folder: str, within: Collection[str]) -> None:
    """Writes objects below to a local folder: what lies right there, and in folders `within` it."""

    def fetch_one(name: str) -> None:
        file = os.path.join(folder, name)
        os.makedirs(os.path.dirname(file), exist_ok=True)
        fetch(f"{path}/{name}", file)

    found = objects(path)
    each(fetch_one, [name for name in found if "/" not in name or name.split("/")[0] in within])


def move_folder(source: str, target: str, last: str) -> None:
    """Copies all objects below `source`, then removes them, `last` at the end of both.

    A kill in between leaves at `source` a folder that still has its marker, to be moved again.
    """
    found = [name for name in objects(source) if name != last]

    def copy(name: str) -> None:
        _tried(source, lambda system: system.cp_file(f"{source}/{name}", f"{target}/{name}"))

    each(copy, found)
    has_marker = is_object(f"{source}/{last}")
    if has_marker:
        copy(last)
    each(lambda name: remove(f"{source}/{name}"), found)
    remove(f"{source}/{last}")


def files_below(folder: str) -> Iterator[str]:
    """Names, from there, of all files in a local folder and those in it."""
    for place, _, found in os.walk(folder):
        for name in found:
            yield os.path.relpath(os.path.join(place, name), folder)


def each(act: Callable[[str], None], given: Sequence[str]) -> None:
    """`act` on each, several at a time; the first error is raised once all have ended."""
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        list(pool.map(act, given))
