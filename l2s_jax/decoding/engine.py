"""Prompt to response as compiled programs, for any system and any search.

`decode` is a whole batch in one program. `start` and `advance` are the same in two, for tokens as
they come. All depend on the shapes of their arguments and the static settings only, so that a fixed
set of buckets is a fixed set of programs.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int, UInt32

from l2s_jax.cluster.sharding import AnyArray
from l2s_jax.decoding.beam import Hypotheses, beam_search
from l2s_jax.decoding.drafted import ExactState
from l2s_jax.decoding.exact import ExactLoop
from l2s_jax.decoding.logits import History, history_of
from l2s_jax.decoding.loop import Decoded, Loop, State, decoding_steps
from l2s_jax.models.cache import take_hypotheses
from l2s_jax.models.exact import Exact
from l2s_jax.models.systems import Params, System
from l2s_jax.settings.search import Search

GREEDY = Search()


def prefill(
    system: System,
    trained: Params,
    frozen: Params,
    ids: Int[AnyArray, "B T"],
    mask: Bool[AnyArray, "B T"],
    hidden: Float[AnyArray, "B T D"],
    *,
    max_new_tokens: int,
    search: Search = GREEDY,
) -> tuple[Float32[Array, "B V"], Any, History | None]:
    """(logits of the first token, cache, history), from what `system.encode` gave."""
    steps = decoding_steps(max_new_tokens)
    logits, cache = system.prefill(trained, frozen, ids, mask, hidden, steps)
    history = None
    if search.needs_history:
        history = history_of(*system.continued(ids, mask), steps + 1)
    return logits, cache, history


def _read(
    system: System,
    trained: Params,
    frozen: Params,
    ids: Int[AnyArray, "B T"],
    mask: Bool[AnyArray, "B T"],
    mismatched: bool,
    **settings: Any,
) -> tuple[Float32[Array, "B V"], Any, History | None]:
    """`prefill` of prompts."""
    hidden = system.encode(trained, frozen, ids, mask)
    if mismatched:
        hidden = (hidden * mask[..., None])[others(ids, mask)]
    return prefill(system, trained, frozen, ids, mask, hidden, **settings)


def others(ids: Int[AnyArray, "B T"], mask: Bool[AnyArray, "B T"]) -> Int[Array, " B"]:
    """Of each row the nearest one before it, by turns, with another prompt; itself if all are one.

    Rows of padding count among them.
    """
    rows = jnp.arange(len(ids))
    prompts = jnp.where(mask, ids, -1)
    same = jnp.all(prompts[:, None] == prompts[None], axis=-1)
    back = (rows[:, None] - rows[None]) % len(rows)
    return jnp.where(same.all(1), rows, jnp.argmin(jnp.where(same, len(rows), back), axis=1))


def decode_cache(
    system: System,
    trained: Params,
    logits: Float32[Array, "B V"],
    cache: Any,
    limits: Int[AnyArray, " B"],
    seeds: UInt32[AnyArray, " B"] | None = None,
    history: History | None = None,
    *,
    max_new_tokens: int,
    search: Search = GREEDY,
    end_ids: tuple[int, ...] | None = None,
) -> Decoded | Hypotheses:
    """What `decode` does after `prefill`, with its arguments."""
    if search.num_beams > 1:
        return beam_search(
            system.step,
            trained,
            logits,
            cache,
            limits,
            take=take_hypotheses,
            search=search,
            end_ids=_end_ids(system, end_ids),
            pad_id=system.decoder.pad_id,
            capacity=max_new_tokens,
            history=history,
        )
    loop = make_loop(system, max_new_tokens, search, end_ids)
    return loop.run(trained, logits, cache, limits, seeds, history)


def make_loop(
    system: System, max_new_tokens: int, search: Search, end_ids: tuple[int, ...] | None = None
) -> Loop:
    """The loop of a system's step."""
    ends = _end_ids(system, end_ids)
    return Loop(system.step, ends, system.decoder.pad_id, max_new_tokens, search)


def _end_ids(system: System | Exact, end_ids: tuple[int, ...] | None) -> tuple[int, ...]:
    return (system.decoder.eos_id,) if end_ids is None else end_ids


