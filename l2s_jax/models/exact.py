"""The exact mode's two models: L2S drafts tokens, and the LLM whose H it reads decides on them."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int, Int32

from l2s_jax.cluster.sharding import AnyArray
from l2s_jax.models.families import ModelConfig, make_module
from l2s_jax.models.mix import layers_of
from l2s_jax.models.systems import LanguageModel, LlmToSlm, Params
from l2s_jax.models.t5 import T5Config


class Read(NamedTuple):
    """A prompt, read by both: logits of the first token [B, V] and a cache, of each."""

    logits: Float32[Array, "B V"]
    cache: Any
    draft_logits: Float32[Array, "B V_slm"]
    draft_cache: Any


@dataclasses.dataclass(frozen=True)
class Exact:
    """An L2S and its whole LLM; `trained` is the L2S's, `frozen` all parameters of the LLM.

    The prompt is read once for both. All tokens are ids of the LLM, also where the SLM writes with
    a part of its vocabulary.

    `acceptance`: for measurements of models that don't know each other; a drafted token passes with
    this probability, whatever the LLM makes of it. None: as the LLM says.
    """

    l2s: LlmToSlm
    llm: LanguageModel
    acceptance: float | None = None
    name: str = "exact"
    prompt_name: str = "llm"

    def __post_init__(self) -> None:
        if not self.l2s.shared_vocabulary:
            raise ValueError(
                "exact decoding: expected an LLM and an SLM with one tokenizer: the one "
                "reads what the other drafts"
            )

    @property
    def decoder(self) -> ModelConfig:
        """Config of the model that decides."""
        return self.llm.config

    def read(
        self,
        trained: Params,
        frozen: Params,
        ids: Int[AnyArray, "B T"],
        mask: Bool[AnyArray, "B T"],
        max_steps: int,
    ) -> Read:
        """Prompts, with room for `max_steps` tokens in both caches."""
        layers, encoder = layers_of(self.l2s.layers), self.l2s.llm_config
        if not layers and not isinstance(encoder, T5Config):
            layers = (encoder.num_layers,)
        llm: Any = make_module(dataclasses.replace(self.llm.config, scan_layers=False))
        embedded = llm.apply({"params": frozen}, ids, method="embed")
        hidden, logits, cache = llm.apply(
            {"params": frozen}, embedded, mask, max_steps, layers, method="read"
        )
        drafts = self.l2s.prefill(trained, frozen, ids, mask, hidden, max_steps)
        return Read(logits, cache, *drafts)

    def encode(
        self,
        trained: Params,
        frozen: Params,
        ids: Int[AnyArray, "B T"],
        mask: Bool[AnyArray, "B T"],
    ) -> Float32[Array, "B T D"]:
        """What the LLM makes of prompts before any token is decoded."""
        return self.llm.encode({"llm": frozen}, {}, ids, mask)

    def draft(
        self, trained: Params, tokens: Int[AnyArray, "B K"], cache: Any
    ) -> tuple[Float32[Array, "B K V_slm"], Any]:
        """K tokens, ids of the LLM, after what the SLM's cache holds."""
        return self.l2s.extend(trained, tokens, cache, whole=True)

    def judge(
        self, frozen: Params, tokens: Int[AnyArray, "B K"], cache: Any
    ) -> tuple[Float32[Array, "B K V"], Any]:
        """K tokens after what the LLM's cache holds."""
        return self.llm.extend({"llm": frozen}, tokens, cache)

    def widen(self, logits: Float32[Array, "B V_slm"]) -> Float32[Array, "B V"]:
        """Logits of a draft for all ids of the LLM; -inf where the SLM has none."""
        vocabulary, size = self.l2s.slm_config.vocabulary, self.llm.config.vocab_size
        if vocabulary is not None:
            everything = jnp.arange(size)[None]
            places, kept = vocabulary.places(everything, jnp.ones_like(everything, bool))
            return jnp.where(kept, jnp.take(logits, places[0], axis=1), -jnp.inf)
        missing = max(size - logits.shape[1], 0)
        return jnp.pad(logits[:, :size], ((0, 0), (0, missing)), constant_values=-jnp.inf)

    def ids_of(self, tokens: Int32[Array, " B"]) -> Int32[Array, " B"]:
        """Ids of the LLM for ids that the SLM writes with."""
        vocabulary = self.l2s.slm_config.vocabulary
        return tokens if vocabulary is None else jnp.take(jnp.asarray(vocabulary.kept), tokens)

    def continued(
        self, ids: Int[AnyArray, "B T"], mask: Bool[AnyArray, "B T"]
    ) -> tuple[Int[AnyArray, "B P"], Bool[AnyArray, "B P"]]:
        """As of the LLM."""
        return self.llm.continued(ids, mask)

    def to_serve(
        self, trained: Params, frozen: Params, weights: str = "float"
    ) -> tuple[Params, Params]:
        """Parameters as generation holds them; `weights` of both models."""
        return (
            self.l2s.to_serve(trained, {}, weights)[0],
            self.llm.to_serve({"llm": frozen}, {}, weights)[0]["llm"],
        )

    def draft_cost(self, trained: Params, frozen: Params) -> float:
        """What a step of the SLM reads of what a step of the LLM reads."""
        of_llm = self.llm.parameters_read_per_token({"llm": frozen})
        return self.l2s.parameters_read_per_token(trained) / of_llm
