"""Layers as one array with an axis in front: the tree, its shardings, and models that scan it."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from jax.sharding import PartitionSpec as P

from l2s_jax.checkpoints import pretrained
from l2s_jax.cluster import sharding
from l2s_jax.models.cache import CausalCache, KeyValue
from l2s_jax.models.families import make_module
from l2s_jax.models.gpt2 import GPT2Config
from l2s_jax.models.gpt_neox import GPTNeoXConfig
from l2s_jax.models.llama import LlamaConfig
from l2s_jax.models.lora import Lora
from l2s_jax.models.rotary import Rotary
from l2s_jax.models.stacking import stack_layers, unstack_layers
from l2s_jax.models.systems import LanguageModel, LlmToSlm
from l2s_jax.training import loop, optim, update

DEEP = {"num_encoder_layers": 3, "num_decoder_layers": 2}


def tree():
    return small.t5_params(small.t5_config(**DEEP))


def test_unstacking_is_the_inverse_of_stacking():
    params = {"slm": tree(), "projector": {"inward": {"kernel": np.ones((2, 3))}}}
    stacked = stack_layers(params)
    encoder = stacked["slm"]["encoder"]
    assert set(encoder) == {"layers", "final_norm", "relative_bias"}
    assert encoder["layers"]["attention"]["query"]["kernel"].shape == (3, 16, 12)
    jax.tree.map(np.testing.assert_array_equal, unstack_layers(stacked), params)


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
        logits = system.scored(params, {}, batch).logits()
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


def pair(family, **computed):
    """An L2S of a T5 and an SLM of a family, with layers as `computed` says."""
    llm = small.t5_config(width=24, head_width=8, num_encoder_layers=3)
    scanned = {key: value for key, value in computed.items() if key == "scan_layers"}
    return LlmToSlm(
        dataclasses.replace(llm, **scanned),
        dataclasses.replace(small_model(family), **computed),
        projector_width=20,
    )


SCANNED = {"scan_layers": True, "remat": True}


def test_a_run_trains_alike_and_goes_on_in_the_other_layout(tmp_path):
    plain, scanned = pair("t5"), pair("t5", **SCANNED)
    params, frozen = small.make_params(plain)
    pairs = small.random_pairs(32, 7)

    def fit(system, frozen, directory, steps):
        return loop.fit(
            system,
            frozen,
            params,
            small.make_train_config(
                steps, evaluate_every=2, select="last", trainable=("projector/.*", ".*layers_1/.*")
            ),
            batches=small.make_batches(system, pairs, batch_size=8),
            validation=[small.make_batch(system, rows=8)],
            directory=str(tmp_path / directory),
            fingerprint="f",
            seed=0,
            mesh=small.mesh_of(),
        )

    expected = fit(plain, frozen, "plain", 4)
    fit(plain, frozen, "mixed", 2)
    found = fit(scanned, stack_layers(frozen), "mixed", 4)
    small.assert_same(found, expected, rtol=1e-3, atol=1e-4)
    lines = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("plain", "mixed")
    ]
    losses = [[line["loss"] for line in own if "loss" in line] for own in lines]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)


def test_a_causal_slm_trains_alike_on_a_mesh():
    config = small.make_train_config(3, accumulation=2)
    found, flops = [], []
    for computed, sizes in (({}, (1, 1, 1)), (SCANNED, (2, 2, 2))):
        system, mesh = pair("windows", **computed), small.mesh_of(*sizes)
        params, frozen = small.make_params(pair("windows"))
        frozen = stack_layers(frozen) if computed else frozen
        optimizer = optim.optimizer(config, params)
        shardings = update.state_shardings(params, optimizer, config, mesh)
        step = update.make_step(system, optimizer, config, 0, shardings)
        losses = []
        with jax.set_mesh(mesh):
            frozen = jax.device_put(frozen, sharding.parameter_shardings(frozen, mesh))
            state = jax.device_put(update.init_state(params, optimizer, config), shardings)
            for seed in range(3):
                batch = small.make_batch(system, rows=16, seed=seed)
                state, metrics = step(state, frozen, sharding.put_batch(batch, mesh))
                losses.append(float(metrics["loss"]))
        found.append((losses, jax.device_get(state.params)))
        flops.append(update.step_flops(system, params, frozen, batch, config))
    (plain, plain_params), (scanned, scanned_params) = found
    assert flops[0] == flops[1]
    np.testing.assert_allclose(scanned, plain, rtol=1e-5)
    assert len(set(np.round(plain, 3))) == 3
    small.assert_same(scanned_params, plain_params, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("pattern", [".*layers_1/.*kernel", ".*kernel"])
def test_lora_with_stacked_layers(pattern):
    plain, scanned = pair("gpt2"), pair("gpt2", **SCANNED)
    trained, frozen = small.make_params(plain)
    stacked, batch = stack_layers(frozen), small.make_batch(plain)
    adapters, base = Lora(plain, 2, 4.0, pattern).split(trained, jax.random.key(0))
    adapters = small.random_like(adapters)
    logits = [
        Lora(system, 2, 4.0, pattern)
        .scored(adapters, {"base": base, "inner": inner}, batch)
        .logits()
        for system, inner in ((plain, frozen), (scanned, stacked))
    ]
    np.testing.assert_allclose(*logits, rtol=1e-4, atol=1e-4)


def test_generation_and_int8_with_stacked_layers():
    plain, scanned = pair("gpt2"), pair("gpt2", **SCANNED)
    trained, frozen = small.make_params(plain)
    stacked, batch = stack_layers(frozen), small.make_batch(plain)
    for weights in ("float", "int8"):
        outs = []
        for system, own in ((plain, frozen), (scanned, stacked)):
            held = system.to_serve(trained, own, weights)
            inputs = batch["llm_ids"], batch["llm_mask"]
            hidden = system.encode(*held, *inputs)
            first, cache = system.prefill(*held, *inputs, hidden, 2)
            second, _ = system.step(held[0], jnp.argmax(first, axis=-1), cache)
            outs.append((hidden, first, second))
        small.assert_same(outs[1], outs[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("call", ["prefill", "step"])
def test_a_scanned_module_does_not_decode(call):
    config = dataclasses.replace(small_model("gpt2"), scan_layers=True)
    params = stack_layers(small.make_params(LanguageModel("llm", config))[0]["llm"])
    module = make_module(config)
    prompt, mask = jnp.ones((1, 2, 16)), np.ones((1, 2), bool)
    layer = KeyValue(*[jnp.zeros((1, 2, 4, 8))] * 2)
    places = jnp.zeros((1, 2), jnp.int32)
    cache = CausalCache(jnp.int32(0), jnp.asarray(mask), places, places[:, 0], (layer,))
    arguments = (prompt, mask, 2) if call == "prefill" else (np.ones(1, int), cache)
    with pytest.raises(ValueError, match="scan_layers: prefill, step"):
        module.apply({"params": params}, *arguments, method=call)


def test_a_scanned_program_is_as_long_for_any_depth():
    def lines(layers, scan_layers):
        config = small.t5_config(num_encoder_layers=layers, scan_layers=scan_layers)
        config, params = pretrained.abstract_encoder(config)
        system = LlmToSlm(config, config, projector_width=4)
        ids = jax.ShapeDtypeStruct((2, 8), jnp.int32), jax.ShapeDtypeStruct((2, 8), bool)
        lowered = jax.jit(system.encode).lower({}, params, *ids)
        text = lowered.compile(small.QUICK_COMPILATION).as_text()
        return sum(" = " in line for line in text.splitlines())

    shallow = lines(2, True)
    assert lines(12, True) == pytest.approx(shallow, rel=0.03)
    assert lines(4, False) > 1.5 * shallow


def test_the_layout_is_on_no_disk():
    config = dataclasses.replace(small_model("llama"), **SCANNED)
    fields = pretrained.config_to_native(config)
    assert fields == pretrained.config_to_native(small_model("llama"))
    assert pretrained.config_from_native(fields, "") == small_model("llama")
