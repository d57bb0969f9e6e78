"""A response that a model has read, before its head makes logits of it.

Logits are the largest array of a training step: [B, S, V] float32 of 256,000 tokens are a megabyte
for each token of a response. What only wants sums over them takes a part of the positions at a
time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxtyping import Array, Float32

from l2s_jax.cluster.sharding import AnyArray
from l2s_jax.models.families import ModelConfig, make_module


class Scored(NamedTuple):
    """What is left to do: `head(params, states)`, of any of the positions.

    config: of the model that reads.
    params: those of its head.
    states: of which logits are made.
    """

    config: ModelConfig
    params: Mapping[str, Any]
    states: Float32[Array, "B S D"]

    @classmethod
    def by(
        cls, config: ModelConfig, params: Mapping[str, Any], states: Float32[Array, "B S D"]
    ) -> Scored:
        """States of a model with these parameters, as its module takes them."""
        return cls(
            config, {name: params[name] for name in make_module(config).head_names()}, states
        )

    def head(
        self, params: Mapping[str, Any], states: Float32[AnyArray, "B S D"]
    ) -> Float32[Array, "B S V"]:
        """Logits."""
        logits: Any = make_module(self.config).apply({"params": params}, states, method="logits")
        return logits

    def logits(self) -> Float32[Array, "B S V"]:
        """Those of all positions."""
        return self.head(self.params, self.states)
