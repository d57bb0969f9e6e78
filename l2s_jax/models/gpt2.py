"""GPT-2 (Radford et al. 2019); DistilGPT-2 and LaMini-GPT are the same. Letters as in layers.py."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float32, Int32

from l2s_jax.models.causal import CausalModel
from l2s_jax.models.causal_layers import CausalAttention, CausalLayer, FeedForward, SeesAll
from l2s_jax.models.family import FamilyConfig
from l2s_jax.models.layers import ACTIVATIONS, Dropout, Embedding, LayerNorm, Linear
from l2s_jax.models.sizes import check_sizes
from l2s_jax.models.stacking import make_layers
from l2s_jax.models.vocabulary import response_size


@dataclasses.dataclass(frozen=True)
class GPT2Config(SeesAll, FamilyConfig):
    """Geometry of a GPT-2 model; defaults are those of the 124M one.

    There is no position from `max_positions` on: a prompt and its response must fit, as
    `families.check_positions` checks. The logits of a longer row are NaN.
    """

    vocab_size: int = 50257
    width: int = 768
    num_heads: int = 12
    feed_forward_width: int = 3072
    num_layers: int = 12
    max_positions: int = 1024
    activation: str = "gelu_tanh"  # a key of layers.ACTIVATIONS
    tied_head: bool = True
    norm_epsilon: float = 1e-5
    dropout_rate: float = 0.1
    pad_id: int = 50256
    eos_id: int = 50256

    def __post_init__(self) -> None:
        check_sizes(self)
        if self.width % self.num_heads:
            raise ValueError(f"width {self.width}: expected a multiple of {self.num_heads} heads")
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"GPT-2 activation {self.activation!r}: expected one of {sorted(ACTIVATIONS)}"
            )


def _residual(c: GPT2Config) -> nn.initializers.Initializer:
    # What goes into the residual stream starts smaller the more layers add to it (section 2.3).
    return nn.initializers.normal(0.02 * (2 * c.num_layers) ** -0.5)


class Layer(CausalLayer):
    """Attention and feed-forward, each with a norm before and a residual around it."""

    config: GPT2Config

    def setup(self) -> None:
        c = self.config
        self.attention_norm = LayerNorm(c.norm_epsilon)
        self.attention = CausalAttention(
            width=c.width,
            num_heads=c.num_heads,
            num_kv_heads=c.num_heads,
            head_width=c.width // c.num_heads,
            initializer=nn.initializers.normal(0.02),
            output_initializer=_residual(c),
            input_bias=True,
            output_bias=True,
            dropout_rate=c.dropout_rate,
            dtype=c.dtype,
        )
        self.feed_forward_norm = LayerNorm(c.norm_epsilon)
        self.feed_forward = FeedForward(c, _residual(c))
        self.dropout = Dropout(c.dropout_rate)


class GPT2(CausalModel):
    """The whole model; see `CausalModel`."""

    config: GPT2Config

    def setup(self) -> None:
        c = self.config
        normal = nn.initializers.normal(0.02)
        self.token_embedding = Embedding(c.vocab_size, c.width, normal, c.dtype)
        if c.vocabulary:
            self.response_embedding = Embedding(response_size(c), c.width, normal, c.dtype)
        self.position_embedding = Embedding(
            c.max_positions, c.width, nn.initializers.normal(0.01), c.dtype
        )
        self.embedding_dropout = Dropout(c.dropout_rate)
        self.layers = make_layers(lambda: Layer(c), c, c.num_layers)
        self.final_norm = LayerNorm(c.norm_epsilon)
        if not c.tied_head:
            self.head = Linear(response_size(c), normal, c.dtype, jnp.float32)

    def enter(
        self, x: Float32[Array, "B T D"], positions: Int32[Array, "B T"]
    ) -> Float32[Array, "B T D"]:
        """Adds the learned embedding of each position."""
        return x + self.position_embedding(positions)
