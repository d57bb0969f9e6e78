"""What stands around Ray's proxies: a request goes to another replica, or is refused in words."""

from __future__ import annotations

import asyncio

import httpx
import pytest

from l2s_jax.serve.proxy import middlewares

PATH = "/v1/completions"


def answer(status, kind, *parts, retry=None):
    """What a proxy does that has an answer, of which its server may be lost after some parts."""

    async def app(scope, receive, send):
        headers = [[b"content-type", kind]] + ([[b"retry-after", retry]] if retry else [])
        await send({"type": "http.response.start", "status": status, "headers": headers})
        for part, more in parts:
            await send({"type": "http.response.body", "body": part, "more_body": more})

    return app


async def nothing(scope, receive, send):
    """What Ray's proxy does where a replica is lost."""


WHOLE = answer(200, b"application/json", (b"{}", False))
HEAD_ALONE = answer(200, b"text/event-stream")
BEGUN = answer(200, b"text/event-stream", (b"data: {}", True))
FULL = answer(429, b"text/plain; charset=utf-8", (b"full", False), retry=b"3")
NO_APPLICATION = answer(404, b"text/plain; charset=utf-8", (b"Path '/v1' not found", False))
FAILED = answer(500, b"application/json", (b'{"error": {}}', False))


class Proxy:
    """One that does one thing after another, and what it has read of each request."""

    def __init__(self, *turns):
        self.turns, self.read = list(turns), []
        (middleware,) = middlewares()
        self.app = middleware.cls(self._turn, *middleware.args, **middleware.kwargs)

    async def _turn(self, scope, receive, send):
        body = b""
        while (message := await receive())["type"] == "http.request":
            body += message["body"]
            if not message.get("more_body"):
                break
        self.read.append((scope["method"], scope["path"], body))
        await self.turns[len(self.read) - 1](scope, receive, send)

    def post(self, path=PATH):
        async def parts():
            for part in (b"[1, ", b"2]"):
                yield part

        async def ask():
            transport = httpx.ASGITransport(self.app)
            async with httpx.AsyncClient(transport=transport, base_url="http://ray") as client:
                return await client.post(path, content=parts())

        return asyncio.run(ask())


@pytest.mark.parametrize("lost", [nothing, HEAD_ALONE])
def test_what_was_not_answered_is_asked_again(lost):
    proxy = Proxy(lost, WHOLE)
    found = proxy.post()
    assert (found.status_code, found.content) == (200, b"{}")
    assert proxy.read == [("POST", PATH, b"[1, 2]")] * 2


@pytest.mark.parametrize("turn", [WHOLE, FAILED])
def test_what_a_server_answers_is_the_answer(turn):
    proxy = Proxy(turn)
    found = proxy.post()
    assert found.status_code in (200, 500) and found.json() in ({}, {"error": {}})
    assert len(proxy.read) == 1


def test_an_answer_that_has_begun_is_not_made_again():
    proxy = Proxy(BEGUN)
    with pytest.raises(AssertionError):  # httpx: the response is not complete
        proxy.post()
    assert len(proxy.read) == 1


@pytest.mark.parametrize(
    ("turns", "status", "retry", "kind"),
    [
        ((nothing, nothing), 503, "1", "server_error"),
        ((FULL,), 429, "3", "rate_limit_error"),
        ((nothing, FULL), 429, "3", "rate_limit_error"),
        ((NO_APPLICATION,), 503, "1", "server_error"),
        ((HEAD_ALONE, NO_APPLICATION), 503, "1", "server_error"),
    ],
)
def test_a_refusal_is_an_error_object_that_says_when_to_come_again(turns, status, retry, kind):
    proxy = Proxy(*turns)
    found = proxy.post()
    assert (found.status_code, found.headers["Retry-After"]) == (status, retry)
    error = found.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["type"] == kind
    assert len(proxy.read) == len(turns)


def test_a_client_that_went_away_is_not_asked_for():
    turns = []

    async def app(scope, receive, send):
        turns.append(await receive())

    async def receive():
        return {"type": "http.disconnect"}

    async def send(message):
        raise AssertionError(message)

    (middleware,) = middlewares()
    scope = {"type": "http", "path": PATH}
    asyncio.run(middleware.cls(app)(scope, receive, send))
    assert turns == [{"type": "http.disconnect"}]


def test_other_paths_are_ray_s_and_other_applications():
    found = Proxy(NO_APPLICATION).post("/others")
    assert (found.status_code, found.text) == (404, "Path '/v1' not found")
