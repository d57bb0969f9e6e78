"""GGUF files: the numbers, configs and tokenizers that transformers reads in them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import gguf
import ggufs
import jax
import numpy as np
import pytest
import sentencepiece
import tokenizers
import transformers
from tokenizers import decoders, models, pre_tokenizers, trainers

from l2s_jax import convert
from l2s_jax.checkpoints import gguf as reader
from l2s_jax.checkpoints.pretrained import content_hash, load, load_encoder, load_hf, read_config
from l2s_jax.cluster import sharding
from l2s_jax.config import default
from l2s_jax.experiment.early import check_models
from l2s_jax.tokenizers import load_tokenizer

ROOT = Path(__file__).parents[1]
TEXTS = [(ROOT / "docs" / name).read_text() for name in ("concepts.md", "method.py")]
TEXTS += [
    "a  1234 b\n\n<|end|>user\n\tx é🙂 漢字 3.14 ",
    "",
    "I'll\r\n\r\n  DON'T",
    "<think>x</think>",
]
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
}


@pytest.fixture(scope="module")
def llama():
    return ggufs.make_model("Llama")


def assert_same(found, expected):
    assert found[0].config == expected[0].config
    jax.tree.map(np.testing.assert_array_equal, found[1], expected[1])


@pytest.mark.parametrize("kind", reader.TYPES)
def test_every_type_is_read_as_transformers_reads_it(llama, kind, tmp_path):
    path = ggufs.write(tmp_path / "model.gguf", llama, kind=kind)
    ggufs.read_by_transformers(path).save_pretrained(tmp_path / "folder")
    found, expected = load_hf(path), load_hf(str(tmp_path / "folder"))
    jax.tree.map(np.testing.assert_array_equal, found[1], expected[1])
    numbers = found[1]["layers_0"]["attention"]["query"]["kernel"]
    assert 1e-3 < np.abs(numbers).mean() < 3


def llama3_factors(config):
    """As llama.cpp's converter computes rope_freqs.weight."""
    scaling, width = config.rope_parameters, config.head_dim
    found = []
    for i in range(0, width, 2):
        length = 2 * np.pi * scaling["rope_theta"] ** (i / width)
        low = scaling["original_max_position_embeddings"] / scaling["low_freq_factor"]
        high = scaling["original_max_position_embeddings"] / scaling["high_freq_factor"]
        if length < high:
            found.append(1.0)
        elif length > low:
            found.append(scaling["factor"])
        else:
            smooth = scaling["original_max_position_embeddings"] / length - 1.0
            smooth /= scaling["high_freq_factor"] - scaling["low_freq_factor"]
            found.append(1 / ((1 - smooth) / scaling["factor"] + smooth))
    return np.array(found, np.float32)


@pytest.mark.parametrize(
    ("kind", "changes", "metadata"),
    [
        ("Llama", {}, {}),
        ("Llama", {"tie_word_embeddings": True, "num_key_value_heads": 8}, {}),
        ("Llama", {"attention_bias": True, "mlp_bias": True}, {}),
        ("Llama", {"rope_parameters": LLAMA3}, {}),
        (
            "Llama",
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}},
            {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0},
        ),
        ("Qwen2", {}, {}),
        (
            "Qwen2",
            {"rope_parameters": YARN},
            {
                "qwen2.rope.scaling.type": "yarn",
                "qwen2.rope.scaling.factor": 4.0,
                "qwen2.rope.scaling.original_context_length": 128,
            },
        ),
        ("Qwen3", {"head_dim": 48}, {}),
        ("Qwen3", {"tie_word_embeddings": True, "attention_bias": True}, {}),
    ],
)
def test_a_file_is_the_model_it_was_made_of(kind, changes, metadata, tmp_path):
    model = ggufs.make_model(kind, **changes)
    tensors = {}
    if changes.get("rope_parameters") is LLAMA3:
        tensors["rope_freqs.weight"] = llama3_factors(model.config)
    path = ggufs.write(tmp_path / "model.gguf", model, metadata=metadata, tensors=tensors)
    model.save_pretrained(tmp_path / "folder")
    assert_same(load_hf(path), load_hf(str(tmp_path / "folder")))
    assert read_config(path) == load_hf(path)[0].config


