"""Tokenizers in Hugging Face's format, tokenizer.json, through the `tokenizers` library."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from typing import Any

import tokenizers

from l2s_jax.files import write_json, write_text
from l2s_jax.tokenizers import gguf

TOKENIZER_FILE = "tokenizer.json"
SETTINGS_FILE = "tokenizer_config.json"
# Where special tokens are named, in this order: by text in the first two, by id in the others.
SPECIAL_FILES = (
    SETTINGS_FILE,
    "special_tokens_map.json",
    "config.json",
    "generation_config.json",
)
_ENCODER_DECODERS = ("t5", "mt5")


class HuggingFaceTokenizer:
    """A tokenizer.json with the special tokens that the files beside it name.

    Prompts get what the file's own post-processor puts around them, but no eos at the end if the
    model beside it is decoder-only, and a bos where tokenizer_config.json says so. A tokenizer
    without a padding token pads with eos; masks tell the two apart.

    Attributes:
      vocab_size: the largest id and one (a network's embedding may have more rows).
      fingerprint: SHA-256, in hex, of the file's bytes and of these settings.
    """

    def __init__(self, content: str, settings: dict[str, Any], *, origin: str):
        """`settings`: eos_id, pad_id (or None), bos_id (or None), prompt_bos and prompt_eos, which
        add or remove one, or leave it to the file where they are None.
        """
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(content)
        except Exception as error:  # the library raises no narrower type
            raise ValueError(
                f"{origin}: not a tokenizer of the tokenizers library: {_one_line(error)}"
            ) from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._content = content
        self._settings = settings
        self.vocab_size = max(self._tokenizer.get_vocab().values(), default=-1) + 1
        self.eos_id = settings["eos_id"]
        self.pad_id = self.eos_id if settings["pad_id"] is None else settings["pad_id"]
        for name in ("eos_id", "pad_id", "bos_id"):
            if settings[name] is not None and not 0 <= settings[name] < self.vocab_size:
                raise ValueError(
                    f"{origin}: {name} is {settings[name]}, not below the {self.vocab_size} ids"
                )
        # What the file's post-processor adds by itself.
        empty = self._tokenizer.encode("").ids
        bos_id = settings["bos_id"]
        self._has_bos = bos_id is not None and empty[:1] == [bos_id]
        self._has_eos = empty[-1:] == [self.eos_id]
        if bos_id == self.eos_id and len(empty) == 1:
            self._has_eos = False
        wants = settings["prompt_bos"] if bos_id is not None else None
        self._wants_bos = self._has_bos if wants is None else wants
        wants = settings["prompt_eos"]
        self._wants_eos = self._has_eos if wants is None else wants
        known = json.dumps([content, settings], sort_keys=True)
        self.fingerprint = hashlib.sha256(known.encode()).hexdigest()

    def encode_prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, with the special tokens that belong around a prompt."""
        return [self._around_prompt(ids) for ids in self._encode(texts, True)]

    def encode_responses(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, eos last."""
        return [[*ids, self.eos_id] for ids in self._encode(texts, False)]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids` up to the first eos, without padding and ids that stand for no token."""
        before_eos = itertools.takewhile(lambda i: i != self.eos_id, map(int, ids))
        kept = [i for i in before_eos if i != self.pad_id and 0 <= i < self.vocab_size]
        return self._tokenizer.decode(kept, skip_special_tokens=True)

    def save(self, directory: str) -> None:
        """Writes tokenizer.json and tokenizer_config.json, from which the same is loaded."""
        os.makedirs(directory, exist_ok=True)
        settings = self._settings
        fields: dict[str, Any] = {
            f"{name}_token": self._tokenizer.id_to_token(settings[f"{name}_id"])
            for name in ("eos", "pad", "bos")
            if settings[f"{name}_id"] is not None
        }
        for name in ("bos", "eos"):
            if settings[f"prompt_{name}"] is not None:
                fields[f"add_{name}_token"] = settings[f"prompt_{name}"]
        if settings.get("chat_template"):
            fields["chat_template"] = settings["chat_template"]
        write_json(os.path.join(directory, SETTINGS_FILE), fields)
        write_text(os.path.join(directory, TOKENIZER_FILE), self._content)

    def _encode(self, texts: Sequence[str], special: bool) -> Iterator[list[int]]:
        for encoding in self._tokenizer.encode_batch(list(texts), add_special_tokens=special):
            yield encoding.ids

    def _around_prompt(self, ids: list[int]) -> list[int]:
        if self._wants_bos != self._has_bos:
            ids = [self._settings["bos_id"], *ids] if self._wants_bos else ids[1:]
        if self._wants_eos != self._has_eos:
            ids = [*ids, self.eos_id] if self._wants_eos else ids[:-1]
        return ids


def load(file: str) -> HuggingFaceTokenizer:
    """The tokenizer of a tokenizer.json and the files beside it.

    Raises:
      ValueError: it cannot be read, or no file names an end-of-sequence token.
    """
    return _with_settings(_read(file), os.path.dirname(file), file)


def load_gguf(file: str) -> HuggingFaceTokenizer:
    """The tokenizer of a GGUF file.

    Raises:
      ValueError: it holds none, or one of an unknown kind.
    """
    tokenizer, found = gguf.read(file)
    settings = {name: found[name] for name in ("eos_id", "pad_id", "bos_id", "chat_template")}
    settings |= {"prompt_bos": found["add_bos"], "prompt_eos": False}
    return HuggingFaceTokenizer(tokenizer.to_str(), settings, origin=file)


def load_gpt2(directory: str) -> HuggingFaceTokenizer:
    """GPT-2's byte-level BPE from vocab.json and merges.txt, as its first releases hold it."""
    vocab, merges = (os.path.join(directory, name) for name in ("vocab.json", "merges.txt"))
    try:
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(vocab, merges))
    except Exception as error:
        raise ValueError(f"{vocab}: not a byte-level BPE: {_one_line(error)}") from None
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    if tokenizer.token_to_id("<|endoftext|>") is not None:
        tokenizer.add_special_tokens(["<|endoftext|>"])
    return _with_settings(tokenizer.to_str(), directory, vocab, default_eos="<|endoftext|>")


def _with_settings(
    content: str, directory: str, origin: str, default_eos: str | None = None
) -> HuggingFaceTokenizer:
    given = {name: _read_json(os.path.join(directory, name)) for name in SPECIAL_FILES}
    try:
        lookup = tokenizers.Tokenizer.from_str(content).token_to_id
    except Exception as error:
        raise ValueError(
            f"{origin}: not a tokenizer of the tokenizers library: {_one_line(error)}"
        ) from None

    def special(name: str) -> int | None:
        for file in SPECIAL_FILES[:2]:
            token = given[file].get(f"{name}_token")
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str) and lookup(token) is not None:
                return lookup(token)
        for file in SPECIAL_FILES[2:]:
            token = given[file].get(f"{name}_token_id")
            token = token[0] if isinstance(token, list) and token else token
            if type(token) is int:
                return token
        return None

    eos_id = special("eos")
    if eos_id is None and default_eos is not None:
        eos_id = lookup(default_eos)
    if eos_id is None:
        raise ValueError(
            f"{origin}: no end-of-sequence token; expected an eos_token that it knows in one of "
            f"{', '.join(SPECIAL_FILES)} beside it"
        )
    settings, model = given[SETTINGS_FILE], given["config.json"]
    prompt_eos = settings.get("add_eos_token")
    if model.get("model_type") and prompt_eos is None:
        is_seq2seq = model["model_type"] in _ENCODER_DECODERS or model.get("is_encoder_decoder")
        prompt_eos = None if is_seq2seq else False
    return HuggingFaceTokenizer(
        content,
        {
            "eos_id": eos_id,
            "pad_id": special("pad"),
            "bos_id": special("bos"),
            "prompt_bos": settings.get("add_bos_token"),
            "prompt_eos": prompt_eos,
        },
        origin=origin,
    )


def _read(file: str) -> str:
    try:
        with open(file, encoding="utf-8") as handle:
            return handle.read()
    except OSError as error:
        raise ValueError(f"{file}: cannot read the tokenizer: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{file}: cannot read the tokenizer: expected UTF-8") from None


def _read_json(file: str) -> dict[str, Any]:
    """The object in a JSON file; nothing where there is no file."""
    if not os.path.exists(file):
        return {}
    try:
        value = json.loads(_read(file))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}: not readable as JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{file}: expected a JSON object, found {type(value).__name__}")
    return value


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
