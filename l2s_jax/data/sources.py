"""Records of text fields from line-aligned text files, JSON Lines, TSV and tensorflow-datasets.

Files are read through fsspec, so that a path may be any URL that it knows; what is packed with gzip
is decompressed. Text is UTF-8, a byte order mark is no part of it, and lines end at "\\n" alone
("\\r\\n" counts as one ending): further separators such as U+2028 or a lone "\\r" would shift the
lines of aligned files against each other.

Training and `--mode=generate` both read through this module.
"""

import contextlib
import functools
import glob
import gzip
import io
import itertools
import json
import os
import re
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple, cast

import fsspec
import numpy as np

from l2s_jax.copies import local
from l2s_jax.data.text import all_whole, decoded
from l2s_jax.files import check_depth, is_bucket
from l2s_jax.messages import one_line

STDIN = "-"

_READ_AT_ONCE = 1024
_GZIP = b"\x1f\x8b"  # no UTF-8 text begins with it


class Record(NamedTuple):
    """One example as its source holds it."""

    fields: Mapping[str, Any]
    files: str | Mapping[str, str]
    line: int | None

    def where(self, field: str | None = None) -> str:
        """The place of the record, or of one field of it, for messages: "file:line"."""
        if self.line is None:
            return str(self.files)
        if isinstance(self.files, str):
            return f"{self.files}:{self.line}"
        own = self.files.get(field or "")
        files = [own] if own else self.files.values()
        return ", ".join(f"{file}:{self.line}" for file in files)


def resolve(data_dir: str, file: str) -> str:
    """`file` itself if it is absolute or a URL, else `file` in `data_dir`."""
    if not data_dir or file.startswith(("/", "~")) or "://" in file:
        return file
    return f"{data_dir.rstrip('/')}/{file}"


def expand(path: str) -> list[str]:
    """The files that a path with "*" names, in order of their names; else the path itself.

    What is there by the name itself is meant first: a file, a folder, brackets in a name.

    Raises:
      ValueError: there is none, or the place cannot be listed.
    """
    if "*" not in path:
        return [path]
    try:
        if "://" not in path:
            found = _expanded(os.path.expanduser(path))
        else:
            system, place = fsspec.core.url_to_fs(path)
            found = [system.unstrip_protocol(name) for name in _first(system.glob, "", place)]
    except (OSError, ImportError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read: {one_line(error)}") from error
    if not found:
        raise ValueError(f"{path}: no such file")
    return sorted(found)


def _expanded(path: str) -> list[str]:
    if os.path.exists(path):
        return [path]
    folder = os.path.dirname(path)
    while folder and not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    find = functools.partial(glob.glob, recursive=True)
    return _first(find, glob.escape(folder), path.removeprefix(folder))


def _first(find: Callable[[str], list[str]], folder: str, name: str) -> list[str]:
    """What `find` finds where "*" alone is no character of a name; else by all that a glob has."""
    return find(folder + re.sub(r"[\[?]", r"[\g<0>]", name)) or find(folder + name)


def read_lines(path: str) -> Iterator[str]:
    """Lines of a UTF-8 file, without their endings and without a byte order mark.

    Each line is given as soon as it is there; "-" is stdin.

    Raises:
      ValueError: the file is missing, unreadable, broken gzip or not UTF-8.
    """
    count = 0
    name = name_of(path)
    try:
        with _opened(path) as file:
            for count, line in enumerate(file, 1):
                text = decoded(line)
                if count == 1:
                    text = text.removeprefix("\ufeff")
                yield text.removesuffix("\n").removesuffix("\r")
    except FileNotFoundError as error:
        raise ValueError(f"{name}: no such file") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{name}: broken gzip after line {count}: {one_line(error)}") from error
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name}:{count}: not UTF-8: {error.reason} at byte {error.start}"
        ) from error
    except (OSError, ImportError, ValueError) as error:
        raise ValueError(f"{name}: cannot be read: {one_line(error)}") from error


def name_of(path: str) -> str:
    """What messages call a file: its path, or "stdin"."""
    return "stdin" if path == STDIN else path


@contextlib.contextmanager
def _opened(path: str) -> Iterator[BinaryIO]:
    """The bytes of a file, unpacked where its name or its beginning says that it is gzip."""
    with contextlib.ExitStack() as stack:
        if path == STDIN:
            file = sys.stdin.buffer
        elif "://" in path:
            file = cast(BinaryIO, stack.enter_context(fsspec.open(path, "rb")))
        else:  # fsspec would ask for the size, which a pipe does not have
            file = stack.enter_context(open(os.path.expanduser(path), "rb"))
        if not isinstance(file, io.BufferedReader):
            file = io.BufferedReader(cast(io.RawIOBase, file))
            # What is buffered again is not ours to close.
            stack.callback(file.detach)
        if path.endswith(".gz") or file.peek(len(_GZIP)).startswith(_GZIP):
            file = cast(BinaryIO, stack.enter_context(gzip.open(file)))
        yield file


def read_text(files: Mapping[str, str]) -> Iterator[Record]:
    """Records of line-aligned files: line i of each file is a field of record i.

    Args:
      files: path by field name.

    Raises:
      ValueError: as `read_lines`, or two files differ in their number of lines.
    """
    columns = [read_lines(path) for path in files.values()]
    names = {field: name_of(path) for field, path in files.items()}
    number = 0
    for number, values in enumerate(itertools.zip_longest(*columns), 1):
        if None in values:
            _raise_misaligned(files, values, columns, number)
        yield Record(dict(zip(files, values, strict=True)), names, number)