def test_a_mesh_and_an_encoder_get_what_they_need(llama, tmp_path):
    path = ggufs.write(tmp_path / "model.gguf", llama, kind="Q8_0")
    module, params = load(path)
    mesh = sharding.make_mesh({"tensor": 4}, jax.devices()[:4])
    _, placed = load(path, mesh=mesh)
    jax.tree.map(np.testing.assert_array_equal, placed, params)
    query = placed["layers_0"]["attention"]["query"]["kernel"]
    assert query.addressable_shards[0].data.size * 4 == query.size
    encoder, held = load_encoder(path, layer=1)
    assert set(held) == {"token_embedding", "layers_0"}
    assert encoder.config == module.config
    with pytest.raises(ValueError, match=r"^\S+model\.gguf: layer 3"):
        load_encoder(path, layer=3)


def test_a_cut_of_layers_that_a_file_does_not_have_is_found_at_once(llama, tmp_path):
    config = default()
    config.llm.path = ggufs.write(tmp_path / "model.gguf", llama)
    config.slm.cut.num_layers = 99
    with pytest.raises(ValueError, match=r"^config\.slm\.cut\.num_layers=99: expected at most"):
        check_models(config)


def test_a_hash_is_of_the_bytes(llama, tmp_path):
    path = ggufs.write(tmp_path / "model.gguf", llama)
    (tmp_path / "other.gguf").write_bytes(Path(path).read_bytes())
    assert content_hash(path) == content_hash(str(tmp_path / "other.gguf"))
    changed = ggufs.write(tmp_path / "changed.gguf", llama, kind="F16")
    assert content_hash(path) != content_hash(changed)


def byte_level(pre_tokenizer, vocab_size=400):
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizer
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|begin|>", "<|end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    made.train_from_iterator(TEXTS, trainer)
    made.add_tokens([tokenizers.AddedToken("<think>", normalized=False)])
    return made


BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)
DIGITS = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BYTES])


@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe", "qwen2", "smollm"])
def test_byte_level_tokenizers(llama, pre, tmp_path):
    made = byte_level(DIGITS if pre == "smollm" else BYTES)
    metadata = ggufs.tokenizer_metadata(made, pre, ("<think>",)) | {
        "tokenizer.ggml.eos_token_id": made.token_to_id("<|end|>"),
        "tokenizer.ggml.bos_token_id": made.token_to_id("<|begin|>"),
        "tokenizer.chat_template": "{{ messages }}",
    }
    path = ggufs.write(tmp_path / "model.gguf", llama, metadata=metadata)
    tokenizer = load_tokenizer(path)
    # transformers knows no splitting of digits for "smollm"; the tokenizer it is made of does.
    if pre == "smollm":
        expected = [made.encode(text).ids for text in TEXTS]
    else:
        theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path), gguf_file="model.gguf")
        expected = [theirs.encode(text, add_special_tokens=False) for text in TEXTS]
    bos = [made.token_to_id("<|begin|>")] if pre == "llama-bpe" else []
    assert tokenizer.encode_prompts(TEXTS) == [[*bos, *ids] for ids in expected]
    assert tokenizer.encode_responses(TEXTS) == [[*ids, tokenizer.eos_id] for ids in expected]
    plain = [text.replace("<|end|>", "") for text in TEXTS]
    assert [tokenizer.decode(ids) for ids in tokenizer.encode_prompts(plain)] == plain
    assert made.token_to_id("<think>") in tokenizer.encode_prompts(["a<think>"])[0]
    tokenizer.save(str(tmp_path / "saved"))
    again = load_tokenizer(str(tmp_path / "saved"))
    assert again.encode_prompts(TEXTS) == tokenizer.encode_prompts(TEXTS)


