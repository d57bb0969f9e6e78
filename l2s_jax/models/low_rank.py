"""A kernel with a low-rank change, as a product takes it: the sum is never made."""

from __future__ import annotations

import dataclasses

import jax
from jaxtyping import Float

from l2s_jax.cluster.sharding import AnyArray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRank:
    """The kernel `base + a @ b`; those of all layers where there is an axis of layers in front."""

    # The first: flax compares its shape with that of the kernel that it stands for.
    base: Float[AnyArray, "*L D F"]
    a: Float[AnyArray, "*L D R"]
    b: Float[AnyArray, "*L R F"]
