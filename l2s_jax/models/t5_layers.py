"""T5's geometry, and the layers of its encoder and decoder. Letters as in layers.py."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float32, Int32

from l2s_jax.models.biases import Bias
from l2s_jax.models.cache import KeyValue, write
from l2s_jax.models.family import FamilyConfig
from l2s_jax.models.layers import Attention, Dropout, Linear, RMSNorm
from l2s_jax.models.relative import RelativeBias
from l2s_jax.models.sizes import check_sizes

ACTIVATIONS = {
    "relu": (nn.relu, False),
    "gated_gelu": (nn.gelu, True),  # Flax's default is the tanh form, which T5 v1.1 uses
    "gated_silu": (nn.silu, True),
}


@dataclasses.dataclass(frozen=True)
class T5Config(FamilyConfig):
    """Geometry of a T5 model; defaults are T5-small (v1.0)."""

    vocab_size: int = 32128
    width: int = 512
    num_heads: int = 8
    head_width: int = 64
    feed_forward_width: int = 2048
    num_encoder_layers: int = 6
    num_decoder_layers: int = 6
    activation: str = "relu"  # a key of ACTIVATIONS
    tied_head: bool = True  # logits from the token embedding (v1.0)
    scaled_head: bool = True  # a tied head's input is scaled by width^-0.5 (v1.0); else no effect
    num_buckets: int = 32
    max_distance: int = 128
    norm_epsilon: float = 1e-6
    dropout_rate: float = 0.1
    pad_id: int = 0
    eos_id: int = 1
    decoder_start_id: int = 0

    def __post_init__(self) -> None:
        check_sizes(self)
        if self.max_distance <= self.num_buckets // 2:
            raise ValueError(
                f"max_distance {self.max_distance}: expected more than half of the "
                f"{self.num_buckets} buckets"
            )
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"T5 activation {self.activation!r}: expected one of {sorted(ACTIVATIONS)}"
            )
        if jnp.dtype(self.dtype) == jnp.float16:
            raise ValueError("T5 dtype float16: T5 overflows in it; use bfloat16 or float32")


class FeedForward(nn.Module):
    """By ReLU (v1.0) or a gated unit (v1.1; Shazeer 2020)."""

    config: T5Config

    def setup(self) -> None:
        c = self.config
        self.activate, self.gated = ACTIVATIONS[c.activation]
        inward = nn.initializers.normal(c.width**-0.5)
        self.wi = Linear(c.feed_forward_width, inward, c.dtype)
        if self.gated:
            self.wi_gate = Linear(c.feed_forward_width, inward, c.dtype)
        outward = nn.initializers.normal(c.feed_forward_width**-0.5)
        self.wo = Linear(c.width, outward, c.dtype, jnp.float32)
        self.dropout = Dropout(c.dropout_rate)

    def __call__(self, x: Float32[Array, "B T D"], deterministic: bool) -> Float32[Array, "B T D"]:
        hidden = self.wi(x)
        hidden = self.activate(self.wi_gate(x)) * hidden if self.gated else self.activate(hidden)
        return self.wo(self.dropout(hidden, deterministic=deterministic))


def _attention(c: T5Config) -> Attention:
    # T5 does not divide scores by sqrt(H): the query's smaller initialization stands in for it.
    return Attention(
        width=c.width,
        num_heads=c.num_heads,
        head_width=c.head_width,
        query_initializer=nn.initializers.normal((c.width * c.head_width) ** -0.5),
        key_initializer=nn.initializers.normal(c.width**-0.5),
        output_initializer=nn.initializers.normal((c.num_heads * c.head_width) ** -0.5),
        dropout_rate=c.dropout_rate,
        dtype=c.dtype,
    )


class EncoderLayer(nn.Module):
    """Self-attention and feed-forward, each with a norm before and a residual around it."""

    config: T5Config

    def setup(self) -> None:
        c = self.config
        self.attention_norm = RMSNorm(c.norm_epsilon)
        self.attention = _attention(c)
        self.feed_forward_norm = RMSNorm(c.norm_epsilon)
        self.feed_forward = FeedForward(c)
        self.dropout = Dropout(c.dropout_rate)

    def __call__(
        self, x: Float32[Array, "B T D"], bias: Bias, deterministic: bool
    ) -> Float32[Array, "B T D"]:
        y = self.attention_norm(x)
        y = self.attention(y, self.attention.key_value(y), bias, deterministic)
        x = x + self.dropout(y, deterministic=deterministic)
        y = self.feed_forward(self.feed_forward_norm(x), deterministic)
        return x + self.dropout(y, deterministic=deterministic)


class DecoderLayer(nn.Module):
    """Self-attention, cross-attention and feed-forward, pre-norm with residuals."""

    config: T5Config

    def setup(self) -> None:
        c = self.config
        self.attention_norm = RMSNorm(c.norm_epsilon)
        self.attention = _attention(c)
        self.cross_attention_norm = RMSNorm(c.norm_epsilon)
        self.cross_attention = _attention(c)
        self.feed_forward_norm = RMSNorm(c.norm_epsilon)
        self.feed_forward = FeedForward(c)
        self.dropout = Dropout(c.dropout_rate)

    def __call__(
        self,
        x: Float32[Array, "B Q D"],
        bias: Float32[Array, "#B N Q K"],
        cross: KeyValue,
        cross_bias: Float32[Array, "B 1 1 T"],
        cache: KeyValue | None = None,
        slot: Int32[Array, "*rows"] | None = None,
        deterministic: bool = True,
    ) -> tuple[Float32[Array, "B Q D"], KeyValue]:
        """x and what the layer adds to it, and the keys and values attended to.

        Without `cache`, the Q positions attend to each other under `bias`; with it, their keys and
        values go to `slot` and on of the cache, and they attend to the cache.
        """
        y = self.attention_norm(x)
        key_value = self.attention.key_value(y)
        if cache is not None and slot is not None:
            key_value = write(cache, key_value, slot)
        y = self.attention(y, key_value, bias, deterministic)
        x = x + self.dropout(y, deterministic=deterministic)
        y = self.cross_attention(self.cross_attention_norm(x), cross, cross_bias, deterministic)
        x = x + self.dropout(y, deterministic=deterministic)
        y = self.feed_forward(self.feed_forward_norm(x), deterministic)
        return x + self.dropout(y, deterministic=deterministic), key_value


def relative_bias(c: T5Config, *, bidirectional: bool) -> RelativeBias:
    """The bias that all layers of a stack share."""
    return RelativeBias(
        num_heads=c.num_heads,
        num_buckets=c.num_buckets,
        max_distance=c.max_distance,
        bidirectional=bidirectional,
        initializer=nn.initializers.normal(c.width**-0.5),
    )
