"""A checkpoint's tokenizer against the library of its file, whatever class its config names."""

from __future__ import annotations

import io
import json

import pytest
import sentencepiece
import tokenizers
import transformers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from l2s_jax.tokenizers import load_tokenizer, pipelines

CORPUS = ["The quick brown fox 123 4567", "jumps over\n\n1. Mix it.", "Größe,  naïve 漢字 🙂"] * 9
TEXTS = [
    "Steps:\n\n1. Mix.",
    " hello",
    "a  b 12345 ",
    "naïve Cafe\u0301 ﬁ",
    "fox 🙂🙃 ☃ ж over",
    "the\tquick\r\n\r\n  fox\n",
    "<x> don't",
    " ",
    "\n",
    "",
]
# Of each class, the type of a model that has it.
CLASSES = {
    "GPT2Tokenizer": "llama",
    "GPTNeoXTokenizer": "gpt_neox",
    "Qwen2Tokenizer": "qwen3",
    "LlamaTokenizer": "llama",
    "LlamaTokenizerFast": "mistral",
    "CodeLlamaTokenizer": "llama",
    "GemmaTokenizer": "gemma",
    "T5Tokenizer": "t5",
    "T5TokenizerFast": "mt5",
    "PreTrainedTokenizerFast": "llama",
}
SPECIAL = ["<pad>", "</s>", "<unk>", "<s>"]
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)


def byte_level(*before, **options):
    made = tokenizers.Tokenizer(models.BPE(**options))
    made.pre_tokenizer = pre_tokenizers.Sequence([*before, BYTES]) if before else BYTES
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(CORPUS, trainer)
    return made


def in_bytes():
    """Llama 2's kind: each space is marked, one is put before the text, the unknown is bytes."""
    made = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    every = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=[*SPECIAL, *every], limit_alphabet=25, show_progress=False
    )
    made.train_from_iterator(CORPUS, trainer)
    # Bytes are no tokens that a text names.
    content = json.loads(made.to_str())
    content["added_tokens"] = content["added_tokens"][: len(SPECIAL)]
    return tokenizers.Tokenizer.from_str(json.dumps(content))


def unigram():
    """As transformers 4 converted T5's: lines stay, since nothing takes them for spaces."""
    made = tokenizers.Tokenizer(models.Unigram())
    made.normalizer = normalizers.Sequence(
        [normalizers.Strip(left=False), normalizers.Replace(tokenizers.Regex(" {2,}"), "▁")]
    )
    made.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    made.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=70, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
    )
    made.train_from_iterator(CORPUS, trainer)
    return made


PIPELINES = {
    "digits": lambda: byte_level(pre_tokenizers.Digits(individual_digits=True)),
    "bytes": byte_level,
    "in_bytes": in_bytes,
    "unigram": unigram,
}


@pytest.fixture(scope="module")
def made():
    return {name: make() for name, make in PIPELINES.items()}


def write(directory, kind, model_type, tokenizer=None, **settings):
    if tokenizer:
        tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": kind, "eos_token": "</s>"} | settings
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    config = {"model_type": model_type, "vocab_size": 512}
    (directory / "config.json").write_text(json.dumps(config))
    return str(directory)


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("pipeline", PIPELINES)
def test_a_tokenizer_json_decides(pipeline, kind, made, tmp_path):
    named = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>"}
    path = write(tmp_path, kind, CLASSES[kind], made[pipeline], **named)
    reference = tokenizers.Tokenizer.from_file(f"{path}/tokenizer.json")
    expected = [reference.encode(text, add_special_tokens=False).ids for text in TEXTS]
    ours = load_tokenizer(path)
    assert ours.encode_responses(TEXTS) == [[*ids, 1] for ids in expected]
    for ids in expected:
        kept = [id for id in ids if id != ours._special.unk_id]
        assert ours.decode(ids) == reference.decode(kept)
    assert (ours.eos_id, ours.pad_id) == (1, 0)
    file = load_tokenizer(f"{path}/tokenizer.json")
    assert (file.fingerprint, file.identity) == (ours.fingerprint, ours.identity)
    ours.save(str(tmp_path / "copy"))
    assert load_tokenizer(str(tmp_path / "copy")).encode_prompts(TEXTS) == (
        ours.encode_prompts(TEXTS)
    )


