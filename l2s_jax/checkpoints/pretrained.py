"""Checkpoints: Hugging Face directories <-> our parameters, our own format, and GGUF files.

`load` takes any kind. Reading needs no torch and unpickles nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from l2s_jax.checkpoints.configs import (
    FAMILIES,
    FORMAT,
    RUNTIME_FIELDS,
    config_from_native,
    config_to_native,
    family_of,
    hf_family,
    model_config,
    native_family,
)
from l2s_jax.checkpoints.engine import (
    Params,
    make_entries,
    matched,
    own_entries,
    param_shapes,
    write_tensors,
)
from l2s_jax.checkpoints.files import (
    TensorFiles,
    Tensors,
    check_hashes,
    content_hash,
)
from l2s_jax.checkpoints.gguf import GgufTensors
from l2s_jax.checkpoints.reading import read_params
from l2s_jax.checkpoints.writing import MAX_SHARD_SIZE, write_directory
from l2s_jax.files import is_folder, read_json
from l2s_jax.gguf_file import is_gguf
from l2s_jax.hub import find
from l2s_jax.models.serving import check_weights, float_dtype, hold, lay_out
from l2s_jax.models.stacking import stack_layers
from l2s_jax.models.vocabulary import without_vocabulary

__all__ = [
    "FAMILIES",
    "FORMAT",
    "RUNTIME_FIELDS",
    "abstract_encoder",
    "config_from_native",
    "config_to_native",
    "content_hash",
    "encodes_only",
    "family_of",
    "inspect",
    "load",
    "load_encoder",
    "load_hf",
    "load_native",
    "read_config",
    "save_hf",
    "save_native",
]


def _read_config(directory: str) -> tuple[dict[str, Any], str]:
    """(config.json's object, or a GGUF file's in its manner; the path for errors)."""
    if is_gguf(directory):
        return GgufTensors(directory).fields, directory
    path = os.path.join(directory, "config.json")
    try:
        return read_json(path), path
    except ValueError:
        if not is_folder(directory):
            raise ValueError(f"{directory}: not a directory") from None
        raise


def load_hf(directory: str, *, dtype: Any = jnp.float32) -> tuple[nn.Module, Params]:
    """(module, params) of a Hugging Face directory: config.json and safetensors, whole or sharded.

    Or of a GGUF file, whose numbers are dequantized, or of a name on the hub. Params are float32
    numpy arrays, whatever the file's dtype; `dtype` is the compute dtype of the module. ValueError,
    in one line, names the file that cannot be read or does not fit.
    """
    return _load(directory, dtype, format="hf")


def load_native(directory: str, *, dtype: Any = jnp.float32) -> tuple[nn.Module, Params]:
    """(module, params) of a directory that `save_native` wrote; see `load_hf`."""
    return _load(directory, dtype, format=FORMAT)


def load(
    directory: str,
    *,
    dtype: Any = jnp.float32,
    weights: str = "",
    mesh: Mesh | None = None,
    scan_layers: bool = False,
) -> tuple[nn.Module, Params]:
    """(module, params) of a directory of either kind; see `load_hf`.

    Args:
      directory: what is read: a folder, a GGUF file, or a name on the hub (`hub.find`).
      dtype: the compute dtype of the module.
      weights: they are held as a Generator on the mesh holds them; "": in float32.
      mesh: with one, params are global arrays that lie on it by the rules of sharding.py; each
        process reads the part that its own devices hold, and casts and places it array by array.
      scan_layers: layers are stacked (models/stacking.py), as the module then takes them.
    """
    return _load(directory, dtype, weights=weights, mesh=mesh, scan_layers=scan_layers)


def load_encoder(
    directory: str,
    *,
    layer: float = 0.0,
    dtype: Any = jnp.float32,
    weights: str = "",
    mesh: Mesh | None = None,
    scan_layers: bool = False,
    entries: Sequence[str] | None = None,
    is_known: bool = False,
) -> tuple[nn.Module, Params]:
    """As `load`, but only what encodes a prompt is read and held.

    An encoder-decoder gives its encoder. A decoder-only model gives its first `layer` layers, or
    that fraction of them if it is below 1, or all of them if it is 0. With `scan_layers`, they are
    stacked (models/stacking.py), as the module then takes them. Of all this only `entries` of the
    parameter tree, where they are given. `is_known`: the caller compares the directory's content
    hash, and no other is looked at.
    """
    return _load(
        directory,
        dtype,
        layer=layer,
        weights=weights,
        mesh=mesh,
        scan_layers=scan_layers,
        kept=entries,
        is_known=is_known,
    )


class Parameter(NamedTuple):
    """A parameter of ours, and the tensor of a file that holds it."""

    path: str
    shape: tuple[int, ...]
    dtype: str  # in the file, as safetensors names it
    key: str


def inspect(directory: str) -> list[Parameter]:
    """What `load` would read of a directory, all names and shapes checked, no weight read."""
    with opened(directory) as (_, _, files, entries, shapes, ignored):
        return [
            Parameter(path, shapes[path], files.dtype(first), first)
            for entry, (first, *_) in matched(files, entries, shapes, ignored=ignored)
            for path in entry.parameters
        ]


@contextlib.contextmanager
def opened(directory: str, format: str | None = None) -> Iterator[tuple]:
    """(family, config, files, entries, shapes, ignored keys) of a directory of either kind."""
    directory = find(directory)
    if is_gguf(directory):
        tensors = GgufTensors(directory)
        fields, path = tensors.fields, directory
    else:
        fields, path = _read_config(directory)
        tensors = None
    native = "format" in fields if format is None else format == FORMAT
    family = native_family(fields, path) if native else hf_family(fields, path)
    with tensors or TensorFiles(directory, "params" if native else "model") as files:
        config = model_config(family, fields, files.keys, path, native)
        check_layers(config, files, path)
        shapes = param_shapes(family.abstract_params(family.make_module(config)))
        entries = own_entries(shapes) if native else family.make_entries(config, list(shapes))
        yield family, config, files, entries, shapes, () if native else family.ignored


def check_layers(config: Any, files: Tensors, path: str, *, stack: int = 0) -> None:
    """Checks that files can hold so many layers, before there is an entry for each parameter.

    `stack` is how many there are beside a model's own; `path` is named in errors.

    Raises:
      ValueError: there are more layers than tensors.
    """
    names = ("num_layers", "num_encoder_layers", "num_decoder_layers")
    counts = {name: getattr(config, name, 0) for name in names} | {"stack": stack}
    for name, count in counts.items():
        if count > len(files.keys):
            raise ValueError(
                f"{path}: {count} layers ({name}), but {files.source} has only "
                f"{len(files.keys)} tensors"
            )


def encodes_only(directory: str) -> bool:
    """Whether a directory holds what encodes a prompt, and lacks what answers it.

    It is so of a T5's encoder saved alone, and of a decoder-only model's body without a head.

    Raises:
      ValueError: it holds neither, or what doesn't fit.
    """
    with opened(directory) as (family, _, files, entries, shapes, ignored):
        try:
            matched(files, entries, shapes, ignored=ignored)
        except ValueError:
            answering = [e for e in entries if e.parameters[0].startswith(family.answering)]
            if any(key in files.keys for e in answering for key in (e.key, *e.aliases)):
                raise
            encoding = [e for e in entries if e not in answering]
            matched(files, encoding, shapes, ignored=ignored)
            return True
        return False


def read_config(directory: str) -> Any:
    """The config of a directory's model, from config.json alone: no weights need be there.

    A head that may be tied or not, which otherwise the weights say, counts as its own matrix.
    """
    fields, path = _read_config(find(directory, "config"))
    native = "format" in fields
    family = native_family(fields, path) if native else hf_family(fields, path)
    return model_config(family, fields, frozenset(["lm_head.weight"]), path, native)


def abstract_encoder(config: Any, layer: float = 0.0) -> tuple[Any, Params]:
    """What `load_encoder` gives of a model: its config, and shapes and dtypes of its parameters.

    The layers are stacked where the config has `scan_layers`.
    """
    family = family_of(config)
    shapes = family.abstract_params(family.make_module(config))
    config, prefixes = family.encoder_parameters(config, layer)
    kept = {
        path: leaf
        for path, leaf in flatten_dict(shapes, sep="/").items()
        if path.startswith(tuple(prefixes))
    }
    params = unflatten_dict(kept, sep="/")
    return config, stack_layers(params) if config.scan_layers else params


def _load(
    directory: str,
    dtype: Any,
    *,
    format: str | None = None,
    layer: float | None = None,
    weights: str = "",
    mesh: Mesh | None = None,
    scan_layers: bool = False,
    kept: Sequence[str] | None = None,
    is_known: bool = False,
) -> tuple[nn.Module, Params]:
    if weights:
        check_weights(weights)
    if not is_known:
        check_hashes(directory)
    with opened(directory, format) as (family, config, files, entries, shapes, ignored):
        prefixes = None
        if layer is not None:
            try:
                config, prefixes = family.encoder_parameters(config, layer)
            except ValueError as error:
                where = directory if is_gguf(directory) else f"{directory}/config.json"
                raise ValueError(f"{where}: {error}") from None
            if kept is not None:
                prefixes = tuple(f"{name}/" for name in kept)
        config = dataclasses.replace(config, dtype=dtype, scan_layers=scan_layers)
        held: dict[str, Any] = {"config": config, "encodes": layer is not None}

        def serve(path: str, leaf: Any) -> Any:
            return lay_out(path, hold(path, leaf, weights=weights, **held), mesh)

        params = read_params(
            files,
            entries,
            shapes,
            ignored=ignored,
            prefixes=prefixes,
            # Floats are read in their dtype; int8 is made of float32, of one parameter at a time.
            dtype_of=functools.partial(float_dtype, **held) if weights == "float" else None,
            hold=serve if weights else None,
            mesh=mesh,
            stacked=scan_layers,
        )
    return family.make_module(config), params


def save_hf(
    config: Any, params: Params, directory: str, *, max_shard_size: int | str = MAX_SHARD_SIZE
) -> None:
    """Writes config.json and model.safetensors (float32), as transformers reads them.

    More than `max_shard_size`, in bytes or as "5GB", is split into several files with an index.
    """
    family, config = family_of(config), without_vocabulary(config)
    shapes = param_shapes(family.abstract_params(family.make_module(config)))
    entries = make_entries(family.make_rules(config), list(shapes))
    tensors = write_tensors(params, entries, shapes)
    write_directory(directory, family.config_to_hf(config), tensors, "model", max_shard_size)


def save_native(
    config: Any, params: Params, directory: str, *, max_shard_size: int | str = MAX_SHARD_SIZE
) -> None:
    """Writes config.json (`config_to_native`) and params.safetensors (float32); see `save_hf`."""
    family, config = family_of(config), without_vocabulary(config)
    shapes = param_shapes(family.abstract_params(family.make_module(config)))
    tensors = write_tensors(params, own_entries(shapes), shapes)
    write_directory(directory, config_to_native(config), tensors, "params", max_shard_size)
