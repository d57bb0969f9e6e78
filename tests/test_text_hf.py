"""tokenizer.json against transformers: same ids, same text, and one line for a broken file."""

from __future__ import annotations

import json
import logging
import shutil

import pytest
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from l2s_jax.tokenizers.sentencepiece import train_sentencepiece
from l2s_jax.tokenizers.tokenizer import load_tokenizer, warn_if_lossy

TEXTS = ["The quick brown fox", "jumps over the lazy dog.", "Größe,\n  naïve façade 漢字 🙂🙃"] * 9
SENTENCES = ["brown dog", " the  fox\n\njumps ", "Größe 漢字 🙂", "", "<eos> </s> <|endoftext|>"]
ALPHABET = pre_tokenizers.ByteLevel.alphabet()


def train(kind):
    """A small tokenizer in the manner of a family, and the special tokens of its config."""
    if kind == "gpt2":
        made = tokenizers.Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        special = {"eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>"}
        trainer = trainers.BpeTrainer(
            vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=ALPHABET
        )
    elif kind == "llama":
        made = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        special = {"eos_token": "</s>", "bos_token": "<s>", "pad_token": "<pad>"}
        trainer = trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=["<pad>", "<unk>", "<s>", "</s>"],
            initial_alphabet=ALPHABET,
        )
    else:
        made = tokenizers.Tokenizer(models.Unigram())
        made.pre_tokenizer = pre_tokenizers.Metaspace()
        made.decoder = decoders.Metaspace()
        special = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
        trainer = trainers.UnigramTrainer(
            vocab_size=60, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>"
        )
    made.train_from_iterator(TEXTS, trainer)
    if kind != "gpt2":
        before, after = ("<s> ", "") if kind == "llama" else ("", " </s>")
        token = "<s>" if kind == "llama" else "</s>"
        made.post_processor = processors.TemplateProcessing(
            single=f"{before}$A{after}", special_tokens=[(token, made.token_to_id(token))]
        )
    return made, special


KINDS = ("gpt2", "llama", "t5")


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """kind -> a directory as save_pretrained leaves it, with a config.json."""
    made = {}
    for kind in KINDS:
        directory = tmp_path_factory.mktemp(kind)
        tokenizer, special = train(kind)
        fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
        fast.save_pretrained(str(directory))
        (directory / "config.json").write_text(json.dumps({"model_type": kind}))
        made[kind] = directory
    return made


@pytest.fixture
def directory(directories, tmp_path):
    """A copy of the Llama-like one, to change."""
    shutil.copytree(directories["llama"], tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_text_equal_transformers(directories, kind):
    ours = load_tokenizer(str(directories[kind]))
    theirs = transformers.AutoTokenizer.from_pretrained(str(directories[kind]))
    prompts = ours.encode_prompts(SENTENCES)
    assert prompts == [theirs(one).input_ids for one in SENTENCES]
    eos = ours.eos_id
    assert eos == theirs.eos_token_id
    bare = [theirs(one, add_special_tokens=False).input_ids for one in SENTENCES]
    assert ours.encode_responses(SENTENCES) == [[*ids, eos] for ids in bare]
    if kind == "llama":
        assert {ids[0] for ids in prompts} == {theirs.bos_token_id}
        assert eos not in prompts[0]
    for ids in ours.encode_responses(SENTENCES[:4]):
        expected = theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert ours.decode(ids) == expected
    assert ours.vocab_size == len(theirs)
    assert ours.pad_id == (eos if kind == "gpt2" else theirs.pad_token_id)


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_it_is_the_same(directories, kind, tmp_path):
    tokenizer = load_tokenizer(str(directories[kind]))
    tokenizer.save(str(tmp_path / "copy"))
    again = load_tokenizer(str(tmp_path / "copy"))
    assert again.encode_prompts(SENTENCES) == tokenizer.encode_prompts(SENTENCES)
    assert (again.pad_id, again.eos_id) == (tokenizer.pad_id, tokenizer.eos_id)
    assert again.fingerprint == tokenizer.fingerprint
    again.save(str(tmp_path / "copy"))
    assert load_tokenizer(str(tmp_path / "copy")).fingerprint == tokenizer.fingerprint


def test_fingerprints_differ(directories):
    assert len({load_tokenizer(str(one)).fingerprint for one in directories.values()}) == 3


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=40))
def test_byte_level_keeps_any_text(directories, text):
    tokenizer = load_tokenizer(str(directories["gpt2"]))
    for special in ("<|endoftext|>",):
        text = text.replace(special, "")
    (ids,) = tokenizer.encode_responses([text])
    assert ids[-1] == tokenizer.eos_id and ids.count(tokenizer.eos_id) == 1
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([*ids, *ids]) == text


