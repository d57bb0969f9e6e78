"""Products, in the dtypes, orders and layouts that each backend wants.

What they compute is plain; layers.py calls them where its mathematics has a product. Letters as
there, and G groups of heads.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import qwix
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32

from l2s_jax.cluster.placement import program_mesh
from l2s_jax.cluster.sharding import AnyArray

# As many as a step has, or a block of drafted tokens.
FEW_QUERIES = 16

# Of so few rows, the product with a table [V, D] has the table as its first factor on a CPU.
FEW_ROWS = 64

# XLA's CPU backend takes a quarter less time for one float32 row by a matrix in so many blocks of
# its first axis. Where that axis is summed over, the products of the blocks are added up.
BLOCKS = 4

# Of rows with fewer numbers they take as long as the whole.
LEAST_IN_BLOCKS = 256


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Transposed:
    """A kernel [D, F] that is held as [F, D], to be the first factor of its products on a CPU.

    XLA's CPU backend lays out a second factor anew for every product of two rows or more. It reads
    a first factor that has the summed axis last as it is, once.
    """

    held: Float[AnyArray, "*L F D"]

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the kernel."""
        *layers, features, width = np.shape(self.held)
        return (*layers, width, features)

    @property
    def dtype(self) -> Any:
        """That of the kernel."""
        return self.held.dtype

    @property
    def ndim(self) -> int:
        """That of the kernel."""
        return self.held.ndim


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRank:
    """The kernel `base + a @ b`, a sum that is never made.

    Those of all layers where there is an axis of layers in front.
    """

    base: Float[AnyArray, "*L D F"]
    a: Float[AnyArray, "*L D R"]
    b: Float[AnyArray, "*L R F"]

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the kernel."""
        return np.shape(self.base)


def product(
    spec: str,
    x: Float[AnyArray, " ..."],
    y: Float[AnyArray, " ..."] | qwix.QArray,
    dtype: DTypeLike,
    out_dtype: DTypeLike,
) -> Float[Array, " ..."]:
    """`jnp.einsum(spec, x, y)` of both cast to `dtype`, summed and given in `out_dtype`.

    The gradient is of products in that one dtype too: by itself JAX would multiply a float32
    gradient by bfloat16 weights, for which GPUs have no fast product. That of `y`, a parameter, is
    summed and given in the dtype of `y`: over rows, and by a program for a mesh over devices. A
    quantized `y` stays as it is, and its scales are multiplied in afterwards.
    """
    x = x.astype(dtype)
    if isinstance(y, qwix.QArray):
        return qwix.einsum(spec, x, y, preferred_element_type=jnp.float32).astype(out_dtype)
    return _product(spec, x, y, dtype, out_dtype)


# JAX hands constants to a function with a gradient of its own as arrays of a kind of its own.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3, 4))
def _product(spec: str, x: Any, y: Any, dtype: DTypeLike, out_dtype: DTypeLike) -> jax.Array:
    """As `product`; the gradient of each factor is in that factor's dtype."""
    return _einsum(spec, x, y, dtype, out_dtype)


def _einsum(
    spec: str, x: AnyArray, y: AnyArray, dtype: DTypeLike, out_dtype: DTypeLike
) -> jax.Array:
    def sum_in(sum_dtype: DTypeLike, x: AnyArray, y: AnyArray) -> jax.Array:
        made = jnp.einsum(spec, x, y, preferred_element_type=sum_dtype)
        return made.astype(out_dtype)

    x, y = x.astype(dtype), y.astype(dtype)
    if out_dtype == jnp.float32:
        return sum_in(jnp.float32, x, y)
    # XLA's CPU backend has no fast product that gives bfloat16.
    return jax.lax.platform_dependent(
        x,
        y,
        cpu=functools.partial(sum_in, jnp.float32),
        default=functools.partial(sum_in, out_dtype),
    )


def _product_forward(
    spec: str, x: Any, y: Any, dtype: DTypeLike, out_dtype: DTypeLike
) -> tuple[jax.Array, tuple[Any, Any]]:
    return _product(spec, x, y, dtype, out_dtype), (x, y)


