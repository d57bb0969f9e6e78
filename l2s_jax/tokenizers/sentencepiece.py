"""SentencePiece models, as T5 has them and as they are trained here.

T5's layout (pad 0, eos 1, unk 2, no bos) turns newlines and runs of spaces into single spaces, so a
task that needs them must mark them in its text.
"""

from __future__ import annotations

import functools
import hashlib
import io
import itertools
import os
import random
import re
from collections.abc import Iterable, Sequence

import sentencepiece as spm

from l2s_jax import sealed
from l2s_jax.files import make_folder, read_bytes, write_bytes, write_json
from l2s_jax.messages import one_line
from l2s_jax.tokenizers.huggingface import OWN, SETTINGS_FILE

MODEL_FILE = "spiece.model"
MODEL_TYPES = ("unigram", "bpe")
# So many texts are worth the threads that a batch starts.
_MANY = 100
# Work is split between threads by position: a fixed number fixes the order of training's sums.
_TRAINING_THREADS = 4
# SentencePiece drops longer texts from training; its default, 4192, is shorter than many documents.
_MAX_TEXT_BYTES = 1 << 16


class SentencePieceTokenizer:
    """A SentencePiece model; prompts and responses end with eos, as T5's do.

    Attributes:
      vocab_size: number of pieces of the model (a network's embedding may have more rows).
      end_ids: what ends a response: eos_id.
      is_chat: it has no chat template.
      fingerprint, identity: SHA-256, in hex, of the model's bytes.
    """

    def __init__(self, model: bytes, *, origin: str = "the SentencePiece model"):
        self._model = model
        if not model:
            raise ValueError(f"{origin}: not a SentencePiece model: the file is empty")
        try:
            self._processor = spm.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise ValueError(f"{origin}: not a SentencePiece model: {one_line(error)}") from error
        self.vocab_size = self._processor.get_piece_size()
        self.pad_id = self._processor.pad_id()
        self.eos_id = self._processor.eos_id()
        self.end_ids = (self.eos_id,)
        self.is_chat = False
        self.fingerprint = self.identity = hashlib.sha256(model).hexdigest()
        for name, token in (("padding", self.pad_id), ("end of sequence", self.eos_id)):
            if token < 0:
                raise ValueError(f"{origin}: the model must have a {name} piece and has none")

    @property
    def pieces(self) -> list[str]:
        """Of each id, its text as the vocabulary has it."""
        return self._pieces

    @functools.cached_property
    def _pieces(self) -> list[str]:
        return [self._processor.id_to_piece(id) for id in range(self.vocab_size)]

    @property
    def special_ids(self) -> list[int]:
        """Ids that stand for no text, ascending."""
        processor = self._processor
        kinds = (processor.is_control, processor.is_unknown, processor.is_unused)
        return [id for id in range(self.vocab_size) if any(kind(id) for kind in kinds)]

    def encode_prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, eos last."""
        encode = functools.partial(self._processor.encode, out_type=int, add_eos=True)
        if len(texts) < _MANY:
            return [encode(text) for text in texts]
        return encode(list(texts), num_threads=os.cpu_count() or 1)

    encode_responses = encode_prompts

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids` up to the first eos, without padding and ids that stand for no text."""
        before_eos = itertools.takewhile(lambda i: i != self.eos_id, map(int, ids))
        left_out = (self.pad_id, self._processor.unk_id())
        kept = [i for i in before_eos if i not in left_out and 0 <= i < self.vocab_size]
        return self._processor.decode(kept)

    def save(self, directory: str) -> None:
        """Writes `spiece.model` into `directory`, which is made if need be.

        A file beside it says that this is all: transformers' T5 has 100 sentinels more by default.
        """
        make_folder(directory)
        settings = {"tokenizer_class": "T5Tokenizer", "extra_ids": 0, OWN: {"file": MODEL_FILE}}
        with sealed.writing(directory, SETTINGS_FILE, MODEL_FILE):
            write_json(os.path.join(directory, SETTINGS_FILE), settings)
            write_bytes(os.path.join(directory, MODEL_FILE), self._model)


def load(file: str) -> SentencePieceTokenizer:
    """The tokenizer of a SentencePiece model's file.

    Raises:
      ValueError: it cannot be read, or is no such model.
    """
    sealed.check(file)
    try:
        model = read_bytes(file)
    except OSError as error:
        raise ValueError(f"{file}: cannot read the tokenizer: {error.strerror}") from error
    return SentencePieceTokenizer(model, origin=file)


def train_sentencepiece(
    texts: Iterable[str],
    *,
    vocab_size: int,
    directory: str,
    model_type: str = "unigram",
    seed: int = 0,
    max_texts: int = 1_000_000,
    character_coverage: float = 0.99999,
) -> SentencePieceTokenizer:
    """Trains a model with T5's special ids and saves it as `directory/spiece.model`.

    The same texts, options and seed give the same model.

    Args:
      texts: the text, one example each.
      vocab_size: number of pieces, special ones included.
      directory: where the model goes.
      model_type: "unigram" (Kudo 2018; T5's kind) or "bpe" (Sennrich et al. 2016), which keeps
        every word whole where the text has fewer words than the vocabulary has room for.
      seed: of the choice of texts where there are more than `max_texts`.
      max_texts: how many texts to train on at most.
      character_coverage: share of the text's characters that get a piece; the rest is unk.

    Raises:
      ValueError: an unknown type, the text cannot give exactly `vocab_size` pieces, or there is
        no text.
    """
    if model_type not in MODEL_TYPES:
        raise ValueError(f"tokenizer model_type {model_type!r}: expected one of {MODEL_TYPES}")
    if vocab_size < 1:
        raise ValueError(f"a vocabulary of {vocab_size} pieces: expected a positive number")
    sample = _sample(texts, max_texts, seed)
    if not any(text.strip() for text in sample):
        raise ValueError("cannot train a tokenizer: there is no text")
    model = io.BytesIO()
    try:
        spm.SentencePieceTrainer.train(
            sentence_iterator=iter(sample),
            model_writer=model,
            model_type=model_type,
            vocab_size=vocab_size,
            character_coverage=character_coverage,
            max_sentence_length=_MAX_TEXT_BYTES,
            num_threads=_TRAINING_THREADS,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        raise ValueError(_training_error(vocab_size, error)) from error
    tokenizer = SentencePieceTokenizer(model.getvalue())
    tokenizer.save(directory)
    return tokenizer


def _sample(texts: Iterable[str], size: int, seed: int) -> list[str]:
    """A uniform sample of at most `size` texts, in one pass (reservoir sampling)."""
    rng = random.Random(seed)
    sample: list[str] = []
    for count, text in enumerate(texts):
        if count < size:
            sample.append(text)
        elif (slot := rng.randrange(count + 1)) < size:
            sample[slot] = text
    return sample


def _training_error(vocab_size: int, error: Exception) -> str:
    message = one_line(error)
    if found := re.search(r"value <= (\d+)", message):
        return f"a vocabulary of {vocab_size} pieces is too large: this text gives {found[1]}"
    if found := re.search(r"required_chars\D+\d+ vs (\d+)", message):
        return f"a vocabulary of {vocab_size} pieces is too small: this text needs {found[1]}"
    return f"cannot train a tokenizer of {vocab_size} pieces: {message}"
