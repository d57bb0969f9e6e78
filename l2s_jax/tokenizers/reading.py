"""Tokenizers of checkpoints.

A tokenizer.json or a SentencePiece model says how text is split, and transformers what goes with
it: which tokens are special, the chat template, tokens that were added.
"""

from __future__ import annotations

import contextlib
import os
from typing import Any

import tokenizers

from l2s_jax import sealed
from l2s_jax.files import json_object, read_json
from l2s_jax.messages import one_line, shown
from l2s_jax.tokenizers import gguf, pipelines, sentencepiece
from l2s_jax.tokenizers.chats import quiet
from l2s_jax.tokenizers.huggingface import (
    OWN,
    SETTINGS_FILE,
    TOKENIZER_FILE,
    HuggingFaceTokenizer,
    Special,
    refused,
)

GENERATION_FILE = "generation_config.json"
MODEL_FILE = "config.json"
_ENCODER_DECODERS = ("t5", "mt5", "umt5")
# Classes whose prompts begin with bos unless their settings say otherwise. (Where the vocabulary is
# all that there is, transformers 5 leaves it out.)
_BEGUN = ("LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer")


def load(path: str) -> HuggingFaceTokenizer:
    """The tokenizer of a checkpoint's directory, or of a tokenizer.json and the files beside it.

    What ends a response are the ids of generation_config.json, or where it names none those of
    config.json, which is the order of transformers; and the tokenizer's own eos.

    Raises:
      ValueError: it cannot be read, or no file names an end-of-sequence token.
    """
    with refused(path, "not readable as a tokenizer"):
        return _load(path)


def _load(path: str) -> HuggingFaceTokenizer:
    directory = path if os.path.isdir(path) else os.path.dirname(path)
    sealed.check(*(os.path.join(directory, name) for name in (SETTINGS_FILE, TOKENIZER_FILE)))
    given = {
        name: read_json(file) if os.path.exists(file := os.path.join(directory, name)) else {}
        for name in (SETTINGS_FILE, GENERATION_FILE, MODEL_FILE)
    }
    file = os.path.join(directory, TOKENIZER_FILE) if os.path.isdir(path) else path
    content = _checked(file) if os.path.exists(file) else None
    if content is not None:
        own = given[SETTINGS_FILE].get(OWN)
        if own is not None and not isinstance(own, dict):
            where = os.path.join(directory, SETTINGS_FILE)
            raise ValueError(f"{where}: {OWN} is {shown(own)}, expected an object")
        if own is not None:
            return HuggingFaceTokenizer(content, _own_special(own, file), origin=file)
    theirs, made = _read(directory, path, given, content)
    ends = next((ids for name in (GENERATION_FILE, MODEL_FILE) if (ids := _ends(given[name]))), [])
    named = {
        name: None if token is None else made.token_to_id(str(token))
        for name in ("eos", "pad", "bos", "unk")
        for token in (getattr(theirs, f"{name}_token"),)
    }
    eos_id = named["eos"]
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
    prompt_bos = settings.get("add_bos_token")
    if content is None and prompt_bos is None:
        names = (str(settings.get("tokenizer_class")), type(theirs).__name__)
        prompt_bos = any(name.removesuffix("Fast") in _BEGUN for name in names) or None
    template = theirs.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    special = Special(
        eos_id=eos_id,
        pad_id=named["pad"],
        bos_id=named["bos"],
        unk_id=named["unk"],
        end_ids=tuple(ends),
        prompt_bos=prompt_bos,
        prompt_eos=prompt_eos,
        chat_template=template or "",
    )
    _check(special, path)
    return HuggingFaceTokenizer(made, special, origin=path)


def load_gguf(file: str) -> HuggingFaceTokenizer:
    """The tokenizer of a GGUF file.

    Raises:
      ValueError: it holds none, or one of an unknown kind.
    """
    with refused(file, "not a tokenizer"):
        return _load_gguf(file)


