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
_PRIME = 2**255 - 19
_CURVE = -121665 * pow(121666, -1, _PRIME)
"""d of the curve -x² + y² = 1 + d x² y² (RFC 8032, section 5.1)."""


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
    public = key.public_bytes_raw().hex()
    _check_strong(public)
    return public


def check(data: bytes, signature: bytes, public: str) -> None:
    """Raises `Damaged` unless the owner of a public key (hex) signed the data.

    Raises `InvalidInput` for a key for which anybody can sign.
    """
    _check_strong(public)
    try:
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(public)).verify(signature, data)
    except InvalidSignature:
        raise Damaged(
            f"the signature is not one of this manifest by {public}: do not trust the bundle"
        ) from None


def _check_strong(public: str) -> None:
    """Raises `InvalidInput` for a point of small order, such as 32 zeros.

    Signatures for such a key can be made by anybody. A point (x, y) has an order of 8 or less exactly if
    y (y² - 1) (d y⁴ + 2 y² - 1) = 0: the factors are those of order 4, of orders 1 and 2, and of order 8,
    where twice the point has y = 0.
    """
    y = int.from_bytes(bytes.fromhex(public), "little") & ~(1 << 255)  # without the sign of x
    square = y * y
    if y >= _PRIME or y * (square - 1) * (_CURVE * square * square + 2 * square - 1) % _PRIME == 0:
        raise InvalidInput(
            f"the public key {public} belongs to nobody: anybody can sign for it, so its signatures prove "
            "nothing. Get the signer's real key and a bundle signed with it"
        )


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
