"""Parameters as generation holds them: in the dtype of the products, or in int8."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import qwix

from l2s_jax.models.families import ModelConfig
from l2s_jax.models.vocabulary import TABLES, response_table

WEIGHTS = ("float", "int8")


def float_dtype(path: str, config: ModelConfig) -> Any:
    """Dtype in which `to_serve` holds the parameter at a '/'-joined path, if not in int8."""
    *_, owner, name = path.rsplit("/", 2)
    is_head = config.tied_head and owner in TABLES
    return config.dtype if name == "kernel" or is_head else jnp.float32


def to_serve(params: Mapping[str, Any], config: ModelConfig, weights: str) -> dict[str, Any]:
    """A model's parameters, with what products read in the form in which they read it.

    Args:
      params: of a model or of a part of it, float32, with the vocabulary of `config`; layers may be
        stacked.
      config: of the model.
      weights: "float", kernels, and a table that is also the head, in the dtype of the products: no
        program has to cast them. The results are the same, but for what is read from such a table,
        which is rounded. "int8": the same parameters, by qwix, with one scale per output;
        activations stay in the dtype of the products. Arrays of the host stay on the host: all of a
        large model's may not fit on the device that quantizes them.

    Raises:
      ValueError: weights is neither.
    """
    if weights not in WEIGHTS:
        raise ValueError(f"weights={weights!r}: expected one of {', '.join(WEIGHTS)}")

    def quantize(leaf: Any, *axes: int) -> qwix.QArray:
        whole = jnp.asarray(leaf, jnp.float32)
        quantized = qwix.quantize(whole, jnp.int8, channelwise_axes=axes)
        return quantized if isinstance(leaf, jax.Array) else jax.device_get(quantized)

    table = response_table(config)

    def serve(path: tuple, leaf: Any) -> Any:
        if isinstance(leaf, qwix.QArray):
            return leaf  # of another system that has the same model
        *_, owner, name = (key.key for key in path)
        if weights == "int8":
            if name == "kernel":
                return quantize(leaf, *range(leaf.ndim - 2), leaf.ndim - 1)
            if owner == table and config.tied_head:
                return quantize(leaf, 0)
        return leaf.astype(float_dtype(f"{owner}/{name}", config), copy=False)

    return jax.tree_util.tree_map_with_path(
        serve, params, is_leaf=lambda leaf: isinstance(leaf, qwix.QArray)
    )
