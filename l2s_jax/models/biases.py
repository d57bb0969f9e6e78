"""Biases of attention's scores, whole or made for a block of them: what each query sees.

Letters as in layers.py.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float32, Int32

from l2s_jax.cluster.placement import program_mesh
from l2s_jax.cluster.sharding import AnyArray

# Added to attention scores where the mask is false. Finite, so that a row that is masked throughout
# gives uniform weights and not NaN.
MASKED = -1e10


def _at(x: AnyArray, slots: Int32[Array, " K"]) -> Array:
    """Of x [B, T], these slots; beyond the last, the last."""
    return jnp.take(jnp.asarray(x), slots, axis=1, mode="clip")


def mask_bias(mask: Bool[AnyArray, "*shape"]) -> Float32[Array, "*shape"]:
    """0 where true, a large negative number where false."""
    return jnp.where(mask, 0.0, MASKED)


def _in_window(
    window: int | Int32[Array, ""], positions: Int32[Array, "B Q"], of_keys: Int32[Array, "B K"]
) -> Bool[Array, "B Q K"]:
    """Whether a key is fewer than so many positions before a query."""
    return positions[:, :, None] - of_keys[:, None, :] < window


class CausalBias(struct.PyTreeNode):
    """Each position sees the real ones in the slots up to its own.

    mask: true at real positions.
    positions: how many real ones come before each slot.
    window: how many of them, itself included, a position sees; None: all.
    """

    mask: Bool[AnyArray, "B T"]
    positions: Int32[Array, "B T"]
    window: int | Int32[Array, ""] | None

    def specs(self, rows: Any, heads: Any) -> list[P]:
        """Of its arrays, by the axes of a mesh that split rows and heads."""
        return [P(rows), P(rows)] if self.window is None else [P(rows), P(rows), P()]

    def is_gapless(self) -> Bool[Array, ""]:
        """Whether no row has padding between real positions, so that slots count like them."""
        before = jnp.arange(self.mask.shape[1])[None] - self.positions  # padding before each slot
        most = jnp.where(self.mask, before, 0).max(axis=1)
        least = jnp.where(self.mask, before, self.mask.shape[1]).min(axis=1)
        return jnp.all(most <= least)

    def block(
        self, start: int | jax.Array, queries: int, first: int | jax.Array, keys: int
    ) -> Float32[Array, "B 1 {queries} {keys}"]:
        """The bias of the queries from `start` on to the keys from `first` on."""
        own, other = start + jnp.arange(queries), first + jnp.arange(keys)
        visible = _at(self.mask, other)[:, None, :] & (other[None, :] <= own[:, None])[None]
        if self.window is not None:
            near = _in_window(self.window, _at(self.positions, own), _at(self.positions, other))
            visible = visible & near
        return mask_bias(visible)[:, None]

    def sees(
        self, start: int | jax.Array, queries: int, first: int | jax.Array, keys: int
    ) -> bool | Bool[Array, ""]:
        """False where a block has nothing that is visible."""
        before = first < start + queries
        # On a mesh all devices would have to tell each other.
        if self.window is None or program_mesh() is not None:
            return before
        own, other = start + jnp.arange(queries), first + jnp.arange(keys)
        near = _in_window(self.window, _at(self.positions, own), _at(self.positions, other))
        return before & jnp.any(near)


class DistanceBias(struct.PyTreeNode):
    """Each position sees all real ones, with a bias by their distance, as in T5's encoder.

    mask: true at real positions.
    by_distance: of keys from T - 1 slots before a query to T - 1 after it.
    reach: from how many slots on it is the same, on either side.
    """

    mask: Bool[AnyArray, "B T"]
    by_distance: Float32[Array, "N 2*T-1"]
    reach: int = struct.field(pytree_node=False)

    def specs(self, rows: Any, heads: Any) -> list[P]:
        """Of its arrays, by the axes of a mesh that split rows and heads."""
        return [P(rows), P(heads)]

    def block(
        self, start: int | jax.Array, queries: int, first: int | jax.Array, keys: int
    ) -> Float32[Array, "B N {queries} {keys}"]:
        """The bias of the queries from `start` on to the keys from `first` on."""
        near = functools.partial(self._near, queries=queries, keys=keys)

        def near_or_far(least: jax.Array) -> jax.Array:
            far = self.by_distance[:, jnp.where(least > 0, -1, 0)][:, None, None]
            is_near = (least < self.reach) & (least + queries + keys - 2 > -self.reach)
            whole = (self.by_distance.shape[0], queries, keys)
            return jax.lax.cond(is_near, near, lambda _: jnp.broadcast_to(far, whole), least)

        least = jnp.asarray(first - start - queries + 1)
        # On a CPU most of the time would be spent on it. Accelerators never write it to memory, but
        # for a condition's sake.
        rows = jax.lax.platform_dependent(least, cpu=near_or_far, default=near)
        real = _at(self.mask, first + jnp.arange(keys))
        return rows[None] + mask_bias(real)[:, None, None, :]

    def _near(
        self, least: Int32[Array, ""], queries: int, keys: int
    ) -> Float32[Array, "N {queries} {keys}"]:
        """Of a block whose last query has its first key at this distance."""
        # Blocks may go beyond the last slot.
        padded = jnp.pad(self.by_distance, ((0, 0), (queries, keys)))
        length, size = self.mask.shape[1], queries + keys - 1
        held = jax.lax.dynamic_slice_in_dim(padded, length - 1 + least + queries, size, axis=1)
        # Each query has the same numbers as the one before, one place further right. Numbers that
        # repeat after `size` + 1 and are read in rows of `size` move so. A gather, which takes each
        # by itself, is slow on accelerators.
        repeated = jnp.tile(jnp.pad(held, ((0, 0), (0, 1))), (1, queries))
        rows = repeated[:, : queries * size].reshape(-1, queries, size)
        return rows[:, :, queries - 1 :]

    def sees(self, start: int | jax.Array, queries: int, first: int | jax.Array, keys: int) -> bool:
        """Every block has something that is visible."""
        return True


class GivenBias:
    """The blocks of a bias that is there as a whole."""

    def __init__(self, bias: Float32[Array, "#B #N #Q #K"], queries: int, keys: int):
        self._bias = bias
        for axis, size in ((2, queries), (3, keys)):
            if bias.shape[axis] > 1:
                room = [(0, 0)] * 4
                room[axis] = (0, -bias.shape[axis] % size)
                self._bias = jnp.pad(self._bias, room)

    def block(
        self, start: jax.Array, queries: int, first: jax.Array, keys: int
    ) -> Float32[Array, "#B #N #{queries} #{keys}"]:
        """The bias of the queries from `start` on to the keys from `first` on."""
        bias = self._bias
        for axis, at, size in ((2, start, queries), (3, first, keys)):
            if bias.shape[axis] > 1:
                bias = jax.lax.dynamic_slice_in_dim(bias, at, size, axis)
        return bias

    def sees(self, start: jax.Array, queries: int, first: jax.Array, keys: int) -> bool:
        """Any block may have something that is visible."""
        return True


Bias = jax.Array | CausalBias | DistanceBias
