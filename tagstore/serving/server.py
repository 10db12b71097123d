"""One serving process: service, administration, health and reflection on one port."""

from __future__ import annotations

import asyncio
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

from tagstore.encoding.decode_memory import MemoryBudget
from tagstore.errors import Unavailable
from tagstore.serving import allocator, probes, tracing
from tagstore.serving.access import Access
from tagstore.serving.admin_service import AdminService
from tagstore.serving.audit import Audit
from tagstore.serving.call import Call
from tagstore.serving.certificates import Certificates, Tls
from tagstore.serving.damages import Damages
from tagstore.serving.gate import Door, Gate
from tagstore.serving.live_catalog import LiveCatalog
from tagstore.serving.loop import loop, run
from tagstore.serving.methods import Methods, streaming
from tagstore.serving.ports import reserve
from tagstore.serving.retrieve_service import TagStoreService
from tagstore.serving.scrubber import Scrubber
from tagstore.serving.settings import Settings, checked_host
from tagstore_proto.v1 import tagstore_pb2, tagstore_pb2_grpc

log = logging.getLogger(__name__)

DRAIN_SECONDS = 30.0
"""Seconds that calls in flight get to finish when the server stops."""
SERVICE = tagstore_pb2.DESCRIPTOR.services_by_name["TagStore"].full_name
ADMIN = tagstore_pb2.DESCRIPTOR.services_by_name["Admin"].full_name
SWITCH_SECONDS = 0.0005
"""Seconds that a thread may hold the interpreter while another waits: Python's 5 ms exceed most calls."""
LONG_THREADS = 8
"""Long calls that run at a time, of administrators and of all others; further ones wait."""
ACCEPTORS = 8
"""Listeners of a process. gRPC's asyncio server takes one call at a time from each, several turns of the loop
apart: with one, a busy server receives half of what it could answer."""
PENDING = 64
"""Calls that gRPC holds for an acceptor before Python sees them. It ends further ones with CANCELLED: Python
could not even refuse so many."""
STREAMS_A_CONNECTION = 1000
"""Calls on one connection; further ones wait at the client. This also bounds the calls of a client that reads
no answers."""


