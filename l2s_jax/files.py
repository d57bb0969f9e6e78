"""Files as they are written and read everywhere: a file or folder is there as a whole, or not.

A path may be one of a bucket (buckets.py). On a disk, what is being written lies beside its place,
under a name that ends in `.tmp`, and a folder appears by being renamed. In a bucket an object
appears as a whole, and a folder is there when its marker is, which is written last.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import fnmatch
import glob
import json
import math
import os
import posixpath
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

from l2s_jax import buckets
from l2s_jax.buckets import is_bucket
from l2s_jax.messages import shown

UNFINISHED = ".tmp"
_OWN_UNFINISHED = re.compile(rf"\.[0-9a-f]{{32}}{re.escape(UNFINISHED)}$")
# More than any real record has, and few enough for those that go through one by recursion.
DEEPEST = 100
# By which a folder with a model is known to be whole.
MODEL_MARKER = "config.json"
# Of errors of files that come while a run goes on, and are no mistake of whoever started it.
_FAILED = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG, errno.ESTALE, errno.ENOMEM}


class CannotWrite(OSError):
    """What a run has made cannot be written; in one line, which names the file."""


def exit_status(error: BaseException) -> int:
    """Of a command that ends with an error in one line: 1 where a run failed, 2 for bad input."""
    failed = isinstance(error, FloatingPointError | CannotWrite)
    return 1 if failed or (isinstance(error, OSError) and error.errno in _FAILED) else 2


@contextlib.contextmanager
def naming(path: str) -> Iterator[None]:
    """Has the errors of files that come from within name one: a write does not say of what."""
    try:
        yield
    except OSError as error:
        if error.errno and error.filename is None:
            error.filename = path
        raise


@contextlib.contextmanager
def replacing(path: str) -> Iterator[str]:
    """Gives a path to write a file to, which becomes `path` when the block ends without an error.

    Whoever else writes the same file at the same time has another path; the last one stays.
    """
    if is_bucket(path):
        with tempfile.TemporaryDirectory() as folder:
            temporary = os.path.join(folder, os.path.basename(path))
            yield temporary
            buckets.send(temporary, path)
        return
    temporary = f"{path}.{uuid.uuid4().hex}{UNFINISHED}"
    try:
        with naming(path):
            yield temporary
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            os.remove(temporary)


@contextlib.contextmanager
def atomic_directory(path: str, marker: str = MODEL_MARKER) -> Iterator[str]:
    """Gives a new folder, which becomes `path` when the block ends without an error.

    In a bucket `marker` is sent last; what a killed run has left there without one goes.

    Raises:
      OSError: there is something at `path` that is no empty folder.
    """
    path = absolute(path)
    if is_bucket(path):
        if is_whole(path, marker):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)
        with tempfile.TemporaryDirectory() as root:
            temporary = os.path.join(root, os.path.basename(path))
            os.mkdir(temporary)
            yield temporary
            buckets.send_folder(temporary, path, marker)
        return
    temporary = f"{path}.{uuid.uuid4().hex}{UNFINISHED}"
    os.makedirs(temporary)
    try:
        with naming(path):
            yield temporary
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def is_unfinished(name: str) -> bool:
    """Whether a file or folder of this name is what `replacing` or `atomic_directory` writes to."""
    return _OWN_UNFINISHED.search(name) is not None


def write_bytes(path: str, content: bytes) -> None:
    """Replaces a file."""
    if is_bucket(path):
        buckets.write(path, content)
        return
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(content)


def read_bytes(path: str) -> bytes:
    """The content of a file."""
    if is_bucket(path):
        return buckets.read(path)
    with open(path, "rb") as file:
        return file.read()


def read_text(path: str) -> str:
    """The content of a file in UTF-8."""
    return read_bytes(path).decode()


def exists(path: str) -> bool:
    """Whether a file or a folder is there."""
    return buckets.exists(path) if is_bucket(path) else os.path.exists(path)


def is_file(path: str) -> bool:
    """Whether a file is there."""
    return buckets.is_object(path) if is_bucket(path) else os.path.isfile(path)


def is_folder(path: str) -> bool:
    """Whether a folder is there; in a bucket, one with something in it."""
    return bool(buckets.names(path)) if is_bucket(path) else os.path.isdir(path)


def is_whole(path: str, marker: str = MODEL_MARKER) -> bool:
    """Whether a folder is there that `atomic_directory` makes."""
    if is_bucket(path):
        return buckets.is_object(os.path.join(path, marker))
    return os.path.isdir(path)


def listed_names(path: str) -> list[str]:
    """Names in a folder, sorted; none where there is no folder."""
    if is_bucket(path):
        return buckets.names(path)
    return sorted(os.listdir(path)) if os.path.isdir(path) else []


def matching_names(directory: str, pattern: str) -> list[str]:
    """Paths of what a folder has of names like `pattern`, as of `glob`, sorted."""
    if is_bucket(directory):
        found = fnmatch.filter(buckets.names(directory), pattern)
        return [os.path.join(directory, name) for name in found]
    return sorted(glob.glob(os.path.join(glob.escape(directory), pattern)))


def make_folder(path: str) -> None:
    """Makes a folder, unless it is there; in a bucket there are none to make."""
    if not is_bucket(path):
        os.makedirs(path, exist_ok=True)


def remove(path: str) -> None:
    """Removes a file.

    Raises:
      FileNotFoundError: there is none; not in a bucket.
    """
    if is_bucket(path):
        buckets.remove(path)
    else:
        os.remove(path)


def rename_folder(path: str, target: str, marker: str) -> None:
    """Renames a folder; in a bucket what is in it is copied, then removed, its marker last."""
    if is_bucket(path):
        buckets.move_folder(path, target, marker)
    else:
        os.rename(path, target)


def absolute(path: str) -> str:
    """A path that does not depend on where the process is, without "." and ".."."""
    if not is_bucket(path):
        return os.path.abspath(path)
    scheme, _, rest = path.partition("://")
    return f"{scheme}://{posixpath.normpath(rest)}"


def signature(path: str) -> list[Any]:
    """[path, size, what changes with the content] of a file: its age, or its tag in a bucket.

    Raises:
      OSError: there is none.
    """
    return signatures([path])[0]


def signatures(paths: Sequence[str]) -> list[list[Any]]:
    """As of `signature`, of files; those of one folder in a bucket take one request.

    Raises:
      OSError: one is not there.
    """
    folders = collections.Counter(os.path.dirname(path) for path in paths if is_bucket(path))
    listed = {folder: buckets.listing(folder) for folder, count in folders.items() if count > 1}

    def facts(path: str) -> tuple[int, str]:
        folder, name = os.path.split(path)
        found = listed[folder].get(name) if folder in listed else buckets.facts(path)
        if found is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        return found

    def of(path: str) -> list[Any]:
        if is_bucket(path):
            return [path, *facts(path)]
        stat = os.stat(os.path.expanduser(path))
        return [os.path.abspath(path), stat.st_size, stat.st_mtime_ns]

    return [of(path) for path in paths]


def write_text(path: str, content: str) -> None:
    """Replaces a file, in UTF-8."""
    write_bytes(path, content.encode())


def write_json(path: str, value: Any, *, sort_keys: bool = False) -> None:
    """Replaces a JSON file.

    Raises:
      ValueError: a number in it is not finite, which JSON has no word for.
    """
    content = json.dumps(value, indent=2, sort_keys=sort_keys, allow_nan=False)
    write_text(path, content + "\n")


def write_json_lines(path: str, records: Any) -> None:
    """Replaces a JSON Lines file; `records` is any iterable."""
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def finite(value: Any) -> Any:
    """`value` with null for each number that is not finite, for `write_json`."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(path: str) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
      ValueError: there is no such file, or it holds no JSON object.
    """
    try:
        content = read_bytes(path)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except OSError as error:
        raise ValueError(f"{path}: not readable: {error.strerror}") from None
    return json_object(content, path)


def json_object(content: str | bytes, where: str) -> dict[str, Any]:
    """The JSON object in a text, or in its UTF-8.

    Raises:
      ValueError: it is none, or has a key twice, or nests deeper than anything that is meant.
        `where` says whose text it is.
    """
    try:
        text = content if isinstance(content, str) else content.decode("utf-8-sig")
        value = json.loads(text, object_pairs_hook=_each_once)
        check_depth(value, text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not readable as JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected a JSON object, found {type(value).__name__}")
    return value


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object; readers differ in which of two values of one key they take."""
    made = dict(pairs)
    if len(made) < len(pairs):
        counts = collections.Counter(name for name, _ in pairs)
        raise ValueError(f"the key {shown(counts.most_common(1)[0][0])} is there twice")
    return made


def check_depth(value: Any, text: str) -> None:
    """Checks that a JSON value, which `text` says, has no more than `DEEPEST` levels.

    Raises:
      ValueError: it has more, of which Python's own code, such as repr, makes a RecursionError.
    """
    if text.count("[") + text.count("{") <= DEEPEST:
        return
    level = [value]
    for _ in range(DEEPEST):
        nested = [item for item in level if isinstance(item, dict | list)]
        level = [
            item for own in nested for item in (own.values() if isinstance(own, dict) else own)
        ]
    if level:
        raise ValueError(f"nested more than {DEEPEST} deep")


def plain(value: Any) -> Any:
    """What `value` becomes on its way through JSON."""
    return json.loads(json.dumps(value))
