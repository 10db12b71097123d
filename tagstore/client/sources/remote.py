"""Stores behind servers, asked by blocking calls."""

from __future__ import annotations

import queue
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import grpc

from tagstore.client import answer_check
from tagstore.client.backend import Backend
from tagstore.client.channels import Channels
from tagstore.client.forks import PerProcess, hold_forks
from tagstore.client.options import Options
from tagstore.client.queries import QueryBatch
from tagstore.client.resilience import Attempt, Attempts, Balancer
from tagstore.client.stats import Counters
from tagstore.client.urls import Location
from tagstore.errors import BadAnswer, TagstoreError, Unavailable
from tagstore.types import Retrieval, StoreInfo, TagInfo
from tagstore.wire import convert
from tagstore.wire.status import error_of, retry_after_of
from tagstore_proto.v1 import tagstore_pb2 as pb
from tagstore_proto.v1 import tagstore_pb2_grpc

AttemptResult = tuple[Attempt, Any, TagstoreError | None]
"""An attempt with the answer to it, checked and converted, or with the error that ended it."""
_HEDGE_THREADS = 16
"""Threads that send hedged requests, in each process."""


class RemoteCall(NamedTuple):
    """A call of the service `TagStore`."""

    method: str
    request: Any
    decode: Callable[[Any], Any]
    """Turns the response into what the backend returns. Raises `BadAnswer`."""
    insist: bool
    """Try an address although every circuit is open."""


class RemoteCalls:
    """What a backend says to a server, and what its failures mean, whether it blocks or is awaited."""

    def __init__(self, location: Location, options: Options, counters: Counters) -> None:
        self.location, self.options, self.counters = location, options, counters
        self.channels = Channels(location, options)
        self._insist = options.on_failure == "raise"

    def retrieve_call(self, batch: QueryBatch) -> RemoteCall:
        request = pb.RetrieveRequest(
            store=self.location.store,
            version=batch.version,
            images=batch.images,
            texts=batch.captions,
            fingerprint=batch.fingerprint,
        )
        if batch.vectors is not None:
            request.vectors.CopyFrom(convert.vectors_to_proto(batch.vectors))
        convert.search_to_proto(request, batch.search, batch.identities)
        insist = batch.options.on_failure == "raise"

        def decode(response: Any) -> list[Retrieval]:
            return answer_check.retrievals(request, response, len(batch))

        return RemoteCall("Retrieve", request, decode, insist)

    def tags_call(self, tag_ids: Sequence[int], version: int, embeddings: bool) -> RemoteCall:
        request = pb.GetTagsRequest(
            store=self.location.store, version=version, tag_ids=tag_ids, embeddings=embeddings
        )
        return RemoteCall("GetTags", request, partial(answer_check.tags, request), self._insist)

    def page_call(self, first: int, version: int, embeddings: bool) -> RemoteCall:
        request = pb.GetTagsRequest(
            store=self.location.store, version=version, first_tag_id=first, embeddings=embeddings
        )
        return RemoteCall("GetTags", request, partial(answer_check.page, request), self._insist)

    def info_call(self, version: int) -> RemoteCall:
        request = pb.GetStoreRequest(store=self.location.store, version=version)
        return RemoteCall("GetStore", request, partial(answer_check.info, request), self._insist)

    def first_attempt(self, balancer: Balancer, insist: bool) -> tuple[Attempts, Attempt]:
        """Return the attempts of a request and the first of them, or count the request as not sent."""
        attempts = Attempts(balancer, insist=insist)
        try:
            return attempts, attempts.next()
        except Unavailable:
            self.counters.add(skipped=1)
            raise

    def decoded(self, call: RemoteCall, attempt: Attempt, response: Any) -> AttemptResult:
        """Check a response against its request, and count one that does not fit as a failure."""
        try:
            if response is None:  # gRPC's asyncio API returns it for bytes that are no message
                raise BadAnswer("bytes that are no message")
            return attempt, call.decode(response), None
        except BadAnswer as error:
            return attempt, None, self._bad_answer(attempt, str(error))

    def _bad_answer(self, attempt: Attempt, reason: str) -> BadAnswer:
        self.counters.add(failures=1)
        return BadAnswer(
            f"the answer of the server at {attempt.endpoint.address} does not fit the question: {reason}. "
            "Check that this is the address of a tagstore, and of the right one"
        )

    def failure(self, error: Any, attempt: Attempt) -> TagstoreError:
        """Count a failed attempt and say what it means. Whatever another try may mend is `Unavailable`."""
        code, details, address = error.code(), error.details() or "", attempt.endpoint.address
        failure = error_of(code, details, retry_after_of(error.trailing_metadata()))
        if isinstance(failure, BadAnswer):
            return self._bad_answer(attempt, details)
        self.counters.add(failures=1)
        match code:
            case grpc.StatusCode.DEADLINE_EXCEEDED:
                return Unavailable(f"the server at {address} did not answer within {attempt.timeout:.3g} s")
            case grpc.StatusCode.UNAVAILABLE:
                return Unavailable(
                    f"no server answers at {address} ({details}): "
                    "start one with `tagstore serve`, or check the address"
                )
            case grpc.StatusCode.CANCELLED:
                # it shuts down, or has more calls than it can take in
                return Unavailable(f"the server at {address} ended the call: {details}")
            case grpc.StatusCode.UNIMPLEMENTED:
                return TagstoreError(
                    f"the server at {address} is no tagstore, or an older one that lacks this: {details}"
                )
        if type(failure) is TagstoreError:
            return TagstoreError(f"the server at {address} answered {code.name}: {details}")
        return failure


