"""Open channels to the servers of a URL, with its token and certificates, for all kinds of calls."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc

from tagstore.client.options import Options
from tagstore.client.urls import Location
from tagstore.errors import InvalidInput, NotFound

MAX_MESSAGE_BYTES = 64 << 20
TOKEN_VARIABLE = "TAGSTORE_TOKEN"
KEEPALIVE_SECONDS = 10.0
"""Seconds without a byte, during a call, after which the server is asked for a sign of life.

A machine that vanished closes no connection: without this, calls would time out for as long as TCP repeats
itself, a quarter of an hour.
"""
KEEPALIVE_TIMEOUT = 5.0
"""Seconds that the server has to answer that."""
_LOOPBACK = re.compile(r"(localhost|127\.\d+\.\d+\.\d+|\[::1\]):\d+")


class Channels:
    """How the servers of one URL are reached. Opens channels, but keeps none."""

    def __init__(self, location: Location, options: Options) -> None:
        self._location, self._options = location, options
        # a token of the environment was not meant for every server that a URL names over a plain connection
        private = location.scheme == "grpcs" or all(map(_LOOPBACK.fullmatch, location.addresses))
        token = options.token or (os.environ.get(TOKEN_VARIABLE, "") if private else "")
        self.metadata = (("authorization", f"Bearer {token}"),) if token else ()
        tls = [name for name in ("ca", "cert", "cert_key", "server_name") if getattr(options, name)]
        if tls and location.scheme == "grpc":
            raise InvalidInput(
                f"{', '.join(tls)} given for a plain connection: write grpcs://{location.place}/..."
            )
        if bool(options.cert) != bool(options.cert_key):
            raise InvalidInput("a client's certificate is two files: give both cert and cert_key")

    def open(
        self,
        address: str,
        open_insecure: Callable[..., Any] = grpc.insecure_channel,
        open_secure: Callable[..., Any] = grpc.secure_channel,
    ) -> Any:
        """Open a channel to an address with the constructors of `grpc` or of `grpc.aio`."""
        options: list[tuple[str, Any]] = [
            ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
            ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
            ("grpc.enable_retries", 0),  # `resilience` counts and times the tries
            # notice within seconds that a server is back; gRPC's default is two minutes
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 2000),
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.keepalive_time_ms", int(1000 * KEEPALIVE_SECONDS)),
            # gRPC 1.85 ignores keepalive_timeout_ms
            ("grpc.http2.ping_timeout_ms", int(1000 * KEEPALIVE_TIMEOUT)),
        ]
        if _LOOPBACK.fullmatch(address):
            options.append(("grpc.enable_http_proxy", 0))  # a proxy cannot reach this machine's loopback
        if self._location.scheme == "grpc":
            return open_insecure(address, options=options)
        if self._options.server_name:
            options.append(("grpc.ssl_target_name_override", self._options.server_name))
        pem = {name: _read_pem(name, getattr(self._options, name)) for name in ("ca", "cert", "cert_key")}
        credentials = grpc.ssl_channel_credentials(pem["ca"], pem["cert_key"], pem["cert"])
        return open_secure(address, credentials, options=options)


def _read_pem(option: str, path: str) -> bytes | None:
    if not path:
        return None
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise NotFound(f"option {option}: cannot read {path}: {error.strerror}") from error
