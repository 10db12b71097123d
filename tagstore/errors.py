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
    └── Unavailable           the server cannot be reached, or did not answer in time

Every message says what was wrong, where, and what to do. `service.py` holds the one table that maps these to status codes.
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