def _raise_misaligned(
    files: Mapping[str, str],
    values: Sequence[str | None],
    columns: Sequence[Iterator[str]],
    number: int,
) -> None:
    counts = [
        number - 1 if value is None else number + sum(1 for _ in column)
        for value, column in zip(values, columns, strict=True)
    ]
    described = ", ".join(
        f"{path} has {count}" for path, count in zip(files.values(), counts, strict=True)
    )
    raise ValueError(f"line-aligned files differ in their number of lines: {described}")


def read_jsonl(path: str) -> Iterator[Record]:
    """Records of a JSON Lines file, one object a line; blank lines are skipped.

    Raises:
      ValueError: as `read_lines`, or a line is no JSON object.
    """
    name = name_of(path)
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        try:
            fields = _parsed(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{name}:{number}: malformed JSON: {one_line(error)}") from error
        if not isinstance(fields, dict):
            kind = type(fields).__name__
            raise ValueError(f"{name}:{number}: expected a JSON object, found a {kind}")
        yield Record(fields, name, number)


def _parsed(line: str) -> Any:
    value = json.loads(line)
    check_depth(value, line)
    # No line of UTF-8 holds half a character as it is.
    return all_whole(value) if "\\u" in line else value


def read_tsv(path: str) -> Iterator[Record]:
    """Records of a tab-separated file whose first row names the columns; there is no quoting.

    Blank lines are skipped, but for a file of one column, where such a line is a row.

    Raises:
      ValueError: as `read_lines`, the header names a column twice, or a row differs from it in
        its number of columns.
    """
    lines = read_lines(path)
    header = next(lines, "").split("\t")
    if header == [""]:
        raise ValueError(f"{path}:1: expected a header row of column names, found nothing")
    if repeated := {name for name in header if header.count(name) > 1}:
        raise ValueError(f"{path}:1: the header names {sorted(repeated)[0]!r} more than once")
    for number, line in enumerate(lines, 2):
        values = line.split("\t")
        if len(values) != len(header):
            if not line.strip() and len(values) == 1:
                continue
            raise ValueError(
                f"{path}:{number}: expected {len(header)} columns ({', '.join(header)}), "
                f"found {len(values)}"
            )
        yield Record(dict(zip(header, values, strict=True)), path, number)


class TfdsRecords(Sequence[Record]):
    """Random access to one split of a tensorflow-datasets dataset; a record's `line` is its index.

    TensorFlow is not used: the dataset lies in ArrayRecord files, which are made at first use.

    Args:
      name: dataset name, such as "wmt14_translate/de-en".
      split: any TFDS split, such as "train" or "train[:10%]".
      data_dir: where TFDS keeps its datasets; "" for its own default.

    Raises:
      ValueError: TFDS has no such dataset or split, cannot prepare it, or holds it in files
        without random access.
    """

    def __init__(self, name: str, split: str, data_dir: str = ""):
        builder = _tfds_builder(name, data_dir)
        known = sorted(builder.info.splits)
        try:
            self._source = builder.as_data_source(split)
        except (ValueError, KeyError, NotImplementedError) as error:
            raise ValueError(
                f"TFDS dataset {name!r} cannot give split {split!r} "
                f"(it has: {', '.join(known)}): {_first_line(error)}"
            ) from error
        self._origin = f"TFDS {name}, split {split}"

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Record:
        index = range(len(self))[index]
        return self._record(index, self._source[index])

    def __iter__(self) -> Iterator[Record]:
        for start in range(0, len(self), _READ_AT_ONCE):
            indices = range(start, min(start + _READ_AT_ONCE, len(self)))
            for index, fields in zip(indices, self._source.__getitems__(indices), strict=True):
                yield self._record(index, fields)

    def _record(self, index: int, fields: Mapping[str, Any]) -> Record:
        return Record(
            {key: _to_python(value) for key, value in fields.items()}, self._origin, index
        )


def _tfds_builder(name: str, data_dir: str) -> Any:
    import tensorflow_datasets as tfds

    if is_bucket(data_dir):  # ArrayRecord's reader wants files of a disk
        data_dir = local(data_dir, (f"{name.partition('/')[0]}/*",))
    # Registers our own dataset with TFDS.
    from l2s_jax.data import synthetic  # noqa: F401

    try:
        builder = tfds.builder(name, data_dir=data_dir or None, file_format="array_record")
    except tfds.core.DatasetNotFoundError as error:
        raise ValueError(f"TFDS has no dataset {name!r}") from error
    except Exception as error:
        raise ValueError(f"TFDS cannot open {name!r}: {_first_line(error)}") from error
    if not builder.is_prepared():
        try:
            builder.download_and_prepare()
        except Exception as error:
            reason = f"{type(error).__name__}: {_first_line(error)}"
            raise ValueError(
                f"TFDS cannot prepare {name!r} in {builder.data_dir}: {reason}"
            ) from error
    return builder


def tfds_files(name: str, data_dir: str = "") -> list[str]:
    """The files in which TFDS keeps a dataset, which is prepared if it is not.

    Raises:
      ValueError: as `TfdsRecords`.
    """
    folder = str(_tfds_builder(name, data_dir).data_dir)
    return sorted(os.path.join(folder, file) for file in os.listdir(folder))


def _to_python(value: Any) -> Any:
    """UTF-8 bytes as text and arrays as lists; anything else unchanged."""
    if isinstance(value, bytes):
        try:
            return decoded(value)
        except UnicodeDecodeError:
            return value
    if isinstance(value, np.ndarray):
        return _to_python(value.tolist())
    if isinstance(value, list):
        return [_to_python(item) for item in value]
    return value


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
