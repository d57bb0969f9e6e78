"""The decoder-only families against transformers in float32: same checkpoint, same logits."""

from __future__ import annotations

import dataclasses
import json

import hf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
import torch
import transformers
from safetensors.numpy import load_file, save_file

from l2s_jax.checkpoints import files
from l2s_jax.checkpoints.pretrained import (
    FAMILIES,
    load_encoder,
    load_hf,
    load_native,
    save_hf,
    save_native,
)
from l2s_jax.models.gpt2 import GPT2, GPT2Config
from l2s_jax.models.gpt_neox import GPTNeoX, GPTNeoXConfig
from l2s_jax.models.rotary import Rotary
from l2s_jax.models.systems import parameter_count

TOLERANCE = 1e-4  # of the largest logit
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}
NO_GROUPS = {"num_key_value_heads": 4}

# name -> (prompt tokens, response tokens, model_type, checkpoint)
CASES = {
    "gpt2": (20, 12, "gpt2", {}),
    "gpt2, own head": (20, 12, "gpt2", {"tie_word_embeddings": False}),
    "gpt2, wide feed-forward": (9, 5, "gpt2", {"n_inner": 100, "n_head": 4}),
    "gpt2, exact gelu": (9, 5, "gpt2", {"activation_function": "gelu"}),
    "gpt2, relu, deep": (9, 5, "gpt2", {"activation_function": "relu", "n_layer": 6}),
    "gpt2, odd": (9, 5, "gpt2", {"vocab_size": 331, "n_embd": 10, "n_head": 1, "n_inner": 7}),
    "gpt2, long": (150, 60, "gpt2", {"layer_norm_epsilon": 1e-2}),
    "neox": (20, 12, "gpt_neox", {}),
    "neox, sequential": (20, 12, "gpt_neox", {"use_parallel_residual": False}),
    "neox, all rotary": (
        20,
        12,
        "gpt_neox",
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 1.0}},
    ),
    "neox, half rotary, other base": (
        20,
        12,
        "gpt_neox",
        {"rope_parameters": {"partial_rotary_factor": 0.5, "rope_theta": 99.0}},
    ),
    "neox, no attention bias, tied": (
        9,
        5,
        "gpt_neox",
        {"attention_bias": False, "tie_word_embeddings": True},
    ),
    "neox, tanh gelu, one head": (
        9,
        5,
        "gpt_neox",
        {"hidden_act": "gelu_new", "num_attention_heads": 1},
    ),
    "neox, linear rope, long": (
        150,
        60,
        "gpt_neox",
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
    ),
    "llama 2": (20, 12, "llama", NO_GROUPS),
    "llama 3": (60, 40, "llama", {"rope_parameters": LLAMA3}),
    "llama, linear rope": (
        20,
        12,
        "llama",
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
    ),
    "llama, yarn, long": (150, 60, "llama", {"rope_parameters": YARN}),
    "llama, yarn with mscale": (
        40,
        12,
        "llama",
        {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 0.4, "beta_fast": 8}},
    ),
    "llama, biases": (9, 5, "llama", {"attention_bias": True, "mlp_bias": True}),
    "smollm2": (20, 12, "llama", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "mistral, window of 6": (20, 12, "mistral", {"sliding_window": 6}),
    "mistral, no window": (20, 12, "mistral", {"sliding_window": None, "head_dim": 12}),
    "qwen2": (20, 12, "qwen2", {}),
    "qwen2, upper layers windowed": (
        20,
        12,
        "qwen2",
        {
            "use_sliding_window": True,
            "sliding_window": 5,
            "max_window_layers": 1,
            "num_hidden_layers": 3,
        },
    ),
    "qwen3": (20, 12, "qwen3", {"head_dim": 10, "tie_word_embeddings": True}),
    "qwen3, biases": (9, 5, "qwen3", {"attention_bias": True}),
}


