"""The LLM's own text, drafted by the SLM (Leviathan et al. 2023, arXiv 2211.17192), as one loop.

Of each row the SLM drafts K tokens, and the LLM reads them as one block. What it would have said
itself is kept, then comes the token that it says instead. Rows go on at their own pace: both caches
have a place per row, and go back to what was kept.

A sampled token is the greatest of logits plus noise that only depends on the row's seed and the
token's place (the Gumbel-max trick). Draft and LLM get the same noise, so that they mostly agree
where their distributions do (Daliri et al. 2024, arXiv 2408.07978), and what is kept is what the
LLM alone would have sampled with that seed, token for token. Neither K nor other rows matter.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float32, Int, Int32, Key, UInt32

from l2s_jax.cluster.sharding import AnyArray
from l2s_jax.decoding.choices import Choices, constrain, keys_of, pick
from l2s_jax.decoding.drafted import Drafted, ExactState
from l2s_jax.decoding.logits import History, greatest, history_of
from l2s_jax.decoding.loop import EVERY, repeat_while, until
from l2s_jax.decoding.scores import no_scores
from l2s_jax.models.exact import Exact
from l2s_jax.models.systems import Params
from l2s_jax.settings.search import Search

# How much of what was tested before still counts after a block.
_MEMORY = 0.8
# Tokens tested, and passed, before the first: a guess that counts as much as a few tokens.
_TESTED, _PASSED = 4.0, 3.0
# Blocks in a call of `advance`.
_BLOCKS = 2


class _Draft(struct.PyTreeNode):
    """A block as it is drafted; `cache` is the SLM's."""

    history: History
    count: Int32[Array, " B"]
    token: Int32[Array, " B"]
    cache: Any


