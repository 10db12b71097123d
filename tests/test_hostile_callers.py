"""Callers that send nothing, half a message, or go on after their token was withdrawn."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import grpc
import pytest

from pictures import ingest_shapes
from serving import vector_request
from tagstore import errors
from tagstore.serving import stream_places
from tagstore.serving.live_catalog import LiveCatalog
from tagstore.serving.server import Server
from tagstore.serving.settings import Limits, Settings
from tagstore.storage.store import Store
from tagstore_proto.v1 import tagstore_pb2 as pb
from tagstore_proto.v1 import tagstore_pb2_grpc as pb_grpc
from waiting import Clock, wait_until

ROLES = {"reader": "read", "other": "read", "writer": "ingest", "operator": "admin"}


def write_tokens(path: Path, *names: str) -> Path:
    callers = [{"name": n, "token": f"the long token of {n}", "stores": {"*": ROLES[n]}} for n in names]
    path.write_text(json.dumps({"callers": callers}))
    return path


def token(name: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer the long token of {name}"),)


class Stream:
    """A stream of requests that a test sends one by one."""

    def __init__(self, method, name: str) -> None:
        self._next, self._requests = threading.Semaphore(0), []
        self.call = method(self._all(), metadata=token(name))

    def _all(self) -> Iterator:
        while True:
            self._next.acquire()
            if not self._requests:
                return
            yield self._requests.pop(0)

    def send(self, request) -> None:
        self._requests.append(request)
        self._next.release()

    def close(self) -> None:
        self.call.cancel()
        self._next.release()

    def error(self) -> grpc.RpcError:
        with pytest.raises(grpc.RpcError) as caught:
            list(self.call)
        return caught.value


@pytest.fixture
def guarded(tmp_path: Path, mini, monkeypatch: pytest.MonkeyPatch) -> Iterator:
    """Make servers with a caller of each role; give the server, a function that opens streams, and stubs."""
    monkeypatch.setattr(LiveCatalog, "encoder", lambda *_: mini)
    root = ingest_shapes(tmp_path, mini)
    with ExitStack() as stack:

        def make(**limits):
            file = write_tokens(tmp_path / "tokens.json", *ROLES)
            settings = Settings(tokens=str(file), limits=Limits(**limits))
            server = Server(root, "127.0.0.1:0", device="cpu", settings=settings)
            server.start()
            stack.callback(server.stop, 0)
            channel = stack.enter_context(grpc.insecure_channel(server.address))

            def open_stream(method: str, name: str) -> Stream:
                stub = {"Ingest": pb_grpc.AdminStub}.get(method, pb_grpc.TagStoreStub)(channel)
                stream = Stream(getattr(stub, method), name)
                stack.callback(stream.close)
                return stream

            return server, open_stream, pb_grpc.TagStoreStub(channel), pb_grpc.AdminStub(channel)

        yield make


def test_a_stream_without_the_role_is_refused_before_a_message_is_read(guarded) -> None:
    server, open_stream, _, _ = guarded()
    for _ in range(9):
        error = open_stream("Ingest", "reader").error()  # it never sends anything
        assert error.code() == grpc.StatusCode.PERMISSION_DENIED
        assert "reader may not write to any store" in error.details()
    assert open_stream("Ingest", "nobody").error().code() == grpc.StatusCode.UNAUTHENTICATED
    wait_until(lambda: not server.gate.in_flight)


def test_streams_that_send_nothing_hold_no_thread_and_not_every_place(guarded) -> None:
    server, open_stream, _, admin = guarded(streams=6, streams_per_client=4, streams_kept=2)
    silent = [open_stream("Ingest", "writer") for _ in range(4)]
    wait_until(lambda: len(server.gate.streams) == 4)
    assert not server._long_threads._threads
    assert "writer has 4 streams open" in open_stream("Ingest", "writer").error().details()
    assert "4 streams are open" in open_stream("RetrieveStream", "reader").error().details()
    request = pb.DeleteRequest(store="shapes", keys=["red-circle"])
    assert admin.Delete(request, metadata=token("operator"), timeout=60).keys == ["red-circle"]
    assert all(stream.call.is_active() for stream in silent)


def test_an_ingest_that_goes_silent_does_not_keep_administrators_waiting(guarded) -> None:
    from tagstore.serving.server import LONG_THREADS

    server, open_stream, _, admin = guarded(streams=2 * LONG_THREADS, streams_per_client=LONG_THREADS)
    for i in range(LONG_THREADS):
        open_stream("Ingest", "writer").send(
            pb.IngestRequest(start=pb.IngestStart(store=f"s{i}", encoder="mini"))
        )
    wait_until(lambda: len(server._long_threads._threads) == LONG_THREADS)
    versions = admin.ListVersions(
        pb.ListVersionsRequest(store="shapes"), metadata=token("operator"), timeout=60
    )
    assert len(versions.versions) == 1


@pytest.mark.parametrize(("method", "name"), [("RetrieveStream", "reader"), ("Ingest", "writer")])
def test_an_idle_stream_is_ended(guarded, mini, method: str, name: str) -> None:
    server, open_stream, _, _ = guarded(idle_stream=0.5)
    stream = open_stream(method, name)
    if method == "RetrieveStream":
        stream.send(vector_request(mini))
        assert next(stream.call).response.retrievals
    else:
        stream.send(pb.IngestRequest(start=pb.IngestStart(store="fresh", encoder="mini")))
    error = stream.error()
    assert error.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    assert "brought no message for 0.5 s" in error.details()
    wait_until(lambda: not server.gate.in_flight)
    if method == "Ingest":
        with pytest.raises(errors.NotFound):
            Store(server.catalog.root, "fresh").snapshot()


def test_an_idle_stream_gives_its_place_to_one_that_needs_it(guarded, monkeypatch) -> None:
    server, open_stream, _, _ = guarded(streams=3, streams_kept=2)
    clock = Clock()
    monkeypatch.setattr(stream_places, "time", clock)
    idle = open_stream("RetrieveStream", "reader")
    wait_until(lambda: len(server.gate.streams) == 1)
    assert "1 streams are open" in open_stream("RetrieveStream", "other").error().details()
    clock.ahead += 60
    other = open_stream("RetrieveStream", "other")
    error = idle.error()
    assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "others need its place" in error.details()
    assert other.call.is_active()


def test_a_withdrawn_token_ends_an_open_stream_at_its_next_answer(guarded, mini, tmp_path: Path) -> None:
    server, open_stream, _, _ = guarded()
    stream, kept = open_stream("RetrieveStream", "reader"), open_stream("RetrieveStream", "other")
    for each in (stream, kept):
        each.send(vector_request(mini))
        assert next(each.call).response.retrievals
    file = write_tokens(tmp_path / "tokens.json", "other")
    os.utime(file, ns=(1, 1))  # whatever the clock of the file system, it differs
    server.gate.access._checked -= 2
    for each in (stream, kept):
        each.send(vector_request(mini))
    assert stream.error().code() == grpc.StatusCode.UNAUTHENTICATED
    assert next(kept.call).response.retrievals
