"""Greedy decoding and sampling as one compiled loop: no host work and no Python per token.

Steps run in chunks, a `lax.scan` of a fixed number inside a `lax.while_loop` that ends when every
row is done: the scan is what a compiler does well, the while loop is what stops early. `start`,
`advance` and `finish` are the same loop taken apart, for callers that want tokens as they come.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float32, Int, Int32, Key, UInt32

from l2s_jax.cluster.sharding import AnyArray
from l2s_jax.decoding.logits import History, among, constrain, keys_of, pick
from l2s_jax.settings.search import Search

Cache = TypeVar("Cache")
S = TypeVar("S", bound=Any)
Step = Callable[[Any, jax.Array, Cache], tuple[jax.Array, Cache]]

CHUNK = 8
# So many rows as there are.
EVERY = 2**31 - 1


class Decoded(struct.PyTreeNode):
    """What a decoding loop gives back.

    tokens: what ended the row included, pad_id after it.
    lengths: tokens of each row, what ended it included.
    finished: whether one of the end_ids ended the row; if not, its limit cut it. True too of rows
      with a limit of 0, which nothing cuts.
    """

    tokens: Int32[Array, "B S"]
    lengths: Int32[Array, " B"]
    finished: Bool[Array, " B"]


class State(struct.PyTreeNode):
    """Where a loop stands.

    count: tokens so far, the same for every row.
    tokens: [steps + 1, B], step-major, so that a step's tokens are one contiguous write.
    token: the last one of each row.
    finished: as in Decoded.
    keys: for sampling, or None.
    history: for the penalties that need it, or None.
    """

    count: Int32[Array, ""]
    tokens: Int32[Array, "_ B"]
    token: Int32[Array, " B"]
    done: Bool[Array, " B"]
    finished: Bool[Array, " B"]
    lengths: Int32[Array, " B"]
    limits: Int32[Array, " B"]
    keys: Key[Array, " B"] | None
    history: History | None
    cache: Any


@dataclasses.dataclass(frozen=True)
class Loop:
    """One way to decode, hashable so that it can be static in `jax.jit`.

    `capacity` is the most tokens that any row may have; its limit may be lower. Any of `end_ids`
    ends a row.
    """

    step: Step
    end_ids: tuple[int, ...]
    pad_id: int
    capacity: int
    search: Search

    def start(
        self,
        logits: Float32[Array, "B V"],
        cache: Any,
        limits: Int[AnyArray, " B"],
        seeds: UInt32[AnyArray, " B"] | None = None,
        history: History | None = None,
    ) -> State:
        """The state after the first token.

        Args:
          logits: of the first token.
          cache: with room for `decoding_steps(capacity)` tokens.
          limits: tokens that each row may have; rows with 0 give padding only.
          seeds: for sampling: what a row says depends on its own only.
          history: what the response continues, where search.needs_history.
        """
        rows, limits = logits.shape[0], jnp.asarray(limits)
        state = State(
            count=jnp.int32(0),
            tokens=jnp.full((decoding_steps(self.capacity) + 1, rows), self.pad_id, jnp.int32),
            token=jnp.zeros(rows, jnp.int32),
            done=limits <= 0,
            finished=limits <= 0,
            lengths=jnp.zeros(rows, jnp.int32),
            limits=jnp.minimum(limits, self.capacity),
            keys=keys_of(self.search, seeds),
            history=history if self.search.needs_history else None,
            cache=cache,
        )
        return self._choose(state, logits)

    def advance(self, params: Any, state: State, unroll: int = 1) -> State:
        """A chunk of tokens more, `unroll` steps in each turn of the compiled loop."""

        def one_step(state: State) -> State:
            logits, cache = self.step(params, state.token, state.cache)
            return self._choose(state.replace(cache=cache), logits)

        return repeat(one_step, state, CHUNK, unroll)

    def finish(self, state: State) -> Decoded:
        """What was decoded, S = capacity."""
        return Decoded(state.tokens[: self.capacity].T, state.lengths, state.finished)

    def run(
        self,
        params: Any,
        logits: Float32[Array, "B V"],
        cache: Any,
        limits: Int[AnyArray, " B"],
        seeds: UInt32[AnyArray, " B"] | None = None,
        history: History | None = None,
    ) -> Decoded:
        """From the first logits to the end of every row; arguments as of `start`."""
        state = self.start(logits, cache, limits, seeds, history)
        if self.capacity > 1:
            state = jax.lax.while_loop(
                lambda state: ~jnp.all(state.done), lambda state: self.advance(params, state), state
            )
        return self.finish(state)

    def _choose(self, state: State, logits: Float32[Array, "B V"]) -> State:
        search = self.search
        logits = constrain(search, logits, state.history, state.count, self.end_ids)
        token = pick(search, logits, state.count, state.keys)
        token = jnp.where(state.done, self.pad_id, token)
        count = state.count + 1
        ended = ~state.done & (among(token, self.end_ids))
        return state.replace(
            count=count,
            tokens=jax.lax.dynamic_update_slice_in_dim(
                state.tokens, token[None], state.count, axis=0
            ),
            token=token,
            lengths=jnp.where(state.done, state.lengths, count),
            finished=state.finished | ended,
            done=state.done | ended | (count >= state.limits),
            history=None if state.history is None else state.history.append(token),
        )


def repeat(one: Callable[[S], S], state: S, times: int, unroll: int = 1) -> S:
    """`one` so many times, as a loop whose state has a `cache` that is changed in place."""
    squeeze, expand = _rows_of(state)

    def turn(state: S, _: None) -> tuple[S, None]:
        return squeeze(one(expand(state))), None

    return expand(jax.lax.scan(turn, squeeze(state), length=times, unroll=unroll)[0])


def repeat_while(
    holds: Callable[[S], Bool[Array, ""]],
    one: Callable[[S], S],
    state: S,
    most: int | Int32[Array, ""],
) -> S:
    """`one` as long as `holds`, so many times at most, likewise."""
    squeeze, expand = _rows_of(state)

    def turn(made: tuple[jax.Array, S]) -> tuple[jax.Array, S]:
        return made[0] + 1, squeeze(one(expand(made[1])))

    first = jnp.int32(0), squeeze(state)
    return expand(jax.lax.while_loop(lambda m: (m[0] < most) & holds(m[1]), turn, first)[1])


def until(
    done: Bool[Array, " B"], enough: int | Int32[Array, ""]
) -> Callable[[Any], Bool[Array, ""]]:
    """Holds until all rows of a state are done, or `enough` more than these."""
    most = jnp.minimum(jnp.sum(done) + jnp.minimum(enough, done.size), done.size)
    return lambda state: jnp.sum(state.done) < most


def _rows_of(state: Any) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    """(what takes the row axis from the cache of a state like this, what gives it back).

    Compiled loops carry the keys and values of one row without their row axis, which XLA leaves out
    of the step's products: with it, the CPU backend copies them at every step.
    """
    squeezed = jax.tree.map(lambda leaf: leaf.ndim == 4 and leaf.shape[0] == 1, state.cache)

    def reshaped(state: Any, change: Callable[[jax.Array], jax.Array]) -> Any:
        leaves = jax.tree.map(
            lambda leaf, single: change(leaf) if single else leaf, state.cache, squeezed
        )
        return state.replace(cache=leaves)

    return (
        lambda state: reshaped(state, lambda leaf: leaf[0]),
        lambda state: reshaped(state, lambda leaf: leaf[None]),
    )


def decoding_steps(max_new_tokens: int) -> int:
    """Calls of `step` that the loop may make: the first token needs none, the rest whole chunks."""
    return -(-(max_new_tokens - 1) // CHUNK) * CHUNK
