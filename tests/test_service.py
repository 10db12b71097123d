"""A real server on a free port: the same answers as in process, and errors that say what to do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from pictures import picture, write_shapes
from tagstore import errors
from tagstore.client import connect
from tagstore.serving.server import SERVICE, Server
from tagstore.wire.status import STATUS
from tagstore_proto.v1 import tagstore_pb2 as pb
from tagstore_proto.v1 import tagstore_pb2_grpc as pb_grpc


@pytest.fixture
def remote(server_address: str):
    with connect(f"grpc://{server_address}/shapes") as source:
        yield source


@pytest.fixture
def local(shapes_root: Path):
    with connect(f"file://{shapes_root}/shapes") as source:
        yield source


@pytest.fixture
def stub(server_address: str):
    with grpc.insecure_channel(server_address) as channel:
        yield pb_grpc.TagStoreStub(channel)


def test_server_and_directory_give_the_same_answers(remote, local, mini) -> None:
    images = [picture(c, s, shift=3) for c in ("red", "blue") for s in ("circle", "triangle")]
    for options in ({}, {"k": 1}, {"k": 18, "max_tags": 4}, {"k": 1000}):
        assert remote.retrieve(images, **options) == local.retrieve(images, **options)
    vectors = np.random.default_rng(0).standard_normal((300, mini.dimension)).astype(np.float32)
    for v in (vectors, vectors.astype(np.float16)):
        assert remote.retrieve(vectors=v, fingerprint=mini.fingerprint) == local.retrieve(
            vectors=v, fingerprint=mini.fingerprint
        )
    mixed = {"images": images, "vectors": vectors[:3], "fingerprint": mini.fingerprint}
    assert remote.retrieve(**mixed) == local.retrieve(**mixed)
    assert len(remote.retrieve(**mixed)) == 7
    assert remote.retrieve([]) == local.retrieve([]) == []


def test_vocabulary_and_info_are_the_same_too(remote, local) -> None:
    assert remote.info() == local.info()
    everything = list(remote.vocabulary())
    assert everything == list(local.vocabulary())
    assert len(everything) == remote.info().unique_tags
    ids = [t.tag_id for t in everything][::-1]
    for ours, theirs in zip(remote.tags(ids, embeddings=True), local.tags(ids, embeddings=True), strict=True):
        assert ours.tag_id == theirs.tag_id
        np.testing.assert_array_equal(ours.embedding, theirs.embedding)


def test_a_picture_of_the_store_finds_itself_and_its_tags(remote) -> None:
    [answer] = remote.retrieve([picture("red", "circle")], k=3)
    assert answer.neighbours[0].key == "red-circle"
    assert answer.neighbours[0].similarity > 0.999
    assert {"red circle", "white table", "Paris"} <= {t.tag for t in answer}
    assert (answer.store, answer.version) == ("shapes", 1)


def test_a_query_of_another_encoder_is_refused_with_both_fingerprints(remote, local, mini) -> None:
    other = replace(mini.fingerprint, weights="0" * 64)
    vectors = np.ones((1, mini.dimension), np.float32)
    for source in (remote, local):
        with pytest.raises(errors.FingerprintMismatch) as caught:
            source.retrieve(vectors=vectors, fingerprint=other)
        assert mini.fingerprint.digest in str(caught.value)
        assert other.digest in str(caught.value)
        with pytest.raises(errors.InvalidInput, match="pass its fingerprint"):
            source.retrieve(vectors=vectors)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 0.0])
def test_vectors_that_mean_nothing_are_refused(remote, local, mini, bad: float) -> None:
    vectors = np.full((1, mini.dimension), bad, np.float32)
    for source in (remote, local):
        with pytest.raises(errors.InvalidInput, match="query 0 holds"):
            source.retrieve(vectors=vectors, fingerprint=mini.fingerprint)
        with pytest.raises(errors.InvalidInput, match="takes"):
            source.retrieve(vectors=np.ones((1, 3), np.float32), fingerprint=mini.fingerprint)


@pytest.mark.parametrize("k", [0, 1001, -1])
def test_k_out_of_range_is_refused(remote, local, k: int) -> None:
    for source in (remote, local):
        with pytest.raises(errors.InvalidInput, match=f"k is {k}"):
            source.retrieve([picture("red", "circle")], k=k)


@pytest.mark.parametrize("data", [b"", b"no image at all", picture("red", "circle")[:200]])
def test_what_is_no_image_is_refused_and_named_by_its_place(remote, local, data: bytes) -> None:
    for source in (remote, local):
        with pytest.raises(errors.InvalidInput, match="image 1 of the request"):
            source.retrieve([picture("red", "circle"), data])


def test_unknown_stores_versions_and_tags_are_not_found(server_address: str, remote, local) -> None:
    for source in (remote, local):
        for embeddings in (False, True):
            with pytest.raises(errors.NotFound, match="no tag 99999"):
                source.tags([99999], embeddings=embeddings)
    for url, message in (
        ("nope", "those there are: shapes"),
        ("shapes@7", "its current one is 1"),
        ("-x", "no name for a store"),
    ):
        with (
            connect(f"grpc://{server_address}/{url}") as source,
            pytest.raises((errors.NotFound, errors.InvalidInput), match=message),
        ):
            source.info()


def test_a_message_beyond_the_limit_is_refused(remote) -> None:
    with pytest.raises(errors.InvalidInput, match="too much for the server"):
        remote.retrieve([bytes(65 << 20)])


def test_limits_hold_for_callers_without_our_client(stub, mini) -> None:
    for request in (
        pb.RetrieveRequest(store="shapes", vectors=pb.Vectors(data=b"123", dimension=1)),
        pb.RetrieveRequest(store="shapes", images=[picture("red", "circle")], k=0),
        pb.RetrieveRequest(store="shapes", images=[b"x"] * 4097),
        pb.RetrieveRequest(store="../shapes", images=[b"x"]),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            stub.Retrieve(request)
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    with pytest.raises(grpc.RpcError) as caught:
        stub.GetTags(pb.GetTagsRequest(store="shapes", page_size=1 << 30))
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT


def test_stores_are_listed(stub) -> None:
    [info] = stub.ListStores(pb.ListStoresRequest()).stores
    assert (info.store, info.version, info.entries) == ("shapes", 1, 18)


def test_health_and_reflection_answer(server_address: str) -> None:
    with grpc.insecure_channel(server_address) as channel:
        for name in ("", SERVICE):
            status = (
                health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=name)).status
            )
            assert status == health_pb2.HealthCheckResponse.SERVING
        assert SERVICE in ProtoReflectionDescriptorDatabase(channel).get_services()


def test_every_error_has_a_status() -> None:
    def leaves(kind: type) -> set[type]:
        return {leaf for sub in kind.__subclasses__() for leaf in leaves(sub)} or {kind}

    for kind in leaves(errors.TagstoreError):
        assert any(issubclass(kind, mapped) for mapped, _ in STATUS), kind


def test_a_fault_of_ours_shows_nothing_of_itself(
    shapes_root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    server = Server(shapes_root, "127.0.0.1:0", device="cpu")

    def broken(*_):
        raise KeyError("secret path")

    monkeypatch.setattr(server.catalog, "engine", broken)
    monkeypatch.setattr(server.catalog, "stores", list)
    server.start()
    try:
        with grpc.insecure_channel(server.address) as channel, pytest.raises(grpc.RpcError) as caught:
            pb_grpc.TagStoreStub(channel).Retrieve(pb.RetrieveRequest(store="shapes"))
    finally:
        server.stop(0)
    assert caught.value.code() == grpc.StatusCode.INTERNAL
    assert "secret" not in caught.value.details()
    assert "secret path" in caplog.text


def test_a_version_committed_while_the_server_runs_is_served_and_the_old_one_stays(
    tmp_path: Path, mini
) -> None:
    from tagstore.ingestion import ingest

    source = write_shapes(tmp_path / "shapes")
    ingest(str(source), root=tmp_path / "root", store="live", encoder=mini)
    server = Server(tmp_path / "root", "127.0.0.1:0", device="cpu")
    server.start()
    try:
        with (
            connect(f"grpc://{server.address}/live") as now,
            connect(f"grpc://{server.address}/live@1") as pinned,
        ):
            assert now.info().version == 1
            (source / "extra.png").write_bytes(picture("black", "circle"))
            (source / "extra.txt").write_text("A black hole.")
            ingest(str(source), root=tmp_path / "root", store="live", encoder=mini)
            [new], [old] = (s.retrieve([picture("black", "circle")], k=1) for s in (now, pinned))
            assert (new.version, new.neighbours[0].key) == (2, "extra")
            assert (old.version, pinned.info().entries) == (1, 18)
    finally:
        server.stop(0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_command_serves_says_where_and_drains(shapes_root: Path, number: int) -> None:
    command = [
        sys.executable,
        "-m",
        "tagstore.cli",
        "serve",
        "--root",
        str(shapes_root),
        "--address",
        "127.0.0.1:0",
        "--device",
        "cpu",
    ]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": ""}
    )
    try:
        address = process.stdout.readline().strip()
        with connect(f"grpc://{address}/shapes") as source:
            assert source.info().entries == 18
        process.send_signal(number)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.stdout.close()


@pytest.mark.parametrize("address", ["localhost", "127.0.0.1", ":50051", "127.0.0.1:99999", "127.0.0.1:x"])
def test_an_address_that_is_none_is_refused(shapes_root: Path, address: str) -> None:
    with pytest.raises(errors.InvalidInput, match="no HOST:PORT"):
        Server(shapes_root, address)


def test_an_open_address_is_refused_unless_said(shapes_root: Path) -> None:
    with pytest.raises(errors.InvalidInput, match="--insecure"):
        Server(shapes_root, "0.0.0.0:0")
    Server(shapes_root, "0.0.0.0:0", insecure=True).stop(0)


def test_a_taken_port_and_a_missing_root_are_said(
    shapes_root: Path, server_address: str, tmp_path: Path
) -> None:
    with pytest.raises(errors.Unavailable, match="is another server running"):
        Server(shapes_root, server_address)
    with pytest.raises(errors.NotFound, match="no directory"):
        Server(tmp_path / "nothing", "127.0.0.1:0")
