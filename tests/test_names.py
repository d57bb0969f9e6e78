"""Names of tensors as people's checkpoints have them: bodies alone, encoders alone, indices."""

from __future__ import annotations

import json

import hf
import jax
import numpy as np
import pytest
import tiny
import transformers
from safetensors.numpy import load_file, save_file

from l2s_jax.checkpoints.pretrained import encodes_only, load_encoder, load_hf
from l2s_jax.tokenizers.sentencepiece import train_sentencepiece

BODY = {"gpt2": "transformer.", "gpt_neox": "gpt_neox."}


def make(kind, folder, tied):
    """A causal model and its body, each saved as transformers saves it."""
    name, geometry = hf.CAUSAL[kind]
    settings = {"vocab_size": 40, "tie_word_embeddings": tied, "eos_token_id": 1, "pad_token_id": 0}
    config = getattr(transformers, f"{name}Config")(**geometry, **settings)
    transformers.utils.logging.disable_progress_bar()
    head = "LMHeadModel" if kind == "gpt2" else "ForCausalLM"
    model = getattr(transformers, f"{name}{head}")(config)
    model.save_pretrained(folder / "whole")
    model.base_model.save_pretrained(folder / "body")
    keys = load_file(folder / "body/model.safetensors")
    assert not any(key.startswith(BODY.get(kind, "model.")) for key in keys)
    return str(folder / "whole"), str(folder / "body")


def assert_same(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found[1], expected[1])
    assert jax.tree.structure(found[1]) == jax.tree.structure(expected[1])


@pytest.mark.parametrize("kind", hf.CAUSAL)
def test_a_body_alone(kind, tmp_path):
    # With its head tied to the embedding, it is the whole model.
    whole, body = make(kind, tmp_path / "tied", True)
    assert_same(load_hf(body), load_hf(whole))
    assert not encodes_only(body)
    # Without, it encodes.
    whole, body = make(kind, tmp_path / "untied", False)
    assert_same(load_encoder(body), load_encoder(whole))
    assert_same(load_encoder(body, layer=1), load_encoder(whole, layer=1))
    assert encodes_only(body) and not encodes_only(whole)
    with pytest.raises(ValueError, match=r"missing \(-\).*: - (lm_head|embed_out)\.weight$"):
        load_hf(body)
    # Under the names of the whole it may lack the head too.
    path = tmp_path / "untied/whole/model.safetensors"
    tensors = load_file(path)
    head = "embed_out.weight" if kind == "gpt_neox" else "lm_head.weight"
    save_file({key: value for key, value in tensors.items() if key != head}, path)
    assert encodes_only(whole)
    assert_same(load_encoder(whole), load_encoder(body))


@pytest.mark.parametrize("own_head", [False, True])
def test_an_encoder_alone(own_head, tmp_path):
    model = hf.make_t5(str(tmp_path / "whole"), own_head=own_head, tie_word_embeddings=not own_head)
    encoder = transformers.T5EncoderModel(model.config)
    encoder.load_state_dict(model.state_dict(), strict=False)
    encoder.save_pretrained(tmp_path / "encoder")
    assert_same(load_encoder(str(tmp_path / "encoder")), load_encoder(str(tmp_path / "whole")))
    assert encodes_only(str(tmp_path / "encoder")) and not encodes_only(str(tmp_path / "whole"))
    tensors = load_file(tmp_path / "encoder/model.safetensors")
    del tensors["encoder.final_layer_norm.weight"]
    save_file(tensors, tmp_path / "encoder/model.safetensors")
    with pytest.raises(ValueError, match=r"- encoder\.final_layer_norm\.weight$"):
        encodes_only(str(tmp_path / "encoder"))


@pytest.mark.parametrize("kind", ["t5", *hf.CAUSAL])
def test_an_index_may_list_a_tied_head_that_no_file_holds(kind, tmp_path):
    if kind == "t5":
        folder = tmp_path / "whole"
        hf.make_t5(str(folder))
    else:
        folder = tmp_path / "whole"
        make(kind, tmp_path, True)
    expected = load_hf(str(folder))
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    file = "model-00001-of-00001.safetensors"
    save_file(tensors, folder / file)
    head = "embed_out.weight" if kind == "gpt_neox" else "lm_head.weight"
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys([*tensors, head], file)}))
    assert_same(load_hf(str(folder)), expected)
    assert_same(load_encoder(str(folder)), load_encoder(str(folder)))
    # What nothing else holds is missed.
    last = sorted(tensors)[-1]
    save_file({key: value for key, value in tensors.items() if key != last}, folder / file)
    with pytest.raises(ValueError, match=f"differs from .*- {last}"):
        load_hf(str(folder))


CHANGES = """

base_config = get_config


def get_config():
    config = base_config()
    config.llm = default().llm
    config.llm.path = "PATH"
    config.tokenizer.train_vocab_size = 0
    return config
"""


def test_an_encoder_alone_teaches_and_is_not_measured(tmp_path, capfd):
    encoder = tmp_path / "encoder"
    model = hf.make_t5(vocab_size=30)
    part = transformers.T5EncoderModel(model.config)
    part.load_state_dict(model.state_dict(), strict=False)
    part.save_pretrained(encoder)
    text = [*tiny.WORDS, "reverse:"]
    train_sentencepiece(text, vocab_size=24, directory=str(encoder))
    config = tiny.write_task(tmp_path / "task")
    config.write_text(config.read_text() + CHANGES.replace("PATH", str(encoder)))
    flags = (f"--config={config}", f"--workdir={tmp_path / 'run'}")
    assert tiny.run(*flags, "--config.labels.source=llm") == 2
    error = capfd.readouterr().err.splitlines()[-1]
    assert f"{encoder}: the model has no head or decoder" in error and "'data'" in error
    assert tiny.run(*flags) == 0
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert list(report["systems"]) == ["slm", "l2s", "l2s_mismatched"]
    assert set(report["l2s_vs_llm"].values()) == {None}
    assert list(report["significance"]) == ["l2s_vs_slm", "l2s_mismatched_vs_l2s"]
    page = (tmp_path / "run/report.md").read_text()
    assert "L2S on an LLM that only encodes" in page and "nan" not in page.lower()
    assert (tmp_path / "run/l2s/model/README.md").exists()
