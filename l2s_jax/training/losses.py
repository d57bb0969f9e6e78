"""Next-token cross entropy on response tokens."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float32, Int

from l2s_jax.cluster.sharding import AnyArray


def cross_entropy(
    logits: Float32[AnyArray, "B S V"],
    targets: Int[AnyArray, "B S"],
    mask: Bool[AnyArray, "B S"],
    label_smoothing: float = 0.0,
) -> tuple[Float32[Array, ""], Float32[Array, ""]]:
    """Sum of the loss in nats over the tokens where `mask` is true, and their number.

    Sums, so that a caller adds them over devices and microbatches and divides once. Label smoothing
    puts that share of the target on the uniform distribution (Szegedy et al. 2016).
    """
    loss = optax.losses.softmax_cross_entropy_with_integer_labels(logits, targets)
    if label_smoothing:
        uniform = jax.nn.logsumexp(logits, axis=-1) - jnp.mean(logits, axis=-1)
        loss = (1 - label_smoothing) * loss + label_smoothing * uniform
    return jnp.sum(loss * mask), jnp.sum(mask, dtype=jnp.float32)


def correct_tokens(
    logits: Float32[AnyArray, "B S V"],
    targets: Int[AnyArray, "B S"],
    mask: Bool[AnyArray, "B S"],
) -> Float32[Array, ""]:
    """How many tokens where `mask` is true have the largest logit."""
    # Comparing with the maximum is several times faster on CPU than an argmax.
    target_logits = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jnp.sum((target_logits >= jnp.max(logits, axis=-1)) & mask, dtype=jnp.float32)
