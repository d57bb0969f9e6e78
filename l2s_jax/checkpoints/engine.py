"""Conversion by a table of rules, in both directions, for any model family.

A `Rule` ties one Hugging Face tensor to the parameters of ours that it holds; a `Family` is a table
of rules with its config. The engine checks that the table, the parameters and the file cover one
another exactly: every tensor matched by one rule, every parameter filled once.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict

from l2s_jax.checkpoints.files import Tensors, listed
from l2s_jax.checkpoints.writing import Unwritten
from l2s_jax.models.stacking import unstack_layers

Params = Mapping[str, Any]
Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Transform:
    """A Hugging Face tensor -> our arrays, and the inverse; both only move numbers."""

    to_ours: Callable[[np.ndarray], tuple[np.ndarray, ...]]
    to_hf: Callable[..., np.ndarray]


SAME = Transform(lambda x: (x,), lambda x: x)
TRANSPOSED = Transform(lambda x: (x.T,), lambda x: x.T)


@dataclasses.dataclass(frozen=True)
class Rule:
    """`key` (Hugging Face's name) <-> `parameters` (our '/'-joined paths).

    Both may hold fields such as {layer}, which stand for a number and are the same on both sides.
    `aliases` are further keys under which a file may hold the same tensor.
    """

    key: str
    parameters: tuple[str, ...]
    transform: Transform = SAME
    aliases: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Family:
    """Everything that conversion needs to know of one model family."""

    name: str
    model_types: tuple[str, ...]  # values of config.json's model_type
    config_class: type
    make_module: Callable[[Any], nn.Module]
    make_rules: Callable[[Any], Sequence[Rule]]
    # (config.json's object, the tensors' names, the path for errors) -> config
    config_from_hf: Callable[[Mapping[str, Any], frozenset[str], str], Any]
    config_to_hf: Callable[[Any], dict[str, Any]]
    # What `module.apply` takes: token ids and a mask over them ("ids", "mask"); encoder-decoders
    # take the decoder's ids as well.
    inputs: tuple[str, ...]
    # (config, layer as in config.llm.layer) -> (the config of what encodes a prompt, the path
    # prefixes of its parameters)
    encoder_parameters: Callable[[Any, float], tuple[Any, tuple[str, ...]]]
    ignored_keys: tuple[str, ...] = ()  # keys that a file may hold and that mean nothing
    # What the names of all but the head begin with, and leave out where the body was saved alone.
    body: str = ""
    # Path prefixes of what answers and doesn't encode, which an encoder's checkpoint lacks.
    answering: tuple[str, ...] = ("head/",)

    def make_entries(self, config: Any, paths: Sequence[str]) -> list[Entry]:
        """`make_entries` of the family's rules, under the names of the whole and of the body."""
        return [
            _also_bare(entry, self.body) for entry in make_entries(self.make_rules(config), paths)
        ]

    @property
    def ignored(self) -> tuple[str, ...]:
        """`ignored_keys` under both kinds of names."""
        return tuple(name for key in self.ignored_keys for name in (key, *_bare(key, self.body)))

    def abstract_params(self, module: nn.Module) -> Params:
        """Shapes and dtypes of a module's parameters (ShapeDtypeStructs), without making any.

        Layers are not stacked, whatever the module's `scan_layers`.
        """
        return unstack_layers(_stacked_params(self, module.config))


@functools.lru_cache(maxsize=64)
def _stacked_params(family: Family, config: Any) -> Params:
    """One layer is traced for all."""
    module = family.make_module(dataclasses.replace(config, scan_layers=True))
    dtypes = {"ids": jnp.int32, "mask": jnp.bool_}
    inputs = [jax.ShapeDtypeStruct((1, 1), dtypes[name]) for name in family.inputs]
    return jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]


