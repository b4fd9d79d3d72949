"""Stands between the network and the routes."""

from __future__ import annotations

import asyncio
import hmac
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping

from fastapi import Request
from fastapi.responses import Response

from sparsebert.serving.faults import Fault, answer_of, fault_of
from sparsebert.serving.state import State

IGNORED = 64_000_000  # bytes of a body that is too large that are read and thrown away
CLIENT_LEFT = 499  # in logs and metrics; nobody receives it
REQUEST_ID = re.compile(r"[\w.:-]{1,64}", re.ASCII)
# Probes have no key, and a browser cannot show one before it has a page to ask for it.
PROBES = ("/health", "/health/live", "/health/ready", "/v2/health/live", "/v2/health/ready")
OPEN = ("/", "/docs", "/openapi.json", *PROBES)


class Guard:
    """Stands between the network and the routes: checks the key, reads the body within its limits, ends the work of
    clients who leave, gives every error one shape, and counts and logs every request once.
    """

    def __init__(self, app, state: State, direct: Mapping[str, Callable[[Request], Awaitable[Response]]]):
        """direct: of a path what answers POST there. `app` has the same routes and would answer the same, but its own
        layers take as long as all the rest.
        """
        self._app, self._state, self._direct = app, state, direct

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        start, state = time.perf_counter(), self._state
        heads_ = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        shown = heads_.get("x-request-id", "")
        request_id = shown if REQUEST_ID.fullmatch(shown) else secrets.token_hex(8)
        scope.setdefault("state", {})["request_id"] = request_id
        status, begun, answer = CLIENT_LEFT, False, []

        async def sending(message) -> None:
            nonlocal status, begun, answer
            if message["type"] == "http.response.start":
                status, begun, answer = message["status"], True, message["headers"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            await self._guarded(scope, receive, sending, heads_)
        except ClientLeft:
            pass
        except Exception as error:  # noqa: BLE001  the last resort: no request is without an answer
            fault = scope["fault"] = fault_of(error)
            if fault.status == 500:
                state.log({"level": "error", "request_id": request_id, "error": repr(error)})
            if not begun:
                await answer_of(fault, request_id)(scope, receive, sending)
        finally:
            direct = scope["method"] == "POST" and scope["path"] in self._direct
            route = scope["path"] if direct else getattr(scope.get("route"), "path", "other")
            seconds = time.perf_counter() - start
            state.metrics.requests.labels(route, str(status)).inc()
            state.metrics.total.labels(route).observe(seconds)
            if scope["method"] == "POST":
                state.recent.add(time.monotonic(), seconds, status)
            if state.tracer is not None:
                now = time.time_ns()
                facts = {"sparsebert.request_id": request_id, **_spent(answer)}
                state.tracer.request(heads_, now - int(1e9 * seconds), now, scope["method"], route, status, facts)
            if status >= 400 or not state.quiet:
                said = {"error": scope["fault"].error} if "fault" in scope else {}
                state.log({
                    "level": "info" if status < 500 else "error", "request_id": request_id, "method": scope["method"],
                    "route": route, "status": status, "ms": round(1e3 * seconds, 3), **said,
                })  # fmt: skip

    async def _guarded(self, scope, receive, send, heads_: dict[str, str]) -> None:
        rules = self._state.rules
        known = scope["path"] in OPEN or scope["path"] == f"/v2/models/{self._state.name}/ready"
        if rules.key is not None and not known:
            scheme, _, given = heads_.get("authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not hmac.compare_digest(given.encode(), rules.key.encode()):
                raise Fault(401, "key", "the API key is missing or wrong", "send Authorization: Bearer KEY")
        body = await self._body(receive, heads_)
        sent = False

        async def given_body():
            nonlocal sent
            if not sent:
                sent = True
                return {"type": "http.request", "body": body, "more_body": False}
            return await asyncio.Future()  # `_until_left` listens

        work = asyncio.current_task()
        left = asyncio.ensure_future(_until_left(receive))
        left.add_done_callback(lambda done: done.cancelled() or work.cancel())
        try:
            answer = self._direct.get(scope["path"]) if scope["method"] == "POST" else None
            if answer is None:
                await self._app(scope, given_body, send)
            else:
                response = await answer(Request(scope, given_body))
                await response(scope, given_body, send)
        except asyncio.CancelledError:
            if not left.done():
                raise  # the server stops
            work.uncancel()
            raise ClientLeft from None
        finally:
            left.cancel()

    async def _body(self, receive, heads_: dict[str, str]) -> bytes:
        """The body. One that is too large is read to its end, or to IGNORED, before it is refused: a client that is
        still sending would not see the answer.
        """
        most, parts, size = self._state.rules.body, [], 0
        length = heads_.get("content-length", "")
        if length.isdecimal() and int(length) > IGNORED:
            raise _too_large(most)
        try:
            async with asyncio.timeout(self._state.rules.read):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientLeft
                    part = message.get("body", b"")
                    size += len(part)
                    if size <= most:
                        parts.append(part)
                    if size > IGNORED or (size > most and not message.get("more_body")):
                        raise _too_large(most)
                    if not message.get("more_body"):
                        return b"".join(parts)
        except TimeoutError as error:
            seconds = self._state.rules.read
            raise Fault(408, "body", f"the body did not come within {seconds:g} s", "send it at once") from error


def _too_large(most: int) -> Fault:
    return Fault(413, "body", f"a body may have {most:,} bytes", "send less")


def _spent(headers: list[tuple[bytes, bytes]]) -> dict[str, float]:
    """The milliseconds that an answer's headers tell, as attributes."""
    times = {b"x-queue-time": "queue", b"x-tokenization-time": "tokenizing", b"x-inference-time": "inference"}
    return {f"sparsebert.{times[name]}_ms": float(value) for name, value in headers if name in times}


class ClientLeft(Exception):
    """Nobody waits for the answer."""


async def _until_left(receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
