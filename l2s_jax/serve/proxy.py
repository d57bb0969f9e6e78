"""What stands in Ray's proxies: requests that a lost replica has not answered are sent to another.

Ray's proxy hands a request to one replica. Where that is lost before its answer begins, the proxy
gives none, and its web server says 500. No byte has been sent then, and the same request, with the
same seed, has the same answer anywhere.
"""

from __future__ import annotations

from collections.abc import Mapping

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from l2s_jax.serve.errors import Refused

# Replicas that a request is sent to; one that ends each of them shall not end all.
_ATTEMPTS = 2
_RETRY_S = "1"
# Paths of the servers' answers, which are all JSON or events.
_OURS = "/v1/"


def middlewares() -> list[Middleware]:
    """What Ray's proxies put around themselves (RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH)."""
    return [Middleware(Again)]


class Again:
    """Around a proxy: no request is without an answer, and what Ray refuses has an error object."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles a request."""
        if scope["type"] != "http" or not scope["path"].startswith(_OURS):
            return await self._app(scope, receive, send)
        body = _Body(receive)
        for _ in range(_ATTEMPTS):
            answer = _Answer(send, body)
            await self._app({**scope}, body.reader(), answer.take)
            if answer.has_begun or body.is_gone:
                return
            if refused := answer.refused:
                return await refused.response(scope, receive, send)
        lost = _unavailable("the servers that had this request were lost")
        await lost.response(scope, receive, send)


class _Body:
    """What a client sends, which may be read from its beginning until it has an answer.

    Attributes:
      is_gone: whether the client went away.
    """

    def __init__(self, receive: Receive):
        self._receive = receive
        self._parts: list[Message] | None = []
        self.is_gone = False

    def reader(self) -> Receive:
        """Reads it from its beginning."""
        before = iter(list(self._parts or ()))

        async def read() -> Message:
            for part in before:
                return part
            part = await self._receive()
            if part["type"] == "http.disconnect":
                self.is_gone = True
            elif self._parts is not None:
                self._parts.append(part)
            return part

        return read

    def forget(self) -> None:
        """It will not be read again."""
        self._parts = None


class _Answer:
    """An answer, of which the head waits for the first of its body.

    Attributes:
      has_begun: whether some of it has been sent.
      refused: what is answered in its place, where it is Ray's and not a server's.
    """

    def __init__(self, send: Send, body: _Body):
        self._send, self._body = send, body
        self._head: Message | None = None
        self.has_begun = False
        self.refused: Refused | None = None

    async def take(self, message: Message) -> None:
        """Takes what the proxy sends."""
        if message["type"] == "http.response.start":
            self._head = message
            self.refused = _refusal(message["status"], Headers(raw=message["headers"]))
            return
        if self.refused:
            return
        if self._head:
            head, self._head, self.has_begun = self._head, None, True
            self._body.forget()
            await self._send(head)
        await self._send(message)


def _refusal(status: int, headers: Mapping[str, str]) -> Refused | None:
    """What a client is told in place of an answer that no server made, which is plain text."""
    if status < 400 or not headers.get("content-type", "").startswith("text/plain"):
        return None
    if status == 429:
        retry = {"Retry-After": headers.get("retry-after", _RETRY_S)}
        return Refused(429, "as many requests as may are waiting", code="queue_full", headers=retry)
    # Ray's 404 says that there is no application, its 503 that there is no replica.
    return _unavailable("no server is there: they are starting or stopping")


def _unavailable(message: str) -> Refused:
    return Refused(503, message, code="unavailable", headers={"Retry-After": _RETRY_S})