def batch(vocab_size, prompt_tokens, response_tokens):
    """ids, mask, response ids: a row padded right, one padded left, one full."""
    random = np.random.default_rng(1)
    ids = random.integers(0, vocab_size, (3, prompt_tokens), dtype=np.int32)
    slots = np.arange(prompt_tokens)
    mask = np.stack([slots < prompt_tokens * 2 // 3, slots >= 3, slots >= 0])
    return ids, mask, random.integers(0, vocab_size, (3, response_tokens), dtype=np.int32)


def reference_logits(model, ids, mask, response_ids):
    """transformers' logits [B, S, V] of the response, each row run alone and without padding."""
    rows = []
    for row, own, response in zip(ids, mask, response_ids, strict=True):
        whole = torch.tensor(np.concatenate([row[own], response])[None], dtype=torch.long)
        with torch.no_grad():
            rows.append(model(input_ids=whole).logits[0, own.sum() - 1 : -1].numpy())
    return np.stack(rows)


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_transformers(name, tmp_path, record_property):
    prompt_tokens, response_tokens, model_type, checkpoint = CASES[name]
    reference = hf.make_causal(str(tmp_path / "hf"), model_type=model_type, **checkpoint)
    module, params = load_hf(str(tmp_path / "hf"))
    ids, mask, response_ids = batch(module.config.vocab_size, prompt_tokens, response_tokens)
    expected = reference_logits(reference, ids, mask, response_ids)
    allowed = TOLERANCE * np.abs(expected).max()

    def three_ways(params, ids, mask, response_ids):
        variables = {"params": params}
        embedded = module.apply(variables, ids, method="embed")
        scored = module.apply(variables, embedded, mask, response_ids, method=small.score)
        whole_ids = jnp.concatenate([ids, response_ids], 1)
        whole_mask = jnp.concatenate([mask, jnp.ones_like(response_ids, bool)], 1)
        full = module.apply(variables, whole_ids, whole_mask)
        first, cache = module.apply(
            variables, embedded, mask, response_tokens + 3, method="prefill"
        )

        def step(cache, token):
            logits, cache = module.apply(variables, token, cache, method="step")
            return cache, logits

        _, steps = jax.lax.scan(step, cache, response_ids[:, :-1].T)
        states = module.apply(variables, embedded, mask, 1, method="hidden_states")
        return scored, full, jnp.concatenate([first[None], steps]).transpose(1, 0, 2), states

    with jax.default_matmul_precision("highest"):
        compiled = jax.jit(three_ways, compiler_options=hf.COMPILATION)
        scored, full, steps, states = compiled(params, ids, mask, response_ids)
    assert scored.dtype == steps.dtype == full.dtype == jnp.float32
    assert scored.shape == steps.shape == expected.shape
    assert np.abs(scored - expected).max() <= allowed
    assert np.abs(steps - expected).max() <= allowed
    for which, found in (("full", scored), ("steps", steps)):
        record_property(which, float(np.abs(found - expected).max() / np.abs(expected).max()))
    # The prompt's last token is in the last slot of the rows that aren't padded on the right.
    np.testing.assert_allclose(full[1:, prompt_tokens - 1 : -1], expected[1:], atol=allowed, rtol=0)

    with torch.no_grad():
        hidden = reference(
            input_ids=torch.tensor(ids[2:], dtype=torch.long), output_hidden_states=True
        ).hidden_states[1]
    np.testing.assert_allclose(states[2], hidden[0].numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_round_trips(name, tmp_path):
    _, _, model_type, checkpoint = CASES[name]
    reference = hf.make_causal(str(tmp_path / "hf"), model_type=model_type, **checkpoint)
    module, params = load_hf(str(tmp_path / "hf"))
    save_native(module.config, params, str(tmp_path / "ours"))
    again, same = load_native(str(tmp_path / "ours"))
    assert again.config == module.config
    jax.tree.map(np.testing.assert_array_equal, params, same)

    save_hf(again.config, same, str(tmp_path / "back"))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(str(tmp_path / "back")).eval()
    ids = torch.arange(18).reshape(2, 9) * 3 % module.config.vocab_size
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, reference(ids).logits, atol=1e-5, rtol=1e-5)
    third, params = load_hf(str(tmp_path / "back"))
    assert third.config == module.config
    jax.tree.map(np.testing.assert_array_equal, params, same)


@pytest.mark.parametrize("model_type", ["gpt2", "gpt_neox", "llama", "mistral", "qwen2", "qwen3"])
def test_an_exported_model_has_the_limit_of_its_source(model_type, tmp_path):
    hf.make_causal(str(tmp_path / "hf"), model_type=model_type, max_position_embeddings=777)
    module, params = load_hf(str(tmp_path / "hf"))
    save_hf(module.config, params, str(tmp_path / "back"))
    config = transformers.AutoConfig.from_pretrained(str(tmp_path / "back"))
    assert config.max_position_embeddings == 777


@pytest.mark.parametrize("model_type", ["gpt2", "gpt_neox", "llama", "qwen3"])
@pytest.mark.parametrize(("layer", "count"), [(0, 4), (1, 1), (3, 3), (0.5, 2), (0.1, 1), (4, 4)])
def test_load_encoder_reads_the_first_layers_only(model_type, layer, count, tmp_path, monkeypatch):
    layers = {"n_layer" if model_type == "gpt2" else "num_hidden_layers": 4}
    reference = hf.make_causal(str(tmp_path), model_type=model_type, **layers)
    read = []
    whole = files.TensorFiles.read
    monkeypatch.setattr(
        files.TensorFiles, "read", lambda self, key, at: read.append(key) or whole(self, key, at)
    )
    module, params = load_encoder(str(tmp_path), layer=layer)
    names = {name for name in params if name.startswith("layers_")}
    assert names == {f"layers_{i}" for i in range(count)}
    assert set(params) - names <= {"token_embedding", "position_embedding"}
    stored = {name: tensor.numel() for name, tensor in reference.state_dict().items()}
    assert parameter_count(params) == sum(stored[key] for key in read)
    assert not any("lm_head" in key or "embed_out" in key or "ln_f" in key for key in read)

    ids = np.arange(12, dtype=np.int32)[None]
    mask = np.ones(ids.shape, bool)
    embedded = module.apply({"params": params}, ids, method="embed")
    states = module.apply({"params": params}, embedded, mask, method="hidden_states")
    if count < 4:  # transformers applies the final norm to the last
        with torch.no_grad():
            expected = reference(torch.tensor(ids).long(), output_hidden_states=True)
        np.testing.assert_allclose(
            states, expected.hidden_states[count].numpy(), rtol=1e-4, atol=1e-4
        )
    h = np.asarray(module.apply({"params": params}, embedded, mask, method="represent"))
    np.testing.assert_allclose(np.mean(h**2, axis=-1), 1, rtol=1e-3)
    scale = np.sqrt(np.mean(np.asarray(states) ** 2, axis=-1, keepdims=True))
    np.testing.assert_allclose(h * scale, states, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("layer", [-1, 5, 2.5, 1.5, float("nan")])
def test_a_layer_that_is_not_there_is_refused(layer, tmp_path):
    hf.make_causal(str(tmp_path), model_type="llama", num_hidden_layers=4)
    with pytest.raises(ValueError, match=r"config\.json: layer .*: expected .*4 layers"):
        load_encoder(str(tmp_path), layer=layer)


def test_the_first_gpt2_files_without_a_prefix_are_read(tmp_path):
    hf.make_causal(str(tmp_path), model_type="gpt2")
    _, params = load_hf(str(tmp_path))
    path = tmp_path / "model.safetensors"
    old = {key.removeprefix("transformer."): value for key, value in load_file(path).items()}
    old["h.0.attn.bias"] = np.ones((1, 1, 8, 8), np.float32)
    save_file(old, path)
    jax.tree.map(np.testing.assert_array_equal, params, load_hf(str(tmp_path))[1])


REFUSED = [
    ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
    ("gpt2", {"add_cross_attention": True}, "add_cross_attention"),
    ("gpt2", {"activation_function": "tanh"}, "activation_function"),
    ("gpt2", {"n_embd": 25}, "width 25"),
    ("gpt_neox", {"hidden_act": "quick_gelu"}, "hidden_act"),
    ("gpt_neox", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic'"),
    ("gpt_neox", {"quantization_config": {"bits": 4}}, "quantization_config"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act"),
    ("llama", {"pretraining_tp": 2}, "pretraining_tp"),
    ("llama", {"rope_parameters": None, "rope_scaling": {"type": "longrope"}}, "'longrope'"),
    ("llama", {"rope_parameters": {"rope_type": "linear"}}, "factor"),
    ("llama", {"rope_parameters": LLAMA3 | {"low_freq_factor": 4.0}}, "low_freq_factor 4.0"),
    ("llama", {"rope_parameters": YARN | {"beta_fast": [1]}}, "beta_fast"),
    ("llama", {"rope_parameters": YARN | {"mscale": "a", "mscale_all_dim": 1}}, "mscale"),
    ("llama", {"rope_parameters": YARN | {"attention_factor": "1"}}, "attention_factor"),
    ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic'"),
    ("llama", {"rope_parameters": {"full_attention": {}}}, "rope_parameters"),
    ("llama", {"num_key_value_heads": 3}, "key/value heads"),
    ("llama", {"eos_token_id": 64}, "eos_token_id is 64"),
    ("llama", {"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ("mistral", {"layer_types": ["full_attention"] * 2}, "layer_types"),
    (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 4, "layer_types": ["a"]},
        "layer_types",
    ),
    ("qwen3", {"model_type": "qwen3_moe"}, "qwen3_moe"),
]


@pytest.mark.parametrize(("model_type", "fields", "named"), REFUSED)
def test_an_unsupported_option_is_refused_by_name(model_type, fields, named, tmp_path):
    hf.make_causal(str(tmp_path), model_type=model_type)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    with pytest.raises(ValueError) as error:
        load_hf(str(tmp_path))
    assert named in str(error.value) and str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("module", "count"),
    [
        (GPT2(GPT2Config()), 124_439_808),  # GPT-2
        (GPT2(GPT2Config(num_layers=6)), 81_912_576),  # DistilGPT-2
        (GPTNeoX(GPTNeoXConfig()), 162_322_944),  # Pythia-160M
        (
            GPTNeoX(
                GPTNeoXConfig(
                    width=512, num_heads=8, feed_forward_width=2048, num_layers=6, rotary=Rotary(16)
                )
            ),
            70_426_624,  # Pythia-70M
        ),
    ],
)
def test_full_size_parameter_counts(module, count):
    family = next(f for f in FAMILIES if isinstance(module.config, f.config_class))
    params = family.abstract_params(module)
    assert parameter_count(params) == count
    wider = type(module)(dataclasses.replace(module.config, feed_forward_width=1))
    assert parameter_count(family.abstract_params(wider)) != count
