"""Attention and layers of the decoder-only families.

Letters as in layers.py, and G key/value heads.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int32

from l2s_jax.models.attention import attend
from l2s_jax.models.biases import Bias
from l2s_jax.models.cache import KeyValue, write
from l2s_jax.models.layers import ACTIVATIONS, Dropout, Initializer, Linear, RMSNorm
from l2s_jax.models.rotary import Rotary


class SeesAll:
    """A config of a model without windows."""

    num_layers: int

    @property
    def windows(self) -> tuple[None, ...]:
        """Every layer sees all positions before."""
        return (None,) * self.num_layers


class CausalAttention(nn.Module):
    """Self-attention with `num_kv_heads` key/value heads (Ainslie et al. 2023).

    `rotary` turns queries and keys by position; `norm_epsilon` puts an RMSNorm on each head's query
    and key (Qwen3). None leaves them as they are.
    """

    width: int
    num_heads: int
    num_kv_heads: int
    head_width: int
    initializer: Initializer
    output_initializer: Initializer
    rotary: Rotary | None = None
    input_bias: bool = False
    output_bias: bool = False
    norm_epsilon: float | None = None
    dropout_rate: float = 0.0
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        def inward(heads: int) -> Linear:
            return Linear(
                heads * self.head_width, self.initializer, self.dtype, use_bias=self.input_bias
            )

        self.query = inward(self.num_heads)
        self.key = inward(self.num_kv_heads)
        self.value = inward(self.num_kv_heads)
        self.output = Linear(
            self.width,
            self.output_initializer,
            self.dtype,
            jnp.float32,
            use_bias=self.output_bias,
        )
        if self.norm_epsilon is not None:
            self.query_norm = RMSNorm(self.norm_epsilon)
            self.key_norm = RMSNorm(self.norm_epsilon)
        self.dropout = Dropout(self.dropout_rate)

    def _split_heads(self, x: Float[Array, "B T NH"]) -> Float[Array, "B N T H"]:
        return x.reshape(*x.shape[:2], -1, self.head_width).transpose(0, 2, 1, 3)

    def __call__(
        self,
        x: Float[Array, "B Q D"],
        positions: Int32[Array, "B Q"],
        bias: Bias,
        cache: KeyValue | None = None,
        slot: Int32[Array, "*rows"] | None = None,
        deterministic: bool = True,
    ) -> tuple[Float32[Array, "B Q D"], KeyValue]:
        """What the positions x take from each other or from the cache, and the keys and values
        attended to.

        With `cache`, their keys and values go to `slot` and on of the cache.
        """
        query, key = self._split_heads(self.query(x)), self._split_heads(self.key(x))
        if self.norm_epsilon is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        if self.rotary is not None:
            query, key = self.rotary(query, positions), self.rotary(key, positions)
        new = KeyValue(key.astype(self.dtype), self._split_heads(self.value(x)))
        held = new if cache is None or slot is None else write(cache, new, slot)

        mixed = attend(
            query.astype(self.dtype),
            held,
            bias,
            self.head_width**-0.5,
            self.dropout.unless(deterministic),
        )
        return self.output(mixed), held


class FeedForward(nn.Module):
    """Two products with an activation between them, each with a bias."""

    config: Any
    output_initializer: Initializer

    def setup(self) -> None:
        c = self.config
        normal = nn.initializers.normal(0.02)
        self.wi = Linear(c.feed_forward_width, normal, c.dtype, use_bias=True)
        self.wo = Linear(c.width, self.output_initializer, c.dtype, jnp.float32, use_bias=True)

    def __call__(self, x: Float32[Array, "B T D"]) -> Float32[Array, "B T D"]:
        return self.wo(ACTIVATIONS[self.config.activation](self.wi(x)))


class CausalLayer(nn.Module):
    """Attention and feed-forward, each with a norm before and a residual around it.

    A family's own `setup` makes attention_norm, attention, feed_forward_norm, feed_forward and
    dropout.
    """

    config: Any

    @property
    def is_parallel(self) -> bool:
        """Whether attention and feed-forward are side by side, not one after the other."""
        return False

    def __call__(
        self,
        x: Float32[Array, "B Q D"],
        positions: Int32[Array, "B Q"],
        bias: Bias,
        cache: KeyValue | None = None,
        slot: Int32[Array, "*rows"] | None = None,
        deterministic: bool = True,
    ) -> tuple[Float32[Array, "B Q D"], KeyValue]:
        """As CausalAttention, on the residual stream."""
        y, held = self.attention(
            self.attention_norm(x), positions, bias, cache, slot, deterministic
        )
        attended = x + self.dropout(y, deterministic=deterministic)
        y = self.feed_forward(self.feed_forward_norm(x if self.is_parallel else attended))
        return attended + self.dropout(y, deterministic=deterministic), held
