"""Tokenizers of checkpoints: read by transformers, which defines them, run by `tokenizers`."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import logging
import os
from collections.abc import Iterator, Sequence
from typing import Any

import tokenizers

from l2s_jax.files import one_line, read_json, write_json, write_text
from l2s_jax.tokenizers import gguf, sentencepiece

TOKENIZER_FILE = "tokenizer.json"
SETTINGS_FILE = "tokenizer_config.json"
GENERATION_FILE = "generation_config.json"
MODEL_FILE = "config.json"
# In SETTINGS_FILE, what `HuggingFaceTokenizer.save` adds for `load`.
_OWN = "l2s_jax"
_ENCODER_DECODERS = ("t5", "mt5", "umt5")


@dataclasses.dataclass(frozen=True)
class Special:
    """What a tokenizer does beside splitting text; ids are None where there is no such token.

    eos_id: what a response ends with.
    end_ids: all that end a response, eos_id among them, ascending.
    prompt_bos, prompt_eos: whether a prompt starts with bos_id and ends with eos_id; None: as the
      tokenizer's own post-processor has it.
    chat_template: Jinja; "" where there is none.
    system: None: prompts are text. Else prompts are what a user says, and this is the system's
      message; "" for none.
    """

    eos_id: int
    pad_id: int | None = None
    bos_id: int | None = None
    unk_id: int | None = None
    end_ids: tuple[int, ...] = ()
    prompt_bos: bool | None = None
    prompt_eos: bool | None = None
    chat_template: str = ""
    system: str | None = None


class HuggingFaceTokenizer:
    """A tokenizer of the `tokenizers` library, and what it does beside splitting text.

    Prompts get what the post-processor puts around them, but no eos at the end if the model beside
    it is decoder-only. One that starts with a bos of its own gets no second. A tokenizer without a
    padding token pads with eos; masks tell the two apart.

    Attributes:
      vocab_size: the largest id and one (a network's embedding may have more rows).
      end_ids: what ends a response, ascending; eos_id is one of them.
      is_chat: whether prompts are what a user says; see `for_chat`.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, special: Special, *, origin: str):
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer, self._special = tokenizer, special
        self.vocab_size = max(tokenizer.get_vocab().values(), default=-1) + 1
        self.eos_id = special.eos_id
        self.pad_id = self.eos_id if special.pad_id is None else special.pad_id
        self.end_ids = tuple(sorted({self.eos_id, *special.end_ids}))
        self.is_chat = special.system is not None
        for name in ("eos_id", "pad_id", "bos_id"):
            value = getattr(special, name)
            if value is not None and not 0 <= value < self.vocab_size:
                raise ValueError(
                    f"{origin}: {name} is {value}, not below the {self.vocab_size} ids"
                )
        # What the post-processor adds by itself.
        empty = tokenizer.encode("").ids
        bos_id = special.bos_id
        self._has_bos = bos_id is not None and empty[:1] == [bos_id]
        self._has_eos = empty[-1:] == [self.eos_id]
        if bos_id == self.eos_id and len(empty) == 1:
            self._has_eos = False
        wants = special.prompt_bos if bos_id is not None else None
        self._wants_bos = self._has_bos if wants is None else wants
        self._wants_eos = self._has_eos if special.prompt_eos is None else special.prompt_eos

    @property
    def fingerprint(self) -> str:
        """SHA-256, in hex, of what decides the ids of a text.

        Two tokenizers with the same one share their vocabulary, whatever ends a response of each.
        """
        return self._hashes[0]

    @property
    def identity(self) -> str:
        """SHA-256, in hex, of all that decides the ids of prompts and responses, and their text."""
        return self._hashes[1]

    @functools.cached_property
    def _hashes(self) -> tuple[str, str]:
        """(fingerprint, identity)."""
        whole = self._tokenizer.to_str()
        content = json.loads(whole)
        splitting = [content[name] for name in ("normalizer", "pre_tokenizer", "model")]
        # Whether a token is special decides what decoding leaves out, not how text is split.
        added = [{**token, "special": None} for token in content["added_tokens"]]
        added.sort(key=lambda token: token["id"])
        special = dataclasses.asdict(self._special) | {"end_ids": self.end_ids}
        return _hash([splitting, added, self._affixes]), _hash([whole, special])

    @property
    def has_chat_template(self) -> bool:
        """Whether the checkpoint says how a chat is written."""
        return bool(self._special.chat_template)

    def for_chat(self, system: str) -> HuggingFaceTokenizer:
        """The same tokenizer, for which a prompt is what a user says after the system's message.

        Raises:
          ValueError: its template takes no such messages.
        """
        special = dataclasses.replace(self._special, system=system)
        chat = HuggingFaceTokenizer(self._tokenizer, special, origin="the tokenizer")
        chat.encode_prompts(["text"])
        return chat

    def encode_prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, with the special tokens that belong around a prompt."""
        if self.is_chat:
            return list(self._encode([self._chat(text) for text in texts], False))
        return [self._around(ids) for ids in self._encode(texts, False)]

    def encode_responses(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, eos last."""
        return [[*ids, self.eos_id] for ids in self._encode(texts, False)]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids` up to the first that ends a response, without special tokens, padding and
        ids that stand for no token.
        """
        before_end = itertools.takewhile(lambda i: i not in self.end_ids, map(int, ids))
        left_out = (self.pad_id, self._special.unk_id)
        kept = [i for i in before_end if i not in left_out and 0 <= i < self.vocab_size]
        return self._tokenizer.decode(kept, skip_special_tokens=True)

    def save(self, directory: str) -> None:
        """Writes tokenizer.json and tokenizer_config.json, from which the same is loaded, here and
        by transformers.
        """
        os.makedirs(directory, exist_ok=True)
        special = self._special
        fields: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            **self._named(),
            _OWN: dataclasses.asdict(special),
        }
        for name in ("bos", "eos"):
            if getattr(special, f"prompt_{name}") is not None:
                fields[f"add_{name}_token"] = getattr(special, f"prompt_{name}")
        if special.chat_template:
            fields["chat_template"] = special.chat_template
        write_json(os.path.join(directory, SETTINGS_FILE), fields)
        write_text(os.path.join(directory, TOKENIZER_FILE), self._tokenizer.to_str())

    def _named(self) -> dict[str, str]:
        """Special tokens by the names that transformers has for them."""
        ids = {name: getattr(self._special, f"{name}_id") for name in ("eos", "pad", "bos", "unk")}
        tokens = {
            f"{name}_token": self._tokenizer.id_to_token(id)
            for name, id in ids.items()
            if id is not None
        }
        return {name: token for name, token in tokens.items() if token is not None}

    def _encode(self, texts: Sequence[str], special: bool) -> Iterator[list[int]]:
        for encoding in self._tokenizer.encode_batch(list(texts), add_special_tokens=special):
            yield encoding.ids

    def _around(self, ids: list[int]) -> list[int]:
        before, after = self._affixes
        bos_id = self._special.bos_id
        if before and before[-1] == bos_id and ids[:1] == [bos_id]:
            before = before[:-1]
        return [*before, *ids, *after]

    @functools.cached_property
    def _affixes(self) -> tuple[list[int], list[int]]:
        """What stands before and after the ids of a prompt."""
        (probe,) = self._encode(["a"], False)
        (whole,) = self._encode(["a"], True)
        start = next(i for i in range(len(whole)) if whole[i : i + len(probe)] == probe)
        before, after = whole[:start], whole[start + len(probe) :]
        bos_id = self._special.bos_id
        if self._wants_bos != self._has_bos and bos_id is not None:
            before = [bos_id, *before] if self._wants_bos else before[1:]
        if self._wants_eos != self._has_eos:
            after = [*after, self.eos_id] if self._wants_eos else after[:-1]
        return before, after

    def _chat(self, text: str) -> str:
        """A chat in which the user has said `text`, up to where the answer begins."""
        messages = [{"role": "user", "content": text}]
        if self._special.system:
            messages.insert(0, {"role": "system", "content": self._special.system})
        try:
            return self._templated.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # a template may raise anything
            raise ValueError(f"the chat template takes no such prompt: {one_line(error)}") from None

    @functools.cached_property
    def _templated(self) -> Any:
        with quiet():
            from transformers import PreTrainedTokenizerFast
        return PreTrainedTokenizerFast(
            tokenizer_object=self._tokenizer,
            chat_template=self._special.chat_template,
            **self._named(),
        )


def load(path: str) -> HuggingFaceTokenizer:
    """The tokenizer of a checkpoint's directory, or of a tokenizer.json and the files beside it.

    What ends a response are the ids of generation_config.json, or where it names none those of
    config.json, which is the order of transformers; and the tokenizer's own eos.

    Raises:
      ValueError: it cannot be read, or no file names an end-of-sequence token.
    """
    directory = path if os.path.isdir(path) else os.path.dirname(path)
    given = {
        name: read_json(file) if os.path.exists(file := os.path.join(directory, name)) else {}
        for name in (SETTINGS_FILE, GENERATION_FILE, MODEL_FILE)
    }
    file = os.path.join(directory, TOKENIZER_FILE) if os.path.isdir(path) else path
    if os.path.exists(file):
        content = _checked(file)
        if isinstance(own := given[SETTINGS_FILE].get(_OWN), dict):
            return HuggingFaceTokenizer(content, _own_special(own, file), origin=file)
    theirs = _read(directory, path, given)
    ends = _ends(given[GENERATION_FILE], GENERATION_FILE) or _ends(given[MODEL_FILE], MODEL_FILE)
    eos_id = theirs.eos_token_id
    if eos_id is None and ends:
        eos_id = ends[0]
    if eos_id is None:
        raise ValueError(
            f"{path}: no end-of-sequence token; expected an eos_token in {SETTINGS_FILE}, or an "
            f"eos_token_id in {GENERATION_FILE} or {MODEL_FILE} beside it"
        )
    settings, model = given[SETTINGS_FILE], given[MODEL_FILE]
    prompt_eos = settings.get("add_eos_token")
    if model.get("model_type") and prompt_eos is None:
        is_seq2seq = model["model_type"] in _ENCODER_DECODERS or model.get("is_encoder_decoder")
        prompt_eos = None if is_seq2seq else False
    template = theirs.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    special = Special(
        eos_id=eos_id,
        pad_id=theirs.pad_token_id,
        bos_id=theirs.bos_token_id,
        unk_id=theirs.unk_token_id,
        end_ids=tuple(ends),
        prompt_bos=settings.get("add_bos_token"),
        prompt_eos=prompt_eos,
        chat_template=template or "",
    )
    return HuggingFaceTokenizer(theirs.backend_tokenizer, special, origin=path)


def load_gguf(file: str) -> HuggingFaceTokenizer:
    """The tokenizer of a GGUF file.

    Raises:
      ValueError: it holds none, or one of an unknown kind.
    """
    tokenizer, found = gguf.read(file)
    special = Special(
        eos_id=found["eos_id"],
        pad_id=found["pad_id"],
        bos_id=found["bos_id"],
        prompt_bos=found["add_bos"],
        prompt_eos=False,
        chat_template=found["chat_template"] or "",
    )
    return HuggingFaceTokenizer(tokenizer, special, origin=file)


def _checked(file: str) -> tokenizers.Tokenizer:
    """A tokenizer.json, as it is."""
    try:
        with open(file, encoding="utf-8") as handle:
            return tokenizers.Tokenizer.from_str(handle.read())
    except OSError as error:
        raise ValueError(f"{file}: cannot read the tokenizer: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{file}: cannot read the tokenizer: expected UTF-8") from None
    except Exception as error:  # the library raises no narrower type
        raise ValueError(
            f"{file}: not a tokenizer of the tokenizers library: {one_line(error)}"
        ) from None


def _own_special(fields: dict[str, Any], file: str) -> Special:
    try:
        return Special(**{**fields, "end_ids": tuple(fields["end_ids"])})
    except (TypeError, KeyError):
        where = os.path.join(os.path.dirname(file), SETTINGS_FILE)
        raise ValueError(f"{where}: {_OWN}: not what this version writes: {fields}") from None


def _read(directory: str, path: str, given: dict[str, dict[str, Any]]) -> Any:
    """transformers' own tokenizer."""
    with quiet():
        from transformers import AutoTokenizer, GPT2Tokenizer, PreTrainedTokenizerFast

        kind: Any = AutoTokenizer
        options: dict[str, Any] = {}
        model_type = given[MODEL_FILE].get("model_type")
        if not os.path.isdir(path):
            kind, options = PreTrainedTokenizerFast, {"tokenizer_file": path}
        elif not model_type and "tokenizer_class" not in given[SETTINGS_FILE]:
            if os.path.exists(os.path.join(directory, TOKENIZER_FILE)):
                kind = PreTrainedTokenizerFast
            elif os.path.exists(os.path.join(directory, "vocab.json")):
                kind = GPT2Tokenizer  # as GPT-2's first releases are
            else:
                raise ValueError(
                    f"{path}: no {TOKENIZER_FILE}, and no {MODEL_FILE} with a model_type that says "
                    "how to read the other files"
                )
        elif is_bare(directory):
            options = {"extra_ids": sentinels(directory)}
        try:
            made = kind.from_pretrained(
                directory, local_files_only=True, trust_remote_code=False, **options
            )
        except Exception as error:  # the library raises anything
            raise ValueError(
                f"{path}: transformers cannot read the tokenizer: {one_line(error)}"
            ) from None
    backend = getattr(made, "backend_tokenizer", None)
    if not isinstance(backend, tokenizers.Tokenizer):
        raise ValueError(f"{path}: a {type(made).__name__}; expected a fast tokenizer")
    if not backend.get_vocab_size(with_added_tokens=False):
        raise ValueError(f"{path}: the tokenizer has no tokens; are some of its files missing?")
    return made


def is_bare(directory: str) -> bool:
    """Whether a SentencePiece model is all that a checkpoint says of its tokenizer."""
    names = set(os.listdir(directory))
    return sentencepiece.MODEL_FILE in names and not names & {
        TOKENIZER_FILE,
        SETTINGS_FILE,
        "special_tokens_map.json",
        "added_tokens.json",
    }


def sentinels(directory: str) -> int:
    """How many of T5's 100 sentinels a model has room for beside its SentencePiece pieces.

    A model that was trained here has none.
    """
    size = read_json(os.path.join(directory, MODEL_FILE)).get("vocab_size")
    pieces = sentencepiece.load(os.path.join(directory, sentencepiece.MODEL_FILE)).vocab_size
    return min(100, max(0, size - pieces)) if isinstance(size, int) else 100


def _ends(fields: dict[str, Any], file: str) -> list[int]:
    """The ids that a model's settings end a response with; -1 means none in older files."""
    ids = fields.get("eos_token_id")
    ids = ids if isinstance(ids, list) else [ids]
    for token in ids:
        if token is not None and type(token) is not int:
            raise ValueError(f"{file}: eos_token_id has {token!r}, expected ids")
    return [token for token in ids if token is not None and token >= 0]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps transformers from saying at its import that there is no PyTorch, which nobody needs."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _hash(known: Any) -> str:
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()
