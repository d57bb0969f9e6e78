"""The key/value cache of cached decoding: its shapes, dtypes and axes, declared once.

A cache is a plain pytree that a model's `prefill` makes and its `step` returns anew. Leaves with a
batch axis carry it first; `index` is the one scalar.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class KeyValue:
    """Keys and values of one attention, each [B, N, K, H] in the compute dtype."""

    key: jax.Array
    value: jax.Array


@struct.dataclass
class DecoderCache:
    """State of an encoder-decoder's decoder between two steps.

    index: int32 [], tokens decoded so far, the same for every row.
    self_attention: one KeyValue [B, N, S, H] per layer; positions >= index are not yet written.
    cross_attention: one KeyValue [B, N, T, H] per layer, computed once from the encoder's output.
    prompt_mask: bool [B, T], true at real prompt positions.
    """

    index: jax.Array
    self_attention: tuple[KeyValue, ...]
    cross_attention: tuple[KeyValue, ...]
    prompt_mask: jax.Array


@struct.dataclass
class CausalCache:
    """State of a decoder-only model between two steps: the prompt's slots, then the response's.

    index: int32 [], the slot that the next token goes to, the same for every row.
    next_position: int32 [B], the next token's position, which padding does not count in.
    positions: int32 [B, K], of the token in each slot.
    mask: bool [B, K], true where a slot holds a real token.
    layers: one KeyValue [B, G, K, H] per layer.
    """

    index: jax.Array
    next_position: jax.Array
    positions: jax.Array
    mask: jax.Array
    layers: tuple[KeyValue, ...]


def empty_key_value(
    batch_size: int, num_heads: int, length: int, head_width: int, dtype: jnp.dtype
) -> KeyValue:
    """A zeroed KeyValue for `length` positions."""
    zeros = jnp.zeros((batch_size, num_heads, length, head_width), dtype)
    return KeyValue(zeros, zeros)


def write_position(cache: KeyValue, new: KeyValue, index: jax.Array) -> KeyValue:
    """Puts the one position of `new` [B, N, 1, H] at `index` of `cache` [B, N, S, H]."""

    def write(old: jax.Array, one: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(old, one.astype(old.dtype), index, axis=2)

    return KeyValue(write(cache.key, new.key), write(cache.value, new.value))


def take_rows(cache: DecoderCache | CausalCache, rows: jax.Array) -> DecoderCache | CausalCache:
    """The cache with what row rows[r], int32 [B], has decoded in place of r.

    What the prompt left stays where it is: for the hypotheses of a beam search, which change places
    with those of the same prompt only.
    """
    name = "self_attention" if isinstance(cache, DecoderCache) else "layers"
    decoded = jax.tree.map(lambda leaf: leaf[rows], getattr(cache, name))
    return cache.replace(**{name: decoded})
