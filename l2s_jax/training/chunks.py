"""Sums over the tokens of a response whose logits are too many to be held at once.

The logits of a batch, their softmax and their gradient are [B, S, V] float32 each. Where they would
be large, a part of the positions is taken at a time: logits, loss and, where one is wanted, the
gradient. So nothing is computed twice, as it would be if logits were made again for the gradient
(Hsu et al. 2024, arXiv 2410.10989, do so too, in one kernel).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

from l2s_jax.cluster.placement import program_mesh, split_rows
from l2s_jax.cluster.sharding import AnyArray, batch_ways
from l2s_jax.models import counting
from l2s_jax.models.families import ModelConfig
from l2s_jax.models.scored import Scored
from l2s_jax.models.vocabulary import response_size

# How many logits a device makes at once: half a GiB of float32.
MOST_LOGITS = 2**27

Tokens = Mapping[str, AnyArray]
Sums = dict[str, Float32[Array, ""]]
# (logits [B, s, V], what is fixed, arrays [B, s, ...]) -> (loss, sums that have no gradient).
Read = Callable[[jax.Array, Any, Tokens], tuple[jax.Array, Sums]]


def summed(
    read: Read,
    scored: Scored,
    tokens: Tokens,
    fixed: Any = None,
    others: Sequence[ModelConfig] = (),
) -> tuple[Float32[Array, ""], Sums]:
    """`read(logits, fixed, tokens)` of all positions, or its sum over chunks of them.

    Args:
      read: of logits and of what belongs to the same positions; a sum over tokens.
      scored: the response; its states and its head have a gradient.
      tokens: arrays [B, S, ...]. They have none. In what is filled up to whole chunks they are 0:
        a mask says that nothing is there.
      fixed: other arrays that `read` needs. They have no gradient.
      others: models of which `read` makes as many logits again.
    """
    length = scored.states.shape[1]
    size = chunk_length(scored, others)
    if size == length:
        return read(scored.logits(), fixed, tokens)

    def of_chunk(
        params: Any, states: jax.Array, fixed: Any, tokens: Tokens
    ) -> tuple[jax.Array, Sums]:
        return read(scored.head(params, split_rows(states)), fixed, tokens)

    cut = functools.partial(_cut, size=size)
    return _summed(of_chunk, scored.params, cut(scored.states), fixed, jax.tree.map(cut, tokens))


def each(read: Callable[[jax.Array], Any], scored: Scored) -> Any:
    """`read(logits [B, s, V])`, arrays [B, s, ...], of all positions, and no gradient."""
    length, size = scored.states.shape[1], chunk_length(scored)
    if size == length:
        return read(scored.logits())
    found = jax.lax.map(
        lambda states: read(scored.head(scored.params, split_rows(states))),
        _cut(scored.states, size),
    )
    return jax.tree.map(
        lambda x: jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:])[:, :length], found
    )


def chunk_length(scored: Scored, others: Sequence[ModelConfig] = ()) -> int:
    """How many positions are taken at a time, in a program for the mesh at hand.

    `others` as of `summed`.
    """
    rows, length = scored.states.shape[:2]
    if counting.is_on():
        return length
    vocabulary = sum(map(response_size, (scored.config, *others)))
    mesh = program_mesh()
    of_device = -(-rows // batch_ways(mesh)) if mesh else rows
    most = max(MOST_LOGITS // (of_device * vocabulary), 1)
    return -(-length // -(-length // most))


def _cut(x: AnyArray, size: int) -> jax.Array:
    """[B, S, ...] -> chunks [C, B, size, ...], the last one filled up with zeros."""
    rows, length, *rest = x.shape
    count = -(-length // size)
    filled = jnp.pad(x, [(0, 0), (0, count * size - length), *[(0, 0)] * len(rest)])
    return jnp.moveaxis(filled.reshape(rows, count, size, *rest), 1, 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _summed(
    of_chunk: Any, params: Any, states: jax.Array, fixed: Any, tokens: Any
) -> tuple[jax.Array, Sums]:
    def add(sums: Any, chunk: Any) -> tuple[Any, None]:
        states, tokens = chunk
        return jax.tree.map(jnp.add, sums, of_chunk(params, states, fixed, tokens)), None

    return jax.lax.scan(add, _zeros(of_chunk, params, states, fixed, tokens), (states, tokens))[0]


def _forward(
    of_chunk: Any, params: Any, states: jax.Array, fixed: Any, tokens: Any
) -> tuple[tuple[jax.Array, Sums], Any]:
    differentiated = jax.value_and_grad(of_chunk, argnums=(0, 1), has_aux=True)

    def add(carry: Any, chunk: Any) -> tuple[Any, jax.Array]:
        states, tokens = chunk
        new, (of_params, of_states) = differentiated(params, states, fixed, tokens)
        return jax.tree.map(jnp.add, carry, (new, of_params)), of_states

    gradient = jax.tree.map(jnp.zeros_like, params)
    start = _zeros(of_chunk, params, states, fixed, tokens), gradient
    (sums, gradient), of_states = jax.lax.scan(add, start, (states, tokens))
    return sums, (gradient, of_states)


def _backward(of_chunk: Any, kept: Any, cotangents: Any) -> tuple[Any, ...]:
    factor, _ = cotangents
    of_params, of_states = jax.tree.map(lambda x: x * factor.astype(x.dtype), kept)
    return of_params, of_states, None, None


_summed.defvjp(_forward, _backward)


def _zeros(of_chunk: Any, params: Any, states: jax.Array, fixed: Any, tokens: Any) -> Any:
    one = jax.tree.map(lambda x: x[0], (states, tokens))
    like = jax.eval_shape(of_chunk, params, one[0], fixed, one[1])
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
