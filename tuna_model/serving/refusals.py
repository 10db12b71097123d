"""Errors as OpenAI's API writes them: {"error": {"message", "type", "param", "code"}} and a status."""

from __future__ import annotations

import logging
from typing import Any

from starlette.responses import JSONResponse

from tagstore.errors import InvalidInput, Overloaded, TagstoreError, TimedOut

log = logging.getLogger(__name__)

INTERNAL_ERROR = "the model failed on this request; the server's log says why"
_INVALID = "invalid_request_error"


class Refused(InvalidInput):
    """A request that is refused, with what a program needs to know of the reason."""

    def __init__(
        self, message: str, *, param: str | None = None, code: str | None = None, status: int = 400
    ) -> None:
        """
        Args:
            param: path of the field that is wrong, as in messages[0].role.
            code: OpenAI's name of the reason, if it has one.
        """
        super().__init__(message)
        self.param, self.code, self.status = param, code, status


def error_response(error: Exception) -> JSONResponse:
    """The answer to a request that failed."""
    headers = {"Connection": "close"}  # the rest of a body is not read
    if isinstance(error, Overloaded):
        headers["Retry-After"] = str(int(error.retry_after) or 1)
    if isinstance(error, Refused) and error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error_value(error), _status(error), headers)


def error_value(error: Exception) -> dict[str, Any]:
    """An error as JSON. One that is not ours is logged, and its caller learns nothing of it."""
    if isinstance(error, TagstoreError):
        message = str(error)
    else:
        log.error("a request failed", exc_info=error)
        message = INTERNAL_ERROR
    param, code = (error.param, error.code) if isinstance(error, Refused) else (None, None)
    return {"error": {"message": message, "type": _type(error), "param": param, "code": code}}


def _status(error: Exception) -> int:
    if isinstance(error, Refused):
        return error.status
    for kind, status in ((Overloaded, 429), (TimedOut, 408), (InvalidInput, 400), (TagstoreError, 503)):
        if isinstance(error, kind):
            return status
    return 500


def _type(error: Exception) -> str:
    for kind, name in (
        (Overloaded, "overloaded"),
        (TimedOut, "request_timeout"),
        (InvalidInput, _INVALID),
        (TagstoreError, "unavailable"),
    ):
        if isinstance(error, kind):
            return name
    return "internal_error"