class Server:
    """Serves all stores under `root`. The port answers health checks first, and queries once `start` returns.

    Args:
        root: directory of the stores.
        address: `HOST:PORT`; port 0 picks a free one.
        device: device of the encoders; see `load_encoder`.
        insecure: as `Settings.insecure`.
        settings: access, limits, metrics.
        shared: share the port with other processes.

    Raises:
        InvalidInput: the address, a certificate or the file of tokens cannot be used.
        NotFound: the directory does not exist.
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
        self.catalog = LiveCatalog(root, device=device, decode_memory=MemoryBudget(limits.decode_bytes))
        access = Access(
            settings.tokens or None, anonymous=settings.anonymous, certificates=bool(settings.tls_client_ca)
        )
        self.gate = Gate(access, limits, Audit(settings.audit or None))
        self.announce: Callable[[Mapping[str, Any]], None] = lambda message: None
        """Called with what supervisor and other workers must know: {"unload": STORE}, {"damaged": {...}},
        {"leave_out": [STORE, what is wrong]}."""
        self.gate.closed = "the server is opening its stores: try again in a moment"
        if settings.tracing:
            tracing.enable()
        # administrators have threads of their own, so that long calls do not delay short ones
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
        self._admin_threads = ThreadPoolExecutor(LONG_THREADS, thread_name_prefix="rpc-admin")
        self._ended = threading.Event()
        self._watch: threading.Thread | None = None
        self._scrubber: Scrubber | None = None
        self._stop_probes: Callable[[], None] | None = None
        self._phase = "opening stores"
        # until the acceptors listen the port is reserved: a second server on it would take half of the calls
        port = int(address.rpartition(":")[2])
        reservation = None if shared else reserve(self._host, port, address)
        self._port = port if reservation is None else reservation.getsockname()[1]
        try:
            self._acceptors, self._health = run(self._bound(f"{self._host}:{self._port}"))
        finally:
            if reservation is not None:
                reservation.close()

    async def _bound(self, address: str) -> tuple[list[Any], _Health]:
        """Make the parts that belong to the event loop."""
        settings, limits = self.settings, self.settings.limits
        calls, long = (
            Methods(self.gate, self._threads),
            Methods(self.gate, self._long_threads, kept=self._admin_threads, long=True),
        )
        tagstore_pb2_grpc.add_TagStoreServicer_to_server(self._service, calls)
        admin = AdminService(self.catalog, self.gate, lambda message: self.announce(message))
        tagstore_pb2_grpc.add_AdminServicer_to_server(admin, long)
        names = (SERVICE, ADMIN, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection_pb2_grpc.add_ServerReflectionServicer_to_server(_Reflection(names), long)
        limited = [f"/{SERVICE}/{method}" for method in ("Retrieve", "GetTags", "ListStores", "GetStore")]
        checks = _Health(self.catalog.damages)
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

    async def _for_all(self, action: Callable[[Any], Awaitable[None]]) -> None:
        await asyncio.gather(*map(action, self._acceptors))

    @property
    def address(self) -> str:
        """`HOST:PORT` that clients connect to."""
        return f"{self._host}:{self._port}"

    def start(self, *, warm_first: bool = False) -> None:
        """Listen, open the stores and answer, load the encoders; until then health says NOT_SERVING.

        Calls get UNAVAILABLE until the stores are open, and those by image or text until encoders are loaded.

        Args:
            warm_first: open the stores before listening, as other workers answer meanwhile.
        """
        sys.setswitchinterval(SWITCH_SECONDS)
        allocator.configure()
        self.catalog.damages.changed = lambda stores: self.announce({"damaged": stores})
        if self.settings.metrics:
            self._stop_probes, port = probes.serve(self.settings.metrics, self.state)
            log.info("metrics on port %d", port)
        if not warm_first:
            run(self._for_all(lambda acceptor: acceptor.start()))
        for info in self.catalog.warm(opened=self._open):
            log.info(
                "serving %s@%d: %d entries, %s", info.store, info.version, info.entries, info.fingerprint
            )
        # objects made so far stay: the collections of `unload` need not look at all of torch again
        gc.collect()
        gc.freeze()
        for name in ("", SERVICE):
            run(self._health.set(name, health_pb2.HealthCheckResponse.SERVING))
        if warm_first:
            run(self._for_all(lambda acceptor: acceptor.start()))
        self._watch = threading.Thread(target=self._watch_over, name="rpc-watch", daemon=True)
        self._watch.start()
        if self.settings.scrub:
            damaged = self.catalog.damages.stores
            self._scrubber = Scrubber(self.catalog.root, self.settings.scrub, damaged, self._found_damaged)
        self._phase = "serving"
        log.info("listening on %s: %s", self.address, self.settings.describe())

    def stop(self, grace: float = DRAIN_SECONDS) -> None:
        """Refuse new requests, and let those in flight finish within `grace` seconds."""
        self._phase = "stopping"
        if self._scrubber is not None:
            self._scrubber.stop()
        run(self._health.enter_graceful_shutdown())
        run(self._for_all(lambda acceptor: acceptor.stop(grace)))
        run(self.gate.arrivals.close())
        self._ended.set()
        self._service.close()
        for threads in (self._threads, self._long_threads, self._admin_threads):
            threads.shutdown(wait=False)
        if self._watch is not None:
            self._watch.join()
        if self._stop_probes is not None:
            self._stop_probes()
        self.gate.audit.close()

    def state(self) -> probes.State:
        """Say how far the server is, and which stores are damaged."""
        return probes.State(self._phase == "serving", self._phase, self.catalog.damages.stores())

    def _open(self) -> None:
        self._phase = "loading encoders"
        self.gate.open()

    def _found_damaged(self, store: str, what: str) -> None:
        self.catalog.leave_out(store, what)
        self.announce({"leave_out": [store, what]})

    def _watch_over(self) -> None:
        limits = self.settings.limits
        period = min(1.0, limits.slow_reader / 4, limits.idle_stream / 4)
        trimmer = allocator.Trimmer()
        while not self._ended.wait(period):
            loop().call_soon_threadsafe(self.gate.end_slow)
            trimmer.look()


class _Health(health.aio.HealthServicer):
    """Health checks for every caller; those that watch it do not keep a server from stopping."""

    def __init__(self, damages: Damages) -> None:
        super().__init__()
        self._ending, self._damages = asyncio.Event(), damages

    async def Check(self, request: Any, context: Any) -> Any:  # noqa: N802
        # how many, not which: whoever may not read a store is not told that it is there
        context.set_trailing_metadata((("damaged-stores", str(len(self._damages.stores()))),))
        return await super().Check(request, context)

    async def Watch(self, request: Any, context: Any) -> None:  # noqa: N802
        watching = asyncio.ensure_future(super().Watch(request, context))
        ending = asyncio.ensure_future(self._ending.wait())
        try:
            await asyncio.wait((watching, ending), return_when=asyncio.FIRST_COMPLETED)
        finally:
            watching.cancel()
            ending.cancel()

    async def enter_graceful_shutdown(self) -> None:
        await super().enter_graceful_shutdown()
        self._ending.set()


class _Reflection(reflection.aio.ReflectionServicer):
    """Reflection for identified callers."""

    @streaming(None)
    async def ServerReflectionInfo(  # noqa: N802
        self, requests: AsyncIterator[Any], call: Call, send: Callable[[Any], Awaitable[None]]
    ) -> None:
        async for response in super().ServerReflectionInfo(requests, call):
            await send(response)


class _Generic:
    """Adds generic handlers only: in gRPC's asyncio server each registered handler slows down every call."""

    def __init__(self, server: Any) -> None:
        self.add_generic_rpc_handlers = server.add_generic_rpc_handlers

    def add_registered_method_handlers(self, service: str, handlers: Any) -> None:
        """Do nothing: a generic handler has been added."""


def _options(message_bytes: int) -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", message_bytes),
        ("grpc.max_send_message_length", message_bytes),
        ("grpc.max_metadata_size", 16 << 10),
        ("grpc.max_concurrent_streams", STREAMS_A_CONNECTION),
        # or gRPC reads megabytes of each call ahead, of a message that nobody has asked for yet
        ("grpc.http2.bdp_probe", 0),
        ("grpc.server.max_pending_requests", PENDING),
        ("grpc.server.max_pending_requests_hard_limit", 2 * PENDING),
        ("grpc.so_reuseport", 1),
        # detect a peer that vanished, and hang up on one that never speaks
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.http2.ping_timeout_ms", 10_000),  # gRPC 1.85 ignores keepalive_timeout_ms
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
        ("grpc.server_handshake_timeout_ms", 10_000),
    ]
