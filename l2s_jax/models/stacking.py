"""The two layouts of a model's layers, one entry each or stacked in one, and a loop over either.

    {"layers_0": {"wi": [D, F]}, "layers_1": {"wi": [D, F]}}  <->  {"layers": {"wi": [L, D, F]}}

Files, optimizers and cached decoding have the first. With `scan_layers` in a model's config, its
module takes the second: layers are the turns of one loop, so that compiling a program does not take
longer the more there are. With `remat`, of each layer only its input is kept for the gradient, and
the rest is computed again. The results are the same, but for dropout in a loop, which draws other
masks than layers one by one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float32

from l2s_jax.cluster.paths import STACKED

_LAYER = re.compile(r"layers_(\d+)")


def stack_layers(params: Mapping[str, Any]) -> dict[str, Any]:
    """A tree with each of its groups `layers_0`, `layers_1`, ... as one `layers`.

    Groups may lie at any depth. Leaves are numpy arrays, which stay such, JAX arrays or
    ShapeDtypeStructs.

    Raises:
      ValueError: layers of one group that differ in their parameters or in a shape.
    """
    names = sorted(filter(_LAYER.fullmatch, params), key=lambda name: int(name.split("_")[1]))
    stacked = {
        name: stack_layers(part) if isinstance(part, Mapping) else part
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
    leaves = [_stack(column) for column in zip(*columns, strict=True)]
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


def stacked_path(path: str) -> tuple[str, int | None]:
    """Where `stack_layers` puts a parameter: (path, layer), or (path, None) if in no layer."""
    names = path.split("/")
    for i, name in enumerate(names):
        if layer := _LAYER.fullmatch(name):
            return "/".join([*names[:i], STACKED, *names[i + 1 :]]), int(layer[1])
    return path, None


def make_layers(make: Callable[[], nn.Module], config: Any, count: int) -> Any:
    """What a model's `setup` names `layers`: `count` modules, or the one that stands for them."""
    return make() if config.scan_layers else [make() for _ in range(count)]


def each_layer(layers: Any) -> list[nn.Module]:
    """The modules that `make_layers` made, one by one.

    Raises:
      ValueError: it made one that stands for all.
    """
    if isinstance(layers, nn.Module):
        raise ValueError(
            "scan_layers: prefill, step and a part of the layers need a config without it, and "
            "parameters that are not stacked"
        )
    return list(layers)


def run_layers(
    run: Callable[[Any, jax.Array, Any], tuple[jax.Array, Any]],
    layers: Any,
    config: Any,
    x: Float32[Array, "B T D"],
    own: Sequence[int],
) -> tuple[Float32[Array, "B T D"], Any]:
    """`run(layer, x, own[i]) -> (x, out)` for each layer i of `make_layers`, as `config` says.

    With `scan_layers`, own[i] is a traced number. Returns x and each layer's `out`: a list of them,
    or with `scan_layers` stacked.
    """
    if config.scan_layers:
        scanned = nn.scan(
            nn.remat(run, prevent_cse=False) if config.remat else run,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            check_constancy_invariants=False,  # which would trace a layer once more
        )
        return scanned(layers, x, jnp.asarray(own, jnp.int32))
    outs = []
    for layer, number in zip(layers, own, strict=True):

        def one(layer: nn.Module, x: jax.Array, number: int = number) -> tuple[jax.Array, Any]:
            return run(layer, x, number)

        x, out = (nn.remat(one) if config.remat else one)(layer, x)
        outs.append(out)
    return x, outs


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
