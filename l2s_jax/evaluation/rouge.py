"""ROUGE as rouge-score computes it, and for scripts that its tokenizer drops.

That tokenizer keeps a-z and 0-9 alone, so that two equal Russian sentences score 0. Where a
reference is mostly in another script than the Latin one, words of all scripts are kept instead.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

_SENTENCE_END = re.compile(
    # A space follows where a script has spaces.
    r"(?<=[.!?\u0964\u06d4\u061f])([\"'\u2019\u201d)\]]*)[ \t]+"
    r"|(?<=[\u3002\uff01\uff1f])([\"'\u2019\u201d)\]\u300d\u300f\uff09]*)[ \t]*(?=.)"
)
# Scripts without spaces between words: each character counts as one.
_SPACELESS = (
    *("CJK", "HIRAGANA", "KATAKANA", "HALFWIDTH KATAKANA", "IDEOGRAPHIC"),
    *("THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN"),
)
_LATIN = "latin"
_OTHER = "other"
_ALONE = "alone"
_MARK = "mark"
_NONE = ""


def scores(
    names: Sequence[str], predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> dict[str, list[float]]:
    """The F-measure of each example, 0 to 100, with its best reference.

    Porter stemming is on. ROUGE-Lsum compares sentence by sentence, see `split_sentences`.
    """
    # rouge-score imports nltk, which takes a second that most commands need not spend.
    from rouge_score.rouge_scorer import RougeScorer

    tokenizer = _AllScripts() if needs_all_scripts(references) else None
    scorer = RougeScorer(names, use_stemmer=True, tokenizer=tokenizer)
    # Newlines change nothing for the other ROUGE metrics: the tokenizers drop them.
    results = [
        scorer.score_multi([split_sentences(r) for r in group], split_sentences(prediction))
        for prediction, group in zip(predictions, references, strict=True)
    ]
    return {name: [100.0 * r[name].fmeasure for r in results] for name in names}


def split_sentences(text: str) -> str:
    """Puts each sentence on its own line, the form that ROUGE-Lsum expects.

    A sentence ends at a newline, or at `.`, `!`, `?` or what other scripts have for these (closing
    quotes and brackets may follow), before a space or a tab if the script has spaces. Abbreviations
    are not recognized.
    """
    return _SENTENCE_END.sub(lambda end: f"{end[1] or end[2] or ''}\n", text)


def needs_all_scripts(references: Iterable[Sequence[str]]) -> bool:
    """Whether a reference has more letters of other scripts than of the Latin one."""
    return any(_counts(text)[0] * 2 > _counts(text)[1] for group in references for text in group)


def has_no_spaces(references: Iterable[Sequence[str]]) -> bool:
    """Whether most letters are of scripts that put no spaces between words."""
    kinds = [_kind(c) for group in references for text in group for c in text if not c.isascii()]
    letters = sum(_counts(text)[1] for group in references for text in group)
    return kinds.count(_ALONE) * 2 > letters


def _counts(text: str) -> tuple[int, int]:
    """(letters and digits that are not Latin, all of them)."""
    kinds = [_LATIN if c.isascii() else _kind(c) for c in text if c.isalnum()]
    return len(kinds) - kinds.count(_LATIN), len(kinds)


@functools.lru_cache(maxsize=1 << 16)
def _kind(character: str) -> str:
    """What the tokenizer does with a character that rouge-score's would drop."""
    category, name = unicodedata.category(character), unicodedata.name(character, "")
    if category[0] == "M":
        return _MARK
    if category[0] not in "LN":
        return _NONE
    if name.startswith("LATIN") or name.startswith(("FEMININE", "MASCULINE")):
        return _LATIN
    return _ALONE if name.startswith(_SPACELESS) else _OTHER


class _AllScripts:
    """A tokenizer for rouge-score: its own tokens of Latin text, and words of other scripts."""

    def __init__(self) -> None:
        from rouge_score.tokenizers import DefaultTokenizer

        self._latin: Any = DefaultTokenizer(use_stemmer=True)

    def tokenize(self, text: str) -> list[str]:
        """Tokens of a text, in lower case; words of a-z are stemmed."""
        return [
            token
            for word in _words(text.lower())
            for token in (self._latin.tokenize(word) if word.isascii() else [word])
        ]


def _words(text: str) -> Iterator[str]:
    """Runs of ASCII letters and digits, runs of letters of other scripts, and lone characters."""
    word, kind = "", _NONE
    for character in text:
        own = (_LATIN if character.isalnum() else _NONE) if character.isascii() else None
        if own is None:
            own = _kind(character)
            if own == _LATIN:  # an umlaut splits a word, as in rouge-score
                own = _NONE
        if own == _MARK:
            if kind in (_OTHER, _ALONE):
                word += character
                continue
            own = _NONE
        if word and (own != kind or own == _ALONE):
            yield word
            word = ""
        kind = own
        if own != _NONE:
            word += character
    if word:
        yield word
