"""Stores behind servers. A channel an address, opened at first use in each process, shared by its threads, used by no other process."""

from __future__ import annotations

import os
import queue
import re
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tagstore.client.forks import Opened, calling
from tagstore.client.options import Options
from tagstore.client.queries import Ask
from tagstore.client.resilience import Attempt, Attempts, Balancer
from tagstore.client.stats import Counters
from tagstore.client.urls import Location
from tagstore.errors import InvalidInput, NotFound, TagstoreError, Unavailable
from tagstore.types import Retrieval, StoreInfo, TagInfo

MAX_MESSAGE = 64 << 20
TOKEN_VARIABLE = "TAGSTORE_TOKEN"
KEEPALIVE_SECONDS, KEEPALIVE_TIMEOUT = 10.0, 5.0
"""Of silence in a call's time before the other side is asked whether it is there, and for its answer. A machine that vanished closes no
connection: without this, calls would time out on a dead one for as long as TCP repeats itself, a quarter of an hour."""
_LOOPBACK = re.compile(r"(localhost|127\.\d+\.\d+\.\d+|\[::1\]):\d+")
Outcome = tuple[Attempt, Any, TagstoreError | None]
"""A try with the message that answered it, or the error that ended it."""
_HEDGES = 16
"""Threads that wait for the slower ones of hedged requests."""


class Wire:
    """Messages, channels and errors of one location: what the blocking and the asyncio face have in common."""

    def __init__(self, location: Location, options: Options, counters: Counters) -> None:
        self.location, self.options, self.counters = location, options, counters
        # a process's own: what its parent had in hand at a fork, or was told of an address, is not for it to wait for
        self._balancer = Opened(lambda: Balancer(location.addresses, options))
        token = options.token or (os.environ.get(TOKEN_VARIABLE, "") if self._private() else "")
        self.metadata = (("authorization", f"Bearer {token}"),) if token else ()
        self._check_tls()

    @property
    def balancer(self) -> Balancer:
        return self._balancer.get()

    def _private(self) -> bool:
        # a token of the environment was not meant for every server that somebody points at over a plain connection
        return self.location.scheme == "grpcs" or all(_LOOPBACK.fullmatch(a) for a in self.location.addresses)

    def _check_tls(self) -> None:
        given = [name for name in ("ca", "cert", "cert_key", "server_name") if getattr(self.options, name)]
        if given and self.location.scheme == "grpc":
            raise InvalidInput(
                f"{', '.join(given)} given for a plain connection: write grpcs://{self.location.place}/..."
            )
        if bool(self.options.cert) != bool(self.options.cert_key):
            raise InvalidInput("a client's certificate is two files: give both cert and cert_key")

    def channel(
        self, address: str, open_insecure: Callable[..., Any], open_secure: Callable[..., Any]
    ) -> Any:
        """A channel to an address, by the constructors of one of gRPC's two faces."""
        import grpc

        options: list[tuple[str, Any]] = [
            ("grpc.max_receive_message_length", MAX_MESSAGE),
            ("grpc.max_send_message_length", MAX_MESSAGE),
            ("grpc.enable_retries", 0),  # tries are counted and timed here
            # a server that comes back is found within seconds, not the two minutes of gRPC's default
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 2000),
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.keepalive_time_ms", int(1000 * KEEPALIVE_SECONDS)),
            (
                "grpc.http2.ping_timeout_ms",
                int(1000 * KEEPALIVE_TIMEOUT),
            ),  # keepalive_timeout_ms is not heeded by gRPC 1.85
        ]
        if _LOOPBACK.fullmatch(address):
            options.append(("grpc.enable_http_proxy", 0))  # a proxy knows no loopback address of ours
        if self.location.scheme == "grpc":
            return open_insecure(address, options=options)
        if self.options.server_name:
            options.append(("grpc.ssl_target_name_override", self.options.server_name))
        pem = {name: _read_pem(name, getattr(self.options, name)) for name in ("ca", "cert", "cert_key")}
        return open_secure(
            address, grpc.ssl_channel_credentials(pem["ca"], pem["cert_key"], pem["cert"]), options=options
        )

    def retrieve_request(self, ask: Ask) -> Any:
        from tagstore.wire import convert
        from tagstore_proto.v1 import tagstore_pb2 as pb

        request = pb.RetrieveRequest(
            store=self.location.store, version=ask.version, images=ask.images, texts=ask.captions
        )
        request.fingerprint = ask.fingerprint
        if ask.vectors is not None:
            request.vectors.CopyFrom(convert.vectors_to_proto(ask.vectors))
        convert.search_to_proto(request, ask.search, ask.identities)
        return request

    def tags_request(self, version: int, **fields: Any) -> Any:
        from tagstore_proto.v1 import tagstore_pb2 as pb

        return pb.GetTagsRequest(store=self.location.store, version=version, **fields)

    def info_request(self, version: int) -> Any:
        from tagstore_proto.v1 import tagstore_pb2 as pb

        return pb.GetStoreRequest(store=self.location.store, version=version)

    def error(self, error: Any, attempt: Attempt) -> TagstoreError:
        """What a failed call means. Everything that another try may mend is `Unavailable`; names the address."""
        import grpc

        from tagstore.wire.status import error_of, retry_after_of

        self.counters.add(failures=1)
        code, said, address = error.code(), error.details(), attempt.endpoint.address
        match code:
            case grpc.StatusCode.DEADLINE_EXCEEDED:
                return Unavailable(f"the server at {address} did not answer within {attempt.timeout:.3g} s")
            case grpc.StatusCode.UNAVAILABLE:
                return Unavailable(
                    f"no server answers at {address} ({said}): start one with `tagstore serve`, or check the address"
                )
            case grpc.StatusCode.CANCELLED:
                # it is shutting down, or has more calls than it can take in
                return Unavailable(f"the server at {address} ended the call: {said}")
            case grpc.StatusCode.UNIMPLEMENTED:
                return TagstoreError(f"the server at {address} is no tagstore, or one without this: {said}")
        found = error_of(code, said, retry_after_of(error.trailing_metadata()))
        if type(found) is TagstoreError:
            return TagstoreError(f"the server at {address} answered {code.name}: {said}")
        return found


