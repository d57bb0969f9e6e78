"""GPT-2's and GPT-NeoX's own options, and random geometries, against transformers.

Named geometries of every family are compared in test_causal_parity.py.
"""

from __future__ import annotations

import json
import math

import hf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from l2s_jax.checkpoints import gpt2, gpt_neox
from l2s_jax.checkpoints.pretrained import load_hf, save_hf
from l2s_jax.models.gpt2 import GPT2Config
from l2s_jax.models.gpt_neox import GPTNeoXConfig
from l2s_jax.models.rotary import Rotary

TOLERANCE = 1e-4  # of the largest logit
IDS = np.arange(40, dtype=np.int32)[None] * 7 % 64
FAMILIES = ("gpt2", "gpt_neox")


def edit(directory, changes, removed=()):
    """Changes fields of the directory's config.json."""
    path = directory / "config.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in fields.items() if k not in removed} | changes))


def apply(module, params, *args, **kwargs):
    with jax.default_matmul_precision("highest"):
        return np.asarray(module.apply({"params": params}, *args, **kwargs))


def assert_close(found, expected):
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= TOLERANCE * np.abs(expected).max()


def assert_parity(directory):
    """transformers and this package read the same logits out of a directory; gives the module."""
    reference = transformers.AutoModelForCausalLM.from_pretrained(str(directory)).eval()
    with torch.no_grad():
        expected = reference(torch.tensor(IDS).long()).logits.numpy()
    module, params = load_hf(str(directory))
    assert_close(apply(module, params, IDS, np.ones(IDS.shape, bool)), expected)
    return module, params


