"""Attention of a prompt whose positions a mesh splits: queries stay, keys and values are gathered.

    device     0        1        2        3      along `sequence`, of 4
    holds    0 1      2 3      4 5      6 7      eighths of the prompt
    attends  0 7      2 5      4 3      6 1      where attention is causal

A position sees those before it, so that the last device would have the most to do, and the others
would wait for it. Each device therefore attends for one early part and one late part, of which the
one sees as much more as the other sees less (as zigzag ring attention has it, Zhu et al. 2024,
https://github.com/zhuzilin/ring-flash-attention). Its even part is its own. The queries of its odd
part come from another device, and their results go back there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from l2s_jax.cluster.placement import program_mesh
from l2s_jax.cluster.sharding import ROWS, batch_ways, sequence_parts
from l2s_jax.models.biases import CausalBias, DistanceBias
from l2s_jax.models.cache import KeyValue

_AXIS = "sequence"


def splits(length: int) -> bool:
    """Whether the mesh of the program at hand splits prompts of that length."""
    mesh = program_mesh()
    return mesh is not None and mesh.shape[_AXIS] > 1 and length % sequence_parts(mesh) == 0


def by_parts(
    attend: Callable[..., jax.Array],
    query: Float[Array, "B N T H"],
    key_value: KeyValue,
    bias: CausalBias | DistanceBias,
    kept: Float[Array, "B N 1 T"] | None,
) -> Float[Array, "B T N*H"]:
    """`attend(query, key_value, bias, kept, start)` of each part of the queries, by its device.

    `attend` has all keys, and `start` is the position of its first query. It is of the rows and the
    heads of one device, if these divide, else of all of them.
    """
    mesh = program_mesh()
    assert mesh is not None
    ways = mesh.shape[_AXIS]
    rows, heads = _split(mesh, query, key_value)
    of_bias = jax.tree.structure(bias).unflatten(bias.specs(rows, heads))
    of_kept = None if kept is None else P(rows, heads)

    def run(query: jax.Array, *others: Any) -> jax.Array:
        own = query.shape[2]
        if not isinstance(bias, CausalBias):
            return attend(query, *others, jax.lax.axis_index(_AXIS) * own)
        starts = jnp.asarray(zigzag(ways))[jax.lax.axis_index(_AXIS)] * (own // 2)
        parts = exchanged(query, ways, axis=2)
        mixed = [attend(part, *others, start) for part, start in zip(parts, starts, strict=True)]
        return returned(mixed, ways, axis=1)

    return jax.shard_map(
        run,
        in_specs=(P(rows, heads, _AXIS), P(rows, heads), of_bias, of_kept),
        out_specs=P(rows, _AXIS, heads),
        check_vma=False,
    )(query, key_value, bias, kept)


def zigzag(ways: int) -> np.ndarray:
    """[ways, 2]: which of 2 * ways parts each device attends for: its even one, and an odd one."""
    even = 2 * np.arange(ways)
    return np.stack([even, 2 * ways - 1 - even], axis=1)


def attended(length: int, ways: int) -> np.ndarray:
    """[length] int32: the position of each query of a prompt, after `exchanged`."""
    parts = np.arange(length, dtype=np.int32).reshape(2 * ways, -1)
    return parts[zigzag(ways)].reshape(-1)


def exchanged(x: jax.Array, ways: int, axis: int) -> list[jax.Array]:
    """The two parts that this device attends for, of all devices' own, which lie along `axis`."""
    even, odd = jnp.split(x, 2, axis)
    return [even, _mirrored(odd, ways)]


def returned(parts: list[jax.Array], ways: int, axis: int) -> jax.Array:
    """The inverse of `exchanged`."""
    even, odd = parts
    return jnp.concatenate([even, _mirrored(odd, ways)], axis)


def _mirrored(x: jax.Array, ways: int) -> jax.Array:
    """x of the device that is as far from the last one as this is from the first."""
    return jax.lax.ppermute(x, _AXIS, [(i, ways - 1 - i) for i in range(ways)])


def _split(
    mesh: AbstractMesh, query: jax.Array, key_value: KeyValue
) -> tuple[tuple[str, ...] | None, str | None]:
    """The axes that split rows and heads, where they do."""
    tensor = mesh.shape["tensor"]
    heads = query.shape[1] % tensor == 0 and key_value.key.shape[1] % tensor == 0
    return ROWS if query.shape[0] % batch_ways(mesh) == 0 else None, "tensor" if heads else None
