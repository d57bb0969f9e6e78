"""What clients are answered: OpenAI's objects."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel

End = Literal["stop", "length"]


class Usage(BaseModel):
    """Numbers of tokens; of a response, what ended it included."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionLogprobs(BaseModel):
    """Of each token: its name in the vocabulary, its logarithm, the likeliest ones' logarithms, and
    where its text begins.
    """

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """One response, or what is new of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: End | None


class Completion(BaseModel):
    """The answer of /v1/completions, and each event of its stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None


class TokenScore(BaseModel):
    """A token by its name in the vocabulary, and its logarithm."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChosenScore(TokenScore):
    """A token of the response, and the likeliest ones there."""

    top_logprobs: list[TokenScore]


class ChatLogprobs(BaseModel):
    """Of each token."""

    content: list[ChosenScore]
    refusal: None = None


class Said(BaseModel):
    """The message of the model."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    """One response."""

    index: int
    message: Said
    logprobs: ChatLogprobs | None
    finish_reason: End | None


class Chat(BaseModel):
    """The answer of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage | None


class Delta(BaseModel):
    """What is new of a message; the role comes once."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(BaseModel):
    """What is new of one response."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: End | None


class ChatChunk(BaseModel):
    """An event of a chat's stream."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None


class ModelCard(BaseModel):
    """A model that is served."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "l2s_jax"
    max_prompt_tokens: int
    max_new_tokens: int


class ModelList(BaseModel):
    """The answer of /v1/models."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class ErrorFields(BaseModel):
    """What was wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class Error(BaseModel):
    """The answer to a request that is refused."""

    error: ErrorFields


class Health(BaseModel):
    """Whether requests are answered."""

    status: Literal["starting", "ready", "stopping"]