@pytest.mark.parametrize("kind", CLASSES)
def test_what_a_class_makes_itself_keeps_its_hashes(kind, made, tmp_path):
    path = write(tmp_path, kind, CLASSES[kind], made["digits"])
    if kind.startswith("T5"):
        write(tmp_path, kind, CLASSES[kind], made["unigram"])
    theirs = transformers.AutoTokenizer.from_pretrained(path).backend_tokenizer
    theirs.save(f"{path}/tokenizer.json")
    # As another writer spells the same.
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        if content["model"].get(name) == "":
            content["model"][name] = None
    if content["decoder"]["type"] == "ByteLevel":
        content["decoder"] |= {"add_prefix_space": False, "trim_offsets": False}
        content["post_processor"] = {
            "type": "ByteLevel",
            "add_prefix_space": True,
            "trim_offsets": False,
            "use_regex": True,
        }
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    expected = transformers.AutoTokenizer.from_pretrained(path).backend_tokenizer
    assert load_tokenizer(path)._tokenizer.to_str() == expected.to_str()


def test_a_class_that_cannot_take_the_file_is_not_needed(tmp_path):
    # VietAI's envit5 is a T5 whose pieces are merged.
    made = in_bytes()
    made.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    path = write(tmp_path, "T5Tokenizer", "t5", made)
    with pytest.raises(TypeError):
        transformers.AutoTokenizer.from_pretrained(path)
    ours = load_tokenizer(path)
    assert ours.encode_prompts(TEXTS) == [made.encode(text).ids for text in TEXTS]


@pytest.mark.parametrize("kind", ["GPT2Tokenizer", "PreTrainedTokenizerFast"])
def test_tokens_that_only_the_file_or_only_the_config_has_count(kind, tmp_path):
    made = byte_level()
    made.add_special_tokens(["<|user|>"])
    size = made.get_vocab_size()
    listed = {"1": {"content": "</s>"}, str(size): {"content": "<|end|>"}}
    for token in listed.values():
        token |= {"special": True, "normalized": False}
    path = write(tmp_path, kind, "llama", made, added_tokens_decoder=listed, unk_token="<unk>")
    ours = load_tokenizer(path)
    before, after = (made.encode(text).ids for text in ("a", "b"))
    (ids,) = ours.encode_prompts(["a<|user|>b<|end|>"])
    assert ids == [*before, made.token_to_id("<|user|>"), *after, size]
    assert ours.decode(ids) == "ab"


@pytest.mark.parametrize("kind", CLASSES)
def test_a_class_invents_no_tokens(kind, made, tmp_path):
    """Its names for special tokens count where the file has such tokens."""
    content = json.loads(made["bytes"].to_str())
    names = {"</s>": "<|stop|>", "<s>": "<|start|>", "<pad>": "<|fill|>", "<unk>": "<|what|>"}
    vocabulary = content["model"]["vocab"]
    content["model"]["vocab"] = {names.get(token, token): id for token, id in vocabulary.items()}
    for token in content["added_tokens"]:
        token["content"] = names[token["content"]]
    path = write(tmp_path, kind, CLASSES[kind])
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind}))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 1}')
    ours = load_tokenizer(path)
    assert (ours.eos_id, ours.vocab_size) == (1, made["bytes"].get_vocab_size())
    assert ours.pad_id == 1 and ours.special_ids == [0, 1, 2, 3]


@pytest.mark.parametrize("kind", ["LlamaTokenizer", "LlamaTokenizerFast", "GPT2Tokenizer"])
def test_add_bos_token_counts_where_the_file_adds_none(kind, made, tmp_path):
    settings = {"add_bos_token": True, "bos_token": "<s>"}
    path = write(tmp_path, kind, "llama", made["in_bytes"], **settings)
    expected = [[3, *made["in_bytes"].encode(text).ids] for text in TEXTS]
    assert load_tokenizer(path).encode_prompts(TEXTS) == expected


def train(**options):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    return model.getvalue()


