"""The key/value cache of cached decoding: its shapes, dtypes and axes, declared once.

A cache is a plain pytree that a model's `prefill` makes and its `extend` returns anew. Leaves with
a batch axis carry it first. On a mesh, leaves are split by rows, and keys and values also by heads,
where these divide: see `place`.

`index` says how many tokens of the response are held: one number where all rows stand together, or
one per row. A token lies in the slot of its place. A row goes back by a smaller number, what is
held beyond it is not seen.

Where rows stand at places of their own, each has its own slot to write to. TPUs do that one row
after the other. Rows that go on together, one token at a time, have a `turn` instead: the slot that
all write to next, after the last one the first again. A row's tokens are in the `index` slots
before it. So a row that lives goes on at every step, and one that has stopped never goes on. The
order in which slots are added up depends on the turn, and with it the rounding.
"""

from __future__ import annotations

from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import struct
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int32

from l2s_jax.cluster.placement import constrain
from l2s_jax.cluster.sharding import ROWS, AnyArray


class KeyValue(struct.PyTreeNode):
    """Keys and values of one attention, in the compute dtype."""

    key: Float[Array, "B G K H"]
    value: Float[Array, "B G K H"]


class DecoderCache(struct.PyTreeNode):
    """State of an encoder-decoder's decoder between two steps.

    index: tokens decoded so far, the start token included.
    self_attention: one KeyValue [B, N, S, H] per layer.
    cross_attention: one KeyValue [B, N, T, H] per layer, computed once from the encoder's output.
    prompt_mask: true at real prompt positions.
    turn: see above; None: tokens lie at their places.
    """

    index: Int32[Array, "*rows"]
    self_attention: tuple[KeyValue, ...]
    cross_attention: tuple[KeyValue, ...]
    prompt_mask: Bool[AnyArray, "B T"]
    turn: Int32[Array, ""] | None = None

    @property
    def slots(self) -> int:
        """S: for how many tokens of the response there is room."""
        return self.self_attention[0].key.shape[2]


class CausalCache(struct.PyTreeNode):
    """State of a decoder-only model between two steps: the prompt's slots, then the response's.

    index: tokens of the response so far.
    prompt_mask: true where a slot of the prompt holds a real token.
    prompt_positions: of the token in each slot of the prompt, padding not counted.
    prompt_lengths: real tokens of each prompt: the position of the response's first.
    layers: one KeyValue [B, G, T + S, H] per layer.
    turn: see above, not counting the prompt's slots; None: tokens lie at their places.
    """

    index: Int32[Array, "*rows"]
    prompt_mask: Bool[AnyArray, "B T"]
    prompt_positions: Int32[Array, "B T"]
    prompt_lengths: Int32[Array, " B"]
    layers: tuple[KeyValue, ...]
    turn: Int32[Array, ""] | None = None

    @property
    def slots(self) -> int:
        """S: for how many tokens of the response there is room."""
        return self.layers[0].key.shape[2] - self.prompt_slots

    @property
    def prompt_slots(self) -> int:
        """How many slots, the first ones, are the prompt's."""
        return self.prompt_mask.shape[1]


Cache = TypeVar("Cache", bound=DecoderCache | CausalCache)


def place(cache: Cache) -> Cache:
    """The cache, where its axes say: what a program for a mesh makes of `prefill`."""
    # B, N, K, H of keys and values; B, K of all else.
    return jax.tree.map(
        lambda leaf: constrain(leaf, ROWS, "tensor" if leaf.ndim == 4 else None, None, None), cache
    )


def block(index: Int32[Array, "*rows"], size: int) -> Int32[Array, "#B {size}"]:
    """The places of the `size` tokens after the first `index`, of all rows or of each."""
    return index.reshape(-1, 1) + jnp.arange(size, dtype=jnp.int32)[None]


def ages(cache: DecoderCache | CausalCache, count: int) -> Int32[Array, "#B {count} S"]:
    """How many tokens before each of the next `count` tokens that of a slot comes.

    Less than 0: after it. More than its place: the slot has no token of the row.
    """
    slots = jnp.arange(cache.slots, dtype=jnp.int32)
    if cache.turn is None:
        return block(cache.index, count)[:, :, None] - slots[None, None, :]
    if count != 1:
        raise ValueError(f"{count} tokens at once: expected 1 where rows have a common turn")
    return ((cache.turn - slots) % cache.slots)[None, None]


