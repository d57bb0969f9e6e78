"""The page at `/`, where the models of the server race."""

from __future__ import annotations

import itertools
import os

from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles

_FOLDER = os.path.join(os.path.dirname(__file__), "page")
# Nothing but what this server sends is loaded or run.
_POLICY = "default-src 'self'; img-src data:; base-uri 'none'; frame-ancestors 'none'"


# Of a list that a person reads through.
_EXAMPLES = 100


def read_examples(path: str) -> list[str]:
    """Prompts that the page offers: the first lines of a text file.

    Raises:
      ValueError: it is not there, or no UTF-8.
    """
    try:
        with open(path, encoding="utf-8") as file:
            lines = (line.strip() for line in file)
            return list(itertools.islice(filter(None, lines), _EXAMPLES))
    except OSError as error:
        raise ValueError(f"--examples={path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"--examples={path}: expected UTF-8, at byte {error.start}") from None


def page_routes() -> list[BaseRoute]:
    """The page and its files; they hold no secret, and ask for no key."""

    async def index(request: Request) -> Response:
        return FileResponse(
            os.path.join(_FOLDER, "index.html"), headers={"Content-Security-Policy": _POLICY}
        )

    return [Route("/", index), Mount("/page", StaticFiles(directory=_FOLDER))]
