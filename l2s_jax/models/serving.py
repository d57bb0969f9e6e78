"""Parameters as generation holds them: in the dtype and layout of the products, or in int8."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import qwix
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding

from l2s_jax.cluster.paths import path_name
from l2s_jax.cluster.sharding import parameter_shardings
from l2s_jax.models.families import ModelConfig
from l2s_jax.models.products import Transposed
from l2s_jax.models.vocabulary import TABLES, response_table

WEIGHTS = ("float", "int8")

# A kernel of fewer inputs or outputs stays in a CPU's cache, where XLA lays it out in no time.
LEAST_TRANSPOSED = 512


def check_weights(weights: str) -> None:
    """Raises a ValueError where it is none of WEIGHTS."""
    if weights not in WEIGHTS:
        raise ValueError(f"weights={weights!r}: expected one of {', '.join(WEIGHTS)}")


def float_dtype(path: str, config: ModelConfig, *, encodes: bool = False) -> Any:
    """Dtype in which `to_serve` holds the parameter at a '/'-joined path, if not in int8."""
    *_, owner, name = path.rsplit("/", 2)
    is_head = config.tied_head and owner in TABLES and not encodes
    return config.dtype if name == "kernel" or is_head else jnp.float32


def hold(path: str, leaf: Any, config: ModelConfig, weights: str, *, encodes: bool = False) -> Any:
    """The parameter at a '/'-joined path as `to_serve` holds it, or [L, ...] of them.

    An array that lies on a mesh is quantized where it lies, and stays there. One of the host comes
    back to the host: all of a large model's may not fit on the device that quantizes them.
    """
    *_, owner, name = path.rsplit("/", 2)
    is_head = config.tied_head and owner == response_table(config)
    if weights == "float" or not (name == "kernel" or is_head):
        if encodes and owner in TABLES:
            return leaf
        return leaf.astype(float_dtype(path, config), copy=False)
    # One scale per output.
    axes = (0,) if is_head else (*range(leaf.ndim - 2), leaf.ndim - 1)

    def quantize(leaf: Any) -> qwix.QArray:
        whole = jnp.asarray(leaf, jnp.float32)
        return qwix.quantize(whole, jnp.int8, channelwise_axes=axes)

    if not isinstance(leaf, jax.Array):
        return jax.device_get(quantize(leaf))
    lies = None if isinstance(leaf, jax.core.Tracer) else leaf.sharding
    if not isinstance(lies, NamedSharding):
        return quantize(leaf)
    shapes = unflatten_dict({path: jax.eval_shape(quantize, leaf)}, sep="/")
    where: dict[str, Any] = parameter_shardings(shapes, lies.mesh)
    return jax.jit(quantize, out_shardings=flatten_dict(where, sep="/")[path])(leaf)


def lay_out(path: str, leaf: Any, mesh: Mesh | None) -> Any:
    """What lies on a mesh as `hold` gave it, or [L, ...] of it, in the layout that products want.

    On one CPU device large float32 kernels are `Transposed`. All else stays as it is.
    """
    if mesh is None or mesh.size > 1 or mesh.devices.item().platform != "cpu":
        return leaf
    is_kernel = path.rsplit("/", 1)[-1] == "kernel" and isinstance(leaf, jax.Array)
    if not is_kernel or leaf.dtype != jnp.float32 or min(leaf.shape[-2:]) < LEAST_TRANSPOSED:
        return leaf
    return Transposed(leaf.swapaxes(-2, -1))


def lay_out_all(params: Any, mesh: Mesh | None) -> Any:
    """`lay_out` of a tree of them."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: lay_out(path_name(path), leaf, mesh), params, is_leaf=_is_held
    )


def _is_held(leaf: Any) -> bool:
    return isinstance(leaf, qwix.QArray | Transposed)


def to_serve(
    params: Mapping[str, Any], config: ModelConfig, weights: str, *, encodes: bool = False
) -> dict[str, Any]:
    """A model's parameters, with what products read in the form in which they read it.

    Args:
      params: of a model or of a part of it, float32, with the vocabulary of `config`; layers may be
        stacked. What another system that has the same model holds, or was read so, stays.
      config: of the model.
      weights: "float", kernels, and a table that is also the head, in the dtype of the products: no
        program has to cast them. The results are the same, but for what is read from such a table,
        which is rounded. "int8": kernels, and the table that is the head, by qwix; activations stay
        in the dtype of the products.
      encodes: no head is made of them. With "float" a table stays as it is: the whole model that it
        is a part of may have rounded it.

    Raises:
      ValueError: weights is neither.
    """
    check_weights(weights)

    def serve(path: tuple, leaf: Any) -> Any:
        if isinstance(leaf, Transposed) and weights == "int8":
            leaf = leaf.held.swapaxes(-2, -1)
        if _is_held(leaf):
            return leaf
        return hold(path_name(path), leaf, config, weights, encodes=encodes)

    return jax.tree_util.tree_map_with_path(serve, params, is_leaf=_is_held)
