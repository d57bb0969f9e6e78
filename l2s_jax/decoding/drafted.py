"""What exact decoding holds between two blocks, and what it gives back."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float32, Int32, UInt32

from l2s_jax.decoding.choices import Choices
from l2s_jax.decoding.logits import History, among
from l2s_jax.decoding.loop import Decoded
from l2s_jax.decoding.scores import Scores


class Drafted(Decoded):
    """What exact decoding gives back.

    blocks: how many blocks the LLM read of each row.
    tested: how often a drafted token of each place in a block came to be tested.
    passed: how often it passed.
    """

    blocks: Int32[Array, " B"]
    tested: Int32[Array, "B M"]
    passed: Int32[Array, "B M"]


class ExactState(struct.PyTreeNode):
    """Where the loop stands. Fields as of loop.State and of Drafted, and:

    history: what the response continues, if need be, then the response; rows have their own ends.
    lengths: tokens so far, of which the LLM's cache holds all but the last.
    seeds: what rows are sampled by, or None; no keys of JAX, with which calls of programs are slow.
    held: tokens that the SLM's cache holds: all but the last, or the last two.
    choices: how tokens are chosen, in place of the loop's search, or None.
    scores: by the LLM, or None.
    cache: (the LLM's, the SLM's); None of an LLM that nobody asks.
    origin: the index of each cache before the response.
    rate: tokens tested and passed lately, [2].
    """

    history: History
    lengths: Int32[Array, " B"]
    limits: Int32[Array, " B"]
    held: Int32[Array, " B"]
    done: Bool[Array, " B"]
    finished: Bool[Array, " B"]
    seeds: UInt32[Array, " B"] | None
    choices: Choices | None
    scores: Scores | None
    cache: tuple[Any, Any]
    origin: tuple[Int32[Array, ""], Int32[Array, ""]]
    rate: Float32[Array, " two"]
    blocks: Int32[Array, " B"]
    tested: Int32[Array, "B M"]
    passed: Int32[Array, "B M"]
    room: int = struct.field(pytree_node=False)

    @property
    def tokens(self) -> Int32[Array, "S B"]:
        """The responses, as of loop.State; what comes after a row's length is no part of it."""
        return self.history.tokens[-self.room :]

    def with_tokens(
        self, end_ids: tuple[int, ...], tokens: Int32[Array, "B K"], count: Int32[Array, " B"]
    ) -> ExactState:
        """The state with the first `count` of these tokens, up to one of `end_ids` or the limit."""
        size = tokens.shape[1]
        places = jnp.arange(size)[None]
        ends = among(tokens, end_ids) & (places < count[:, None])
        ended = jnp.any(ends, axis=1)
        count = jnp.where(ended, jnp.argmax(ends, axis=1).astype(jnp.int32) + 1, count)
        room = jnp.where(self.done, 0, self.limits - self.lengths)
        finished = ended & (count <= room)
        count = jnp.minimum(count, room)
        lengths = self.lengths + count
        history = self.history.write(tokens.T)
        return self.replace(
            history=history.replace(end=history.end + count),
            lengths=lengths,
            held=jnp.minimum(self.held, lengths - 1),
            finished=self.finished | finished,
            done=self.done | finished | (lengths >= self.limits),
        )
