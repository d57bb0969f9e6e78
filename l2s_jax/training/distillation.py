"""Logit distillation: the divergence from the distributions that an LLM has over the next token."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int

from l2s_jax.cluster.placement import by_rows
from l2s_jax.cluster.sharding import AnyArray

# In the place of a logit that does not count: of minus infinity, gradients would be no numbers.
_NOTHING = -1e30


class Distillation(NamedTuple):
    """How a loss is mixed: `(1 - weight) * cross entropy + weight * temperature^2 * divergence`.

    The gradient of a divergence shrinks with the square of the temperature, which the factor makes
    up for (Hinton et al. 2015, arXiv 1503.02531).
    """

    weight: float
    temperature: float


def divergence(
    logits: Float32[AnyArray, "B S V"],
    mask: Bool[AnyArray, "B S"],
    teacher_ids: Int[AnyArray, "B S k"],
    teacher_log_probs: Float32[AnyArray, "B S k"],
    temperature: float,
) -> Float32[Array, ""]:
    """Sum of KL(LLM || SLM) in nats over the tokens where `mask` is true.

    The outcomes are the k tokens that the LLM finds likeliest, and all others together. Merging
    outcomes never makes a divergence larger, and it stays zero only where the k probabilities are
    the LLM's. Scaled to a sum of one without the others, they would teach an SLM too much certainty
    (Anshumann et al. 2025, arXiv 2503.16870).

    Args:
      logits: of the SLM.
      mask: of the response.
      teacher_ids: different ids of the SLM; one that it has not, such as -1, belongs to the others.
      teacher_log_probs: the LLM's, at `temperature`.
      temperature: what `logits` are divided by.
    """
    return _divergence(temperature, jnp.asarray(logits), mask, teacher_ids, teacher_log_probs)


def log_sum_of_others(
    logits: Float32[AnyArray, "B S V"], ids: Int[AnyArray, "B S k"]
) -> Float32[Array, "B S"]:
    """log(sum(exp(logits))) over all but `ids` in [0, V]; below -1e29 where there is no other.

    An id of V is none.
    """
    return jax.nn.logsumexp(_put(jnp.asarray(logits), ids, _NOTHING), axis=-1)


# By its own rule, the gradient takes one array as large as the logits; else there would be four.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _divergence(temperature: float, *inputs: AnyArray) -> jax.Array:
    return _forward(temperature, *inputs)[0]


def _forward(
    temperature: float, logits: AnyArray, mask: AnyArray, ids: AnyArray, log_probs: AnyArray
) -> tuple[jax.Array, tuple[AnyArray, ...]]:
    vocabulary = logits.shape[-1]
    scaled = logits / temperature
    known = (ids >= 0) & (ids < vocabulary)
    probs = jnp.where(known, jnp.exp(log_probs), 0.0)
    total = jax.nn.logsumexp(scaled, axis=-1)
    own = jnp.take_along_axis(scaled, jnp.where(known, ids, 0), axis=-1) - total[..., None]
    ids = jnp.where(known, ids, vocabulary)
    # Not one minus the sum of `own`, of which nothing is left where the SLM is certain.
    others = log_sum_of_others(scaled, ids)
    # An SLM that has no other tokens has nothing to learn about them.
    rest = jnp.maximum(1.0 - jnp.sum(probs, axis=-1), 0.0)
    rest = jnp.where(others > _NOTHING / 2, rest, 0.0)
    loss = jnp.sum(_relative(probs, own), axis=-1) + _relative(rest, others - total)
    return jnp.sum(loss * mask), (logits, mask, ids, probs, rest, own, total, others)


def _backward(
    temperature: float, kept: tuple[AnyArray, ...], factor: AnyArray
) -> tuple[jax.Array | None, ...]:
    """The SLM's probability less the LLM's; all others have theirs in the SLM's proportions."""
    logits, mask, ids, probs, rest, own, total, others = kept
    scaled = logits / temperature
    whole = (jnp.sum(probs, axis=-1) + rest)[..., None]
    gradient = whole * jnp.exp(scaled - total[..., None])
    gradient -= rest[..., None] * jnp.exp(scaled - others[..., None])
    gradient = _put(gradient, ids, whole * jnp.exp(own) - probs)
    return gradient * (factor * mask / temperature)[..., None], None, None, None


_divergence.defvjp(_forward, _backward)


def _put(x: jax.Array, ids: AnyArray, values: AnyArray | float) -> jax.Array:
    """x [B, S, V] with values [B, S, k] at ids [B, S, k], none at V."""

    def put(x: jax.Array, ids: jax.Array, values: jax.Array) -> jax.Array:
        rows, steps = jnp.indices(ids.shape[:2], sparse=True)
        return x.at[rows[..., None], steps[..., None], ids].set(values, mode="drop")

    return by_rows(put, x, jnp.asarray(ids), jnp.broadcast_to(values, ids.shape))


def _relative(probs: jax.Array, log_others: jax.Array) -> jax.Array:
    """p * (log p - log q), zero where p is."""
    some = probs > 0
    log_probs = jnp.log(jnp.where(some, probs, 1.0))
    return jnp.where(some, probs * (log_probs - log_others), 0.0)
