"""Llama's own options: both styles of config.json, the kinds it is saved as, what is read.

The logits of every family are compared in test_causal_parity.py.
"""

from __future__ import annotations

import json

import hf
import jax
import numpy as np
import pytest
import torch
import transformers
from flax.traverse_util import flatten_dict

from l2s_jax import sealed
from l2s_jax.checkpoints import files, llama
from l2s_jax.checkpoints.pretrained import load_encoder, load_hf, load_native, save_hf, save_native
from l2s_jax.models.llama import Llama, LlamaConfig
from l2s_jax.models.rotary import Rotary
from l2s_jax.models.systems import parameter_count

TOLERANCE = 1e-4  # of the largest logit
IDS = np.arange(40, dtype=np.int32)[None] * 7 % 64


def edit(directory, changes, removed=()):
    """Changes fields of the directory's config.json."""
    path = directory / "config.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in fields.items() if k not in removed} | changes))


def reference(directory, **kwargs):
    model = transformers.AutoModelForCausalLM.from_pretrained(str(directory)).eval()
    with torch.no_grad():
        return model(torch.tensor(IDS).long(), **kwargs)


def apply(module, params, *args, **kwargs):
    with jax.default_matmul_precision("highest"):
        return np.asarray(module.apply({"params": params}, *args, **kwargs))


def assert_parity(directory, module, params):
    expected = reference(directory).logits.numpy()
    found = apply(module, params, IDS, np.ones(IDS.shape, bool))
    assert np.abs(found - expected).max() <= TOLERANCE * np.abs(expected).max()


# transformers 4 wrote rope_theta beside rope_scaling, and its kind as "type" at first.
SCALINGS = {
    "default": None,
    "linear": {"type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "yarn": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
}


@pytest.mark.parametrize("kind", SCALINGS)
def test_config_files_of_transformers_4(kind, tmp_path):
    hf.make_causal(str(tmp_path), model_type="llama")
    changes = {"rope_theta": 500.0, "rope_scaling": SCALINGS[kind]}
    edit(tmp_path, changes, removed=["rope_parameters"])
    module, params = load_hf(str(tmp_path))
    assert (module.config.rotary.kind, module.config.rotary.base) == (kind, 500.0)
    assert_parity(tmp_path, module, params)


@pytest.mark.parametrize(
    ("model_type", "fields", "windows"),
    [
        ("qwen2", {"layer_types": ["sliding_attention", "full_attention"]}, (5, None)),
        ("qwen3", {"layer_types": None, "max_window_layers": 1}, (None, 5)),
        ("qwen3", {"layer_types": None, "max_window_layers": 0}, (5, 5)),
        ("qwen3", {"layer_types": None, "max_window_layers": 2}, (None, None)),
        ("mistral", {}, (5, 5)),
    ],
)
def test_which_layers_are_windowed(model_type, fields, windows, tmp_path):
    hf.make_causal(str(tmp_path), model_type=model_type)
    edit(tmp_path, {"use_sliding_window": True, "sliding_window": 5} | fields)
    module, params = load_hf(str(tmp_path))
    assert module.config.windows == windows
    assert_parity(tmp_path, module, params)


@pytest.mark.parametrize(
    ("fields", "eos_id", "pad_id"),
    [
        ({"eos_token_id": [5, 7], "pad_token_id": None}, 5, 5),
        ({"eos_token_id": 5, "pad_token_id": 0}, 5, 0),
        ({"eos_token_id": [7], "pad_token_id": 3}, 7, 3),
    ],
)
def test_special_tokens(fields, eos_id, pad_id, tmp_path):
    hf.make_causal(str(tmp_path), model_type="llama")
    edit(tmp_path, fields)
    config = load_hf(str(tmp_path))[0].config
    assert (config.eos_id, config.pad_id) == (eos_id, pad_id)


def test_every_layer_gives_the_states_of_transformers(tmp_path):
    hf.make_causal(str(tmp_path), model_type="qwen3", num_hidden_layers=4)
    module, params = load_hf(str(tmp_path))
    expected = reference(tmp_path, output_hidden_states=True).hidden_states
    embedded = apply(module, params, IDS, method="embed")
    mask = np.ones(IDS.shape, bool)
    for count in range(1, 4):  # transformers applies the final norm to the last
        found = apply(module, params, embedded, mask, count, method="hidden_states")
        np.testing.assert_allclose(found, expected[count].numpy(), rtol=1e-4, atol=1e-4)


def test_only_the_shards_that_an_encoder_needs_are_opened(tmp_path, monkeypatch):
    model = hf.make_causal(model_type="llama", num_hidden_layers=6)
    model.save_pretrained(tmp_path, max_shard_size="12KB")
    shard_of = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    needed = ("model.embed_tokens.", "model.layers.0.", "model.layers.1.")
    wanted = {key for key in shard_of if key.startswith(needed)}
    shards = {shard_of[key] for key in wanted}
    assert shards < set(shard_of.values())
    for shard in set(shard_of.values()) - shards:
        (tmp_path / shard).write_bytes(b"")

    read = []
    whole = files.TensorFiles.read
    monkeypatch.setattr(
        files.TensorFiles, "read", lambda self, key, at: read.append(key) or whole(self, key, at)
    )
    _, params = load_encoder(str(tmp_path), layer=2)
    assert sorted(read) == sorted(wanted)
    assert parameter_count(params) == sum(model.state_dict()[key].numel() for key in wanted)
    assert set(params) == {"token_embedding", "layers_0", "layers_1"}


BASE = {
    "vocab_size": 64,
    "width": 24,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_width": 8,
    "feed_forward_width": 40,
    "num_layers": 2,
    "rotary": Rotary(8),
}
INPUT = {"attention_input_bias": True}
OUTPUT = {"attention_output_bias": True}
KINDS = [
    ("llama", {}),
    ("llama", {**INPUT, **OUTPUT, "feed_forward_bias": True}),
    ("llama", {"feed_forward_bias": True}),
    ("mistral", {"sliding_window": 3}),
    ("qwen2", INPUT),
    ("qwen2", {**INPUT, "sliding_window": 3, "window_pattern": "fs"}),
    ("qwen3", {"query_key_norm": True}),
    ("qwen3", {"query_key_norm": True, **INPUT, **OUTPUT, "sliding_window": 3}),
]


@pytest.mark.parametrize(("kind", "changes"), KINDS)
def test_a_config_is_saved_as_the_kind_that_can_say_it(kind, changes, tmp_path):
    config = LlamaConfig(**BASE, **changes)
    module = Llama(config)
    random = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: random.normal(0, 0.3, x.shape).astype(np.float32),
        llama.FAMILY.abstract_params(module),
    )
    save_hf(config, params, str(tmp_path))
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == kind
    assert_parity(tmp_path, module, params)
    assert load_hf(str(tmp_path))[0].config.windows == config.windows


