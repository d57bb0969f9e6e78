"""What a server is asked, and what it says: a request, and pieces of its response."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from l2s_jax.decoding.slots import Said
from l2s_jax.serving.output import Drafts, drafts_of
from l2s_jax.serving.text import ResponseText
from l2s_jax.settings.search import Search
from l2s_jax.tokenizers.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt, and how it is answered.

    prompt: its ids, int32.
    search: how tokens are chosen; no beam search.
    limit: the most new tokens.
    seed: 0 to 2**32 - 1; what it is sampled by.
    scored: whether pieces have the log-probabilities of their tokens.
    time_s: for how long it may wait and be answered, together.
    streamed: whether pieces are heard as they come, or one with everything at the end.
    """

    prompt: Sequence[int]
    search: Search
    limit: int
    seed: int = 0
    scored: bool = False
    time_s: float = float("inf")
    streamed: bool = True


class Scored(NamedTuple):
    """A token of a response, its log-probability, and the likeliest tokens there, best first.

    Natural logarithms, as the model gives them before any setting of the search.
    """

    token: int
    log_p: float
    likeliest: tuple[tuple[int, float], ...]


class Piece(NamedTuple):
    """What is new of a response.

    text: characters, whole.
    tokens: how many the response has so far.
    scored: of its new tokens, where they were asked for.
    end: "" if more is to come; "stop": it ended itself, or with a stop text; "length": its limit
      ended it; "cancelled"; "time": its time was over; "error": it could not be answered.
    reason: what was wrong, of an "error".
    drafts: of exact decoding, at the end.
    """

    text: str
    tokens: int
    scored: tuple[Scored, ...] = ()
    end: str = ""
    reason: str = ""
    drafts: Drafts | None = None


class Job:
    """A request on its way. `deliver` gets its pieces, of which the last has an end.

    Attributes:
      ended: whether the last piece has been delivered.
      cancelled: whether nobody wants to hear more.
      arrived, began: when it came, and when its first token was there (or None); seconds, as of
        time.monotonic.
    """

    def __init__(self, request: Request, deliver: Callable[[Piece], None], tokenizer: Tokenizer):
        self.request = request
        self._deliver = deliver
        self._text = ResponseText(tokenizer, request.search.stop)
        self._told = 0
        self.ended = False
        self.cancelled = False
        self.arrived = time.monotonic()
        self.began: float | None = None

    def cancel(self) -> None:
        """Ends the response where it is; any thread may call it."""
        self.cancelled = True

    def overdue(self, now: float) -> str:
        """The end of a request that nobody waits for any more; "" of others."""
        if self.cancelled:
            return "cancelled"
        return "time" if now > self.arrived + self.request.time_s else ""

    def stop(self, end: str, reason: str = "") -> None:
        """Delivers an end that the model did not make."""
        if not self.ended:
            self.ended = True
            self._deliver(Piece("", self._told, (), end, reason))

    def tell(self, said: Said, row: int) -> None:
        """Delivers what is new of what a row has said."""
        if self.ended:
            return
        length, done = int(said.lengths[row]), bool(said.done[row])
        if length == self._told and not done:
            return
        if self.began is None:
            self.began = time.monotonic()
        told, self._told = self._told, length
        request = self.request
        if not (done or request.streamed or request.search.stop):
            return
        text = self._text.extend(np.asarray(said.tokens)[:length, row], last=done)
        length = len(self._text.tokens)  # fewer with a stop text
        end = ""
        if self._text.stopped or (done and said.finished[row]):
            end = "stop"
        elif done:
            end = "length"
        self.ended = bool(end)
        if not request.streamed:
            if not end:
                return
            text, told = self._text.text, 0
        scored = ()
        if request.scored:
            scored = tuple(_scored(said, row, place) for place in range(told, length))
        drafts = drafts_of(said.drafts, row) if end and said.drafts else None
        if text or scored or end:
            self._deliver(Piece(text, length, scored, end, "", drafts))


def _scored(said: Said, row: int, place: int) -> Scored:
    scores = said.scores
    likeliest = zip(
        scores.ids[place, row].tolist(), scores.values[place, row].tolist(), strict=True
    )
    return Scored(int(said.tokens[place, row]), float(scores.chosen[place, row]), tuple(likeliest))
