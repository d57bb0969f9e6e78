"""Content hashes of what is written here, which are looked at when it is read.

A folder has them in SHA256SUMS, as `sha256sum -c` reads it, a JSON object among its values. What
has none, such as what older versions wrote, is read as it is.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from l2s_jax.copies import local
from l2s_jax.files import is_file, read_text, remove, signature, write_text
from l2s_jax.messages import shown

SUMS = "SHA256SUMS"
_HASH = "sha256"
_LINE = re.compile(r"([0-9a-f]{64})  ([^/]+)")
# Of the hash within an object: enough for what time does to a file.
_DIGITS = 16


@contextlib.contextmanager
def writing(directory: str, *names: str) -> Iterator[None]:
    """Around the writing of files in a folder: leaves their hashes in it.

    Meanwhile it has none of them, so that a write cut short leaves none that is wrong. One that
    fails, and leaves files as they were, leaves their hashes too. What is gone has none.
    """
    before = _sums(directory)
    others = {name: hash for name, hash in before.items() if name not in names}
    _write(directory, others)
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError, ValueError):
            same = {n: h for n, h in before.items() if _hash_of(os.path.join(directory, n)) == h}
            _write(directory, others | same)
        raise
    paths = {name: os.path.join(directory, name) for name in names}
    hashes = {name: _hash_of(path) for name, path in paths.items() if is_file(path)}
    _write(directory, others | hashes)


def check(*paths: str) -> None:
    """Checks files that have a hash in their folder.

    Raises:
      ValueError: one is not what it was when it was written.
    """
    sums = {directory: _sums(directory) for directory in set(map(os.path.dirname, paths))}
    for path in paths:
        directory, name = os.path.split(path)
        expected = sums[directory].get(name)
        if expected and _hash_of(path, missing=expected) != expected:
            raise ValueError(
                f"{path}: damaged, or changed since it was written: its SHA-256 is not the one in "
                f"{SUMS} beside it; copy or make it again, or remove its line there if the change "
                "was meant"
            )


def with_hash(record: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object with a hash of what else it holds."""
    return {**record, _HASH: hash_of(record)}


def without_hash(record: Mapping[str, Any], where: str, *, needed: bool = False) -> dict[str, Any]:
    """What `with_hash` was given, or the object itself where it has no hash, unless it is `needed`.

    Raises:
      ValueError: its content is another one; `where` says whose.
    """
    content = {name: value for name, value in record.items() if name != _HASH}
    if (needed or _HASH in record) and record.get(_HASH) != hash_of(content):
        raise ValueError(
            f"{where}: damaged, or changed since it was written: its content is not that of its "
            f"{_HASH} {shown(record.get(_HASH))}"
        )
    return content


def hash_of(record: Mapping[str, Any]) -> str:
    """The hash of a JSON object, whatever the order of its keys."""
    # JSON has one way to write it: what comes of a file has the hash of what went into it.
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:_DIGITS]


def _write(directory: str, sums: Mapping[str, str]) -> None:
    path = os.path.join(directory, SUMS)
    if sums:
        write_text(path, "".join(f"{sums[name]}  {name}\n" for name in sorted(sums)))
    else:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            remove(path)


def _sums(directory: str) -> dict[str, str]:
    """The hash of each file of a folder that has one.

    Raises:
      ValueError: there are lines of another kind among them.
    """
    path = os.path.join(directory, SUMS)
    try:
        lines = read_text(path).splitlines()
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, UnicodeDecodeError):
        raise ValueError(f"{path}: not readable; remove it to do without") from None
    sums = {}
    for number, line in enumerate(lines, 1):
        if not (found := _LINE.fullmatch(line)):
            raise ValueError(
                f"{path}:{number}: {shown(line)}: expected a SHA-256 and the name of a file"
            )
        sums[found[2]] = found[1]
    return sums


def _hash_of(path: str, missing: str = "") -> str:
    """Of a file as it is; `missing`, if given, where there is none."""
    try:
        return _hash_of_file(path, *signature(path))
    except OSError as error:
        if missing and isinstance(error, FileNotFoundError | NotADirectoryError):
            return missing
        raise ValueError(f"{path}: {error.strerror}") from None


@functools.lru_cache(maxsize=1024)
def _hash_of_file(path: str, *facts: str | int) -> str:
    """`facts` change where the file's content does."""
    with open(local(path), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
