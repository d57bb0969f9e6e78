"""Values kept on disk by key: shards of ArrayRecord files, and how they are read by training."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator, Sequence

import numpy as np
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

    def keys(self, files: Sequence[str]) -> set[bytes]:
        """Keys of all values in some shards."""
        return {key for path in files for key in self.index(path)}

    def index(self, path: str) -> list[bytes]:
        """The key of each record of a shard.

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
        return np.frombuffer(content, "V16").tolist()

    def write(self, number: int, keys: Sequence[bytes], values: Sequence[np.ndarray]) -> None:
        """Adds a shard: the bytes of a value for each key of 16 bytes."""
        digest = _hash(b"".join(keys))
        stem = os.path.join(self._directory, f"{self._name}-{number:05d}-{digest}")
        write_bytes(f"{stem}{_INDEX_SUFFIX}", b"".join(keys))
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

    def __init__(self, store: RecordFiles, files: Sequence[str], keys: Sequence[bytes], what: str):
        """`keys` are those of the examples, all of them in `files`; `what` an example is called.

        Raises:
          ValueError: a file that is not a whole shard of as many records as there should be.
        """
        self._files, self._what = list(files), what
        places: dict[bytes, int] = {}
        starts = [0]
        for path in files:
            there = store.index(path)
            with _readable(path):
                reader = ArrayRecordReader(local(path))
                found = reader.num_records()
                reader.close()
            if found != len(there):
                raise ValueError(f"{path}: {found} records, expected {len(there)}; {_AGAIN}")
            places.update(zip(there, range(starts[-1], starts[-1] + found), strict=True))
            starts.append(starts[-1] + found)
        self._starts = np.array(starts)
        self._places = np.array([places[key] for key in keys], np.int64)
        counts = np.diff(self._starts)
        self._records = ArrayRecordDataSource(
            [f"{local(path)}[0:{count}]" for path, count in zip(files, counts, strict=True)]
        )

    def __len__(self) -> int:
        return len(self._places)

    def read(self, index: int, size: int) -> bytes:
        """The value of one example, of `size` bytes.

        Raises:
          ValueError: it cannot be read, or has another size.
        """
        place = self._places[index]
        path = self._files[np.searchsorted(self._starts, place, "right") - 1]
        with _readable(path):
            record = self._records[place]
        if len(record) != size:
            raise ValueError(
                f"{path}: {len(record)} bytes for {self._what} {index}, expected {size}; {_AGAIN}"
            )
        return record


def _hash(keys: bytes) -> str:
    return hashlib.sha256(keys).hexdigest()[:8]


@contextlib.contextmanager
def _readable(path: str) -> Iterator[None]:
    """Has errors of ArrayRecord's reader, whatever their class, name the file."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{path}: not readable: {error}; {_AGAIN}") from None
