"""A server and its callers: streams, versions, broken connections, health, metrics, spans, shutdown."""

from __future__ import annotations

import json
import logging
import random
import socket
import threading
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from pictures import picture
from serving import Held, limited, vector_request
from tagstore.client import connect
from tagstore.serving.server import Server
from tagstore.wire import convert
from tagstore_proto.v1 import tagstore_pb2 as pb
from tagstore_proto.v1 import tagstore_pb2_grpc as pb_grpc
from waiting import wait_until


@pytest.fixture
def stub(server_address: str) -> Iterator[pb_grpc.TagStoreStub]:
    with grpc.insecure_channel(server_address) as channel:
        yield pb_grpc.TagStoreStub(channel)


def test_a_stream_answers_in_order_as_calls_do_and_survives_bad_requests(stub, mini) -> None:
    requests = [vector_request(mini, i, k=1 + i // 50) for i in range(150)]
    requests[7] = vector_request(mini, 7, k=0)
    requests[8] = pb.RetrieveRequest(store="nothing")
    requests[9] = pb.RetrieveRequest(store="shapes", images=[b"no image"])
    requests[10] = pb.RetrieveRequest(store="shapes", images=[picture("red", "circle")])
    requests[60].vectors.data = b"123"
    answers = list(stub.RetrieveStream(iter(requests)))
    assert len(answers) == 150
    codes = dict.fromkeys((7, 9, 60), grpc.StatusCode.INVALID_ARGUMENT) | {8: grpc.StatusCode.NOT_FOUND}
    for i, (request, answer) in enumerate(zip(requests, answers, strict=True)):
        if i in codes:
            assert answer.error.code == codes[i].value[0], i
            with pytest.raises(grpc.RpcError) as caught:
                stub.Retrieve(request)
            assert caught.value.details() == answer.error.message
        else:
            assert answer.response == stub.Retrieve(request), i


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"omit_neighbours": True},
        {"omit_texts": True, "max_tags": 3},
        {"omit_neighbours": True, "omit_texts": True},
    ],
)
def test_the_message_of_an_answer_says_what_its_values_say(
    stub, shapes_root: Path, mini, fields: dict
) -> None:
    from tagstore.retrieval.catalog import Catalog

    catalog = Catalog(shapes_root, device="cpu")
    request = vector_request(mini, 3, **fields)
    vectors, search = convert.vectors_from_proto(request.vectors), convert.search_from_proto(request)
    expected = catalog.retrieve(
        catalog.engine("shapes"), vectors=vectors, fingerprint=request.fingerprint, search=search
    )
    assert convert.retrievals_from_proto(stub.Retrieve(request)) == expected


def test_calls_that_come_together_are_searched_together(
    served, mini, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, stub = served()
    expected = [stub.Retrieve(vector_request(mini, i)) for i in range(9)]
    held = Held(monkeypatch)
    server, stub = served()
    with ThreadPoolExecutor(9) as pool:
        first = pool.submit(stub.Retrieve, vector_request(mini, 0))
        held.started.acquire()
        rest = [pool.submit(stub.Retrieve, vector_request(mini, i)) for i in range(1, 9)]
        wait_until(lambda: server.searches.depth == 8)
        held.go.set()
        assert [f.result(60) for f in (first, *rest)] == expected
    assert held.rows == [1, 8]


def test_a_version_that_is_not_open_is_opened_once_for_all_who_wait(
    served, mini, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, stub = served()
    expected = stub.Retrieve(vector_request(mini))
    opened, go, plain = threading.Semaphore(0), threading.Event(), server.catalog.engine
    count = []

    def slow(*arguments):
        count.append(arguments)
        opened.release()
        assert go.wait(60)
        return plain(*arguments)

    monkeypatch.setattr(server.catalog, "engine", slow)
    server.catalog._current.clear()
    with ThreadPoolExecutor(8) as pool:
        calls = [pool.submit(stub.Retrieve, vector_request(mini)) for _ in range(8)]
        opened.acquire()
        wait_until(lambda: server.gate.in_flight == 8)
        go.set()
        assert [call.result(60) for call in calls] == [expected] * 8
    assert len(count) == 1


def test_images_that_come_together_give_the_vectors_that_they_give_alone(served) -> None:
    _, stub = served()
    images = [picture(c, s, shift=3) for c in ("red", "blue") for s in ("circle", "triangle")]
    alone = [stub.Retrieve(pb.RetrieveRequest(store="shapes", images=[image])) for image in images]
    with ThreadPoolExecutor(8) as pool:
        together = list(
            pool.map(
                lambda i: stub.Retrieve(pb.RetrieveRequest(store="shapes", images=[images[i % 4]])), range(8)
            )
        )
    assert together == alone * 2
    assert list(stub.Retrieve(pb.RetrieveRequest(store="shapes", images=images)).retrievals) == [
        a.retrievals[0] for a in alone
    ]


def test_connections_that_never_speak_or_speak_nonsense_do_no_harm(server_address: str, stub, mini) -> None:
    host, port = server_address.split(":")
    silent = [socket.create_connection((host, int(port))) for _ in range(20)]
    half = socket.create_connection((host, int(port)))
    half.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9))  # a preface, and then nothing more
    rng = random.Random(0)
    for _ in range(20):
        with socket.create_connection((host, int(port))) as nonsense:
            nonsense.sendall(rng.randbytes(200))
    assert stub.Retrieve(vector_request(mini)).retrievals
    for connection in (*silent, half):
        connection.close()


