"""Requests that come and go, decoded side by side: each row of a state is a slot for one of them.

Rows stand at places of their own and have settings of their own (`Choices`), so that a few programs
serve any mix of requests; where all have one `Search`, programs are of that search alone. One reads
prompts, one puts what they left into slots, one decodes a chunk, and one brings the requests that
are left into fewer slots, or makes room for more.

What a slot says does not depend on the others, but for rounding: it is what the ordinary loops say
of that prompt with that search and seed.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float32, Int, Int32, UInt32

from l2s_jax.cluster.placement import constrain as constrain_axes
from l2s_jax.cluster.sharding import ROWS, AnyArray
from l2s_jax.decoding.choices import Choices, constrain, keys_of, pick
from l2s_jax.decoding.drafted import ExactState
from l2s_jax.decoding.exact import ExactLoop
from l2s_jax.decoding.logits import History, among, history_of
from l2s_jax.decoding.loop import repeat_while, until
from l2s_jax.decoding.scores import Scores, no_scores
from l2s_jax.models.cache import place, taking_turns, turned_to
from l2s_jax.models.systems import Params, System
from l2s_jax.settings.search import Search


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
    seeds: UInt32[Array, " B"]
    choices: Choices
    scores: Scores
    cache: Any
    room: int = struct.field(pytree_node=False)

    @property
    def tokens(self) -> Int32[Array, "S B"]:
        """The responses, step-major; what comes after a row's length is no part of it."""
        return self.history.tokens[-self.room :]


AnyState = TypeVar("AnyState", SlotState, ExactState)


class Slots(struct.PyTreeNode):
    """Rows of a state, and the logits by which those that are `fresh` have their first token.

    logits: [B, V], of each model that chooses it.
    """

    rows: SlotState | ExactState
    logits: tuple[Float32[Array, "B _"], ...]
    fresh: Bool[Array, " B"]


