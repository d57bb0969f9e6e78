"""Products, in the dtypes, orders and layouts that each backend wants.

What they compute is plain; layers.py calls them where its mathematics has a product. Letters as
there, and G groups of heads.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import qwix

from l2s_jax.cluster.sharding import program_mesh

# Split-K: XLA's CPU backend takes a tenth less time for one float32 row by a kernel from memory if
# the axis that is summed over is in blocks of so many, whose products are added up. More rows take
# longer so.
SPLIT_K = 128


def product(
    spec: str,
    x: jax.Array,
    y: jax.Array | qwix.QArray,
    dtype: jnp.dtype,
    out_dtype: jnp.dtype,
) -> jax.Array:
    """`jnp.einsum(spec, x, y)` of both cast to `dtype`, summed and given in `out_dtype`.

    The gradient is of products in that one dtype too: by itself JAX would multiply a float32
    gradient by bfloat16 weights, for which GPUs have no fast product. A quantized `y` stays as it
    is, and its scales are multiplied in afterwards.
    """
    x = x.astype(dtype)
    if isinstance(y, qwix.QArray):
        return qwix.einsum(spec, x, y, preferred_element_type=jnp.float32).astype(out_dtype)
    return _product(spec, x, y.astype(dtype), out_dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def _product(spec: str, x: jax.Array, y: jax.Array, out_dtype: jnp.dtype) -> jax.Array:
    def sum_in(dtype: jnp.dtype, x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.einsum(spec, x, y, preferred_element_type=dtype).astype(out_dtype)

    if x.dtype == out_dtype == jnp.float32:
        return sum_in(jnp.float32, x, y)
    # XLA's CPU backend has no fast product that gives bfloat16.
    return jax.lax.platform_dependent(
        x,
        y,
        cpu=functools.partial(sum_in, jnp.float32),
        default=functools.partial(sum_in, out_dtype),
    )


def _product_forward(
    spec: str, x: jax.Array, y: jax.Array, out_dtype: jnp.dtype
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _product(spec, x, y, out_dtype), (x, y)


def _product_backward(
    spec: str, out_dtype: jnp.dtype, factors: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, ...]:
    _, transpose = jax.vjp(functools.partial(jnp.einsum, spec), *factors)
    return transpose(gradient.astype(factors[0].dtype))


_product.defvjp(_product_forward, _product_backward)


def by_kernel(
    x: jax.Array, kernel: jax.Array | qwix.QArray, dtype: jnp.dtype, out_dtype: jnp.dtype
) -> jax.Array:
    """x [..., D] @ kernel [D, F] -> [..., F], as `product`.

    One float32 row is summed in blocks on a CPU (`SPLIT_K`).
    """

    def whole(x: jax.Array, kernel: jax.Array | qwix.QArray) -> jax.Array:
        return product("...d,df->...f", x, kernel, dtype, out_dtype)

    def split_k(x: jax.Array, kernel: jax.Array) -> jax.Array:
        features = kernel.shape[1]
        blocks = x.reshape(-1, SPLIT_K), kernel.reshape(-1, SPLIT_K, features)
        sums = product("kd,kdf->kf", *blocks, jnp.float32, jnp.float32)
        return sums.sum(0).astype(out_dtype).reshape(*x.shape[:-1], features)

    if _has_split_k(x, kernel, dtype):
        return jax.lax.platform_dependent(x, kernel, cpu=split_k, default=whole)
    return whole(x, kernel)


def _has_split_k(x: jax.Array, kernel: jax.Array | qwix.QArray, dtype: jnp.dtype) -> bool:
    return (
        jnp.dtype(dtype) == jnp.float32
        and not isinstance(kernel, qwix.QArray)
        and x.size == x.shape[-1]
        and x.size > SPLIT_K
        and x.size % SPLIT_K == 0
        # The blocks need not be where a mesh splits the kernel.
        and program_mesh() is None
    )


def by_table(x: jax.Array, table: jax.Array | qwix.QArray, dtype: jnp.dtype) -> jax.Array:
    """x [..., T, D] @ table [V, D] transposed -> float32 [..., T, V], as `product`."""

    def rows_first(x: jax.Array, table: jax.Array | qwix.QArray) -> jax.Array:
        return product("...d,vd->...v", x, table, dtype, jnp.float32)

    def table_first(x: jax.Array, table: jax.Array) -> jax.Array:
        return jnp.moveaxis(product("vd,...d->v...", table, x, dtype, jnp.float32), 0, -1)

    if x.shape[-2] > 1 or isinstance(table, qwix.QArray):
        return rows_first(x, table)
    # XLA's CPU backend takes up to twice as long for one step of several rows by a table that is
    # the second factor and has the summed axis last.
    return jax.lax.platform_dependent(x, table, cpu=table_first, default=rows_first)


def by_keys(query: jax.Array, key: jax.Array) -> jax.Array:
    """query [B, N, Q, H] by key [B, G, K, H], each for N/G heads -> float32 scores [B, N, Q, K]."""
    rows, heads, queries, _ = query.shape
    query = _in_groups(query, key.shape[1])
    # XLA's CPU backend multiplies [M, K] by [K, N] and first transposes what comes otherwise: for
    # one query, the cache at every step. So the keys are the first factor then, the values always
    # the second. `einsum` keeps that order only if the result's letters have it too.
    if queries == 1:
        scores = jnp.einsum(
            "bgkh,bgrqh->bgkrq", key, query, preferred_element_type=jnp.float32
        ).transpose(0, 1, 3, 4, 2)
    else:
        scores = jnp.einsum("bgrqh,bgkh->bgrqk", query, key, preferred_element_type=jnp.float32)
    return scores.reshape(rows, heads, queries, -1)


def by_values(weights: jax.Array, value: jax.Array) -> jax.Array:
    """weights [B, N, Q, K] by value [B, G, K, H], each for N/G heads -> [B, Q, N*H]."""
    rows, _, queries, _ = weights.shape
    weights = _in_groups(weights, value.shape[1])
    mixed = jnp.einsum("bgrqk,bgkh->bgrqh", weights, value).transpose(0, 3, 1, 2, 4)
    return mixed.reshape(rows, queries, -1)


def _in_groups(x: jax.Array, groups: int) -> jax.Array:
    """[B, N, Q, X] -> [B, G, N/G, Q, X]."""
    return x.reshape(x.shape[0], groups, -1, *x.shape[2:])
