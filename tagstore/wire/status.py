"""Errors as gRPC status codes and back, in one table for both ends of the wire.

A status has a code, a message for people and, where a retry is worthwhile, the trailing metadata
`retry-after-ms`. An answer on a stream has all three in `Error`, so a bad request does not end it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import grpc

from tagstore import errors
from tagstore_proto.v1 import tagstore_pb2 as pb

RETRY_AFTER = "retry-after-ms"
_RETRY_AFTER_DIGITS = 12
"""Decimal digits of a `retry-after-ms` that are read: many years."""
_TOO_LARGE = "larger than max"
"""What gRPC writes of a message that is too large. It uses the code of an overload, but no retry helps."""
_UNREADABLE = ("Exception deserializing response", "CLIENT: Received message larger than max")
"""What gRPC writes at the client about bytes that are no message, and about an answer that is too large."""

STATUS: tuple[tuple[type[errors.TagstoreError], grpc.StatusCode], ...] = (
    (errors.InvalidInput, grpc.StatusCode.INVALID_ARGUMENT),
    (errors.NotFound, grpc.StatusCode.NOT_FOUND),
    (errors.AlreadyExists, grpc.StatusCode.ALREADY_EXISTS),
    (errors.FingerprintMismatch, grpc.StatusCode.FAILED_PRECONDITION),
    (errors.NotAuthenticated, grpc.StatusCode.UNAUTHENTICATED),
    (errors.NotPermitted, grpc.StatusCode.PERMISSION_DENIED),
    (errors.MissingExtra, grpc.StatusCode.UNIMPLEMENTED),
    (errors.Busy, grpc.StatusCode.ABORTED),
    (errors.Overloaded, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (errors.TimedOut, grpc.StatusCode.DEADLINE_EXCEEDED),
    (errors.Unavailable, grpc.StatusCode.UNAVAILABLE),
    (errors.WriteFailed, grpc.StatusCode.INTERNAL),
    (errors.Damaged, grpc.StatusCode.DATA_LOSS),
)
"""Status code of each class of errors; the first class that matches decides."""

_ERRORS: dict[grpc.StatusCode, type[errors.TagstoreError]] = {
    code: kind for kind, code in STATUS if code != grpc.StatusCode.INTERNAL
} | {
    grpc.StatusCode.OUT_OF_RANGE: errors.InvalidInput,
}
_CODES: dict[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}


def code_of(error: errors.TagstoreError) -> grpc.StatusCode:
    """Return the status code of an error."""
    return next((code for kind, code in STATUS if isinstance(error, kind)), grpc.StatusCode.INTERNAL)


def retry_after_ms(error: errors.TagstoreError) -> int:
    """Return the milliseconds after which to try again; 0 if the error does not say."""
    return max(1, math.ceil(error.retry_after * 1000)) if isinstance(error, errors.Overloaded) else 0


def trailing(error: errors.TagstoreError) -> tuple[tuple[str, str], ...]:
    """Return the trailing metadata of a call that an error ends."""
    wait = retry_after_ms(error)
    return ((RETRY_AFTER, str(wait)),) if wait else ()


def error_to_proto(error: errors.TagstoreError) -> pb.Error:
    """Make the answer on a stream that reports an error."""
    return pb.Error(code=code_of(error).value[0], message=str(error), retry_after_ms=retry_after_ms(error))


def error_from_proto(message: pb.Error) -> errors.TagstoreError:
    """Make the error that an answer on a stream reports."""
    code = _CODES.get(message.code, grpc.StatusCode.UNKNOWN)
    return error_of(code, message.message, message.retry_after_ms)


def error_of(code: grpc.StatusCode, message: str, retry_after_ms: int = 0) -> errors.TagstoreError:
    """Make the error that a status reports.

    RESOURCE_EXHAUSTED is an overload, with or without a time to try again, unless gRPC itself says that a
    message is too large. An answer that gRPC itself cannot read is a `BadAnswer`.
    """
    if any(mark in message for mark in _UNREADABLE):
        return errors.BadAnswer(message)
    if code == grpc.StatusCode.RESOURCE_EXHAUSTED:
        if retry_after_ms:
            return errors.Overloaded(message, retry_after_ms / 1000)
        if _TOO_LARGE in message:
            return errors.InvalidInput(f"too much for the server: {message}. Send less at once")
        return errors.Overloaded(message)
    return _ERRORS.get(code, errors.TagstoreError)(message)


def retry_after_of(metadata: Iterable[tuple[str, str | bytes]] | None) -> int:
    """Read `retry-after-ms` from a call's trailing metadata; 0 if there is none."""
    value = str(next((value for key, value in metadata or () if key == RETRY_AFTER), "0"))
    return int(value[:_RETRY_AFTER_DIGITS]) if value.isdecimal() else 0
