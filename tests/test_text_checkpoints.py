"""Tokenizers as checkpoints have them: added tokens, chats, several ends; against transformers."""

from __future__ import annotations

import json
import shutil
import sys

import pytest
import transformers
from test_text_hf import SENTENCES, TEXTS, train

from l2s_jax.tokenizers import for_chat, load_tokenizer
from l2s_jax.tokenizers.sentencepiece import train_sentencepiece

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MODEL = {"model_type": "llama", "vocab_size": 400}


def theirs(directory, **options):
    return transformers.AutoTokenizer.from_pretrained(str(directory), **options)


def equal(directory, texts):
    """Our tokenizer of a directory, which encodes and decodes as transformers' does."""
    ours, reference = load_tokenizer(str(directory)), theirs(directory)
    assert ours.encode_prompts(texts) == reference(texts).input_ids
    bare = reference(texts, add_special_tokens=False).input_ids
    assert ours.encode_responses(texts) == [[*ids, reference.eos_token_id] for ids in bare]
    for ids in bare:
        expected = reference.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        assert ours.decode([*ids, ours.eos_id]) == expected
    return ours


@pytest.fixture
def t5(tmp_path):
    """A T5 of 200 ids with a SentencePiece model alone, as google/t5-v1_1's first files were."""
    train_sentencepiece(TEXTS, vocab_size=64, directory=str(tmp_path / "t5"), model_type="bpe")
    (tmp_path / "t5/tokenizer_config.json").unlink()
    (tmp_path / "t5/config.json").write_text(json.dumps({"model_type": "t5", "vocab_size": 200}))
    return tmp_path / "t5"


@pytest.fixture
def llama(tmp_path):
    """A decoder-only model with a bos and a chat template, of tokens that no prompt is split by."""
    made, special = train("llama")
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=made, **special)
    fast.add_tokens(["<|user|>", "<|system|>", "<|assistant|>"], special_tokens=True)
    fast.chat_template = TEMPLATE
    fast.save_pretrained(str(tmp_path / "llama"))
    (tmp_path / "llama/config.json").write_text(json.dumps(MODEL))
    return tmp_path / "llama"


def change(directory, name, **fields):
    path = directory / name
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(known | fields))


def test_a_t5_of_a_sentencepiece_model_alone_has_its_sentinels(t5):
    ours = equal(t5, ["brown <extra_id_0> dog<extra_id_99>", *SENTENCES[:4]])
    (ids,) = ours.encode_responses(["<extra_id_0>"])
    assert len(ids) == 2 and ours.vocab_size == 164


def test_pieces_that_were_trained_here_have_none(t5):
    change(t5, "config.json", vocab_size=64)
    ours = load_tokenizer(str(t5))
    assert ours.vocab_size == 64
    # (To transformers, the text of a special token is that token.)
    texts = SENTENCES[:4]
    assert theirs(t5, extra_ids=0)(texts).input_ids == ours.encode_prompts(texts)


def test_tokens_that_were_added_to_a_t5_stay(t5):
    tokenizer = theirs(t5)
    tokenizer.add_tokens(["<", "\n"])
    tokenizer.save_pretrained(str(t5))
    (t5 / "SHA256SUMS").unlink()
    assert (t5 / "spiece.model").exists() and (t5 / "tokenizer.json").exists()
    ours = equal(t5, ["a < b\nfox", "<\n<"])
    assert ours.decode(ours.encode_responses(["brown\n< dog"])[0]) == theirs(t5).decode(
        ours.encode_responses(["brown\n< dog"])[0], skip_special_tokens=True
    )


@pytest.mark.parametrize("place", ["added_tokens_decoder", "added_tokens.json"])
def test_tokens_beside_a_tokenizer_json_count(place, tmp_path):
    made, _ = train("llama")
    size = made.get_vocab_size()
    made.save(str(tmp_path / "tokenizer.json"))
    added = {"<|end|>": size, "<|user|>": size + 1}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"}
    if place == "added_tokens.json":
        (tmp_path / place).write_text(json.dumps(added))
    else:
        settings[place] = {
            str(i): {"content": token, "special": True, "normalized": False}
            for token, i in added.items()
        }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "config.json").write_text(json.dumps(MODEL))
    ours = equal(tmp_path, ["brown<|user|>dog", "fox"])
    assert ours.eos_id == size
    assert ours.encode_responses(["<|user|>"]) == [[size + 1, size]]
    assert ours.vocab_size == size + 2


@pytest.mark.parametrize("kind", ["spiece", "tokenizer.json"])
def test_nothing_is_left_of_what_a_tokenizer_does_not_know(kind, t5, tmp_path):
    if kind == "spiece":
        ours = train_sentencepiece(TEXTS, vocab_size=64, directory=str(tmp_path), model_type="bpe")
    else:
        ours = equal(t5, ["the {fox} over"])
    assert ours.decode(ours.encode_responses(["the {fox} over"])[0]).split() == [
        "the",
        "fox",
        "over",
    ]


def test_a_pad_of_minus_one_is_none(llama):
    expected = load_tokenizer(str(llama))
    for name in ("config.json", "generation_config.json"):
        change(llama, name, pad_token_id=-1, eos_token_id=[expected.eos_id, -1])
    ours = load_tokenizer(str(llama))
    assert (ours.pad_id, ours.end_ids) == (expected.pad_id, (expected.eos_id,))


