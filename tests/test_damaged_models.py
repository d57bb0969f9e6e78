"""Damaged checkpoints, in all formats: one line that names the file, or the right model."""

import json
import os

import corpus
import ggufs
import jax
import numpy as np
import pytest
import shapes
import small
from corpus import Trial

from l2s_jax import convert, sealed
from l2s_jax.checkpoints import pretrained
from l2s_jax.gguf_file import read_header
from l2s_jax.models.gpt2 import GPT2Config
from l2s_jax.models.gpt_neox import GPTNeoXConfig
from l2s_jax.models.llama import LlamaConfig
from l2s_jax.models.rotary import Rotary
from l2s_jax.tokenizers import load_tokenizer

_SIZES = {"vocab_size": 48, "width": 16, "num_heads": 2, "num_layers": 1, "feed_forward_width": 24}
_IDS = {"pad_id": 0, "eos_id": 1}
_STRETCHED = Rotary(8, kind="llama3", factor=2.0, original_length=64)
CONFIGS = {
    "t5": small.t5_config(dropout_rate=0.1),
    "gpt2": GPT2Config(**_SIZES, **_IDS, max_positions=32),
    "gpt_neox": GPTNeoXConfig(**_SIZES, **_IDS, rotary=Rotary(2)),
    "llama": LlamaConfig(**_SIZES, **_IDS, num_kv_heads=1, head_width=8, rotary=_STRETCHED),
}
# Fields of a config.json that make another model of the same weights, which nothing else says.
OTHER_MODELS = {
    "dropout_rate", "resid_pdrop", "attention_dropout", "hidden_dropout", "layer_norm_epsilon",
    "rms_norm_eps", "layer_norm_eps", "eos_token_id", "pad_token_id", "eos_id", "norm_epsilon",
    "relative_attention_max_distance", "max_distance", "rope_theta", "rope_type", "factor",
    "low_freq_factor", "high_freq_factor", "original_max_position_embeddings", "rotary_emb_base",
    "activation_function", "hidden_act", "use_parallel_residual", "sliding_window",
    "trained_positions", "max_position_embeddings", "base", "attention_factor", "beta_fast",
    "beta_slow", "high_frequency_factor", "low_frequency_factor", "original_length",
    "parallel_residual", "partial_rotary_factor", "rotary_pct",
}  # fmt: skip
# Values of these that are as good as any other, of which each takes a trace of the model.
NUMBERS = ("10^6", "10^9", "2^31", "30 digits", "fraction")


@pytest.fixture(autouse=True)
def _shapes_are_not_looked_at(monkeypatch):
    """Which takes most of the time of a module that is traced once, and is others' to test."""
    monkeypatch.setattr(shapes, "enabled", False)


def write(config, directory, *, native):
    """A random model, on disk without hashes, as from elsewhere; its parameters."""
    family = pretrained.family_of(config)
    params = small.random_like(family.abstract_params(family.make_module(config)))
    (pretrained.save_native if native else pretrained.save_hf)(config, params, str(directory))
    return params


def bits(params):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(params)]


def check(trial, at_least):
    assert not trial.faults, "\n".join(trial.faults[:40])
    assert trial.tried >= at_least and trial.lines > at_least // 2


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_damaged_model(name, native, tmp_path):
    directory = tmp_path / "model"
    write(CONFIGS[name], directory, native=native)
    weights = directory / f"{'params' if native else 'model'}.safetensors"
    settings = directory / "config.json"

    def read():
        return convert.load(str(directory))

    module, params = read()
    expected = bits(params)

    def same(found, variant):
        is_right = bits(found[1]) == expected
        return is_right and (found[0].config == module.config or variant.key in OTHER_MODELS)

    trial, content = Trial(), settings.read_bytes()

    def variants():
        yield from corpus.json_texts(content)
        for variant in corpus.json_values(json.loads(content)):
            if variant.key not in OTHER_MODELS or variant.value not in NUMBERS:
                yield variant

    # With the hashes that are written beside it, every change is found.
    hashed = {"same": lambda *_: False}
    trial.read(corpus.flips(content, 40), settings, read, **hashed)
    trial.read(corpus.flips(weights.read_bytes(), 60), weights, read, **hashed)
    assert trial.lines == trial.tried
    (directory / sealed.SUMS).unlink()
    trial.read(variants(), settings, read, same=same)
    trial.read(corpus.safetensors_variants(weights.read_bytes()), weights, read, same=same)
    check(trial, 400)


