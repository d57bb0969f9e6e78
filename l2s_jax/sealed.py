"""Content hashes of what is written here, which are looked at when it is read.

A folder has them in SHA256SUMS, as `sha256sum -c` reads it, a JSON object among its values. What
has none, such as what older versions wrote, is read as it is. The SHA256SUMS may be of somebody
else, and name what is no part of a model.

A process reads a file once for its hash, and again where its size and age, in a bucket its tag,
have changed. The hash of what is large is remembered with these, where `copies` are.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import posixpath
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from l2s_jax import buckets, copies
from l2s_jax.files import (
    is_bucket,
    is_file,
    make_folder,
    read_text,
    remove,
    signature,
    write_text,
)
from l2s_jax.messages import shown

SUMS = "SHA256SUMS"
_HASH = "sha256"
_LINE = re.compile(r"([0-9a-fA-F]{64}) [ *](.+)")  # with "*" it was read as bytes
_SHA256 = re.compile(r"[0-9a-f]{64}")
# Bytes from which on a hash is remembered by later processes.
_LARGE = 1 << 30
# Of the hash within an object: enough for what time does to a file.
_DIGITS = 16
# Hashes that this process knows.
_known: dict[str, str] = {}
_trusts_others = True


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
        if expected and _hash_of(path, expected) != expected:
            raise ValueError(
                f"{path}: damaged, or changed since it was written: its SHA-256 is not the one in "
                f"{SUMS} beside it; copy or make it again, or remove its line there if the change "
                "was meant"
            )


def check_below(directory: str) -> None:
    """As `check`, of all files that have a hash, in a folder and in those below."""
    below = buckets.objects if is_bucket(directory) else buckets.files_below
    for name in below(directory):
        if os.path.basename(name) == SUMS:
            folder = os.path.dirname(os.path.join(directory, name))
            check(*(os.path.join(folder, one) for one in _sums(folder)))


@contextlib.contextmanager
def anew() -> Iterator[None]:
    """Within, no hash counts that is known from before: each file is read again, once."""
    global _trusts_others
    _known.clear()
    _trusts_others = False
    try:
        yield
    finally:
        _trusts_others = True


def is_anew() -> bool:
    """Whether this is within `anew`."""
    return not _trusts_others


def remembered(facts: Any, size: int, compute: Callable[[], str], expected: str = "") -> str:
    """The SHA-256 (hex) that `compute` gives of `size` bytes, or gave to the same `facts` before.

    These (JSON-able) say what it is of, and change where the content does. With `expected`, what it
    gave before counts only if it is that: nothing is called damaged that has not been read.
    """
    name = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]
    memory = os.path.join(copies.folder(), f"{name}.hash")
    if name not in _known and size >= _LARGE and _trusts_others:
        with contextlib.suppress(OSError, UnicodeDecodeError):
            if _SHA256.fullmatch(found := read_text(memory)):
                _known[name] = found
    if name in _known and expected in ("", _known[name]):
        return _known[name]
    _known[name] = compute()
    if size >= _LARGE:
        with contextlib.suppress(OSError):  # who has no room for it, or no home, reads it again
            make_folder(copies.folder())
            write_text(memory, _known[name])
    return _known[name]


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
    """The hash of each file of a folder, and of those in it, that has one.

    Raises:
      ValueError: there are lines of another kind among them, as where some are damaged.
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
        if not line.strip() or line.startswith("#"):
            continue
        if not (found := _LINE.fullmatch(line)):
            raise ValueError(
                f"{path}:{number}: {shown(line)}: expected a SHA-256 and the name of a file; "
                f"remove {path} to do without"
            )
        name = posixpath.normpath(found[2])
        # (Who hashes all that is there hashes this file before it is written.)
        if name != SUMS and not name.startswith(("/", "../")):
            sums[name] = found[1].lower()
    return sums


def _hash_of(path: str, expected: str = "") -> str:
    """Of a file as it is; `expected`, if given, where there is none."""

    def read() -> str:
        with open(copies.local(path), "rb") as file:
            return hashlib.file_digest(file, _HASH).hexdigest()

    try:
        facts = signature(path)
        return remembered([_HASH, *facts], facts[1], read, expected)
    except OSError as error:
        if expected and isinstance(error, FileNotFoundError | NotADirectoryError):
            return expected
        raise ValueError(f"{path}: {error.strerror}") from None
