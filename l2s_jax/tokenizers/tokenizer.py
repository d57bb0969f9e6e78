"""Tokenizers: what all of them have, where they are loaded from, what text they lose."""

from __future__ import annotations

import itertools
import logging
import os
import unicodedata
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Protocol

from l2s_jax.copies import local
from l2s_jax.files import is_bucket, read_json
from l2s_jax.gguf_file import is_gguf
from l2s_jax.hub import PARTS, VOCABULARY_FILES, find, is_name
from l2s_jax.tokenizers import huggingface, reading, sentencepiece
from l2s_jax.tokenizers.cut import BYTE, CutTokenizer, read_kept

log = logging.getLogger(__name__)

_CHECKED_TEXTS = 1000


class Tokenizer(Protocol):
    """What the rest of the package needs from a tokenizer; ids are in [0, vocab_size).

    eos_id: what a response ends with; end_ids: all that end one, ascending, eos_id among them.
    is_chat: whether a prompt is what a user says, around which a chat is written.
    fingerprint: a hash of what decides the ids of a text: of those with the same one, an embedding
      may be shared. identity: a hash of all that decides the ids of prompts and responses.
    pieces: of each id, its text as the vocabulary has it; "" of an id that stands for none.
    special_ids: ids that stand for no text, ascending, such as those that end a response.
    """

    vocab_size: int
    pad_id: int
    eos_id: int
    end_ids: tuple[int, ...]
    is_chat: bool

    @property
    def fingerprint(self) -> str: ...

    @property
    def identity(self) -> str: ...

    @property
    def pieces(self) -> list[str]: ...

    @property
    def special_ids(self) -> list[int]: ...

    def encode_prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, with the special tokens that its family puts around a prompt."""
        ...

    def encode_responses(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, eos last."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids` up to the first that ends a response, without what stands for no text."""
        ...

    def save(self, directory: str) -> None:
        """Writes the files from which `load_tokenizer(directory)` restores this tokenizer."""


def load_tokenizer(path: str) -> Tokenizer:
    """Loads a tokenizer, whole or cut.

    Args:
      path: a SentencePiece model, a tokenizer.json, a GGUF file, or the directory of a checkpoint,
        or its name on the hub. How text is split is what its file says; transformers reads what
        is beside it, such as which tokens are special. One of ours holds a spiece.model that was
        trained here, or what `HuggingFaceTokenizer.save` has written.

    Raises:
      ValueError: there is none, it cannot be read, or it has no end-of-sequence token.
    """
    if is_bucket(path):
        is_folder = not path.endswith((".model", ".json"))
        path = local(find(path), PARTS["tokenizer"] if is_folder else ())
    path = find(path, "tokenizer") if is_name(path) else os.path.expanduser(path)
    if is_gguf(path):
        return reading.load_gguf(path)
    if not os.path.isdir(path):
        return reading.load(path) if path.endswith(".json") else sentencepiece.load(path)
    names = set(os.listdir(path))
    if names.isdisjoint(VOCABULARY_FILES):
        raise ValueError(
            f"{path}: no tokenizer; expected {sentencepiece.MODEL_FILE}, "
            f"{huggingface.TOKENIZER_FILE} or another file that transformers reads"
        )
    whole = _load_whole(path, names)
    kept = read_kept(path)
    return whole if kept is None else CutTokenizer(whole, kept, origin=path)


def _load_whole(path: str, names: Collection[str]) -> Tokenizer:
    """That of a directory which holds files of these names."""
    model = os.path.join(path, reading.MODEL_FILE)
    is_theirs = os.path.exists(model) and "model_type" in read_json(model)
    if sentencepiece.MODEL_FILE in names and (not is_theirs or reading.is_own(path)):
        return sentencepiece.load(os.path.join(path, sentencepiece.MODEL_FILE))
    return reading.load(path)


def for_chat(
    tokenizer: Tokenizer,
    system: str,
    options: Mapping[str, Any] | None = None,
    *,
    repeatable: bool = True,
) -> Tokenizer | None:
    """The tokenizer for prompts that are what a user says, after what the system says.

    The chat is written by the template of the tokenizer's checkpoint; None where it has none.
    `options` are values of other names that the template looks at.

    Raises:
      ValueError: the template takes no such messages, or, where prompts are to be `repeatable`,
        writes the date of today.
    """
    if isinstance(tokenizer, huggingface.HuggingFaceTokenizer) and tokenizer.has_chat_template:
        return tokenizer.for_chat(system, options or {}, repeatable=repeatable)
    return None


def is_byte(tokenizer: Tokenizer, id: int) -> bool:
    """Whether an id of a response stands for one byte: a character may take several of them."""
    pieces = tokenizer.pieces  # a model may have more ids than its tokenizer
    return id < len(pieces) and BYTE.fullmatch(pieces[id]) is not None


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
