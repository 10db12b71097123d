"""The settings of a server, which its supervisor passes to its workers."""

from __future__ import annotations

import ipaddress
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from tagstore.errors import InvalidInput
from tagstore.serving.access import VARIABLE, Role


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of one worker.

    It refuses what exceeds them with RESOURCE_EXHAUSTED, and says when to try again if that is worthwhile.
    """

    threads: int = 8
    """Threads that decode, read the vocabulary and open versions."""
    in_flight: int = 1024
    """Calls in flight without streams: running, waiting, or with an answer that the client has not taken.
    This leaves room for a burst, such as the calls that arrive while a version is opened."""
    standing: int = 128
    """Calls in flight under overload, which is when no call was answered within `soon` for as long as
    `burst`. Further calls are refused, so that admitted ones are answered in time."""
    soon: float = 0.05
    """Seconds within which an answer is prompt."""
    burst: float = 1.0
    """Seconds without a prompt answer before the server counts as overloaded."""
    per_client: int = 64
    """Calls and streams in flight of one client, which is a caller with a token, else a connection."""
    streams: int = 8
    """Open streams, of which each may bring a message of the largest size at any time."""
    streams_per_client: int = 4
    """Open streams of one client."""
    streams_kept: int = 3
    """Places for streams that only administrators get."""
    idle_stream: float = 120.0
    """Seconds that a stream may wait for its caller's next message."""
    message_bytes: int = 18 << 20
    """Bytes of one request or answer: the largest image, and what comes with it."""
    request_bytes: int = 128 << 20
    """Bytes of memory for the requests that are being answered, over all callers."""
    answer_bytes: int = 96 << 20
    """Bytes of the answers that callers have yet to take, over all callers."""
    decode_bytes: int = 512 << 20
    """Bytes of memory for the images that are decoded at a time, over all callers. It is also the limit of
    one: 67 million pixels of a PNG, 53 of a JPEG, 33 of a WebP."""
    slow_requests: int = 4
    """Requests that take long to arrive, over all callers; a client gets half of them."""
    image_bytes: int = 16 << 20
    """Bytes of one encoded image."""
    images: int = 256
    """Images of one request, and texts of one request."""
    search_wait: float = 1.0
    """Longest expected wait of a query for the search, in seconds."""
    embed_wait: float = 1.0
    """Longest expected wait of an image or text for the encoder, in seconds."""
    search_queue: int = 128
    """Queries that may always wait for the search: a slow index delays them, but does not refuse them."""
    search_inline: float = 0.003
    """Seconds that the search of a lone query may take in the event loop's thread."""
    embed_queue: int = 8
    """Images and texts that may always wait for the encoder."""
    slow_reader: float = 60.0
    """Seconds that a client may take to accept an answer, or to send a request."""


@dataclass(frozen=True, slots=True)
class Settings:
    """Workers, security, observability and limits of a server."""

    workers: int = 1
    """Processes that serve; if more than one, a supervisor restarts those that die."""
    cores: int = 0
    """Cores of one worker, for searches, FAISS and torch; 0 for an equal share of the machine."""
    tls_certificate: str = ""
    tls_key: str = ""
    tls_client_ca: str = ""
    """File of authorities of client certificates; if set, every client must show a certificate."""
    tokens: str = ""
    """File of callers; see `serving.access`."""
    anonymous: Role | None = None
    """Role of callers without a token; see `serving.access.Access`."""
    insecure: bool = False
    """Listen where other machines can connect, although calls are not encrypted or callers not identified."""
    audit: str = ""
    """File that the audit log is appended to."""
    metrics: str = ""
    """HOST:PORT that answers Prometheus."""
    scrub: int = 0
    """MiB a second of stores to compare with their checksums in the background; 0 for none."""
    tracing: bool = False
    """Send spans to an OpenTelemetry collector."""
    json_logs: bool = False
    limits: Limits = field(default_factory=Limits)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Settings:
        value: dict[str, Any] = json.loads(text)
        return cls(**{**value, "limits": Limits(**value["limits"])})

    def describe(self) -> Mapping[str, Any]:
        """Summarise the settings as JSON values, for the log."""
        return {
            "workers": self.workers,
            "cores a worker": self.cores,
            "tls": "mutual" if self.tls_client_ca else "on" if self.tls_certificate else "off",
            "tokens": bool(self.tokens or os.environ.get(VARIABLE)),
        }


def default_workers() -> int:
    """Return one worker per two cores, at most eight: one core for Python, one for the search."""
    return max(1, min(8, (os.cpu_count() or 1) // 2))


def _split(address: str) -> tuple[str, bool]:
    """Return the host of HOST:PORT, and whether only this machine can reach it."""
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdecimal() or int(port) > 65535:
        raise InvalidInput(
            f"'{address}' is no HOST:PORT; for example 127.0.0.1:50051, or port 0 for a free one"
        )
    try:
        return host, ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host, host == "localhost"


def checked_host(address: str, settings: Settings) -> str:
    """Return the host of HOST:PORT.

    Raises `InvalidInput` if it or that of the metrics is malformed, or open to others without protection.
    """
    host, loopback = _split(address)
    if settings.metrics and not _split(settings.metrics)[1] and not settings.insecure:
        raise InvalidInput(
            f"the metrics at {settings.metrics} can be reached from other machines, and name stores to all "
            "who ask: let them listen on 127.0.0.1, or say --insecure if the network is trusted"
        )
    if bool(settings.tls_certificate) != bool(settings.tls_key) or (
        settings.tls_client_ca and not settings.tls_certificate
    ):
        raise InvalidInput("TLS needs both a certificate and its key: give --tls-certificate and --tls-key")
    identifies = bool(settings.tokens or settings.tls_client_ca or os.environ.get(VARIABLE))
    if not loopback and not settings.insecure and not (settings.tls_certificate and identifies):
        lacking = [
            protection
            for protection, enabled in (
                ("encrypt (--tls-certificate, --tls-key)", settings.tls_certificate),
                ("ask who calls (--tokens)", identifies),
            )
            if not enabled
        ]
        raise InvalidInput(
            f"{host} can be reached from other machines, and this server does not {' nor '.join(lacking)}: "
            "let it, listen on 127.0.0.1, or say --insecure if the network is trusted"
        )
    return host
