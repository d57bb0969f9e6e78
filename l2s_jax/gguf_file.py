"""The head of a GGUF file, llama.cpp's format: its metadata, and where its tensors lie.

The `gguf` package reads one too, but takes seconds for a vocabulary's strings; it is used for what
the numbers mean. Layout: github.com/ggml-org/ggml, docs/gguf.md.
"""

from __future__ import annotations

import dataclasses
import mmap
import struct
from collections.abc import Iterator
from typing import Any

SUFFIX = ".gguf"
_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
_MOST_AXES = 8
# struct's letters for the other types of a value.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q"}
_SCALARS[12] = "d"


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """One tensor: its shape, slowest axis first, its type by number, its offset in the file."""

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int


@dataclasses.dataclass(frozen=True)
class Header:
    """What a file says of itself; of arrays of strings only those that were asked for."""

    path: str
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]
    file_size: int

    def get(self, key: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        """A value of the metadata, or `default` where there is none.

        Raises:
          ValueError: it is of another type.
        """
        value = self.metadata.get(key, default)
        if value is not default and (
            not isinstance(value, kind) or (isinstance(value, bool) and kind is int)
        ):
            raise ValueError(f"{self.path}: {key} is {value!r:.60}, of another type than expected")
        return value

    def string(self, key: str, default: str = "") -> str:
        """A text of the metadata; see `get`."""
        return self.get(key, str, default)

    def integer(self, key: str, default: int | None = None) -> int | None:
        """A whole number of the metadata; see `get`."""
        return self.get(key, int, default)

    def number(self, key: str, default: float | None = None) -> float | None:
        """A number of the metadata; see `get`."""
        return self.get(key, (int, float), default)


def is_gguf(path: str) -> bool:
    """Whether a path is that of a GGUF file, by its name."""
    return path.endswith(SUFFIX)


def read_header(path: str, strings: bool = False) -> Header:
    """Reads a file's head; arrays of strings, such as a vocabulary, only with `strings`.

    Raises:
      ValueError: it can't be read, is of another format, is cut short, or is a part of a model.
    """
    try:
        with (
            open(path, "rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            return _Reader(path, data, strings).header()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, struct.error, IndexError, RecursionError) as error:
        if isinstance(error, ValueError) and str(error).startswith(f"{path}: "):
            raise
        raise ValueError(
            f"{path}: not a whole GGUF file: its head is cut short or damaged"
        ) from None


class _Reader:
    """Goes through a head from its first byte to its last."""

    def __init__(self, path: str, data: mmap.mmap, strings: bool):
        self._path, self._data, self._strings, self._at = path, data, strings, 0

    def header(self) -> Header:
        if self._data[:4] != _MAGIC:
            raise ValueError(
                f"{self._path}: not a GGUF file: it doesn't begin with the letters GGUF"
            )
        self._at = 4
        version, tensor_count, count = self._take("I", "Q", "Q")
        if version not in _VERSIONS:
            raise ValueError(
                f"{self._path}: GGUF version {version}, expected one of {_VERSIONS}, little-endian"
            )
        metadata = {}
        for _ in range(count):
            key = self._string()
            metadata[key] = self._value(*self._take("I"))
        parts, alignment = metadata.get("split.count", 0), metadata.get("general.alignment", 32)
        for name, value, low in (("split.count", parts, 0), ("general.alignment", alignment, 1)):
            if type(value) is not int or not low <= value < 1 << 32:
                raise ValueError(f"{self._path}: {name} is {value!r:.60}, expected a whole number")
        if parts > 1:
            raise ValueError(
                f"{self._path}: one of {parts} parts of a model; expected a whole one "
                "(llama-gguf-split --merge makes one)"
            )
        tensors = list(self._tensors(tensor_count))
        start = -(-self._at // alignment) * alignment
        placed = {t.name: dataclasses.replace(t, offset=start + t.offset) for t in tensors}
        if len(placed) < len(tensors):
            raise ValueError(f"{self._path}: two tensors of one name")
        return Header(self._path, metadata, placed, len(self._data))

    def _tensors(self, count: int) -> Iterator[TensorInfo]:
        for _ in range(count):
            name, (axes,) = self._string(), self._take("I")
            if axes > _MOST_AXES:
                raise ValueError(f"{self._path}: a tensor of {axes} axes")
            *sizes, kind, offset = self._take(*"Q" * axes, "I", "Q")
            yield TensorInfo(name, tuple(reversed(sizes)), kind, offset)

    def _take(self, *letters: str) -> tuple[Any, ...]:
        layout = "<" + "".join(letters)
        values = struct.unpack_from(layout, self._data, self._at)
        self._at += struct.calcsize(layout)
        return values

    def _bytes(self) -> bytes:
        (length,) = self._take("Q")
        start, self._at = self._at, self._at + length
        if self._at > len(self._data):
            raise IndexError("a string ends after the file")
        return self._data[start : self._at]

    def _string(self) -> str:
        return self._bytes().decode()

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._take(self._letter(kind))[0]
        inner, count = self._take("I", "Q")
        if inner == _STRING:
            return self._texts(count)
        if count > len(self._data):
            raise IndexError("an array ends after the file")
        if inner == _ARRAY:
            return [self._value(inner) for _ in range(count)]
        return list(self._take(f"{count}{self._letter(inner)}"))

    def _texts(self, count: int) -> list[str] | None:
        """An array of strings; None where they aren't asked for."""
        if self._strings:
            # A vocabulary may hold what is no character: llama.cpp reads such bytes as they are.
            return [self._bytes().decode(errors="replace") for _ in range(count)]
        for _ in range(count):
            self._bytes()
        return None

    def _letter(self, kind: int) -> str:
        if kind not in _SCALARS:
            raise ValueError(f"{self._path}: a value of the unknown type {kind} in its metadata")
        return _SCALARS[kind]