@pytest.mark.parametrize(
    "changes",
    [
        OUTPUT,
        {"sliding_window": 3, "window_pattern": "fs"},
        {"sliding_window": 3, **INPUT, **OUTPUT},
        {"query_key_norm": True, "feed_forward_bias": True},
        {"query_key_norm": True, **INPUT},
    ],
)
def test_a_mix_that_no_kind_can_say_is_refused(changes):
    with pytest.raises(ValueError, match="no model_type of transformers"):
        llama.config_to_hf(LlamaConfig(**BASE, **changes))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_kv_heads": 0}, "num_kv_heads 0: expected 1"),
        ({"num_kv_heads": 3}, "3 key/value heads"),
        ({"sliding_window": -3}, "sliding_window -3"),
        ({"window_pattern": "s"}, "window_pattern 's'"),
        ({"window_pattern": "sx"}, "window_pattern 'sx'"),
        ({"rotary": Rotary(4)}, "rotary width 4"),
    ],
)
def test_an_impossible_geometry_is_refused(changes, named):
    with pytest.raises(ValueError, match=named):
        LlamaConfig(**{**BASE, **changes})


@pytest.mark.parametrize(
    ("rotary", "named"),
    [
        ({"width": 8, "base": "x"}, "rotary: base is 'x', expected a value of type float"),
        ({"width": 8, "factor": None}, "rotary: factor is None"),
        ({"width": 8, "original_length": 1.5}, "rotary: original_length is 1.5"),
        ({"width": 8, "surplus": 1}, "surplus"),
        ({"base": 1.0}, "width"),
    ],
)
def test_a_malformed_field_within_a_field_is_refused(rotary, named, tmp_path):
    config = LlamaConfig(**BASE)
    abstract = llama.FAMILY.abstract_params(Llama(config))
    params = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), abstract)
    save_native(config, params, str(tmp_path))
    (tmp_path / sealed.SUMS).unlink()  # what follows is edited by hand
    edit(tmp_path, {"rotary": {"kind": "default", "width": 8, "base": 10000}})
    assert load_native(str(tmp_path))[0].config == config
    edit(tmp_path, {"rotary": {"kind": "default", **rotary}})
    with pytest.raises(ValueError) as error:
        load_native(str(tmp_path))
    assert named in str(error.value) and str(tmp_path / "config.json") in str(error.value)


def test_attention_in_both_directions_is_refused(tmp_path):
    hf.make_causal(str(tmp_path), model_type="llama")
    edit(tmp_path, {"is_causal": False})
    with pytest.raises(ValueError, match=r"config\.json: is_causal is False, which is not support"):
        load_hf(str(tmp_path))


def geometry(vocab_size, width, num_heads, num_kv_heads, head_width, feed_forward_width, layers):
    return LlamaConfig(
        vocab_size=vocab_size,
        width=width,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_width=head_width,
        feed_forward_width=feed_forward_width,
        num_layers=layers,
        rotary=Rotary(head_width),
    )


# name -> (geometry, other fields, parameters of the released model)
RELEASED = {
    "Llama 2 7B": ((32000, 4096, 32, 32, 128, 11008, 32), {}, 6_738_415_616),
    "Llama 3 8B": ((128256, 4096, 32, 8, 128, 14336, 32), {}, 8_030_261_248),
    "Mistral 7B": ((32000, 4096, 32, 8, 128, 14336, 32), {}, 7_241_732_096),
    "Qwen2 0.5B": ((151936, 896, 14, 2, 64, 4864, 24), {**INPUT, "tied_head": True}, 494_032_768),
    "Qwen3 0.6B": (
        (151936, 1024, 16, 8, 128, 3072, 28),
        {"query_key_norm": True, "tied_head": True},
        596_049_920,
    ),
    "Qwen3 8B": ((151936, 4096, 32, 8, 128, 12288, 36), {"query_key_norm": True}, 8_190_735_360),
    "SmolLM2 135M": ((49152, 576, 9, 3, 64, 1536, 30), {"tied_head": True}, 134_515_008),
}


@pytest.mark.parametrize("name", RELEASED)
def test_parameter_counts_of_released_models(name):
    sizes, changes, count = RELEASED[name]
    config = LlamaConfig(**{**vars(geometry(*sizes)), **changes})
    params = llama.FAMILY.abstract_params(Llama(config))
    assert parameter_count(params) == count
    assert all(leaf.ndim in (1, 2) for leaf in flatten_dict(params).values())
