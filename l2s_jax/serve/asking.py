"""From a body that fits to requests of a lane."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

from l2s_jax.serve.errors import Refused
from l2s_jax.serve.protocol import Asked, ChatAsked, CompletionAsked
from l2s_jax.serving.generator import Generator
from l2s_jax.serving.request import Request
from l2s_jax.settings.search import Search, alone, changed
from l2s_jax.tokenizers.huggingface import HuggingFaceTokenizer

_SAMPLING = ("top_k", "top_p", "min_p")
_REPETITION = (
    "repetition_penalty",
    "frequency_penalty",
    "presence_penalty",
    "no_repeat_ngram_size",
)
# Fields of a body that are settings of a search by another name.
_NAMES = {"min_tokens": "min_new_tokens"}


def completion_prompts(asked: CompletionAsked, generator: Generator) -> list[list[int]]:
    """The ids of each prompt; tokenizes, which may take a while.

    Raises:
      Refused: a prompt has no ids, too many, or some that there are not.
    """
    prompt, tokenizer = asked.prompt, generator.prompt_tokenizer
    if isinstance(prompt, str):
        return _checked(tokenizer.encode_prompts([prompt]), generator, "prompt")
    texts = [one for one in prompt if isinstance(one, str)]
    if texts:
        return _checked(tokenizer.encode_prompts(texts), generator, "prompt")
    first = prompt[0]
    prompts: Any = prompt if isinstance(first, list) else [prompt]
    most = tokenizer.vocab_size
    for ids in prompts:
        if max(ids) >= most:
            raise Refused(
                400, f"prompt: token id {max(ids)}, expected 0 to {most - 1}", param="prompt"
            )
    return _checked(prompts, generator, "prompt")


def chat_prompts(asked: ChatAsked, generator: Generator) -> list[list[int]]:
    """The ids of the one prompt that a chat is; tokenizes, which may take a while.

    Raises:
      Refused: the model takes no chats, or not this one, or it has too many ids.
    """
    tokenizer, messages = generator.prompt_tokenizer, asked.messages
    if tokenizer.is_chat:
        # The task said what stands around what a user says.
        if [message.role for message in messages] != ["user"]:
            raise Refused(
                400,
                "messages: this model was trained with a chat of its own around what a user says; "
                "expected one message, of role 'user'",
                param="messages",
            )
        ids = tokenizer.encode_prompts([messages[0].text])
    elif isinstance(tokenizer, HuggingFaceTokenizer) and tokenizer.has_chat_template:
        try:
            chat = [{"role": one.role, "content": one.text} for one in messages]
            ids = [tokenizer.encode_chat(chat)]
        except ValueError as error:
            raise Refused(400, f"messages: {error}", param="messages") from None
    else:
        raise Refused(
            400,
            f"model={asked.model!r}: its tokenizer has no chat template; expected a request to "
            "/v1/completions",
            param="model",
            code="no_chat_template",
        )
    return _checked(ids, generator, "messages")


def _checked(prompts: list[list[int]], generator: Generator, param: str) -> list[list[int]]:
    most = generator.prompt_lengths[-1]
    for ids in prompts:
        if len(ids) > most:
            raise Refused(
                400,
                f"{param}: a prompt of {len(ids)} tokens, expected at most {most}",
                param=param,
                code="context_length_exceeded",
            )
        if not ids:
            raise Refused(400, f"{param}: expected at least one token", param=param)
    return prompts


def requests_of(
    asked: Asked, prompts: Sequence[Sequence[int]], generator: Generator, time_s: float
) -> list[Request]:
    """One for each prompt and choice, the choices of a prompt side by side.

    Their seeds follow on each other.

    Raises:
      Refused: settings that do not go together, or more new tokens than there may be.
    """
    choices = asked.n or 1
    search, limit = _search(asked, generator), _limit(asked, generator)
    seed = secrets.randbits(32) if asked.seed is None else asked.seed
    return [
        Request(
            prompt,
            search,
            limit,
            (seed + place * choices + choice) % 2**32,
            scored=top_logprobs(asked) is not None,
            time_s=time_s,
            streamed=bool(asked.stream),
        )
        for place, prompt in enumerate(prompts)
        for choice in range(choices)
    ]


def top_logprobs(asked: Asked) -> int | None:
    """How many likeliest tokens are given with each; None: no logarithms at all.

    Raises:
      Refused: a number without a wish for them.
    """
    if isinstance(asked, CompletionAsked):
        return asked.logprobs
    assert isinstance(asked, ChatAsked)
    if asked.top_logprobs is not None and not asked.logprobs:
        raise Refused(
            400,
            f"top_logprobs={asked.top_logprobs}: expected logprobs=true beside it",
            param="top_logprobs",
        )
    return (asked.top_logprobs or 0) if asked.logprobs else None


def _search(asked: Asked, generator: Generator) -> Search:
    base = alone(generator.search)
    changes: dict[str, Any] = {}
    for name in ("temperature", *_SAMPLING, *_REPETITION):
        if (value := getattr(asked, name)) is not None:
            changes[name] = value
    if asked.min_tokens is not None:
        changes["min_new_tokens"] = asked.min_tokens
    if asked.stop is not None:
        changes["stop"] = (asked.stop,) if isinstance(asked.stop, str) else tuple(asked.stop)
    if changes.get("top_k") == -1:
        changes["top_k"] = 0
    if changes.get("temperature") == 0:
        # The likeliest token is among the likeliest few, however many.
        changes = {name: value for name, value in changes.items() if name not in _SAMPLING}
    try:
        return changed(vars(base), changes) if changes else base
    except ValueError as error:
        param = str(error).partition("=")[0]
        own = {ours: theirs for theirs, ours in _NAMES.items()}.get(param, param)
        raise Refused(400, str(error), param=own) from None


def _limit(asked: Asked, generator: Generator) -> int:
    name, limit = "max_tokens", asked.max_tokens
    newer = getattr(asked, "max_completion_tokens", None)
    if newer is not None:
        if limit is not None and limit != newer:
            raise Refused(
                400,
                f"max_tokens={limit} and max_completion_tokens={newer}: expected one of them",
                param="max_completion_tokens",
            )
        name, limit = "max_completion_tokens", newer
    most = generator.max_new_tokens
    if limit is None:
        return most
    if limit > most:
        raise Refused(400, f"{name}={limit}: expected at most {most}", param=name)
    return limit