class RemoteBackend:
    """Answers of a server, by gRPC's blocking face. Safe for threads and forks."""

    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        self._stubs: Opened[_Stubs] = Opened(lambda: _Stubs(wire))
        self._hedges: Opened[ThreadPoolExecutor] = Opened(
            lambda: ThreadPoolExecutor(_HEDGES, thread_name_prefix="hedge")
        )

    def retrieve(self, ask: Ask) -> list[Retrieval]:
        from tagstore.wire import convert

        return convert.retrievals_from_proto(self._call("Retrieve", self.wire.retrieve_request(ask)))

    def tags(self, tag_ids: Sequence[int], version: int, embeddings: bool) -> tuple[list[TagInfo], int]:
        from tagstore.wire import convert

        response = self._call(
            "GetTags", self.wire.tags_request(version, tag_ids=tag_ids, embeddings=embeddings)
        )
        return convert.tags_from_proto(response), response.version

    def page(self, first: int, version: int, embeddings: bool) -> tuple[list[TagInfo], int, int]:
        from tagstore.wire import convert

        response = self._call(
            "GetTags", self.wire.tags_request(version, first_tag_id=first, embeddings=embeddings)
        )
        return convert.tags_from_proto(response), response.next_tag_id, response.version

    def info(self, version: int) -> StoreInfo:
        from tagstore.wire import convert

        return convert.info_from_proto(self._call("GetStore", self.wire.info_request(version)).store)

    def health(self) -> dict[str, str]:
        return {e.address: e.breaker.state for e in self.wire.balancer.endpoints}

    def close(self) -> None:
        if (pool := self._hedges.take()) is not None:
            pool.shutdown(wait=False)
        if (stubs := self._stubs.take()) is not None:
            stubs.close()

    def _call(self, method: str, request: Any) -> Any:
        attempts = Attempts(self.wire.balancer)
        try:
            attempt = attempts.first()
        except Unavailable:
            self.wire.counters.add(skipped=1)
            raise
        while True:
            if attempt.wait:
                time.sleep(attempt.wait)
            ask = self._hedged if self.wire.options.hedge else self._plain
            attempt, answer, error = ask(attempts, attempt, method, request)
            if error is None:
                attempts.succeeded(attempt)
                return answer
            attempt = attempts.failed(attempt, error)
            self.wire.counters.add(retries=1)

    def _plain(self, attempts: Attempts, attempt: Attempt, method: str, request: Any) -> Outcome:
        try:
            return attempt, self._send(attempt, method, request), None
        except TagstoreError as error:
            return attempt, None, error

    def _send(self, attempt: Attempt, method: str, request: Any) -> Any:
        import grpc

        self.wire.counters.add(requests=1)
        with calling():
            stub = self._stubs.get().of(attempt.endpoint.address)
            try:
                return getattr(stub, method)(request, timeout=attempt.timeout, metadata=self.wire.metadata)
            except grpc.RpcError as error:
                raise self.wire.error(error, attempt) from None

    def _hedged(self, attempts: Attempts, first: Attempt, method: str, request: Any) -> Outcome:
        """The answer of whoever is faster: a second address is asked if the first one takes long. The slower one's is dropped.

        Blocking calls in threads, not gRPC's futures: a fork hangs while those are under way. So the slower call cannot be cancelled; it
        ends with the request's deadline.
        """
        done: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
        lock, answered = threading.Lock(), threading.Event()

        def run(attempt: Attempt) -> None:
            outcome = self._plain(attempts, attempt, method, request)
            with lock:
                if not answered.is_set():
                    done.put(outcome)
                    return
            attempts.abandoned(attempt)

        pool = self._hedges.get()
        pool.submit(run, first)
        second = None
        try:
            outcome = done.get(timeout=min(self.wire.options.hedge, first.timeout))
        except queue.Empty:
            second = attempts.another(first.endpoint)
            if second is not None:
                self.wire.counters.add(hedges=1)
                pool.submit(run, second)
            outcome = done.get()
        if second is not None and isinstance(outcome[2], Unavailable):
            outcome[0].endpoint.breaker.failed()
            attempts.abandoned(outcome[0])
            outcome = done.get()
        with lock:
            answered.set()
            while not done.empty():  # both came at once
                attempts.abandoned(done.get()[0])
        return outcome


class _Stubs:
    """A process's channels, by address."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self._lock = threading.Lock()
        self._channels: dict[str, tuple[Any, Any]] = {}

    def of(self, address: str) -> Any:
        import grpc

        from tagstore_proto.v1 import tagstore_pb2_grpc

        with self._lock:
            if address not in self._channels:
                channel = self._wire.channel(address, grpc.insecure_channel, grpc.secure_channel)
                self._channels[address] = (channel, tagstore_pb2_grpc.TagStoreStub(channel))
            return self._channels[address][1]

    def close(self) -> None:
        with calling():
            for channel, _ in self._channels.values():
                channel.close()


def _read_pem(name: str, path: str) -> bytes | None:
    if not path:
        return None
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise NotFound(f"option {name}: cannot read {path}: {error.strerror}") from error
