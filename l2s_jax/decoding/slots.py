"""Requests that come and go, decoded side by side: each row of a state is a slot for one of them.

Rows stand at places of their own and have settings of their own (`Choices`), so that a few programs
serve any mix of requests: one reads prompts, one puts what they left into slots, one decodes a
chunk, and one brings the requests that are left into fewer slots, or makes room for more.

What a slot says does not depend on the others: it is what the ordinary loops say of that prompt
with that search and seed.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float32, Int, Int32, Key, UInt32

from l2s_jax.cluster.sharding import AnyArray
from l2s_jax.decoding.choices import Choices, constrain, keys_of, pick
from l2s_jax.decoding.drafted import ExactState
from l2s_jax.decoding.exact import ExactLoop
from l2s_jax.decoding.logits import History, among, history_of
from l2s_jax.decoding.loop import repeat
from l2s_jax.decoding.scores import Scores, no_scores
from l2s_jax.models.systems import Params, System


class SlotState(struct.PyTreeNode):
    """Where the slots of a system stand. Fields as of exact decoding's ExactState.

    history: what each response continues, then the response; rows have their own ends.
    lengths: tokens so far, of which the cache holds all but the last.
    """

    history: History
    lengths: Int32[Array, " B"]
    limits: Int32[Array, " B"]
    done: Bool[Array, " B"]
    finished: Bool[Array, " B"]
    keys: Key[Array, " B"] | None
    choices: Choices
    scores: Scores
    cache: Any
    room: int = struct.field(pytree_node=False)

    @property
    def tokens(self) -> Int32[Array, "S B"]:
        """The responses, step-major; what comes after a row's length is no part of it."""
        return self.history.tokens[-self.room :]


AnyState = TypeVar("AnyState", SlotState, ExactState)


@dataclasses.dataclass(frozen=True)
class SlotLoop:
    """The loop of a system's step, with rows at places of their own.

    `capacity` is the most tokens that any row may have, `chunk` how many `advance` adds to each.
    """

    system: System
    end_ids: tuple[int, ...]
    capacity: int
    chunk: int

    def start(
        self,
        trained: Params,
        frozen: Params,
        ids: Int[AnyArray, "B T"],
        mask: Bool[AnyArray, "B T"],
        limits: Int[AnyArray, " B"],
        seeds: UInt32[AnyArray, " B"],
        choices: Choices,
        wanted: Bool[AnyArray, " B"],
    ) -> SlotState:
        """The state after the first token; arguments as of ExactLoop.start."""
        rows, limits = ids.shape[0], jnp.asarray(limits)
        # A row that is done writes after its last token.
        room = self.capacity + 1
        hidden = self.system.encode(trained, frozen, ids, mask)
        logits, cache = self.system.prefill(trained, frozen, ids, mask, hidden, self.capacity)
        history = history_of(*self.system.continued(ids, mask), room)
        every = jnp.zeros(rows, jnp.int32)
        state = SlotState(
            history=history.replace(end=history.end + every),
            lengths=every,
            limits=jnp.minimum(limits, self.capacity),
            done=limits <= 0,
            finished=limits <= 0,
            keys=keys_of(choices, seeds),
            choices=choices,
            scores=no_scores(wanted, room),
            cache=cache.replace(index=cache.index + every),
            room=room,
        )
        return self._choose(state, logits)

    def advance(self, trained: Params, frozen: Params, state: SlotState) -> SlotState:
        """A chunk of tokens more in each row that is not done."""

        def one_step(state: SlotState) -> SlotState:
            last = jnp.take_along_axis(state.history.tokens, state.history.end[None] - 1, axis=0)
            logits, cache = self.system.step(trained, last[0], state.cache)
            # A row that is done stays where it is, and writes over what no one reads.
            index = jnp.where(state.done, state.cache.index, cache.index)
            return self._choose(state.replace(cache=cache.replace(index=index)), logits)

        return repeat(one_step, state, self.chunk)

    def _choose(self, state: SlotState, logits: Float32[Array, "B V"]) -> SlotState:
        choices, lengths = state.choices, state.lengths
        chosen = constrain(choices, logits, state.history, lengths, self.end_ids)
        token = pick(choices, chosen, lengths, state.keys)
        live = ~state.done
        ended = live & among(token, self.end_ids)
        history = state.history.write(token[None])
        return state.replace(
            history=history.replace(end=history.end + live),
            lengths=lengths + live,
            finished=state.finished | ended,
            done=state.done | ended | (lengths + live >= state.limits),
            scores=state.scores.write(lengths, logits[:, None], token[:, None]),
        )


