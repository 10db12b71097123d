"""A server under too much load: deadlines, bursts, long queues, large requests, slow readers."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from pictures import picture
from serving import Held, vector_request
from tagstore import errors
from tagstore.client import connect
from tagstore.serving import gate
from tagstore.serving.batch_queue import TRUSTED_BATCHES
from tagstore_proto.v1 import tagstore_pb2 as pb
from tagstore_proto.v1 import tagstore_pb2_grpc as pb_grpc
from waiting import Clock, wait_until


def test_work_whose_deadline_has_passed_is_not_done(served, mini, monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held(monkeypatch)
    server, stub = served()
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(stub.Retrieve, vector_request(mini))
        held.started.acquire()
        with pytest.raises(grpc.RpcError) as caught:
            stub.Retrieve(vector_request(mini, 1), timeout=0.1)
        assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        wait_until(lambda: not server.searches.depth)
        held.go.set()
        assert first.result(60).retrievals
    assert held.rows == [1]


def refused(call, *arguments) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as caught:
        call(*arguments)
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert int(dict(caught.value.trailing_metadata())["retry-after-ms"]) > 0
    return caught.value


def test_more_calls_than_there_may_be_are_refused_with_a_time_to_come_again(
    served, mini, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Held(monkeypatch)
    server, stub = served(in_flight=2)
    with ThreadPoolExecutor(2) as pool:
        two = [pool.submit(stub.Retrieve, vector_request(mini, i)) for i in range(2)]
        held.started.acquire()
        wait_until(lambda: server.gate.in_flight == 2)
        error = refused(stub.Retrieve, vector_request(mini))
        assert "as many as there may be" in error.details()
        with (
            connect(f"grpc://{server.address}/shapes", retries=0) as source,
            pytest.raises(errors.Overloaded) as caught,
        ):
            source.info()
        assert caught.value.retry_after > 0
        held.go.set()
        assert all(f.result(60).retrievals for f in two)
    assert stub.Retrieve(vector_request(mini)).retrievals


def test_a_burst_is_taken_in_and_a_queue_that_stands_is_not(
    served, mini, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Held(monkeypatch)
    server, stub = served(in_flight=4, standing=1, soon=60.0, burst=600.0)
    clock = Clock()
    monkeypatch.setattr(gate, "time", clock)

    def ask(pool: ThreadPoolExecutor, calls: int) -> list:
        asked = [pool.submit(stub.Retrieve, vector_request(mini)) for _ in range(calls)]
        wait_until(lambda: server.gate.in_flight == calls)
        return asked

    with ThreadPoolExecutor(4) as pool:
        burst = ask(pool, 3)
        clock.ahead += 1000  # none of them was answered soon
        assert "3 calls are in hand" in refused(stub.Retrieve, vector_request(mini)).details()
        held.go.set()
        assert all(f.result(60).retrievals for f in burst)
        wait_until(lambda: not server.gate.in_flight)
        clock.ahead += 1000
        assert stub.Retrieve(vector_request(mini)).retrievals
        held.go.clear()
        burst = ask(pool, 4)
        assert "4 calls are in hand" in refused(stub.Retrieve, vector_request(mini)).details()
        held.go.set()
        assert all(f.result(60).retrievals for f in burst)


def test_at_the_door_of_a_full_server_health_and_administrators_are_let_in(
    served, mini, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Held(monkeypatch)
    server, stub = served(in_flight=2)
    with ThreadPoolExecutor(2) as pool, grpc.insecure_channel(server.address) as channel:
        two = [pool.submit(stub.Retrieve, vector_request(mini)) for _ in range(2)]
        wait_until(lambda: server.gate.in_flight == 2)
        assert "as many as there may be" in refused(stub.Retrieve, vector_request(mini)).details()
        versions = pb_grpc.AdminStub(channel).ListVersions(pb.ListVersionsRequest(store="shapes")).versions
        assert len(versions) == 1
        check = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        assert check.status == health_pb2.HealthCheckResponse.SERVING
        held.go.set()
        assert two[0].result(60) == two[1].result(60)


def test_a_client_may_not_have_everything_for_itself(served, mini, monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held(monkeypatch)
    server, stub = served(per_client=1)
    with (
        ThreadPoolExecutor(1) as pool,
        grpc.insecure_channel(server.address, [("grpc.use_local_subchannel_pool", 1)]) as other,
    ):
        first = pool.submit(stub.Retrieve, vector_request(mini))
        held.started.acquire()
        error = refused(stub.Retrieve, vector_request(mini))
        assert "as many as one client may" in error.details()
        assert pb_grpc.TagStoreStub(other).GetStore(pb.GetStoreRequest(store="shapes")).store.entries == 18
        held.go.set()
        first.result(60)


def test_a_long_queue_refuses(served, mini, monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held(monkeypatch)
    server, stub = served(search_wait=0.0, search_queue=0, search_inline=0.0)
    held.go.set()
    for _ in range(TRUSTED_BATCHES):
        stub.Retrieve(vector_request(mini))
    held.go.clear()
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(stub.Retrieve, vector_request(mini))
        wait_until(lambda: len(held.rows) > TRUSTED_BATCHES)
        second = pool.submit(stub.Retrieve, vector_request(mini))
        wait_until(lambda: server.searches.depth == 1)
        error = refused(stub.Retrieve, vector_request(mini))
        assert "wait for the search" in error.details()
        [answer] = stub.RetrieveStream(iter([vector_request(mini)]))
        assert answer.error.code == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
        assert answer.error.retry_after_ms > 0
        held.go.set()
        assert first.result(60).retrievals == second.result(60).retrievals


@pytest.mark.parametrize(
    ("limits", "images", "message"),
    [
        ({"images": 2}, 3, "send at most 2"),
        ({"image_bytes": 50}, 1, "takes at most 50"),
        ({"message_bytes": 1000}, 9, "larger than max"),
    ],
)
def test_what_is_too_large_is_refused(served, limits, images: int, message: str) -> None:
    _, stub = served(**limits)
    with pytest.raises(grpc.RpcError) as caught:
        stub.Retrieve(pb.RetrieveRequest(store="shapes", images=[picture("red", "circle")] * images))
    assert message in caught.value.details()
    assert caught.value.code() in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.RESOURCE_EXHAUSTED)
    with pytest.raises(grpc.RpcError):
        stub.Retrieve(pb.RetrieveRequest(store="shapes", images=[picture("red", "circle")] * images))
    assert stub.GetStore(pb.GetStoreRequest(store="shapes")).store.entries == 18


def test_a_client_that_does_not_read_is_hung_up_on(served, mini, caplog: pytest.LogCaptureFixture) -> None:
    server, stub = served(slow_reader=1.0)

    def endless() -> Iterator[pb.RetrieveRequest]:
        while True:
            yield vector_request(mini, k=1000)

    with caplog.at_level(logging.WARNING):
        call = stub.RetrieveStream(endless())  # and never read
        wait_until(lambda: "did not take its answer" in caplog.text)
        wait_until(lambda: not server.gate.in_flight)
    with pytest.raises(grpc.RpcError):
        for _ in call:
            pass
    assert stub.Retrieve(vector_request(mini)).retrievals
