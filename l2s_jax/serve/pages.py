"""The page at `/`, where the models of the server race."""

from __future__ import annotations

import os

from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles

_FOLDER = os.path.join(os.path.dirname(__file__), "page")
# Nothing but what this server sends is loaded or run.
_POLICY = "default-src 'self'; img-src data:; base-uri 'none'; frame-ancestors 'none'"


def page_routes() -> list[BaseRoute]:
    """The page and its files; they hold no secret, and ask for no key."""

    async def index(request: Request) -> Response:
        return FileResponse(
            os.path.join(_FOLDER, "index.html"), headers={"Content-Security-Policy": _POLICY}
        )

    return [Route("/", index), Mount("/page", StaticFiles(directory=_FOLDER))]
