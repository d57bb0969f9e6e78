"""What a request is refused with: OpenAI's error object."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError
from starlette.responses import Response

_SHOWN = 60  # characters of a value in a message


class Refused(Exception):
    """An answer that is an error.

    status: of HTTP. param: the field that was wrong, if one was. code: for programs.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """The error object."""
        kind = _TYPES.get(self.status, "invalid_request_error")
        if self.status >= 500:
            kind = "server_error"
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    @property
    def response(self) -> Response:
        """The whole answer."""
        # ASCII, since a message may quote what is no text.
        return Response(
            json.dumps(self.body),
            self.status,
            headers=self.headers,
            media_type="application/json",
        )


_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


def refusal_of(error: ValidationError, unused: Mapping[str, str]) -> Refused:
    """What a body that does not fit is refused with.

    unused: fields that are there for clients that send them, and the one value that they may have.
    """
    problems = error.errors(include_url=False, include_context=False)
    first = problems[0]
    place = [str(part) for part in first["loc"]]
    if not place:
        return Refused(400, f"the body is not the JSON object that was expected: {first['msg']}")
    name = place[0]
    own = [one for one in problems if one["loc"][0] == first["loc"][0]]
    if first["type"] == "extra_forbidden":
        param = ".".join(place)
        return Refused(400, f"{param}: no such field", param=param, code="unknown_field")
    if name in unused:
        return Refused(
            400,
            f"{name}={_shown(first['input'])}: this server has no such thing; expected "
            f"{unused[name]}",
            param=name,
            code="unsupported",
        )
    if first["type"] == "missing":
        param = ".".join(place)
        return Refused(400, f"{param}: expected this field", param=param, code="missing_field")
    wanted = " or ".join(dict.fromkeys(_wanted(one["msg"]) for one in own[:4]))
    # A union's place has the names of its types, which are no part of the request.
    param = name if len(own) > 1 else ".".join(place)
    return Refused(400, f"{param}={_shown(first['input'])}: {wanted}", param=param)


def _wanted(message: str) -> str:
    return message.removeprefix("Value error, ").replace("Input should be", "expected")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
