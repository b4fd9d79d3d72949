"""HTTP/1.1 on a connection: uvicorn's, with bounds for the head of a request, which it takes from anybody for ever."""

from __future__ import annotations

import asyncio
import json
import secrets

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_BYTES = 64 * 1024
REASONS = {400: b"Bad Request", 408: b"Request Timeout", 431: b"Request Header Fields Too Large"}


class Protocol(HttpToolsProtocol):
    """The head of a request, its line and headers, must come within head_seconds of the connection or of its first
    byte, and have at most HEAD_BYTES. What is no request has the shape of every other error.
    """

    def __init__(self, *given, head_seconds: float, **settings):
        super().__init__(*given, **settings)
        self._head_seconds = head_seconds

    _timer: asyncio.TimerHandle | None = None
    _received = 0  # bytes of the head

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._have_head()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._timer is not None:
            self._received += len(data)
        super().data_received(data)
        if self._timer is not None and self._received > HEAD_BYTES:
            self._refuse(431, f"the head of a request may have {HEAD_BYTES:,} bytes", "send less")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._expect_head()

    def on_headers_complete(self) -> None:
        self._have_head()
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, "this is no HTTP request", "send HTTP/1.1")

    def _expect_head(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(self._head_seconds, self._be_late)
            self._received = 0

    def _have_head(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _be_late(self) -> None:
        self._refuse(408, f"the head of a request did not come within {self._head_seconds:g} s", "send it at once")

    def _refuse(self, status: int, error: str, hint: str) -> None:
        self._have_head()
        if self.transport.is_closing():
            return
        told = {"error": error, "type": "http", "request_id": secrets.token_hex(8), "hint": hint}
        body = json.dumps(told).encode()
        self.transport.write(
            b"HTTP/1.1 %d %s\r\ncontent-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n%s"
            % (status, REASONS[status], len(body), body)
        )
        self.transport.close()