def test_all_that_ends_a_response_is_known(llama):
    eos = load_tokenizer(str(llama)).eos_id
    change(llama, "config.json", eos_token_id=[7, 9])
    assert load_tokenizer(str(llama)).end_ids == tuple(sorted({eos, 7, 9}))
    # As in transformers, the file about generation comes before the model's.
    change(llama, "generation_config.json", eos_token_id=[11, eos])
    ours = load_tokenizer(str(llama))
    assert ours.end_ids == tuple(sorted({eos, 11})) and ours.eos_id == eos
    (ids,) = ours.encode_responses(["brown"])
    assert ours.decode([*ids[:-1], 11, *ids]) == "brown"
    ours.save(str(llama.parent / "copy"))
    assert load_tokenizer(str(llama.parent / "copy")).end_ids == ours.end_ids


@pytest.mark.parametrize("system", ["", "be brief"])
def test_a_chat_is_written_by_the_checkpoints_template(llama, system, tmp_path):
    plain = load_tokenizer(str(llama))
    ours, reference = for_chat(plain, system), theirs(llama)
    before = [{"role": "system", "content": system}] if system else []
    expected = [
        reference.apply_chat_template(
            [*before, {"role": "user", "content": text}], add_generation_prompt=True
        ).input_ids
        for text in SENTENCES
    ]
    found = ours.encode_prompts(SENTENCES)
    assert found == expected
    assert {ids.count(reference.bos_token_id) for ids in found} == {1}
    assert ours.encode_responses(SENTENCES) == plain.encode_responses(SENTENCES)
    # Whether there is a chat decides what stages made, not whether a vocabulary is shared.
    assert ours.is_chat and ours.fingerprint == plain.fingerprint
    assert len({plain.identity, ours.identity, for_chat(plain, "x").identity}) == 3
    ours.save(str(tmp_path / "copy"))
    again = load_tokenizer(str(tmp_path / "copy"))
    assert again.encode_prompts(SENTENCES) == found and again.identity == ours.identity
    assert theirs(tmp_path / "copy").chat_template == TEMPLATE


def test_a_template_sees_the_options_of_a_chat(llama, tmp_path):
    template = "{{ messages[0].content }}{% if not thinking %} dog{% endif %}"
    change(llama, "tokenizer_config.json", chat_template=template)
    (llama / "chat_template.jinja").unlink(missing_ok=True)
    plain = load_tokenizer(str(llama))
    quick, slow = (for_chat(plain, "", {"thinking": thinking}) for thinking in (False, True))
    assert quick.encode_prompts(["brown"]) == [plain.encode_responses(["brown dog"])[0][:-1]]
    assert slow.encode_prompts(["brown"]) == [plain.encode_responses(["brown"])[0][:-1]]
    assert quick.identity != slow.identity
    slow.save(str(tmp_path / "copy"))
    assert load_tokenizer(str(tmp_path / "copy")).identity == slow.identity


def test_a_template_that_takes_no_system_is_an_error_in_one_line(llama):
    change(
        llama,
        "tokenizer_config.json",
        chat_template="{% if messages[0].role == 'system' %}{{ raise_exception('no\nsystem') }}"
        "{% endif %}{{ messages[0].content }}",
    )
    (llama / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer = load_tokenizer(str(llama))
    assert for_chat(tokenizer, "") is not None
    with pytest.raises(ValueError, match="takes no such prompt: no system"):
        for_chat(tokenizer, "be brief")


def test_a_tokenizer_without_a_template_has_no_chat(t5):
    assert for_chat(load_tokenizer(str(t5)), "") is None


def test_a_prompt_that_starts_with_a_bos_gets_no_second(llama):
    tokenizer = load_tokenizer(str(llama))
    once, with_own = tokenizer.encode_prompts(["brown dog", "<s>brown dog"])
    assert with_own == once and once.count(tokenizer.encode_prompts([""])[0][0]) == 1


def test_a_fingerprint_is_of_ids_whatever_the_rest(llama):
    before = load_tokenizer(str(llama))
    content = json.loads((llama / "tokenizer.json").read_text())
    (llama / "tokenizer.json").write_text(json.dumps(content, indent=7))
    assert load_tokenizer(str(llama)).identity == before.identity
    change(llama, "tokenizer_config.json", eos_token="<|user|>", pad_token="</s>")
    after = load_tokenizer(str(llama))
    assert after.eos_id != before.eos_id and after.fingerprint == before.fingerprint
    assert after.identity != before.identity
    change(llama, "tokenizer_config.json", add_bos_token=False)
    assert load_tokenizer(str(llama)).fingerprint != before.fingerprint


def test_code_beside_a_checkpoint_is_not_run(llama):
    change(llama, "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", None]})
    (llama / "evil.py").write_text("raise SystemExit('run')")
    tokenizer = load_tokenizer(str(llama))
    assert tokenizer.encode_prompts(SENTENCES)


def test_own_files_need_no_transformers(llama, tmp_path, monkeypatch):
    tokenizer = load_tokenizer(str(llama))
    tokenizer.save(str(tmp_path / "own"))
    shutil.rmtree(llama)
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert load_tokenizer(str(tmp_path / "own")).encode_prompts(SENTENCES) == (
        tokenizer.encode_prompts(SENTENCES)
    )