def test_a_folder_of_the_same_vocabulary_has_the_same_fingerprint(llama, tmp_path):
    content = json.loads(byte_level(DIGITS).to_str())
    # Converters list all tokens in one.
    content["model"]["vocab"] |= {t["content"]: t["id"] for t in content["added_tokens"]}
    made = tokenizers.Tokenizer.from_str(json.dumps(content))
    named = {"eos_token": "<|end|>", "bos_token": "<|begin|>", "unk_token": "<|end|>"}
    made.save(str(tmp_path / "tokenizer.json"))
    # As SmolLM2's has it; this class would not split digits.
    settings = {"tokenizer_class": "GPT2Tokenizer", **named}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    metadata = ggufs.tokenizer_metadata(made, "smollm", ("<think>",)) | {
        "tokenizer.ggml.eos_token_id": made.token_to_id("<|end|>"),
        "tokenizer.ggml.bos_token_id": made.token_to_id("<|begin|>"),
    }
    path = ggufs.write(tmp_path / "model.gguf", llama, metadata=metadata)
    folder, file = load_tokenizer(str(tmp_path)), load_tokenizer(path)
    assert folder.encode_prompts(TEXTS) == file.encode_prompts(TEXTS)
    assert folder.fingerprint == file.fingerprint


def test_a_sentencepiece_vocabulary(llama, tmp_path):
    (tmp_path / "text.txt").write_text("\n".join(TEXTS))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"),
        model_prefix=str(tmp_path / "spm"),
        model_type="bpe",
        vocab_size=600,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spm.model"))
    pieces = range(model.get_piece_size())
    kinds = [
        2 if model.is_unknown(i) else 3 if model.is_control(i) else 6 if model.is_byte(i) else 1
        for i in pieces
    ]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [model.id_to_piece(i) for i in pieces],
        "tokenizer.ggml.scores": [model.get_score(i) for i in pieces],
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    path = ggufs.write(tmp_path / "model.gguf", llama, metadata=metadata)
    tokenizer = load_tokenizer(path)
    texts = [text for text in TEXTS if text]
    expected = model.encode(texts)
    assert tokenizer.encode_prompts(texts) == [[1, *ids] for ids in expected]
    assert [tokenizer.decode(ids) for ids in tokenizer.encode_prompts(texts)] == texts


def test_converted_it_is_a_folder(llama, tmp_path, capsys):
    metadata = ggufs.tokenizer_metadata(byte_level(BYTES, 300), "gpt-2")
    metadata["tokenizer.chat_template"] = "{{ messages[0].content }}"
    # Its embedding has as many rows as there are tokens.
    model = ggufs.make_model("Llama", vocab_size=len(metadata["tokenizer.ggml.tokens"]))
    path = ggufs.write(tmp_path / "model.gguf", model, metadata=metadata)
    output = str(tmp_path / "folder")
    assert convert.main([f"--input={path}", f"--output={output}", "--to=hf", "--verify"]) == 0
    assert "agrees with transformers" in capsys.readouterr().out
    assert_same(load_hf(output), load_hf(path))
    theirs = transformers.AutoTokenizer.from_pretrained(output)
    assert theirs(TEXTS)["input_ids"] == load_tokenizer(path).encode_prompts(TEXTS)
    assert theirs.chat_template == "{{ messages[0].content }}"
    assert convert.main([f"--input={path}", "--inspect"]) == 0
    assert "blk" not in capsys.readouterr().out


def cut(path, share):
    data = Path(path).read_bytes()
    Path(path).write_bytes(data[: int(len(data) * share)])


