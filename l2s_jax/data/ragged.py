"""Sequences of different lengths, end to end: beyond some megabytes in a file, not in memory."""

from __future__ import annotations

import dataclasses
import itertools
import tempfile
from collections.abc import Iterable, Sequence
from typing import IO

import numpy as np
from numpy.typing import DTypeLike

from l2s_jax.files import naming

# Bytes of one array, from which on it is a file.
IN_MEMORY = 1 << 26


@dataclasses.dataclass(frozen=True)
class Ragged:
    """i is `values[offsets[i]:offsets[i + 1]]`."""

    values: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        if not 0 <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)}")
        return self.values[self.offsets[index] : self.offsets[index + 1]]

    @property
    def lengths(self) -> np.ndarray:
        """Of each sequence, int32 [len(self)]."""
        return np.diff(self.offsets).astype(np.int32)


class Growing:
    """An array that grows at its end.

    Once it is large it lies in a file without a name, which ends with the process: the system keeps
    in memory what it has room for. The file is in the folder of temporary files, TMPDIR.
    """

    def __init__(self, dtype: DTypeLike):
        self._dtype = np.dtype(dtype)
        self._parts: list[np.ndarray] = []
        self._bytes = 0
        self._file: IO[bytes] | None = None

    def append(self, values: np.ndarray) -> None:
        """Adds `values` [n].

        Raises:
          OSError: the file cannot be written; it names the folder.
        """
        self._parts.append(np.ascontiguousarray(values, self._dtype))
        self._bytes += self._parts[-1].nbytes
        if self._bytes > IN_MEMORY:
            with naming(tempfile.gettempdir()):
                if self._file is None:
                    # It is closed once it is mapped into memory.
                    self._file = tempfile.TemporaryFile()  # noqa: SIM115
                self._file.write(np.concatenate(self._parts).tobytes())
            self._parts = []

    def array(self) -> np.ndarray:
        """What there is, [n]; nothing can be added after. Errors as of `append`."""
        if self._file is None:
            return np.concatenate([*self._parts, np.zeros(0, self._dtype)])
        with naming(tempfile.gettempdir()), self._file as file:
            file.flush()
            # As a plain array: a view of it would cost ten times as much otherwise.
            return np.memmap(file, self._dtype, mode="r").view(np.ndarray)


class GrowingRagged:
    """A Ragged that grows at its end."""

    def __init__(self, dtype: DTypeLike):
        self._values, self._offsets = Growing(dtype), Growing(np.int64)
        self._end = 0
        self._offsets.append(np.zeros(1, np.int64))

    def append(self, values: np.ndarray, lengths: Sequence[int] | np.ndarray) -> None:
        """Adds sequences of these lengths, which lie in `values` end to end; errors of Growing."""
        ends = self._end + np.cumsum(lengths, dtype=np.int64)
        self._values.append(values)
        self._offsets.append(ends)
        self._end += len(values)

    def done(self) -> Ragged:
        """What there is; nothing can be added after."""
        return Ragged(self._values.array(), self._offsets.array())


def numbers(sequences: Iterable[Iterable[int]], dtype: DTypeLike) -> np.ndarray:
    """The numbers of all sequences, end to end."""
    return np.fromiter(itertools.chain.from_iterable(sequences), dtype)
