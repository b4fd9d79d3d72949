"""What a client is told when something went wrong: one shape for all errors."""

from __future__ import annotations

import math

from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from sparsebert.errors import InputError, SparsebertError, cut
from sparsebert.serving.batcher import Refused
from sparsebert.serving.served import TooLate, Unavailable


class Fault(Exception):
    """An answer that is an error: {error, type, request_id, hint} with this status."""

    def __init__(self, status: int, kind: str, error: str, hint: str = "", retry_after: float | None = None):
        super().__init__(error)
        self.status, self.kind, self.error, self.hint, self.retry_after = status, kind, error, hint, retry_after


def fault_of(error: Exception) -> Fault:
    """The answer to what went wrong. It does not say where: a request that has its fault, which has the frames, which
    have the request would stay, with its body, until the garbage collector comes.
    """
    if isinstance(error, Fault):
        error.__cause__ = error.__context__ = None
        return error.with_traceback(None)
    if isinstance(error, HTTPException):
        return Fault(error.status_code, "route", str(error.detail), "see /openapi.json")
    if isinstance(error, InputError):
        return Fault(422, "validation", cut(error.problem), cut(error.fix))
    if isinstance(error, Refused):
        return Fault(429, "overloaded", str(error), "come again later", error.retry_after)
    if isinstance(error, Unavailable):
        return Fault(503, "unavailable", str(error), "come again later", error.retry_after)
    if isinstance(error, TooLate):
        return Fault(503, "deadline", str(error), "come again later", 1.0)
    if isinstance(error, SparsebertError):
        return Fault(500, "model", cut(error.problem), cut(error.fix))
    return Fault(500, "internal", "the server failed", "its log has more, under the request's id")


def answer_of(fault: Fault, request_id: str) -> Response:
    headers = {} if fault.retry_after is None else {"retry-after": str(max(1, math.ceil(fault.retry_after)))}
    if fault.status == 401:
        headers["www-authenticate"] = "Bearer"
    if fault.status in (401, 408, 413):
        headers["connection"] = "close"  # what is left of the body is not read
    content = {"error": fault.error, "type": fault.kind, "request_id": request_id, "hint": fault.hint}
    return JSONResponse(content, fault.status, headers)