def _load_gguf(file: str) -> HuggingFaceTokenizer:
    tokenizer, found = gguf.read(file)
    special = Special(
        eos_id=found["eos_id"],
        pad_id=found["pad_id"],
        bos_id=found["bos_id"],
        end_ids=tuple(found[k] for k in ("turn_id", "message_id") if found[k] is not None),
        prompt_bos=found["add_bos"],
        prompt_eos=False,
        chat_template=found["chat_template"] or "",
    )
    return HuggingFaceTokenizer(tokenizer, special, origin=file)


def _checked(file: str) -> tokenizers.Tokenizer:
    """A tokenizer.json, as it is."""
    try:
        with open(file, encoding="utf-8-sig") as handle:
            content = handle.read()
    except OSError as error:
        raise ValueError(f"{file}: cannot read the tokenizer: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{file}: cannot read the tokenizer: expected UTF-8") from None
    # (The library's own parser follows what nests for ever as far as its stack goes.)
    what = "not a tokenizer of the tokenizers library"
    fields = json_object(content, f"{file}: {what}")
    with refused(file, what):
        _check_pieces(fields)
        return tokenizers.Tokenizer.from_str(content)


def _check_pieces(fields: dict[str, Any]) -> None:
    """Raises a ValueError where the library's Rust code would give up, and print where it did."""
    model, after = fields.get("model"), fields.get("post_processor")
    if isinstance(model, dict) and isinstance(pieces := model.get("vocab"), dict):
        prefix = model.get("continuing_subword_prefix") or ""
        for merge in model.get("merges") or ():
            left, right = merge.split(" ") if isinstance(merge, str) else merge
            if not {left, right, left + right.removeprefix(prefix)} <= pieces.keys():
                raise ValueError(f"the merge {shown(merge)} is not of tokens")
    steps = after.get("processors") if isinstance(after, dict) else None
    for step in steps if isinstance(steps, list) else (after,):
        if not isinstance(step, dict) or step.get("type") != "TemplateProcessing":
            continue
        named = step.get("special_tokens")
        for part in (*step.get("single", ()), *step.get("pair", ())):
            id = part.get("SpecialToken", {}).get("id") if isinstance(part, dict) else None
            if id is not None and id not in named:
                raise ValueError(f"its post-processor puts {shown(id)}, which it has no ids of")


def _own_special(fields: dict[str, Any], file: str) -> Special:
    where = os.path.join(os.path.dirname(file), SETTINGS_FILE)
    try:
        special = Special(**{**fields, "end_ids": tuple(fields["end_ids"])})
    except (TypeError, KeyError):
        given = shown(fields)
        raise ValueError(f"{where}: {OWN}: not what this version writes: {given}") from None
    _check(special, where)
    return special


def _check(special: Special, where: str) -> None:
    """Raises a ValueError where a field of what a file says is of another type."""
    id = (int, type(None))
    kinds: dict[str, tuple[type, ...]] = {
        **dict.fromkeys(("pad_id", "bos_id", "unk_id"), id),
        "eos_id": (int,),
        "prompt_bos": (bool, type(None)),
        "prompt_eos": (bool, type(None)),
        "chat_template": (str,),
        "system": (str, type(None)),
        "options": (dict,),
    }
    for name, kind in kinds.items():
        value = getattr(special, name)
        if type(value) not in kind:
            raise ValueError(f"{where}: {name} is {shown(value)}, expected another type")
        if isinstance(value, str):
            value.encode()  # half a character is a ValueError
    for id in special.end_ids:
        if type(id) is not int or not 0 <= id < 2**31:
            raise ValueError(f"{where}: an id of {shown(id)} that ends a response")


