"""The projector q_phi: from the LLM's width to the SLM's (arXiv 2402.16844, section 3)."""

from __future__ import annotations

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32

from l2s_jax.cluster.sharding import AnyArray
from l2s_jax.models.layers import Linear


class Projector(nn.Module):
    """Linear, ReLU, Linear: H -> Z."""

    hidden_width: int
    width: int
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        initializer = nn.initializers.lecun_normal()
        self.inward = Linear(self.hidden_width, initializer, self.dtype)
        self.outward = Linear(self.width, initializer, self.dtype, jnp.float32)

    def __call__(self, hidden: Float[AnyArray, "B T D_llm"]) -> Float32[Array, "B T D_slm"]:
        return self.outward(nn.relu(self.inward(hidden)))
