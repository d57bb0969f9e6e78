"""LLM-to-SLM (arXiv 2402.16844): the trained half of the hybrid, projector and SLM.

The frozen LLM is not here: its representations H come in as an argument. The SLM's prompt side has
no token sequence of its own, it embeds the LLM's tokens, so that Z and E_X line up by construction.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Float32, Int

from l2s_jax.cluster.sharding import AnyArray
from l2s_jax.models.families import make_module
from l2s_jax.models.layers import Linear, RMSNorm
from l2s_jax.models.mix import Groups, Mix
from l2s_jax.models.projector import Projector
from l2s_jax.models.stack import Stack

FUSIONS = ("add", "replace", "cross")


class L2S(nn.Module):
    """Projector and SLM, joined by `fusion`.

    add: the SLM reads E_X + Z (the paper's choice). replace: it reads Z alone. Either is the input
    of the SLM's encoder, or the prefix that a decoder-only SLM continues. cross: the SLM's decoder
    attends to Z itself, and the SLM has no encoder.

    E_X is the SLM's embedding of the LLM's tokens in a shared vocabulary. Without one it is the
    LLM's frozen embedding of them, mapped to the SLM's width by a learned matrix.

    H may be that of several layers, which are mixed in groups; a norm may come before the
    projector, and a stack of bidirectional layers after it.
    """

    slm_config: Any
    projector_width: int
    fusion: str = "add"
    shared_vocabulary: bool = True
    layers: Groups = ()
    normalize: bool = False
    stack: int = 0

    def setup(self) -> None:
        if self.fusion not in FUSIONS:
            raise ValueError(f"fusion {self.fusion!r}: expected one of {FUSIONS}")
        c = self.slm_config
        if self.layers:
            self.mix = Mix(self.layers)
        if self.normalize:
            self.hidden_norm = RMSNorm()
        self.projector = Projector(self.projector_width, c.width, c.dtype)
        if self.stack:
            self.over = Stack(c, self.stack)
        self.slm = make_module(c)
        if self.fusion == "cross" and not self.slm.has_encoder:
            raise ValueError(
                f"fusion 'cross': a {type(self.slm).__name__} has no cross-attention, expected "
                "'add' or 'replace'"
            )
        if self.fusion == "add" and not self.shared_vocabulary:
            initializer = nn.initializers.lecun_normal()
            self.prompt_map = Linear(c.width, initializer, c.dtype, jnp.float32)

    def encode(
        self,
        llm_ids: Int[AnyArray, "B T"],
        llm_mask: Bool[AnyArray, "B T"],
        hidden: Float[AnyArray, "B T KD_llm"],
        llm_embedded: Float32[AnyArray, "B T D_llm"] | None = None,
        deterministic: bool = True,
    ) -> Float32[Array, "B T D_slm"]:
        """What the SLM's decoder attends to, or is the prefix of its input; hidden is the LLM's H.

        Without a shared vocabulary, llm_embedded is the LLM's embedding of llm_ids.
        """
        if self.layers:
            hidden = self.mix(hidden)
        if self.normalize:
            hidden = self.hidden_norm(jnp.asarray(hidden))
        projected = self.projector(hidden) * llm_mask[..., None]
        if self.stack:
            projected = self.over(projected, llm_mask, deterministic) * llm_mask[..., None]
        if self.fusion == "cross":
            return projected
        if self.fusion == "add" and self.shared_vocabulary:
            projected = projected + self.slm.embed(llm_ids)
        elif self.fusion == "add":
            if llm_embedded is None:
                raise ValueError("fusion 'add' of two vocabularies: expected llm_embedded")
            projected = projected + self.prompt_map(llm_embedded)
        return self.slm.encode(projected, llm_mask, deterministic)

    def states(
        self,
        llm_ids: Int[AnyArray, "B T"],
        llm_mask: Bool[AnyArray, "B T"],
        hidden: Float[AnyArray, "B T KD_llm"],
        response_ids: Int[AnyArray, "B S"],
        llm_embedded: Float32[AnyArray, "B T D_llm"] | None = None,
        deterministic: bool = True,
    ) -> Float32[Array, "B S D_slm"]:
        """The SLM's, of a response to a prompt as `encode` takes it."""
        encoded = self.encode(llm_ids, llm_mask, hidden, llm_embedded, deterministic)
        return self.slm.states(encoded, llm_mask, response_ids, deterministic)

    def __call__(self, *args: Any, **kwargs: Any) -> Float32[Array, "B S V_slm"]:
        """Logits of the response; arguments as of `states`."""
        return self.slm.logits(self.states(*args, **kwargs))

    def prefill(
        self,
        llm_ids: Int[AnyArray, "B T"],
        llm_mask: Bool[AnyArray, "B T"],
        hidden: Float[AnyArray, "B T KD_llm"],
        llm_embedded: Float32[AnyArray, "B T D_llm"] | None,
        max_steps: int,
    ) -> tuple[Float32[Array, "B V_slm"], Any]:
        """A prompt as `encode` takes it -> (logits of the first token, the SLM's cache)."""
        encoded = self.encode(llm_ids, llm_mask, hidden, llm_embedded)
        return self.slm.prefill(encoded, llm_mask, max_steps)

    def step(self, token: Int[AnyArray, " B"], cache: Any) -> tuple[Float32[Array, "B V_slm"], Any]:
        """(logits of the next token, the cache with this one in)."""
        return self.slm.step(token, cache)

    def extend(
        self, tokens: Int[AnyArray, "B K"], cache: Any, whole: bool = False
    ) -> tuple[Float32[Array, "B K V_slm"], Any]:
        """(logits after each of K tokens, the cache with them in).

        `whole`: the tokens are ids of the whole vocabulary, also where responses have a part of it.
        """
        embed = self.slm.embed if whole else self.slm.embed_response
        return self.slm.extend(embed(tokens), cache)
