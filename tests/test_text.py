"""SentencePiece tokenizers: training, encoding, decoding, files and errors."""

import hashlib
import io
import random

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from l2s_jax.tokenizers import load_tokenizer
from l2s_jax.tokenizers.sentencepiece import train_sentencepiece

SYLLABLES = ("ka", "ri", "sto", "nü", "ver", "bel", "iß", "om", "tan", "que", "lo", "fi")
WORDS = [a + b + c for a in SYLLABLES for b in SYLLABLES[:5] for c in ("", "s", "ing")]


def sentences(count, seed=0):
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(3, 9))) for _ in range(count)]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return str(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def tokenizer(directory):
    return train_sentencepiece(sentences(300), vocab_size=90, directory=directory)


def encode(tokenizer, one):
    (ids,) = tokenizer.encode_responses([one])
    return ids


def one_line(error):
    message = str(error.value)
    assert "\n" not in message
    return message


def test_layout_is_that_of_t5(tokenizer):
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.vocab_size) == (0, 1, 90)
    assert encode(tokenizer, "漢")[-2:] == [2, 1]


def test_encode_is_sentencepiece_plus_eos(tokenizer, directory):
    reference = sentencepiece.SentencePieceProcessor(model_file=f"{directory}/spiece.model")
    for sentence in sentences(20, seed=1):
        assert encode(tokenizer, sentence) == [*reference.encode(sentence), 1]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(max_size=40), max_size=5))
def test_any_text_encodes_to_valid_ids_with_one_eos(tokenizer, texts):
    batch = tokenizer.encode_prompts(texts)
    assert batch == [encode(tokenizer, one) for one in texts]
    for ids in batch:
        assert ids[-1] == tokenizer.eos_id
        assert tokenizer.eos_id not in ids[:-1]
        assert tokenizer.pad_id not in ids
        assert all(0 <= i < tokenizer.vocab_size for i in ids)


def test_round_trip_keeps_text_and_collapses_white_space(tokenizer):
    for sentence in sentences(20, seed=2):
        assert tokenizer.decode(encode(tokenizer, sentence)) == sentence
    assert tokenizer.decode(encode(tokenizer, " kari\n\nstobel \t loka ")) == "kari stobel loka"


def test_decode_stops_at_eos_and_drops_pad_and_foreign_ids(tokenizer):
    ids = encode(tokenizer, "kari stobel")
    body = ids[:-1]
    noisy = [0, -1, *body[:2], 0, 90, 32099, *body[2:], 1, *encode(tokenizer, "loka")]
    assert tokenizer.decode(noisy) == "kari stobel"
    assert tokenizer.decode(np.asarray(noisy, np.int32)) == "kari stobel"
    assert tokenizer.decode([]) == tokenizer.decode([1]) == tokenizer.decode([0, 0]) == ""


def test_load_gives_the_same_tokenizer(tokenizer, directory, tmp_path):
    model = (tmp_path / "copy" / "spiece.model").absolute()
    tokenizer.save(str(model.parent))
    names = sorted(file.name for file in model.parent.iterdir())
    assert names == ["SHA256SUMS", "spiece.model", "tokenizer_config.json"]
    assert tokenizer.fingerprint == hashlib.sha256(model.read_bytes()).hexdigest()
    for path in (directory, str(model), str(model.parent)):
        loaded = load_tokenizer(path)
        assert loaded.fingerprint == tokenizer.fingerprint
        assert encode(loaded, "kari stobel") == encode(tokenizer, "kari stobel")


def test_training_is_deterministic_and_samples_by_seed(tmp_path):
    def fingerprint(**options):
        return train_sentencepiece(
            iter(sentences(300)), vocab_size=70, directory=str(tmp_path), **options
        ).fingerprint

    assert fingerprint() == fingerprint() == fingerprint(seed=1)
    sampled = fingerprint(max_texts=40, seed=0)
    assert sampled == fingerprint(max_texts=40, seed=0)
    assert sampled != fingerprint(max_texts=40, seed=1)


def test_training_uses_long_texts(tmp_path):
    long = " ".join(sentences(400))
    assert len(long.encode()) > 4192
    tokenizer = train_sentencepiece([long], vocab_size=70, directory=str(tmp_path))
    assert 2 not in encode(tokenizer, long)


def test_bpe_keeps_every_word_whole_where_there_is_room(tmp_path):
    words = [f"{a}{b}{c}" for a in "bdgk" for b in "aeiou" for c in "lmnr"]
    texts = [" ".join(words[i:] + words[:i]) for i in range(len(words))]
    tokenizer = train_sentencepiece(
        texts, vocab_size=130, directory=str(tmp_path), model_type="bpe"
    )
    assert all(len(encode(tokenizer, word)) == 2 for word in words)
    assert tokenizer.decode(encode(tokenizer, texts[0])) == texts[0]


def test_unknown_model_type_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"'word': expected one of \('unigram', 'bpe'\)"):
        train_sentencepiece(["a"], vocab_size=10, directory=str(tmp_path), model_type="word")


def test_too_large_a_vocabulary_is_told_what_fits(tmp_path):
    with pytest.raises(ValueError, match="5000 pieces is too large") as error:
        train_sentencepiece(sentences(300), vocab_size=5000, directory=str(tmp_path))
    assert not list(tmp_path.iterdir())
    largest = int(one_line(error).split()[-1])
    tokenizer = train_sentencepiece(sentences(300), vocab_size=largest, directory=str(tmp_path))
    assert tokenizer.vocab_size == largest


@pytest.mark.parametrize(
    ("texts", "vocab_size", "expected"),
    [
        (sentences(300), 10, "10 pieces is too small"),
        (sentences(300), 0, "expected a positive number"),
        ([], 50, "there is no text"),
        (["", "  \n"], 50, "there is no text"),
    ],
)
def test_training_errors(tmp_path, texts, vocab_size, expected):
    with pytest.raises(ValueError, match=expected) as error:
        train_sentencepiece(texts, vocab_size=vocab_size, directory=str(tmp_path))
    one_line(error)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [b"", b"no model", None])
def test_load_errors_name_the_file(tmp_path, content):
    file = tmp_path / "spiece.model"
    if content is not None:
        file.write_bytes(content)
    for path in (tmp_path, file):
        with pytest.raises(ValueError, match=r"spiece\.model") as error:
            load_tokenizer(str(path))
        one_line(error)


@pytest.mark.parametrize(("option", "piece"), [("pad_id", "padding"), ("eos_id", "end of seq")])
def test_a_model_needs_padding_and_eos(tmp_path, option, piece):
    model = io.BytesIO()
    special = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1} | {option: -1}
    if option == "pad_id":
        special |= {"eos_id": 0, "unk_id": 1}
    else:
        special |= {"unk_id": 1}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences(300)),
        model_writer=model,
        vocab_size=60,
        minloglevel=2,
        **special,
    )
    (tmp_path / "spiece.model").write_bytes(model.getvalue())
    with pytest.raises(ValueError, match=f"spiece.model.*{piece}") as error:
        load_tokenizer(str(tmp_path))
    one_line(error)
