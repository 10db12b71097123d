"""One process that serves: service, administration, health and reflection on one port, drained on SIGTERM."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import logging
import os
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc

from tagstore.errors import Unavailable
from tagstore.serving import metrics, tracing
from tagstore.serving.access import Access
from tagstore.serving.admin_service import AdminService
from tagstore.serving.audit import Audit
from tagstore.serving.certificates import Certificates, Tls
from tagstore.serving.gate import Call, Door, Gate
from tagstore.serving.live_catalog import LiveCatalog
from tagstore.serving.loop import loop, run
from tagstore.serving.methods import Methods
from tagstore.serving.ports import reserved
from tagstore.serving.retrieve_service import TagStoreService
from tagstore.serving.settings import Settings, checked_host
from tagstore_proto.v1 import tagstore_pb2, tagstore_pb2_grpc

log = logging.getLogger(__name__)

DRAIN_SECONDS = 30.0
SERVICE = tagstore_pb2.DESCRIPTOR.services_by_name["TagStore"].full_name
ADMIN = tagstore_pb2.DESCRIPTOR.services_by_name["Admin"].full_name
SWITCH_SECONDS = 0.0005
"""How long a thread may hold the interpreter while another waits for it; Python's 5 ms are longer than our calls take."""
LONG_THREADS = 8
"""Administrators' calls at a time; others wait."""
ACCEPTORS = 8
"""Listeners of a process. gRPC's asyncio face takes one call at a time from each, several turns of the loop apart: with one, a busy server
takes in half of what it could answer."""
PENDING = 64
"""Calls of an acceptor that gRPC holds before we have seen them. Beyond that it ends them itself, with CANCELLED: what is more than can
even be refused has to be turned away without Python."""
STREAMS_A_CONNECTION = 1000
"""Calls on one connection; what exceeds them waits at the client. Also what a client can hold that takes no answers."""
M_ARENA_MAX, ARENAS = -8, 2
"""Of glibc's malloc: with an arena a thread, memory that one has freed is of no use to another, and a busy server grows."""


class Server:
    """A server of all stores under `root`. `start` binds and answers health; the stores are served once it returns.

    Args:
        root: directory of the stores.
        address: `HOST:PORT`; port 0 picks a free one.
        device: for the encoder; see `load_encoder`.
        insecure: as `Settings.insecure`.
        settings: access, limits, metrics.
        shared: listen beside other processes on the same port.

    Raises:
        InvalidInput: an address, certificate or file of tokens that cannot be used.
        NotFound: no such directory.
        Unavailable: the address is taken.
    """

    def __init__(
        self,
        root: str | Path,
        address: str = "127.0.0.1:50051",
        *,
        device: str = "auto",
        insecure: bool = False,
        settings: Settings = Settings(),  # noqa: B008  frozen
        shared: bool = False,
    ) -> None:
        if insecure:
            settings = replace(settings, insecure=True)
        self._host = checked_host(address, settings)
        self.settings = settings
        limits = settings.limits
        self.catalog = LiveCatalog(root, device=device)
        access = Access(
            settings.tokens or None, anonymous=settings.anonymous, certificates=bool(settings.tls_client_ca)
        )
        self.gate = Gate(access, limits, Audit(settings.audit or None))
        self.announce: Callable[[Mapping[str, Any]], None] = lambda message: None
        """Told what the other workers on this port must know: {"unload": STORE}."""
        self.gate.closed = "the server is opening its stores: try again in a moment"
        if settings.tracing:
            tracing.enable()
        # administrators have threads of their own: what takes long would keep the others from the short calls
        self._threads = ThreadPoolExecutor(limits.threads, thread_name_prefix="rpc")
        self._service = TagStoreService(
            self.catalog,
            limits,
            self._threads,
            loop(),
            searchers=max(2, settings.cores or os.cpu_count() or 1),
            alone=self.gate.is_idle,
        )
        self.searches, self.embeddings = self._service.searches, self._service.embeddings
        self._long_threads = ThreadPoolExecutor(LONG_THREADS, thread_name_prefix="rpc-long")
        self._ended = threading.Event()
        self._watch: threading.Thread | None = None
        self._stop_metrics: Callable[[], None] | None = None
        # a port of its own is held until its acceptors are there: without that a second server on it would be a silent half of the traffic
        held = None if shared else reserved(self._host, int(address.rpartition(":")[2]), address)
        self._port = int(address.rpartition(":")[2]) if held is None else held.getsockname()[1]
        try:
            self._acceptors, self._health = run(self._bound(f"{self._host}:{self._port}"))
        finally:
            if held is not None:
                held.close()

    async def _bound(self, address: str) -> tuple[list[Any], _Health]:
        """The parts that belong to the event loop."""
        settings, limits = self.settings, self.settings.limits
        calls, long = Methods(self.gate, self._threads), Methods(self.gate, self._long_threads, long=True)
        tagstore_pb2_grpc.add_TagStoreServicer_to_server(self._service, calls)
        admin = AdminService(self.catalog, self.gate, lambda message: self.announce(message))
        tagstore_pb2_grpc.add_AdminServicer_to_server(admin, long)
        names = (SERVICE, ADMIN, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection_pb2_grpc.add_ServerReflectionServicer_to_server(_Reflection(names), long)
        limited = [f"/{SERVICE}/{method}" for method in ("Retrieve", "GetTags", "ListStores", "GetStore")]
        checks = _Health()
        for name in ("", SERVICE):
            await checks.set(name, health_pb2.HealthCheckResponse.NOT_SERVING)
        door = Door({**calls.handlers, **long.handlers}, self.gate, limited)
        files = Tls(settings.tls_certificate, settings.tls_key, settings.tls_client_ca)
        certificates = Certificates(files) if settings.tls_certificate else None
        acceptors = [grpc.aio.server(options=_options(limits.message_bytes)) for _ in range(ACCEPTORS)]
        for acceptor in acceptors:
            acceptor.add_generic_rpc_handlers((door,))
            health_pb2_grpc.add_HealthServicer_to_server(checks, _Generic(acceptor))
            try:
                if certificates is not None:
                    acceptor.add_secure_port(address, certificates.credentials())
                else:
                    acceptor.add_insecure_port(address)
            except RuntimeError as error:
                raise Unavailable(
                    f"cannot listen on {address}: is another server running there? Port 0 picks a free one"
                ) from error
        return acceptors, checks

    async def _all(self, what: Callable[[Any], Awaitable[None]]) -> None:
        await asyncio.gather(*map(what, self._acceptors))

    @property
    def address(self) -> str:
        """`HOST:PORT` that clients connect to."""
        return f"{self._host}:{self._port}"

    def start(self, *, warm_first: bool = False) -> None:
        """Listen, open the stores and answer, load the encoders; until then health says NOT_SERVING.

        Calls are refused with UNAVAILABLE until the stores are open, and those by image or text until the encoders are there.

        Args:
            warm_first: open the stores before listening: beside others that serve meanwhile, nobody is to meet a closed door.
        """
        sys.setswitchinterval(SWITCH_SECONDS)
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, ARENAS)
        if not warm_first:
            run(self._all(lambda acceptor: acceptor.start()))
        for info in self.catalog.warm(opened=self.gate.open):
            log.info(
                "serving %s@%d: %d entries, %s", info.store, info.version, info.entries, info.fingerprint
            )
        # what is there now stays: no collection, and unloading a store asks for one, has to look at all of torch again
        gc.collect()
        gc.freeze()
        for name in ("", SERVICE):
            run(self._health.set(name, health_pb2.HealthCheckResponse.SERVING))
        if warm_first:
            run(self._all(lambda acceptor: acceptor.start()))
        self._watch = threading.Thread(target=self._watch_readers, name="rpc-watch", daemon=True)
        self._watch.start()
        if self.settings.metrics:
            self._stop_metrics, port = metrics.serve(self.settings.metrics)
            log.info("metrics on port %d", port)
        log.info("listening on %s: %s", self.address, self.settings.describe())

    def stop(self, grace: float = DRAIN_SECONDS) -> None:
        """Refuse new requests, finish those in flight within `grace` seconds."""
        run(self._health.enter_graceful_shutdown())
        run(self._all(lambda acceptor: acceptor.stop(grace)))
        self._ended.set()
        self._service.close()
        for threads in (self._threads, self._long_threads):
            threads.shutdown(wait=False)
        if self._watch is not None:
            self._watch.join()
        if self._stop_metrics is not None:
            self._stop_metrics()
        self.gate.audit.close()

    def _watch_readers(self) -> None:
        while not self._ended.wait(min(1.0, self.settings.limits.slow_reader / 4)):
            loop().call_soon_threadsafe(self.gate.end_slow)


