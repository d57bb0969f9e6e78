"""The key/value cache of cached decoding: its shapes, dtypes and axes, declared once.

A cache is a plain pytree that a model's `prefill` makes and its `step` returns anew. Leaves with a
batch axis carry it first; `index` is the one scalar. On a mesh, leaves are split by rows, and keys
and values also by heads, where these divide: see `place`.
"""

from __future__ import annotations

from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import struct
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int32

from l2s_jax.cluster.sharding import ROWS, AnyArray, constrain


class KeyValue(struct.PyTreeNode):
    """Keys and values of one attention, in the compute dtype."""

    key: Float[Array, "B G K H"]
    value: Float[Array, "B G K H"]


class DecoderCache(struct.PyTreeNode):
    """State of an encoder-decoder's decoder between two steps.

    index: tokens decoded so far, the same for every row.
    self_attention: one KeyValue [B, N, S, H] per layer; positions >= index are not yet written.
    cross_attention: one KeyValue [B, N, T, H] per layer, computed once from the encoder's output.
    prompt_mask: true at real prompt positions.
    """

    index: Int32[Array, ""]
    self_attention: tuple[KeyValue, ...]
    cross_attention: tuple[KeyValue, ...]
    prompt_mask: Bool[AnyArray, "B T"]


class CausalCache(struct.PyTreeNode):
    """State of a decoder-only model between two steps: the prompt's slots, then the response's.

    index: the slot that the next token goes to, the same for every row.
    next_position: the next token's position, which padding does not count in.
    positions: of the token in each slot.
    mask: true where a slot holds a real token.
    layers: one KeyValue [B, G, K, H] per layer.
    prompt_slots: how many slots, the first ones, are the prompt's.
    """

    index: Int32[Array, ""]
    next_position: Int32[Array, " B"]
    positions: Int32[Array, "B K"]
    mask: Bool[Array, "B K"]
    layers: tuple[KeyValue, ...]
    prompt_slots: int = struct.field(pytree_node=False)


Cache = TypeVar("Cache", bound=DecoderCache | CausalCache)


def place(cache: Cache) -> Cache:
    """The cache, where its axes say: what a program for a mesh makes of `prefill`."""
    # B, N, K, H of keys and values; B, K of all else.
    return jax.tree.map(
        lambda leaf: constrain(leaf, ROWS, "tensor" if leaf.ndim == 4 else None, None, None), cache
    )


def empty_key_value(
    batch_size: int, num_heads: int, length: int, head_width: int, dtype: DTypeLike
) -> KeyValue:
    """A zeroed KeyValue for `length` positions."""
    zeros = jnp.zeros((batch_size, num_heads, length, head_width), dtype)
    return KeyValue(zeros, zeros)


def write_position(cache: KeyValue, new: KeyValue, index: Int32[Array, ""]) -> KeyValue:
    """Puts the one position of `new` [B, N, 1, H] at `index` of `cache` [B, N, S, H]."""

    def write(old: jax.Array, one: jax.Array) -> jax.Array:
        one = one.astype(old.dtype)
        if old.shape[0] == 1:
            # Without the axis that the products leave out and the decoding loop does not carry:
            # with it, XLA's CPU backend writes into a copy.
            return jax.lax.dynamic_update_slice_in_dim(old[0], one[0], index, axis=1)[None]
        return jax.lax.dynamic_update_slice_in_dim(old, one, index, axis=2)

    return KeyValue(write(cache.key, new.key), write(cache.value, new.value))


def take_hypotheses(cache: Cache, parents: Int32[Array, "prompts beams"]) -> Cache:
    """The cache, with what hypothesis parents[b, k] of prompt b has decoded in place of what its
    k-th has.

    What the prompt left stays where it is: it is the same for all hypotheses of a prompt.
    """
    if isinstance(cache, DecoderCache):
        name, first = "self_attention", 0
    else:
        name, first = "layers", cache.prompt_slots

    def take(leaf: jax.Array) -> jax.Array:
        decoded = leaf[:, :, first:]
        # Within a prompt: rows that a mesh splits stay on their devices.
        own = decoded.reshape(*parents.shape, *decoded.shape[1:])
        index = parents.reshape(*parents.shape, *[1] * (decoded.ndim - 1))
        taken = jnp.take_along_axis(own, index, axis=1).reshape(decoded.shape)
        return jax.lax.dynamic_update_slice_in_dim(leaf, taken, first, axis=2)

    return cache.replace(**{name: jax.tree.map(take, getattr(cache, name))})
