"""A model of any family on its own, as a system: the LLM, or the SLM alone."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int, Key

from l2s_jax.cluster.sharding import AnyArray
from l2s_jax.models.applied import (
    Batch,
    Params,
    applied,
    as_trained,
    one_by_one,
    rngs_of,
    start_token,
    whole,
)
from l2s_jax.models.families import ModelConfig, make_module
from l2s_jax.models.scored import Scored
from l2s_jax.models.serving import to_serve
from l2s_jax.models.t5 import T5Config
from l2s_jax.models.vocabulary import cut


def response_states(
    module: Any,
    ids: Int[AnyArray, "B T"],
    mask: Bool[AnyArray, "B T"],
    response_ids: Int[AnyArray, "B S"],
    deterministic: bool = True,
) -> Float32[Array, "B S D"]:
    """Of which the head makes the logits of a response to a prompt, by a model of any family."""
    encoded = module.encode(module.embed(ids), mask, deterministic)
    return module.states(encoded, mask, response_ids, deterministic)


def _respond(module: Any, *args: Any) -> Float32[Array, "B S V"]:
    """Logits of a response to a prompt."""
    return module.logits(response_states(module, *args))


def _extend(
    module: Any, tokens: Int[AnyArray, "B K"], cache: Any
) -> tuple[Float32[Array, "B K V"], Any]:
    """Logits after each of K tokens, by a model of any family, and the cache with them in."""
    return module.extend(module.embed_response(tokens), cache)


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """A model of any family on its own; `trained` is {name: its parameters}, `frozen` is empty."""

    name: str  # "llm" or "slm"
    config: ModelConfig

    @property
    def prompt_name(self) -> str:
        """Prefix of the batch keys that hold the prompt."""
        return "llm" if self.name == "llm" else "slm_prompt"

    @property
    def decoder(self) -> ModelConfig:
        """Config of the model that decodes."""
        return self.config

    def init(self, key: Key[Array, ""]) -> Params:
        """Random float32 parameters."""
        ids = jnp.zeros((1, 2), jnp.int32)
        mask = jnp.ones((1, 2), bool)
        module = make_module(whole(self.config))
        return {self.name: module.init(key, ids, mask, ids, method=_respond)["params"]}

    def _apply(self, trained: Params, *args: Any, **kwargs: Any) -> Any:
        module = make_module(one_by_one(self.config))
        return applied(module, trained[self.name], *args, **kwargs)

    def scored(
        self,
        trained: Params,
        frozen: Params,
        batch: Batch,
        dropout_key: Key[Array, ""] | None = None,
    ) -> Scored:
        """The response, teacher-forced."""
        params = as_trained(trained, self.name, self.config)[self.name]
        states = applied(
            make_module(self.config),
            params,
            batch[f"{self.prompt_name}_ids"],
            batch[f"{self.prompt_name}_mask"],
            batch["response_ids"],
            dropout_key is None,
            rngs=rngs_of(dropout_key),
            method=response_states,
        )
        return Scored.by(self.config, params, states)

    def encode(
        self,
        trained: Params,
        frozen: Params,
        ids: Int[AnyArray, "B T"],
        mask: Bool[AnyArray, "B T"],
    ) -> Float32[Array, "B T D"]:
        """Encoder output; a decoder-only model's embedded prompt."""
        return self._apply(
            trained, self._apply(trained, ids, method="embed"), mask, method="encode"
        )

    def prefill(
        self,
        trained: Params,
        frozen: Params,
        ids: Int[AnyArray, "B T"],
        mask: Bool[AnyArray, "B T"],
        hidden: Float[AnyArray, "B T D"],
        max_steps: int,
    ) -> tuple[Float32[Array, "B V"], Any]:
        """Logits of the first token, and a cache for `max_steps` calls of `step`."""
        return self._apply(trained, hidden, mask, max_steps, method="prefill")

    def step(
        self, trained: Params, token: Int[AnyArray, " B"], cache: Any
    ) -> tuple[Float32[Array, "B V"], Any]:
        """One decoded token."""
        return self._apply(trained, token, cache, method="step")

    def extend(
        self, trained: Params, tokens: Int[AnyArray, "B K"], cache: Any
    ) -> tuple[Float32[Array, "B K V"], Any]:
        """K tokens after what the cache holds: logits after each."""
        return self._apply(trained, tokens, cache, method=_extend)

    def continued(
        self, ids: Int[AnyArray, "B T"], mask: Bool[AnyArray, "B T"]
    ) -> tuple[Int[AnyArray, "B P"], Bool[AnyArray, "B P"]]:
        """As transformers counts them: a decoder-only model's prompt, else the start token."""
        if isinstance(self.config, T5Config):
            return start_token(self.config, len(ids))
        if self.config.vocabulary:
            return self.config.vocabulary.places(ids, mask)
        return ids, mask

    def to_serve(
        self, trained: Params, frozen: Params, weights: str = "float"
    ) -> tuple[Params, Params]:
        """Parameters as generation holds them; `weights` is one of serving.WEIGHTS."""
        params = cut(trained[self.name], self.config)
        return {self.name: to_serve(params, self.config, weights)}, frozen

    def parameters_read_per_token(self, trained: Params) -> int:
        """Numbers that one decoding step reads."""
        return make_module(self.config).parameters_read_per_step(trained[self.name])