class Said(struct.PyTreeNode):
    """What the slots have said so far, for the host.

    drafts: blocks, tested and passed, of exact decoding; else empty.
    """

    tokens: Int32[Array, "S B"]
    lengths: Int32[Array, " B"]
    done: Bool[Array, " B"]
    finished: Bool[Array, " B"]
    scores: Scores
    drafts: tuple[Int32[Array, " B *M"], ...]


def said(state: SlotState | ExactState) -> Said:
    """The part of a state that a program gives beside it."""
    drafts = (state.blocks, state.tested, state.passed) if isinstance(state, ExactState) else ()
    assert state.scores is not None
    return Said(state.tokens, state.lengths, state.done, state.finished, state.scores, drafts)


@functools.partial(jax.jit, static_argnames=("loop", "prompt_slots"))
def read(
    loop: SlotLoop | ExactLoop,
    trained: Params,
    frozen: Params,
    ids: Int[AnyArray, "R T"],
    mask: Bool[AnyArray, "R T"],
    limits: Int[AnyArray, " R"],
    seeds: UInt32[AnyArray, " R"],
    choices: Choices,
    wanted: Bool[AnyArray, " R"],
    *,
    prompt_slots: int,
) -> tuple[SlotState | ExactState, Said]:
    """Prompts, with the first token of each response; arguments as of ExactLoop.start.

    prompt_slots: T of the longest prompts, for which the state has room.
    """

    def start(ids: AnyArray, mask: AnyArray) -> Any:
        return loop.start(trained, frozen, ids, mask, limits, seeds, choices, wanted)

    longest = jax.ShapeDtypeStruct((len(ids), prompt_slots), jnp.int32)
    roomy = jax.eval_shape(start, longest, jax.ShapeDtypeStruct(longest.shape, bool))
    state = _with_room(start(ids, mask), roomy)
    return state, said(state)


def _with_room(state: AnyState, roomy: AnyState) -> AnyState:
    """The state with the shapes of `roomy`, which has room for longer prompts."""

    def pad(leaf: jax.Array, like: Any) -> jax.Array:
        room = [(0, a - b) for a, b in zip(like.shape, leaf.shape, strict=True)]
        return jnp.pad(leaf, room) if any(map(any, room)) else leaf

    # What a response continues ends at one place, whatever its length.
    history = state.history
    shift = roomy.history.tokens.shape[0] - history.tokens.shape[0]
    return state.replace(
        history=History(
            jnp.pad(history.tokens, ((shift, 0), (0, 0))),
            history.start + shift,
            history.end + shift,
        ),
        cache=jax.tree.map(pad, state.cache, roomy.cache),
    )


@functools.partial(jax.jit, static_argnames="loop", donate_argnames="state")
def advance(
    loop: SlotLoop | ExactLoop,
    trained: Params,
    frozen: Params,
    state: AnyState,
    ended: Bool[AnyArray, " B"],
) -> tuple[AnyState, Said]:
    """A chunk more, where `ended` rows have no more to say."""
    one_way: Any = loop
    state = one_way.advance(trained, frozen, state.replace(done=state.done | ended))
    return state, said(state)


@functools.partial(jax.jit, donate_argnames="state")
def insert(state: AnyState, new: AnyState, slots: Int[AnyArray, " R"]) -> AnyState:
    """The state with each row of `new` in a slot; rows whose number no slot has are left out."""

    def put(axis: int, old: jax.Array, rows: jax.Array) -> jax.Array:
        where = (slice(None),) * axis + (slots,)
        return old.at[where].set(rows, mode="drop")

    joined = _rows(put, state, new)
    if isinstance(state, ExactState) and isinstance(new, ExactState):
        # A share that passed is remembered as long as somebody is there.
        rate = jnp.where(jnp.all(state.done), new.rate, state.rate)
        joined = joined.replace(origin=new.origin, rate=rate)
    return joined


@jax.jit
def regroup(state: AnyState, slots: Int[AnyArray, " Q"]) -> AnyState:
    """A state of Q slots: those of these numbers, and for -1 an empty one."""
    slots = jnp.asarray(slots)
    chosen = _rows(lambda axis, leaf: jnp.take(leaf, jnp.maximum(slots, 0), axis=axis), state)
    return chosen.replace(done=chosen.done | (slots < 0))


def _rows(change: Callable[..., jax.Array], state: AnyState, *others: AnyState) -> AnyState:
    """The state with `change(axis, leaf, *leaves)` of all that has an axis of rows."""
    axes = jax.tree.map(lambda _: 0, state)
    axes = axes.replace(
        history=axes.history.replace(tokens=1),
        scores=axes.scores.replace(chosen=1, ids=1, values=1),
    )
    if isinstance(state, ExactState):
        axes = axes.replace(origin=(-1, -1), rate=-1)
    return jax.tree.map(
        lambda axis, leaf, *leaves: leaf if axis < 0 else change(axis, leaf, *leaves),
        axes, state, *others,
    )  # fmt: skip