@dataclasses.dataclass(frozen=True)
class SlotLoop:
    """The loop of a system's step, with rows at places of their own.

    `capacity` is the most tokens that any row may have. `search` is that of all rows; None: each
    row has its own in the state, and a program has what any of them may need.
    """

    system: System
    end_ids: tuple[int, ...]
    capacity: int
    search: Search | None = None

    def read(
        self,
        trained: Params,
        frozen: Params,
        ids: Int[AnyArray, "B T"],
        mask: Bool[AnyArray, "B T"],
        limits: Int[AnyArray, " B"],
        seeds: UInt32[AnyArray, " B"],
        choices: Choices,
        wanted: Bool[AnyArray, " B"],
    ) -> tuple[SlotState, tuple[Float32[Array, "B V"]]]:
        """As of ExactLoop.read."""
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
            seeds=jnp.asarray(seeds),
            choices=choices,
            scores=no_scores(wanted, room),
            # A row's last token is never written, so this is room for what a decoder starts with.
            cache=taking_turns(cache, self.capacity),
            room=room,
        )
        return state, (logits,)

    def begin(self, state: SlotState, first: tuple[Float32[Array, "B V"]]) -> SlotState:
        """As of ExactLoop.begin."""
        return self._choose(state, first[0])

    def advance(
        self,
        trained: Params,
        frozen: Params,
        state: SlotState,
        most: int | Int32[Array, ""],
        enough: int | Int32[Array, ""],
    ) -> SlotState:
        """Up to `most` tokens more in each row, and none after `enough` rows more are done."""

        def one_step(state: SlotState) -> SlotState:
            last = jnp.take_along_axis(state.history.tokens, state.history.end[None] - 1, axis=0)
            logits, cache = self.system.step(trained, last[0], state.cache)
            # What a row that is done writes is not seen.
            index = jnp.where(state.done, state.cache.index, cache.index)
            return self._choose(state.replace(cache=cache.replace(index=index)), logits)

        return repeat_while(until(state.done, enough), one_step, state, most)

    def _choose(self, state: SlotState, logits: Float32[Array, "B V"]) -> SlotState:
        search, lengths = self.search or state.choices, state.lengths
        chosen = constrain(search, logits, state.history, lengths, self.end_ids)
        token = pick(search, chosen, lengths, keys_of(search, state.seeds))
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
    steps: the most that a row went on by: tokens, or blocks of exact decoding.
    """

    tokens: Int32[Array, "S B"]
    lengths: Int32[Array, " B"]
    done: Bool[Array, " B"]
    finished: Bool[Array, " B"]
    scores: Scores
    drafts: tuple[Int32[Array, " B *M"], ...]
    steps: Int32[Array, ""]


def _said(state: SlotState | ExactState, before: SlotState | ExactState) -> Said:
    """The part of a state that a program gives beside it."""
    drafts = (state.blocks, state.tested, state.passed) if isinstance(state, ExactState) else ()
    assert state.scores is not None
    return Said(
        state.tokens,
        state.lengths,
        state.done,
        state.finished,
        state.scores,
        drafts,
        jnp.max(_steps(state) - _steps(before)),
    )


def _steps(state: SlotState | ExactState) -> Int32[Array, " B"]:
    return state.blocks if isinstance(state, ExactState) else state.lengths


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
) -> Slots:
    """Prompts, in slots of their own, before the first token; arguments as of ExactLoop.read.

    prompt_slots: T of the longest prompts, for which the state has room.
    """

    def start(ids: AnyArray, mask: AnyArray) -> Any:
        return loop.read(trained, frozen, ids, mask, limits, seeds, choices, wanted)

    longest = jax.ShapeDtypeStruct((len(ids), prompt_slots), jnp.int32)
    roomy, _ = jax.eval_shape(start, longest, jax.ShapeDtypeStruct(longest.shape, bool))
    state, logits = start(ids, mask)
    return _placed(Slots(_with_room(state, roomy), logits, ~state.done))


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


@functools.partial(jax.jit, static_argnames="loop", donate_argnames="slots")
def advance(
    loop: SlotLoop | ExactLoop,
    trained: Params,
    frozen: Params,
    slots: Slots,
    ended: Bool[AnyArray, " B"],
    most: Int[AnyArray, ""],
    enough: Int[AnyArray, ""],
) -> tuple[Slots, Said]:
    """A chunk more, where `ended` rows have no more to say.

    It is the first token of those that are fresh; then of all rows what the loop's `advance` adds.
    """
    one_way: Any = loop
    old = slots.rows.replace(done=slots.rows.done | ended)
    new = one_way.advance(trained, frozen, _begun(one_way, slots.replace(rows=old)), most, enough)
    slots = slots.replace(rows=new, fresh=jnp.zeros_like(slots.fresh))
    return _placed(slots), _said(new, old)


def _begun(loop: Any, slots: Slots) -> SlotState | ExactState:
    """The rows, with the first token of those that are fresh."""
    old = slots.rows

    def begun(old: Any) -> Any:
        new = loop.begin(old.replace(done=old.done | ~slots.fresh), slots.logits)
        return new.replace(done=jnp.where(slots.fresh, new.done, old.done))

    # Not the cache, which a branch would copy.
    without = old.replace(cache=None)
    chosen = jax.lax.cond(jnp.any(slots.fresh), begun, lambda old: old, without)
    return chosen.replace(cache=old.cache)


@functools.partial(jax.jit, donate_argnames="slots")
def insert(slots: Slots, new: Slots, places: Int[AnyArray, " R"]) -> Slots:
    """The slots with each row of `new` in one; rows whose place no slot has are left out."""

    def put(axis: int, old: jax.Array, rows: jax.Array) -> jax.Array:
        where = (slice(None),) * axis + (places,)
        return old.at[where].set(rows, mode="drop")

    if isinstance(slots.rows, SlotState) and isinstance(new.rows, SlotState):
        cache = turned_to(new.rows.cache, slots.rows.cache.turn)
        new = new.replace(rows=new.rows.replace(cache=cache))
    joined = _each(put, slots, new)
    if isinstance(slots.rows, ExactState) and isinstance(new.rows, ExactState):
        # A share that passed is remembered as long as somebody is there.
        rate = jnp.where(jnp.all(slots.rows.done), new.rows.rate, slots.rows.rate)
        rows = joined.rows.replace(origin=new.rows.origin, rate=rate)
        joined = joined.replace(rows=rows)
    return _placed(joined)


@jax.jit
def regroup(slots: Slots, places: Int[AnyArray, " Q"]) -> Slots:
    """Q slots: those of these places, and for -1 an empty one."""
    places = jnp.asarray(places)
    chosen = _each(lambda axis, leaf: jnp.take(leaf, jnp.maximum(places, 0), axis=axis), slots)
    empty = places < 0
    rows = chosen.rows.replace(done=chosen.rows.done | empty)
    return _placed(chosen.replace(rows=rows, fresh=chosen.fresh & ~empty))


def _placed(slots: Slots) -> Slots:
    """The slots, where every program leaves them: else, the next one is compiled for each before.

    Nothing changes without a mesh.
    """

    def lay(axis: int, leaf: jax.Array) -> jax.Array:
        return constrain_axes(leaf, *[ROWS if i == axis else None for i in range(leaf.ndim)])

    cache = slots.rows.cache
    caches = tuple(map(place, cache)) if isinstance(cache, tuple) else place(cache)
    slots = _each(lay, slots.replace(rows=slots.rows.replace(cache=None)))
    return slots.replace(rows=slots.rows.replace(cache=caches))


def _each(change: Callable[..., jax.Array], slots: Slots, *others: Slots) -> Slots:
    """The slots with `change(axis, leaf, *leaves)` of all that has an axis of rows."""
    axes = jax.tree.map(lambda _: 0, slots)
    rows = axes.rows.replace(
        history=axes.rows.history.replace(tokens=1),
        scores=axes.rows.scores.replace(chosen=1, ids=1, values=1),
    )
    if isinstance(slots.rows, ExactState):
        rows = rows.replace(origin=(-1, -1), rate=-1)
    elif rows.cache is not None:
        rows = rows.replace(cache=rows.cache.replace(turn=-1))
    return jax.tree.map(
        lambda axis, leaf, *leaves: leaf if axis < 0 else change(axis, leaf, *leaves),
        axes.replace(rows=rows), slots, *others,
    )  # fmt: skip