def _product_backward(
    spec: str, dtype: DTypeLike, out_dtype: DTypeLike, factors: tuple[Any, Any], gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, y = factors
    of_x, of_y, of_product = re.split(",|->", spec)
    return (
        _einsum(f"{of_product},{of_y}->{of_x}", gradient, y, dtype, x.dtype),
        _einsum(f"{of_x},{of_product}->{of_y}", x, gradient, dtype, y.dtype),
    )


_product.defvjp(_product_forward, _product_backward)


@jax.custom_vjp
def add_bias(x: Float[Array, "*rows F"], bias: Float[AnyArray, " F"]) -> Float[Array, "*rows F"]:
    """`x + bias` in the dtype of x; the gradient of `bias` is summed in its own dtype."""
    return x + jnp.expand_dims(bias.astype(x.dtype), range(x.ndim - 1))


def _add_bias_forward(x: jax.Array, bias: Any) -> tuple[jax.Array, Any]:
    return add_bias(x, bias), bias


def _add_bias_backward(bias: Any, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    rows = tuple(range(gradient.ndim - 1))
    return gradient, jnp.sum(gradient, axis=rows, dtype=bias.dtype)


add_bias.defvjp(_add_bias_forward, _add_bias_backward)


def by_kernel(
    x: Float[AnyArray, "*rows D"],
    kernel: Float[AnyArray, "D F"] | qwix.QArray | Transposed | LowRank,
    dtype: DTypeLike,
    out_dtype: DTypeLike,
) -> Float[Array, "*rows F"]:
    """`x @ kernel`, as `product`; of a low-rank change, `(x @ a) @ b` is added.

    One float32 row is summed in blocks on a CPU (`BLOCKS`).
    """
    if isinstance(kernel, LowRank):
        inner = product("...d,dr->...r", x, kernel.a, dtype, dtype)
        change = product("...r,rf->...f", inner, kernel.b, dtype, out_dtype)
        return by_kernel(x, kernel.base, dtype, out_dtype) + change
    if isinstance(kernel, Transposed):
        return _first(kernel.held, x, dtype, out_dtype)

    def whole(x: AnyArray, kernel: AnyArray | qwix.QArray) -> jax.Array:
        return product("...d,df->...f", x, kernel, dtype, out_dtype)

    def in_blocks(x: jax.Array, kernel: jax.Array) -> jax.Array:
        features = kernel.shape[1]
        blocks = x.reshape(BLOCKS, -1), kernel.reshape(BLOCKS, -1, features)
        sums = product("bd,bdf->bf", *blocks, jnp.float32, jnp.float32)
        return sums.sum(0).astype(out_dtype).reshape(*x.shape[:-1], features)

    has_blocks = _is_one_row(x, dtype) and x.size % BLOCKS == 0
    # Blocks need not be where a mesh splits the kernel.
    if has_blocks and not isinstance(kernel, qwix.QArray) and program_mesh() is None:
        return jax.lax.platform_dependent(x, kernel, cpu=in_blocks, default=whole)
    return whole(x, kernel)


def _is_one_row(x: AnyArray, dtype: DTypeLike) -> bool:
    """Whether x is one row for which blocks are faster."""
    return jnp.dtype(dtype) == jnp.float32 and x.size == x.shape[-1] >= LEAST_IN_BLOCKS


def by_table(
    x: Float[Array, "*B T D"], table: Float[AnyArray, "V D"] | qwix.QArray, dtype: DTypeLike
) -> Float32[Array, "*B T V"]:
    """`x @ table.T`, as `product`."""

    def rows_first(x: jax.Array, table: AnyArray | qwix.QArray) -> jax.Array:
        return product("...d,vd->...v", x, table, dtype, jnp.float32)

    def table_first(x: jax.Array, table: jax.Array) -> jax.Array:
        return _first(table, x, dtype, jnp.float32)

    is_many = math.prod(x.shape[:-1]) > FEW_ROWS
    # A mesh may split the rows.
    if isinstance(table, qwix.QArray) or is_many or program_mesh() is not None:
        return rows_first(x, table)
    return jax.lax.platform_dependent(x, table, cpu=table_first, default=rows_first)


def _first(
    table: AnyArray, x: AnyArray, dtype: DTypeLike, out_dtype: DTypeLike
) -> Float[Array, "*rows V"]:
    """`x @ table.T`, as `product`, with the table as the first factor: see `Transposed`."""
    count = math.prod(x.shape[:-1])
    rows = x.reshape(count, -1).astype(dtype)
    if _is_one_row(x, dtype) and len(table) % BLOCKS == 0:
        blocks = table.reshape(BLOCKS, -1, table.shape[1])
        y = _product("bvd,bd->bv", blocks, rows.repeat(BLOCKS, 0), dtype, out_dtype)
        return y.reshape(*x.shape[:-1], -1)
    # There is a fast product for every four columns of the second factor.
    if count > 4:
        rows = jnp.pad(rows, ((0, -count % 4), (0, 0)))
    y: Any = _product("vd,rd->vr", table, rows, dtype, out_dtype)
    # Without a barrier XLA swaps the factors, to spare the transpose.
    y = jax.lax.optimization_barrier(y)[:, :count].T
    return y.reshape(*x.shape[:-1], -1)


def by_keys(
    query: Float[Array, "B N Q H"], key: Float[Array, "B G K H"]
) -> Float32[Array, "B N Q K"]:
    """Scores; each of the keys is for N/G heads."""
    rows, heads, queries, _ = query.shape
    query = _in_groups(query, key.shape[1])
    # XLA's CPU backend multiplies [M, K] by [K, N] and first transposes what comes otherwise: for
    # a few queries, the cache at every step. So the keys are the first factor then, the values
    # always the second. `einsum` keeps that order only if the result's letters have it too.
    if queries <= FEW_QUERIES:
        scores = jnp.einsum(
            "bgkh,bgrqh->bgkrq", key, query, preferred_element_type=jnp.float32
        ).transpose(0, 1, 3, 4, 2)
    else:
        scores = jnp.einsum("bgrqh,bgkh->bgrqk", query, key, preferred_element_type=jnp.float32)
    return scores.reshape(rows, heads, queries, -1)


def by_values(
    weights: Float[Array, "B N Q K"], value: Float[Array, "B G K H"]
) -> Float[Array, "B Q N*H"]:
    """What the weights make of the values, each of which is for N/G heads."""
    rows, _, queries, _ = weights.shape
    weights = _in_groups(weights, value.shape[1])
    mixed = jnp.einsum("bgrqk,bgkh->bgrqh", weights, value).transpose(0, 3, 1, 2, 4)
    return mixed.reshape(rows, queries, -1)


def _in_groups(x: Float[Array, "B N Q X"], groups: int) -> Float[Array, "B G N//G Q X"]:
    return x.reshape(x.shape[0], groups, -1, *x.shape[2:])
