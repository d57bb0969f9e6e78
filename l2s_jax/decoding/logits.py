"""Logits to tokens: penalties, bans, and the truncations of sampling, then the choice of one.

All are pure functions of logits; a token that is ruled out has -inf.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float32, Int, Int32, Key, UInt32

from l2s_jax.cluster.placement import top_k
from l2s_jax.cluster.sharding import AnyArray
from l2s_jax.settings.search import Search


class History(struct.PyTreeNode):
    """The tokens so far: what a response continues, then the response itself.

    tokens: step-major, so that one more token of every row is one contiguous write. What the
      response continues ends at P, whatever its length, and L is P + S.
    start: where each row's first token is.
    end: how many positions are filled, of all rows or of each.
    """

    tokens: Int32[Array, "L B"]
    start: Int32[Array, " B"]
    end: Int32[Array, "*rows"]

    def write(self, tokens: Int32[Array, "K B"]) -> History:
        """Puts K tokens of every row after its last; its end stays where it is."""
        update = jax.lax.dynamic_update_slice_in_dim
        if self.end.ndim:
            each = jax.vmap(lambda old, new, at: update(old, new, at, axis=0), (1, 1, 0), 1)
            return self.replace(tokens=each(self.tokens, tokens, self.end))
        return self.replace(tokens=update(self.tokens, tokens, self.end, axis=0))

    def append(self, token: Int32[Array, " B"]) -> History:
        """One more token in every row."""
        return self.write(token[None]).replace(end=self.end + 1)

    def repeat(self, times: int) -> History:
        """Each row `times` times, next to each other."""
        return self.replace(
            tokens=jnp.repeat(self.tokens, times, axis=1), start=jnp.repeat(self.start, times)
        )

    def take(self, parents: Int32[Array, "prompts beams"]) -> History:
        """Each of a prompt's rows, one for each beam, as the one among them that `parents` says."""
        own = self.tokens.reshape(-1, *parents.shape)
        tokens = jnp.take_along_axis(own, parents[None], axis=2)
        return self.replace(tokens=tokens.reshape(self.tokens.shape))

    @property
    def valid(self) -> Bool[Array, "L B"]:
        """Where tokens are."""
        return self._between(self.start[None])

    def of_response(self, count: Int32[Array, "*rows"]) -> Bool[Array, "L B"]:
        """Where the tokens of the response are, of which there are `count`."""
        first = jnp.broadcast_to(self.end - count, self.start.shape)
        return self._between(first[None])

    def _between(self, first: Int32[Array, "1 B"]) -> Bool[Array, "L B"]:
        positions = jnp.arange(self.tokens.shape[0])[:, None]
        return (positions >= first) & (positions < self.end.reshape(1, -1))


def history_of(ids: Int[AnyArray, "B P"], mask: Bool[AnyArray, "B P"], capacity: int) -> History:
    """A history that starts with the ids where the mask is true."""
    batch_size, length = ids.shape
    order = jnp.argsort(mask, axis=1, stable=True)  # padding first, tokens in their order
    tokens = jnp.zeros((length + capacity, batch_size), jnp.int32)
    tokens = tokens.at[:length].set(jnp.take_along_axis(ids, order, axis=1).T)
    return History(tokens, length - jnp.sum(mask, axis=1, dtype=jnp.int32), jnp.int32(length))


def constrain(
    search: Search,
    logits: Float32[Array, "B V"],
    history: History | None,
    count: Int32[Array, "*rows"],
    end_ids: tuple[int, ...],
) -> Float32[Array, "B V"]:
    """Penalties of what was said, n-gram bans and the minimum length, in transformers' order.

    history: where search.needs_history. count: tokens of the response so far, of all rows or of
    each.
    """
    if search.needs_history:
        if history is None:
            raise ValueError("penalties and bans of repetition: expected a history")
        if search.repetition_penalty != 1:
            logits = penalize_repetition(logits, history, search.repetition_penalty)
        if search.frequency_penalty or search.presence_penalty:
            penalties = search.frequency_penalty, search.presence_penalty
            logits = penalize_response(logits, history, count, *penalties)
        if search.no_repeat_ngram_size:
            logits = _ban_repeated_ngrams(logits, history, search.no_repeat_ngram_size)
    if search.min_new_tokens and end_ids:
        early = count.reshape(-1, 1) < search.min_new_tokens
        ends = jnp.array(end_ids)
        logits = logits.at[:, ends].set(jnp.where(early, -jnp.inf, logits[:, ends]))
    return logits


def among(tokens: Int32[Array, "*shape"], ids: tuple[int, ...]) -> Bool[Array, "*shape"]:
    """Which tokens are one of `ids`."""
    found = jnp.zeros(tokens.shape, bool)
    for one in ids:
        found |= tokens == one
    return found


