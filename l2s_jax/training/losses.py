"""Next-token cross entropy on response tokens."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax


def cross_entropy(
    logits: jax.Array, targets: jax.Array, mask: jax.Array, label_smoothing: float = 0.0
) -> tuple[jax.Array, jax.Array]:
    """Sum of the loss in nats over the tokens where `mask` is true, and their number.

    logits float32 [B, S, V], targets int32 [B, S], mask bool [B, S] -> two float32 scalars. Sums,
    so that a caller adds them over devices and microbatches and divides once. Label smoothing puts
    that share of the target on the uniform distribution (Szegedy et al. 2016).
    """
    loss = optax.losses.softmax_cross_entropy_with_integer_labels(logits, targets)
    if label_smoothing:
        uniform = jax.nn.logsumexp(logits, axis=-1) - jnp.mean(logits, axis=-1)
        loss = (1 - label_smoothing) * loss + label_smoothing * uniform
    return jnp.sum(loss * mask), jnp.sum(mask, dtype=jnp.float32)


def correct_tokens(logits: jax.Array, targets: jax.Array, mask: jax.Array) -> jax.Array:
    """How many tokens where `mask` is true have the largest logit: float32 scalar."""
    # Comparing with the maximum is several times faster on CPU than an argmax.
    target_logits = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jnp.sum((target_logits >= jnp.max(logits, axis=-1)) & mask, dtype=jnp.float32)
