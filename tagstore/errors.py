"""The exceptions of this package, independent of gRPC.

    TagstoreError
    ├── InvalidInput          the caller's request or data is wrong
    │   ├── BadImage          bytes that do not decode to an image within the limits
    │   └── BadVector         a vector of the wrong length, or with NaN, infinite or only zero values
    ├── NotFound              no such store, version, tag or file
    ├── AlreadyExists         the name is taken
    ├── FingerprintMismatch   the vectors come from another encoder than the store's
    ├── Busy                  another writer holds the store
    ├── WriteFailed           the disk is full, read-only or broken; what was committed stays
    ├── Damaged               data on disk is inconsistent
    ├── MissingExtra          an optional part of the package is not installed
    ├── NotAuthenticated      the token or certificate is missing, wrong or expired
    ├── NotPermitted          the caller has no right to do this
    └── Unavailable           the server cannot be reached, or did not answer in time
        ├── TimedOut          the caller's deadline passed while the request waited
        ├── BadAnswer         what answered does not fit the question: another store, too few answers, NaN ...
        └── Overloaded        the server or the caller is at its limit: try again after `retry_after` seconds

Every message says what was wrong, where, and what to do. `wire/status.py` maps these classes to status codes.
"""

from __future__ import annotations


class TagstoreError(Exception):
    """Base class of all errors that this package raises on purpose."""


class InvalidInput(TagstoreError, ValueError):
    """The caller's request or data is wrong."""


class BadImage(InvalidInput):
    """Bytes that do not decode to an image within the limits."""


class BadVector(InvalidInput):
    """A vector of the wrong length, or with NaN, infinite or only zero values."""


class NotFound(TagstoreError, LookupError):
    """No such store, version, tag or file."""


class AlreadyExists(TagstoreError):
    """The name is taken."""


class FingerprintMismatch(TagstoreError):
    """The vectors of a query or an ingest come from another encoder than the store's."""

    @classmethod
    def between(cls, store: str, expected: object, got: object) -> FingerprintMismatch:
        """Make the error with both fingerprints in its message."""
        return cls(
            f"store '{store}' holds vectors of encoder {expected}, these are of encoder {got}: "
            "cosines between them mean nothing. Use the store's encoder, or another store."
        )


class Busy(TagstoreError):
    """Another writer holds the store."""


class WriteFailed(TagstoreError, OSError):
    """The disk is full, read-only or broken; what was committed before stays."""


class Damaged(TagstoreError):
    """Data on disk is inconsistent."""


class MissingExtra(TagstoreError, ImportError):
    """An optional part of the package is not installed."""


class Unavailable(TagstoreError, ConnectionError):
    """The server cannot be reached, or did not answer in time."""


class TimedOut(Unavailable):
    """The caller's deadline passed while the request waited."""


class BadAnswer(Unavailable):
    """A server's answer does not fit the question. As good as none: another server may answer it."""


class Overloaded(Unavailable):
    """The server or the caller has as many requests in flight as it may."""

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after
        """Seconds after which it is worth trying again."""


class NotAuthenticated(TagstoreError):
    """The token or certificate is missing, wrong or expired."""


class NotPermitted(TagstoreError):
    """The caller has no right to do this."""
