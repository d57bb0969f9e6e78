"""How responses look: as completions and as chats, whole and in pieces."""

from __future__ import annotations

import dataclasses
import math
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from pydantic import BaseModel

from l2s_jax.serve import answers
from l2s_jax.serve.answers import TokenScore, Usage
from l2s_jax.serve.asking import chat_prompts, completion_prompts
from l2s_jax.serve.protocol import Asked, ChatAsked, CompletionAsked
from l2s_jax.serving.generator import Generator
from l2s_jax.serving.request import Piece, Scored
from l2s_jax.serving.text import Offsets
from l2s_jax.tokenizers.tokenizer import Tokenizer

# What stands for the logarithm of 0, which JSON has no number for.
_NEVER = -9999.0


@dataclasses.dataclass
class Response:
    """A response so far."""

    text: str = ""
    tokens: int = 0
    offsets: Offsets | None = None
    scored: list[Scored] = dataclasses.field(default_factory=list)
    end: str = ""

    def add(self, piece: Piece) -> None:
        """Takes a piece."""
        self.text += piece.text
        self.tokens = piece.tokens
        self.scored.extend(piece.scored)
        self.end = piece.end


class Form:
    """What one endpoint takes, and how it answers one request.

    endpoint: its name. asked: what its body is. prompts: the ids of its prompts.
    """

    endpoint: ClassVar[str]
    asked: ClassVar[type[Asked]]
    prompts: ClassVar[Callable[[Any, Generator], list[list[int]]]]
    prefix: ClassVar[str]

    def __init__(self, model: str, tokenizer: Tokenizer, top: int | None):
        """`top`: how many likeliest tokens are given with each; None: no scores."""
        self._tokenizer, self._top = tokenizer, top
        self._head = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }

    def opening(self, index: int) -> BaseModel | None:
        """The first event of a response's stream, if there is one before its text."""
        return None

    def event(self, index: int, response: Response, piece: Piece) -> BaseModel:
        """What is new of a response, which holds all before `piece`."""
        raise NotImplementedError

    def whole(self, responses: Sequence[Response], usage: Usage) -> BaseModel:
        """The answer that is no stream."""
        raise NotImplementedError

    def last(self, usage: Usage) -> BaseModel:
        """The event that has the numbers of tokens alone."""
        raise NotImplementedError

    def _name(self, token: int) -> str:
        # A model may have more ids than its tokenizer.
        pieces = self._tokenizer.pieces
        return (pieces[token] if token < len(pieces) else "") or f"<{token}>"

    def _likeliest(self, scored: Scored) -> list[tuple[int, float]]:
        return [(token, _log(log_p)) for token, log_p in scored.likeliest[: self._top or 0]]


class CompletionForm(Form):
    """/v1/completions."""

    endpoint, asked, prefix = "completions", CompletionAsked, "cmpl"
    prompts = staticmethod(completion_prompts)

    def event(self, index: int, response: Response, piece: Piece) -> BaseModel:
        response.offsets = response.offsets or Offsets(self._tokenizer)
        scores = self._scores(response.offsets, piece.scored)
        return self._completion([self._choice(index, piece.text, scores, piece.end)], None)

    def whole(self, responses: Sequence[Response], usage: Usage) -> BaseModel:
        choices = [
            self._choice(
                index, one.text, self._scores(Offsets(self._tokenizer), one.scored), one.end
            )
            for index, one in enumerate(responses)
        ]
        return self._completion(choices, usage)

    def last(self, usage: Usage) -> BaseModel:
        return self._completion([], usage)

    def _completion(self, choices: list[Any], usage: Usage | None) -> BaseModel:
        return answers.Completion(**self._head, choices=choices, usage=usage)

    def _choice(self, index: int, text: str, scores: Any, end: Any) -> answers.CompletionChoice:
        return answers.CompletionChoice(
            index=index, text=text, logprobs=scores, finish_reason=end or None
        )

    def _scores(
        self, offsets: Offsets, scored: Sequence[Scored]
    ) -> answers.CompletionLogprobs | None:
        """Of the next tokens of a response, which `offsets` takes."""
        if self._top is None:
            return None
        likeliest = []
        for one in scored:
            best = {self._name(token): log_p for token, log_p in self._likeliest(one)}
            likeliest.append({**best, self._name(one.token): _log(one.log_p)})
        return answers.CompletionLogprobs(
            tokens=[self._name(one.token) for one in scored],
            token_logprobs=[_log(one.log_p) for one in scored],
            top_logprobs=likeliest,
            text_offset=[offsets.add(one.token) for one in scored],
        )


class ChatForm(Form):
    """/v1/chat/completions."""

    endpoint, asked, prefix = "chat", ChatAsked, "chatcmpl"
    prompts = staticmethod(chat_prompts)

    def opening(self, index: int) -> BaseModel:
        return self._chunk(index, answers.Delta(role="assistant", content=""), None, "")

    def event(self, index: int, response: Response, piece: Piece) -> BaseModel:
        delta = answers.Delta(content=piece.text)
        return self._chunk(index, delta, self._scores(piece.scored), piece.end)

    def whole(self, responses: Sequence[Response], usage: Usage) -> BaseModel:
        choices = [
            answers.ChatChoice(
                index=index,
                message=answers.Said(content=one.text),
                logprobs=self._scores(one.scored),
                finish_reason=one.end,  # type: ignore[arg-type]
            )
            for index, one in enumerate(responses)
        ]
        return answers.Chat(**self._head, choices=choices, usage=usage)

    def last(self, usage: Usage) -> BaseModel:
        return answers.ChatChunk(**self._head, choices=[], usage=usage)

    def _chunk(self, index: int, delta: Any, scores: Any, end: Any) -> answers.ChatChunk:
        choice = answers.ChatChunkChoice(
            index=index, delta=delta, logprobs=scores, finish_reason=end or None
        )
        return answers.ChatChunk(**self._head, choices=[choice], usage=None)

    def _scores(self, scored: Sequence[Scored]) -> answers.ChatLogprobs | None:
        if self._top is None:
            return None
        content = [
            answers.ChosenScore(
                token=self._name(one.token),
                logprob=_log(one.log_p),
                bytes=None,
                top_logprobs=[
                    TokenScore(token=self._name(token), logprob=log_p, bytes=None)
                    for token, log_p in self._likeliest(one)
                ],
            )
            for one in scored
        ]
        return answers.ChatLogprobs(content=content)


def _log(value: float) -> float:
    return value if math.isfinite(value) else _NEVER
