"""Layers as one array with an axis in front: the tree, its shardings, and models that scan it."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import small
from jax.sharding import PartitionSpec as P

from l2s_jax import sharding
from l2s_jax.models.stacking import stack_layers, unstack_layers

DEEP = {"num_encoder_layers": 3, "num_decoder_layers": 2}


def tree():
    return small.t5_params(small.t5_config(**DEEP))


@pytest.mark.parametrize("donate", [False, True])
def test_unstacking_is_the_inverse_of_stacking(donate):
    params = {"slm": tree(), "projector": {"inward": {"kernel": np.ones((2, 3))}}}
    stacked = stack_layers(params, donate=donate)
    encoder = stacked["slm"]["encoder"]
    assert set(encoder) == {"layers", "final_norm", "relative_bias"}
    assert encoder["layers"]["attention"]["query"]["kernel"].shape == (3, 16, 12)
    assert ("layers_0" in params["slm"]["encoder"]) is not donate
    expected = {"slm": tree(), "projector": params["projector"]}
    jax.tree.map(np.testing.assert_array_equal, unstack_layers(stacked), expected)


def test_shapes_stack_as_arrays_do():
    abstract = jax.eval_shape(lambda: tree())
    stacked = stack_layers(abstract)
    assert stacked == jax.eval_shape(stack_layers, abstract)
    assert unstack_layers(stacked) == abstract


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda layer: layer.update(more=np.ones(2)), "layers_2 has other parameters"),
        (
            lambda layer: layer["attention_norm"].update(scale=np.ones(2)),
            r"\[16\] and \[2\]",
        ),
    ],
)
def test_layers_that_differ_do_not_stack(change, message):
    params = tree()
    change(params["encoder"]["layers_2"])
    with pytest.raises(ValueError, match=message):
        stack_layers(params)


def test_a_missing_layer_is_an_error():
    params = tree()
    del params["encoder"]["layers_1"]
    with pytest.raises(ValueError, match="found layers_0, layers_2"):
        stack_layers(params)


def test_stacked_parameters_lie_as_those_of_each_layer_do():
    params = jax.eval_shape(lambda: {"slm": tree()})
    mesh = small.mesh_of(2, 2, 2)
    alone = sharding.parameter_shardings(params, mesh)
    stacked = sharding.parameter_shardings(stack_layers(params), mesh)["slm"]["encoder"]
    query = stacked["layers"]["attention"]["query"]["kernel"]
    assert query.spec == P(None, "fsdp", "tensor")
    layer = jax.tree.leaves(alone["slm"]["encoder"]["layers_0"])
    for one, together in zip(layer, jax.tree.leaves(stacked["layers"]), strict=True):
        assert together.spec == P(None, *one.spec)
    with pytest.raises(ValueError, match=r"layers/adapter/kernel \(0 rules\)"):
        sharding.parameter_shardings({"layers": {"adapter": {"kernel": np.ones(2)}}}, mesh)
