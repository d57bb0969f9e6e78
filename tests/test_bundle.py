"""A trained L2S model on disk: what is saved is what is loaded, with the LLM that it belongs to."""

import json

import jax
import numpy as np
import pytest
import small

from l2s_jax import bundle, convert
from l2s_jax.convert.files import content_hash
from l2s_jax.models.l2s import FUSIONS
from l2s_jax.models.systems import LanguageModel, LlmToSlm
from l2s_jax.text import train_sentencepiece

LLM = small.t5_config(tied_head=True)
SLM = small.t5_config(width=12, activation="gated_gelu")


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """Two that differ."""
    return [
        train_sentencepiece(
            [text] * 20, vocab_size=9, directory=str(tmp_path_factory.mktemp("tokenizer"))
        )
        for text in ("abc bca cab abba", "xyz yzx zxy xyyx")
    ]


@pytest.fixture
def llm(tmp_path):
    """(directory, parameters) of an LLM on disk."""
    params = LanguageModel("llm", LLM).init(jax.random.key(0))["llm"]
    directory = tmp_path / "llm"
    convert.save_hf(LLM, params, str(directory))
    return directory, params


def save(tmp_path, llm, tokenizers, fusion="add", llm_path=None, shared=True):
    directory, _ = llm
    system = LlmToSlm(LLM, SLM, projector_width=5, fusion=fusion, shared_vocabulary=shared)
    trained = system.init(jax.random.key(1))
    bundle.save(
        system,
        trained,
        str(tmp_path / "l2s"),
        llm_path=llm_path or str(directory),
        llm_hash=content_hash(str(directory)),
        layer=0.0,
        llm_tokenizer=tokenizers[0],
        slm_tokenizer=tokenizers[0 if shared else 1],
    )
    return system, trained


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("fusion", FUSIONS)
def test_round_trip(tmp_path, llm, tokenizers, fusion, shared):
    system, trained = save(tmp_path, llm, tokenizers, fusion, shared=shared)
    loaded_system, loaded, frozen = bundle.load(str(tmp_path / "l2s"))
    found = [tokenizer.fingerprint for tokenizer in bundle.load_tokenizers(str(tmp_path / "l2s"))]
    assert found == [tokenizers[0].fingerprint, tokenizers[0 if shared else 1].fingerprint]
    assert loaded_system == system
    jax.tree.map(np.testing.assert_array_equal, trained, loaded)
    _, params = llm
    expected = {key: params[key] for key in ("token_embedding", "encoder")}
    jax.tree.map(np.testing.assert_array_equal, expected, frozen)


def test_a_relative_llm_is_found_when_both_are_moved(tmp_path, llm, tokenizers):
    save(tmp_path, llm, tokenizers, llm_path="../llm")
    (tmp_path / "moved").mkdir()
    for name in ("llm", "l2s"):
        (tmp_path / name).rename(tmp_path / "moved" / name)
    bundle.load(str(tmp_path / "moved/l2s"))


def test_another_llm_is_refused(tmp_path, llm, tokenizers):
    save(tmp_path, llm, tokenizers)
    other = LanguageModel("llm", LLM).init(jax.random.key(2))["llm"]
    convert.save_hf(LLM, other, str(llm[0]))
    with pytest.raises(ValueError, match="not the one that"):
        bundle.load(str(tmp_path / "l2s"))


def test_a_directory_of_another_kind_is_refused(tmp_path, llm):
    with pytest.raises(ValueError, match=r"config\.json: family is None, expected 'l2s'"):
        bundle.load(str(llm[0]))


def test_a_damaged_config_is_refused(tmp_path, llm, tokenizers):
    save(tmp_path, llm, tokenizers)
    path = tmp_path / "l2s/config.json"
    fields = json.loads(path.read_text())
    del fields["fusion"]
    path.write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=r"config\.json: not the config of an L2S model.*fusion"):
        bundle.load(str(tmp_path / "l2s"))
