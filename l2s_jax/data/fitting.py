"""Prompts that are too long: they lose text of their fields, not of the template around them."""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import NamedTuple

from l2s_jax.data.templates import Span, spans_of
from l2s_jax.tokenizers import Tokenizer

_WORD = 20  # characters: a longer word may be cut within
_NEAR = 4  # characters: how near to the longest text that fits a search ends
_TRIES = 4


class Loss(NamedTuple):
    """What a field lost in the prompts that were too long, in characters."""

    lost: int
    of: int


class Fitted(NamedTuple):
    """Prompts of at most so many tokens.

    ids: of each prompt.
    cut: how many were too long.
    hopeless: how many of these were too long without any text of their fields; they end early.
    losses: by field.
    """

    ids: list[list[int]]
    cut: int
    hopeless: int
    losses: dict[str, Loss]


def shortened(prompt: str, most: int) -> str:
    """The text in which every field that may lose text has at most `most` characters.

    It is cut between words, where there is a place between words nearby.
    """
    parts, done = [], 0
    for span in spans_of(prompt):
        parts += [prompt[done : span.start], _cut_text(prompt[span.start : span.stop], most, span)]
        done = span.stop
    return "".join([*parts, prompt[done:]])


def _cut_text(text: str, most: int, span: Span) -> str:
    if len(text) <= most:
        return text
    if span.side == "start":
        return _cut_text(text[::-1], most, span._replace(side="end"))[::-1]
    kept = text[:most]
    if not text[most].isspace():
        for back in range(1, min(_WORD, most) + 1):
            if kept[-back].isspace():
                kept = kept[:-back]
                break
    return kept.rstrip()


def fit(prompts: Sequence[str], tokenizer: Tokenizer, most: int) -> Fitted:
    """Ids of prompts, at most `most` of each, eos included.

    All fields of a prompt are cut to the same length, nearly the longest that fits.
    """
    ids = tokenizer.encode_prompts(prompts)
    long = [i for i, one in enumerate(ids) if len(one) > most]
    losses: dict[str, Loss] = collections.defaultdict(lambda: Loss(0, 0))
    searched: list[int] = []
    for i in long:
        spans = spans_of(prompts[i])
        if len(spans) == 1 and not tokenizer.is_chat and _is_tail(prompts[i], spans[0]):
            (span,) = spans
            # Nothing but an eos follows: what is lost are the last tokens.
            share = 1 - most / len(ids[i])
            ids[i] = _cut_ids(ids[i], most, tokenizer.eos_id)
            size = span.stop - span.start
            _count(losses, span, round(share * size), size)
        else:
            searched.append(i)
    too_long = [prompts[i] for i in searched]
    found, hopeless = _search(too_long, [len(ids[i]) for i in searched], tokenizer, most)
    for i, (one, length) in zip(searched, found, strict=True):
        ids[i] = one
        for span in spans_of(prompts[i]):
            size = span.stop - span.start
            _count(losses, span, max(0, size - length), size)
    return Fitted(ids, len(long), hopeless, dict(losses))


def _cut_ids(ids: list[int], most: int, eos_id: int) -> list[int]:
    """The first `most` ids; the eos stays where they end with one."""
    if len(ids) <= most:
        return ids
    return [*ids[: most - 1], eos_id] if ids[-1] == eos_id else ids[:most]


def _is_tail(prompt: str, span: Span) -> bool:
    return span.side == "end" and span.stop == len(prompt)


def _count(losses: dict[str, Loss], span: Span, lost: int, size: int) -> None:
    before = losses[span.field]
    losses[span.field] = Loss(before.lost + lost, before.of + size)


class _Bracket:
    """The lengths of a prompt's fields between which the longest that fits is searched."""

    def __init__(self, prompt: str, tokens: int):
        self.fits, self.ids, self.tries = -1, [], 0
        self.too_long = max((s.stop - s.start for s in spans_of(prompt)), default=0)
        self.tokens = tokens

    def guess(self, most: int) -> int:
        """What to try next: where the tokens would be `most` if they grew evenly, then halves."""
        self.tries += 1
        if self.fits < 0:
            return 0
        grown, room = self.tokens - len(self.ids), most - len(self.ids)
        step = (self.too_long - self.fits) // 2
        if self.tries <= _TRIES:
            step = (self.too_long - self.fits) * room // max(grown, 1)
        return min(max(self.fits + step, self.fits + 1), self.too_long - 1)

    def is_open(self, most: int) -> bool:
        """Whether a longer text may fit."""
        return self.too_long - self.fits > _NEAR and len(self.ids) < most


def _search(
    prompts: Sequence[str], tokens: Sequence[int], tokenizer: Tokenizer, most: int
) -> tuple[list[tuple[list[int], int]], int]:
    """(ids, length of the fields) of each prompt, and how many do not fit without their fields."""
    brackets = [_Bracket(prompt, count) for prompt, count in zip(prompts, tokens, strict=True)]
    hopeless, places = 0, list(range(len(prompts)))
    while places:
        lengths = [brackets[i].guess(most) for i in places]
        texts = [shortened(prompts[i], n) for i, n in zip(places, lengths, strict=True)]
        for i, length, ids in zip(places, lengths, tokenizer.encode_prompts(texts), strict=True):
            bracket = brackets[i]
            if len(ids) <= most:
                bracket.fits, bracket.ids = length, ids
            elif length:
                bracket.too_long, bracket.tokens = length, len(ids)
            else:
                hopeless += 1
                bracket.too_long, bracket.ids = 0, _cut_ids(ids, most, tokenizer.eos_id)
        places = [i for i in places if brackets[i].is_open(most)]
    return [(bracket.ids, max(bracket.fits, 0)) for bracket in brackets], hopeless
