"""Relative positions (Raffel et al. 2020, arXiv 1910.10683). Letters as in layers.py."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Bool, Float32, Int, Int32

from l2s_jax.cluster.sharding import AnyArray
from l2s_jax.models.attention import at_once
from l2s_jax.models.biases import Bias, DistanceBias, mask_bias
from l2s_jax.models.layers import Initializer
from l2s_jax.models.parameter import parameter


def bucket_table(num_buckets: int, max_distance: int) -> Int32[np.ndarray, " {max_distance}+1"]:
    """Bucket of each distance 0..max_distance; farther ones share the last.

    Half of the buckets hold one distance each, the rest grow logarithmically up to `max_distance`
    (section 2.1 of the T5 paper). Computed in float32, as the reference implementations do.
    """
    exact = num_buckets // 2
    distance = np.arange(max_distance + 1)
    with np.errstate(divide="ignore"):
        position = np.log(distance.astype(np.float32) / np.float32(exact))
    position = position / np.float32(np.log(max_distance / exact)) * np.float32(num_buckets - exact)
    far = exact + np.maximum(position, 0).astype(np.int32)
    return np.where(distance < exact, distance, np.minimum(far, num_buckets - 1)).astype(np.int32)


class RelativeBias(nn.Module):
    """Attention bias from the distance between key and query, one number per bucket and head."""

    num_heads: int
    num_buckets: int
    max_distance: int
    bidirectional: bool
    initializer: Initializer

    @nn.compact
    def __call__(self, ahead: Int[Array, "#B Q K"]) -> Float32[Array, "#B N Q K"]:
        """The bias of keys that are so many positions after a query, of all rows or of each."""
        shape = (self.num_buckets, self.num_heads)
        embedding = parameter(self, "embedding", self.initializer, shape)
        one_sided = self.num_buckets // 2 if self.bidirectional else self.num_buckets
        distance = jnp.abs(ahead) if self.bidirectional else jnp.maximum(-ahead, 0)
        table = jnp.asarray(bucket_table(one_sided, self.max_distance))
        bucket = table[jnp.minimum(distance, self.max_distance)]
        if self.bidirectional:
            bucket = bucket + one_sided * (ahead > 0)
        return jnp.take(embedding, bucket, axis=0).astype(jnp.float32).transpose(0, 3, 1, 2)

    def of_prompt(self, mask: Bool[AnyArray, "B T"]) -> Bias:
        """The bias of the positions of a prompt to each other, which see all that are real."""
        length = mask.shape[1]
        if at_once(length, length):
            slots = jnp.arange(length)
            return (
                self(slots[None, None, :] - slots[None, :, None])
                + mask_bias(mask)[:, None, None, :]
            )
        by_distance = self(jnp.arange(1 - length, length)[None, None])[0, :, 0]
        return DistanceBias(mask, by_distance, self.max_distance)