def next_slot(cache: DecoderCache | CausalCache) -> Int32[Array, "*rows"]:
    """The response's slot that is written next, of all rows or of each."""
    return cache.index if cache.turn is None else cache.turn


def gone_on(cache: Cache, count: int) -> Cache:
    """The cache after so many tokens were written."""
    turn = None if cache.turn is None else (cache.turn + count) % cache.slots
    return cache.replace(index=cache.index + count, turn=turn)


def taking_turns(cache: Cache, most: int) -> Cache:
    """The cache of rows that stand together, as one of rows at places of their own with a turn.

    It has room for `most` tokens of each row, of those that it had room for.
    """
    rows = cache.prompt_mask.shape[0]
    name, first = _of_response(cache)
    held = jax.tree.map(lambda leaf: leaf[:, :, : first + most], getattr(cache, name))
    index = jnp.broadcast_to(cache.index, (rows,))
    return cache.replace(index=index, turn=cache.index % most, **{name: held})


def turned_to(cache: Cache, turn: Int32[Array, ""]) -> Cache:
    """The cache of rows that have a turn, with what they hold in the slots before another one."""
    name, first = _of_response(cache)
    assert cache.turn is not None
    by = turn - cache.turn

    def move(leaf: jax.Array) -> jax.Array:
        moved = jnp.roll(leaf[:, :, first:], by, axis=2)
        return jax.lax.dynamic_update_slice_in_dim(leaf, moved, first, axis=2)

    return cache.replace(turn=turn, **{name: jax.tree.map(move, getattr(cache, name))})


def _of_response(cache: DecoderCache | CausalCache) -> tuple[str, int]:
    """The keys and values of the response: where they are, and in which slot the first is."""
    if isinstance(cache, DecoderCache):
        return "self_attention", 0
    return "layers", cache.prompt_slots


def empty_key_value(
    batch_size: int, num_heads: int, length: int, head_width: int, dtype: DTypeLike
) -> KeyValue:
    """A zeroed KeyValue for `length` positions."""
    zeros = jnp.zeros((batch_size, num_heads, length, head_width), dtype)
    return KeyValue(zeros, zeros)


def write(cache: KeyValue, new: KeyValue, slot: Int32[Array, "*rows"]) -> KeyValue:
    """Puts the K positions of `new` [B, N, K, H] at `slot` and on of `cache` [B, N, S, H].

    `slot` is one for all rows, or one for each. All K must fit.
    """
    update = jax.lax.dynamic_update_slice_in_dim

    def put(old: jax.Array, part: jax.Array) -> jax.Array:
        part = part.astype(old.dtype)
        if old.shape[0] == 1:
            # Without the axis that the products leave out and the decoding loop does not carry:
            # with it, XLA's CPU backend writes into a copy.
            return update(old[0], part[0], slot.reshape(()), axis=1)[None]
        if slot.ndim:
            return jax.vmap(lambda old, part, at: update(old, part, at, axis=1))(old, part, slot)
        return update(old, part, slot, axis=2)

    return KeyValue(put(cache.key, new.key), put(cache.value, new.value))


def take_hypotheses(cache: Cache, parents: Int32[Array, "prompts beams"]) -> Cache:
    """The cache, with what hypothesis parents[b, k] of prompt b has decoded in place of what its
    k-th has.

    What the prompt left stays where it is: it is the same for all hypotheses of a prompt.
    """
    name, first = _of_response(cache)

    def take(leaf: jax.Array) -> jax.Array:
        decoded = leaf[:, :, first:]
        # Within a prompt: rows that a mesh splits stay on their devices.
        own = decoded.reshape(*parents.shape, *decoded.shape[1:])
        index = parents.reshape(*parents.shape, *[1] * (decoded.ndim - 1))
        taken = jnp.take_along_axis(own, index, axis=1).reshape(decoded.shape)
        return jax.lax.dynamic_update_slice_in_dim(leaf, taken, first, axis=2)

    return cache.replace(**{name: jax.tree.map(take, getattr(cache, name))})
