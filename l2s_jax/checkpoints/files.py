"""Checkpoint directories: a config.json and safetensors files, read lazily.

Nothing is ever unpickled. Errors are ValueErrors of one line that name the file.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Sequence
from typing import Any, Protocol

import ml_dtypes  # noqa: F401  (teaches NumPy the name "bfloat16", which safetensors asks it for)
import numpy as np
import safetensors

from l2s_jax import sealed
from l2s_jax.copies import local
from l2s_jax.files import (
    is_file,
    listed_names,
    read_json,
    signatures,
)
from l2s_jax.gguf_file import is_gguf
from l2s_jax.hub import find

_MAPPED_BYTES = 1 << 27

Index = tuple[slice, ...]  # of each axis from where to where, without steps

FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")


def listed(marked: Sequence[str], limit: int = 8) -> str:
    """Joins marked names for an error of one line, the first `limit` of them."""
    more = f" and {len(marked) - limit} more" if len(marked) > limit else ""
    return ", ".join(marked[:limit]) + more


def _weight_map(index_path: str) -> dict[str, str]:
    """Tensor name -> file name, from a model.safetensors.index.json."""
    weight_map = read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index_path}: expected an object weight_map of tensor name to file name")
    for key, name in weight_map.items():
        if not isinstance(name, str) or os.path.basename(name) != name or not name:
            raise ValueError(f"{index_path}: {key}: {name!r} is not the name of a file beside it")
    return weight_map


def _no_weights(directory: str, stem: str) -> ValueError:
    pickles = sorted(
        name for name in listed_names(directory) if name.endswith((".bin", ".pt", ".pth", ".ckpt"))
    )
    if pickles:
        return ValueError(
            f"{os.path.join(directory, pickles[0])}: pickled weights are not read; save the model "
            "as safetensors first (save_pretrained of a recent transformers does)"
        )
    return ValueError(f"{directory}: no {stem}.safetensors or {stem}.safetensors.index.json")


def _single_path(directory: str, stem: str) -> str:
    return os.path.join(directory, f"{stem}.safetensors")


def _index_path(directory: str, stem: str) -> str:
    return os.path.join(directory, f"{stem}.safetensors.index.json")


class Tensors(Protocol):
    """Named tensors that are read in parts; `TensorFiles` and `GgufTensors` are these.

    Attributes:
      source: the file that lists them.
      keys: their names.
    """

    source: str
    keys: frozenset[str]

    def file(self, key: str) -> str:
        """Path of the file that holds `key`."""
        ...

    def holds(self, key: str) -> bool:
        """Whether a tensor that is listed is there."""
        ...

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        ...

    def dtype(self, key: str) -> str:
        """Its type as the file's format names it."""
        ...

    def read(self, key: str, index: Index | None = None) -> np.ndarray:
        """A tensor of floats, or the part of it at `index`."""
        ...


