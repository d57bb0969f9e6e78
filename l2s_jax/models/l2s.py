"""LLM-to-SLM (arXiv 2402.16844): the trained half of the hybrid, projector and SLM.

The frozen LLM is not here: its representations H come in as an argument. The SLM's prompt side has
no token sequence of its own, it embeds the LLM's tokens, so that Z and E_X line up by construction.
"""

from __future__ import annotations

import jax
from flax import linen as nn

from l2s_jax.models.cache import DecoderCache
from l2s_jax.models.projector import Projector
from l2s_jax.models.t5 import T5, T5Config

FUSIONS = ("add", "replace", "cross")


class L2S(nn.Module):
    """Projector and encoder-decoder SLM, joined by `fusion`.

    add: the SLM's encoder reads E_X + Z (the paper's choice). replace: it reads Z alone.
    cross: the SLM's decoder attends to Z itself, and the SLM has no encoder.
    """

    slm_config: T5Config
    projector_width: int
    fusion: str = "add"

    def setup(self) -> None:
        if self.fusion not in FUSIONS:
            raise ValueError(f"fusion {self.fusion!r}: expected one of {FUSIONS}")
        c = self.slm_config
        self.projector = Projector(self.projector_width, c.width, c.dtype)
        self.slm = T5(c)

    def encode(
        self,
        llm_ids: jax.Array,
        llm_mask: jax.Array,
        hidden: jax.Array,
        deterministic: bool = True,
    ) -> jax.Array:
        """What the SLM's decoder attends to: float32 [B, T, D_slm].

        llm_ids int32 [B, T], llm_mask bool [B, T], hidden (the LLM's H) [B, T, D_llm].
        """
        projected = self.projector(hidden) * llm_mask[..., None]
        if self.fusion == "cross":
            return projected
        if self.fusion == "add":
            projected = projected + self.slm.embed(llm_ids)
        return self.slm.encode(projected, llm_mask, deterministic)

    def __call__(
        self,
        llm_ids: jax.Array,
        llm_mask: jax.Array,
        hidden: jax.Array,
        decoder_ids: jax.Array,
        deterministic: bool = True,
    ) -> jax.Array:
        """As `encode`, and decoder_ids int32 [B, S] (shifted right) -> float32 [B, S, V_slm]."""
        encoded = self.encode(llm_ids, llm_mask, hidden, deterministic)
        return self.slm.decode(decoder_ids, encoded, llm_mask, deterministic)

    def prefill(
        self, llm_ids: jax.Array, llm_mask: jax.Array, hidden: jax.Array, max_new_tokens: int
    ) -> DecoderCache:
        """As `encode` -> the SLM's cache before the first token."""
        encoded = self.encode(llm_ids, llm_mask, hidden)
        return self.slm.prefill(encoded, llm_mask, max_new_tokens)

    def step(self, token: jax.Array, cache: DecoderCache) -> tuple[jax.Array, DecoderCache]:
        """int32 [B] -> (float32 logits [B, V_slm], cache)."""
        return self.slm.step(token, cache)
