"""Gradients of parameters are float32 before devices add them up; masks of scanned layers."""

from __future__ import annotations

import dataclasses
import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from test_stacking import small_model

from l2s_jax.cluster import sharding
from l2s_jax.models import products
from l2s_jax.models.lora import Lora
from l2s_jax.models.stacking import stack_layers
from l2s_jax.models.systems import LanguageModel, LlmToSlm
from l2s_jax.training import chunks, update

# Sizes that programs are made for change here.
pytestmark = pytest.mark.usefixtures("programs_of_its_own")

ROWS = 6  # unlike any size of a parameter


def equations(jaxpr):
    """All of a program's, those of its parts too."""
    for equation in jaxpr.eqns:
        yield equation
        for part in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            inner = getattr(part, "jaxpr", part)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def raised(system, trained, frozen):
    """Shapes of parameters, of one or of all layers, that the gradient has in bfloat16 first."""
    batch = small.make_batch(system, rows=ROWS, prompt_tokens=7, response_tokens=5)

    def loss(trained):
        return update.batch_loss(system, trained, frozen, batch, None, 0.0)[0]

    held = trained, stack_layers(trained), frozen
    shapes = {leaf.shape for leaf in jax.tree.leaves(held)}
    program = jax.make_jaxpr(jax.grad(loss))(trained)
    assert all(aval.dtype == jnp.float32 for aval in program.out_avals)
    casts = [e for e in equations(program.jaxpr) if e.primitive.name == "convert_element_type"]
    dtypes = [(e.invars[0].aval.dtype, e.outvars[0].aval) for e in casts]
    # Parameters are read in bfloat16, so the program is the one that is meant.
    assert any(
        d == jnp.float32 and a.dtype == jnp.bfloat16 and a.shape in shapes for d, a in dtypes
    )
    return {
        aval.shape
        for dtype, aval in dtypes
        if dtype == jnp.bfloat16 and aval.dtype == jnp.float32 and aval.shape in shapes
    }


SYSTEMS = {
    **dict.fromkeys(("t5", "gpt2", "gpt_neox", "llama"), functools.partial(LanguageModel, "slm")),
    "l2s": lambda c: LlmToSlm(
        small.t5_config(width=24, head_width=8, num_encoder_layers=2, dtype=c.dtype),
        c,
        projector_width=20,
        shared_vocabulary=False,
        layers=((1, 2), (2,)),
        normalize=True,
        stack=1,
    ),
}
BIASES = {
    "attention_input_bias": True,
    "attention_output_bias": True,
    "feed_forward_bias": True,
    "query_key_norm": True,
}


@pytest.mark.parametrize(
    ("name", "scan_layers"),
    [(name, False) for name in SYSTEMS] + [("t5", True), ("l2s", True)],
)
def test_no_gradient_of_a_parameter_is_ever_bfloat16(name, scan_layers):
    config = small_model("gpt2" if name == "l2s" else name)
    more = BIASES if name == "llama" else {}
    config = dataclasses.replace(config, dtype=jnp.bfloat16, scan_layers=scan_layers, **more)
    system = SYSTEMS[name](config)
    trained, frozen = small.make_params(system)
    assert raised(system, trained, frozen) == set()


def test_no_gradient_of_a_head_in_parts_is_ever_bfloat16():
    system = LanguageModel("slm", dataclasses.replace(small_model("gpt2"), dtype=jnp.bfloat16))
    # Of one position each.
    with mock.patch.object(chunks, "MOST_LOGITS", ROWS * small.VOCABULARY):
        assert raised(system, small.make_params(system)[0], {}) == set()


def test_no_gradient_of_an_adapter_is_ever_bfloat16():
    system = LanguageModel("slm", dataclasses.replace(small_model("llama"), dtype=jnp.bfloat16))
    adapted = Lora(system, 3, 4.0, ".*kernel")
    trained, base = adapted.split(small.make_params(system)[0], jax.random.key(0))
    assert raised(adapted, trained, {"base": base, "inner": {}}) == set()


def test_the_gradient_over_eight_devices_is_as_exact_as_that_of_one():
    """Against float64, of factors that bfloat16 holds."""
    random = np.random.default_rng(0)
    x, gradient, kernel = (
        np.asarray(jnp.asarray(random.standard_normal(shape), jnp.bfloat16), np.float32)
        for shape in ((64, 3, 16), (64, 3, 8), (16, 8))
    )
    mesh = small.mesh_of(8)
    rows = NamedSharding(mesh, P(sharding.ROWS))

    @functools.partial(jax.jit, in_shardings=(NamedSharding(mesh, P()), rows, rows))
    def gradients(params, x, gradient):
        def loss(params):
            y = products.by_kernel(x, params["kernel"], jnp.bfloat16, jnp.bfloat16)
            return jnp.sum(products.add_bias(y, params["bias"]).astype(jnp.float32) * gradient)

        return jax.grad(loss)(params)

    found = gradients({"kernel": kernel, "bias": np.zeros(8, np.float32)}, x, gradient)
    expected = {
        "kernel": np.einsum("btd,btf->df", x, gradient, dtype=np.float64),
        "bias": gradient.sum((0, 1), dtype=np.float64),
    }
    small.assert_same(found, expected, rtol=1e-5, atol=1e-4)
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), expected)
    assert any(
        np.abs(a.astype(np.float64) - b).max() > 1e-2
        for a, b in zip(jax.tree.leaves(rounded), jax.tree.leaves(expected), strict=True)
    )


def test_masks_are_the_same_with_remat_and_others_in_a_loop_over_layers():
    config = dataclasses.replace(small_model("gpt2"), dropout_rate=0.3)
    params, _ = small.make_params(LanguageModel("slm", config))
    batch = small.make_batch(LanguageModel("slm", config))

    def states(**computed):
        system = LanguageModel("slm", dataclasses.replace(config, **computed))
        key = jax.random.key(0, impl="rbg")
        run = jax.jit(lambda p: system.scored(p, {}, batch, key).states)
        return np.asarray(run(params))

    plain, scanned = states(), states(scan_layers=True)
    small.assert_same(states(remat=True), plain, rtol=1e-5, atol=1e-5)
    small.assert_same(states(scan_layers=True, remat=True), scanned, rtol=1e-5, atol=1e-5)
    assert np.abs(plain - scanned).max() > 0.1
