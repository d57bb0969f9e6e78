"""H of prompts on disk: shards of ArrayRecord files, and how they are read by training.

H is bfloat16 [t, D] of the t tokens of a prompt, without padding, one record each.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import math
import os
from collections.abc import Iterator, Sequence

import ml_dtypes
import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from l2s_jax.data.examples import TokenizedExamples
from l2s_jax.files import UNFINISHED, replacing, write_bytes

_SUFFIX, _INDEX_SUFFIX = ".array_record", ".index"
# zstd would make H, which is close to noise, a fifth smaller, and reading it four times as slow.
_WRITER = "group_size:1,uncompressed"
_AGAIN = "remove it, and the same command makes it again"


class FeatureFiles:
    """Shards features-NUMBER-HASH.array_record, each with an index of keys beside it.

    HASH is that of the keys, so that runs that share a cache do not take each other's names.
    """

    def __init__(self, directory: str):
        self._directory = directory

    def files(self) -> list[str]:
        """Paths of the shards that are there, in order of their numbers."""
        return sorted(glob.glob(os.path.join(glob.escape(self._directory), f"*{_SUFFIX}")))

    def keys(self, files: Sequence[str]) -> set[bytes]:
        """Keys of all prompts in some shards."""
        return {key for path in files for key in self.index(path)}

    def index(self, path: str) -> list[bytes]:
        """The key of each record of a shard.

        Raises:
          ValueError: there is no index.
        """
        name = f"{path.removesuffix(_SUFFIX)}{_INDEX_SUFFIX}"
        try:
            return np.fromfile(name, "V16").tolist()
        except OSError as error:
            raise ValueError(f"{name}: not readable: {error.strerror}; {_AGAIN}") from None

    def write(self, number: int, keys: Sequence[bytes], values: Sequence[np.ndarray]) -> None:
        """Adds a shard: H [t, D] of each key."""
        digest = hashlib.sha256(b"".join(keys)).hexdigest()[:8]
        stem = os.path.join(self._directory, f"features-{number:05d}-{digest}")
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
        pattern = os.path.join(glob.escape(self._directory), f"*{UNFINISHED}")
        for path in glob.glob(pattern):
            with contextlib.suppress(FileNotFoundError):
                os.remove(path)


class Features:
    """H of examples, read from complete shards by index: what `TokenizedExamples.hidden` may be."""

    def __init__(
        self, store: FeatureFiles, files: Sequence[str], data: TokenizedExamples, width: int
    ):
        """`data` are the examples, all of whose prompts are in `files`; `width` is D.

        Raises:
          ValueError: a file that is not a whole shard of as many records as there should be, also
            where it is found out later.
        """
        self._files, self._width, self._lengths = list(files), width, data.prompt_lengths
        places: dict[bytes, int] = {}
        starts = [0]
        for path in files:
            keys = store.index(path)
            with _readable(path):
                reader = ArrayRecordReader(path)
                found = reader.num_records()
                reader.close()
            if found != len(keys):
                raise ValueError(f"{path}: {found} records, expected {len(keys)}; {_AGAIN}")
            places.update(zip(keys, range(starts[-1], starts[-1] + found), strict=True))
            starts.append(starts[-1] + found)
        self._starts = np.array(starts)
        self._places = np.array([places[key] for key in data.prompt_keys], np.int64)
        counts = np.diff(self._starts)
        self._records = ArrayRecordDataSource(
            [f"{path}[0:{count}]" for path, count in zip(files, counts, strict=True)]
        )

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> np.ndarray:
        """H of one prompt, bfloat16 [t, D]."""
        place = self._places[index]
        path = self._files[np.searchsorted(self._starts, place, "right") - 1]
        with _readable(path):
            record = self._records[place]
        shape = (int(self._lengths[index]), self._width)
        if len(record) != 2 * math.prod(shape):
            raise ValueError(
                f"{path}: {len(record)} bytes for prompt {index}, expected {2 * math.prod(shape)}; "
                f"{_AGAIN}"
            )
        return np.frombuffer(record, ml_dtypes.bfloat16).reshape(shape)

    def padded(self, indices: np.ndarray, prompt_tokens: int) -> np.ndarray:
        """H of prompts `indices` [B], bfloat16 [B, prompt_tokens, D]; zeros elsewhere."""
        shape = (len(indices), prompt_tokens, self._width)
        batch = np.zeros(shape, ml_dtypes.bfloat16)
        for row, index in enumerate(indices):
            if index >= 0:
                hidden = self[index]
                batch[row, : len(hidden)] = hidden
        return batch


@contextlib.contextmanager
def _readable(path: str) -> Iterator[None]:
    """Has errors of ArrayRecord's reader, whatever their class, name the file."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{path}: not readable: {error}; {_AGAIN}") from None
