"""The hybrid, as a system: the LLM encodes the prompt, and the SLM alone decodes."""

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
from l2s_jax.models.l2s import L2S
from l2s_jax.models.mix import Groups, hidden_width, layers_of
from l2s_jax.models.representation import represent
from l2s_jax.models.scored import Scored
from l2s_jax.models.serving import to_serve
from l2s_jax.models.t5 import T5Config
from l2s_jax.models.vocabulary import cut


@dataclasses.dataclass(frozen=True)
class LlmToSlm:
    """The hybrid; `trained` is {"projector", "slm"}, `frozen` the LLM as `load_encoder` gives it.

    `shared_vocabulary` says that both have one tokenizer, so that the SLM can embed the LLM's
    tokens; without it, fusion *add* also trains a "prompt_map". `layers`, `normalize` and `stack`
    are those of `L2S`, and train a "mix", a "hidden_norm" and an "over".
    """

    llm_config: ModelConfig
    slm_config: ModelConfig
    projector_width: int
    fusion: str = "add"
    shared_vocabulary: bool = True
    layers: Groups = ()
    normalize: bool = False
    stack: int = 0
    name: str = "l2s"
    prompt_name: str = "llm"

    @property
    def decoder(self) -> ModelConfig:
        """Config of the model that decodes."""
        return self.slm_config

    def _module(self, slm_config: ModelConfig) -> L2S:
        return L2S(
            slm_config,
            self.projector_width,
            self.fusion,
            self.shared_vocabulary,
            self.layers,
            self.normalize,
            self.stack,
        )

    def _apply(self, trained: Params, *args: Any, **kwargs: Any) -> Any:
        return applied(self._module(one_by_one(self.slm_config)), trained, *args, **kwargs)

    @property
    def hidden_width(self) -> int:
        """Numbers of H for each token: the LLM's width, times the layers that are joined."""
        return hidden_width(self.llm_config, self.layers)

    @property
    def beside_hidden(self) -> tuple[str, ...]:
        """The entries of `frozen` that are read even where a batch holds H."""
        return ("token_embedding",) if self.fusion == "add" and not self.shared_vocabulary else ()

    def _embedded(
        self, frozen: Params, ids: Int[AnyArray, "B T"]
    ) -> Float32[Array, "B T D_llm"] | None:
        """The LLM's embedding of the prompt, where L2S needs it."""
        if not self.beside_hidden:
            return None
        return applied(make_module(self.llm_config), frozen, ids, method="embed")

    def init(self, key: Key[Array, ""]) -> Params:
        """Random float32 projector and SLM."""
        ids = jnp.zeros((1, 2), jnp.int32)
        mask = jnp.ones((1, 2), bool)
        hidden = jnp.zeros((1, 2, self.hidden_width))
        embedded = jnp.zeros((1, 2, self.llm_config.width))
        module = self._module(whole(self.slm_config))
        return module.init(key, ids, mask, hidden, ids, embedded)["params"]

    def scored(
        self,
        trained: Params,
        frozen: Params,
        batch: Batch,
        dropout_key: Key[Array, ""] | None = None,
    ) -> Scored:
        """The response, teacher-forced.

        Where the batch holds H, as "llm_hidden" [B, T, K*D_llm], it is not computed.
        """
        ids, mask = batch["llm_ids"], batch["llm_mask"]
        if "llm_hidden" in batch:
            hidden = batch["llm_hidden"].astype(jnp.float32)
        else:
            hidden = self.encode(trained, frozen, ids, mask)
        params = as_trained(trained, "slm", self.slm_config)
        states = applied(
            self._module(self.slm_config),
            params,
            ids,
            mask,
            hidden,
            batch["response_ids"],
            self._embedded(frozen, ids),
            deterministic=dropout_key is None,
            rngs=rngs_of(dropout_key),
            method="states",
        )
        return Scored.by(self.slm_config, params["slm"], states)

    def encode(
        self,
        trained: Params,
        frozen: Params,
        ids: Int[AnyArray, "B T"],
        mask: Bool[AnyArray, "B T"],
    ) -> Float32[Array, "B T KD_llm"]:
        """The frozen LLM's H; never with dropout."""
        return represent(self.llm_config, frozen, ids, mask, layers_of(self.layers))

    def prefill(
        self,
        trained: Params,
        frozen: Params,
        ids: Int[AnyArray, "B T"],
        mask: Bool[AnyArray, "B T"],
        hidden: Float[AnyArray, "B T D"],
        max_steps: int,
    ) -> tuple[Float32[Array, "B V"], Any]:
        """Projector, fusion, SLM prompt: logits of the first token, and the SLM's cache."""
        embedded = self._embedded(frozen, ids)
        return self._apply(trained, ids, mask, hidden, embedded, max_steps, method="prefill")

    def step(
        self, trained: Params, token: Int[AnyArray, " B"], cache: Any
    ) -> tuple[Float32[Array, "B V"], Any]:
        """One decoded token."""
        return self._apply(trained, token, cache, method="step")

    def extend(
        self, trained: Params, tokens: Int[AnyArray, "B K"], cache: Any, whole: bool = False
    ) -> tuple[Float32[Array, "B K V"], Any]:
        """K tokens after what the cache holds: logits after each. `whole` as of `L2S.extend`."""
        return self._apply(trained, tokens, cache, whole, method="extend")

    def continued(
        self, ids: Int[AnyArray, "B T"], mask: Bool[AnyArray, "B T"]
    ) -> tuple[Int[AnyArray, "B P"], Bool[AnyArray, "B P"]]:
        """The start token of an encoder-decoder; nothing else, the prompt is the LLM's."""
        if isinstance(self.slm_config, T5Config):
            return start_token(self.slm_config, len(ids))
        return ids[:, :0], mask[:, :0]

    def to_serve(
        self, trained: Params, frozen: Params, weights: str = "float"
    ) -> tuple[Params, Params]:
        """Parameters as generation holds them; `weights` of the LLM's encoder and of the SLM.

        What joins them, a small part of all, is not quantized.
        """
        joint = {name: part for name, part in trained.items() if name != "slm"}
        return {
            **to_serve(joint, self.slm_config, "float"),
            "slm": to_serve(cut(trained["slm"], self.slm_config), self.slm_config, weights),
        }, to_serve(frozen, self.llm_config, weights, encodes=True)

    def parameters_read_per_token(self, trained: Params) -> int:
        """Numbers that one decoding step reads: of the SLM only."""
        return make_module(self.slm_config).parameters_read_per_step(trained["slm"])