def test_a_damaged_index(tmp_path):
    directory = tmp_path / "model"
    write(CONFIGS["t5"], directory, native=False)
    (directory / sealed.SUMS).unlink()
    header, data = corpus.safetensors_parts((directory / "model.safetensors").read_bytes())
    names = [name for name in header if name != "__metadata__"]
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file, content, places = f"model-{number:05d}-of-00002.safetensors", b"", {}
        for name in part:
            start, stop = header[name]["data_offsets"]
            offsets = [len(content), len(content) + stop - start]
            places[name] = header[name] | {"data_offsets": offsets}
            content += data[start:stop]
            weight_map[name] = file
        (directory / file).write_bytes(corpus.safetensors_file(places, content))
    (directory / "model.safetensors").unlink()
    index = directory / "model.safetensors.index.json"
    given = {"metadata": {"total_size": len(data)}, "weight_map": weight_map}
    index.write_text(json.dumps(given))

    def read():
        return bits(convert.load(str(directory))[1])

    expected, trial = read(), Trial()
    shard = directory / "model-00001-of-00002.safetensors"

    def same(found, _):
        return found == expected

    def variants():
        yield from corpus.json_texts(index.read_bytes())
        few = {"metadata": given["metadata"], "weight_map": dict(list(weight_map.items())[:4])}
        yield from corpus.json_values(few)
        for name in (*names[:4], "\x1b[31mx"):
            for file in ("../model", "/etc/passwd", "no.safetensors", "", ".", "\x1b[2J", "a\0b"):
                changed = {**given, "weight_map": {**weight_map, name: file}}
                yield corpus.Variant(f"{name} in {file!r}", json.dumps(changed).encode())

    trial.read(variants(), index, read, same=same)
    trial.read(corpus.safetensors_variants(shard.read_bytes()), shard, read, same=same)
    check(trial, 300)


@pytest.fixture(scope="module")
def gguf(tmp_path_factory):
    """A model of one layer and its tokenizer, in one file."""
    tokenizer = corpus.byte_level()
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    sizes = {"vocab_size": 20, "hidden_size": 32, "intermediate_size": 32}
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    model = ggufs.make_model("Llama", **sizes, **heads)
    ggufs.write(path, model, metadata=ggufs.tokenizer_metadata(tokenizer, "gpt-2"))
    return path


def test_a_damaged_gguf_file(gguf):
    content = gguf.read_bytes()
    head = min(tensor.offset for tensor in read_header(str(gguf)).tensors.values())

    def read():
        module, params = convert.load(str(gguf))
        tokenizer = load_tokenizer(str(gguf))
        return module, params, tokenizer.encode_prompts(["abc cab"])

    def same(found, _):
        # There is no hash in such a file: a turned bit may make another model of it.
        _, params, ids = found
        return all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params)) and len(ids) == 1

    def numbers():
        for place in range(4, head - 8, 11):
            for number in (0, 2**31, 2**63, 2**64 - 1):
                changed = bytearray(content)
                changed[place : place + 8] = number.to_bytes(8, "little")
                yield corpus.Variant(f"{number} at byte {place}", bytes(changed))

    trial = Trial()
    trial.read(corpus.cut(content), gguf, read, same=same, named=str(gguf))
    trial.read(corpus.flips(content, 300, 0, head), gguf, read, same=same, named=str(gguf))
    trial.read(numbers(), gguf, read, same=same, named=str(gguf))
    check(trial, 800)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("num_layers", 10**6, "num_encoder_layers 1000000: expected 1 to 10000"),
        ("num_layers", 10**9, "num_encoder_layers 1000000000: expected 1 to 10000"),
        ("num_layers", 9000, "9000 layers .* has only 27 tensors"),
        ("relative_attention_max_distance", 10**9, "max_distance 1000000000: expected 1 to"),
        ("d_kv", 10**9, "head_width 1000000000: expected 1 to"),
        ("vocab_size", 10**9, "vocab_size 1000000000: expected 1 to"),
        ("vocab_size", 10**30, "vocab_size is 1000+, expected an integer >= 1 and of 32 bits"),
        ("decoder_start_token_id", 48, "decoder_start_token_id is 48, not below vocab_size 48"),
        ("d_ff", "\x1b[31m", r"d_ff is '\\x1b\[31m', expected an integer"),
    ],
)
def test_a_size_is_refused_before_anything_is_made_of_it(key, value, message, tmp_path, capfd):
    directory = tmp_path / "model"
    write(CONFIGS["t5"], directory, native=False)
    (directory / sealed.SUMS).unlink()
    settings = directory / "config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {key: value}))
    before = sorted(os.listdir(tmp_path))
    assert convert.main([f"--input={directory}", f"--output={tmp_path / 'out'}"]) == 2
    said = capfd.readouterr().err
    with pytest.raises(ValueError, match=message):
        raise ValueError(said)
    assert said.startswith("error: ") and said.count("\n") == 1 and said[:-1].isprintable()
    assert str(settings) in said and sorted(os.listdir(tmp_path)) == before


def test_names_of_tensors_reach_no_terminal_as_they_are(tmp_path, capfd):
    directory = tmp_path / "model"
    write(CONFIGS["t5"], directory, native=False)
    (directory / sealed.SUMS).unlink()
    weights = directory / "model.safetensors"
    header, data = corpus.safetensors_parts(weights.read_bytes())
    header["\x1b[31mred\x07\u202egpj"] = header.pop("shared.weight")
    weights.write_bytes(corpus.safetensors_file(header, data))
    assert convert.main([f"--input={directory}", "--inspect"]) == 2
    said = capfd.readouterr().err
    assert r"+ \x1b[31mred\x07\u202egpj" in said and said[:-1].isprintable()
