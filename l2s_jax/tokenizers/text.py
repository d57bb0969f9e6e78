"""Tokenizers: text to ids and back.

SentencePiece models, as T5 has them and as they are trained here, are in this file; tokenizer.json,
which the decoder-only families have, is in text_hf.py. SentencePiece in T5's layout (pad 0, eos 1,
unk 2, no bos) turns newlines and runs of spaces into single spaces, so a task that needs them must
mark them in its text; `warn_if_lossy` says so.
"""

import hashlib
import io
import itertools
import logging
import os
import random
import re
import tempfile
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Protocol

import sentencepiece as spm

from l2s_jax.tokenizers import huggingface as text_hf

log = logging.getLogger(__name__)

MODEL_FILE = "spiece.model"
MODEL_TYPES = ("unigram", "bpe")
# Work is split between threads by position: a fixed number fixes the order of training's sums.
_TRAINING_THREADS = 4
# SentencePiece drops longer texts from training; its default, 4192, is shorter than many documents.
_MAX_TEXT_BYTES = 1 << 16
_CHECKED_TEXTS = 1000


class Tokenizer(Protocol):
    """What the rest of the package needs from a tokenizer; ids are in [0, vocab_size)."""

    vocab_size: int
    pad_id: int
    eos_id: int
    fingerprint: str

    def encode_prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, with the special tokens that its family puts around a prompt."""

    def encode_responses(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, eos last."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids` up to the first eos, without padding and ids that stand for no piece."""

    def save(self, directory: str) -> None:
        """Writes the files from which `load_tokenizer(directory)` restores this tokenizer."""


class SentencePieceTokenizer:
    """A SentencePiece model; prompts and responses end with eos, as T5's do.

    Attributes:
      vocab_size: number of pieces of the model (a network's embedding may have more rows).
      fingerprint: SHA-256, in hex, of the model's bytes.
    """

    def __init__(self, model: bytes, *, origin: str = "the SentencePiece model"):
        self._model = model
        if not model:
            raise ValueError(f"{origin}: not a SentencePiece model: the file is empty")
        try:
            self._processor = spm.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise ValueError(f"{origin}: not a SentencePiece model: {_one_line(error)}") from error
        self.vocab_size = self._processor.get_piece_size()
        self.pad_id = self._processor.pad_id()
        self.eos_id = self._processor.eos_id()
        self.fingerprint = hashlib.sha256(model).hexdigest()
        for name, token in (("padding", self.pad_id), ("end of sequence", self.eos_id)):
            if token < 0:
                raise ValueError(f"{origin}: the model must have a {name} piece and has none")

    def encode_prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, eos last."""
        threads = os.cpu_count() or 1
        return self._processor.encode(list(texts), out_type=int, add_eos=True, num_threads=threads)

    encode_responses = encode_prompts

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids` up to the first eos, without padding and ids that stand for no piece."""
        before_eos = itertools.takewhile(lambda i: i != self.eos_id, map(int, ids))
        kept = [i for i in before_eos if i != self.pad_id and 0 <= i < self.vocab_size]
        return self._processor.decode(kept)

    def save(self, directory: str) -> None:
        """Writes `spiece.model` into `directory`, which is made if need be."""
        os.makedirs(directory, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=directory, prefix=MODEL_FILE)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(self._model)
            os.chmod(temporary, 0o644)
            os.replace(temporary, os.path.join(directory, MODEL_FILE))
        except BaseException:
            os.unlink(temporary)
            raise


def load_tokenizer(path: str) -> Tokenizer:
    """Loads a tokenizer.

    Args:
      path: a SentencePiece model, a tokenizer.json, or a directory that holds a spiece.model, a
        tokenizer.json, or GPT-2's vocab.json and merges.txt, taken in this order.

    Raises:
      ValueError: there is none, it cannot be read, or it has no end-of-sequence token.
    """
    path = os.path.expanduser(path)
    if not os.path.isdir(path):
        return text_hf.load(path) if path.endswith(".json") else _load_sentencepiece(path)
    names = set(os.listdir(path))
    if MODEL_FILE in names:
        return _load_sentencepiece(os.path.join(path, MODEL_FILE))
    if text_hf.TOKENIZER_FILE in names:
        return text_hf.load(os.path.join(path, text_hf.TOKENIZER_FILE))
    if {"vocab.json", "merges.txt"} <= names:
        return text_hf.load_gpt2(path)
    found = ": tokenizer.model alone is not enough" if "tokenizer.model" in names else ""
    raise ValueError(
        f"{path}: no tokenizer{found}; expected {MODEL_FILE} or {text_hf.TOKENIZER_FILE} "
        "(save_pretrained of a fast tokenizer writes it)"
    )


def _load_sentencepiece(file: str) -> SentencePieceTokenizer:
    try:
        with open(file, "rb") as handle:
            model = handle.read()
    except OSError as error:
        raise ValueError(f"{file}: cannot read the tokenizer: {error.strerror}") from error
    return SentencePieceTokenizer(model, origin=file)


def warn_if_lossy(tokenizer: Tokenizer, texts: Iterable[str], what: str) -> None:
    """Logs one line if some of the first `_CHECKED_TEXTS` texts change in encoding and decoding."""
    checked = list(itertools.islice(texts, _CHECKED_TEXTS))
    back = [tokenizer.decode(ids) for ids in tokenizer.encode_responses(checked)]
    changed = [(a, b) for a, b in zip(checked, back, strict=True) if a != b]
    if changed:
        losses = sorted({_loss(before, after) for before, after in changed})
        log.warning(
            "%s: %.0f%% of %d texts do not come back from the tokenizer as they were (%s)",
            what,
            100 * len(changed) / len(checked),
            len(checked),
            ", ".join(losses),
        )


def _loss(before: str, after: str) -> str:
    """What a text lost on its way through a tokenizer."""
    if before.split() == after.split():
        if before.count("\n") != after.count("\n"):
            return "line breaks"
        return "spaces at the ends" if before.strip() == after else "runs of spaces"
    if "".join(before.split()).casefold() == "".join(after.split()).casefold():
        return "case or spaces"
    if unicodedata.normalize("NFKC", before).split() == after.split():
        return "forms of characters"
    return "unknown characters"


def train_sentencepiece(
    texts: Iterable[str],
    *,
    vocab_size: int,
    directory: str,
    model_type: str = "unigram",
    seed: int = 0,
    max_texts: int = 2_000_000,
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
    message = _one_line(error)
    if found := re.search(r"value <= (\d+)", message):
        return f"a vocabulary of {vocab_size} pieces is too large: this text gives {found[1]}"
    if found := re.search(r"required_chars\D+\d+ vs (\d+)", message):
        return f"a vocabulary of {vocab_size} pieces is too small: this text needs {found[1]}"
    return f"cannot train a tokenizer of {vocab_size} pieces: {message}"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
