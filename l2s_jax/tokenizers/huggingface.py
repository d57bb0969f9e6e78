"""A tokenizer of the `tokenizers` library, with what goes around prompts and ends responses."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import tokenizers

from l2s_jax import sealed
from l2s_jax.files import make_folder, write_json, write_text
from l2s_jax.messages import one_line
from l2s_jax.tokenizers.chats import ChatTemplate

TOKENIZER_FILE = "tokenizer.json"
SETTINGS_FILE = "tokenizer_config.json"
# In SETTINGS_FILE, what `HuggingFaceTokenizer.save` adds for `reading.load`.
OWN = "l2s_jax"
# SentencePiece's space.
_SPACE = "▁"
# There may be so many ids for each token, and a few more, before they fill memory.
_SPARSE, _FEW = 4, 1 << 16


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
    options: of a chat: values of other names that the template looks at.
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
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


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
        ids = tokenizer.get_vocab().values()
        self.vocab_size = max(ids, default=-1) + 1
        # There is a list with a place for each id.
        if self.vocab_size > _SPARSE * len(ids) + _FEW:
            raise ValueError(
                f"{origin}: an id {self.vocab_size - 1} among {len(ids)} tokens; expected ids that "
                "follow one another"
            )
        if len(set(ids)) < len(ids):
            raise ValueError(f"{origin}: two tokens of one id")
        self.eos_id = special.eos_id
        self.pad_id = self.eos_id if special.pad_id is None else special.pad_id
        self.end_ids = tuple(sorted({self.eos_id, *special.end_ids}))
        self.is_chat = special.system is not None
        for name in ("eos_id", "pad_id", "bos_id", "unk_id"):
            value = getattr(special, name)
            if value is not None and not 0 <= value < self.vocab_size:
                raise ValueError(
                    f"{origin}: {name} is {value}, not below the {self.vocab_size} ids"
                )
        if self.end_ids[-1] >= self.vocab_size or self.end_ids[0] < 0:
            raise ValueError(
                f"{origin}: responses end with {list(self.end_ids)}, of which one is none of the "
                f"{self.vocab_size} ids"
            )
        # What the post-processor adds by itself.
        self._empty = empty = tokenizer.encode("").ids
        bos_id = special.bos_id
        self._has_bos = bos_id is not None and empty[:1] == [bos_id]
        self._has_eos = empty[-1:] == [self.eos_id]
        if bos_id == self.eos_id and len(empty) == 1:
            self._has_eos = False
        wants = special.prompt_bos if bos_id is not None else None
        self._wants_bos = self._has_bos if wants is None else wants
        self._wants_eos = self._has_eos if special.prompt_eos is None else special.prompt_eos
        # A post-processor may leave out the text, or have ids of its own.
        around = self._around([])
        if not 0 <= min(around, default=0) <= max(around, default=0) < self.vocab_size:
            raise ValueError(
                f"{origin}: the ids {around} go around a prompt, of which one is none of the "
                f"{self.vocab_size}"
            )

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
        content = json.loads(self._tokenizer.to_str())
        splitting = [content[name] for name in ("normalizer", "pre_tokenizer", "model")]
        # Whether a token is special decides what decoding leaves out, not how text is split.
        added = [{**token, "special": None} for token in content["added_tokens"]]
        added.sort(key=lambda token: token["id"])
        special = dataclasses.asdict(self._special) | {"end_ids": self.end_ids}
        return _hash([splitting, added, self._affixes]), _hash([content, special])

    @property
    def pieces(self) -> list[str]:
        """Of each id, its text as the vocabulary has it; "" of an id that stands for none."""
        return self._pieces

    @functools.cached_property
    def _pieces(self) -> list[str]:
        pieces = [self._tokenizer.id_to_token(id) or "" for id in range(self.vocab_size)]
        for id, token in self._tokenizer.get_added_tokens_decoder().items():
            # One that is added is text as it is: here it is written as the others are.
            if not token.special:
                pieces[id] = self._written(token.content)
        return pieces

    def _written(self, text: str) -> str:
        """Text in the characters that the vocabulary's own pieces have."""
        if self._is_byte_level:
            by_bytes = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
            return "".join(piece for piece, _ in by_bytes.pre_tokenize_str(text))
        has_space = self._tokenizer.token_to_id(_SPACE) is not None
        return text.replace(" ", _SPACE) if has_space else text

    @functools.cached_property
    def _is_byte_level(self) -> bool:
        """Whether a character of a piece stands for a byte, as GPT-2 has it."""
        decoder = json.loads(self._tokenizer.to_str())["decoder"] or {}
        parts = [decoder, *decoder.get("decoders", ())]
        return any(part["type"] == "ByteLevel" for part in parts)

    @property
    def special_ids(self) -> list[int]:
        """Ids that stand for no text, ascending."""
        added = self._tokenizer.get_added_tokens_decoder()
        marked = {id for id, token in added.items() if token.special}
        named = {getattr(self._special, f"{name}_id") for name in ("pad", "bos", "unk")}
        return sorted({*marked, *self.end_ids, *(named - {None})})

    @property
    def has_chat_template(self) -> bool:
        """Whether the checkpoint says how a chat is written."""
        return bool(self._special.chat_template)

    def for_chat(
        self, system: str, options: Mapping[str, Any], *, repeatable: bool = True
    ) -> HuggingFaceTokenizer:
        """The same tokenizer, for which a prompt is what a user says after the system's message.

        `options`: values of other names that the chat template looks at.

        Raises:
          ValueError: its template takes no such messages, or, where they are to be `repeatable`,
            writes the date of today.
        """
        special = dataclasses.replace(self._special, system=system, options=dict(options))
        chat = HuggingFaceTokenizer(self._tokenizer, special, origin="the tokenizer")
        chat.encode_prompts(["text"])
        if repeatable:
            chat._template.check_repeatable(chat._chat("text"))
        return chat

    def encode_prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, with the special tokens that belong around a prompt."""
        if self.is_chat:
            chats = [self._template.write(self._chat(text)) for text in texts]
            return list(self._encode(chats, False))
        return [self._around(ids) for ids in self._encode(texts, False)]

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Ids of a chat, {"role", "content"} each, up to where the answer begins.

        Raises:
          ValueError: the chat template takes no such messages.
        """
        (ids,) = self._encode([self._template.write(messages)], False)
        return ids

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
        make_folder(directory)
        special = self._special
        fields: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            **self._named(),
            OWN: dataclasses.asdict(special),
        }
        for name in ("bos", "eos"):
            if getattr(special, f"prompt_{name}") is not None:
                fields[f"add_{name}_token"] = getattr(special, f"prompt_{name}")
        if special.chat_template:
            fields["chat_template"] = special.chat_template
        with sealed.writing(directory, SETTINGS_FILE, TOKENIZER_FILE):
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
        # A text that the tokenizer knows: one without "a" and without unk makes nothing of it.
        texts = ("a", *self._tokenizer.get_vocab(with_added_tokens=False))
        text = next((text for text in texts if self._tokenizer.encode(text).ids != self._empty), "")
        (probe,) = self._encode([text], False)
        (whole,) = self._encode([text], True)
        starts = (i for i in range(len(whole)) if whole[i : i + len(probe)] == probe)
        if (start := next(starts, None)) is None:
            raise ValueError("its post-processor leaves out the text")
        before, after = whole[:start], whole[start + len(probe) :]
        bos_id = self._special.bos_id
        if self._wants_bos != self._has_bos and bos_id is not None:
            before = [bos_id, *before] if self._wants_bos else before[1:]
        if self._wants_eos != self._has_eos:
            after = [*after, self.eos_id] if self._wants_eos else after[:-1]
        return before, after

    def _chat(self, text: str) -> list[dict[str, str]]:
        """What is said where the user says `text`."""
        messages = [{"role": "user", "content": text}]
        if self._special.system:
            messages.insert(0, {"role": "system", "content": self._special.system})
        return messages

    @functools.cached_property
    def _template(self) -> ChatTemplate:
        special = self._special
        return ChatTemplate(special.chat_template, special.options, self._tokenizer, self._named())


@contextlib.contextmanager
def refused(where: str, what: str) -> Iterator[None]:
    """Has what the library raises within be a ValueError, which says `where` and `what`.

    It has no narrower type than Exception, and its Rust code, where it gives up, none of even that.
    """
    try:
        yield
    except (ValueError, KeyboardInterrupt, SystemExit) as error:
        if isinstance(error, ValueError) and where not in str(error):
            raise ValueError(f"{where}: {what}: {one_line(error)}") from None
        raise
    except BaseException as error:
        raise ValueError(f"{where}: {what}: {one_line(error)}") from None


def _hash(known: Any) -> str:
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()
