"""Everything that a server is told, and that it tells its workers."""

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
    """Of one worker. What goes beyond is refused with RESOURCE_EXHAUSTED; where it is worth trying again, with the time to wait."""

    threads: int = 8
    """For what is not searched but embedded, read or opened."""
    in_flight: int = 1024
    """Calls in hand: worked on, waiting, or with an answer that the client has not taken yet; streams not counted. Room for a burst, such
    as what comes while a new version is opened."""
    standing: int = 128
    """Calls in hand when there is too much to do: when for as long as `burst` none was answered as soon as `soon`. What would wait longer
    then is refused, so that what is taken in is still answered in time."""
    soon: float = 0.05
    """Seconds."""
    burst: float = 1.0
    """Seconds."""
    per_client: int = 64
    """Calls and streams of one client: a caller with a token, else a connection."""
    streams: int = 64
    """Open streams."""
    message_bytes: int = 64 << 20
    """Of one request or answer."""
    image_bytes: int = 32 << 20
    """Of one encoded image."""
    images: int = 256
    """Of one request; as many texts."""
    search_wait: float = 1.0
    """Seconds that a query may be expected to wait for the search."""
    embed_wait: float = 1.0
    """Seconds that an image or a text may be expected to wait for the encoder."""
    search_queue: int = 128
    """Queries that may always wait, whatever that takes: with a slow index they are waited for, not refused."""
    search_inline: float = 0.003
    """Seconds that a lone query's search may take in the thread that takes calls in."""
    embed_queue: int = 8
    """Images and texts that may always wait."""
    slow_reader: float = 60.0
    """Seconds that a client may take to accept an answer."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How a server is reached, by whom, and what it takes on."""

    workers: int = 1
    """Processes that serve; with more than one, a supervisor starts them again when they die."""
    cores: int = 0
    """Cores of one worker: searches that run at a time, threads of FAISS and torch; 0 for an equal share of the machine's."""
    tls_certificate: str = ""
    tls_key: str = ""
    tls_client_ca: str = ""
    """Authorities of client certificates; given, every client must show one."""
    tokens: str = ""
    """File of callers; see `serving.access`."""
    anonymous: Role | None = None
    """What callers without a token may do; see `serving.access.Access`."""
    insecure: bool = False
    """Listen where other machines can reach it, though nothing is encrypted or nobody is asked who they are."""
    audit: str = ""
    """File that the audit log is appended to."""
    metrics: str = ""
    """HOST:PORT where Prometheus may ask."""
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
        """What was chosen, as JSON values."""
        return {
            "workers": self.workers,
            "cores a worker": self.cores,
            "tls": "mutual" if self.tls_client_ca else "on" if self.tls_certificate else "off",
            "tokens": bool(self.tokens or os.environ.get(VARIABLE)),
        }


def default_workers() -> int:
    """A worker for every two cores, eight at most: one core for Python, one for the search."""
    return max(1, min(8, (os.cpu_count() or 1) // 2))


def checked_host(address: str, settings: Settings) -> str:
    """The host of HOST:PORT. Raises `InvalidInput` for an address that is none, or one that is open to others without protection."""
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdecimal() or int(port) > 65535:
        raise InvalidInput(
            f"'{address}' is no HOST:PORT; for example 127.0.0.1:50051, or port 0 for a free one"
        )
    try:
        loopback = ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        loopback = host == "localhost"
    if bool(settings.tls_certificate) != bool(settings.tls_key) or (
        settings.tls_client_ca and not settings.tls_certificate
    ):
        raise InvalidInput("TLS needs both a certificate and its key: give --tls-certificate and --tls-key")
    asks = bool(settings.tokens or settings.tls_client_ca or os.environ.get(VARIABLE))
    if not loopback and not settings.insecure and not (settings.tls_certificate and asks):
        lacking = [
            what
            for what, there in (
                ("encrypt (--tls-certificate, --tls-key)", settings.tls_certificate),
                ("ask who calls (--tokens)", asks),
            )
            if not there
        ]
        raise InvalidInput(
            f"{host} can be reached from other machines, and this server does not {' nor '.join(lacking)}: "
            "let it, listen on 127.0.0.1, or say --insecure if the network is trusted"
        )
    return host