@dataclasses.dataclass(frozen=True)
class ExactLoop:
    """The loop of an Exact system; `capacity` and `end_ids` as of loop.Loop."""

    system: Exact
    end_ids: tuple[int, ...]
    capacity: int
    search: Search

    @property
    def _room(self) -> int:
        """Tokens that a row may write: those after its last are drafts."""
        return self.capacity + self.search.draft_tokens + 1

    def read(
        self,
        trained: Params,
        frozen: Params,
        ids: Int[AnyArray, "B T"],
        mask: Bool[AnyArray, "B T"],
        limits: Int[AnyArray, " B"],
        seeds: UInt32[AnyArray, " B"] | None = None,
        choices: Choices | None = None,
        wanted: Bool[AnyArray, " B"] | None = None,
    ) -> tuple[ExactState, tuple[Float32[Array, "B V"], Float32[Array, "B V_slm"]]]:
        """The state before the first token, and what that is chosen by: the LLM's and SLM's logits.

        Args:
          ids, mask, limits, seeds: as of engine.decode.
          choices: how each row's tokens are chosen; None: by the loop's search.
          wanted: of which rows scores are kept; None: of none.
        """
        system = self.system
        rows, limits = ids.shape[0], jnp.asarray(limits)
        read = system.read(trained, frozen, ids, mask, self._room)
        continued = system.continued(ids, mask)
        if choices is None and not self.search.needs_history:
            continued = ids[:, :0], mask[:, :0]
        history = history_of(*continued, self._room)
        history = history.replace(end=jnp.broadcast_to(history.end, (rows,)))
        none = jnp.zeros(rows, jnp.int32)
        by_place = jnp.zeros((rows, self.search.draft_tokens), jnp.int32)
        state = ExactState(
            history=history,
            lengths=none,
            limits=jnp.minimum(limits, self.capacity),
            held=none,
            done=limits <= 0,
            finished=limits <= 0,
            seeds=None if seeds is None else jnp.asarray(seeds),
            choices=choices,
            scores=None if wanted is None else no_scores(wanted, self._room),
            cache=(
                None if self._unheard else _at(read.cache, read.cache.index, none),
                _at(read.draft_cache, read.draft_cache.index, none),
            ),
            origin=(read.cache.index, read.draft_cache.index),
            rate=jnp.array([_TESTED, _PASSED], jnp.float32),
            blocks=none,
            tested=by_place,
            passed=by_place,
            room=self._room,
        )
        return state, (read.logits, read.draft_logits)

    def begin(
        self,
        state: ExactState,
        first: tuple[Float32[Array, "B V"], Float32[Array, "B V_slm"]],
    ) -> ExactState:
        """The state with the first token of each row that is not done; arguments as of `read`."""
        how, none = self._how(state), jnp.zeros_like(state.lengths)
        logits, draft_logits = first
        keys = keys_of(how, state.seeds)
        drafted = self._draft_token(how, draft_logits, state.history, none, keys)
        token, _ = self._decide(how, logits, drafted, state.history, none, keys)
        state = self._score(state, logits[:, None], token[:, None])
        return state.with_tokens(self.end_ids, token[:, None], none + 1)

    def _how(self, state: ExactState) -> Search | Choices:
        return self.search if state.choices is None else state.choices

    def _score(
        self, state: ExactState, logits: Float32[Array, "B K V"], tokens: Int32[Array, "B K"]
    ) -> ExactState:
        if state.scores is None:
            return state
        return state.replace(scores=state.scores.write(state.lengths, logits, tokens))

    @property
    def _unheard(self) -> bool:
        """Whether everything passes."""
        return self.search.draft_tolerance == 1

    def run(self, trained: Params, frozen: Params, state: ExactState) -> Drafted:
        """To the end of every row."""
        return self.finish(self.advance(trained, frozen, state, self.capacity))

    def advance(
        self,
        trained: Params,
        frozen: Params,
        state: ExactState,
        most: int | Int32[Array, ""] = _BLOCKS,
        enough: int | Int32[Array, ""] = EVERY,
    ) -> ExactState:
        """Up to `most` blocks more, and none after `enough` rows more have been done."""
        cost = self.system.draft_cost(trained, frozen)
        return repeat_while(
            until(state.done, enough),
            lambda state: self._block(trained, frozen, state, self._best_size(state.rate, cost)),
            state,
            most,
        )

    def finish(self, state: ExactState) -> Drafted:
        """What was decoded, S = capacity."""
        tokens = state.tokens[: self.capacity].T
        there = jnp.arange(self.capacity)[None] < state.lengths[:, None]
        return Drafted(
            jnp.where(there, tokens, self.system.decoder.pad_id),
            state.lengths,
            state.finished,
            state.blocks,
            state.tested,
            state.passed,
        )

    def _best_size(self, rate: Float32[Array, " two"], cost: float) -> Int32[Array, ""]:
        """How many drafted tokens give the most for their time.

        By equation 1 and theorem 3.8 of Leviathan et al., with the share that passed lately.
        """
        share = jnp.clip(rate[1] / rate[0], 0.0, 0.99)
        sizes = 1 + jnp.arange(self.search.draft_tokens)
        bonus = 0 if self.search.draft_tolerance else 1
        gains = (1 - share ** (sizes + bonus)) / ((1 - share) * (1 + cost * sizes))
        return 1 + jnp.argmax(gains).astype(jnp.int32)

    def _block(
        self, trained: Params, frozen: Params, state: ExactState, size: Int32[Array, ""]
    ) -> ExactState:
        """`size` drafted tokens, and what the LLM makes of them.

        The LLM reads a block of the most tokens, whatever the size: one program does for all, and
        rows beside those that count cost it next to nothing.
        """
        of_llm, of_slm = state.cache
        drafts, of_slm = self._draft(trained, state, of_slm, size)
        rows = state.lengths.shape[0]
        if self._unheard:
            kept, passed = drafts, jnp.broadcast_to(size, (rows,))
        else:
            kept, passed, of_llm, logits = self._judge(frozen, state, of_llm, drafts, size)
            state = self._score(state, logits, kept)
        live = ~state.done
        passed = jnp.where(live, passed, 0)
        # A tolerated token is the SLM's wherever a block ends: the LLM adds none of its own.
        most = size if self.search.draft_tolerance else size + 1
        state = state.replace(
            cache=(of_llm, of_slm),
            held=jnp.where(live, state.lengths + size - 1, state.held),
            blocks=state.blocks + live,
        )
        state = self._count(state, live, passed, size)
        count = jnp.where(live, jnp.minimum(passed + 1, most), 0)
        return state.with_tokens(self.end_ids, kept, count)

    def _draft(
        self, trained: Params, state: ExactState, cache: Any, size: Int32[Array, ""]
    ) -> tuple[Int32[Array, "B K"], Any]:
        """(the next `size` tokens by the SLM, then anything; its cache with all but the last)."""
        history, lengths = state.history, state.lengths
        # What the SLM's cache lacks: the last token, or the last two. Where it is one, the other is
        # read and written over.
        first = history.end - lengths + state.held
        places = jnp.stack([first, first + 1])
        tokens = jnp.take_along_axis(history.tokens, places, axis=0).T
        origin = state.origin[1]
        logits, cache = self.system.draft(trained, tokens, _at(cache, origin, state.held))
        cache = _at(cache, origin, lengths)
        which = (lengths - 1 - state.held)[:, None, None]
        logits = jnp.take_along_axis(logits, which, axis=1)[:, 0]

        how = self._how(state)
        keys = keys_of(how, state.seeds)

        def token_of(logits: jax.Array, history: History, count: jax.Array) -> jax.Array:
            return self._draft_token(how, logits, history, count, keys)

        token = token_of(logits, history, lengths)

        def one(draft: _Draft) -> _Draft:
            logits, cache = self.system.draft(trained, draft.token[:, None], draft.cache)
            token = token_of(logits[:, 0], draft.history, draft.count)
            history = draft.history.append(token)
            return _Draft(history, draft.count + 1, token, cache)

        draft = _Draft(history.append(token), lengths + 1, token, cache)
        if self.search.draft_tokens > 1:
            draft = repeat_while(lambda _: jnp.array(True), one, draft, size - 1)
        places = (history.end[:, None] + jnp.arange(self.search.draft_tokens)[None]).T
        return jnp.take_along_axis(draft.history.tokens, places, axis=0).T, draft.cache

    def _draft_token(
        self,
        how: Search | Choices,
        logits: Float32[Array, "B V_slm"],
        history: History,
        count: Int32[Array, " B"],
        keys: Key[Array, " B"] | None,
    ) -> Int32[Array, " B"]:
        """The SLM's token, an id of the LLM."""
        plain = isinstance(how, Search) and not how.needs_history and not how.min_new_tokens
        if keys is None and plain:
            return self.system.ids_of(greatest(logits))
        logits = constrain(how, self.system.widen(logits), history, count, self.end_ids)
        return pick(how, logits, count, keys)

    def _judge(
        self,
        frozen: Params,
        state: ExactState,
        cache: Any,
        drafts: Int32[Array, "B K"],
        size: Int32[Array, ""],
    ) -> tuple[Int32[Array, "B K+1"], Int32[Array, " B"], Any, Float32[Array, "B K+1 V"]]:
        """(the tokens that are kept if all before them pass, how many drafts pass, the cache, the
        LLM's logits of these tokens).
        """
        history, lengths, most = state.history, state.lengths, drafts.shape[1]
        last = jnp.take_along_axis(history.tokens, (history.end - 1)[None], axis=0).T
        tokens = jnp.concatenate([last, drafts], axis=1)
        logits, cache = self.system.judge(frozen, tokens, _at(cache, state.origin[0], lengths - 1))
        places = jnp.arange(most + 1, dtype=jnp.int32)
        # Where there is no draft, none passes.
        drafted = jnp.concatenate([drafts, last], axis=1)
        candidates = jnp.where((places < size)[None], drafted, -1)
        known = history.write(drafts.T)

        how = self._how(state)
        keys = keys_of(how, state.seeds)

        def decide(logits: jax.Array, drafted: jax.Array, place: jax.Array) -> Any:
            before = known.replace(end=history.end + place)
            counts = lengths + place
            return self._decide(how, logits, drafted, before, counts, keys)

        decided = jax.vmap(decide, in_axes=(1, 1, 0), out_axes=1)
        kept, agree = decided(logits, candidates, places)
        return kept, jnp.sum(jnp.cumprod(agree.astype(jnp.int32), axis=1), axis=1), cache, logits

    def _decide(
        self,
        how: Search | Choices,
        logits: Float32[Array, "B V"],
        drafted: Int32[Array, " B"],
        history: History,
        count: Int32[Array, " B"],
        keys: Key[Array, " B"] | None,
    ) -> tuple[Int32[Array, " B"], Bool[Array, " B"]]:
        """(the token that is kept, whether it is the drafted one); a draft of -1 never passes."""
        logits = constrain(how, logits, history, count, self.end_ids)
        own = pick(how, logits, count, keys)
        if self.system.acceptance is not None:
            rows = jax.vmap(jax.random.key)(jnp.arange(len(drafted), dtype=jnp.uint32))
            chance = jax.vmap(jax.random.uniform)(jax.vmap(jax.random.fold_in)(rows, count))
            passes = (chance < self.system.acceptance) & (drafted >= 0)
        else:
            passes = drafted == own
        if tolerance := self.search.draft_tolerance:
            least = jnp.max(logits, axis=1) + (
                math.log1p(-tolerance) if tolerance < 1 else -jnp.inf
            )
            place = jnp.maximum(drafted, 0)[:, None]
            given = jnp.take_along_axis(logits, place, axis=1)[:, 0]
            passes |= (given >= least) & (drafted >= 0)
        return jnp.where(passes, drafted, own), passes

    def _count(
        self, state: ExactState, live: Bool[Array, " B"], passed: Int32[Array, " B"], size: Any
    ) -> ExactState:
        """The state with this block in its counts."""
        places = jnp.arange(state.tested.shape[1])[None]
        tested = live[:, None] & (places <= passed[:, None]) & (places < size)
        agreed = live[:, None] & (places < passed[:, None])
        lately = jnp.stack([jnp.sum(tested), jnp.sum(agreed)]).astype(jnp.float32)
        return state.replace(
            rate=_MEMORY * state.rate + lately,
            tested=state.tested + tested,
            passed=state.passed + agreed,
        )


def _at(cache: Any, origin: Int32[Array, ""], held: Int32[Array, " B"]) -> Any:
    """The cache with so many tokens of each row's response."""
    return cache.replace(index=origin + held)
