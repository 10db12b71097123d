"""The gRPC server: service, health and reflection on one port, drained on SIGTERM."""

from __future__ import annotations

import ipaddress
import logging
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from tagstore.catalog import Catalog
from tagstore.errors import InvalidInput, Unavailable
from tagstore.service import TagStoreService
from tagstore_proto.v1 import tagstore_pb2, tagstore_pb2_grpc

log = logging.getLogger(__name__)

MAX_MESSAGE = 64 << 20
DRAIN_SECONDS = 30.0
WAITING = 16
"""Requests in hand for each thread that answers; more are refused with RESOURCE_EXHAUSTED instead of filling the memory."""
SERVICE = tagstore_pb2.DESCRIPTOR.services_by_name["TagStore"].full_name


class Server:
    """A server of all stores under `root`. `start` binds and answers health; the stores are served once it returns.

    Args:
        root: directory of the stores.
        address: `HOST:PORT`; port 0 picks a free one.
        device: for the encoder; see `load_encoder`.
        threads: requests answered at a time.
        insecure: allow an address that other machines can reach, though nothing is encrypted and nobody is asked who they are.
    """

    def __init__(
        self, root: str | Path, address: str = "127.0.0.1:50051", *, device: str = "auto", threads: int = 8, insecure: bool = False
    ) -> None:
        self._host = _checked_host(address, insecure)
        self._catalog = Catalog(root, device=device)
        # without SO_REUSEPORT a second server on the same port is an error, not a silent half of the traffic
        options = [
            ("grpc.max_receive_message_length", MAX_MESSAGE),
            ("grpc.max_send_message_length", MAX_MESSAGE),
            ("grpc.so_reuseport", 0),
        ]
        self._server = grpc.server(
            ThreadPoolExecutor(threads, thread_name_prefix="rpc"), options=options, maximum_concurrent_rpcs=threads * WAITING
        )
        self._health = health.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        tagstore_pb2_grpc.add_TagStoreServicer_to_server(TagStoreService(self._catalog), self._server)
        reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server)
        self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        try:
            self._port = self._server.add_insecure_port(address)
        except RuntimeError as error:
            raise Unavailable(f"cannot listen on {address}: is another server running there? Port 0 picks a free one") from error

    @property
    def address(self) -> str:
        """`HOST:PORT` that clients connect to."""
        return f"{self._host}:{self._port}"

    def start(self) -> None:
        """Listen, open and warm the stores, then answer."""
        self._server.start()
        for info in self._catalog.warm():
            log.info("serving %s@%d: %d entries, %s", info.store, info.version, info.entries, info.fingerprint)
        self._set_health(health_pb2.HealthCheckResponse.SERVING)

    def stop(self, grace: float = DRAIN_SECONDS) -> None:
        """Refuse new requests, finish those in flight within `grace` seconds."""
        self._health.enter_graceful_shutdown()
        self._server.stop(grace).wait()

    def run(self, ready: Callable[[str], None]) -> None:
        """Start, call `ready` with the address, serve until SIGINT or SIGTERM, drain."""
        stopping = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stopping.set())
        self.start()
        ready(self.address)
        stopping.wait()
        log.info("draining")
        self.stop()

    def _set_health(self, status: int) -> None:
        for name in ("", SERVICE):
            self._health.set(name, status)


def _checked_host(address: str, insecure: bool) -> str:
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdecimal() or int(port) > 65535:
        raise InvalidInput(f"'{address}' is no HOST:PORT; for example 127.0.0.1:50051, or port 0 for a free one")
    try:
        loopback = ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        loopback = host == "localhost"
    if not loopback and not insecure:
        raise InvalidInput(
            f"{host} can be reached from other machines, and this server neither encrypts nor asks for a token: "
            "listen on 127.0.0.1, or say --insecure if the network is trusted"
        )
    return host
