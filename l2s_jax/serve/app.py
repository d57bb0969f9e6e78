"""The HTTP application: routes, what a request has to pass, and its answer."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel, ValidationError
from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from l2s_jax.serve import answers
from l2s_jax.serve.asking import requests_of, top_logprobs
from l2s_jax.serve.errors import Refused, refusal_of
from l2s_jax.serve.forms import ChatForm, CompletionForm, Form
from l2s_jax.serve.forms import Response as Answer
from l2s_jax.serve.openapi import document
from l2s_jax.serve.pages import page_routes
from l2s_jax.serve.protocol import UNUSED, Asked
from l2s_jax.serve.service import Answers, Service
from l2s_jax.serve.sse import DONE, EventStream, unless_gone

log = logging.getLogger(__name__)

# Seconds that a client may take to send a body.
_BODY_S = 60.0
# Bytes of a body whose prompts are tokenized sooner than a thread for it is woken.
_SHORT = 4096


def make_app(service: Service) -> Starlette:
    """The application of a service."""

    async def models(request: Request) -> Response:
        _check_key(request, service)
        return _json(answers.ModelList(data=[_card(service, name) for name in service.generators]))

    async def model(request: Request) -> Response:
        _check_key(request, service)
        name = request.path_params["name"]
        service.generator(name)
        return _json(_card(service, name))

    async def health(request: Request) -> Response:
        ready = service.state == "ready"
        return JSONResponse({"status": service.state}, 200 if ready else 503)

    async def metrics(request: Request) -> Response:
        return Response(service.metrics.text(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def examples(request: Request) -> Response:
        _check_key(request, service)
        return JSONResponse({"examples": list(service.examples)})

    async def openapi(request: Request) -> Response:
        return Response(document(tuple(service.generators)), media_type="application/json")

    return Starlette(
        routes=[
            Route("/v1/completions", _endpoint(service, CompletionForm), methods=["POST"]),
            Route("/v1/chat/completions", _endpoint(service, ChatForm), methods=["POST"]),
            Route("/v1/models", models),
            Route("/v1/models/{name}", model),
            Route("/health", health),
            Route("/metrics", metrics),
            Route("/openapi.json", openapi),
            Route("/examples", examples),
            *page_routes(),
        ],
        exception_handlers={Refused: _refuse, HTTPException: _refuse_http},
        middleware=[Middleware(_Parting, service=service)],
    )


class _Parting:
    """While the service stops, no connection is kept: the next request would come here again, and
    not to a server that goes on.
    """

    def __init__(self, app: ASGIApp, service: Service):
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_last(message: Message) -> None:
            if message["type"] == "http.response.start" and self._service.state == "stopping":
                MutableHeaders(scope=message)["Connection"] = "close"
            await send(message)

        await self._app(scope, receive, send_last)


def _json(answer: BaseModel) -> Response:
    return Response(answer.model_dump_json(), media_type="application/json")


def _card(service: Service, name: str) -> answers.ModelCard:
    generator = service.generators[name]
    return answers.ModelCard(
        id=name,
        created=service.created,
        max_prompt_tokens=generator.prompt_lengths[-1],
        max_new_tokens=generator.max_new_tokens,
    )


async def _refuse(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    return error.response


async def _refuse_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    told = f"{request.method} {request.url.path}: {error.detail}"
    return Refused(error.status_code, told, headers=error.headers).response


def _check_key(request: Request, service: Service) -> None:
    if not service.limits.api_key:
        return
    kind, _, key = request.headers.get("Authorization", "").partition(" ")
    # Compared as bytes: text that is not ASCII is refused by the comparison.
    expected = service.limits.api_key.encode()
    if kind.lower() != "bearer" or not hmac.compare_digest(key.strip().encode("latin-1"), expected):
        raise Refused(
            401,
            "expected the header Authorization: Bearer KEY, with this server's key",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )


async def _body(request: Request, most: int) -> bytes:
    """The body, of so many bytes at most."""
    kind = request.headers.get("Content-Type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Refused(415, f"Content-Type: {kind!r}, expected application/json")
    length = request.headers.get("Content-Length", "0")
    too_large = Refused(
        413,
        f"a body of more than {most} bytes",
        code="body_too_large",
        headers={"Connection": "close"},
    )
    if length.isdecimal() and int(length[:20]) > most:
        raise too_large
    parts, size = [], 0
    try:
        async with asyncio.timeout(_BODY_S):
            async for part in request.stream():
                parts.append(part)
                size += len(part)
                if size > most:
                    raise too_large
    except TimeoutError:
        raise Refused(
            408, f"no whole body within {_BODY_S:g} seconds", headers={"Connection": "close"}
        ) from None
    return b"".join(parts)


def _endpoint(
    service: Service, form: type[Form]
) -> Callable[[Request], Awaitable[Response | EventStream]]:
    """The handler of one endpoint that answers prompts."""

    async def handle(request: Request) -> Response | EventStream:
        model, status = "", 500
        try:
            _check_key(request, service)
            body = await _body(request, service.limits.body_bytes)
            asked = _parsed(form.asked, body)
            generator = service.generator(asked.model)
            model = asked.model
            top = top_logprobs(asked)
            if len(body) > _SHORT:
                prompts = await service.tokenized(form.prompts, asked, generator)
            else:
                prompts = form.prompts(asked, generator)
            asked_of_lane = requests_of(asked, prompts, generator, service.limits.time_s)
            tokens = sum(map(len, prompts))
            going = service.ask(model, asked_of_lane, tokens)
            made = form(model, generator.response_tokenizer, top)
            if asked.stream:
                status = 200
                usage = bool(asked.stream_options and asked.stream_options.include_usage)
                events = _events(made, going, len(asked_of_lane), tokens, usage)
                return EventStream(events, going.cancel)
            answer = await _whole(request, made, going, len(asked_of_lane), tokens)
            status = answer.status_code
            return answer
        except Refused as refused:
            status = refused.status
            raise
        except asyncio.CancelledError:  # Ray's way to say that the client went away
            status = 499
            raise
        except ClientDisconnect:
            status = 499
            return Response(status_code=499)
        except Exception:
            # Whatever it is, the others are answered, and this one is told.
            log.exception("a request failed")
            return Refused(500, "the server failed at this request", code="failed").response
        finally:
            service.metrics.answered(model, form.endpoint, status)

    return handle


def _parsed(kind: type[Asked], body: bytes) -> Any:
    try:
        asked = kind.model_validate_json(body)
    except ValidationError as error:
        raise refusal_of(error, UNUSED) from None
    if asked.stream_options is not None and not asked.stream:
        raise Refused(400, "stream_options: expected stream=true beside it", param="stream_options")
    return asked


def _usage(prompt_tokens: int, responses: list[Answer]) -> answers.Usage:
    tokens = sum(one.tokens for one in responses)
    return answers.Usage(
        prompt_tokens=prompt_tokens, completion_tokens=tokens, total_tokens=prompt_tokens + tokens
    )


async def _whole(request: Request, form: Form, going: Answers, count: int, tokens: int) -> Response:
    responses = [Answer() for _ in range(count)]

    async def collect() -> None:
        async for index, piece in going:
            responses[index].add(piece)

    try:
        if not await unless_gone(request.receive, collect()):
            raise ClientDisconnect
    finally:
        going.cancel()
    return _json(form.whole(responses, _usage(tokens, responses)))


async def _events(
    form: Form, going: Answers, count: int, tokens: int, usage: bool
) -> AsyncIterator[str]:
    responses = [Answer() for _ in range(count)]
    # As of OpenAI: with numbers to come at the end, each event before says that it has none.
    hidden = set() if usage else {"usage"}
    try:
        for index in range(count):
            if opening := form.opening(index):
                yield opening.model_dump_json(exclude=hidden)
        async for index, piece in going:
            event = form.event(index, responses[index], piece)
            responses[index].add(piece)
            yield event.model_dump_json(exclude=hidden)
        if usage:
            yield form.last(_usage(tokens, responses)).model_dump_json()
    except Refused as refused:
        yield json.dumps(refused.body)
    yield DONE
