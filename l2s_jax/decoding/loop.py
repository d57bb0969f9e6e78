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


def cache_length(max_new_tokens: int) -> int:
    """Positions that a cache must have for the loop: max_new_tokens in whole chunks."""
    return -(-max_new_tokens // CHUNK) * CHUNK


def greedy(
    step: Step,
    params: Any,
    cache: Cache,
    start_token: jax.Array,
    active: jax.Array,
    *,
    eos_id: int,
    pad_id: int,
    max_new_tokens: int,
) -> Decoded:
    """Takes the likeliest token at each step until eos or max_new_tokens.

    start_token int32 [B] goes in first; rows where active bool [B] is false give padding only.
    The cache must hold `cache_length(max_new_tokens)` positions. A negative eos_id never ends a
    row. Call it inside `jax.jit`.
    """
    batch_size = start_token.shape[0]

    def one_step(carry: tuple, _: None) -> tuple[tuple, jax.Array]:
        token, done, cache = carry
        logits, cache = step(params, token, cache)
        token = jnp.where(done, pad_id, jnp.argmax(logits, axis=-1).astype(jnp.int32))
        return (token, done | (token == eos_id), cache), token

    def chunk(carry: tuple) -> tuple:
        count, tokens, state = carry
        state, new = jax.lax.scan(one_step, state, length=CHUNK)
        tokens = jax.lax.dynamic_update_slice_in_dim(tokens, new, count, axis=0)
        return count + CHUNK, tokens, state

    def unfinished(carry: tuple) -> jax.Array:
        count, _, (_, done, _) = carry
        return (count < max_new_tokens) & ~jnp.all(done)

    # Tokens are gathered step-major, so that a chunk of them is one contiguous write.
    tokens = jnp.full((cache_length(max_new_tokens), batch_size), pad_id, jnp.int32)
    state = (start_token.astype(jnp.int32), ~active, cache)
    _, tokens, _ = jax.lax.while_loop(unfinished, chunk, (jnp.int32(0), tokens, state))

    tokens = tokens[:max_new_tokens].T
    ends = tokens == eos_id
    finished = jnp.any(ends, axis=1)
    lengths = jnp.where(finished, jnp.argmax(ends, axis=1) + 1, max_new_tokens)
    lengths = jnp.where(active, lengths, 0)
    return Decoded(tokens, lengths.astype(jnp.int32), finished | ~active)