def test_truncation_and_padding_of_the_file_are_off(directories, tmp_path):
    made, _ = train("gpt2")
    made.enable_truncation(3)
    made.enable_padding(length=9)
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "eos_token_id": 0}')
    tokenizer = load_tokenizer(str(tmp_path))
    expected = load_tokenizer(str(directories["gpt2"])).encode_prompts(SENTENCES)
    assert tokenizer.encode_prompts(SENTENCES) == expected


def test_a_decoder_only_prompt_has_no_eos_at_its_end(tmp_path, directories):
    made, _ = train("llama")
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        special_tokens=[(token, made.token_to_id(token)) for token in ("<s>", "</s>")],
    )
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": {"content": "</s>"}}')
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    expected = load_tokenizer(str(directories["llama"])).encode_prompts(SENTENCES)
    assert load_tokenizer(str(tmp_path)).encode_prompts(SENTENCES) == expected


@pytest.mark.parametrize("wanted", [True, False])
def test_add_bos_token_says_whether_a_prompt_starts_with_one(directory, wanted):
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"add_bos_token": wanted}))
    tokenizer = load_tokenizer(str(directory))
    bos = tokenizer._tokenizer.token_to_id("<s>")
    assert [ids.count(bos) for ids in tokenizer.encode_prompts(SENTENCES)] == [int(wanted)] * 5


def test_gpt2s_first_files_are_read(directories, tmp_path):
    made, _ = train("gpt2")
    made.model.save(str(tmp_path))
    tokenizer = load_tokenizer(str(tmp_path))
    expected = load_tokenizer(str(directories["gpt2"]))
    assert tokenizer.encode_prompts(SENTENCES) == expected.encode_prompts(SENTENCES)
    assert tokenizer.encode_responses(SENTENCES) == expected.encode_responses(SENTENCES)


def refused(path, *fragments):
    with pytest.raises(ValueError) as error:
        load_tokenizer(str(path))
    message = str(error.value)
    assert "\n" not in message
    for fragment in fragments:
        assert fragment in message


def test_a_directory_without_a_tokenizer_is_refused(tmp_path):
    refused(tmp_path, str(tmp_path), "no tokenizer", "spiece.model")
    (tmp_path / "tokenizer.model").write_bytes(b"")
    refused(tmp_path, "no tokenizer.json", "model_type")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    refused(tmp_path, str(tmp_path))


@pytest.mark.parametrize("content", ["", "{", "[]", '{"model": {}}', '{"version": "1.0"}'])
def test_a_file_that_is_no_tokenizer_is_refused(directory, content):
    (directory / "tokenizer.json").write_text(content)
    refused(directory, str(directory / "tokenizer.json"), "not a tokenizer")


def test_a_truncated_file_is_refused(directory):
    path = directory / "tokenizer.json"
    path.write_text(path.read_text()[:-40])
    refused(directory, str(path), "not a tokenizer")
    path.write_bytes(b"\xff\xfe")
    refused(directory, str(path), "UTF-8")


def test_a_tokenizer_without_an_eos_is_refused(directory):
    for name in ("tokenizer_config.json", "special_tokens_map.json", "config.json"):
        (directory / name).unlink(missing_ok=True)
    refused(directory, "no end-of-sequence token", "tokenizer_config.json")


def test_an_eos_that_the_tokenizer_lacks_is_refused(directory):
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (directory / name).unlink(missing_ok=True)
    (directory / "config.json").write_text('{"model_type": "llama", "eos_token_id": 9999}')
    refused(directory, "eos_id is 9999")


def test_broken_settings_are_refused(directory):
    (directory / "tokenizer_config.json").write_text("[1]")
    refused(directory, "tokenizer_config.json", "expected a JSON object")
    (directory / "tokenizer_config.json").write_text("{")
    refused(directory, "tokenizer_config.json", "not readable as JSON")


def test_what_a_tokenizer_loses_is_said_once(directories, tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    sentencepiece = train_sentencepiece(
        ["one two three four"] * 9, vocab_size=14, directory=str(tmp_path)
    )
    warn_if_lossy(sentencepiece, ["one two", "three"], "prompts")
    assert not caplog.records
    texts = ["one two", "one\ntwo", "one  two", " one", "ONE seven"]
    warn_if_lossy(sentencepiece, texts, "prompts")
    (record,) = caplog.records
    message = record.getMessage()
    assert message.startswith("prompts: 80% of 5 texts")
    for loss in ("line breaks", "runs of spaces", "spaces at the ends", "unknown characters"):
        assert loss in message
    caplog.clear()
    warn_if_lossy(load_tokenizer(str(directories["gpt2"])), texts, "prompts")
    assert not caplog.records
