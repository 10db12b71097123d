"""Ed25519 signatures (RFC 8032) of manifests; keys are PEM files of `openssl genpkey -algorithm ed25519`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key

from tagstore.errors import Damaged, InvalidInput, NotFound

BYTES = 64
"""Bytes of a signature."""


class Signer:
    """Signs with a private key. Raises `NotFound` or `InvalidInput` for a file that holds none."""

    def __init__(self, path: str | Path) -> None:
        key = _pem(Path(path), lambda data: load_pem_private_key(data, password=None), "private")
        if not isinstance(key, Ed25519PrivateKey):
            raise InvalidInput(f"{path} holds a private key of another kind than Ed25519")
        self._key = key
        self.public = key.public_key().public_bytes_raw().hex()
        """The public key, hex."""

    def sign(self, data: bytes) -> bytes:
        """Sign data; returns 64 bytes."""
        return self._key.sign(data)


def public_key(path: str | Path) -> str:
    """Read the public key of a PEM file, hex. Raises `NotFound`, or `InvalidInput` if there is none in it."""
    key = _pem(Path(path), load_pem_public_key, "public")
    if not isinstance(key, Ed25519PublicKey):
        raise InvalidInput(f"{path} holds a public key of another kind than Ed25519")
    return key.public_bytes_raw().hex()


def check(data: bytes, signature: bytes, public: str) -> None:
    """Raises `Damaged` unless the owner of a public key (hex) signed the data."""
    try:
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(public)).verify(signature, data)
    except InvalidSignature:
        raise Damaged(
            f"the signature is not one of this manifest by {public}: do not trust the bundle"
        ) from None


def _pem(path: Path, load: Callable[[bytes], Any], what: str) -> Any:
    try:
        return load(path.read_bytes())
    except OSError as error:
        raise NotFound(f"cannot read the {what} key {path}: {error.strerror}") from error
    except (ValueError, TypeError, UnsupportedAlgorithm):
        make = "openssl genpkey -algorithm ed25519" if what == "private" else "openssl pkey -pubout"
        raise InvalidInput(
            f"{path} holds no {what} key in PEM without a password: `{make}` writes one"
        ) from None
