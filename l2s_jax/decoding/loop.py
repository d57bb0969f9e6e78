"""Greedy decoding as one compiled loop: no host work and no Python per token.

Steps run in chunks, a `lax.scan` of a fixed number inside a `lax.while_loop` that ends when every
row is done: the scan is what a compiler does well, the while loop is what stops early.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import struct

Cache = TypeVar("Cache")
Step = Callable[[Any, jax.Array, Cache], tuple[jax.Array, Cache]]

CHUNK = 8


@struct.dataclass
class Decoded:
    """What a decoding loop gives back.

    tokens: int32 [B, S], the eos included, pad_id after it.
    lengths: int32 [B], tokens of each row, the eos included.
    finished: bool [B], whether the row ended with an eos; if not, max_new_tokens cut it.
    """

    tokens: jax.Array
    lengths: jax.Array
    finished: jax.Array


def decoding_steps(max_new_tokens: int) -> int:
    """Calls of `step` that the loop may make: the first token needs none, the rest whole chunks."""
    return -(-(max_new_tokens - 1) // CHUNK) * CHUNK


def greedy(
    step: Step,
    params: Any,
    logits: jax.Array,
    cache: Cache,
    active: jax.Array,
    *,
    eos_id: int,
    pad_id: int,
    max_new_tokens: int,
) -> Decoded:
    """Takes the likeliest token at each step until eos or max_new_tokens.

    logits float32 [B, V] are those of the first token; rows where active bool [B] is false give
    padding only. The cache must have room for `decoding_steps(max_new_tokens)` tokens. A negative
    eos_id never ends a row. Call it inside `jax.jit`.
    """
    batch_size = logits.shape[0]

    def choose(logits: jax.Array, done: jax.Array) -> tuple[jax.Array, jax.Array]:
        token = jnp.where(done, pad_id, jnp.argmax(logits, axis=-1).astype(jnp.int32))
        return token, done | (token == eos_id)

    def one_step(carry: tuple, _: None) -> tuple[tuple, jax.Array]:
        token, done, cache = carry
        logits, cache = step(params, token, cache)
        token, done = choose(logits, done)
        return (token, done, cache), token

    def chunk(carry: tuple) -> tuple:
        count, tokens, state = carry
        state, new = jax.lax.scan(one_step, state, length=CHUNK)
        tokens = jax.lax.dynamic_update_slice_in_dim(tokens, new, count, axis=0)
        return count + CHUNK, tokens, state

    def unfinished(carry: tuple) -> jax.Array:
        count, _, (_, done, _) = carry
        return (count < max_new_tokens) & ~jnp.all(done)

    # Tokens are gathered step-major, so that a chunk of them is one contiguous write.
    tokens = jnp.full((decoding_steps(max_new_tokens) + 1, batch_size), pad_id, jnp.int32)
    token, done = choose(logits, ~active)
    tokens = tokens.at[0].set(token)
    if max_new_tokens > 1:
        carry = jnp.int32(1), tokens, (token, done, cache)
        _, tokens, _ = jax.lax.while_loop(unfinished, chunk, carry)

    tokens = tokens[:max_new_tokens].T
    ends = tokens == eos_id
    finished = jnp.any(ends, axis=1)
    lengths = jnp.where(finished, jnp.argmax(ends, axis=1) + 1, max_new_tokens)
    lengths = jnp.where(active, lengths, 0)
    return Decoded(tokens, lengths.astype(jnp.int32), finished | ~active)