def _read(
    directory: str,
    path: str,
    given: dict[str, dict[str, Any]],
    content: tokenizers.Tokenizer | None,
) -> tuple[Any, tokenizers.Tokenizer]:
    """transformers' own tokenizer, for the names of special tokens, and what splits text.

    `content` is what is in a tokenizer.json, None where there is none.
    """
    model_type = given[MODEL_FILE].get("model_type")
    is_named = bool(model_type) or "tokenizer_class" in given[SETTINGS_FILE]
    if content is None and not is_named and not os.path.exists(f"{directory}/vocab.json"):
        raise ValueError(
            f"{path}: no {TOKENIZER_FILE}, and no {MODEL_FILE} with a model_type that says "
            "how to read the other files"
        )
    with quiet():
        if content is None:
            theirs, made = _read_vocabulary(directory, path, is_named)
        else:
            theirs, made = _read_file(path, is_named, content.post_processor)
    if not made.get_vocab_size(with_added_tokens=False):
        raise ValueError(f"{path}: the tokenizer has no tokens; are some of its files missing?")
    return theirs, made


def _read_file(path: str, is_named: bool, after: Any) -> tuple[Any, tokenizers.Tokenizer]:
    """As `_read`, of a tokenizer.json whose post-processor is `after`."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    file = os.path.join(path, TOKENIZER_FILE) if os.path.isdir(path) else path
    theirs: Any = None
    if is_named and os.path.basename(file) == TOKENIZER_FILE:
        # A class may not take what the file has; what it would add is then not needed.
        with contextlib.suppress(ValueError):
            theirs = _fast(AutoTokenizer, path)
    if type(theirs) is PreTrainedTokenizerFast:
        return theirs, theirs.backend_tokenizer
    plain = _fast(PreTrainedTokenizerFast, path, tokenizer_file=file)
    if theirs is None:
        return plain, plain.backend_tokenizer
    return theirs, pipelines.of_file(plain.backend_tokenizer, theirs.backend_tokenizer, after=after)


def _read_vocabulary(directory: str, path: str, is_named: bool) -> tuple[Any, tokenizers.Tokenizer]:
    """As `_read`, where there is no tokenizer.json."""
    from transformers import AutoTokenizer, GPT2Tokenizer

    # GPT-2's first releases name nothing.
    kind: Any = AutoTokenizer if is_named else GPT2Tokenizer
    bare = {"extra_ids": sentinels(directory)} if is_named and is_bare(directory) else {}
    theirs = _fast(kind, path, **bare)
    file = getattr(theirs, "vocab_file", None)
    if not isinstance(file, str) or not file.endswith(".model"):
        return theirs, theirs.backend_tokenizer
    return theirs, pipelines.of_sentencepiece(file, theirs.backend_tokenizer)


def _fast(kind: Any, path: str, **options: Any) -> Any:
    directory = path if os.path.isdir(path) else os.path.dirname(path) or "."
    try:
        made = kind.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False, **options
        )
    except Exception as error:  # the library raises anything
        raise ValueError(
            f"{path}: transformers cannot read the tokenizer: {one_line(error)}"
        ) from None
    if not isinstance(getattr(made, "backend_tokenizer", None), tokenizers.Tokenizer):
        raise ValueError(f"{path}: a {type(made).__name__}; expected a fast tokenizer")
    return made


def is_own(directory: str) -> bool:
    """Whether a SentencePiece model beside a T5 of transformers' format was trained here.

    Version 0.1 wrote it alone, for models with no room for more than its pieces.
    """
    settings, file = (os.path.join(directory, name) for name in (SETTINGS_FILE, TOKENIZER_FILE))
    if os.path.exists(settings):
        own = read_json(settings).get(OWN)
        return isinstance(own, dict) and "file" in own and not os.path.exists(file)
    return is_bare(directory) and not sentinels(directory)


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


def _ends(fields: dict[str, Any]) -> list[int]:
    """The ids that a model's settings end a response with; -1 means none in older files."""
    ids = fields.get("eos_token_id")
    ids = ids if isinstance(ids, list) else [ids]
    for token in ids:
        if token is not None and type(token) is not int:
            raise ValueError(f"eos_token_id has {shown(token)}, expected ids")
    return [token for token in ids if token is not None and token >= 0]
