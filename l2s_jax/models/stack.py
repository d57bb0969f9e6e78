"""A small bidirectional stack over Z, before the SLM reads it (LaMaTE, arXiv 2503.06594)."""

from __future__ import annotations

from typing import Any

import jax
from flax import linen as nn
from jaxtyping import Array, Bool, Float32

from l2s_jax.cluster.placement import split_prompt
from l2s_jax.cluster.sharding import AnyArray
from l2s_jax.models.stacking import make_layers, run_layers
from l2s_jax.models.t5_layers import EncoderLayer, T5Config, relative_bias


class Stack(nn.Module):
    """Layers of a T5 encoder of the SLM's geometry, whatever its family; Z [B, T, D] -> the same.

    Tokens see each other in both directions, which they don't in a decoder-only SLM.
    """

    slm_config: Any
    num_layers: int

    def setup(self) -> None:
        self.config = c = _config(self.slm_config, self.num_layers)
        self.relative_bias = relative_bias(c, bidirectional=True)
        self.layers = make_layers(lambda: EncoderLayer(c), c, c.num_encoder_layers)

    def __call__(
        self,
        projected: Float32[Array, "B T D"],
        mask: Bool[AnyArray, "B T"],
        deterministic: bool,
    ) -> Float32[Array, "B T D"]:
        bias = self.relative_bias.of_prompt(mask)

        def run(layer: EncoderLayer, x: jax.Array, _: Any) -> tuple[jax.Array, None]:
            return split_prompt(layer(x, bias, deterministic)), None

        x, _ = run_layers(run, self.layers, self.config, projected, range(self.num_layers))
        return x


def _config(slm: Any, num_layers: int) -> T5Config:
    """An encoder as wide as an SLM, with its heads."""
    return T5Config(
        width=slm.width,
        num_heads=slm.num_heads,
        head_width=getattr(slm, "head_width", slm.width // slm.num_heads),
        feed_forward_width=slm.feed_forward_width,
        num_encoder_layers=num_layers,
        dropout_rate=slm.dropout_rate,
        dtype=slm.dtype,
        scan_layers=slm.scan_layers,
        remat=slm.remat,
    )
