"""Tensors of files -> our parameters: on the host, or each part where a mesh wants it.

A process reads what its own devices hold and nothing else, a block at a time, and turns it into the
dtype in which it is held on the way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, Sharding

from l2s_jax.checkpoints.engine import SAME, TRANSPOSED, Entry, Params, Shape, matched
from l2s_jax.checkpoints.files import Index, Tensors
from l2s_jax.cluster import sharding
from l2s_jax.models.stacking import stack_layers, stacked_path

_BLOCK_BYTES = 1 << 24
_STRIP = 64  # rows or columns
_ALIGNMENT = 64  # bytes
# Of dtypes of 16 bits, those that are all 1 in what is not finite.
_EXPONENTS = {
    np.dtype(np.float16): np.uint16(0x7C00),
    np.dtype(ml_dtypes.bfloat16): np.uint16(0x7F80),
}


class _Part(NamedTuple):
    """What some devices hold of a parameter, and where it is read to."""

    index: Index
    array: np.ndarray
    devices: list[Any]

    def of_layer(self, layer: int) -> _Part:
        """Of a stacked parameter; no axis of a mesh splits the layers."""
        return self._replace(index=self.index[1:], array=self.array[layer])


class _Tensor(NamedTuple):
    """A tensor of the files under all its names, and the layer it belongs to where that matters."""

    entry: Entry
    names: list[str]
    layer: int | None


def read_params(
    files: Tensors,
    entries: Sequence[Entry],
    shapes: Mapping[str, Shape],
    *,
    ignored: Sequence[str] = (),
    prefixes: Sequence[str] | None = None,
    dtype_of: Callable[[str], Any] | None = None,
    hold: Callable[[str, Any], Any] | None = None,
    mesh: Mesh | None = None,
    stacked: bool = False,
) -> Params:
    """The parameter tree; with `prefixes`, only paths that start with one.

    Names and shapes are all checked before the first tensor is read. Tensors held under several
    names must be equal; with `prefixes` only the first is read, since the others may lie in shards
    that are not needed.

    Args:
      dtype_of: path -> the dtype in which the parameter is read; None: float32.
      hold: (path, parameter) -> what is held of it, before the next one is read; None: itself.
      mesh: without one, arrays are numpy's; else they are global, and lie where the rules of
        sharding.py place them. All processes call alike, each reads what its devices hold.
      stacked: the layers' parameters come as `stack_layers` would make them, of the layers at once.

    Raises:
      ValueError: names, shapes or dtypes that don't fit, or parameters that the mesh can't divide.
    """
    held = matched(files, entries, shapes, ignored=ignored, prefixes=prefixes)
    tree = unflatten_dict(
        {
            path: jax.ShapeDtypeStruct(shapes[path], dtype_of(path) if dtype_of else np.float32)
            for entry, _ in held
            for path in entry.parameters
        },
        sep="/",
    )
    # Parameters that are read together, and the tensors that they are read of: one tensor may hold
    # several parameters, and a stacked parameter is read of one tensor per layer.
    groups: dict[tuple[str, ...], list[_Tensor]] = {}
    for entry, names in held:
        places = [stacked_path(path) if stacked else (path, None) for path in entry.parameters]
        paths, (layer, *_) = zip(*places, strict=True)
        groups.setdefault(paths, []).append(_Tensor(entry, names, layer))
    if stacked:
        tree = stack_layers(tree)
    leaves: dict[str, Any] = flatten_dict(tree, sep="/")
    where: dict[str, Any] = dict.fromkeys(leaves)
    if mesh is not None:
        where = flatten_dict(sharding.parameter_shardings(tree, mesh), sep="/")
    flat: dict[str, Any] = {}
    for paths, tensors in groups.items():
        parts = {path: _parts(leaves[path], where[path]) for path in paths}
        for tensor in tensors:
            _read(files, tensor, list(parts.values()))
        for path in paths:
            whole = _placed(leaves[path], where[path], parts.pop(path))
            flat[path] = hold(path, whole) if hold else whole
    return unflatten_dict(flat, sep="/")


def _parts(leaf: jax.ShapeDtypeStruct, where: Sharding | None) -> list[_Part]:
    """What this process holds of a parameter, each part once, with arrays to fill."""
    if where is None:
        indices: Mapping[Any, Any] = {None: (slice(None),) * len(leaf.shape)}
    else:
        indices = where.addressable_devices_indices_map(leaf.shape)
    parts: dict[Shape, _Part] = {}
    for device, index in indices.items():
        bounds = [axis.indices(size)[:2] for axis, size in zip(index, leaf.shape, strict=True)]
        if (key := tuple(start for start, _ in bounds)) not in parts:
            array = _aligned(tuple(stop - start for start, stop in bounds), leaf.dtype)
            parts[key] = _Part(tuple(slice(*one) for one in bounds), array, [])
        parts[key].devices.append(device)
    return list(parts.values())


def _aligned(shape: Shape, dtype: Any) -> np.ndarray:
    """An array to fill that a CPU device takes as it is: one that begins elsewhere it copies."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def _placed(
    leaf: jax.ShapeDtypeStruct, where: Sharding | None, parts: Sequence[_Part]
) -> np.ndarray | jax.Array:
    """The parameter of which all parts have been read."""
    if where is None:
        return parts[0].array
    arrays = [jax.device_put(part.array, device) for part in parts for device in part.devices]
    # Until it has arrived, it is in host memory too.
    jax.block_until_ready(arrays)
    return jax.make_array_from_single_device_arrays(leaf.shape, where, arrays)


