"""Layers as one array with an axis in front: the tree, its shardings, and models that scan it."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
import small
from jax.sharding import PartitionSpec as P

from l2s_jax import sharding
from l2s_jax.models.families import make_module
from l2s_jax.models.gpt2 import GPT2Config
from l2s_jax.models.gpt_neox import GPTNeoXConfig
from l2s_jax.models.llama import LlamaConfig
from l2s_jax.models.rotary import Rotary
from l2s_jax.models.stacking import stack_layers, unstack_layers
from l2s_jax.models.systems import LanguageModel

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


def small_model(family):
    if family == "t5":
        return small.t5_config(**DEEP)
    sizes = {"vocab_size": small.VOCABULARY, "width": 16, "num_heads": 2, "feed_forward_width": 32}
    if family == "gpt2":
        return GPT2Config(**sizes, num_layers=3, max_positions=64, dropout_rate=0.0)
    if family == "gpt_neox":
        return GPTNeoXConfig(**sizes, num_layers=3, rotary=Rotary(4))
    windows = {"sliding_window": 3, "window_pattern": "sfs"} if family == "windows" else {}
    return LlamaConfig(
        **sizes, num_layers=3, num_kv_heads=1, head_width=8, rotary=Rotary(8), **windows
    )


def everything(system, params, batch):
    """The loss, logits and gradients of training, and H as the frozen LLM of an L2S gives it."""
    module = make_module(system.config)
    held = stack_layers(params["llm"]) if system.config.scan_layers else params["llm"]

    def loss(params):
        logits = system.logits(params, {}, batch)
        return (jax.nn.log_softmax(logits)[..., 3] * batch["response_mask"]).sum(), logits

    def run(params, held):
        embedded = module.apply({"params": held}, batch["llm_ids"], method="embed")
        hidden = module.apply({"params": held}, embedded, batch["llm_mask"], method="represent")
        return jax.value_and_grad(loss, has_aux=True)(params), hidden

    return jax.jit(run, compiler_options=small.QUICK_COMPILATION)(params, held)


@pytest.mark.parametrize("family", ["t5", "gpt2", "gpt_neox", "llama", "windows"])
def test_scanned_and_rematerialized_layers_give_the_same(family):
    config = small_model(family)
    params, _ = small.make_params(LanguageModel("llm", config))
    batch = small.make_batch(LanguageModel("llm", config))
    expected = everything(LanguageModel("llm", config), params, batch)
    both = [(True, True)]
    for scan_layers, remat in [(True, False), (False, True), *both] if family == "t5" else both:
        changed = dataclasses.replace(config, scan_layers=scan_layers, remat=remat)
        found = everything(LanguageModel("llm", changed), params, batch)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), found, expected
        )