def first_layers(*shared: str) -> Callable[[Any, float], tuple[Any, tuple[str, ...]]]:
    """`Family.encoder_parameters` of a decoder-only family: its first layers, no norm, no head.

    `shared` are the path prefixes of what comes before the layers.
    """

    def chosen(config: Any, layer: float) -> tuple[Any, tuple[str, ...]]:
        count = chosen_layer(layer, config.num_layers)
        changes: dict[str, Any] = {"num_layers": count}
        if pattern := getattr(config, "window_pattern", ""):
            changes["window_pattern"] = pattern[:count]
        prefixes = (*shared, *(f"layers_{i}/" for i in range(count)))
        return dataclasses.replace(config, **changes), prefixes

    return chosen


def chosen_layer(layer: float, num_layers: int) -> int:
    """How many layers `layer` means: 0 all, below 1 that fraction (one at least), else itself."""
    if not 0 <= layer <= num_layers or (layer > 1 and layer != int(layer)):
        raise ValueError(
            f"layer {layer:g}: expected a whole number up to the {num_layers} layers there are, a "
            "fraction of them below 1, or 0 for all"
        )
    if not layer:
        return num_layers
    return int(layer) if layer >= 1 else max(1, round(layer * num_layers))


@dataclasses.dataclass(frozen=True)
class Entry:
    """A rule applied: one tensor of a file and the parameters that it holds."""

    key: str
    parameters: tuple[str, ...]
    transform: Transform = SAME
    aliases: tuple[str, ...] = ()

    def hf_shape(self, shapes: Mapping[str, Shape]) -> Shape:
        """Shape of the tensor, from our parameters' shapes."""
        zeros = [np.broadcast_to(np.int8(0), shapes[path]) for path in self.parameters]
        return self.transform.to_hf(*zeros).shape


def _bare(key: str, body: str) -> tuple[str, ...]:
    """The name of a tensor in a file that holds the body alone, if it has another one there."""
    return (key.removeprefix(body),) if body and key.startswith(body) else ()


def _also_bare(entry: Entry, body: str) -> Entry:
    """An entry whose tensor may have the name that it has in the body alone."""
    return dataclasses.replace(entry, aliases=(*_bare(entry.key, body), *entry.aliases))


@functools.cache
def _pattern(template: str) -> re.Pattern[str]:
    parts = re.split(r"\{(\w+)\}", template)
    fields = iter(f"(?P<{name}>\\d+)" for name in parts[1::2])
    return re.compile("".join(re.escape(text) + next(fields, "") for text in parts[::2]))


def _apply(rule: Rule, path: str) -> Entry | None:
    """The entry that `rule` makes of the parameter at `path`, or None."""
    for template in rule.parameters:
        if match := _pattern(template).fullmatch(path):
            fields = match.groupdict()
            return Entry(
                rule.key.format(**fields),
                tuple(parameter.format(**fields) for parameter in rule.parameters),
                rule.transform,
                tuple(alias.format(**fields) for alias in rule.aliases),
            )
    return None


def make_entries(rules: Sequence[Rule], paths: Sequence[str]) -> list[Entry]:
    """One entry per tensor; ValueError unless each path has one rule and each key one use."""
    entries: dict[str, Entry] = {}
    known = set(paths)
    for path in paths:
        found = [entry for rule in rules if (entry := _apply(rule, path))]
        if len(found) != 1:
            keys = ", ".join(entry.key for entry in found) or "none"
            raise ValueError(f"parameter {path}: expected one rule, found {len(found)} ({keys})")
        entry = found[0]
        if entries.setdefault(entry.key, entry) != entry:
            filled = ", ".join(entries[entry.key].parameters)
            raise ValueError(f"tensor {entry.key}: goes to {path} and again to {filled}")
        if absent := [f"- {other}" for other in entry.parameters if other not in known]:
            raise ValueError(f"tensor {entry.key}: the model lacks {listed(absent)}")
    names = collections.Counter(
        key for entry in entries.values() for key in (entry.key, *entry.aliases)
    )
    if repeated := sorted(name for name, count in names.items() if count > 1):
        raise ValueError(f"tensors of more than one rule: {listed(repeated)}")
    return list(entries.values())


