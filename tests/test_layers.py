"""The product that all layers share, and the layer that most of them are in."""

from __future__ import annotations

import functools
import re

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix

from l2s_jax.models.layers import Linear
from l2s_jax.models.products import BLOCKS, Transposed, by_table, product

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
    tensor = r"tensor<\S+x(\w+)>"
    dots = re.findall(rf"dot_general.* : \({tensor}, {tensor}\) -> {tensor}", text)
    operands, sums = {dot[:2] for dot in dots}, [dot[2] for dot in dots]
    assert len(dots) == 3 and operands == {("bf16", "bf16")}
    # A CPU has a fast product for float32 sums alone.
    assert sums == (["f32"] * 3 if platform == "cpu" else ["f32", "bf16", "bf16"])


def float_or_int8(layer, x, weights):
    """The layer's parameters, and its kernel and bias as numbers."""
    params = layer.init(jax.random.key(1), x)["params"]
    if "bias" in params:
        params["bias"] = jax.random.normal(jax.random.key(2), params["bias"].shape)
    bias = np.asarray(params.get("bias", 0.0))
    if weights == "float":
        return params, np.asarray(params["kernel"], np.float64), bias
    kernel = qwix.quantize(params["kernel"], jnp.int8, channelwise_axes=(1,))
    params["kernel"] = kernel
    return params, np.asarray(qwix.dequantize(kernel), np.float64), bias


@pytest.mark.parametrize("shape", [(1, 1, 256), (1, 1, 258), (1, 3, 24), (5, 1, 24), (13, 5, 24)])
@pytest.mark.parametrize("features", [40, 41])
@pytest.mark.parametrize("use_bias", [False, True])
@pytest.mark.parametrize("weights", ["float", "int8", "transposed"])
@pytest.mark.parametrize("transform", [lambda f: f, jax.jit])
def test_a_linear_layer_is_the_whole_product(shape, features, use_bias, weights, transform):
    layer = Linear(features, jax.nn.initializers.normal(), use_bias=use_bias)
    x = jax.random.normal(jax.random.key(0), shape)
    params, kernel, bias = float_or_int8(layer, x, "int8" if weights == "int8" else "float")
    if weights == "transposed":
        params["kernel"] = Transposed(params["kernel"].T)
    found = transform(layer.apply)({"params": params}, x)
    exact = np.asarray(x, np.float64) @ kernel + bias
    assert found.shape == exact.shape and found.dtype == jnp.float32
    np.testing.assert_allclose(found, exact, rtol=1e-5, atol=1e-5)


def test_a_transposed_kernel_of_another_shape_is_refused():
    layer, x = Linear(40, jax.nn.initializers.zeros), jnp.ones((2, 24))
    assert Transposed(jnp.ones((40, 24))).shape == (24, 40)
    with pytest.raises(flax.errors.ScopeParamShapeError):
        layer.apply({"params": {"kernel": Transposed(jnp.ones((24, 40)))}}, x)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("is_transposed", [False, True])
def test_the_gradient_of_a_linear_layer(rows, is_transposed):
    layer = Linear(40, jax.nn.initializers.normal(), use_bias=True)
    x = jax.random.normal(jax.random.key(0), (rows, 1, 256))
    params, kernel, _ = float_or_int8(layer, x, "float")
    weights = jax.random.normal(jax.random.key(3), (rows, 1, 40))
    if is_transposed:
        params["kernel"] = Transposed(params["kernel"].T)

    def loss(params, x):
        return jnp.sum(weights * layer.apply({"params": params}, x))

    of_params, of_x = jax.grad(loss, argnums=(0, 1))(params, x)
    x, weights = (np.asarray(array, np.float64)[:, 0] for array in (x, weights))
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    found = of_params["kernel"]
    close(found.held.T if is_transposed else found, x.T @ weights)
    close(of_params["bias"], weights.sum(0))
    close(of_x[:, 0], weights @ kernel.T)


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("devices", [1, 2])
def test_only_one_cpu_sums_one_float32_row_in_blocks(platform, dtype, rows, devices):
    layer = Linear(40, jax.nn.initializers.zeros, dtype)
    x = jnp.ones((rows, 1, 256))
    params = layer.init(jax.random.key(0), x)
    with jax.set_mesh(jax.make_mesh((devices,), ("data",), (jax.sharding.AxisType.Auto,))):
        traced = jax.jit(layer.apply).trace(params, x)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    (kernel,) = re.findall(r"dot_general.* : \(tensor<\S+>, tensor<(\S+)x\w+>\)", text)
    in_blocks = (platform, dtype, rows, devices) == ("cpu", jnp.float32, 1, 1)
    assert kernel == (f"{BLOCKS}x{256 // BLOCKS}x40" if in_blocks else "256x40")


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (3, 2), (9, 1), (13, 5)])
@pytest.mark.parametrize("weights", ["float", "int8"])
def test_a_table_makes_the_logits_of_any_number_of_rows(shape, weights):
    x = jax.random.normal(jax.random.key(0), (*shape, 24))
    table = jax.random.normal(jax.random.key(1), (40, 24))
    exact = np.asarray(table, np.float64)
    if weights == "int8":
        table = qwix.quantize(table, jnp.int8, channelwise_axes=(0,))
        exact = np.asarray(qwix.dequantize(table), np.float64)
    found = jax.jit(by_table, static_argnums=2)(x, table, jnp.float32)
    np.testing.assert_allclose(found, np.asarray(x, np.float64) @ exact.T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "features", "made"),
    [
        ((1, 1, 256), 40, (BLOCKS, 40 // BLOCKS, 1)),
        ((1, 1, 256), 41, (41, 1)),
        ((1, 1, 24), 40, (40, 1)),
        ((1, 5, 24), 40, (40, 8)),
        ((4, 1, 24), 40, (40, 4)),
        ((13, 5, 24), 40, (40, 68)),
    ],
)
@pytest.mark.parametrize("is_kernel", [False, True])
def test_a_cpu_multiplies_what_is_transposed_by_rows(shape, features, made, is_kernel):
    x, table = jnp.ones(shape), jnp.ones((features, shape[-1]))
    if is_kernel:
        layer = Linear(features, jax.nn.initializers.zeros)
        lowered = jax.jit(layer.apply).lower({"params": {"kernel": Transposed(table)}}, x)
    else:
        lowered = jax.jit(by_table, static_argnums=2).lower(x, table, jnp.float32)
    (found,) = re.findall(r"= f32\[([\d,]+)\]\S* dot\(", lowered.compile().as_text())
    # The rows are made up to a multiple of four, and the table stays the first factor; of many
    # rows, one that a training step may use does not.
    is_many = shape == (13, 5, 24) and not is_kernel
    assert tuple(map(int, found.split(","))) == ((65, 40) if is_many else made)