def _exact(
    system: Exact, max_new_tokens: int, search: Search, end_ids: tuple[int, ...] | None
) -> ExactLoop:
    if not search.exact:
        raise ValueError("an exact system: expected a search with exact=True")
    return ExactLoop(system, _end_ids(system, end_ids), max_new_tokens, search)


def decode(
    system: System | Exact,
    trained: Params,
    frozen: Params,
    ids: Int[AnyArray, "B T"],
    mask: Bool[AnyArray, "B T"],
    limits: Int[AnyArray, " B"],
    seeds: UInt32[AnyArray, " B"] | None = None,
    *,
    max_new_tokens: int,
    search: Search = GREEDY,
    mismatched: bool = False,
    end_ids: tuple[int, ...] | None = None,
) -> Decoded | Hypotheses:
    """A whole batch, from prompt to response, as one program. Call it through `jitted_decode`.

    Args:
      ids, mask: the prompts.
      limits: at most max_new_tokens: how many tokens each row may have. Rows with 0 are padding,
        and are not waited for.
      seeds: what each row is sampled by.
      max_new_tokens: what the program has room for.
      search: how tokens are chosen; its `stop` is not looked at, texts are the caller's.
      mismatched: the control, every row gets the encoded prompt of one of the `others`.
      end_ids: what ends a response; None: the model's eos_id. Without any, every row decodes up to
        its limit: what a measurement wants.

    Returns:
      Hypotheses of a beam search, Drafted of an Exact system, else Decoded.
    """
    if isinstance(system, Exact):
        if mismatched:
            raise ValueError("mismatched with an exact system: its text is the LLM's, not L2S's")
        exact = _exact(system, max_new_tokens, search, end_ids)
        state = exact.begin(*exact.read(trained, frozen, ids, mask, limits, seeds))
        return exact.run(trained, frozen, state)
    settings = {"max_new_tokens": max_new_tokens, "search": search}
    logits, cache, history = _read(system, trained, frozen, ids, mask, mismatched, **settings)
    return decode_cache(
        system, trained, logits, cache, limits, seeds, history, end_ids=end_ids, **settings
    )


jitted_decode = jax.jit(
    decode, static_argnames=("system", "max_new_tokens", "search", "mismatched", "end_ids")
)


@functools.partial(
    jax.jit, static_argnames=("system", "max_new_tokens", "search", "mismatched", "end_ids")
)
def start(
    system: System | Exact,
    trained: Params,
    frozen: Params,
    ids: Int[AnyArray, "B T"],
    mask: Bool[AnyArray, "B T"],
    limits: Int[AnyArray, " B"],
    seeds: UInt32[AnyArray, " B"] | None = None,
    *,
    max_new_tokens: int,
    search: Search = GREEDY,
    mismatched: bool = False,
    end_ids: tuple[int, ...] | None = None,
) -> State | ExactState:
    """The state after the first token; arguments as of `decode`, no beam search."""
    if isinstance(system, Exact):
        exact = _exact(system, max_new_tokens, search, end_ids)
        return exact.begin(*exact.read(trained, frozen, ids, mask, limits, seeds))
    settings = {"max_new_tokens": max_new_tokens, "search": search}
    logits, cache, history = _read(system, trained, frozen, ids, mask, mismatched, **settings)
    loop = make_loop(system, max_new_tokens, search, end_ids)
    return loop.start(logits, cache, limits, seeds, history)


@functools.partial(
    jax.jit,
    static_argnames=("system", "max_new_tokens", "search", "end_ids"),
    donate_argnames="state",
)
def advance(
    system: System | Exact,
    trained: Params,
    frozen: Params,
    state: State | ExactState,
    ended: Bool[Array, " B"],
    *,
    max_new_tokens: int,
    search: Search = GREEDY,
    end_ids: tuple[int, ...] | None = None,
) -> State | ExactState:
    """A chunk of tokens more, where `ended` rows have no more to say."""
    if isinstance(system, Exact):
        assert isinstance(state, ExactState)
        exact = _exact(system, max_new_tokens, search, end_ids)
        return exact.advance(trained, frozen, state.replace(done=state.done | ended))
    assert isinstance(state, State)
    loop = make_loop(system, max_new_tokens, search, end_ids)
    return loop.advance(trained, state.replace(done=state.done | ended))
