"""How H comes to the SLM: several layers of the LLM, a norm, a stack of bidirectional layers."""

from __future__ import annotations

import dataclasses
import json
from unittest import mock

import hf
import jax
import numpy as np
import pytest
import small
import tiny
import torch

import l2s_jax
from l2s_jax.checkpoints.pretrained import load_encoder, load_hf
from l2s_jax.experiment import feature_cache
from l2s_jax.experiment.experiment import Experiment
from l2s_jax.experiment.workdir import read_config
from l2s_jax.models.mix import Mix, layers_of
from l2s_jax.models.representation import represent
from l2s_jax.models.stack import Stack
from l2s_jax.models.systems import LanguageModel, LlmToSlm

IDS = np.arange(12, dtype=np.int32)[None] * 7 % 64
MASK = np.ones(IDS.shape, bool)
GROUPS = ((1, 3), (2,))


def unit(x):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)


def reference(model, **inputs):
    """transformers' residual stream after each layer; the last has no norm yet."""
    states = []
    stack = model.encoder.block if hasattr(model, "encoder") else model.model.layers
    for layer in stack:
        layer.register_forward_hook(
            lambda _, __, out: states.append(out[0] if isinstance(out, tuple) else out)
        )
    with torch.no_grad():
        model(**inputs)
    return [state.numpy().reshape(1, 12, -1) for state in states]


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_h_is_that_of_each_layer(kind, scan_layers, tmp_path):
    ids = torch.tensor(IDS).long()
    if kind == "t5":
        model = hf.make_t5(str(tmp_path), num_layers=4).eval()
        states = reference(model, input_ids=ids, decoder_input_ids=ids)
    else:
        model = hf.make_causal(str(tmp_path), model_type="llama", num_hidden_layers=4)
        states = reference(model, input_ids=ids)
    layer = 0.0 if kind == "t5" else 3.0
    module, params = load_encoder(str(tmp_path), layer=layer, scan_layers=scan_layers)
    with jax.default_matmul_precision("highest"):
        found = np.asarray(represent(module.config, params, IDS, MASK, layers_of(GROUPS)))
    expected = np.concatenate([unit(state) for state in states[:3]], axis=-1)
    np.testing.assert_allclose(found, expected, atol=2e-4)


def test_a_group_is_a_sum_with_learnt_weights():
    hidden = np.random.default_rng(0).standard_normal((2, 5, 3 * 4)).astype(np.float32)
    weights = {"weights_0": np.array([0.3, -1.2]), "weights_1": np.array([5.0])}
    found = Mix(GROUPS).apply({"params": weights}, hidden)
    first, second, third = np.split(hidden, 3, axis=-1)
    share = np.exp(0.3) / (np.exp(0.3) + np.exp(-1.2))
    expected = np.concatenate([share * first + (1 - share) * third, second], axis=-1)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def joined(**changes):
    llm = small.t5_config(width=24, num_encoder_layers=3, head_width=8)
    system = LlmToSlm(llm, small.t5_config(), projector_width=20, **changes)
    return system, *small.make_params(system)


def test_with_a_zero_projector_l2s_is_the_slm():
    system = small.make_system("add")
    params, frozen = small.make_params(system)
    params = {**params, "projector": {**params["projector"]}}
    params["projector"]["outward"] = jax.tree.map(lambda x: 0 * x, params["projector"]["outward"])
    batch = small.make_batch(system)
    alone = LanguageModel("slm", system.slm_config)
    as_alone = {
        name.replace("llm_", f"{alone.prompt_name}_"): value for name, value in batch.items()
    }
    np.testing.assert_allclose(
        system.scored(params, frozen, batch).logits(),
        alone.scored({"slm": params["slm"]}, {}, as_alone).logits(),
        atol=1e-5,
    )


EVERYTHING = {"layers": GROUPS, "normalize": True, "stack": 2}


def test_what_is_off_leaves_no_trace():
    system, trained, _ = joined()
    assert set(trained) == {"projector", "slm"} and system.hidden_width == 24
    system, trained, _ = joined(**EVERYTHING)
    assert set(trained) == {"projector", "slm", "mix", "hidden_norm", "over"}
    assert system.hidden_width == 72
    assert trained["projector"]["inward"]["kernel"].shape == (48, 20)


def test_results_do_not_depend_on_padding():
    system, trained, frozen = joined(**EVERYTHING)
    batch = small.make_batch(system)
    logits = jax.jit(lambda batch: system.scored(trained, frozen, batch).logits())
    expected = logits(batch)
    wider = {
        **batch,
        **{
            name: np.pad(batch[name], ((0, 0), (0, 4)), constant_values=fill)
            for name, fill in (("llm_ids", 7), ("llm_mask", False))
        },
    }
    there = batch["response_mask"]
    np.testing.assert_allclose(
        np.asarray(logits(wider))[there], np.asarray(expected)[there], atol=2e-5
    )


def test_decoding_follows_training():
    system, trained, frozen = joined(**EVERYTHING)
    batch = small.make_batch(system)
    ids, mask = batch["llm_ids"], batch["llm_mask"]
    logits = system.scored(trained, frozen, batch).logits()
    served = system.to_serve(trained, frozen)
    hidden = system.encode(*served, ids, mask)
    first, cache = system.prefill(*served, ids, mask, hidden, 4)
    np.testing.assert_allclose(first, logits[:, 0], atol=2e-5)
    second, _ = system.step(served[0], batch["response_ids"][:, 0], cache)
    np.testing.assert_allclose(second, logits[:, 1], atol=2e-5)