class _Health(health.aio.HealthServicer):
    """Health for everybody; who watches it does not keep a server from ending."""

    def __init__(self) -> None:
        super().__init__()
        self._ending = asyncio.Event()

    async def Watch(self, request: Any, context: Any) -> None:  # noqa: N802
        watching, ending = (
            asyncio.ensure_future(super().Watch(request, context)),
            asyncio.ensure_future(self._ending.wait()),
        )
        try:
            await asyncio.wait((watching, ending), return_when=asyncio.FIRST_COMPLETED)
        finally:
            watching.cancel()
            ending.cancel()

    async def enter_graceful_shutdown(self) -> None:
        await super().enter_graceful_shutdown()
        self._ending.set()


class _Reflection(reflection.aio.ReflectionServicer):
    """Reflection for those who may call."""

    async def ServerReflectionInfo(  # noqa: N802
        self, requests: AsyncIterator[Any], call: Call, send: Callable[[Any], Awaitable[None]]
    ) -> None:
        async for response in super().ServerReflectionInfo(requests, call):
            await send(response)


class _Generic:
    """A server that takes handlers by name as they come: registered ones each cost every call some time in gRPC's asyncio face."""

    def __init__(self, server: Any) -> None:
        self.add_generic_rpc_handlers = server.add_generic_rpc_handlers

    def add_registered_method_handlers(self, service: str, handlers: Any) -> None:
        """They were added already."""


def _options(message_bytes: int) -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", message_bytes),
        ("grpc.max_send_message_length", message_bytes),
        ("grpc.max_metadata_size", 16 << 10),
        ("grpc.max_concurrent_streams", STREAMS_A_CONNECTION),
        ("grpc.server.max_pending_requests", PENDING),
        ("grpc.server.max_pending_requests_hard_limit", 2 * PENDING),
        ("grpc.so_reuseport", 1),
        # a peer that is gone without a word is noticed, and one that never speaks is hung up on
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.http2.ping_timeout_ms", 10_000),  # gRPC 1.85 heeds no keepalive_timeout_ms
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
        ("grpc.server_handshake_timeout_ms", 10_000),
    ]
