"""What can go wrong, as exceptions that know nothing of gRPC.

    TagstoreError
    ├── InvalidInput          the caller's request or data is wrong: fix it and try again
    │   ├── BadImage          not an image that can be decoded within the limits
    │   └── BadVector         wrong length, NaN, infinite or zero
    ├── NotFound              no such store, version, tag or file
    ├── AlreadyExists         a store or key of that name is there
    ├── FingerprintMismatch   vectors of another encoder
    ├── Busy                  another writer holds the store
    ├── WriteFailed           the disk is full, read-only or broken; what was committed stays
    ├── Damaged               what is on disk contradicts itself
    ├── MissingExtra          an optional part of the package is not installed
    ├── NotAuthenticated      the server wants a token or certificate, and this one is missing, wrong or expired
    ├── NotPermitted          the caller is known and may not do this
    └── Unavailable           the server cannot be reached, or did not answer in time
        ├── TimedOut          the caller's deadline passed before its turn came
        └── Overloaded        the server has more to do than it can: try again after `retry_after` seconds

Every message says what was wrong, where, and what to do. `status.py` holds the one table that maps these to status codes.
"""

from __future__ import annotations


class TagstoreError(Exception):
    """The root of all errors that this package raises on purpose."""


class InvalidInput(TagstoreError, ValueError):
    """The caller's request or data is wrong."""


class BadImage(InvalidInput):
    """Bytes that are no image, or one beyond the limits."""


class BadVector(InvalidInput):
    """A vector of the wrong length, or with values that mean nothing."""


class NotFound(TagstoreError, LookupError):
    """No such store, version, tag or file."""


class AlreadyExists(TagstoreError):
    """Something of that name is there."""


class FingerprintMismatch(TagstoreError):
    """The vectors of a query or an ingest come from another encoder than the store's."""

    @classmethod
    def between(cls, store: str, expected: object, got: object) -> FingerprintMismatch:
        """The message with both fingerprints in it."""
        return cls(
            f"store '{store}' holds vectors of encoder {expected}, these are of encoder {got}: "
            "cosines between them mean nothing. Use the store's encoder, or another store."
        )


class Busy(TagstoreError):
    """Another writer holds the store."""


class WriteFailed(TagstoreError, OSError):
    """The disk is full, read-only or broken; what was committed before stays."""


class Damaged(TagstoreError):
    """What is on disk contradicts itself."""


class MissingExtra(TagstoreError, ImportError):
    """An optional part of the package is not installed."""


class Unavailable(TagstoreError, ConnectionError):
    """The server cannot be reached, or did not answer in time."""


class TimedOut(Unavailable):
    """The caller's deadline passed before its turn came."""


class Overloaded(Unavailable):
    """The server has more to do than it can, or the caller has more in flight than it may."""

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after
        """Seconds after which it is worth trying again."""


class NotAuthenticated(TagstoreError):
    """A token or certificate that is missing, wrong or expired."""


class NotPermitted(TagstoreError):
    """A caller that is known and may not do this."""
