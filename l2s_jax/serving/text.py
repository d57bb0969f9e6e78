"""The text of a response that is still being decoded."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from l2s_jax.tokenizers.tokenizer import Tokenizer, is_byte

# What tokenizers put for bytes that are not a character, or not yet.
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
# Tokens that are decoded once more before new ones: what a token adds depends on those before it.
_BEFORE = 6


class ResponseText:
    """Tokens in, text out: characters whole, and nothing from the first of the `stop` texts on.

    Attributes:
      tokens: those so far; with a stop text, up to the one that completes it.
      text: what has been given of theirs.
      stopped: whether a stop text was found.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self.tokens: list[int] = []
        self.text = ""
        self.stopped = False
        self._certain, self._count = "", 0  # text that will not change, and of how many tokens
        self._searched = 0  # tokens whose text has no stop text

    def extend(self, tokens: np.ndarray, *, last: bool) -> str:
        """Takes all tokens so far, int32 [S]; gives the text that is new and certain.

        Held back are characters of which bytes are missing, white space at the end, which some
        tokenizers only keep before a word, and what may turn out to be the start of a stop text;
        also the pieces at the end that stand for bytes: some tokenizers make text of such a run
        only where all of it is text. With `last`, there is no more to come and all is given.
        """
        self.tokens = tokens.tolist()
        end = len(self.tokens) if last else self._end_of_text()
        text = self._tokenizer.decode(self.tokens) if last else self._up_to(end)
        if self._stop_in(text) is not None:
            self.stopped = True
            text = self._until_stop(text, end)
        elif not last:
            text = text.rstrip(_INCOMPLETE).rstrip()
            text = text[: len(text) - self._started_stop(text)]
            if not text.startswith(self.text):
                return ""
        self._searched = end
        piece = text[len(self.text) :]
        self.text = text
        return piece

    def _stop_in(self, text: str) -> int | None:
        """Where the first stop text begins."""
        return min((at for stop in self._stop if (at := text.find(stop)) >= 0), default=None)

    def _until_stop(self, text: str, end: int) -> str:
        """What `text`, of `end` tokens, has before a stop text; takes the tokens after it away.

        Tokens come in pieces of any length, of which the answer must not depend: it is the first
        token with which there is a stop text; a byte, with those that follow it.
        """
        self.tokens = self.tokens[:end]
        for count in range(self._searched + 1, end):
            if all(is_byte(self._tokenizer, id) for id in self.tokens[count - 1 : count + 1]):
                continue
            said = self._tokenizer.decode(self.tokens[:count])
            if self._stop_in(said) is not None:
                self.tokens, text = self.tokens[:count], said
                break
        return text[: self._stop_in(text)]

    def _end_of_text(self) -> int:
        """How many tokens there are without the bytes at the end."""
        end = len(self.tokens)
        while end and is_byte(self._tokenizer, self.tokens[end - 1]):
            end -= 1
        return end

    def _up_to(self, end: int) -> str:
        """The text of `end` tokens, of which the new ones and a few before them are decoded."""
        start, before = _window(self._tokenizer, self.tokens, self._count)
        text = self._tokenizer.decode(self.tokens[start:end])
        new = text[len(before) :] if text.startswith(before) else ""
        if new and not new.endswith(_INCOMPLETE):
            self._certain, self._count = self._certain + new, end
            return self._certain
        return self._certain + new

    def _started_stop(self, text: str) -> int:
        """How many characters at the end may be the start of a stop text."""
        return max(
            (
                length
                for stop in self._stop
                for length in range(1, len(stop))
                if text.endswith(stop[:length])
            ),
            default=0,
        )


class Offsets:
    """Where in the text of a response each of its tokens begins, as the tokens come."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._length = 0

    def add(self, token: int) -> int:
        """Takes the next token; gives how many characters those before it have."""
        start, before = _window(self._tokenizer, self._tokens, len(self._tokens))
        self._tokens.append(token)
        offset = self._length
        self._length += len(self._tokenizer.decode(self._tokens[start:])) - len(before)
        return offset


def _window(tokenizer: Tokenizer, tokens: Sequence[int], count: int) -> tuple[int, str]:
    """(from which token to decode for what follows `count` tokens, the text up to there)."""
    start = max(count - _BEFORE, 0)
    while start and is_byte(tokenizer, tokens[start]):  # a run of them is decoded as a whole
        start -= 1
    before = tokenizer.decode(tokens[start:count])
    if not before.strip():  # no word that a space could follow
        start, before = 0, tokenizer.decode(tokens[:count])
    return start, before
