"""HTTP/1.1 on a connection: uvicorn's, with bounds for the head of a request, which it takes from anybody for ever, and
for the trailers after its body.
"""

from __future__ import annotations

import asyncio
import json
import re
import secrets
from collections.abc import Callable

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_BYTES = 64 * 1024
REASONS = {400: b"Bad Request", 408: b"Request Timeout", 431: b"Request Header Fields Too Large"}
OFFERS = (b"\r\nupgrade:", b"\r\nhttp2-settings:")
OFFER = re.compile(b"|".join(OFFERS), re.IGNORECASE)
LONGEST = max(map(len, OFFERS)) - 1  # bytes of one that is not whole


class Protocol(HttpToolsProtocol):
    """The head of a request, its line and headers, must come within head_seconds of the connection or of its first
    byte, and have at most HEAD_BYTES. Trailers are not kept. Offers to speak another protocol are not heard: the parser
    would take the body for that protocol. What is no request has the shape of every other error. told: is called for
    it, with the status, the request's id and the error.
    """

    def __init__(self, *given, head_seconds: float, told: Callable[[int, str, str], None], **settings):
        super().__init__(*given, **settings)
        self._head_seconds, self._told = head_seconds, told
        self._timer: asyncio.TimerHandle | None = None  # while a head is expected
        self._received = 0  # bytes of the head
        self._held = b""  # the end of what came of a head, if it may be the beginning of an offer
        self._between = True  # no request has begun since the last one ended

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._have_head()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._between:
            self._expect_head()  # also of an empty line, after which uvicorn would wait for ever
        if self._timer is not None:
            self._received += len(data)
            data = self._without_offers(self._held + data)
        super().data_received(data)
        if self._timer is not None and self._received > HEAD_BYTES:
            self._refuse(431, f"the head of a request may have {HEAD_BYTES:,} bytes", "send less")

    def _without_offers(self, data: bytes) -> bytes:
        end, self._held = data.find(b"\r\n\r\n"), b""
        if end < 0:
            end = len(data)
            tails = (data[-n:] for n in range(min(LONGEST, end), 0, -1))
            self._held = next((tail for tail in tails if any(each.startswith(tail.lower()) for each in OFFERS)), b"")
            data = data[: end - len(self._held)]
        return OFFER.sub(lambda offer: b"\r\nx-" + offer[0][2:], data[:end]) + data[end:]

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._between = False
        self._expect_head()

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._timer is not None:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._have_head()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._between = True
        super().on_message_complete()

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
        request_id = secrets.token_hex(8)
        body = json.dumps({"error": error, "type": "http", "request_id": request_id, "hint": hint}).encode()
        self.transport.write(
            b"HTTP/1.1 %d %s\r\ncontent-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n"
            b"x-request-id: %s\r\n\r\n%s" % (status, REASONS[status], len(body), request_id.encode(), body)
        )
        self.transport.close()
        self._told(status, request_id, error)