class _Connections:
    """What one process keeps open: channels by address, their circuits, and threads for hedged requests."""

    def __init__(self, balancer: Balancer, open_channel: Callable[[str], Any]) -> None:
        self.balancer = balancer
        self.hedges = ThreadPoolExecutor(_HEDGE_THREADS, thread_name_prefix="hedge")
        self._open_channel = open_channel
        self._lock = threading.Lock()
        self._channels: dict[str, tuple[Any, Any]] = {}

    def stub(self, address: str) -> Any:
        with self._lock:
            if address not in self._channels:
                channel = self._open_channel(address)
                self._channels[address] = (channel, tagstore_pb2_grpc.TagStoreStub(channel))
            return self._channels[address][1]

    def close(self) -> None:
        self.hedges.shutdown(wait=False)
        for channel, _ in self._channels.values():
            hold_forks(channel.close)


def _close_connections(connections: PerProcess[_Connections]) -> None:
    if (opened := connections.take()) is not None:
        opened.close()


class RemoteBackend(RemoteCalls, Backend):
    """Answers of a server by gRPC's blocking calls. Safe for threads and forks."""

    def __init__(self, location: Location, options: Options, counters: Counters) -> None:
        super().__init__(location, options, counters)
        channels = self.channels
        self._connections = PerProcess(
            lambda: _Connections(Balancer(location.addresses, options), channels.open)
        )
        # gRPC keeps the socket of a channel that nobody closed: give it back when the source is dropped
        weakref.finalize(self, _close_connections, self._connections).atexit = False

    def retrieve(self, batch: QueryBatch) -> list[Retrieval]:
        answers: list[Retrieval] = self._answer(self.retrieve_call(batch))
        return answers

    def tags(self, tag_ids: Sequence[int], version: int, embeddings: bool) -> tuple[list[TagInfo], int]:
        tags: tuple[list[TagInfo], int] = self._answer(self.tags_call(tag_ids, version, embeddings))
        return tags

    def page(self, first: int, version: int, embeddings: bool) -> tuple[list[TagInfo], int, int]:
        page: tuple[list[TagInfo], int, int] = self._answer(self.page_call(first, version, embeddings))
        return page

    def info(self, version: int) -> StoreInfo:
        info: StoreInfo = self._answer(self.info_call(version))
        return info

    def health(self) -> dict[str, str]:
        return self._connections.get().balancer.health()

    def close(self) -> None:
        _close_connections(self._connections)

    def _answer(self, call: RemoteCall) -> Any:
        connections = self._connections.get()
        attempts, attempt = self.first_attempt(connections.balancer, call.insist)
        send = self._send_hedged if self.options.hedge else self._send
        while True:
            if attempt.wait:
                time.sleep(attempt.wait)
            attempt, answer, error = send(connections, attempts, attempt, call)
            if error is None:
                attempts.succeeded(attempt)
                return answer
            attempt = attempts.failed(attempt, error)
            self.counters.add(retries=1)

    def _send(
        self, connections: _Connections, attempts: Attempts, attempt: Attempt, call: RemoteCall
    ) -> AttemptResult:
        self.counters.add(requests=1)
        try:
            response = hold_forks(self._send_once, connections, attempt, call)
        except grpc.RpcError as error:
            return attempt, None, self.failure(error, attempt)
        except TagstoreError as error:
            return attempt, None, error
        return self.decoded(call, attempt, response)

    def _send_once(self, connections: _Connections, attempt: Attempt, call: RemoteCall) -> Any:
        method = getattr(connections.stub(attempt.endpoint.address), call.method)
        return method(call.request, timeout=attempt.timeout, metadata=self.channels.metadata)

    def _send_hedged(
        self, connections: _Connections, attempts: Attempts, first: Attempt, call: RemoteCall
    ) -> AttemptResult:
        """Ask a second address if the first one takes long, and return the outcome of the faster one.

        Blocking calls in threads, not gRPC's futures: a fork hangs while those are under way. So the slower
        call cannot be cancelled; it ends with the request's deadline.
        """
        outcomes: queue.SimpleQueue[AttemptResult] = queue.SimpleQueue()
        lock, answered = threading.Lock(), threading.Event()

        def run(attempt: Attempt) -> None:
            outcome = self._send(connections, attempts, attempt, call)
            with lock:
                if not answered.is_set():
                    outcomes.put(outcome)
                    return
            attempts.abandoned(attempt)

        connections.hedges.submit(run, first)
        second = None
        try:
            outcome = outcomes.get(timeout=min(self.options.hedge, first.timeout))
        except queue.Empty:
            second = attempts.elsewhere(first.endpoint)
            if second is not None:
                self.counters.add(hedges=1)
                connections.hedges.submit(run, second)
            outcome = outcomes.get()
        if second is not None and isinstance(outcome[2], Unavailable):
            outcome[0].endpoint.breaker.failed()
            attempts.abandoned(outcome[0])
            outcome = outcomes.get()
        with lock:
            answered.set()
            while not outcomes.empty():  # both came at once
                attempts.abandoned(outcomes.get()[0])
        return outcome