T5 = {"vocab_size": 60, "pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
GPT = {"vocab_size": 60, "unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": 3, "pad_piece": "[PAD]"}
LLAMA = {
    "vocab_size": 330,
    "model_type": "bpe",
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
}
# Of each, what its model is trained with, and what a checkpoint says of it.
ALONE = {
    "t5": (T5, "T5Tokenizer", "t5"),
    "t5_of_merges": (T5 | {"vocab_size": 90, "model_type": "bpe"}, "T5Tokenizer", "t5"),
    "mt5": (T5 | {"vocab_size": 310, "byte_fallback": True}, "T5Tokenizer", "mt5"),
    "no_prefix": (T5 | {"add_dummy_prefix": False}, "T5Tokenizer", "t5"),
    "identity": (T5 | {"normalization_rule_name": "identity"}, "T5Tokenizer", "t5"),
    "gpt2": (GPT, "T5Tokenizer", "gpt2"),
    "gpt_neox": (
        GPT
        | {
            "vocab_size": 330,
            "byte_fallback": True,
            "add_dummy_prefix": False,
            "remove_extra_whitespaces": False,
            "user_defined_symbols": ["<NL>"],
        },
        "T5Tokenizer",
        "gpt_neox",
    ),
    "llama": (LLAMA, "LlamaTokenizer", "llama"),
    "mistral": (LLAMA, "LlamaTokenizer", "mistral"),
    "code_llama": (LLAMA, "CodeLlamaTokenizer", "llama"),
    "gemma": (
        LLAMA
        | {"add_dummy_prefix": False, "user_defined_symbols": ["\n\n", "<x>"]}
        | {"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3}
        | {"pad_piece": "<pad>", "eos_piece": "<eos>", "bos_piece": "<bos>"},
        "GemmaTokenizer",
        "gemma",
    ),
}


def write_alone(directory, name):
    options, kind, model_type = ALONE[name]
    model = train(**options)
    names = {"T5Tokenizer": "spiece.model"}
    (directory / names.get(kind, "tokenizer.model")).write_bytes(model)
    settings = {"extra_ids": 0} if kind == "T5Tokenizer" else {}
    eos = {"eos_token": "<eos>"} if kind == "GemmaTokenizer" else {}
    path = write(directory, kind, model_type, **settings, **eos, unk_token="<unk>")
    return path, sentencepiece.SentencePieceProcessor(model_proto=model)


@pytest.mark.parametrize("name", ALONE)
def test_a_sentencepiece_model_alone_decides(name, tmp_path):
    path, reference = write_alone(tmp_path, name)
    ours = load_tokenizer(path)
    texts = [*TEXTS, "one<NL>  two"]
    expected = reference.encode(texts)
    eos = reference.eos_id()
    assert ours.encode_responses(texts) == [[*ids, eos] for ids in expected]
    for ids in expected:
        if reference.unk_id() not in ids:
            assert ours.decode([*ids, eos]) == reference.decode(ids)
    ours.save(str(tmp_path / "copy"))
    again = load_tokenizer(str(tmp_path / "copy"))
    assert again.encode_responses(texts) == ours.encode_responses(texts)


@pytest.mark.parametrize("name", ALONE)
def test_prompts_of_llamas_begin_with_bos(name, tmp_path):
    path, reference = write_alone(tmp_path, name)
    before = [reference.bos_id()] if ALONE[name][1] != "T5Tokenizer" else []
    after = [reference.eos_id()] if ALONE[name][2] in ("t5", "mt5") else []
    expected = [[*before, *ids, *after] for ids in reference.encode(TEXTS)]
    assert load_tokenizer(path).encode_prompts(TEXTS) == expected
    if before:
        settings = tmp_path / "tokenizer_config.json"
        settings.write_text(json.dumps(json.loads(settings.read_text()) | {"add_bos_token": False}))
        assert load_tokenizer(path).encode_prompts(TEXTS) == [ids[1:] for ids in expected]


def test_t5s_own_layout_is_as_transformers_has_it(tmp_path):
    path, _ = write_alone(tmp_path, "t5")
    expected = transformers.AutoTokenizer.from_pretrained(path).backend_tokenizer.to_str()
    assert load_tokenizer(path)._tokenizer.to_str() == expected


def test_a_class_that_numbers_the_pieces_anew_decides(tmp_path):
    """As XLM-R's, whose pieces have other ids than SentencePiece's."""
    path = tmp_path / "spiece.model"
    path.write_bytes(train(vocab_size=60))
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    pieces = [(model.id_to_piece(id), model.get_score(id)) for id in range(3, len(model))]
    first = [(piece, 0.0) for piece in ("<s>", "<pad>", "</s>", "<unk>")]
    theirs = tokenizers.Tokenizer(models.Unigram([*first, *pieces], 3, False))
    assert pipelines.of_sentencepiece(str(path), theirs) is theirs


def test_text_goes_on_after_an_unknown_character(tmp_path):
    path, _ = write_alone(tmp_path, "gpt2")
    ours = load_tokenizer(path)
    assert ours.decode(ours.encode_responses(["the ☃ fox"])[0]).split() == ["the", "fox"]


def test_a_model_that_the_library_cannot_follow_is_refused(tmp_path):
    (tmp_path / "spiece.model").write_bytes(train(**T5, user_defined_symbols=["\n"]))
    path = write(tmp_path, "T5Tokenizer", "t5", extra_ids=0)
    with pytest.raises(ValueError) as error:
        load_tokenizer(path)
    message = str(error.value)
    assert message.startswith(f"{path}/spiece.model: SentencePiece makes other tokens of 'Steps:")
    assert "expected a tokenizer.json" in message and "\n" not in message
