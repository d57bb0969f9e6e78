"""The parameters of modules."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import errors
from flax import linen as nn


def parameter(
    module: nn.Module, name: str, initializer: nn.initializers.Initializer, shape: tuple[int, ...]
) -> Any:
    """`module.param`: float32 of this shape where it is made, else what is given.

    Of a parameter that is given, Flax traces the initializer only to learn its shape. A quarter of
    the time in which a model is traced went there.

    Raises:
      flax.errors.ScopeParamShapeError: the one that is given has another shape.
    """
    if not module.has_variable("params", name):
        return module.param(name, initializer, shape, jnp.float32)
    given = module.get_variable("params", name)
    found = np.shape(given)
    if found != shape:
        raise errors.ScopeParamShapeError(name, "/".join(module.path), found, shape)
    return given
