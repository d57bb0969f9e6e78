"""What a model makes of the tokens that it gives: log-probabilities, kept for those who ask."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float32, Int32

from l2s_jax.cluster.sharding import AnyArray

# Likeliest tokens that are kept of each place.
TOP = 5


class Scores(struct.PyTreeNode):
    """Natural logarithms of probabilities, as the model gives them before any setting of a search.

    Step-major, as the tokens that they belong to; places that hold no token yet, and rows that do
    not ask, hold anything.

    wanted: which rows ask.
    chosen: of the token that the response has.
    ids, values: of the likeliest tokens, best first.
    """

    wanted: Bool[AnyArray, " B"]
    chosen: Float32[Array, "S B"]
    ids: Int32[Array, "S B top"]
    values: Float32[Array, "S B top"]

    def write(
        self,
        at: Int32[Array, " B"],
        logits: Float32[Array, "B K V"],
        tokens: Int32[Array, "B K"],
    ) -> Scores:
        """The scores with those of K tokens at place `at` and on of each row."""

        def written() -> Scores:
            log_p = jax.nn.log_softmax(logits, axis=-1)
            chosen = jnp.take_along_axis(log_p, tokens[..., None], axis=2)[..., 0]
            values, ids = jax.lax.top_k(log_p, TOP)
            put = jax.vmap(
                lambda old, new, at: jax.lax.dynamic_update_slice_in_dim(old, new, at, axis=0),
                in_axes=(1, 0, 0),
                out_axes=1,
            )
            return self.replace(
                chosen=put(self.chosen, chosen, at),
                ids=put(self.ids, ids.astype(jnp.int32), at),
                values=put(self.values, values, at),
            )

        return jax.lax.cond(jnp.any(self.wanted), written, lambda: self)


def no_scores(wanted: Bool[AnyArray, " B"], places: int) -> Scores:
    """Those of rows that have said nothing yet, with room for so many tokens."""
    rows = len(wanted)
    return Scores(
        jnp.asarray(wanted),
        jnp.zeros((places, rows), jnp.float32),
        jnp.zeros((places, rows, TOP), jnp.int32),
        jnp.zeros((places, rows, TOP), jnp.float32),
    )
