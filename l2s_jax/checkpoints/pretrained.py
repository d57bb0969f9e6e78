"""Checkpoints: Hugging Face directories <-> our parameters, our own format, and GGUF files.

`load` takes any kind. Reading needs no torch and unpickles nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, get_type_hints

import jax.numpy as jnp
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from l2s_jax.checkpoints import gpt2, gpt_neox, llama, t5
from l2s_jax.checkpoints.engine import (
    Family,
    Params,
    make_entries,
    matched,
    own_entries,
    param_shapes,
    write_tensors,
)
from l2s_jax.checkpoints.files import TensorFiles, content_hash, listed, write_directory
from l2s_jax.checkpoints.gguf import GgufTensors
from l2s_jax.checkpoints.reading import read_params
from l2s_jax.files import is_folder, read_json
from l2s_jax.gguf_file import is_gguf
from l2s_jax.hub import find
from l2s_jax.models.serving import float_dtype
from l2s_jax.models.stacking import stack_layers
from l2s_jax.models.vocabulary import without_vocabulary

__all__ = [
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

FORMAT = "l2s_jax"
# Of a model config: how programs compute, which no file says.
RUNTIME_FIELDS = ("dtype", "scan_layers", "remat", "vocabulary")
FAMILIES: tuple[Family, ...] = (t5.FAMILY, gpt2.FAMILY, gpt_neox.FAMILY, llama.FAMILY)


def family_of(config: Any) -> Family:
    """The family of a model config such as T5Config."""
    for family in FAMILIES:
        if isinstance(config, family.config_class):
            return family
    raise ValueError(f"no conversion for a {type(config).__name__}")


def _read_config(directory: str) -> tuple[dict[str, Any], str]:
    """(config.json's object, or a GGUF file's in its manner; the path for errors)."""
    if is_gguf(directory):
        return GgufTensors(directory).fields, directory
    if not is_folder(directory):
        raise ValueError(f"{directory}: not a directory")
    path = os.path.join(directory, "config.json")
    return read_json(path), path


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
    serve: bool = False,
    mesh: Mesh | None = None,
    scan_layers: bool = False,
) -> tuple[nn.Module, Params]:
    """(module, params) of a directory of either kind; see `load_hf`.

    Args:
      directory: what is read: a folder, a GGUF file, or a name on the hub (`hub.find`).
      dtype: the compute dtype of the module.
      serve: kernels are held in the compute dtype, as `serving.to_serve` would hold them.
      mesh: with one, params are global arrays that lie on it by the rules of sharding.py; each
        process reads the part that its own devices hold, and casts and places it array by array.
      scan_layers: layers are stacked (models/stacking.py), as the module then takes them.
    """
    return _load(directory, dtype, serve=serve, mesh=mesh, scan_layers=scan_layers)


def load_encoder(
    directory: str,
    *,
    layer: float = 0.0,
    dtype: Any = jnp.float32,
    serve: bool = False,
    mesh: Mesh | None = None,
    scan_layers: bool = False,
    entries: Sequence[str] | None = None,
) -> tuple[nn.Module, Params]:
    """As `load`, but only what encodes a prompt is read and held.

    An encoder-decoder gives its encoder. A decoder-only model gives its first `layer` layers, or
    that fraction of them if it is below 1, or all of them if it is 0. With `scan_layers`, they are
    stacked (models/stacking.py), as the module then takes them. Of all this only `entries` of the
    parameter tree, where they are given.
    """
    return _load(
        directory, dtype, layer=layer, serve=serve, mesh=mesh, scan_layers=scan_layers, kept=entries
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
    family = _native_family(fields, path) if native else _hf_family(fields, path)
    with tensors or TensorFiles(directory, "params" if native else "model") as files:
        config = _model_config(family, fields, files.keys, path, native)
        shapes = param_shapes(family.abstract_params(family.make_module(config)))
        entries = own_entries(shapes) if native else family.make_entries(config, list(shapes))
        yield family, config, files, entries, shapes, () if native else family.ignored


def _model_config(
    family: Family, fields: dict[str, Any], keys: frozenset[str], path: str, native: bool
) -> Any:
    try:
        if native:
            return config_from_native(fields, path)
        return family.config_from_hf(fields, keys, path)
    except ValueError as error:
        raise ValueError(str(error) if path in str(error) else f"{path}: {error}") from None


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
    family = _native_family(fields, path) if native else _hf_family(fields, path)
    return _model_config(family, fields, frozenset(["lm_head.weight"]), path, native)


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
    serve: bool = False,
    mesh: Mesh | None = None,
    scan_layers: bool = False,
    kept: Sequence[str] | None = None,
) -> tuple[nn.Module, Params]:
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
        params = read_params(
            files,
            entries,
            shapes,
            ignored=ignored,
            prefixes=prefixes,
            dtype_of=lambda path: float_dtype(path, config) if serve else jnp.float32,
            mesh=mesh,
            stacked=scan_layers,
        )
    return family.make_module(config), params


def _hf_family(fields: dict[str, Any], path: str) -> Family:
    model_type = fields.get("model_type")
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    known = ", ".join(name for family in FAMILIES for name in family.model_types)
    raise ValueError(f"{path}: model_type is {model_type!r}, expected one of {known}")


def _native_family(fields: dict[str, Any], path: str) -> Family:
    if fields.get("format") != FORMAT:
        raise ValueError(f"{path}: format is {fields.get('format')!r}, expected {FORMAT!r}")
    for family in FAMILIES:
        if family.name == fields.get("family"):
            return family
    known = ", ".join(family.name for family in FAMILIES)
    raise ValueError(f"{path}: family is {fields.get('family')!r}, expected one of {known}")


def save_hf(config: Any, params: Params, directory: str) -> None:
    """Writes config.json and model.safetensors (float32), as transformers reads them."""
    family, config = family_of(config), without_vocabulary(config)
    shapes = param_shapes(family.abstract_params(family.make_module(config)))
    entries = make_entries(family.make_rules(config), list(shapes))
    tensors = write_tensors(params, entries, shapes)
    write_directory(directory, family.config_to_hf(config), tensors, "model")


def config_to_native(config: Any) -> dict[str, Any]:
    """A model config as a JSON object: its family and its fields but those of RUNTIME_FIELDS."""
    fields = dataclasses.asdict(without_vocabulary(config))
    for name in RUNTIME_FIELDS:
        del fields[name]
    return {"format": FORMAT, "family": family_of(config).name, **fields}


def config_from_native(fields: dict[str, Any], path: str) -> Any:
    """What `config_to_native` made of a config; `path` is named in errors."""
    family = _native_family(fields, path)
    defaults = {f.name: f.default for f in dataclasses.fields(family.config_class)}
    for name in RUNTIME_FIELDS:
        del defaults[name]
    given = {name: value for name, value in fields.items() if name not in ("format", "family")}
    marked = [f"- {name}" for name in sorted(defaults.keys() - given.keys())]
    marked += [f"+ {name}" for name in sorted(given.keys() - defaults.keys())]
    if marked:
        raise ValueError(f"{path}: fields missing (-) or unknown (+): {listed(marked)}")
    for name, value in given.items():
        if dataclasses.is_dataclass(defaults[name]) and isinstance(value, dict):
            try:
                given[name] = value = _nested(type(defaults[name]), value)
            except (TypeError, ValueError) as error:
                raise ValueError(f"{path}: {name}: {error}") from None
        if type(value) is not type(defaults[name]):
            expected = type(defaults[name]).__name__
            raise ValueError(f"{path}: {name} is {value!r}, expected a value of type {expected}")
    try:
        return family.config_class(**given)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _nested(kind: type, fields: dict[str, Any]) -> Any:
    """A config within a config; a number may be written without its fraction."""
    made = kind(**fields)
    hints = get_type_hints(kind)
    for name, value in fields.items():
        if type(value) is not hints[name] and (type(value), hints[name]) != (int, float):
            expected = hints[name].__name__
            raise ValueError(f"{name} is {value!r}, expected a value of type {expected}")
    return made


def save_native(config: Any, params: Params, directory: str) -> None:
    """Writes config.json (`config_to_native`) and params.safetensors (float32)."""
    family, config = family_of(config), without_vocabulary(config)
    shapes = param_shapes(family.abstract_params(family.make_module(config)))
    tensors = write_tensors(params, own_entries(shapes), shapes)
    write_directory(directory, config_to_native(config), tensors, "params")
