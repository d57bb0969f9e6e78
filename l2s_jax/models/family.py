"""What all model families have: what their configs say of programs, and how they embed tokens."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float32, Int

from l2s_jax.cluster.sharding import AnyArray
from l2s_jax.models.vocabulary import Vocabulary


@dataclasses.dataclass(frozen=True, kw_only=True)
class FamilyConfig:
    """How a program computes a model, which no file says. A family's config adds its geometry.

    Attributes:
      dtype: of the products; see the dtype policy in layers.py.
      vocabulary: rows that responses are written with; None: all. See vocabulary.py.
      scan_layers, remat: how a program is made of the layers; see stacking.py.
    """

    dtype: DTypeLike = jnp.float32
    vocabulary: Vocabulary | None = None
    scan_layers: bool = False
    remat: bool = False


class Embeds(nn.Module):
    """A model with a `token_embedding`, and a `response_embedding` where it has a vocabulary."""

    config: Any

    def embed(self, ids: Int[AnyArray, "B T"]) -> Float32[Array, "B T D"]:
        """Embedded tokens of a prompt."""
        return self.token_embedding(ids)

    def embed_response(self, ids: Int[AnyArray, " B *S"]) -> Float32[Array, "B *S D"]:
        """Embedded tokens of a response."""
        return self.response_embedding(ids) if self.config.vocabulary else self.embed(ids)
