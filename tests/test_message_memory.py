"""Messages that would take much memory: on their way, while they are answered, and their answers."""

from __future__ import annotations

import asyncio
import gc
import socket
from types import SimpleNamespace

import grpc
import pytest
from google.protobuf.message import DecodeError

from serving import vector_request
from tagstore import errors
from tagstore.serving import arrivals, lookup, message_memory, request_stream
from tagstore.serving.allocator import private_bytes
from tagstore.serving.arrivals import READS, Arrivals
from tagstore.serving.call import Call
from tagstore.serving.connections import hang_up
from tagstore.serving.settings import Limits
from tagstore.wire.bounds import BOUNDS, RETRIEVE, UNCHECKED_BYTES, bounded
from tagstore_proto.v1 import tagstore_pb2 as pb
from waiting import Clock, wait_until

RETRIEVE_PATH = "/tagstore.v1.TagStore/Retrieve"


def filled(message, field: bytes, size: int = 1 << 20) -> bytes:
    return message.SerializeToString() + field * (size // len(field))


@pytest.mark.parametrize(
    "data",
    [
        filled(pb.RetrieveRequest(), b"\x62\0"),  # identities
        filled(pb.RetrieveRequest(), b"\x92\x01\0"),  # texts
        filled(pb.RetrieveRequest(), b"\x1a\0"),  # images
        filled(pb.RetrieveRequest(), b"\x52\0"),  # where
        pb.RetrieveRequest(exclude=pb.Exclude(keys=["abc"] * 2_000_000)).SerializeToString(),
    ],
)
def test_a_message_that_is_large_in_memory_only_is_refused_unparsed(data: bytes) -> None:
    parse = bounded("Retrieve", lambda data: pytest.fail("it was parsed"))
    with pytest.raises(errors.InvalidInput, match="the message has more than"):
        parse(data)


def test_what_a_caller_may_send_is_within_the_bounds() -> None:
    request = pb.RetrieveRequest(
        store="shapes",
        images=[bytes(1 << 20)] * 10,
        vectors=pb.Vectors(data=bytes(4 << 20), dimension=512),
        texts=["a long text " * 300] * 256,
        identities=[pb.Identity(key=f"key {i}", sha256=bytes(32)) for i in range(4096)],
        exclude=pb.Exclude(keys=[f"a key {i}" for i in range(10_000)]),
        where={str(i): "value" for i in range(100)},
    )
    RETRIEVE.check(request.SerializeToString())
    pair = pb.Pair(key="k", image=bytes(8 << 20), captions=["a caption"] * 500, metadata="{}")
    BOUNDS["Ingest"].check(pb.IngestRequest(pair=pair).SerializeToString())
    pair.captions.extend(["a caption"] * 200_000)
    with pytest.raises(errors.InvalidInput, match="the message has more than"):
        BOUNDS["Ingest"].check(pb.IngestRequest(pair=pair).SerializeToString())
    BOUNDS["Delete"].check(pb.DeleteRequest(keys=[f"key {i}" for i in range(60_000)]).SerializeToString())


@pytest.mark.parametrize("end", [b"\x1a\xff\xff\xff\xff\x7f", b"\x0b", b"\xff" * 11, b"\x08"])
def test_bounds_call_broken_messages_broken(end: bytes) -> None:
    data = pb.RetrieveRequest(images=[bytes(2 * UNCHECKED_BYTES)]).SerializeToString() + end
    with pytest.raises(DecodeError):
        RETRIEVE.check(data)


def test_a_server_refuses_them_and_goes_on(served, mini) -> None:
    _, stub = served()
    with pytest.raises(grpc.RpcError) as caught:
        stub.Retrieve(pb.RetrieveRequest.FromString(b"\x62\0" * 20_000))
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "more than 16384 fields" in caught.value.details()
    assert stub.Retrieve(vector_request(mini)).retrievals


class Reader:
    """A call whose message comes when a test says so."""

    def __init__(self, client: str) -> None:
        self.client, self.began = client, False
        self.message: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self.error: Exception | None = None

    async def read(self) -> bytes:
        self.began = True
        return await self.message

    def end(self, error: Exception) -> None:
        self.error = error
        self.message.cancel()


async def turns() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_so_many_messages_are_read_at_a_time_the_clients_in_turn() -> None:
    place = Arrivals(Limits())
    readers = [Reader("greedy") for _ in range(READS + 3)] + [Reader("modest")]
    tasks = [asyncio.ensure_future(place.read(reader)) for reader in readers]  # type: ignore[arg-type]
    await turns()
    assert [reader.began for reader in readers] == [True] * READS + [False] * 4
    for done in range(2):
        readers[done].message.set_result(b"a message")
        await turns()
    assert [reader.began for reader in readers[READS:]] == [True, False, False, True]
    tasks[READS + 1].cancel()  # it waits for its turn
    tasks[2].cancel()
    await turns()
    assert readers[READS + 2].began
    for reader in readers:
        if not reader.message.done():
            reader.message.set_result(b"a message")
    await asyncio.gather(*tasks, return_exceptions=True)
    assert not len(place)
    assert place._reading == 0
    await place.close()


async def test_messages_that_take_long_get_few_places(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(arrivals, "time", clock)
    place = Arrivals(Limits(slow_requests=4))
    readers = [Reader("greedy") for _ in range(5)] + [Reader(f"client {i}") for i in range(3)]
    tasks = [asyncio.ensure_future(place.read(reader)) for reader in readers]  # type: ignore[arg-type]
    await turns()
    clock.ahead += 1
    place._check()
    assert [isinstance(reader.error, errors.Overloaded) for reader in readers] == [
        False, False, True, True, True, False, False, True,
    ]  # fmt: skip
    late = Reader("late")
    tasks.append(asyncio.ensure_future(place.read(late)))  # type: ignore[arg-type]
    await turns()
    assert late.began  # slow ones do not keep others from being read
    clock.ahead += 60
    place._check()
    assert isinstance(readers[0].error, errors.TimedOut)
    await asyncio.gather(*tasks, return_exceptions=True)
    await place.close()


async def test_a_read_that_nobody_waits_for_is_finished() -> None:
    """gRPC frees a message when the operation ends, and not when it is cancelled."""
    message: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
    freed = []

    async def read() -> bytes:
        await message
        freed.append(True)
        raise grpc.aio.AbortError

    call = Call.__new__(Call)
    call.context = SimpleNamespace(read=read)
    task = asyncio.ensure_future(call.read())
    await turns()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    message.set_result(b"")
    await turns()
    assert freed


@pytest.mark.parametrize(
    "request_fields", [{"store": "shapes", "texts": [""]}, {"store": "shapes", "k": 5000}, {"store": "no"}]
)
def test_a_request_that_was_refused_is_not_kept(served, request_fields) -> None:
    _, stub = served()
    data = pb.RetrieveRequest(**request_fields, images=[bytes(8 << 20)])

    def refused() -> None:
        with pytest.raises(grpc.RpcError):
            stub.Retrieve(data, timeout=60)

    gc.collect()
    refused()
    gc.disable()
    try:
        before = private_bytes()
        for _ in range(15):
            refused()
        assert private_bytes() - before < 60 << 20
    finally:
        gc.enable()


def test_answers_that_are_not_taken_have_little_memory(served, mini, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(message_memory, "time", clock)
    server, stub = served(answer_bytes=1000, slow_reader=3600)
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.http2.bdp_probe", 0)]
    with grpc.insecure_channel(server.address, options) as other:
        request = vector_request(mini, k=18).SerializeToString()
        large = pb.RetrieveRequest.FromString(request)
        large.vectors.data *= 3000
        call = other.stream_stream(RETRIEVE_PATH)(iter([large.SerializeToString()]))  # and never read
        wait_until(lambda: server.gate.memory.answers > 1 << 20)
        with pytest.raises(grpc.RpcError) as caught:
            stub.Retrieve(vector_request(mini))
        assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "wait for their callers" in caught.value.details()
        clock.ahead += 60  # the next one who needs the memory ends the connection of that client
        with pytest.raises(grpc.RpcError):
            stub.Retrieve(vector_request(mini))
        wait_until(lambda: not server.gate.memory.answers)
        assert stub.Retrieve(vector_request(mini)).retrievals
        call.cancel()


def test_an_answer_is_written_in_parts_and_bounded(served, monkeypatch: pytest.MonkeyPatch) -> None:
    _, stub = served()
    request = pb.RetrieveRequest(store="shapes", texts=["a red circle"] * 50, k=18)
    whole = stub.Retrieve(request)
    monkeypatch.setattr(lookup, "PART_VALUES", 20)
    assert stub.Retrieve(request) == whole
    assert next(stub.RetrieveStream(iter([request]))).response == whole
    _, small = served(message_bytes=len(whole.SerializeToString()) - 1)
    with pytest.raises(grpc.RpcError) as caught:
        small.Retrieve(request)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "send fewer queries at once" in caught.value.details()


async def test_a_stream_is_not_read_ahead_of_many_neighbours() -> None:
    window = request_stream.Window()
    large, small = SimpleNamespace(neighbours=request_stream.WINDOW_NEIGHBOURS), SimpleNamespace(neighbours=1)
    await window.enter(large)  # type: ignore[arg-type]
    entering = asyncio.ensure_future(window.enter(small))  # type: ignore[arg-type]
    await turns()
    assert not entering.done()
    window.answered(large)  # type: ignore[arg-type]
    await entering
    await asyncio.gather(*(window.enter(small) for _ in range(request_stream.WINDOW - 1)))  # type: ignore[arg-type]
    entering = asyncio.ensure_future(window.enter(small))  # type: ignore[arg-type]
    await turns()
    assert not entering.done()
    entering.cancel()


@pytest.mark.parametrize(("family", "host"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")])
def test_a_connection_is_ended_by_its_peer(family: int, host: str) -> None:
    with (
        socket.create_server((host, 0), family=family) as listening,
        socket.create_connection(listening.getsockname()[:2]) as client,
        listening.accept()[0],
    ):
        port = client.getsockname()[1]
        peer = f"ipv4:{host}:{port}" if family == socket.AF_INET else f"ipv6:%5B{host}%5D:{port}"
        assert not hang_up(peer.replace(str(port), "1"))
        assert hang_up(peer)
        client.settimeout(60)
        assert client.recv(10) == b""
    assert not hang_up("unix:/somewhere")
