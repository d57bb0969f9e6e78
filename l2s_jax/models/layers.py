"""Layers shared by the model families.

B batch, T or S positions, Q queries, K keys, D width, N heads, H head width, F feed-forward or
features, V vocabulary. Parameters are float32; `dtype` is the dtype of the products. Sums that feed
a softmax, a norm or the logits, and the residual stream, are float32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import qwix
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int

from l2s_jax.cluster.placement import constrain, split_rows
from l2s_jax.cluster.sharding import AnyArray
from l2s_jax.models import products
from l2s_jax.models.attention import attend
from l2s_jax.models.biases import Bias
from l2s_jax.models.cache import KeyValue
from l2s_jax.models.parameter import parameter

Initializer = Callable[[jax.Array, tuple[int, ...], DTypeLike], jax.Array]

# Those of the decoder-only families, whose feed-forward is not gated.
ACTIVATIONS = {
    "gelu": functools.partial(nn.gelu, approximate=False),
    "gelu_tanh": nn.gelu,
    "relu": nn.relu,
    "silu": nn.silu,
}


def _of_features(x: AnyArray, rank: int) -> jax.Array:
    """[D] -> [1, ..., D]: one number for each feature of an array of this rank."""
    return jnp.expand_dims(x, range(rank - 1))


class Linear(nn.Module):
    """`x @ kernel`, and a bias where there is one."""

    features: int
    initializer: Initializer
    dtype: DTypeLike = jnp.float32
    out_dtype: DTypeLike | None = None  # accumulate and return in this dtype; None: `dtype`
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: Float[AnyArray, "*rows D"]) -> Float[Array, "*rows F"]:
        kernel = parameter(self, "kernel", self.initializer, (x.shape[-1], self.features))
        y = products.by_kernel(x, kernel, self.dtype, self.out_dtype or self.dtype)
        if not self.use_bias:
            return y
        bias = parameter(self, "bias", nn.initializers.zeros, (self.features,))
        return products.add_bias(y, bias)


class Embedding(nn.Module):
    """A [V, D] table that reads rows (`__call__`) and, transposed, makes logits (`attend`)."""

    vocab_size: int
    width: int
    initializer: Initializer
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        shape = (self.vocab_size, self.width)
        self.embedding = parameter(self, "embedding", self.initializer, shape)

    def __call__(self, ids: Int[AnyArray, " B *T"]) -> Float32[Array, "B *T D"]:
        """The rows of the table."""
        table = self.embedding
        # On a mesh a device has some columns of the table: it reads them for the rows of all that
        # have the others, and then they swap. The compiler may gather the table instead.
        ids = constrain(jnp.asarray(ids), "data")
        if isinstance(table, qwix.QArray):
            rows, scales = (jnp.take(part, ids, axis=0) for part in (table.qvalue, table.scale))
            embedded = rows * scales.astype(jnp.float32)
        else:
            embedded = jnp.take(table, ids, axis=0).astype(jnp.float32)
        columns = [None] * (embedded.ndim - 2)
        return split_rows(constrain(embedded, "data", *columns, "fsdp"))

    def attend(self, x: Float[Array, "*B T D"]) -> Float32[Array, "*B T V"]:
        """Logits."""
        return products.by_table(x, self.embedding, self.dtype)


class RMSNorm(nn.Module):
    """Scale by the root mean square, without mean or bias (Zhang and Sennrich 2019). float32."""

    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: Float[Array, "*rows D"]) -> Float32[Array, "*rows D"]:
        scale = parameter(self, "scale", nn.initializers.ones, (x.shape[-1],))
        x = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
        return x * jax.lax.rsqrt(mean_square + self.epsilon) * _of_features(scale, x.ndim)


def unit(x: Float[AnyArray, "*rows D"]) -> Float32[Array, "*rows D"]:
    """x with a root mean square of one. float32."""
    x = jnp.asarray(x, jnp.float32)
    mean_square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(mean_square + 1e-6)


class LayerNorm(nn.Module):
    """Zero mean and unit variance, then scale and bias (Ba et al. 2016). float32."""

    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: Float[Array, "*rows D"]) -> Float32[Array, "*rows D"]:
        scale = parameter(self, "scale", nn.initializers.ones, (x.shape[-1],))
        bias = parameter(self, "bias", nn.initializers.zeros, (x.shape[-1],))
        x = x.astype(jnp.float32)
        x = x - jnp.mean(x, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(variance + self.epsilon) * _of_features(scale, x.ndim)
        return x + _of_features(bias, x.ndim)


class Attention(nn.Module):
    """Multi-head attention; `N * H` need not equal D.

    The key and value projection is a call of its own, so that a caller can keep its result: in a
    cache for self-attention, once per prompt for cross-attention.
    """

    width: int
    num_heads: int
    head_width: int
    query_initializer: Initializer
    key_initializer: Initializer
    output_initializer: Initializer
    scale: float = 1.0
    dropout_rate: float = 0.0
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        inner = self.num_heads * self.head_width
        self.query = Linear(inner, self.query_initializer, self.dtype)
        self.key = Linear(inner, self.key_initializer, self.dtype)
        self.value = Linear(inner, self.key_initializer, self.dtype)
        self.output = Linear(self.width, self.output_initializer, self.dtype, jnp.float32)
        self.dropout = Dropout(self.dropout_rate)

    def _split_heads(self, x: Float[Array, "B T NH"]) -> Float[Array, "B N T H"]:
        x = x.reshape(*x.shape[:2], self.num_heads, self.head_width)
        return x.transpose(0, 2, 1, 3)

    def key_value(self, x: Float[Array, "B K D"]) -> KeyValue:
        """Keys and values, each [B, N, K, H]."""
        return KeyValue(self._split_heads(self.key(x)), self._split_heads(self.value(x)))

    def __call__(
        self,
        x: Float[Array, "B Q D"],
        key_value: KeyValue,
        bias: Bias,
        deterministic: bool = True,
    ) -> Float32[Array, "B Q D"]:
        """What the positions x take from `key_value`; `bias` has the mask in it."""
        query = self._split_heads(self.query(x))
        return self.output(
            attend(query, key_value, bias, self.scale, self.dropout.unless(deterministic))
        )


class Dropout(nn.Dropout):
    """Dropout with one mask for all positions of a row, as in the reference T5.

    [..., T, D] gets a mask [..., 1, D]: T times fewer random numbers, which made up more than half
    of a small model's training step on CPU.
    """

    broadcast_dims: Sequence[int] = (-2,)

    def unless(self, deterministic: bool) -> Callable[[jax.Array], jax.Array] | None:
        """What drops some of an array; None where nothing is dropped."""
        if deterministic or not self.rate:
            return None
        return functools.partial(self, deterministic=False)
