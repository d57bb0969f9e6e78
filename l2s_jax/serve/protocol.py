"""What clients may ask: OpenAI's fields, those that vLLM adds, and nothing else.

What is not offered may be sent with the value that says so, since many clients always send it.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

_Text = Annotated[str, Field(max_length=2**24)]
_Id = Annotated[int, Field(ge=0, lt=2**31)]
_Ids = Annotated[list[_Id], Field(fail_fast=True, min_length=1, max_length=2**20)]
_Stop = Annotated[str, Field(min_length=1, max_length=256)]

# The most choices of one request.
MOST_CHOICES = 128


class _Asked(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(_Asked):
    """Of `stream`."""

    include_usage: bool | None = Field(
        None, description="One more event at the end, with the numbers of tokens."
    )


class Asked(_Asked):
    """What completions and chats have in common; null is as if a field were not there."""

    model: Annotated[str, Field(max_length=256)] = Field(
        description="One of the names that /v1/models gives."
    )
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = Field(
        None, description="Choices for each prompt, sampled by seeds that follow on each other."
    )
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = Field(
        None, description="The most new tokens; absent: as many as the server gives."
    )
    temperature: Annotated[float, Field(ge=0, le=100)] | None = Field(
        None,
        description="Above 0, tokens are sampled; 0: the likeliest is taken. Absent: as the "
        "model's own search has it, which is not always OpenAI's 1.",
    )
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = Field(
        None, description="Sampling is from the k likeliest; 0 or -1: from all."
    )
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    no_repeat_ngram_size: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    min_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = Field(
        None, description="The response does not end itself before so many tokens."
    )
    seed: Annotated[int, Field(ge=0, lt=2**32)] | None = Field(
        None, description="What is sampled by; absent: by chance."
    )
    stop: _Stop | Annotated[list[_Stop], Field(max_length=4)] | None = Field(
        None, description="Texts that end a response, and are not part of it."
    )
    stream: bool | None = Field(None, description="Whether pieces come as they are decoded.")
    stream_options: StreamOptions | None = None
    user: Annotated[str, Field(max_length=1024)] | None = Field(None, description="Not looked at.")
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None


# Fields of which one value is taken, and it.
UNUSED = {
    "logit_bias": "{}",
    "best_of": "1",
    "echo": "false",
    "suffix": "null",
    "tools": "[]",
    "tool_choice": "'none' or 'auto'",
    "response_format": "{'type': 'text'}",
}


class CompletionAsked(Asked):
    """The body of /v1/completions."""

    prompt: (
        _Text
        | Annotated[list[_Text], Field(fail_fast=True, min_length=1, max_length=MOST_CHOICES)]
        | _Ids
        | Annotated[list[_Ids], Field(fail_fast=True, min_length=1, max_length=MOST_CHOICES)]
    ) = Field(description="A text, texts, the token ids of one prompt, or of several.")
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = Field(
        None, description="How many likeliest tokens are given with each token, and their logs."
    )
    best_of: Annotated[int, Field(ge=1, le=1)] | None = None
    echo: Literal[False] | None = None
    suffix: Annotated[str, Field(max_length=0)] | None = None


class Part(_Asked):
    """A part of a message."""

    type: Literal["text"]
    text: _Text


class Message(_Asked):
    """What one side of a chat has said."""

    role: Literal["system", "developer", "user", "assistant"]
    content: _Text | Annotated[list[Part], Field(fail_fast=True, min_length=1, max_length=1024)]
    # What clients send back of an answer.
    refusal: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    audio: None = None
    function_call: None = None
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None

    @property
    def text(self) -> str:
        """All of it."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class ResponseFormat(_Asked):
    """How the text has to look: as the model has it."""

    type: Literal["text"]


class ChatAsked(Asked):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1, max_length=4096)]
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = Field(
        None, description="max_tokens by its newer name."
    )
    logprobs: bool | None = Field(None, description="Whether the log of each token is given.")
    top_logprobs: Annotated[int, Field(ge=0, le=5)] | None = Field(
        None, description="With `logprobs`: how many likeliest tokens are given with each."
    )
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    response_format: ResponseFormat | None = None