def test_malformed_messages_are_refused_and_never_a_fault(
    server_address: str, mini, caplog: pytest.LogCaptureFixture
) -> None:
    from benchmarks.serving.malformed_messages import fuzz

    outcome = fuzz(server_address, "shapes", mini.fingerprint.digest, mini.dimension, messages=1500, seed=1)
    assert set(outcome) <= {"OK", "INVALID_ARGUMENT", "NOT_FOUND", "FAILED_PRECONDITION", "PERMISSION_DENIED"}
    assert "Traceback" not in caplog.text
    with connect(f"grpc://{server_address}/shapes") as source:
        assert source.info().entries == 18


def test_vectors_are_answered_once_the_stores_are_open_and_health_waits_for_the_encoders(
    shapes_root: Path, mini, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tagstore.retrieval import catalog

    opening, opened, loading, loaded = (threading.Event() for _ in range(4))
    plain = catalog.Catalog.stores

    def stores(self):
        opening.set()
        assert opened.wait(60)
        return plain(self)

    def load(*_, **__):
        loading.set()
        assert loaded.wait(60)
        return mini

    monkeypatch.setattr(catalog.Catalog, "stores", stores)
    monkeypatch.setattr(catalog, "load_encoder_of", load)
    server = Server(shapes_root, "127.0.0.1:0", device="cpu")
    by_image = pb.RetrieveRequest(store="shapes", images=[picture("red", "circle")])
    with ThreadPoolExecutor(1) as pool, grpc.insecure_channel(server.address) as channel:
        started = pool.submit(server.start)
        health, stub = health_pb2_grpc.HealthStub(channel), pb_grpc.TagStoreStub(channel)

        def state() -> int:
            return health.Check(health_pb2.HealthCheckRequest()).status

        def unavailable(request: pb.RetrieveRequest) -> str:
            with pytest.raises(grpc.RpcError) as caught:
                stub.Retrieve(request)
            assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
            return caught.value.details()

        assert opening.wait(60)
        assert state() == health_pb2.HealthCheckResponse.NOT_SERVING
        assert "opening its stores" in unavailable(vector_request(mini))
        opened.set()
        assert loading.wait(60)
        assert stub.Retrieve(vector_request(mini)).retrievals
        assert "loading its encoders" in unavailable(by_image)
        assert state() == health_pb2.HealthCheckResponse.NOT_SERVING
        loaded.set()
        started.result(60)
        assert state() == health_pb2.HealthCheckResponse.SERVING
        assert stub.Retrieve(by_image).retrievals
    server.stop(0)


def test_metrics_count_by_stage_and_store(shapes_root: Path, served, mini) -> None:
    from tagstore.serving import probes

    _, stub = served()
    stub.Retrieve(pb.RetrieveRequest(store="shapes", images=[picture("red", "circle")]))
    with pytest.raises(grpc.RpcError):
        stub.Retrieve(pb.RetrieveRequest(store="made-up"))
    stop, port = probes.serve("127.0.0.1:0", lambda: probes.State(True, "serving"))
    try:
        text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
    finally:
        stop()
    for stage in ("queue", "decode", "embed", "search", "tags"):
        assert f'tagstore_stage_seconds_count{{stage="{stage}",store="shapes"}}' in text
    assert 'tagstore_requests_total{code="OK",method="Retrieve",store="shapes"}' in text
    assert "tagstore_batch_rows_bucket" in text
    assert "tagstore_queue_rows" in text
    assert "made-up" not in text  # what callers make up is no label


def test_spans_cover_the_stages_and_take_the_callers_trace(served, mini) -> None:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    from tagstore.serving import tracing

    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    _, stub = served()
    tracing.use(provider)
    try:
        trace = "0af7651916cd43dd8448eb211c80319c"
        metadata = (("traceparent", f"00-{trace}-b7ad6b7169203331-01"),)
        stub.Retrieve(vector_request(mini), metadata=metadata)
        assert len(list(stub.RetrieveStream(iter([vector_request(mini)]), metadata=metadata))) == 1
        # a stream ends after its last answer
        wait_until(lambda: any(span.name == "RetrieveStream" for span in exporter.get_finished_spans()))
    finally:
        tracing.use(None)
    spans = {span.name: span for span in exporter.get_finished_spans()}
    assert {"Retrieve", "RetrieveStream", "search"} <= set(spans)
    assert spans["search"].parent.span_id == spans["RetrieveStream"].context.span_id
    assert {f"{span.context.trace_id:032x}" for span in spans.values()} == {trace}


def test_logs_are_json_where_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    from tagstore.serving.logs import JsonFormatter

    record = logging.LogRecord("tagstore.x", logging.WARNING, "", 0, "opened %s", ("a",), None)
    value = json.loads(JsonFormatter().format(record))
    assert (value["level"], value["logger"], value["message"]) == ("warning", "tagstore.x", "opened a")


def test_many_versions_come_and_go_without_a_failed_or_mixed_answer(tmp_path: Path, mini, served) -> None:
    from tagstore.ingestion import ingest_pairs
    from tagstore.types import Pair
    from tagstore.upkeep.edits import Selection, delete, rollback

    root = tmp_path / "root"
    ingest_pairs(
        (Pair(str(i), picture("red", "circle", shift=i), (f"tag{i}",)) for i in range(6)),
        root=root,
        store="live",
        encoder=mini,
    )
    server = limited(root, cores=2)
    stop, wrong, answered = threading.Event(), [], []

    def ask(i: int) -> None:
        with connect(f"grpc://{server.address}/live", retries=0) as source:
            vectors = np.random.default_rng(i).standard_normal((4, mini.dimension)).astype(np.float32)
            while not stop.is_set():
                found = source.retrieve(vectors=vectors, fingerprint=mini.fingerprint, k=10)
                answered.append(len(found))
                versions = {r.version for r in found}
                entries = {5 if version % 2 == 0 else 6 for version in versions}
                if len(versions) != 1 or {len(r.neighbours) for r in found} != entries:
                    wrong.append(found)

    try:
        with ThreadPoolExecutor(3) as pool:
            askers = [pool.submit(ask, i) for i in range(3)]
            for _ in range(8):
                version, _ = delete(root, "live", Selection(keys=["3"]))
                assert version.number % 2 == 0
                rollback(root, "live", version.number - 1)
            stop.set()
            for asker in askers:
                asker.result(30)
    finally:
        stop.set()
        server.stop(0)
    assert not wrong
    assert len(answered) > 16


def test_what_is_in_flight_is_finished_before_the_end(served, mini, monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held(monkeypatch)
    server, stub = served()
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(stub.Retrieve, vector_request(mini))
        held.started.acquire()
        stopped = pool.submit(server.stop, 30)
        held.go.set()
        assert first.result(60).retrievals
        stopped.result(30)
