"""What is trained, decoded and measured side by side: the LLM, the SLM alone, and L2S.

Each system gives the same pure functions of (trained, frozen), two parameter trees:

    scored(trained, frozen, batch, dropout_key) -> Scored             training and scoring
    encode(trained, frozen, ids, mask) -> hidden [B, T, D]            once per prompt
    prefill(trained, frozen, ids, mask, hidden, max_steps) -> (logits [B, V], cache)    likewise
    step(trained, token, cache) -> (logits [B, V], cache)             once per token
    extend(trained, tokens, cache) -> (logits [B, K, V], cache)       K tokens at once, as K steps
    continued(ids, mask) -> (ids, mask)           what a response continues, in its own tokens
    to_serve(trained, frozen, weights) -> (trained, frozen)    what generation passes as them

`trained` is what an optimizer sees; a frozen LLM is only ever in `frozen`. Systems are hashable,
so that they can be static arguments of `jax.jit`.

`trained` holds whole models: where a config has a vocabulary, `scored` and `to_serve` cut it. Its
layers are never stacked: where its config has `scan_layers`, `scored` stacks them in its program.
Those of `frozen` are, where the LLM's config has it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Float32, Int, Int32, Key

from l2s_jax.cluster.sharding import AnyArray, split_parameters
from l2s_jax.models.families import ModelConfig, make_module
from l2s_jax.models.l2s import L2S
from l2s_jax.models.mix import Groups, hidden_width, layers_of
from l2s_jax.models.representation import represent
from l2s_jax.models.scored import Scored
from l2s_jax.models.serving import to_serve
from l2s_jax.models.stacking import stack_layers
from l2s_jax.models.t5 import T5Config
from l2s_jax.models.vocabulary import cut, without_vocabulary

Params = Mapping[str, Any]
Batch = Mapping[str, AnyArray]


def parameter_count(params: Any) -> int:
    """Number of numbers in a parameter tree."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def _rngs(dropout_key: Key[Array, ""] | None) -> dict[str, jax.Array]:
    return {} if dropout_key is None else {"dropout": dropout_key}


def _start_token(
    config: T5Config, rows: int
) -> tuple[Int32[Array, "{rows} 1"], Bool[Array, "{rows} 1"]]:
    ids = jnp.full((rows, 1), config.decoder_start_id, jnp.int32)
    return ids, jnp.ones_like(ids, bool)


def _one_by_one(config: ModelConfig) -> ModelConfig:
    """The config of a module that takes layers as they are held, and has no gradient."""
    return dataclasses.replace(config, scan_layers=False, remat=False)


def _whole(config: ModelConfig) -> ModelConfig:
    """Likewise, of the module that has the parameters which are trained and saved."""
    return without_vocabulary(_one_by_one(config))


def _as_trained(params: Params, name: str, config: ModelConfig) -> Params:
    """A system's trained parameters as the module of `config`, called `name`, takes them."""
    params = {**params, name: cut(params[name], config)}
    if not config.scan_layers:
        return params
    return split_parameters(stack_layers(params))


def _apply(module: nn.Module, params: Params, *args: Any, **kwargs: Any) -> Any:
    return module.apply({"params": params}, *args, **kwargs)


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
        module = make_module(_whole(self.config))
        return {self.name: module.init(key, ids, mask, ids, method=_respond)["params"]}

    def _apply(self, trained: Params, *args: Any, **kwargs: Any) -> Any:
        module = make_module(_one_by_one(self.config))
        return _apply(module, trained[self.name], *args, **kwargs)

    def scored(
        self,
        trained: Params,
        frozen: Params,
        batch: Batch,
        dropout_key: Key[Array, ""] | None = None,
    ) -> Scored:
        """The response, teacher-forced."""
        params = _as_trained(trained, self.name, self.config)[self.name]
        states = _apply(
            make_module(self.config),
            params,
            batch[f"{self.prompt_name}_ids"],
            batch[f"{self.prompt_name}_mask"],
            batch["response_ids"],
            dropout_key is None,
            rngs=_rngs(dropout_key),
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
            return _start_token(self.config, len(ids))
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
        return _apply(self._module(_one_by_one(self.slm_config)), trained, *args, **kwargs)

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
        return _apply(make_module(self.llm_config), frozen, ids, method="embed")

    def init(self, key: Key[Array, ""]) -> Params:
        """Random float32 projector and SLM."""
        ids = jnp.zeros((1, 2), jnp.int32)
        mask = jnp.ones((1, 2), bool)
        hidden = jnp.zeros((1, 2, self.hidden_width))
        embedded = jnp.zeros((1, 2, self.llm_config.width))
        module = self._module(_whole(self.slm_config))
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
        params = _as_trained(trained, "slm", self.slm_config)
        states = _apply(
            self._module(self.slm_config),
            params,
            ids,
            mask,
            hidden,
            batch["response_ids"],
            self._embedded(frozen, ids),
            deterministic=dropout_key is None,
            rngs=_rngs(dropout_key),
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
            return _start_token(self.slm_config, len(ids))
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


System = LanguageModel | LlmToSlm
