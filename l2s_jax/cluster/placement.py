"""Where arrays lie within a program for a mesh: what it asks of the compiler.

Nothing here changes a program that is made without `jax.set_mesh`, or for one device.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from l2s_jax.cluster.sharding import ROWS, batch_ways, parameter_shardings, sequence_parts


def program_mesh() -> AbstractMesh | None:
    """The mesh over which the compiler splits a program.

    None without `jax.set_mesh`, of one device, and within a `jax.shard_map` over all axes.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or set(mesh.axis_types) == {AxisType.Manual}:
        return None
    return mesh


def constrain(x: jax.Array, *axes: str | tuple[str, ...] | None) -> jax.Array:
    """x with its leading dimensions split by these axes, None by none, in a program for a mesh.

    The compiler chooses for the dimensions after them, and for those that do not divide. Nothing
    changes without `jax.set_mesh`.
    """
    mesh = program_mesh()
    if mesh is None:
        return x
    spec: list[Any] = [P.UNCONSTRAINED] * x.ndim
    for i, (size, axis) in enumerate(zip(x.shape, axes, strict=False)):
        names = (axis,) if isinstance(axis, str) else axis or ()
        if size % math.prod(mesh.shape[name] for name in names) == 0:
            spec[i] = axis
    return jax.lax.with_sharding_constraint(x, P(*spec))


def split_rows(x: jax.Array) -> jax.Array:
    """x [B, ...] with its rows, each whole, where those of a batch lie, in a program for a mesh.

    Without it, the compiler may leave parameters that `fsdp` splits where they are, split the
    activations along their width too, and add up those of the whole batch over all devices; or
    split them along their width by `tensor`, and gather them for every product.
    """
    return constrain(x, ROWS, *[None] * (x.ndim - 1))


def split_prompt(x: jax.Array) -> jax.Array:
    """x [B, T, ...] as `split_rows` has it, but for positions that `sequence` splits."""
    mesh = program_mesh()
    if mesh is None or x.shape[1] % sequence_parts(mesh):
        return split_rows(x)
    return constrain(x, ROWS, "sequence", *[None] * (x.ndim - 2))


def top_k(x: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """`jax.lax.top_k` of x [B, ...], as `by_rows` computes."""
    return by_rows(lambda rows: jax.lax.top_k(rows, k), x)


def by_rows(function: Callable[..., Any], *arrays: jax.Array) -> Any:
    """`function` of arrays [B, ...], in a program for a mesh with each row where it lies.

    Of a sort or a scatter the compiler by itself gathers all rows on every device.
    """
    mesh = program_mesh()
    if mesh is None or batch_ways(mesh) == 1 or arrays[0].shape[0] % batch_ways(mesh):
        return function(*arrays)
    return jax.shard_map(function, in_specs=P(ROWS), out_specs=P(ROWS), axis_names=set(ROWS))(
        *arrays
    )


def split_parameters(params: Any) -> Any:
    """Parameters where the rules put them, and their gradient too, in a program for a mesh.

    Nothing changes without `jax.set_mesh`.
    """
    mesh = program_mesh()
    if mesh is None:
        return params
    return jax.lax.with_sharding_constraint(params, parameter_shardings(params, mesh))