def _read(files: Tensors, tensor: _Tensor, parameters: Sequence[Sequence[_Part]]) -> None:
    """Fills the parts of the parameters that a tensor holds, or its layer of each."""
    entry, names, layer = tensor
    if layer is not None:
        parameters = [[part.of_layer(layer) for part in parts] for parts in parameters]
    if entry.transform not in (SAME, TRANSPOSED):
        wholes = entry.transform.to_ours(_read_same(files, names))
        for whole, parts in zip(wholes, parameters, strict=True):
            for part in parts:
                _store(whole[part.index], part.array)
        return
    turn = entry.transform is TRANSPOSED
    for part in parameters[0]:
        index, target = part.index, part.array
        if turn:
            index, target = index[::-1], target.T
        for rows, block in _blocks(files.shape(names[0]), index):
            found = _read_same(files, names, block)
            if turn:
                _store(found.T, target[rows].T)
            else:
                _store(found, target[rows])


def _blocks(shape: Shape, index: Index) -> Iterator[tuple[slice, Index]]:
    """Parts of a tensor's part at `index`: (rows within that part, index within the tensor)."""
    first, *others = index
    step = max(_BLOCK_BYTES // (4 * math.prod(shape[1:])) // _STRIP, 1) * _STRIP
    for start in range(first.start, first.stop, step):
        stop = min(start + step, first.stop)
        yield slice(start - first.start, stop - first.start), (slice(start, stop), *others)


def _read_same(files: Tensors, names: Sequence[str], index: Index | None = None) -> np.ndarray:
    """A tensor, or the part at `index`, once it is finite, and the same under all names."""
    first, *others = names
    tensor = files.read(first, index)
    if not _is_finite(tensor):
        raise ValueError(
            f"{files.file(first)}: {first} has numbers that are not finite; expected the weights "
            "of a model whose training went well"
        )
    for other in others:
        found = files.read(other, index)
        if not np.array_equal(found.astype(np.float32), tensor.astype(np.float32)):
            raise ValueError(f"{files.file(other)}: {other} differs from {first}")
    return tensor


def _is_finite(tensor: np.ndarray) -> bool:
    """Whether all numbers are finite, at the speed of memory: `np.isfinite` is slow in 16 bits."""
    if not tensor.size:
        return True
    if tensor.dtype in _EXPONENTS:
        exponent = _EXPONENTS[tensor.dtype]
        return bool((tensor.view(np.uint16) & exponent).max() < exponent)
    # Both are NaN where a number is.
    return bool(np.isfinite([float(tensor.min()), float(tensor.max())]).all())


def _store(source: np.ndarray, target: np.ndarray) -> None:
    """target[...] = source; a large transposed matrix by strips, in less than half the time."""
    if source.dtype != target.dtype:
        source = source.astype(np.float32, copy=False).astype(target.dtype, copy=False)
    if source.ndim != 2 or source.flags.c_contiguous:
        target[...] = source
        return
    for start in range(0, source.shape[1], _STRIP):
        target[:, start : start + _STRIP] = source[:, start : start + _STRIP]
