"""What is trained, decoded and measured side by side: the LLM, the SLM alone, and L2S.

Each system gives the same pure functions of (trained, frozen), two parameter trees:

    logits(trained, frozen, batch, dropout_key) -> [B, S, V]          training and scoring
    encode(trained, frozen, ids, mask) -> hidden [B, T, D]            once per prompt
    prefill(trained, ids, mask, hidden, max_new_tokens) -> cache      once per prompt
    step(trained, token, cache) -> (logits [B, V], cache)             once per token

`trained` is what an optimizer sees; a frozen LLM is only ever in `frozen`. Systems are hashable,
so that they can be static arguments of `jax.jit`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from l2s_jax.models.cache import DecoderCache
from l2s_jax.models.l2s import L2S
from l2s_jax.models.t5 import T5, T5Config, parameters_read_per_step

Params = Mapping[str, Any]
Batch = Mapping[str, jax.Array]


def shift_right(response_ids: jax.Array, start_id: int) -> jax.Array:
    """int32 [B, S] -> the decoder's input: start_id, then all but the last token."""
    start = jnp.full_like(response_ids[:, :1], start_id)
    return jnp.concatenate([start, response_ids[:, :-1]], axis=1)


def parameter_count(params: Any) -> int:
    """Number of numbers in a parameter tree."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def _rngs(dropout_key: jax.Array | None) -> dict[str, jax.Array]:
    return {} if dropout_key is None else {"dropout": dropout_key}


@dataclasses.dataclass(frozen=True)
class Seq2Seq:
    """An encoder-decoder on its own; `trained` is {name: T5 parameters}, `frozen` is empty."""

    name: str  # "llm" or "slm"
    config: T5Config

    @property
    def prompt_name(self) -> str:
        """Prefix of the batch keys that hold the prompt."""
        return "llm" if self.name == "llm" else "slm_prompt"

    @property
    def decoder(self) -> T5Config:
        """Config of the model that decodes."""
        return self.config

    def init(self, key: jax.Array) -> Params:
        """Random float32 parameters."""
        ids = jnp.zeros((1, 2), jnp.int32)
        mask = jnp.ones((1, 2), bool)
        return {self.name: T5(self.config).init(key, ids, mask, ids)["params"]}

    def _apply(self, trained: Params, *args: Any, **kwargs: Any) -> Any:
        return T5(self.config).apply({"params": trained[self.name]}, *args, **kwargs)

    def logits(
        self, trained: Params, frozen: Params, batch: Batch, dropout_key: jax.Array | None = None
    ) -> jax.Array:
        """Teacher-forced logits of the response, float32 [B, S, V]."""
        return self._apply(
            trained,
            batch[f"{self.prompt_name}_ids"],
            batch[f"{self.prompt_name}_mask"],
            shift_right(batch["response_ids"], self.config.decoder_start_id),
            deterministic=dropout_key is None,
            rngs=_rngs(dropout_key),
        )

    def encode(self, trained: Params, frozen: Params, ids: jax.Array, mask: jax.Array) -> jax.Array:
        """Encoder output, float32 [B, T, D]."""
        return self._apply(
            trained, self._apply(trained, ids, method="embed"), mask, method="encode"
        )

    def prefill(
        self,
        trained: Params,
        ids: jax.Array,
        mask: jax.Array,
        hidden: jax.Array,
        max_new_tokens: int,
    ) -> DecoderCache:
        """The decoder's cache before the first token."""
        return self._apply(trained, hidden, mask, max_new_tokens, method="prefill")

    def step(
        self, trained: Params, token: jax.Array, cache: DecoderCache
    ) -> tuple[jax.Array, DecoderCache]:
        """One decoded token."""
        return self._apply(trained, token, cache, method="step")

    def parameters_read_per_token(self, trained: Params) -> int:
        """Numbers that one decoding step reads."""
        return parameters_read_per_step(self.config, trained[self.name])


@dataclasses.dataclass(frozen=True)
class LlmToSlm:
    """The hybrid; `trained` is {"projector", "slm"}, `frozen` the LLM's embedding and encoder."""

    llm_config: T5Config
    slm_config: T5Config
    projector_width: int
    fusion: str = "add"
    name: str = "l2s"
    prompt_name: str = "llm"

    def __post_init__(self) -> None:
        # E_X is the SLM's embedding of the LLM's tokens, which only exists in a shared vocabulary.
        if self.llm_config.vocab_size != self.slm_config.vocab_size:
            raise ValueError(
                f"LLM vocabulary of {self.llm_config.vocab_size} ids and SLM vocabulary of "
                f"{self.slm_config.vocab_size}: LLM-to-SLM needs the same vocabulary on both sides"
            )

    @property
    def decoder(self) -> T5Config:
        """Config of the model that decodes."""
        return self.slm_config

    def _module(self) -> L2S:
        return L2S(self.slm_config, self.projector_width, self.fusion)

    def init(self, key: jax.Array) -> Params:
        """Random float32 projector and SLM."""
        ids = jnp.zeros((1, 2), jnp.int32)
        mask = jnp.ones((1, 2), bool)
        hidden = jnp.zeros((1, 2, self.llm_config.width))
        return self._module().init(key, ids, mask, hidden, ids)["params"]

    def logits(
        self, trained: Params, frozen: Params, batch: Batch, dropout_key: jax.Array | None = None
    ) -> jax.Array:
        """Teacher-forced logits of the response, float32 [B, S, V]."""
        ids, mask = batch["llm_ids"], batch["llm_mask"]
        return self._module().apply(
            {"params": trained},
            ids,
            mask,
            self.encode(trained, frozen, ids, mask),
            shift_right(batch["response_ids"], self.slm_config.decoder_start_id),
            deterministic=dropout_key is None,
            rngs=_rngs(dropout_key),
        )

    def encode(self, trained: Params, frozen: Params, ids: jax.Array, mask: jax.Array) -> jax.Array:
        """The frozen LLM's H, float32 [B, T, D_llm]; never with dropout."""
        llm = T5(self.llm_config)
        embedded = llm.apply({"params": frozen}, ids, method="embed")
        return llm.apply({"params": frozen}, embedded, mask, method="encode")

    def prefill(
        self,
        trained: Params,
        ids: jax.Array,
        mask: jax.Array,
        hidden: jax.Array,
        max_new_tokens: int,
    ) -> DecoderCache:
        """Projector, fusion, SLM encoder: the SLM's cache before the first token."""
        return self._module().apply(
            {"params": trained}, ids, mask, hidden, max_new_tokens, method="prefill"
        )

    def step(
        self, trained: Params, token: jax.Array, cache: DecoderCache
    ) -> tuple[jax.Array, DecoderCache]:
        """One decoded token."""
        return self._module().apply({"params": trained}, token, cache, method="step")

    def parameters_read_per_token(self, trained: Params) -> int:
        """Numbers that one decoding step reads: of the SLM only."""
        return parameters_read_per_step(self.slm_config, trained["slm"])


System = Seq2Seq | LlmToSlm


def encoder_only(params: Params) -> Params:
    """The part of a T5's parameters that `LlmToSlm.encode` needs as `frozen`."""
    return {key: params[key] for key in ("token_embedding", "encoder")}
