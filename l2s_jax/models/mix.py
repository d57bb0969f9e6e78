"""Several of the LLM's layers in the place of one: what the projector reads.

Layers are joined in groups, as Luo et al. 2025 do (LaMaTE, arXiv 2503.06594): of each group a sum
whose weights are learnt, as Peters et al. 2018 (arXiv 1802.05365) first mixed layers.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Float32

from l2s_jax.cluster.sharding import AnyArray
from l2s_jax.models.parameter import parameter

# Numbers of layers: H after so many of them.
Groups = tuple[tuple[int, ...], ...]


def layers_of(groups: Groups) -> tuple[int, ...]:
    """All layers of some groups, each once, ascending."""
    return tuple(sorted({layer for group in groups for layer in group}))


def hidden_width(config: Any, groups: Groups) -> int:
    """Numbers of H for each token: the LLM's width, times the layers that are joined."""
    return config.width * max(len(layers_of(groups)), 1)


def encoding_layer(config: Any, layer: float, groups: Groups) -> float:
    """How many layers of an LLM encode, as config.llm.layer says it.

    That is `layer`, or where config.l2s.layers has groups, the last that these name; 0 of a T5,
    whose encoder runs whole.

    Raises:
      ValueError: the groups name a layer that the LLM does not have.
    """
    if not groups:
        return layer
    is_encoder = hasattr(config, "num_encoder_layers")
    total = config.num_encoder_layers if is_encoder else config.num_layers
    last = layers_of(groups)[-1]
    if last > total:
        raise ValueError(
            f"config.l2s.layers={groups}: the LLM has {total} layers, expected 1 to {total}"
        )
    return 0 if is_encoder else last


class Mix(nn.Module):
    """H of all layers of some groups, side by side -> the weighted sum of each group, likewise."""

    groups: Groups

    def setup(self) -> None:
        self.weights = [
            parameter(self, f"weights_{i}", nn.initializers.zeros, (len(group),))
            for i, group in enumerate(self.groups)
        ]

    def __call__(self, hidden: Float[AnyArray, "B T KD"]) -> Float32[Array, "B T GD"]:
        layers = layers_of(self.groups)
        each = dict(zip(layers, jnp.split(jnp.asarray(hidden), len(layers), axis=-1), strict=True))
        sums = []
        for group, weights in zip(self.groups, self.weights, strict=True):
            shares = nn.softmax(weights)
            parts = [share * each[layer] for layer, share in zip(group, shares, strict=True)]
            sums.append(sum(parts[1:], parts[0]))
        return jnp.concatenate(sums, axis=-1).astype(jnp.float32)
