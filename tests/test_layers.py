"""The product that all layers share, and the layer that most of them are in."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2s_jax.models.layers import PART, Linear, product

SPEC = "...d,df->...f"


@pytest.mark.parametrize("out", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_product_is_summed_in_float32(dtype, out):
    x, kernel = (jax.random.normal(jax.random.key(i), (32, 32)).astype(dtype) for i in range(2))
    exact = np.asarray(x, np.float64) @ np.asarray(kernel, np.float64)
    found = product(SPEC, x, kernel, dtype, out)
    assert found.dtype == out
    tolerance = 1e-5 if out == jnp.float32 else 2**-8
    np.testing.assert_allclose(np.asarray(found, np.float64), exact, rtol=tolerance, atol=1e-4)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_gradient_is_that_of_the_exact_product(dtype):
    x = jax.random.normal(jax.random.key(0), (4, 8)).astype(dtype)
    kernel = jax.random.normal(jax.random.key(1), (8, 6)).astype(dtype)
    weights = jax.random.normal(jax.random.key(2), (4, 6))

    def loss(x, kernel):
        return jnp.sum(weights * product(SPEC, x, kernel, x.dtype, jnp.float32))

    of_x, of_kernel = jax.grad(loss, argnums=(0, 1))(x, kernel)
    assert of_x.dtype == of_kernel.dtype == dtype
    exact = np.asarray(weights, np.float64)
    tolerance = (
        {"rtol": 1e-5, "atol": 1e-5} if dtype == jnp.float32 else {"rtol": 0.02, "atol": 0.05}
    )
    x, kernel = np.asarray(x, np.float64), np.asarray(kernel, np.float64)
    np.testing.assert_allclose(np.asarray(of_x, np.float64), exact @ kernel.T, **tolerance)
    np.testing.assert_allclose(np.asarray(of_kernel, np.float64), x.T @ exact, **tolerance)


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_no_product_of_two_dtypes_is_made(platform):
    def loss(x, kernel):
        return jnp.sum(product(SPEC, x, kernel, x.dtype, jnp.float32) ** 2)

    x, kernel = jnp.ones((4, 8), jnp.bfloat16), jnp.ones((8, 6), jnp.bfloat16)
    traced = jax.jit(jax.grad(loss, argnums=(0, 1))).trace(x, kernel)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    operands = re.findall(r"dot_general.* : \(tensor<\S+x(\w+)>, tensor<\S+x(\w+)>\)", text)
    assert len(operands) == 3 and set(operands) == {("bf16", "bf16")}


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("width", [3 * PART, 3 * PART + 8])
@pytest.mark.parametrize("use_bias", [False, True])
def test_one_row_in_parts_is_the_whole_product(rows, width, use_bias):
    layer = Linear(40, jax.nn.initializers.normal(), use_bias=use_bias)
    x = jax.random.normal(jax.random.key(0), (rows, 1, width))
    params = layer.init(jax.random.key(1), x)["params"]
    found = layer.apply({"params": params}, x)
    exact = np.asarray(x, np.float64) @ np.asarray(params["kernel"], np.float64)
    assert found.shape == exact.shape and found.dtype == jnp.float32
    np.testing.assert_allclose(found, exact, rtol=1e-5, atol=1e-5)
    of_kernel = jax.grad(lambda p: layer.apply({"params": p}, x).sum())(params)["kernel"]
    exact = np.broadcast_to(np.asarray(x, np.float64).sum((0, 1))[:, None], of_kernel.shape)
    np.testing.assert_allclose(of_kernel, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("rows", [1, 2])
def test_only_a_cpu_takes_one_float32_row_in_parts(platform, dtype, rows):
    layer = Linear(40, jax.nn.initializers.zeros, dtype)
    x = jnp.ones((rows, 1, 2 * PART))
    params = layer.init(jax.random.key(0), x)
    text = jax.jit(layer.apply).trace(params, x).lower(lowering_platforms=(platform,)).as_text()
    (kernel,) = re.findall(r"dot_general.* : \(tensor<\S+>, tensor<(\S+)x\w+>\)", text)
    parts = platform == "cpu" and dtype == jnp.float32 and rows == 1
    assert kernel == (f"2x{PART}x40" if parts else f"{2 * PART}x40")