class TensorFiles:
    """The tensors of `stem`.safetensors, or of the shards that its index names.

    A file is opened when a tensor of it is first asked for. Use as a context manager. `source` is
    the file that lists the tensors; `keys` their names.
    """

    def __init__(self, directory: str, stem: str) -> None:
        single = _single_path(directory, stem)
        index = _index_path(directory, stem)
        self._open: dict[str, Any] = {}
        self._mapped = 0  # bytes read through the open files
        self._expected: dict[str, set[str]] = {}
        self._absent: set[str] = set()  # tensors that the index lists, and its files lack
        if is_file(single):
            self.source = single
            self._files = dict.fromkeys(self._opened(single).keys(), single)
        elif is_file(index):
            self.source = index
            self._files = {
                key: os.path.join(directory, name) for key, name in _weight_map(index).items()
            }
            for key, file in self._files.items():
                self._expected.setdefault(file, set()).add(key)
        else:
            raise _no_weights(directory, stem)
        self.keys = frozenset(self._files)

    def __enter__(self) -> TensorFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def _close(self) -> None:
        while self._open:
            self._open.popitem()[1].__exit__(None, None, None)
        self._mapped = 0

    def _opened(self, file: str) -> Any:
        if file in self._open:
            return self._open[file]
        try:
            handle = safetensors.safe_open(local(file), framework="np").__enter__()
        except FileNotFoundError:
            raise ValueError(f"{file}: no such file, but {self.source} names it") from None
        except (OSError, safetensors.SafetensorError) as error:
            raise ValueError(f"{file}: not a whole safetensors file: {error}") from None
        self._open[file] = handle
        if (expected := self._expected.pop(file, None)) is not None:
            found = set(handle.keys())
            self._absent |= expected - found
            if unlisted := sorted(found - self._files.keys()):
                raise self._differs(file, [f"+ {key}" for key in unlisted])
        return handle

    def _differs(self, file: str, marked: Sequence[str]) -> ValueError:
        return ValueError(f"{file}: differs from {self.source}: {listed(marked)}")

    def _slice(self, key: str) -> Any:
        file = self._files[key]
        handle = self._opened(file)
        if key in self._absent:
            absent = sorted(k for k in self._absent if self._files[k] == file)
            raise self._differs(file, [f"- {k}" for k in absent])
        return handle.get_slice(key)

    def holds(self, key: str) -> bool:
        """Whether a tensor that is listed is there."""
        self._opened(self._files[key])
        return key not in self._absent

    def file(self, key: str) -> str:
        """Path of the file that holds `key`."""
        return self._files[key]

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        return tuple(self._slice(key).get_shape())

    def dtype(self, key: str) -> str:
        """Dtype of a tensor as safetensors names it (F32, BF16, ...), without reading it."""
        return self._slice(key).get_dtype()

    def read(self, key: str, index: Index | None = None) -> np.ndarray:
        """A tensor, or the part of it at `index`, in the file's own dtype."""
        tensor = self._slice(key)
        if (dtype := tensor.get_dtype()) not in FLOAT_DTYPES:
            raise ValueError(
                f"{self._files[key]}: {key} is {dtype}, expected one of {', '.join(FLOAT_DTYPES)}"
            )
        if not index:
            part = self._opened(self._files[key]).get_tensor(key)
            self._mapped += part.nbytes
        else:
            part = tensor[index]
            # Of a row, what lies between the numbers that are asked for is read with them.
            row = math.prod(tensor.get_shape()[1:])
            self._mapped += len(part) * row * part.itemsize
        # The library maps files, and what was read of one stays in memory until it is closed.
        if self._mapped > _MAPPED_BYTES:
            self._close()
        return part


def hashed_files(directory: str) -> list[str]:
    """Paths of all files that loading `directory`, or a GGUF file, reads."""
    directory = find(directory)
    if is_gguf(directory):
        return [directory]
    stem = "params" if "format" in read_json(os.path.join(directory, "config.json")) else "model"
    names = ["config.json"]
    index = _index_path(directory, stem)
    if not is_file(_single_path(directory, stem)) and is_file(index):
        names += [os.path.basename(index), *sorted(set(_weight_map(index).values()))]
    else:
        names.append(f"{stem}.safetensors")
    return [os.path.join(directory, name) for name in names]


def check_hashes(directory: str) -> None:
    """Checks files that `hashed_files` gives against the hashes that they were written with.

    Process 0 reads them for all of a job, which ends where it finds an error; so it may be called
    by one process alone, too.

    Raises:
      ValueError: one is not what it was.
    """
    if hashes_here():
        sealed.check(*hashed_files(directory))


def hashes_here() -> bool:
    """Whether this process reads files for their hashes: of a job, process 0 does."""
    # Imported here: a look at a workdir doesn't wait for JAX.
    import jax

    from l2s_jax.cluster import distributed

    # Alone, a process need not have JAX look for devices.
    return not jax.distributed.is_initialized() or distributed.is_primary()


def content_hash(directory: str) -> str:
    """sha256 (hex) over the names, sizes and bytes of all files that loading `directory` reads.

    Of a GGUF file, which people name as they like, over its bytes alone. It is remembered, as
    sealed.py says.
    """
    paths = hashed_files(directory)
    try:
        facts = signatures(paths)
    except OSError as error:
        raise ValueError(f"{error.filename}: {error.strerror}") from None
    named, size = not is_gguf(directory), sum(size for _, size, _ in facts)
    return sealed.remembered([paths, facts, named], size, lambda: _hash_of(paths, named=named))


def _hash_of(paths: Sequence[str], *, named: bool) -> str:
    digest = hashlib.sha256()
    for path in paths:
        try:
            with open(local(path), "rb") as file:
                size = os.fstat(file.fileno()).st_size
                if named:
                    digest.update(f"{os.path.basename(path)}\0{size}\0".encode())
                while chunk := file.read(1 << 22):
                    digest.update(chunk)
        except OSError as error:
            raise ValueError(f"{path}: {error.strerror}") from None
    return digest.hexdigest()
