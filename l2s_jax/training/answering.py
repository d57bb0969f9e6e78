"""What a system in training answers to prompts, by the parameters that it has by now."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Int32, UInt32

from l2s_jax.cluster.sharding import AnyArray
from l2s_jax.decoding import engine
from l2s_jax.models.lora import Adapted
from l2s_jax.models.systems import Params
from l2s_jax.settings.search import Search


def answer(
    system: Any,
    params: Params,
    frozen: Params,
    ids: Int[AnyArray, "B T"],
    mask: Bool[AnyArray, "B T"],
    limits: Int[AnyArray, " B"],
    seeds: UInt32[AnyArray, " B"] | None = None,
    hidden: AnyArray | None = None,
    *,
    max_new_tokens: int,
    end_ids: tuple[int, ...],
    search: Search = engine.GREEDY,
) -> tuple[Int32[Array, "B S"], Int32[Array, " B"]]:
    """(tokens, their numbers), S = max_new_tokens; for a program that is compiled.

    Args:
      system: what is trained, a System or an Adapted one.
      params, frozen: as training holds them.
      ids, mask: the prompts.
      limits: tokens that each row may have; 0 of a row that only fills the batch.
      seeds: what each row is sampled by.
      hidden: H of the prompts [B, T, D], where it is known.
      max_new_tokens: what the program has room for.
      end_ids: what ends a response.
      search: how tokens are chosen; no beam search.
    """
    whole: Any = system
    if isinstance(system, Adapted):
        whole, params, frozen = system.whole(params, frozen)
    params, frozen = whole.to_serve(params, frozen)
    if hidden is None:
        hidden = whole.encode(params, frozen, ids, mask)
    settings: Any = {"max_new_tokens": max_new_tokens, "search": search}
    logits, cache, history = engine.prefill(
        whole, params, frozen, ids, mask, jnp.asarray(hidden, jnp.float32), **settings
    )
    decoded: Any = engine.decode_cache(
        whole, params, logits, cache, limits, seeds, history, end_ids=end_ids, **settings
    )
    return decoded.tokens, decoded.lengths
