"""Conversion of checkpoints: what is read, what is written, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import hf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from test_text_hf import SENTENCES, train
from tokenizers import processors

from l2s_jax import convert, sealed
from l2s_jax.checkpoints import engine, files, reading, writing
from l2s_jax.checkpoints.pretrained import (
    content_hash,
    load,
    load_encoder,
    load_hf,
    load_native,
    save_hf,
    save_native,
)
from l2s_jax.models.t5 import T5, T5Config
from l2s_jax.tokenizers import load_tokenizer
from l2s_jax.tokenizers.sentencepiece import train_sentencepiece

KINDS = {
    "v1.0": {},
    "v1.1": {
        "feed_forward_proj": "gated-gelu",
        "own_head": True,
        "tie_word_embeddings": False,
        "num_decoder_layers": 1,
    },
    "tied head, not scaled": {"tie_word_embeddings": False, "feed_forward_proj": "gated-silu"},
    "mT5": {"family": "MT5", "own_head": True},
}
LM_HEAD, SHARED = "lm_head.weight", "shared.weight"
QUERY = "encoder.block.0.layer.0.SelfAttention.q.weight"


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """A directory of each kind; not to be written to."""
    root = tmp_path_factory.mktemp("checkpoints")
    for number, (kind, config) in enumerate(KINDS.items()):
        hf.make_t5(str(root / kind), seed=number, **config)
    return root


@pytest.fixture
def directory(checkpoints, tmp_path):
    """A v1.0 checkpoint to change."""
    shutil.copytree(checkpoints / "v1.0", tmp_path / "model")
    return tmp_path / "model"


def edit_config(directory, **fields):
    path = Path(directory, "config.json")
    config = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not KeyError}))


def edit_tensors(directory, drop=(), **tensors):
    path = Path(directory, "model.safetensors")
    kept = {key: value for key, value in load_file(path).items() if key not in drop}
    save_file({**kept, **{k: np.ascontiguousarray(v) for k, v in tensors.items()}}, path)


def shard(directory):
    """Splits model.safetensors: what the encoder needs, the rest."""
    whole = Path(directory, "model.safetensors")
    tensors, weight_map = load_file(whole), {}
    for name, wanted in (("one.safetensors", True), ("two.safetensors", False)):
        part = {k: v for k, v in tensors.items() if k.startswith(("shared", "encoder")) == wanted}
        save_file(part, Path(directory, name))
        weight_map.update(dict.fromkeys(part, name))
    Path(f"{whole}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    whole.unlink()


def assert_same(first, second):
    assert jax.tree.structure(first) == jax.tree.structure(second)
    jax.tree.map(np.testing.assert_array_equal, first, second)


def refused(directory, *fragments, read=load_hf, **options):
    with pytest.raises(ValueError) as error:
        read(str(directory), **options)
    message = str(error.value)
    assert "\n" not in message
    for fragment in (str(directory), *fragments):
        assert fragment in message


# Reading


@pytest.mark.parametrize("kind", KINDS)
def test_params_fill_the_module(checkpoints, kind):
    module, params = load_hf(str(checkpoints / kind))
    ids = jnp.zeros((1, 2), jnp.int32)
    expected = jax.eval_shape(module.init, jax.random.key(0), ids, ids > 0, ids)["params"]
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, expected)
    for leaf in jax.tree.leaves(params):
        assert type(leaf) is np.ndarray and leaf.dtype == np.float32


def test_config_is_read(tmp_path):
    hf.make_t5(
        str(tmp_path),
        feed_forward_proj="gated-silu",
        own_head=True,
        tie_word_embeddings=False,
        num_decoder_layers=1,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=50,
        layer_norm_epsilon=1e-5,
        dropout_rate=0.25,
        pad_token_id=5,
        eos_token_id=6,
        decoder_start_token_id=7,
    )
    module, _ = load_hf(str(tmp_path), dtype=jnp.bfloat16)
    assert module.config == T5Config(
        vocab_size=64,
        width=16,
        num_heads=3,
        head_width=6,
        feed_forward_width=24,
        num_encoder_layers=2,
        num_decoder_layers=1,
        activation="gated_silu",
        tied_head=False,
        num_buckets=8,
        max_distance=50,
        norm_epsilon=1e-5,
        dropout_rate=0.25,
        pad_id=5,
        eos_id=6,
        decoder_start_id=7,
        dtype=jnp.bfloat16,
    )


def test_old_config_gets_the_defaults(directory):
    expected, _ = load_hf(str(directory))
    absent = (
        "relative_attention_num_buckets",
        "relative_attention_max_distance",
        "feed_forward_proj",
        "is_gated_act",
        "dense_act_fn",
        "num_decoder_layers",
        "tie_word_embeddings",
        "scale_decoder_outputs",
        "decoder_start_token_id",
        "transformers_version",
    )
    edit_config(directory, **dict.fromkeys(absent, KeyError))
    assert load_hf(str(directory))[0].config == expected.config


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_files_are_upcast(tmp_path, dtype):
    model = hf.make_t5(str(tmp_path), dtype=dtype)
    _, params = load_hf(str(tmp_path))
    query = params["encoder"]["layers_1"]["attention"]["query"]["kernel"]
    expected = model.encoder.block[1].layer[0].SelfAttention.q.weight.detach().float().numpy().T
    np.testing.assert_array_equal(query, expected)
    assert query.dtype == np.float32


def test_shards_equal_the_single_file(checkpoints, tmp_path):
    hf.make_t5(str(tmp_path / "theirs"), seed=0, max_shard_size="10KB")
    assert (tmp_path / "theirs" / "model.safetensors.index.json").exists()
    shutil.copytree(checkpoints / "v1.0", tmp_path / "ours")
    shard(tmp_path / "ours")
    _, single = load_hf(str(checkpoints / "v1.0"))
    for name in ("theirs", "ours"):
        assert_same(load_hf(str(tmp_path / name))[1], single)


@pytest.mark.parametrize("kind", KINDS)
def test_encoder_only(checkpoints, tmp_path, kind):
    shutil.copytree(checkpoints / kind, tmp_path / "model")
    shard(tmp_path / "model")
    (tmp_path / "model" / "two.safetensors").unlink()
    _, whole = load_hf(str(checkpoints / kind))
    module, params = load_encoder(str(tmp_path / "model"))
    assert_same(params, {name: whole[name] for name in ("token_embedding", "encoder")})

    ids = jnp.arange(6).reshape(2, 3)
    embedded = module.apply({"params": params}, ids, method="embed")
    hidden = module.apply({"params": params}, embedded, ids >= 0, method="encode")
    assert hidden.shape == (2, 3, 16)


def test_encoder_model_directory(tmp_path):
    model = transformers.T5EncoderModel(transformers.T5Config(**hf.SMALL))
    model.save_pretrained(str(tmp_path))
    _, params = load_encoder(str(tmp_path))
    expected = model.encoder.final_layer_norm.weight.detach().numpy()
    np.testing.assert_array_equal(params["encoder"]["final_norm"]["scale"], expected)
    refused(tmp_path, "- decoder.block.0.layer.0.SelfAttention.k.weight", "more")


@pytest.mark.parametrize(
    "name", ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight", LM_HEAD]
)
def test_copies_of_the_embedding(directory, name):
    _, expected = load_hf(str(directory))
    embedding = load_file(directory / "model.safetensors")[SHARED]
    edit_tensors(directory, **{name: embedding})
    assert_same(load_hf(str(directory))[1], expected)
    edit_tensors(directory, drop=[SHARED])
    assert_same(load_hf(str(directory))[1], expected)
    edit_tensors(directory, **{SHARED: embedding, name: embedding + 1})
    refused(directory, f"{name} differs from {SHARED}")


def test_needless_tensor_of_the_first_release(directory):
    _, expected = load_hf(str(directory))
    name = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    edit_tensors(directory, **{name: np.ones((32, 3), np.float32)})
    assert_same(load_hf(str(directory))[1], expected)


def test_tied_mt5_of_transformers_4_is_ambiguous(tmp_path):
    hf.make_t5(str(tmp_path), family="MT5")
    edit_config(tmp_path, transformers_version="4.40.0")
    refused(tmp_path, "scale_decoder_outputs")
    edit_config(tmp_path, scale_decoder_outputs=True)
    assert load_hf(str(tmp_path))[0].config.scaled_head


# Refusals


def replace_file(name, content):
    return lambda directory: Path(directory, name).write_bytes(content)


def sharded(change):
    def apply(directory):
        shard(directory)
        change(directory)

    return apply


def index(**weight_map):
    def apply(directory):
        path = Path(directory, "model.safetensors.index.json")
        old = json.loads(path.read_text())["weight_map"]
        path.write_text(json.dumps({"weight_map": old | weight_map}))

    return sharded(apply)


def pickle_only(directory):
    os.rename(Path(directory, "model.safetensors"), Path(directory, "pytorch_model.bin"))


def truncate(name):
    return lambda directory: os.truncate(Path(directory, name), 3000)


def config(**fields):
    return lambda directory: edit_config(directory, **fields)


def tensors(**changes):
    return lambda directory: edit_tensors(directory, **changes)


def remove(name):
    return lambda directory: Path(directory, name).unlink()


@pytest.mark.parametrize(
    "change, fragments",
    [
        (shutil.rmtree, ["no such directory"]),
        (remove("config.json"), ["config.json", "no such file"]),
        (replace_file("config.json", b"{"), ["config.json", "not readable as JSON"]),
        (replace_file("config.json", b"\xff\xfe"), ["config.json", "not readable as JSON"]),
        (replace_file("config.json", b"[1]"), ["config.json", "found list"]),
        (config(model_type="umt5"), ["config.json", "'umt5'", "t5, mt5"]),
        (config(model_type=KeyError), ["config.json", "None"]),
        (config(model_type=["t5"]), ["config.json", "['t5']"]),
        (config(feed_forward_proj="gelu"), ["config.json", "feed_forward_proj", "'gelu'"]),
        (config(feed_forward_proj=[]), ["config.json", "feed_forward_proj", "[]"]),
        (config(dense_act_fn="tanh"), ["config.json", "dense_act_fn", "'tanh'", "'relu'"]),
        (config(is_gated_act=True), ["config.json", "is_gated_act", "True"]),
        (config(tie_encoder_decoder=True), ["config.json", "tie_encoder_decoder", "True"]),
        (config(quantization_config={}), ["config.json", "quantization_config"]),
        (config(scale_decoder_outputs=1), ["config.json", "scale_decoder_outputs", "1"]),
        (config(d_model="16"), ["config.json", "d_model", "'16'"]),
        (config(num_heads=0), ["config.json", "num_heads", "0"]),
        (config(num_layers=True), ["config.json", "num_layers", "True"]),
        (config(num_layers=1.0), ["config.json", "num_layers", "1.0"]),
        (config(dropout_rate=1.5), ["config.json", "dropout_rate", "1.5"]),
        (config(eos_token_id=[1, 2]), ["config.json", "eos_token_id", "[1, 2]"]),
        (config(eos_token_id=64), ["config.json", "eos_token_id", "64", "vocab_size"]),
        (config(pad_token_id=None), ["config.json", "pad_token_id", "None"]),
        (config(relative_attention_num_buckets=2), ["relative_attention_num_buckets", "2"]),
        (config(relative_attention_max_distance=16), ["relative_attention_max_distance", "16"]),
        (config(num_layers=3), ["- encoder.block.2.layer.0.SelfAttention.k.weight"]),
        (config(num_decoder_layers=1), ["+ decoder.block.1.layer.0.SelfAttention.k.weight"]),
        (config(feed_forward_proj="gated-gelu", is_gated_act=True, dense_act_fn="gelu_new"),
         ["- decoder.block.0.layer.2.DenseReluDense.wi_0.weight"]),
        (config(d_kv=5), ["model.safetensors", "has shape [18, 16], expected [15, 16]"]),
        (config(vocab_size=65), [SHARED, "has shape [64, 16], expected [65, 16]"]),
        (tensors(drop=[QUERY]), [f"- {QUERY}"]),
        (tensors(drop=[SHARED]), [f"- {SHARED}"]),
        (tensors(extra=np.zeros(1, np.float32)), ["+ extra"]),
        (tensors(**{QUERY: np.zeros((16, 18), np.float32)}), [QUERY, "[16, 18]", "[18, 16]"]),
        (tensors(**{QUERY: np.zeros((18, 16), np.int8)}), [QUERY, "I8", "F32"]),
        (remove("model.safetensors"), ["no model.safetensors"]),
        (pickle_only, ["pytorch_model.bin", "pickled"]),
        (truncate("model.safetensors"), ["model.safetensors", "not a whole safetensors file"]),
        (sharded(remove("two.safetensors")), ["two.safetensors", "no such file", "index.json"]),
        (sharded(truncate("one.safetensors")), ["one.safetensors", "not a whole"]),
        (sharded(replace_file("model.safetensors.index.json", b"{}")), ["weight_map"]),
        (index(**{SHARED: "../one.safetensors"}), ["index.json", "../one.safetensors"]),
        (index(**{SHARED: 3}), ["index.json", SHARED]),
        (index(**{SHARED: "two.safetensors"}), ["two.safetensors", f"- {SHARED}"]),
        (index(other="one.safetensors"), ["+ other"]),
        (sharded(lambda d: save_file({"a": np.ones(1), **load_file(d / "one.safetensors")},
                                     d / "one.safetensors")), ["one.safetensors", "+ a"]),
    ],
)  # fmt: skip
def test_refused_in_one_line(directory, change, fragments):
    change(directory)
    refused(directory, *fragments)


def test_float16_compute_is_refused(directory):
    with pytest.raises(ValueError, match="float16"):
        load_hf(str(directory), dtype=jnp.float16)


anything = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 40), st.floats(), st.text(), st.lists(st.none())
)
FIELDS = ["model_type", "d_model", "eos_token_id", "scale_decoder_outputs", "is_gated_act"]
FIELDS += ["feed_forward_proj", "dropout_rate", "num_decoder_layers", "tie_word_embeddings"]
quick = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@quick
@given(fields=st.dictionaries(st.sampled_from(FIELDS), anything, min_size=1))
def test_any_config_loads_or_is_refused(checkpoints, tmp_path, fields):
    directory = tmp_path / "model"
    shutil.copytree(checkpoints / "v1.0", directory, dirs_exist_ok=True)
    edit_config(directory, **fields)
    try:
        load_hf(str(directory))
    except ValueError as error:
        assert str(directory) in str(error) and "\n" not in str(error)


@quick
@given(data=st.data())
def test_any_damage_is_refused_or_harmless(checkpoints, tmp_path, data):
    whole = (checkpoints / "v1.0" / "model.safetensors").read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    at = data.draw(st.one_of(st.integers(0, header), st.integers(0, len(whole) - 1)))
    cut = data.draw(st.booleans())
    byte = bytes([data.draw(st.integers(0, 255))])
    directory = tmp_path / "model"
    shutil.copytree(checkpoints / "v1.0", directory, dirs_exist_ok=True)
    damaged = whole[:at] if cut else whole[:at] + byte + whole[at + 1 :]
    (directory / "model.safetensors").write_bytes(damaged)
    if cut:
        refused(directory, "not a whole safetensors file")
        return
    try:
        load_hf(str(directory))
    except ValueError as error:
        assert str(directory) in str(error) and "\n" not in str(error)


# Writing


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip(checkpoints, tmp_path, kind):
    source = str(checkpoints / kind)
    module, params = load_hf(source)
    save_native(module.config, params, str(tmp_path / "ours"))
    ours, ours_params = load(str(tmp_path / "ours"))
    assert ours.config == module.config
    assert_same(ours_params, params)
    encoder = load_encoder(str(tmp_path / "ours"))[1]
    assert_same(encoder, load_encoder(source)[1])

    save_hf(ours.config, ours_params, str(tmp_path / "theirs"))
    back, back_params = load(str(tmp_path / "theirs"))
    assert back.config == module.config
    assert_same(back_params, params)
    before = load_file(os.path.join(source, "model.safetensors"))
    after = load_file(tmp_path / "theirs" / "model.safetensors")
    assert_same(after, before)


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_reads_what_we_write(checkpoints, tmp_path, kind):
    module, params = load_hf(str(checkpoints / kind))
    save_hf(module.config, params, str(tmp_path))
    ids = torch.arange(12).reshape(2, 6)
    logits = []
    for directory in (checkpoints / kind, tmp_path):
        model = transformers.AutoModelForSeq2SeqLM.from_pretrained(str(directory)).eval()
        with torch.no_grad():
            logits.append(model(input_ids=ids, decoder_input_ids=ids + 1).logits)
    assert torch.equal(*logits)


def test_jax_and_bfloat16_params_are_written_as_float32(directory, tmp_path):
    module, params = load_hf(str(directory))
    low = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), params)
    save_hf(module.config, low, str(tmp_path / "out"))
    expected = jax.tree.map(lambda x: np.asarray(x, np.float32), low)
    assert_same(load_hf(str(tmp_path / "out"))[1], expected)


def test_save_refuses_another_tree(directory, tmp_path):
    module, params = load_hf(str(directory))
    small = T5Config(**{**vars(module.config), "num_decoder_layers": 1})
    for config, tree, message in (
        (module.config, {"encoder": params["encoder"]}, "- decoder/final_norm/scale"),
        (small, params, r"\+ decoder/layers_1/attention/key/kernel"),
        (T5Config(**{**vars(module.config), "vocab_size": 7}), params, r"\[64, 16\].*\[7, 16\]"),
        (object(), params, "no conversion for a object"),
    ):
        for save in (save_hf, save_native):
            with pytest.raises(ValueError, match=message):
                save(config, tree, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("save", [save_hf, save_native])
def test_a_write_that_fails_leaves_the_old_checkpoint(directory, tmp_path, monkeypatch, save):
    module, params = load_hf(str(directory))
    save(module.config, params, str(tmp_path / "old"))
    before = content_hash(str(tmp_path / "old"))
    everything = sorted(tmp_path.rglob("*"))

    def fail(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(writing, "save_file", fail)
    for name in ("old", "new"):
        with pytest.raises(OSError, match="disk full"):
            save(module.config, params, str(tmp_path / name))
    assert sorted(tmp_path.rglob("*")) == everything
    assert content_hash(str(tmp_path / "old")) == before


@pytest.mark.parametrize("save", [save_hf, save_native])
def test_overwriting_keeps_other_files(directory, tmp_path, save):
    module, params = load_hf(str(directory))
    out = tmp_path / "out"
    save(module.config, jax.tree.map(np.zeros_like, params), str(out))
    (out / "spiece.model").write_bytes(b"pieces")
    save(module.config, params, str(out))
    assert_same(load(str(out))[1], params)
    assert (out / "spiece.model").read_bytes() == b"pieces"
    assert len(list(out.iterdir())) == 4


def native(change):
    def apply(directory):
        path = Path(directory, "config.json")
        path.write_text(json.dumps(change(json.loads(path.read_text()))))

    return apply


@pytest.mark.parametrize(
    "change, fragments",
    [
        (native(lambda c: c | {"format": "other"}), ["config.json", "'other'"]),
        (native(lambda c: c | {"family": "bert"}), ["config.json", "'bert'", "t5"]),
        (native(lambda c: c | {"widht": 3}), ["config.json", "+ widht"]),
        (native(lambda c: {k: v for k, v in c.items() if k != "width"}), ["- width"]),
        (native(lambda c: c | {"width": 16.0}), ["config.json", "width", "16.0", "int"]),
        (native(lambda c: c | {"activation": "tanh"}), ["config.json", "'tanh'"]),
        (native(lambda c: c | {"width": 17}), ["has shape", "17"]),
        (remove("params.safetensors"), ["no params.safetensors"]),
        (truncate("params.safetensors"), ["params.safetensors", "not a whole"]),
    ],
)
def test_native_refused_in_one_line(checkpoints, tmp_path, change, fragments):
    module, params = load_hf(str(checkpoints / "v1.0"))
    save_native(module.config, params, str(tmp_path / "ours"))
    (tmp_path / "ours/SHA256SUMS").unlink()
    change(tmp_path / "ours")
    refused(tmp_path / "ours", *fragments, read=load)


def test_load_native_refuses_the_other_format(directory):
    refused(directory, "config.json", "format", read=load_native)


# The hash


def test_content_hash(checkpoints, tmp_path, directory):
    first = content_hash(str(directory))
    assert first == content_hash(str(checkpoints / "v1.0"))
    (directory / "generation_config.json").write_text("{}")
    assert content_hash(str(directory)) == first

    shard(directory)
    parts = content_hash(str(directory))
    seen = {first, parts}
    for name in ("config.json", "one.safetensors", "two.safetensors"):
        path = directory / name
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]) if name != "config.json" else b"{}")
        seen.add(content_hash(str(directory)))
        path.write_bytes(whole)
    assert len(seen) == 5
    assert content_hash(str(directory)) == parts
    (directory / "two.safetensors").unlink()
    refused(directory, "two.safetensors", read=content_hash)


def test_the_hash_of_a_large_model_is_remembered(directory, tmp_path, monkeypatch):
    monkeypatch.setenv("L2S_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sealed, "_LARGE", 1)
    read = []
    whole = files._hash_of
    monkeypatch.setattr(files, "_hash_of", lambda *a, **k: read.append(a) or whole(*a, **k))

    def found():
        sealed._known.clear()  # as in another process
        return content_hash(str(directory))

    first = found()
    assert found() == first and len(read) == 1
    with sealed.anew():
        assert found() == first and len(read) == 2
    assert found() == first and len(read) == 2
    read.clear()
    read.append("once")
    weights = directory / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert found() != first and len(read) == 2
    (tmp_path / "cache").chmod(0o500)
    for path in (tmp_path / "cache").iterdir():
        path.write_text("no hash")
    assert found() != first and len(read) == 3


@pytest.mark.parametrize(
    "command", ["sha256sum -b *", "sha256sum ./*", "find . $PWD -type f | xargs sha256sum"]
)
def test_hashes_that_somebody_has_made_are_those_of_the_model(directory, command):
    (directory / "onnx").mkdir()
    for name in ("onnx/model.onnx", "README.md", "two words"):
        (directory / name).write_text(name)
    command = f"{command} 2> /dev/null > SHA256SUMS"
    subprocess.run(["sh", "-c", command], cwd=directory, check=False)
    sums = directory / "SHA256SUMS"
    assert "model.safetensors" in sums.read_text()
    expected = load_hf(str(directory))[1]
    sealed.check_below(str(directory))
    (directory / "onnx/model.onnx").write_text("another")
    (directory / "README.md").write_text("another")
    assert_same(load_hf(str(directory))[1], expected)
    with pytest.raises(ValueError, match=r"README\.md: damaged"):
        sealed.check_below(str(directory))
    sums.write_text(f"# of the model\n\n{sums.read_text().upper().replace('SHA256SUMS', 'S')}")
    sums.write_text(sums.read_text().replace("MODEL.SAFETENSORS", "model.safetensors"))
    assert_same(load_hf(str(directory))[1], expected)
    weights = directory / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    refused(directory, "model.safetensors: damaged")
    weights.write_bytes(data)
    sums.write_text("the sums are elsewhere\n")
    refused(directory, f"{sums}:1", "'the sums are elsewhere'", f"remove {sums}")


def test_one_process_of_a_job_reads_the_files_for_their_hashes(directory, tmp_path, monkeypatch):
    module, params = load_hf(str(directory))
    save_native(module.config, params, str(tmp_path / "ours"))
    weights = tmp_path / "ours/params.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    for process in (1, 0):
        monkeypatch.setattr(jax, "process_index", lambda: process)  # noqa: B023
        sealed._known.clear()
        if process:
            load(str(tmp_path / "ours"))
            assert not sealed._known
        else:
            with pytest.raises(ValueError, match=r"params\.safetensors: damaged"):
                load(str(tmp_path / "ours"))


# The engine, on a made-up family


FUSED = engine.Transform(
    to_ours=lambda x: tuple(np.split(x, 2)), to_hf=lambda a, b: np.concatenate([a, b])
)
RULES = (
    engine.Rule("h.{i}.ab", ("layers_{i}/a", "layers_{i}/b"), FUSED),
    engine.Rule("out.weight", ("out",), engine.TRANSPOSED),
)
SHAPES = {"layers_0/a": (2, 3), "layers_0/b": (2, 3), "layers_10/a": (2, 3), "layers_10/b": (2, 3)}
SHAPES |= {"out": (3, 5)}


def test_one_tensor_may_hold_several_parameters(tmp_path):
    random = np.random.default_rng(0)
    flat = {path: random.normal(size=shape).astype(np.float32) for path, shape in SHAPES.items()}
    params = {
        f"layers_{i}": {name: flat[f"layers_{i}/{name}"] for name in "ab"} for i in (0, 10)
    } | {"out": flat["out"]}
    entries = engine.make_entries(RULES, list(SHAPES))
    written = engine.write_tensors(params, entries, SHAPES)
    assert {key: value.shape for key, value in written.items()} == {
        "h.0.ab": (4, 3),
        "h.10.ab": (4, 3),
        "out.weight": (5, 3),
    }
    np.testing.assert_array_equal(written["h.10.ab"].make()[2:], flat["layers_10/b"])
    writing.write_directory(str(tmp_path / "out"), {}, written, "model")
    with files.TensorFiles(str(tmp_path / "out"), "model") as tensors:
        assert_same(reading.read_params(tensors, entries, SHAPES), params)


@pytest.mark.parametrize(
    "rules, paths, message",
    [
        (RULES, [*SHAPES, "bias"], r"bias: expected one rule, found 0"),
        ((*RULES, engine.Rule("other", ("out",))), SHAPES, r"out: .* found 2 \(out.weight, other"),
        ((*RULES, engine.Rule("out.weight", ("bias",))), [*SHAPES, "bias"], "to bias and again"),
        (RULES, ["layers_0/a", "out"], "the model lacks - layers_0/b"),
        (
            (*RULES, engine.Rule("bias", ("bias",), aliases=("out.weight",))),
            [*SHAPES, "bias"],
            "more than one rule: out.weight",
        ),
    ],
)
def test_rules_that_do_not_cover_exactly(rules, paths, message):
    with pytest.raises(ValueError, match=message):
        engine.make_entries(rules, list(paths))


# The command


def run(capsys, *arguments):
    try:
        status = convert.main([str(argument) for argument in arguments])
    except SystemExit as exit_:
        status = exit_.code
    return status, *capsys.readouterr()


def test_command_both_ways_with_verify(checkpoints, tmp_path, capsys):
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    source = tmp_path / "source"
    shutil.copytree(checkpoints / "v1.1", source)
    pieces = train_sentencepiece(
        ["a few words", "and letters"], vocab_size=24, model_type="bpe", directory=source
    )
    status, out, err = run(capsys, f"--input={source}", f"--output={ours}", "--verify")
    assert (status, err) == (0, "")
    assert "agrees with transformers" in out and "top-1 agreement 100.0%" in out
    status, out, err = run(capsys, f"--input={ours}", f"--output={theirs}", "--to=hf", "--verify")
    assert (status, err) == (0, "")
    before, after = (load_file(d / "model.safetensors") for d in (source, theirs))
    assert_same(after, before)
    texts = ["few letters and", "words"]
    for folder in (ours, theirs):
        assert load_tokenizer(str(folder)).encode_prompts(texts) == pieces.encode_prompts(texts)


@pytest.mark.parametrize("eos", ["tokenizer_config.json", "config.json"])
@pytest.mark.parametrize("wrapped", ["<s> $A", "<s> $A </s>"])
def test_a_tokenizer_is_the_same_in_both_formats(eos, wrapped, tmp_path, capsys):
    source = tmp_path / "source"
    made, special = train("llama")
    ids = {name: made.token_to_id(token) for name, token in special.items()}
    hf.make_causal(
        str(source),
        model_type="llama",
        vocab_size=made.get_vocab_size(),
        bos_token_id=ids["bos_token"],
        eos_token_id=[ids["eos_token"], 9],
        pad_token_id=-1,
    )
    (source / "generation_config.json").unlink(missing_ok=True)
    made.post_processor = processors.TemplateProcessing(
        single=wrapped,
        special_tokens=[(token, made.token_to_id(token)) for token in ("<s>", "</s>")],
    )
    made.save(str(source / "tokenizer.json"))
    named = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>"}
    if eos == "tokenizer_config.json":
        named["eos_token"] = "</s>"
    (source / "tokenizer_config.json").write_text(json.dumps(named))
    before = load_tokenizer(str(source))
    assert before.encode_prompts(["brown"])[0][-1] != before.eos_id
    assert run(capsys, f"--input={source}", f"--output={tmp_path / 'ours'}")[::2] == (0, "")
    back = [f"--input={tmp_path / 'ours'}", f"--output={tmp_path / 'theirs'}", "--to=hf"]
    assert run(capsys, *back)[::2] == (0, "")
    for folder in ("ours", "theirs"):
        after = load_tokenizer(str(tmp_path / folder))
        assert after.encode_prompts(SENTENCES) == before.encode_prompts(SENTENCES)
        assert after.encode_responses(SENTENCES) == before.encode_responses(SENTENCES)
        assert (after.pad_id, after.end_ids) == (before.pad_id, before.end_ids)


SETTINGS = {"tokenizer_class": "ByT5Tokenizer", "eos_token": "</s>", "pad_token": "<pad>"}


@pytest.mark.parametrize("to", ["l2s_jax", "hf"])
def test_a_model_with_a_tokenizer_of_bytes_is_converted_alone(directory, tmp_path, capsys, to):
    for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        (directory / name).write_text(json.dumps(SETTINGS))
    out = tmp_path / "out"
    status, _, err = run(capsys, f"--input={directory}", f"--output={out}", f"--to={to}")
    assert status == 0
    assert_same(load(str(out))[1], load(str(directory))[1])
    if to == "hf":  # what transformers reads, it reads of the copy
        assert err == "" and json.loads((out / "tokenizer_config.json").read_text()) == SETTINGS
    else:
        words = f"warning: {directory}: no tokenizer beside tokenizer_config.json, "
        assert err.startswith(words) and err.count("\n") == 1
        assert not (out / "tokenizer_config.json").exists()


def test_what_is_wrong_with_a_tokenizer_is_said_before_weights_are_read(
    directory, tmp_path, capsys, monkeypatch
):
    def read(*_, **__):
        raise AssertionError("weights are read")

    monkeypatch.setattr(convert, "load", read)
    (directory / "tokenizer.json").write_text("{}")
    flags = [f"--input={directory}", f"--output={tmp_path / 'out'}"]
    status, out, err = run(capsys, *flags)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert f"{directory / 'tokenizer.json'}" in err
    edit_config(directory, model_type="other")
    status, _, err = run(capsys, *flags)
    assert (status, err.count("\n")) == (2, 1) and "'other'" in err


def test_verify_finds_a_wrong_conversion(checkpoints, tmp_path, capsys, monkeypatch):
    def wrong(config, params, directory):
        params["decoder"]["final_norm"]["scale"] *= 1.001
        save_native(config, params, directory)

    monkeypatch.setattr(convert, "save_native", wrong)
    flags = [f"--input={checkpoints / 'v1.1'}", f"--output={tmp_path / 'out'}", "--verify"]
    status, _, err = run(capsys, *flags)
    assert status == 2
    assert "differs from transformers" in err and "1.0e-03" in err and err.count("\n") == 1


def test_verify_needs_transformers(checkpoints, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(convert.importlib.util, "find_spec", lambda name: None)
    out = tmp_path / "out"
    status, _, err = run(capsys, f"--input={checkpoints / 'v1.0'}", f"--output={out}", "--verify")
    assert (status, err.count("\n")) == (2, 1)
    assert "torch" in err and not out.exists()


@pytest.mark.parametrize(
    "flags, fragment",
    [
        ([], "--input"),
        (["--input={hf}"], "--output"),
        (["--input={hf}", "--output={new}", "--to=onnx"], "onnx"),
        (["--input={hf}", "--output={new}", "--verfiy"], "--verfiy"),
        (["--input={new}", "--output={new}"], "no such directory"),
        (["--input={hf}", "--output={hf}"], "exists already"),
        (["--input={hf}", "--output={hf}/config.json"], "exists already"),
        (["--input={ours}", "--output={new}", "--verify"], "neither the input nor"),
    ],
)
def test_command_errors(directory, tmp_path, capsys, flags, fragment):
    module, params = load_hf(str(directory))
    save_native(module.config, params, str(tmp_path / "ours"))
    names = {"hf": directory, "ours": tmp_path / "ours", "new": tmp_path / "new"}
    before = content_hash(str(directory))
    status, out, err = run(capsys, *(flag.format(**names) for flag in flags))
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert fragment in err
    assert content_hash(str(directory)) == before
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("number", "word", "status"),
    [(signal.SIGINT, "interrupted", 130), (signal.SIGTERM, "terminated", 143)],
)
def test_a_signal_ends_it_in_one_line_and_leaves_nothing(directory, tmp_path, number, word, status):
    code = """
import sys, time
from l2s_jax import convert
def save(config, params, directory):
    open(f"{directory}/params.safetensors", "w").close()
    print("writing", flush=True)
    time.sleep(600)
convert.save_native = save
sys.exit(convert.main())
"""
    out = tmp_path / "new/out"
    command = [sys.executable, "-c", code, f"--input={directory}", f"--output={out}"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=Path(convert.__file__).parents[1], **pipes)
    try:
        assert process.stdout.readline() == "writing\n"
        assert len(os.listdir(out.parent)) == 1
        process.send_signal(number)
        said, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, said, err) == (status, "", f"error: {word}\n")
    assert os.listdir(out.parent) == []


def test_runs_without_torch(directory, tmp_path):
    code = "import sys; sys.modules.update(torch=None, transformers=None, tensorflow=None)\n"
    code += "from l2s_jax.convert import main; sys.exit(main())"
    flags = [f"--input={directory}", f"--output={tmp_path / 'out'}"]
    root = Path(convert.__file__).parents[1]
    subprocess.run([sys.executable, "-c", code, *flags], check=True, cwd=root)
    assert isinstance(load(str(tmp_path / "out"))[0], T5)
