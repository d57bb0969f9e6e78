"""Search settings of each row, as arrays: arguments of a compiled program, not a part of it.

A program that is made for a `Search` holds its numbers, so that every temperature is a program of
its own. `Choices` hold those of many requests, which one program serves. Row by row they choose the
very tokens that the program of that row's `Search` chooses, bit for bit of the same logits.

What no row asks for is not computed: each part stands behind a condition over all rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float32, Int32, Key, UInt32

from l2s_jax.cluster.sharding import AnyArray
from l2s_jax.decoding import logits as by_search
from l2s_jax.decoding.logits import History, greatest, mark, sample
from l2s_jax.settings.search import Search


class Choices(struct.PyTreeNode):
    """Fields of Search, [B] each. Beams, stop texts and drafts are not among them."""

    temperature: Float32[AnyArray, " B"]
    top_k: Int32[AnyArray, " B"]
    top_p: Float32[AnyArray, " B"]
    min_p: Float32[AnyArray, " B"]
    repetition_penalty: Float32[AnyArray, " B"]
    frequency_penalty: Float32[AnyArray, " B"]
    presence_penalty: Float32[AnyArray, " B"]
    no_repeat_ngram_size: Int32[AnyArray, " B"]
    min_new_tokens: Int32[AnyArray, " B"]


def choices_of(searches: Sequence[Search]) -> Choices:
    """The choices of rows, in NumPy."""
    return Choices(
        **{
            name: np.array(
                [getattr(search, name) for search in searches],
                np.int32 if name in _COUNTS else np.float32,
            )
            for name in Choices.__dataclass_fields__
        }
    )


_COUNTS = ("top_k", "no_repeat_ngram_size", "min_new_tokens")


def keys_of(
    search: Search | Choices, seeds: UInt32[AnyArray, " B"] | None
) -> Key[Array, " B"] | None:
    """`logits.keys_of`, by a search or by choices, which need seeds."""
    if isinstance(search, Search):
        return by_search.keys_of(search, seeds)
    if seeds is None:
        raise ValueError("choices: expected seeds")
    return jax.vmap(jax.random.key)(jnp.asarray(seeds))


def constrain(
    search: Search | Choices,
    logits: Float32[Array, "B V"],
    history: History | None,
    count: Int32[Array, "*rows"],
    end_ids: tuple[int, ...],
) -> Float32[Array, "B V"]:
    """`logits.constrain`, by a search or by choices, which always need a history."""
    if isinstance(search, Search):
        return by_search.constrain(search, logits, history, count, end_ids)
    if history is None:
        raise ValueError("choices: expected a history")
    logits = jax.lax.cond(
        jnp.any(search.repetition_penalty != 1), _penalize, lambda _, logits, __: logits,
        search, logits, history,
    )  # fmt: skip
    logits = jax.lax.cond(
        jnp.any((search.frequency_penalty != 0) | (search.presence_penalty != 0)),
        _penalize_response, lambda _, logits, *__: logits,
        search, logits, history, count,
    )  # fmt: skip
    logits = jax.lax.cond(
        jnp.any(search.no_repeat_ngram_size > 0), _ban, lambda _, logits, __: logits,
        search, logits, history,
    )  # fmt: skip
    if end_ids:
        early = count.reshape(-1, 1) < search.min_new_tokens[:, None]
        ends = jnp.array(end_ids)
        logits = logits.at[:, ends].set(jnp.where(early, -jnp.inf, logits[:, ends]))
    return logits


def pick(
    search: Search | Choices,
    logits: Float32[Array, "B V"],
    count: Int32[Array, "*rows"],
    keys: Key[Array, " B"] | None,
) -> Int32[Array, " B"]:
    """`logits.pick`, by a search or by choices, which always need keys."""
    if isinstance(search, Search):
        return by_search.pick(search, logits, count, keys)
    if keys is None:
        raise ValueError("choices: expected keys")
    keys = jax.vmap(jax.random.fold_in)(keys, jnp.broadcast_to(count, keys.shape))
    likeliest = greatest(logits)
    sampling = jnp.asarray(search.temperature > 0)
    return jax.lax.cond(
        jnp.any(sampling),
        lambda: jnp.where(sampling, sample(_truncate(search, logits), keys), likeliest),
        lambda: likeliest,
    )


def _penalize(
    choices: Choices, logits: Float32[Array, "B V"], history: History
) -> Float32[Array, "B V"]:
    return by_search.penalize_repetition(logits, history, choices.repetition_penalty[:, None])


def _penalize_response(
    choices: Choices, logits: Float32[Array, "B V"], history: History, count: Int32[Array, "*rows"]
) -> Float32[Array, "B V"]:
    penalties = choices.frequency_penalty[:, None], choices.presence_penalty[:, None]
    return by_search.penalize_response(logits, history, count, *penalties)


def _ban(
    choices: Choices, logits: Float32[Array, "B V"], history: History
) -> Float32[Array, "B V"]:
    """No n-gram twice, of a size that each row has for itself; 0 bans nothing."""
    sizes, tokens, valid = choices.no_repeat_ngram_size, history.tokens, history.valid
    places = jnp.broadcast_to(jnp.arange(tokens.shape[0])[:, None], tokens.shape)
    end = jnp.broadcast_to(history.end, history.start.shape)

    # A token is banned where those before it are the last size - 1 tokens so far.
    def also(back: jax.Array, matches: jax.Array) -> jax.Array:
        before = jnp.maximum(places - back, 0)
        last = jnp.take_along_axis(tokens, jnp.maximum(end - back, 0)[None], axis=0)
        same = jnp.take_along_axis(tokens, before, axis=0) == last
        there = (places >= back) & jnp.take_along_axis(valid, before, axis=0)
        return matches & (same & there | (back >= sizes)[None])

    # No n-gram that is longer than the history has come before, however much longer it is.
    most = jnp.minimum(jnp.max(sizes), len(tokens) + 1)
    matches = jax.lax.fori_loop(1, most, also, valid & (sizes > 0)[None])
    return jnp.where(mark(tokens, matches, logits.shape[1]), -jnp.inf, logits)


def _truncate(choices: Choices, logits: Float32[Array, "B V"]) -> Float32[Array, "B V"]:
    """Temperature, then top-k, top-p and min-p; rows that are not sampled come out as anything."""
    temperature = jnp.where(choices.temperature > 0, choices.temperature, 1.0)
    logits = logits / temperature[:, None]
    logits = jax.lax.cond(
        jnp.any((choices.top_k > 0) | (choices.top_p < 1)),
        _keep_likeliest, lambda _, logits: logits,
        choices, logits,
    )  # fmt: skip
    least = jnp.max(logits, axis=1, keepdims=True) + jnp.log(choices.min_p)[:, None]
    return jnp.where(logits < least, -jnp.inf, logits)


def _keep_likeliest(choices: Choices, logits: Float32[Array, "B V"]) -> Float32[Array, "B V"]:
    """Top-k, then top-p, of one sort."""
    size = logits.shape[1]
    descending = -jnp.sort(-logits, axis=1)
    asked = (choices.top_k > 0) & (choices.top_k < size)
    last = jnp.where(asked, choices.top_k, size)[:, None] - 1
    least = jnp.take_along_axis(descending, last, axis=1)
    logits = jnp.where(logits < least, -jnp.inf, logits)
    descending = jnp.where(descending < least, -jnp.inf, descending)
    probabilities = jax.nn.softmax(descending, axis=1)
    before = jnp.cumsum(probabilities, axis=1) - probabilities
    inside = (before < choices.top_p[:, None]) | (choices.top_p >= 1)[:, None]
    least = jnp.min(jnp.where(inside, descending, jnp.inf), axis=1, keepdims=True)
    return jnp.where(logits < least, -jnp.inf, logits)
