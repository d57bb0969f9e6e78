"""Values kept on disk by key: shards of ArrayRecord files, and how they are read by training."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from l2s_jax.copies import local
from l2s_jax.files import (
    UNFINISHED,
    is_bucket,
    matching_names,
    read_bytes,
    replacing,
    write_bytes,
)

_KEY = np.dtype("V16")
_SUFFIX, _INDEX_SUFFIX = ".array_record", ".index"
# zstd would make H, which is close to noise, a fifth smaller, and reading it four times as slow.
_WRITER = "group_size:1,uncompressed"
_AGAIN = "remove it, and the same command makes it again"


class RecordFiles:
    """Shards NAME-NUMBER-HASH.array_record, each with an index of keys beside it.

    HASH is that of the keys, so that runs that share a folder do not take each other's names.
    """

    def __init__(self, directory: str, name: str):
        self._directory, self._name = directory, name

    def files(self) -> list[str]:
        """Paths of the shards that are there, in order of their numbers."""
        return matching_names(self._directory, f"*{_SUFFIX}")

    def keys(self, files: Sequence[str]) -> np.ndarray:
        """The key of each value in some shards, V16 [N]."""
        return np.concatenate([np.zeros(0, _KEY), *map(self.index, files)])

    def missing(self, files: Sequence[str], keys: np.ndarray) -> np.ndarray:
        """Where `keys`, V16 [N], has one that is in none of the shards, each key once, int64."""
        return lacking(self.keys(files), keys)

    def index(self, path: str) -> np.ndarray:
        """The key of each record of a shard, V16 [N].

        Raises:
          ValueError: there is no index, or another one than was written.
        """
        stem = path.removesuffix(_SUFFIX)
        name = f"{stem}{_INDEX_SUFFIX}"
        try:
            content = read_bytes(name)
        except OSError as error:
            raise ValueError(f"{name}: not readable: {error.strerror}; {_AGAIN}") from None
        if not stem.endswith(f"-{_hash(content)}"):
            raise ValueError(
                f"{name}: damaged: its content is not that of the hash in its name; remove it and "
                "the file beside it, and the same command makes them again"
            )
        return np.frombuffer(content, _KEY)

    def write(self, number: int, keys: np.ndarray, values: Sequence[np.ndarray]) -> None:
        """Adds a shard: the bytes of a value for each of the keys, V16 [N]."""
        content = np.asarray(keys, _KEY).tobytes()
        stem = os.path.join(self._directory, f"{self._name}-{number:05d}-{_hash(content)}")
        write_bytes(f"{stem}{_INDEX_SUFFIX}", content)
        path = f"{stem}{_SUFFIX}"
        try:
            with replacing(path) as temporary:
                writer = ArrayRecordWriter(temporary, _WRITER)
                for value in values:
                    writer.write(value.tobytes())
                writer.close()
        except RuntimeError as error:
            raise OSError(f"{path}: cannot be written: {error}") from None

    def tidy(self) -> None:
        """Removes what killed runs left of shards that are all there now."""
        if is_bucket(self._directory):
            return
        for path in matching_names(self._directory, f"*{UNFINISHED}"):
            with contextlib.suppress(FileNotFoundError):
                os.remove(path)


class Records:
    """Values of examples, read from complete shards by the index of an example."""

    def __init__(self, store: RecordFiles, files: Sequence[str], keys: np.ndarray, what: str):
        """`keys`, V16 [N], are of the examples, all in `files`; `what` an example is called.

        Raises:
          ValueError: a file that is not a whole shard of as many records as there should be, or a
            key that is in none.
        """
        self._files, self._what = list(files), what
        indices = [store.index(path) for path in files]
        for path, index in zip(files, indices, strict=True):
            with _readable(path):
                reader = ArrayRecordReader(local(path))
                found = reader.num_records()
                reader.close()
            if found != len(index):
                raise ValueError(f"{path}: {found} records, expected {len(index)}; {_AGAIN}")
        counts = [*map(len, indices)]
        self._starts = np.cumsum([0, *counts])
        there = np.concatenate([np.zeros(0, _KEY), *indices])
        self._places = _places(_arrow(keys), _arrow(there))
        if (lost := np.flatnonzero(self._places < 0)).size:
            raise ValueError(f"{what} {lost[0]} is in none of {len(files)} shards")
        self._records = ArrayRecordDataSource(
            [f"{local(path)}[0:{count}]" for path, count in zip(files, counts, strict=True)]
        )

    def __len__(self) -> int:
        return len(self._places)

    def read(self, indices: np.ndarray, sizes: np.ndarray) -> list[bytes]:
        """The values of examples, of so many bytes each; they are read by several threads.

        Raises:
          ValueError: one cannot be read, or has another size.
        """
        places = self._places[indices]
        try:
            records = list(self._records.__getitems__(places.tolist()))
        except Exception:
            records = [self._one(place) for place in places.tolist()]
        for index, place, size, record in zip(indices, places, sizes, records, strict=True):
            if len(record) != size:
                raise ValueError(
                    f"{self._file(place)}: {len(record)} bytes for {self._what} {index}, expected "
                    f"{size}; {_AGAIN}"
                )
        return records

    def _one(self, place: int) -> bytes:
        """A value by its place; the error names the file."""
        with _readable(self._file(place)):
            return self._records[place]

    def _file(self, place: int) -> str:
        return self._files[np.searchsorted(self._starts, place, "right") - 1]


def lacking(there: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Where `keys`, V16 [N], has one that is not `there`, V16 [M], each key once, int64."""
    wanted = _arrow(keys)
    is_first = _places(wanted, wanted) == np.arange(len(keys))
    return np.flatnonzero(is_first & (_places(wanted, _arrow(there)) < 0))


def last_places(there: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Where each of `keys`, V16 [N], is last `there`, V16 [M], int64 [N]; -1: nowhere."""
    found = _places(_arrow(keys), _arrow(there[::-1]))
    return np.where(found < 0, -1, len(there) - 1 - found)


def distinct(keys: np.ndarray) -> int:
    """How many of the keys, V16 [N], differ."""
    return len(_arrow(keys).unique())


def _arrow(keys: np.ndarray) -> pa.Array:
    """Keys, V16 [N], as pyarrow finds them again: by a hash table of 16 bytes each."""
    buffers = [None, pa.py_buffer(np.ascontiguousarray(keys))]
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(_KEY.itemsize), len(keys), buffers)


def _places(keys: pa.Array, there: pa.Array) -> np.ndarray:
    """Where each of the keys is first, int64 [N]; -1: nowhere."""
    found: Any = pc.call_function("index_in", [keys], pc.SetLookupOptions(there))
    return found.fill_null(-1).to_numpy().astype(np.int64)


def _hash(keys: bytes) -> str:
    return hashlib.sha256(keys).hexdigest()[:8]


@contextlib.contextmanager
def _readable(path: str) -> Iterator[None]:
    """Has errors of ArrayRecord's reader, whatever their class, name the file."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{path}: not readable: {error}; {_AGAIN}") from None
