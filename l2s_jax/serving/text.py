"""The text of a response that is still being decoded."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from l2s_jax.tokenizers.tokenizer import Tokenizer

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

    def extend(self, tokens: np.ndarray, *, last: bool) -> str:
        """Takes all tokens so far, int32 [S]; gives the text that is new and certain.

        Held back are characters of which bytes are missing, white space at the end, which some
        tokenizers only keep before a word, and what may turn out to be the start of a stop text.
        With `last`, there is no more to come and all is given.
        """
        known = len(self.tokens)
        self.tokens = tokens.tolist()
        text = self._tokenizer.decode(self.tokens) if last else self._so_far()
        if self._stop_in(text) is not None:
            self.stopped = True
            text = self._until_stop(text, known)
        elif not last:
            text = text.rstrip(_INCOMPLETE).rstrip()
            text = text[: len(text) - self._started_stop(text)]
            if not text.startswith(self.text):
                return ""
        piece = text[len(self.text) :]
        self.text = text
        return piece

    def _stop_in(self, text: str) -> int | None:
        """Where the first stop text begins."""
        return min((at for stop in self._stop if (at := text.find(stop)) >= 0), default=None)

    def _until_stop(self, text: str, known: int) -> str:
        """What `text`, of all tokens, has before a stop text; takes the tokens after it away.

        Tokens come in pieces of any length, of which the answer must not depend: it is the first
        token after the `known` ones with which there is a stop text.
        """
        for count in range(known + 1, len(self.tokens)):
            said = self._tokenizer.decode(self.tokens[:count])
            if self._stop_in(said) is not None:
                self.tokens, text = self.tokens[:count], said
                break
        return text[: self._stop_in(text)]

    def _so_far(self) -> str:
        """The text of all tokens, of which only the new ones and a few before them are decoded."""
        start = max(self._count - _BEFORE, 0)
        before = self._tokenizer.decode(self.tokens[start : self._count])
        if not before.strip():  # no word that a space could follow
            start, before = 0, self._tokenizer.decode(self.tokens[: self._count])
        text = self._tokenizer.decode(self.tokens[start:])
        new = text[len(before) :] if text.startswith(before) else ""
        if new and not new.endswith(_INCOMPLETE):
            self._certain, self._count = self._certain + new, len(self.tokens)
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
