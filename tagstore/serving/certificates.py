"""TLS and mutual TLS from files that may be replaced while the server runs."""

from __future__ import annotations

import logging
import ssl
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from tagstore.errors import InvalidInput

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Tls:
    """Paths of PEM files."""

    certificate: str
    """Chain of the server's certificate."""
    key: str
    client_ca: str = ""
    """Authorities of client certificates; if set, every client must show a certificate."""

    @property
    def files(self) -> Sequence[Path]:
        return [Path(name) for name in (self.certificate, self.key, self.client_ca) if name]


class Certificates:
    """Server credentials, read again when the files change. Raises `InvalidInput` if they are unusable."""

    def __init__(self, tls: Tls) -> None:
        self._tls = tls
        self._lock = threading.Lock()
        self._seen = _identities(tls)
        self._configuration = _load(tls)

    def credentials(self) -> Any:
        """Make the credentials of one listener; all listeners share the files and the configuration."""
        used = self._configuration

        def current() -> Any:
            nonlocal used
            latest = self._latest()
            if latest is used:
                return None  # unchanged
            used = latest
            return latest

        return grpc.dynamic_ssl_server_credentials(
            used, current, require_client_authentication=bool(self._tls.client_ca)
        )

    def _latest(self) -> Any:
        with self._lock:
            try:
                now = _identities(self._tls)
                if now != self._seen:
                    self._seen = now
                    self._configuration = _load(self._tls)
                    log.warning("read the certificate %s again", self._tls.certificate)
            except InvalidInput as error:
                log.error("the previous certificate stays in use: %s", error)
            return self._configuration


def _identities(tls: Tls) -> list[tuple[int, int]]:
    try:
        return [(status.st_mtime_ns, status.st_ino) for status in (path.stat() for path in tls.files)]
    except OSError as error:
        raise InvalidInput(f"{error.filename} cannot be read: {error.strerror}") from error


def _load(tls: Tls) -> Any:
    try:
        # with a certificate whose key is not there yet, gRPC would refuse every handshake
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(tls.certificate, tls.key)
        roots = None
        if tls.client_ca:
            context.load_verify_locations(tls.client_ca)
            roots = Path(tls.client_ca).read_bytes()
        pair = (Path(tls.key).read_bytes(), Path(tls.certificate).read_bytes())
    except (OSError, ssl.SSLError) as error:
        raise InvalidInput(
            f"certificate {tls.certificate} and key {tls.key} cannot be used: {error}"
        ) from error
    return grpc.ssl_server_certificate_configuration([pair], root_certificates=roots)