def own_entries(shapes: Mapping[str, Shape]) -> list[Entry]:
    """One entry per parameter, under its own path: our format, which needs no rules."""
    return [Entry(path, (path,)) for path in shapes]


def param_shapes(params: Params) -> dict[str, Shape]:
    """Our '/'-joined paths -> shapes, of arrays or ShapeDtypeStructs."""
    flat: dict[str, Any] = flatten_dict(params, sep="/")
    return {path: tuple(leaf.shape) for path, leaf in flat.items()}


def _chosen(entries: Sequence[Entry], prefixes: Sequence[str] | None) -> list[Entry]:
    if prefixes is None:
        return list(entries)
    return [e for e in entries if all(p.startswith(tuple(prefixes)) for p in e.parameters)]


def matched(
    files: Tensors,
    entries: Sequence[Entry],
    shapes: Mapping[str, Shape],
    *,
    ignored: Sequence[str] = (),
    prefixes: Sequence[str] | None = None,
) -> list[tuple[Entry, list[str]]]:
    """Each entry with the names under which the files hold it, once names and shapes all fit."""
    chosen = _chosen(entries, prefixes)
    known = {key for entry in entries for key in (entry.key, *entry.aliases)}
    unmapped = sorted(
        key
        for key in files.keys - known
        if not any(_pattern(template).fullmatch(key) for template in ignored)
    )
    held = {e.key: _held(files, e, 1 if prefixes is not None else None) for e in chosen}
    missing = sorted(key for key, names in held.items() if not names)
    if unmapped or missing:
        marked = [f"- {key}" for key in missing] + [f"+ {key}" for key in unmapped]
        raise ValueError(
            f"{files.source}: tensors missing (-) or not part of this model (+): {listed(marked)}"
        )
    for entry in chosen:
        expected = entry.hf_shape(shapes)
        for key in held[entry.key]:
            if (found := files.shape(key)) != expected:
                raise ValueError(
                    f"{files.file(key)}: {key} has shape {list(found)}, expected {list(expected)}"
                )
    return [(entry, held[entry.key]) for entry in chosen]


def _held(files: Tensors, entry: Entry, limit: int | None) -> list[str]:
    """Names under which the files hold an entry's tensor, the first `limit` of them.

    An index may list a tied tensor under a name that no file holds.
    """
    listed = [key for key in (entry.key, *entry.aliases) if key in files.keys]
    if len(listed) < 2:
        return listed
    there = itertools.islice((key for key in listed if files.holds(key)), limit)
    return list(there) or listed[:1]


def write_tensors(
    params: Params, entries: Sequence[Entry], shapes: Mapping[str, Shape]
) -> dict[str, Unwritten]:
    """Hugging Face's (or the entries') names -> tensors to write, from a whole parameter tree.

    Raises:
      ValueError: parameters that are not the model's.
      FloatingPointError: a parameter that is not finite.
    """
    flat: dict[str, Any] = flatten_dict(params, sep="/")
    marked = [f"- {path}" for path in sorted(shapes.keys() - flat.keys())]
    marked += [f"+ {path}" for path in sorted(flat.keys() - shapes.keys())]
    if marked:
        raise ValueError(f"parameters missing (-) or not of this model (+): {listed(marked)}")
    for path, shape in shapes.items():
        if tuple(flat[path].shape) != shape:
            found = list(flat[path].shape)
            raise ValueError(f"parameter {path} has shape {found}, expected {list(shape)}")

    def array(path: str) -> np.ndarray:
        return np.asarray(jax.device_get(flat[path]), np.float32)

    for path in flat:
        if not np.isfinite(array(path)).all():
            raise FloatingPointError(f"parameter {path} is not finite; no such model is saved")

    def tensor(entry: Entry) -> Unwritten:
        def make() -> np.ndarray:
            return entry.transform.to_hf(*map(array, entry.parameters))

        return Unwritten(entry.hf_shape(shapes), make)

    return {entry.key: tensor(entry) for entry in entries}
