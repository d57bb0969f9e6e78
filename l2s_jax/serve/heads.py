"""uvicorn's fast parser of HTTP, with a bound on heads, which it lacks."""

from __future__ import annotations

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

# Bytes of a request beside its body: its line, its headers, what parts a body in chunks.
MOST = 1 << 16


class BoundedProtocol(HttpToolsProtocol):
    """A connection that is closed with 400 when a request has more than `MOST` bytes of head."""

    _beside = 0

    def data_received(self, data: bytes) -> None:
        """Parses what came."""
        self._beside += len(data)
        super().data_received(data)
        if self._beside > MOST and not self.transport.is_closing():
            self.send_400_response(f"The request has more than {MOST} bytes beside its body.")

    def on_body(self, body: bytes) -> None:
        """Called by the parser."""
        self._beside -= len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Called by the parser."""
        self._beside = 0
        super().on_message_complete()