def test_bad_files_are_named(llama, tmp_path, capsys):
    def refused(expected, path):
        assert convert.main([f"--input={path}", f"--output={tmp_path / 'out'}"]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and str(path) in error and expected in error, error
        assert not (tmp_path / "out").exists()

    refused("no such file", tmp_path / "none.gguf")
    refused(
        "general.architecture is 'gemma3'",
        ggufs.write(tmp_path / "a.gguf", llama, architecture="gemma3"),
    )
    path = ggufs.write(tmp_path / "b.gguf", llama)
    cut(path, 0.9)
    refused("cut short", path)
    cut(path, 0.0001)
    refused("cut short", path)
    Path(path).write_bytes(b"")
    refused("cut short", path)
    Path(path).write_bytes(b"PK\3\4 of another format, and long enough for a head of this one")
    refused("not a GGUF file", path)
    path = ggufs.write(tmp_path / "c.gguf", llama)
    broken = Path(path).read_bytes()
    # The number of the type of token_embd.weight, after its name, its axes and their sizes.
    at = broken.index(b"token_embd.weight") + len("token_embd.weight") + 4 + 16
    kind = int(ggufs.Type.IQ2_XXS).to_bytes(4, "little")
    Path(path).write_bytes(broken[:at] + kind + broken[at + 4 :])
    refused("token_embd.weight of type IQ2_XXS", path)
    refused(
        "a mixture of experts",
        ggufs.write(tmp_path / "d.gguf", llama, metadata={"llama.expert_count": 8}),
    )
    refused("one of 3 parts", ggufs.write(tmp_path / "e.gguf", llama, metadata={"split.count": 3}))
    refused(
        "longrope",
        ggufs.write(tmp_path / "f.gguf", llama, metadata={"llama.rope.scaling.type": "longrope"}),
    )
    yarn = {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}
    yarn["llama.rope.scaling.yarn_attn_factor"] = 1.5
    refused(
        "llama.rope.scaling.yarn_attn_factor is 1.5",
        ggufs.write(tmp_path / "y.gguf", llama, metadata=yarn),
    )
    refused(
        "rope_freqs.weight",
        ggufs.write(
            tmp_path / "g.gguf",
            llama,
            tensors={"rope_freqs.weight": np.linspace(1, 8, 16, dtype="f")},
        ),
    )
    words = ggufs.tokenizer_metadata(byte_level(BYTES, 300), "gpt-2")
    refused(
        "- model.norm.weight",
        ggufs.write(tmp_path / "h.gguf", llama, metadata=words, drop=("output_norm.weight",)),
    )
    refused(
        "+ blk.0.ssm_a",
        ggufs.write(
            tmp_path / "i.gguf", llama, metadata=words, tensors={"blk.0.ssm_a": np.ones(3, "f")}
        ),
    )


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({}, "holds no tokenizer"),
        ({"tokenizer.ggml.model": "t5"}, "tokenizer.ggml.model is 't5'"),
        ({"tokenizer.ggml.pre": "poro-chat"}, "tokenizer.ggml.pre is 'poro-chat'"),
        ({"tokenizer.ggml.eos_token_id": 4096}, "not below the 300 tokens"),
        ({"tokenizer.ggml.merges": ["qz zq"]}, "not a tokenizer"),
    ],
)
def test_bad_tokenizers_are_named(llama, metadata, expected, tmp_path):
    whole = ggufs.tokenizer_metadata(byte_level(BYTES, 299), "gpt-2") if metadata else {}
    path = ggufs.write(tmp_path / "model.gguf", llama, metadata=whole | metadata)
    with pytest.raises(ValueError, match=expected) as caught:
        load_tokenizer(path)
    assert str(caught.value).startswith(path) and "\n" not in str(caught.value)


def test_without_the_package_it_says_what_to_install(llama, tmp_path):
    path = ggufs.write(tmp_path / "model.gguf", llama)
    program = (
        "import sys; sys.modules['gguf'] = None\n"
        "from l2s_jax import convert; sys.exit(convert.main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", program, f"--input={path}", "--inspect"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "pip install 'l2s-jax[gguf]'" in done.stderr


def test_every_type_is_as_the_package_says():
    for name, (number, block, size) in reader.TYPES.items():
        kind = gguf.GGMLQuantizationType[name]
        assert (kind.value, gguf.GGML_QUANT_SIZES[kind]) == (number, (block, size))
