"""Tokenizers: what all of them have, where they are loaded from, what text they lose."""

from __future__ import annotations

import itertools
import logging
import os
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Protocol

from l2s_jax.gguf_file import is_gguf
from l2s_jax.hub import find, is_name
from l2s_jax.tokenizers import huggingface, sentencepiece

log = logging.getLogger(__name__)

_CHECKED_TEXTS = 1000


class Tokenizer(Protocol):
    """What the rest of the package needs from a tokenizer; ids are in [0, vocab_size)."""

    vocab_size: int
    pad_id: int
    eos_id: int
    fingerprint: str

    def encode_prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, with the special tokens that its family puts around a prompt."""
        ...

    def encode_responses(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, eos last."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids` up to the first eos, without padding and ids that stand for no piece."""
        ...

    def save(self, directory: str) -> None:
        """Writes the files from which `load_tokenizer(directory)` restores this tokenizer."""


def load_tokenizer(path: str) -> Tokenizer:
    """Loads a tokenizer.

    Args:
      path: a SentencePiece model, a tokenizer.json, a GGUF file, or a directory that holds a
        spiece.model, a tokenizer.json, or GPT-2's vocab.json and merges.txt, taken in this order.
        Or the name of a repository on the hub that holds such files.

    Raises:
      ValueError: there is none, it cannot be read, or it has no end-of-sequence token.
    """
    path = find(path, "tokenizer") if is_name(path) else os.path.expanduser(path)
    if is_gguf(path):
        return huggingface.load_gguf(path)
    if not os.path.isdir(path):
        return huggingface.load(path) if path.endswith(".json") else sentencepiece.load(path)
    names = set(os.listdir(path))
    if sentencepiece.MODEL_FILE in names:
        return sentencepiece.load(os.path.join(path, sentencepiece.MODEL_FILE))
    if huggingface.TOKENIZER_FILE in names:
        return huggingface.load(os.path.join(path, huggingface.TOKENIZER_FILE))
    if {"vocab.json", "merges.txt"} <= names:
        return huggingface.load_gpt2(path)
    found = ": tokenizer.model alone is not enough" if "tokenizer.model" in names else ""
    raise ValueError(
        f"{path}: no tokenizer{found}; expected {sentencepiece.MODEL_FILE} or "
        f"{huggingface.TOKENIZER_FILE} (save_pretrained of a fast tokenizer writes it)"
    )


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
