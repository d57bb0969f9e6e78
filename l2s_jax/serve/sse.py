"""Server-sent events, and work for clients that may go away."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

from starlette.types import Receive, Scope, Send

DONE = "[DONE]"


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, Any]) -> bool:
    """Does some work; False: the client went away before it was done, and it was given up.

    The body has been read: what comes next of the client is that it goes.
    """

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            if not task.done():
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
    if tasks[0].cancelled():
        return False
    tasks[0].result()
    return True


class EventStream:
    """An answer of events; `on_end` is called when the last is sent, or the client goes away."""

    def __init__(self, events: AsyncIterator[str], on_end: Callable[[], None]):
        self._events, self._on_end = events, on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-cache"),
            # Of proxies: to hand on each event as it comes.
            (b"x-accel-buffering", b"no"),
        ]

        async def write() -> None:
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            async for event in self._events:
                body = f"data: {event}\n\n".encode()
                await send({"type": "http.response.body", "body": body, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        try:
            # A client that is gone in the middle of an event is gone, too.
            with contextlib.suppress(OSError):
                await unless_gone(receive, write())
        finally:
            self._on_end()
