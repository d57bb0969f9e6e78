"""Beam search as one compiled loop, with the rules of transformers' `generate`.

A row has num_beams running hypotheses and keeps the num_beams best finished ones, by log p over
length**length_penalty. Each step takes the 2 * num_beams likeliest continuations: those that end
and are among the first num_beams may finish, the best num_beams of the others run on. A row is over
when no running hypothesis, at its present length, scores above the worst of num_beams finished
ones, or, with early_stopping, when there are num_beams finished ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float32, Int, Int32

from l2s_jax.cluster.placement import top_k
from l2s_jax.cluster.sharding import AnyArray
from l2s_jax.decoding.logits import History, among, constrain
from l2s_jax.settings.search import Search

# Not -inf: differences between hypotheses that are out must not be NaN.
_OUT = -1e9


class Hypotheses(struct.PyTreeNode):
    """What a beam search gives back, N = search.num_return per row, best first.

    tokens: the eos included, pad_id after it.
    lengths: tokens of each hypothesis, the eos included.
    finished: whether it ended with an eos; if not, its limit cut it. True too of rows with a limit
      of 0, which nothing cuts.
    scores: log p / length**length_penalty.
    """

    tokens: Int32[Array, "B N S"]
    lengths: Int32[Array, "B N"]
    finished: Bool[Array, "B N"]
    scores: Float32[Array, "B N"]


class _Finished(Hypotheses):
    """`there` says which of them exist; the other fields as in Hypotheses."""

    there: Bool[Array, "B N"]


class _State(struct.PyTreeNode):
    """Running hypotheses are `tokens` with `scores`, log p; in `open` rows they may go on."""

    count: Int32[Array, ""]
    open: Bool[Array, " B"]
    tokens: Int32[Array, "B K S"]
    scores: Float32[Array, "B K"]
    history: History | None
    best: _Finished
    cache: Any


# With the last token of each running hypothesis, and the place in its row of the one that it
# continues, of which the cache still is.
_Carry = tuple[_State, Int32[Array, " BK"], Int32[Array, "B K"]]


def beam_search(
    step: Callable[[Any, jax.Array, Any], tuple[jax.Array, Any]],
    params: Any,
    logits: Float32[Array, "B V"],
    cache: Any,
    limits: Int[AnyArray, " B"],
    *,
    take: Callable[[Any, jax.Array], Any],
    search: Search,
    end_ids: tuple[int, ...],
    pad_id: int,
    capacity: int,
    history: History | None = None,
) -> Hypotheses:
    """The search.num_return best of search.num_beams hypotheses.

    Args:
      step: (params, token int32 [R], cache) -> (logits float32 [R, V], cache).
      logits: of the first token.
      cache: with room for `capacity` - 1 steps, one row per prompt; leaves with a row axis carry it
        first.
      limits: tokens that a hypothesis of each row may have, at most `capacity`; rows with 0 give
        padding only.
      end_ids: what ends a hypothesis.
      take: (cache of rows B * K, parents int32 [B, K]) -> the cache with hypothesis parents[b, k]
        of prompt b in place of its k-th.
    """
    rows, vocab_size = logits.shape
    beams = search.num_beams
    candidates = max(2, 1 + len(end_ids)) * beams
    limits = jnp.minimum(limits, capacity)

    def each(leaf: jax.Array) -> jax.Array:
        """A row for every running hypothesis."""
        return jnp.repeat(leaf, beams, axis=0)

    def choose(state: _State, logits: jax.Array) -> _Carry:
        """One more token in every running hypothesis; the cache stays that of the ones before."""
        count = state.count + 1
        log_p = constrain(search, jax.nn.log_softmax(logits), state.history, state.count, end_ids)
        log_p = log_p.reshape(rows, beams, vocab_size) + state.scores[..., None]
        # So many more than run on that enough are left if the best all end.
        scores, flat = top_k(log_p.reshape(rows, -1), candidates)
        parents, token = flat // vocab_size, (flat % vocab_size).astype(jnp.int32)
        tokens = jnp.take_along_axis(state.tokens, parents[..., None], axis=1)
        tokens = tokens.at[:, :, state.count].set(token)

        at_limit = (count >= limits)[:, None]
        eos = among(token, end_ids)
        ends = eos | at_limit
        ended = ends & (jnp.arange(candidates) < beams)[None] & state.open[:, None]
        shape = token.shape
        best = _best(
            state.best,
            _Finished(
                tokens=tokens,
                lengths=jnp.broadcast_to(count, shape),
                finished=eos,
                scores=jnp.where(ended, scores / count**search.length_penalty, _OUT),
                there=ended,
            ),
        )
        run_on, places = top_k(jnp.where(ends, scores + _OUT, scores), beams)
        parents, token = (jnp.take_along_axis(one, places, axis=1) for one in (parents, token))
        tokens = jnp.take_along_axis(tokens, places[..., None], axis=1)

        full = jnp.all(best.there, axis=1)
        reachable = run_on[:, 0] / count**search.length_penalty
        worst = jnp.where(full, jnp.min(best.scores, axis=1), _OUT)
        still = state.open & (reachable > worst) & (count < limits)
        if search.early_stopping:
            still &= ~full
        last = token.reshape(-1)
        state = _State(
            count=count,
            open=still,
            tokens=tokens,
            scores=run_on,
            history=None if state.history is None else state.history.take(parents).append(last),
            best=best,
            cache=state.cache,
        )
        return state, last, parents

    def one_step(carry: _Carry) -> _Carry:
        state, token, parents = carry
        # Taken right before the step writes, and not after it has read, the cache is changed in
        # place; XLA makes copies of it otherwise.
        logits, cache = step(params, token, take(state.cache, parents))
        return choose(state.replace(cache=cache), logits)

    none = jnp.full((rows, beams, capacity), pad_id, jnp.int32)
    start = _State(
        count=jnp.int32(0),
        open=limits > 0,
        tokens=none,
        # All beams of a row are the same as yet: only the first may be continued.
        scores=jnp.where(jnp.arange(beams) == 0, 0.0, _OUT)[None] + jnp.zeros((rows, 1)),
        history=None if history is None else history.repeat(beams),
        best=_Finished(
            tokens=none,
            lengths=jnp.zeros((rows, beams), jnp.int32),
            finished=jnp.broadcast_to(limits[:, None] <= 0, (rows, beams)),
            scores=jnp.full((rows, beams), _OUT),
            there=jnp.zeros((rows, beams), bool),
        ),
        cache=jax.tree.map(lambda leaf: each(leaf) if leaf.ndim else leaf, cache),
    )
    carry = choose(start, each(logits))
    state, *_ = jax.lax.while_loop(lambda carry: jnp.any(carry[0].open), one_step, carry)
    best = jax.tree.map(lambda leaf: leaf[:, : search.num_return], state.best)
    return Hypotheses(best.tokens, best.lengths, best.finished, best.scores)


def _best(old: _Finished, new: _Finished) -> _Finished:
    """The best of both, as many as in `old`."""
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), old, new)
    _, places = top_k(both.scores, old.scores.shape[1])

    def pick(leaf: jax.Array) -> jax.Array:
        index = places[..., None] if leaf.ndim == 3 else places
        return jnp.take_along_axis(leaf, index, axis=1)

    return jax.tree.map(pick, both)