def random_checkpoint(model_type, random):
    """Fields of a config.json, drawn over everything that the family can vary."""
    heads = int(random.integers(1, 5))
    if model_type == "gpt2":
        return {
            "vocab_size": int(random.integers(40, 90)),
            "n_head": heads,
            "n_embd": heads * int(random.integers(3, 12)),
            "n_layer": int(random.integers(1, 4)),
            "n_inner": [None, int(random.integers(5, 60))][random.integers(2)],
            "n_positions": int(random.integers(220, 260)),
            "activation_function": str(random.choice(list(gpt2.ACTIVATION_OF))),
            "layer_norm_epsilon": float(10.0 ** -random.integers(2, 7)),
            "tie_word_embeddings": bool(random.integers(2)),
            "reorder_and_upcast_attn": bool(random.integers(2)),
        }
    head_width = 2 * int(random.integers(2, 10))
    rotary = {
        "rope_theta": float(random.choice([50.0, 1e4, 1e6])),
        "partial_rotary_factor": 2 * int(random.integers(1, head_width // 2 + 1)) / head_width,
    }
    stretched = {"rope_type": "linear", "factor": float(random.uniform(1.5, 8))}
    return {
        "vocab_size": int(random.integers(40, 90)),
        "num_attention_heads": heads,
        "hidden_size": heads * head_width,
        "num_hidden_layers": int(random.integers(1, 4)),
        "intermediate_size": int(random.integers(5, 60)),
        "hidden_act": str(random.choice(list(gpt_neox.ACTIVATION_OF))),
        "layer_norm_eps": float(10.0 ** -random.integers(2, 7)),
        "tie_word_embeddings": bool(random.integers(2)),
        "attention_bias": bool(random.integers(2)),
        "use_parallel_residual": bool(random.integers(2)),
        "rope_parameters": [rotary | {"rope_type": "default"}, rotary | stretched][
            random.integers(2)
        ],
    }


def run_every_way(module, params, ids, mask, response_ids, layer):
    """Logits of the response by `score` and by cached steps, of it all, and a layer's states."""

    def every_way(params, ids, mask, response_ids):
        variables = {"params": params}
        embedded = module.apply(variables, ids, method="embed")
        scored = module.apply(variables, embedded, mask, response_ids, method="score")
        whole = jnp.concatenate([ids, response_ids], 1)
        whole_mask = jnp.concatenate([mask, jnp.ones_like(response_ids, bool)], 1)
        full = module.apply(variables, whole, whole_mask)
        steps = response_ids.shape[1]
        first, cache = module.apply(variables, embedded, mask, steps, method="prefill")

        def step(cache, token):
            logits, cache = module.apply(variables, token, cache, method="step")
            return cache, logits

        _, later = jax.lax.scan(step, cache, response_ids[:, :-1].T)
        states = module.apply(variables, embedded, mask, layer, method="hidden_states")
        return scored, jnp.concatenate([first[None], later]).transpose(1, 0, 2), full, states

    with jax.default_matmul_precision("highest"):
        compiled = jax.jit(every_way, compiler_options=hf.COMPILATION)
        return jax.device_get(compiled(params, ids, mask, response_ids))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("model_type", FAMILIES)
def test_random_geometries(model_type, seed, tmp_path):
    random = np.random.default_rng(seed)
    checkpoint = random_checkpoint(model_type, random)
    reference = hf.make_causal(str(tmp_path), model_type=model_type, seed=seed, **checkpoint)
    module, params = load_hf(str(tmp_path))
    vocab_size = module.config.vocab_size
    prompt_tokens, response_tokens = (140, 20) if seed == 0 else (13, 6)
    ids = random.integers(0, vocab_size, (4, prompt_tokens), dtype=np.int32)
    response_ids = random.integers(0, vocab_size, (4, response_tokens), dtype=np.int32)
    # Padded nowhere, on the left, on the right, and here and there.
    mask = np.ones(ids.shape, bool)
    mask[1, :5] = mask[2, -4:] = False
    mask[3] = random.random(prompt_tokens) < 0.6
    mask[3, 6] = True

    layer = int(random.integers(module.config.num_layers))
    scored, steps, full, states = run_every_way(module, params, ids, mask, response_ids, layer)
    expected = []
    for row in range(4):
        own = np.concatenate([ids[row][mask[row]], response_ids[row]])
        with torch.no_grad():
            out = reference(torch.tensor(own[None]).long(), output_hidden_states=True)
        count = int(mask[row].sum())
        expected.append(out.logits[0, count - 1 : -1].numpy())
        kept = np.concatenate([mask[row], np.ones(response_tokens, bool)])
        assert_close(full[row][kept], out.logits[0].numpy())
        # transformers' last states have the final norm, so the last layer is never drawn.
        assert_close(states[row][mask[row]], out.hidden_states[layer][0, :count].numpy())
    assert_close(scored, np.stack(expected))
    assert_close(steps, np.stack(expected))

    save_hf(module.config, params, str(tmp_path / "back"))
    again, same = assert_parity_of_copy(tmp_path / "back", reference)
    assert again.config == module.config
    jax.tree.map(np.testing.assert_array_equal, params, same)


def assert_parity_of_copy(directory, reference):
    """What was written back gives the first model's logits in transformers; loads it again."""
    copy = transformers.AutoModelForCausalLM.from_pretrained(str(directory)).eval()
    ids = torch.tensor(IDS).long() % reference.config.vocab_size
    with torch.no_grad():
        assert_close(copy(ids).logits.numpy(), reference(ids).logits.numpy())
    return load_hf(str(directory))


@pytest.mark.parametrize(
    ("fields", "rotary"),
    [
        ({"rotary_pct": 0.5, "rotary_emb_base": 50}, Rotary(4, 50.0)),
        ({"rotary_pct": 1.0}, Rotary(8)),
        ({}, Rotary(2)),
        (
            {"rotary_pct": 0.5, "rope_scaling": {"type": "linear", "factor": 2.0}},
            Rotary(4, kind="linear", factor=2.0),
        ),
        (
            {"rotary_emb_base": 50, "rope_parameters": {"rope_theta": 99.0}},
            Rotary(2, 99.0),
        ),
    ],
)
def test_rotary_fields_of_transformers_4(fields, rotary, tmp_path):
    hf.make_causal(str(tmp_path), model_type="gpt_neox")
    edit(tmp_path, fields, removed=["rope_parameters"])
    module, _ = assert_parity(tmp_path)
    assert module.config.rotary == rotary


def test_the_rotary_share_survives_whatever_the_head_width():
    wrong = [
        (head, width)
        for head in range(2, 300)
        for width in range(2, head + 1, 2)
        if int(head * gpt_neox.config_to_hf(neox(head, width))["rotary_pct"]) != width
    ]
    assert not wrong
    assert any(int(head * (30 / head)) != 30 for head in range(30, 60))


def neox(head_width, rotary_width):
    return GPTNeoXConfig(width=head_width, num_heads=1, rotary=Rotary(rotary_width))


def test_a_share_that_is_no_round_number_round_trips(tmp_path):
    share = math.nextafter(30 / 44, 1)
    rotary = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": share}
    reference = hf.make_causal(
        str(tmp_path),
        model_type="gpt_neox",
        hidden_size=88,
        num_attention_heads=2,
        rope_parameters=rotary,
    )
    module, params = load_hf(str(tmp_path))
    assert module.config.rotary.width == 30
    save_hf(module.config, params, str(tmp_path / "back"))
    again, _ = assert_parity_of_copy(tmp_path / "back", reference)
    assert again.config == module.config


GPT2_ALIASES = {
    "hidden_size": 24,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "max_position_embeddings": 256,
}


@pytest.mark.parametrize(
    ("fields", "removed"),
    [
        ({"num_attention_heads": 2}, ["n_head"]),
        ({"num_attention_heads": 2}, []),
        (GPT2_ALIASES, ["n_embd", "n_head", "n_layer", "n_positions"]),
    ],
)
def test_gpt2_fields_under_their_common_names(fields, removed, tmp_path):
    hf.make_causal(str(tmp_path), model_type="gpt2")
    edit(tmp_path, fields, removed)
    module, _ = assert_parity(tmp_path)
    assert module.config.num_heads == 2


@pytest.mark.parametrize(
    ("model_type", "field", "activation"),
    [("gpt2", "activation_function", name) for name in gpt2.ACTIVATION_OF]
    + [("gpt_neox", "hidden_act", name) for name in gpt_neox.ACTIVATION_OF],
)
def test_every_activation(model_type, field, activation, tmp_path):
    hf.make_causal(str(tmp_path), model_type=model_type)
    edit(tmp_path, {field: activation})
    module, params = assert_parity(tmp_path)
    # The written name may be another one of the same function.
    save_hf(module.config, params, str(tmp_path / "back"))
    assert load_hf(str(tmp_path / "back"))[0].config == module.config


OLD_TENSORS = {
    "gpt2": ("transformer.h.1.attn.bias", "transformer.h.1.attn.masked_bias"),
    "gpt_neox": (
        "gpt_neox.layers.1.attention.bias",
        "gpt_neox.layers.1.attention.masked_bias",
        "gpt_neox.layers.1.attention.rotary_emb.inv_freq",
    ),
}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_buffers_of_older_files_are_passed_over(model_type, tmp_path):
    hf.make_causal(str(tmp_path), model_type=model_type)
    _, params = load_hf(str(tmp_path))
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | dict.fromkeys(OLD_TENSORS[model_type], np.ones(4, np.float32)), path)
    jax.tree.map(np.testing.assert_array_equal, params, load_hf(str(tmp_path))[1])
    save_file(tensors | {OLD_TENSORS[model_type][0] + "es": np.ones(4, np.float32)}, path)
    with pytest.raises(ValueError, match="not part of this model"):
        load_hf(str(tmp_path))


HEADS = {
    "gpt2": ("transformer.wte.weight", "lm_head.weight"),
    "gpt_neox": ("gpt_neox.embed_in.weight", "embed_out.weight"),
}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_tied_head_that_is_also_stored_must_be_the_embedding(model_type, tmp_path):
    hf.make_causal(str(tmp_path), model_type=model_type, tie_word_embeddings=True)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    embedding, head = HEADS[model_type]
    assert head not in tensors
    save_file(tensors | {head: tensors[embedding].copy()}, path)
    assert_parity(tmp_path)
    save_file(tensors | {head: tensors[embedding] + 1}, path)
    with pytest.raises(ValueError, match=f"{head} differs from {embedding}"):
        load_hf(str(tmp_path))


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize(
    ("fields", "removed", "eos_id", "pad_id"),
    [
        ({"eos_token_id": [5, 7], "pad_token_id": None}, [], 5, 5),
        ({"eos_token_id": 5}, ["pad_token_id"], 5, 5),
        ({"eos_token_id": 5, "pad_token_id": 0}, [], 5, 0),
        ({"eos_token_id": 5, "pad_token_id": -1}, [], 5, 5),
    ],
)
def test_special_tokens(model_type, fields, removed, eos_id, pad_id, tmp_path):
    hf.make_causal(str(tmp_path), model_type=model_type)
    edit(tmp_path, fields, removed)
    module, params = load_hf(str(tmp_path))
    assert (module.config.eos_id, module.config.pad_id) == (eos_id, pad_id)
    save_hf(module.config, params, str(tmp_path / "back"))
    assert load_hf(str(tmp_path / "back"))[0].config == module.config


@pytest.mark.parametrize(
    ("model_type", "fields", "named"),
    [
        ("gpt2", {"is_causal": False}, "is_causal is False"),
        ("gpt2", {"quantization_config": {"bits": 8}}, "quantization_config"),
        ("gpt2", {"activation_function": ["gelu"]}, "activation_function is ['gelu']"),
        ("gpt2", {"activation_function": None}, "activation_function is None"),
        ("gpt2", {"n_head": 0}, "n_head is 0"),
        ("gpt2", {"num_attention_heads": 5}, "width 24"),
        ("gpt2", {"n_positions": "256"}, "n_positions is '256'"),
        ("gpt_neox", {"is_causal": False}, "is_causal is False"),
        ("gpt_neox", {"hidden_act": {"name": "gelu"}}, "hidden_act is {'name': 'gelu'}"),
        ("gpt_neox", {"hidden_act": "mish"}, "hidden_act is 'mish'"),
        (
            "gpt_neox",
            {"num_attention_heads": 5, "rope_parameters": {"partial_rotary_factor": 1.0}},
            "width 24",
        ),
        ("gpt_neox", {"use_parallel_residual": "yes"}, "use_parallel_residual is 'yes'"),
        ("gpt_neox", {"attention_bias": 1}, "attention_bias is 1"),
        ("gpt_neox", {"rope_parameters": {"partial_rotary_factor": 0.4}}, "rotary width 3"),
        ("gpt_neox", {"rotary_pct": 1.5, "rope_parameters": None}, "rotary_pct is 1.5"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(model_type, fields, named, tmp_path):
    hf.make_causal(str(tmp_path), model_type=model_type)
    edit(tmp_path, fields)
    with pytest.raises(ValueError) as error:
        load_hf(str(tmp_path))
    assert named in str(error.value) and str(tmp_path / "config.json") in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: GPT2Config(num_heads=0), "num_heads 0: expected 1"),
        (lambda: GPT2Config(num_heads=-2), "num_heads -2: expected 1"),
        (lambda: GPT2Config(num_heads=7), "width 768"),
        (lambda: GPT2Config(activation="tanh"), "'tanh'"),
        (lambda: GPTNeoXConfig(num_heads=0), "num_heads 0: expected 1"),
        (lambda: GPTNeoXConfig(num_heads=7), "width 768"),
        (lambda: GPTNeoXConfig(activation="tanh"), "'tanh'"),
        (lambda: GPTNeoXConfig(rotary=Rotary(66)), "rotary width 66: .* head width 64"),
    ],
)
def test_an_impossible_geometry_is_refused(make, named):
    with pytest.raises(ValueError, match=named):
        make()


def test_a_position_that_is_not_there_is_not_another(tmp_path):
    hf.make_causal(str(tmp_path), model_type="gpt2", n_positions=8)
    module, params = load_hf(str(tmp_path))
    ids = IDS.reshape(4, 10)
    mask = np.arange(10) < np.array([[8], [9], [10], [3]])
    logits = apply(module, params, ids, mask)
    fits = [0, 3]
    assert np.isfinite(logits[fits]).all()
    assert np.isnan(logits[[1, 2]]).all()
    with torch.no_grad():
        reference = transformers.AutoModelForCausalLM.from_pretrained(str(tmp_path)).eval()
        expected = reference(torch.tensor(ids[:1, :8]).long()).logits[0].numpy()
    assert_close(logits[0, :8], expected)


def test_gpt2_starts_as_its_paper_says():
    config = GPT2Config(vocab_size=300, width=64, num_heads=4, feed_forward_width=256, num_layers=8)
    ids = np.zeros((1, 2), np.int32)
    params = gpt2.GPT2(config).init(jax.random.key(0), ids, np.ones((1, 2), bool))["params"]
    layer = params["layers_3"]
    for kernel in (layer["attention"]["output"]["kernel"], layer["feed_forward"]["wo"]["kernel"]):
        np.testing.assert_allclose(np.std(kernel), 0.02 / 4, rtol=0.05)
    for kernel in (layer["attention"]["query"]["kernel"], layer["feed_forward"]["wi"]["kernel"]):
        np.testing.assert_allclose(np.std(kernel), 0.02, rtol=0.05)
    np.testing.assert_allclose(np.std(params["token_embedding"]["embedding"]), 0.02, rtol=0.05)
