"""The two layouts of a model's layers: one entry each, or stacked with an axis of layers in front.

    {"layers_0": {"wi": [D, F]}, "layers_1": {"wi": [D, F]}}  <->  {"layers": {"wi": [L, D, F]}}

Files, training and cached decoding have the first; a program that runs its layers in one loop takes
the second (`scan_layers` of a model's config).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

STACKED = "layers"

_LAYER = re.compile(r"layers_(\d+)")


def stack_layers(params: Mapping[str, Any], *, donate: bool = False) -> dict[str, Any]:
    """A tree with each of its groups `layers_0`, `layers_1`, ... as one `layers`.

    Groups may lie at any depth. Leaves are numpy arrays, which stay such, JAX arrays or
    ShapeDtypeStructs. With `donate` the groups are taken out of `params`, a tree of dicts, so that
    no more than one leaf of a group is held twice at a time.

    Raises:
      ValueError: layers of one group that differ in their parameters or in a shape.
    """
    names = sorted(filter(_LAYER.fullmatch, params), key=lambda name: int(name.split("_")[1]))
    stacked = {
        name: stack_layers(part, donate=donate) if isinstance(part, Mapping) else part
        for name, part in params.items()
        if name not in names
    }
    if not names:
        return stacked
    if names != [f"layers_{i}" for i in range(len(names))]:
        raise ValueError(f"layers to stack: expected layers_0 and on, found {', '.join(names)}")
    columns, structures = zip(*(jax.tree.flatten(params[name]) for name in names), strict=True)
    for name, structure in zip(names, structures, strict=True):
        if structure != structures[0]:
            raise ValueError(f"layers to stack: {name} has other parameters than layers_0")
        if donate:
            del params[name]
    leaves = []
    for i in range(len(columns[0])):
        leaves.append(_stack([column[i] for column in columns]))
        for column in columns:
            column[i] = None
    return {**stacked, STACKED: jax.tree.unflatten(structures[0], leaves)}


def unstack_layers(params: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `stack_layers`; numpy arrays are views of the stacked ones."""
    unstacked: dict[str, Any] = {}
    for name, part in params.items():
        if name == STACKED:
            for i in range(jax.tree.leaves(part)[0].shape[0]):
                unstacked[f"layers_{i}"] = jax.tree.map(lambda leaf, i=i: _layer(leaf, i), part)
        else:
            unstacked[name] = unstack_layers(part) if isinstance(part, Mapping) else part
    return unstacked


def is_stacked(path: str) -> bool:
    """Whether the parameter at a '/'-joined path has an axis of layers in front."""
    return STACKED in path.split("/")


def _stack(leaves: Sequence[Any]) -> Any:
    first = leaves[0]
    for leaf in leaves:
        if leaf.shape != first.shape:
            raise ValueError(
                f"layers to stack: shapes {list(first.shape)} and {list(leaf.shape)} differ"
            )
    if isinstance(first, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct((len(leaves), *first.shape), first.dtype)
    return np.stack(leaves) if isinstance(first, np.ndarray) else jnp.stack(leaves)


def _layer(leaf: Any, i: int) -> Any:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)
    return leaf[i]