def mark(
    tokens: Int32[Array, "L B"], chosen: Bool[Array, "L B"], vocab_size: int
) -> Bool[Array, "B {vocab_size}"]:
    """Which tokens those are: the tokens of each row where `chosen` is true."""
    outside = jnp.where(chosen, tokens, vocab_size)
    none = jnp.zeros(vocab_size, bool)
    return jax.vmap(lambda row: none.at[row].set(True, mode="drop"), in_axes=1)(outside)


def penalize_repetition(
    logits: Float32[Array, "B V"], history: History, penalty: float | Float32[AnyArray, "B 1"]
) -> Float32[Array, "B V"]:
    """The repetition penalty, of all rows or of each."""
    seen = mark(history.tokens, history.valid, logits.shape[1])
    return jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)


def penalize_response(
    logits: Float32[Array, "B V"],
    history: History,
    count: Int32[Array, "*rows"],
    frequency: float | Float32[AnyArray, "B 1"],
    presence: float | Float32[AnyArray, "B 1"],
) -> Float32[Array, "B V"]:
    """The penalties by frequency and by presence, of all rows or of each."""
    size = logits.shape[1]
    tokens = jnp.where(history.of_response(count), history.tokens, size)
    none = jnp.zeros(size)
    times = jax.vmap(lambda row: none.at[row].add(1.0, mode="drop"), in_axes=1)(tokens)
    return logits - frequency * times - presence * (times > 0)


def _ban_repeated_ngrams(
    logits: Float32[Array, "B V"], history: History, size: int
) -> Float32[Array, "B V"]:
    tokens, valid = history.tokens, history.valid
    windows = tokens.shape[0] - size + 1
    if windows < 1:
        return logits
    # A window bans its last token if the tokens before it are the last size - 1 tokens so far.
    # Positions below 0 are clipped, which only happens where no window is complete.
    first = jnp.broadcast_to(history.end - (size - 1), history.start.shape)
    matches = valid[:windows] & valid[size - 1 :]
    for offset in range(size - 1):
        place = jnp.clip(first + offset, 0)[None]
        matches &= tokens[offset : offset + windows] == jnp.take_along_axis(tokens, place, axis=0)
    return jnp.where(mark(tokens[size - 1 :], matches, logits.shape[1]), -jnp.inf, logits)


def truncate(search: Search, logits: Float32[Array, "B V"]) -> Float32[Array, "B V"]:
    """Temperature, then top-k, top-p and min-p, in transformers' order; for sampling."""
    logits = logits / search.temperature
    if 0 < search.top_k < logits.shape[1]:
        least = top_k(logits, search.top_k)[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if search.top_p < 1:
        descending = -jnp.sort(-logits, axis=1)
        probabilities = jax.nn.softmax(descending, axis=1)
        before = jnp.cumsum(probabilities, axis=1) - probabilities
        least = jnp.min(
            jnp.where(before < search.top_p, descending, jnp.inf), axis=1, keepdims=True
        )
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if search.min_p:
        least = jnp.max(logits, axis=1, keepdims=True) + jnp.log(search.min_p)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return logits


def keys_of(search: Search, seeds: UInt32[AnyArray, " B"] | None) -> Key[Array, " B"] | None:
    """What each row is sampled by; None where nothing is sampled.

    Raises:
      ValueError: sampling, and no seeds.
    """
    if not search.temperature:
        return None
    if seeds is None:
        raise ValueError("sampling: expected seeds")
    return jax.vmap(jax.random.key)(seeds)


def pick(
    search: Search,
    logits: Float32[Array, "B V"],
    count: Int32[Array, "*rows"],
    keys: Key[Array, " B"] | None,
) -> Int32[Array, " B"]:
    """The next token of each row, of logits that `constrain` gave.

    count: tokens of the response so far. keys: of each row, for sampling.
    """
    if keys is None:
        return greatest(logits)
    keys = jax.vmap(jax.random.fold_in)(keys, jnp.broadcast_to(count, keys.shape))
    return sample(truncate(search, logits), keys)


def sample(logits: Float32[Array, "B V"], keys: Key[Array, " B"]) -> Int32[Array, " B"]:
    """One token of each row's distribution, by that row's own key only."""
    noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:]))(keys)
    return jnp.argmax(logits + noise, axis=1).astype(jnp.int32)


def greatest(logits: Float32[Array, "B V"]) -> Int32[Array, " B"]:
    """The token of each row's greatest logit, the first of several: greedy decoding.

    Equal to `jnp.argmax` where no logit is NaN.
    """

    def in_two_reductions(logits: jax.Array) -> jax.Array:
        last = logits.shape[1] - 1
        places = jnp.arange(last + 1, dtype=jnp.int32)
        found = logits == jnp.max(logits, axis=1, keepdims=True)
        return jnp.min(jnp.where(found, places, last), axis=1)

    # XLA's CPU backend makes vector instructions of a maximum and a minimum, and none of an argmax.
    # (Not for `sample`: noise that is computed anew for each of the two might differ in a bit.)
    return jax.lax.platform_dependent(
        logits,
        cpu=in_two_reductions,
        default=lambda logits: jnp.argmax(logits, axis=1).astype(jnp.int32),
    )
