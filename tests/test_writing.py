"""Models in several files: what is written is what one file would hold, a file at a time."""

from __future__ import annotations

import json
import tracemalloc

import hf
import numpy as np
import pytest
import small
import torch
import transformers
from safetensors.numpy import load_file, save
from test_bundle import llm, tokenizers  # noqa: F401
from test_bundle import save as save_bundle

import l2s_jax
from l2s_jax import sealed
from l2s_jax.checkpoints import pretrained, writing
from l2s_jax.checkpoints.files import content_hash, hashed_files
from l2s_jax.serving import bundle

SMALL = "10KB"


def weights_of(folder):
    return sorted(path.name for path in folder.iterdir() if ".safetensors" in path.name)


def tensors_of(folder, stem):
    """What the files hold that the index names, which are those that are there."""
    index = json.loads((folder / f"{stem}.safetensors.index.json").read_text())
    found = {name: load_file(folder / name) for name in set(index["weight_map"].values())}
    assert weights_of(folder) == sorted([*found, f"{stem}.safetensors.index.json"])
    assert {key: name for name in found for key in found[name]} == index["weight_map"]
    tensors = {key: value for each in found.values() for key, value in each.items()}
    assert index["metadata"] == {"total_size": sum(value.nbytes for value in tensors.values())}
    return tensors


@pytest.mark.parametrize("kind", ["t5", "gpt_neox", "llama"])
def test_transformers_reads_several_files_as_one(kind, tmp_path):
    if kind == "t5":
        hf.make_t5(str(tmp_path / "source"))
    else:
        name, geometry = hf.CAUSAL[kind]
        config = getattr(transformers, f"{name}Config")(
            **geometry, vocab_size=40, eos_token_id=1, pad_token_id=0
        )
        getattr(transformers, f"{name}ForCausalLM")(config).save_pretrained(tmp_path / "source")
    module, params = pretrained.load_hf(str(tmp_path / "source"))
    pretrained.save_hf(module.config, params, str(tmp_path / "one"))
    pretrained.save_hf(module.config, params, str(tmp_path / "parts"), max_shard_size=SMALL)
    assert weights_of(tmp_path / "one") == ["model.safetensors"]
    tensors = load_file(tmp_path / "one/model.safetensors")
    # One file is as the library writes it.
    content = (tmp_path / "one/model.safetensors").read_bytes()
    assert content == save(tensors, metadata={"format": "pt"})
    small.assert_same(tensors_of(tmp_path / "parts", "model"), tensors)
    count = len(weights_of(tmp_path / "parts")) - 1
    assert count > 2
    assert weights_of(tmp_path / "parts")[0] == f"model-00001-of-{count:05}.safetensors"
    for path in (tmp_path / "parts").glob("model-*.safetensors"):
        held = load_file(path)
        assert sum(value.nbytes for value in held.values()) <= 10_000 or len(held) == 1
    small.assert_same(pretrained.load(str(tmp_path / "parts"))[1], params)
    auto = transformers.AutoModelForSeq2SeqLM if kind == "t5" else transformers.AutoModelForCausalLM
    one, parts = (auto.from_pretrained(tmp_path / name).state_dict() for name in ("one", "parts"))
    assert one.keys() == parts.keys()
    assert all(torch.equal(one[key], parts[key]) for key in one)


def test_other_files_of_the_same_model_do_not_stay(tmp_path):
    config, folder = small.t5_config(), tmp_path / "model"
    first, second = (small.t5_params(config, seed) for seed in (0, 1))
    folder.mkdir()
    (folder / "spiece.model").write_bytes(b"pieces")
    for params, size in ((first, 50_000), (second, SMALL), (first, "5GB"), (second, SMALL)):
        pretrained.save_native(config, params, str(folder), max_shard_size=size)
        small.assert_same(pretrained.load_native(str(folder))[1], params)
        read = {path.rsplit("/", 1)[1] for path in hashed_files(str(folder))}
        assert {path.name for path in folder.iterdir()} == {*read, "spiece.model", sealed.SUMS}
        lines = (folder / sealed.SUMS).read_text().splitlines()
        assert {line.split("  ")[1] for line in lines} == read
    # A turned bit in any file is seen.
    for path in folder.glob("params-*"):
        content = path.read_bytes()
        path.write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
        with pytest.raises(ValueError, match=f"{path.name}: damaged"):
            pretrained.load_native(str(folder))
        path.write_bytes(content)
    pretrained.load_native(str(folder))


def test_one_file_at_a_time_is_in_memory(tmp_path):
    """Of tensors that are not as safetensors wants them: transposed ones."""
    kernels = [np.ones((1000, 500), np.float32) for _ in range(20)]
    tensors = {
        f"layer.{i}": writing.Unwritten((500, 1000), lambda x=x: x.T) for i, x in enumerate(kernels)
    }
    tracemalloc.start()
    writing.write_directory(str(tmp_path / "model"), {}, tensors, "model", "4MB")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(list((tmp_path / "model").glob("model-*.safetensors"))) == 10
    assert 4e6 <= peak < 7e6


@pytest.mark.parametrize("include_llm", [True, "whole"])
def test_an_l2s_model_in_several_files(include_llm, tmp_path, llm, tokenizers):  # noqa: F811
    save_bundle(tmp_path, llm, tokenizers)
    model = l2s_jax.load(str(tmp_path / "l2s"))
    one, parts = str(tmp_path / "one"), str(tmp_path / "parts")
    model.save_pretrained(one, include_llm=include_llm)
    model.save_pretrained(parts, include_llm=include_llm, max_shard_size=SMALL)
    for folder in ("", "llm"):
        assert weights_of(tmp_path / "one" / folder) == ["params.safetensors"]
        expected = load_file(tmp_path / "one" / folder / "params.safetensors")
        small.assert_same(tensors_of(tmp_path / "parts" / folder, "params"), expected)
    prompts = ["abc bca", "cab", "abba abc bca cab"]
    assert l2s_jax.load(parts).generate(prompts) == model.generate(prompts)
    for found, expected in zip(bundle.load(parts)[1:], bundle.load(one)[1:], strict=True):
        small.assert_same(found, expected)
    assert bundle.inspect(parts) == bundle.inspect(one)
    # A copy of a copy is in one file again, and its LLM the same.
    l2s_jax.load(parts).save_pretrained(str(tmp_path / "again"))
    again = tmp_path / "again"
    assert weights_of(again) == weights_of(again / "llm") == ["params.safetensors"]
    assert content_hash(str(again / "llm")) == content_hash(f"{one}/llm")
    (first, *_) = sorted((tmp_path / "parts/llm").glob("params-*"))
    first.unlink()
    with pytest.raises(ValueError, match=f"{first.name}: (?i:no such file)"):
        l2s_jax.load(parts)