def test_scanned_layers_give_the_same():
    system, trained, frozen = joined(**EVERYTHING)
    batch = small.make_batch(system)
    expected = system.scored(trained, frozen, batch).logits()
    config = dataclasses.replace(system.slm_config, scan_layers=True)
    scanned = dataclasses.replace(system, slm_config=config)
    np.testing.assert_allclose(scanned.scored(trained, frozen, batch).logits(), expected, atol=2e-5)


def test_tokens_see_each_other_in_both_directions():
    config = small.t5_config()
    stack = Stack(config, 1)
    x = np.random.default_rng(0).standard_normal((1, 6, config.width)).astype(np.float32)
    mask = np.arange(6)[None] < 5
    init = lambda: stack.init(jax.random.key(0), x, mask, True)  # noqa: E731
    params = small.random_like(jax.eval_shape(init))
    changed = x.copy()
    changed[:, 4] += 1
    first, second = (np.asarray(stack.apply(params, one, mask, True)) for one in (x, changed))
    assert (np.abs(first - second).max(-1)[0, :5] > 1e-4).all()
    changed = x.copy()
    changed[:, 5] += 1
    second = np.asarray(stack.apply(params, changed, mask, True))
    np.testing.assert_array_equal(first[:, :5], second[:, :5])


CHANGES = """

import l2s_jax.config
base_config = get_config


def get_config():
    config = base_config()
    config.llm.model.num_encoder_layers = 3
    config.l2s.layers = ((1, 2), (2, 3))
    config.l2s.normalize = True
    config.l2s.stack = 1
    return config
"""


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """(config file, workdir) of a finished run."""
    root = tmp_path_factory.mktemp("joining")
    config = tiny.write_task(root / "task")
    config.write_text(config.read_text() + CHANGES)
    cache = f"--config.features.cache={root / 'cache'}"
    assert tiny.run(f"--config={config}", f"--workdir={root / 'run'}", cache) == 0
    return config, root / "run"


def test_a_whole_run_reads_h_from_a_cache(job):
    _, workdir = job
    (facts,) = (workdir.parent / "cache").glob("*/features.json")
    facts = json.loads(facts.read_text())
    assert facts["width"] == 3 * 16 and facts["layers"] == [1, 2, 3]


def test_features_that_another_mesh_makes_are_the_same(job, tmp_path):
    config = read_config(str(job[1]))
    kept = []
    for folder, mesh in ((config.features.cache, {}), (str(tmp_path), {"data": 2, "tensor": 4})):
        config.features.update(cache=folder, mesh=mesh)
        features = Experiment(config, str(job[1])).features
        data = features._tokenized(features.context.validation())
        with mock.patch.object(feature_cache, "Encoder", wraps=feature_cache.Encoder) as made:
            features.put_into(validation=data)
        kept.append(np.concatenate([data.hidden[i].astype(np.float32) for i in range(8)]))
    # The first were there.
    (call,) = made.call_args_list
    _, params, used, _ = call.args
    assert dict(used.shape) == {"data": 2, "fsdp": 1, "sequence": 1, "tensor": 4}
    assert {leaf.sharding.mesh for leaf in jax.tree.leaves(params)} == {used}
    np.testing.assert_allclose(kept[1], kept[0], rtol=2**-7, atol=1e-5)


def test_the_model_answers_by_its_directory_alone(job):
    _, workdir = job
    lines = (workdir / "predictions/l2s.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    model = l2s_jax.load(str(workdir / "l2s/model"))
    outputs = model.generate([record["prompt"] for record in records])
    assert [output.text for output in outputs] == [record["response"] for record in records]
    fields = json.loads((workdir / "l2s/model/config.json").read_text())
    assert fields["layers"] == [[1, 2], [2, 3]] and fields["stack"] == 1


def test_a_plan_has_it_too(job, tmp_path):
    config, workdir = job
    run = [f"--config={config}", f"--workdir={tmp_path}", "--mode=plan", "--topology=cpu:1"]
    assert tiny.run(*run, "--programs=encode") == 0
    planned = json.loads((tmp_path / "plan.json").read_text())["model"]["trained_parameters"]
    fields = l2s_jax.load(str(workdir / "l2s/model"))
    assert planned == sum(leaf.size for leaf in jax.tree.leaves(fields.trained))


@pytest.mark.parametrize(
    ("flags", "fragments"),
    [
        (["--config.l2s.layers=((2,4),)"], ["config.l2s.layers=((2, 4),)", "3 layers"]),
        (["--config.l2s.layers=(2,3)"], ["l2s.layers=(2, 3)", "a tuple of tuples"]),
        (["--config.l2s.layers=((0,),)"], ["l2s.layers=((0,),)", "from 1"]),
        (["--config.l2s.stack=-1"], ["l2s.stack=-1", ">= 0"]),
    ],
)
def test_bad_input_is_one_line(job, flags, fragments, tmp_path, capsys):
    config, _ = job
    assert tiny.run(f"--config={config}", f"--workdir={tmp_path / 'run'}", *flags) == 2
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    for fragment in fragments:
        assert fragment in line
    assert not (tmp_path / "run/llm/model").exists()


def test_a_checkpoint_without_the_layer_is_refused(job, tmp_path, capsys):
    config, _ = job
    module, _ = load_hf(str(job[1] / "llm/model"))
    assert module.config.num_encoder_layers == 3
    flags = [f"--config.llm.path={job[1] / 'llm/model'}", "--config.llm.train.steps=0"]
    changes = ["--config.l2s.layers=((9,),)", "--config.tokenizer.train_vocab_size=0"]
    assert tiny.run(f"--config={config}", f"--workdir={tmp_path}", *flags, *changes) == 2
    assert "config.l2s.layers=((9,),): the LLM has 3 layers" in capsys.readouterr().err
