"""How text becomes ids and ids text, as the file of a checkpoint says that defines it.

Of transformers, classes such as GPT2Tokenizer and T5Tokenizer take the vocabulary from that file
and make all else anew, as the first model of their family had it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import sentencepiece as spm
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers

from l2s_jax.messages import shown

# Kinds of pieces, as SentencePiece and llama.cpp number them.
UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 2, 3, 4, 5
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
# Of a piece, in characters: every way to cut one in two is looked at.
LONGEST = 1024
# Texts in which tokenizers differ that are not the same.
_TEXTS = (
    "Hello world",
    " a  b ",
    "Steps:\n\n1. Mix.\r\n2.\tBake 3.14 or 12345.\n",
    "don't, Cafe\u0301 naïve ﬁ Ａ½",
    "one 🙂🙃 ☃ two 漢字 \u1680 three",
    "<x> {y} [z] |~^_`\\",
)


def of_file(file: Tokenizer, theirs: Tokenizer, *, after: Any) -> Tokenizer:
    """The tokenizer of a tokenizer.json, as it is.

    It is `theirs`, of transformers' class, where that is the same but for its spelling: so the
    hashes of both stay what they were. `after` is the post-processor of the file; where it has
    none, the class's counts. (A class may have tokens that the model of the file has no room for.)
    """
    if after is None and file.get_vocab() == theirs.get_vocab():
        file.post_processor = theirs.post_processor
    return theirs if _same(file, theirs) else file


def of_sentencepiece(path: str, theirs: Tokenizer) -> Tokenizer:
    """One that gives the ids and the text which SentencePiece gives with the model at `path`.

    It is `theirs`, of transformers' class, where that does.

    Raises:
      ValueError: the tokenizers library has none.
    """
    try:
        processor = spm.SentencePieceProcessor(model_file=path)
    except (RuntimeError, OSError):
        return theirs  # tiktoken's vocabularies have such names too
    proto = _read_proto(path)
    marked = [piece.piece for piece in proto.pieces if piece.type == USER_DEFINED]
    texts = [*_TEXTS, *(f"a {piece} b{piece}c" for piece in marked)]
    if _difference(processor, theirs, texts) is None:
        return theirs
    made = _from_proto(proto, processor)
    _add_missing(made, theirs)
    own = made.get_vocab()
    if any(own.get(token) != id for token, id in theirs.get_vocab().items()):
        return theirs  # the class numbers tokens in an order of its own, as XLM-R's does
    made.post_processor = theirs.post_processor
    if (text := _difference(processor, made, texts)) is not None:
        raise ValueError(
            f"{path}: SentencePiece makes other tokens of {shown(text)} than the tokenizers "
            "library, which cannot split text as this model does; expected a tokenizer.json "
            "beside it"
        )
    return made


def from_pieces(
    pieces: Sequence[str],
    scores: Sequence[float],
    unknown: int,
    *,
    is_bpe: bool = True,
    byte_fallback: bool = True,
    prefix: bool = True,
    forms: Sequence[Any] = (),
) -> Tokenizer:
    """SentencePiece's way to split text.

    Args:
      pieces, scores: the vocabulary, in the order of ids.
      unknown: id of what stands for a character that the vocabulary lacks.
      is_bpe: whether pieces are merged; else the likeliest are found (unigram).
      byte_fallback: whether such a character is written in bytes.
      prefix: whether a text begins with a space more.
      forms: normalizers of the text before its spaces are marked.
    """
    if is_bpe:
        vocabulary = {piece: i for i, piece in enumerate(pieces)}
        model = models.BPE(
            vocab=vocabulary,
            merges=_merges(vocabulary, scores),
            unk_token=pieces[unknown],
            fuse_unk=True,
            byte_fallback=byte_fallback,
        )
    else:
        scored = list(zip(pieces, scores, strict=True))
        model = models.Unigram(scored, unk_id=unknown, byte_fallback=byte_fallback)
    tokenizer = Tokenizer(model)
    before = [normalizers.Prepend(_SPACE)] if prefix else []
    spaced = [*forms, *before, normalizers.Replace(" ", _SPACE)]
    tokenizer.normalizer = normalizers.Sequence(spaced)
    after = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *after]
    )
    return tokenizer


def mark(tokenizer: Tokenizer, tokens: Sequence[str], kinds: Sequence[int]) -> None:
    """Marks tokens that text never makes of pieces: special ones, and those that users added."""
    for special, wanted in ((True, CONTROL), (False, USER_DEFINED)):
        chosen = [
            AddedToken(token, special=special, normalized=False)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind == wanted and token
        ]
        if special:
            tokenizer.add_special_tokens(chosen)
        else:
            tokenizer.add_tokens(chosen)


def _merges(vocabulary: dict[str, int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """Every way to make a piece of two others, the pieces of the highest scores first."""
    found = []
    for piece, number in vocabulary.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocabulary and right in vocabulary:
                found.append((-scores[number], vocabulary[left], vocabulary[right], left, right))
    return [(left, right) for *_, left, right in sorted(found)]


def _read_proto(path: str) -> Any:
    """What a SentencePiece model says of itself; its own library tells only a part."""
    from sentencepiece import sentencepiece_model_pb2

    formats: Any = sentencepiece_model_pb2
    proto = formats.ModelProto()
    with open(path, "rb") as file:
        proto.ParseFromString(file.read())
    return proto


def _from_proto(proto: Any, processor: spm.SentencePieceProcessor) -> Tokenizer:
    trained, text = proto.trainer_spec, proto.normalizer_spec
    charsmap = text.precompiled_charsmap
    forms: list[Any] = [normalizers.Precompiled(charsmap)] if charsmap else []
    if charsmap and processor.encode("a\r\nb") == processor.encode("a\n\nb"):
        # Precompiled takes the two for one character, and forgets the second.
        forms.insert(0, normalizers.Replace("\r\n", "\n\n"))
    if text.remove_extra_whitespaces:
        forms += [
            normalizers.Replace(Regex(r"\A +| +\z"), ""),
            normalizers.Replace(Regex(" {2,}"), " "),
        ]
    pieces = [piece.piece for piece in proto.pieces]
    if max(map(len, pieces)) > LONGEST:
        raise ValueError(f"a piece of more than {LONGEST} characters")
    tokenizer = from_pieces(
        pieces,
        [piece.score for piece in proto.pieces],
        trained.unk_id,
        is_bpe=trained.model_type == trained.BPE,
        byte_fallback=trained.byte_fallback,
        prefix=text.add_dummy_prefix,
        forms=forms,
    )
    mark(tokenizer, pieces, [piece.type for piece in proto.pieces])
    return tokenizer


def _difference(
    processor: spm.SentencePieceProcessor, tokenizer: Tokenizer, texts: Sequence[str]
) -> str | None:
    """The first text that SentencePiece splits or writes in another way; None where there is none.

    (It writes marks of its own for what it doesn't know.)
    """
    for text in texts:
        ids = processor.encode(text)
        if tokenizer.encode(text, add_special_tokens=False).ids != ids:
            return text
        back = tokenizer.decode(ids, skip_special_tokens=False)
        if processor.unk_id() not in ids and back != processor.decode(ids):
            return text
    return None


def _add_missing(made: Tokenizer, theirs: Tokenizer) -> None:
    own = {token.content for token in made.get_added_tokens_decoder().values()}
    for _, token in sorted(theirs.get_added_tokens_decoder().items()):
        if token.content not in own:
            made.add_tokens([token])


def _same(a: Tokenizer, b: Tokenizer) -> bool:
    """Whether two differ at most in what decides neither ids nor text."""
    return _bare(a) == _bare(b) and all(a.encode(text).ids == b.encode(text).ids for text in _TEXTS)


def _bare(tokenizer: Tokenizer) -> Any:
    """What a tokenizer.json says but for its post-processor, in one spelling."""
    content = json.loads(tokenizer.to_str())
    model = {name: None if value == "" else value for name, value in content["model"].items()}
    if isinstance(scored := model["vocab"], list):
        # The library's parser is not exact in a number's last digit.
        model["vocab"] = [(piece, round(score, 6)) for piece, score in scored]
    return (
        content["normalizer"],
        _without(content["pre_tokenizer"], ("trim_offsets",)),
        _without(content["decoder"], ("trim_offsets", "add_prefix_space", "use_regex")),
        model,
        content["added_tokens"],
    )


def _without(part: Any, names: Sequence[str]) -> Any:
    """A part without the fields that decide nothing there."""
    if isinstance(part, list):
        return [_without(one, names) for one in part]
    if isinstance(part, dict):
        return {name: _without(one, names) for name, one in part.items() if name not in names}
    return part
