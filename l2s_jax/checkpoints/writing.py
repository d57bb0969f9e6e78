"""Checkpoint directories as they are written: a config.json, and safetensors in one or more files.

More than one have the names and the index that transformers gives them.
"""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import math
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import safetensors
from safetensors.numpy import save_file

from l2s_jax import sealed
from l2s_jax.files import (
    absolute,
    atomic_directory,
    is_bucket,
    is_file,
    is_folder,
    replacing,
    write_json,
)

# Of a file, from which on there are more; transformers long had the same.
MAX_SHARD_SIZE = "5GB"
_SETTINGS = "config.json"
_ITEM_BYTES = 4


class Unwritten(NamedTuple):
    """A tensor that is made when its turn comes, so that there are never two of all.

    make: gives it, float32 of that shape, whatever its strides.
    """

    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]


def write_directory(
    directory: str,
    config: Mapping[str, Any],
    tensors: Mapping[str, Unwritten],
    stem: str,
    max_shard_size: int | str = MAX_SHARD_SIZE,
) -> None:
    """Writes config.json and `stem`.safetensors; a reader never sees half of either.

    Tensors of more than `max_shard_size` (bytes, or as "5GB") go into several files, of which one
    at a time is in memory, with `stem`.safetensors.index.json. A new directory appears at once. In
    an existing one the old config.json goes first and the new one comes last, so that a write cut
    short leaves no directory that loads as something mixed. In a bucket nothing is written over.

    Raises:
      ValueError: there is a file in its place, or it cannot be written.
      FileExistsError: in a bucket, there is something in its place.
    """
    # Imported here: it takes a while, and who reads has no need of it.
    from huggingface_hub import split_state_dict_into_shards_factory

    directory = absolute(os.path.expanduser(directory))
    if os.path.exists(directory) and not os.path.isdir(directory):
        raise ValueError(f"{directory}: exists and is not a directory")
    if is_bucket(directory) and (is_file(directory) or is_folder(directory)):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), directory)
    split = split_state_dict_into_shards_factory(
        dict(tensors),
        get_storage_size=lambda tensor: _ITEM_BYTES * math.prod(tensor.shape),
        filename_pattern=f"{stem}{{suffix}}.safetensors",
        max_shard_size=max_shard_size,
    )
    index = f"{stem}.safetensors.index.json"
    names = [*split.filename_to_tensors, *([index] if split.is_sharded else [])]

    def write_weights(place: Callable[[str], str]) -> None:
        for name, keys in split.filename_to_tensors.items():
            try:
                _write_file(place(name), {key: tensors[key] for key in keys})
            except safetensors.SafetensorError as error:
                raise ValueError(f"{directory}: cannot be written: {error}") from None
        if split.is_sharded:
            content = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
            write_json(place(index), content, sort_keys=True)

    if is_bucket(directory) or not os.path.isdir(directory) or not os.listdir(directory):
        with (
            atomic_directory(directory) as temporary,
            sealed.writing(temporary, *names, _SETTINGS),
        ):
            write_weights(lambda name: os.path.join(temporary, name))
            write_json(os.path.join(temporary, _SETTINGS), config, sort_keys=True)
        return
    # A reader would take one file before those of an index.
    forms = (f"{stem}.safetensors", f"{stem}-*-of-*.safetensors", index)
    there = [name for form in forms for name in fnmatch.filter(os.listdir(directory), form)]
    gone = [name for name in there if name not in names]
    with sealed.writing(directory, *names, *gone, _SETTINGS):
        with contextlib.ExitStack() as stack:
            write_weights(
                lambda name: stack.enter_context(replacing(os.path.join(directory, name)))
            )
            for name in (_SETTINGS, *gone):
                with contextlib.suppress(FileNotFoundError):
                    os.remove(os.path.join(directory, name))
        write_json(os.path.join(directory, _SETTINGS), config, sort_keys=True)


def _write_file(path: str, tensors: Mapping[str, Unwritten]) -> None:
    # safetensors writes from the array's memory, whatever its strides.
    whole = {key: np.ascontiguousarray(tensor.make()) for key, tensor in tensors.items()}
    save_file(whole, path, metadata={"format": "pt"})
    umask = os.umask(0)
    os.umask(umask)
    os.chmod(path, 0o666 & ~umask)
