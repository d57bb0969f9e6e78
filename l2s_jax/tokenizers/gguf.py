"""The tokenizer in a GGUF file, as a model of the `tokenizers` library.

Facts about vocabularies are llama.cpp's (src/llama-vocab.cpp), which writes these files.
"""

from __future__ import annotations

from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from l2s_jax.gguf_file import Header, read_header
from l2s_jax.tokenizers import pipelines
from l2s_jax.tokenizers.pipelines import LONGEST, UNKNOWN, UNUSED

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace("{1,3}", "")
# How text is split before merges, by tokenizer.ggml.pre: GPT-2's way, the same after each digit, or
# by an expression.
_GPT2, _DIGITS = "gpt2", "digits"
_SPLITS = {
    **dict.fromkeys(("gpt-2", "phi-2", "olmo", "jais", "mpt"), _GPT2),
    **dict.fromkeys(("smollm", "starcoder", "refact", "codeshell", "command-r"), _DIGITS),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "smaug-bpe", "falcon3"), _LLAMA3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), _QWEN2),
}


def read(path: str) -> tuple[Tokenizer, dict[str, Any]]:
    """The tokenizer of a GGUF file, and what goes with it.

    Returns:
      The tokenizer, which adds no special token by itself, and {"eos_id", "bos_id", "pad_id",
      "turn_id", "message_id", "add_bos", "chat_template"}: ids or None, the last two of what ends a
      turn of a chat and a message in it; whether a prompt begins with bos; a text or None.

    Raises:
      ValueError: the file can't be read, or holds no tokenizer of a kind that is known.
    """
    header = read_header(path, strings=True)
    kind = header.string("tokenizer.ggml.model")
    tokens = header.get("tokenizer.ggml.tokens", list)
    if not tokens:
        raise ValueError(f"{path}: holds no tokenizer")
    if kind not in ("gpt2", "llama"):
        raise ValueError(
            f"{path}: tokenizer.ggml.model is {kind!r}, which is not read; expected gpt2 or llama"
        )
    kinds = header.get("tokenizer.ggml.token_type", list, [])
    if len(kinds) > len(tokens):
        raise ValueError(f"{path}: tokenizer.ggml.token_type: {len(kinds)} of {len(tokens)} tokens")
    kinds = kinds + [1] * (len(tokens) - len(kinds))
    if not all(isinstance(token, str) and len(token) <= LONGEST for token in tokens):
        raise ValueError(
            f"{path}: tokenizer.ggml.tokens: expected texts of at most {LONGEST} characters"
        )
    make = _byte_level if kind == "gpt2" else _sentencepiece
    tokenizer = make(header, tokens, kinds)
    pipelines.mark(tokenizer, tokens, kinds)
    ids = {
        name: _token(header, f"tokenizer.ggml.{theirs}_token_id", len(tokens))
        for name, theirs in (
            ("eos_id", "eos"),
            ("bos_id", "bos"),
            ("pad_id", "padding"),
            ("turn_id", "eot"),
            ("message_id", "eom"),
        )
    }
    if ids["eos_id"] is None:
        raise ValueError(f"{path}: no tokenizer.ggml.eos_token_id, the end of a sequence")
    adds_bos = kind == "llama" or _SPLITS.get(header.string("tokenizer.ggml.pre")) == _LLAMA3
    return tokenizer, {
        **ids,
        "add_bos": header.get("tokenizer.ggml.add_bos_token", bool, adds_bos),
        "chat_template": header.string("tokenizer.chat_template") or None,
    }


def _token(header: Header, key: str, count: int) -> int | None:
    value = header.integer(key)
    if value is not None and not 0 <= value < count:
        raise ValueError(f"{header.path}: {key} is {value}, not below the {count} tokens")
    return value


def _byte_level(header: Header, tokens: list[str], kinds: list[int]) -> Tokenizer:
    """GPT-2's kind."""
    pre = header.string("tokenizer.ggml.pre")
    if pre not in _SPLITS:
        raise ValueError(
            f"{header.path}: tokenizer.ggml.pre is {pre!r}, a way to split text that is not known; "
            f"expected one of {', '.join(_SPLITS)}"
        )
    merges = [
        pair
        for merge in header.get("tokenizer.ggml.merges", list, [])
        if len(pair := tuple(merge.split(" "))) == 2
    ]
    # Converters fill a vocabulary up with unused entries, to as many as the embedding has rows.
    vocabulary = {t: i for i, (t, k) in enumerate(zip(tokens, kinds, strict=True)) if k != UNUSED}
    split = _SPLITS[pre]
    model = models.BPE(vocab=vocabulary, merges=merges, ignore_merges=split == _LLAMA3)
    tokenizer = Tokenizer(model)
    if split == _QWEN2:
        tokenizer.normalizer = normalizers.NFC()
    by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split in (_GPT2, _DIGITS))
    first = {
        _GPT2: [],
        _DIGITS: [pre_tokenizers.Digits(individual_digits=True)],
    }.get(split, [pre_tokenizers.Split(Regex(split), behavior="isolated")])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*first, by_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(header: Header, tokens: list[str], kinds: list[int]) -> Tokenizer:
    """Llama 1 and 2's: SentencePiece's BPE, with a piece for each byte."""
    scores = header.get("tokenizer.ggml.scores", list)
    if not scores or len(scores) != len(tokens):
        raise ValueError(f"{header.path}: tokenizer.ggml.scores: expected one for each token")
    unknown = header.integer("tokenizer.ggml.unknown_token_id")
    if unknown is None:
        unknown = kinds.index(UNKNOWN) if UNKNOWN in kinds else 0
    if not 0 <= unknown < len(tokens):
        raise ValueError(f"{header.path}: tokenizer.ggml.unknown_token_id is {unknown}")
    spaced = header.get("tokenizer.ggml.add_space_prefix", bool, True)
    return pipelines.from_pieces(tokens, scores, unknown, prefix=spaced)
