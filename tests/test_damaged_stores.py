"""A damaged store is left out of a server, which says so; the others serve."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client import generate_latest

from tagstore import errors
from tagstore.client import connect
from tagstore.client.admin import administer
from tagstore.serving.live_catalog import LiveCatalog
from tagstore.serving.server import Server
from tagstore.serving.settings import Settings
from tagstore.storage.generations import generation
from tagstore.upkeep.edits import Selection, delete
from tagstore_proto.v1 import tagstore_pb2 as pb
from tagstore_proto.v1 import tagstore_pb2_grpc as pb_grpc


@pytest.fixture
def serve(mini, monkeypatch: pytest.MonkeyPatch) -> Iterator:
    """Start servers that stop with the test."""
    monkeypatch.setattr(LiveCatalog, "encoder", lambda *_: mini)
    servers = []

    def start(root: Path) -> Server:
        server = Server(root, "127.0.0.1:0", device="cpu", settings=Settings(anonymous="admin"))
        servers.append(server)
        server.start()
        return server

    yield start
    for server in servers:
        server.stop(0)


def root_of(folder: Path, shapes_root: Path, *stores: str) -> Path:
    """Make a root with copies of the store of shapes."""
    for store in stores:
        shutil.copytree(shapes_root / "shapes", folder / store)
    return folder


def cut(path: Path) -> bytes:
    """Cut a file in half; returns what it held."""
    data = path.read_bytes()
    os.truncate(path, len(data) // 2)
    return data


def index_file(root: Path, store: str) -> Path:
    return max((generation(root / store) / "index").iterdir(), key=lambda path: path.stat().st_mtime_ns)


def message(address: str, store: str) -> str:
    """The message of the DATA_LOSS that a query gets."""
    with grpc.insecure_channel(address) as channel, pytest.raises(grpc.RpcError) as caught:
        pb_grpc.TagStoreStub(channel).GetStore(pb.GetStoreRequest(store=store))
    assert caught.value.code() == grpc.StatusCode.DATA_LOSS
    return caught.value.details()


def test_a_damaged_store_is_left_out_and_the_others_serve(
    tmp_path: Path, shapes_root: Path, serve, caplog: pytest.LogCaptureFixture
) -> None:
    root = root_of(tmp_path / "root", shapes_root, "sound", "cut", "no-index", "no-current", "garbage")
    cut(generation(root / "cut") / "data.mdb")
    cut(index_file(root, "no-index"))
    (root / "no-current" / "CURRENT").write_text("nothing")
    (generation(root / "garbage") / "data.mdb").write_bytes(b"x" * 100_000)
    address = serve(root).address
    damaged = ("cut", "garbage", "no-current", "no-index")
    for store in damaged:
        text = message(address, store)
        assert f"store '{store}' is damaged and not served" in text
        assert str(root) not in text
        assert f"store '{store}' is damaged and left out" in caplog.text
    with grpc.insecure_channel(address) as channel:
        stub = pb_grpc.TagStoreStub(channel)
        assert [info.store for info in stub.ListStores(pb.ListStoresRequest()).stores] == ["sound"]
        check = health_pb2_grpc.HealthStub(channel).Check.with_call(health_pb2.HealthCheckRequest())
    assert check[0].status == health_pb2.HealthCheckResponse.SERVING
    assert dict(check[1].trailing_metadata())["damaged-stores"] == "4"
    metrics = generate_latest().decode()
    for store in damaged:
        assert f'tagstore_store_damaged{{store="{store}"}} 1.0' in metrics


def test_a_damaged_store_is_served_again_once_it_is_restored(
    tmp_path: Path, shapes_root: Path, serve
) -> None:
    root = root_of(tmp_path / "root", shapes_root, "a", "b")
    backup = shutil.copytree(root / "a", tmp_path / "a")
    cut(index_file(root, "a"))
    server = serve(root)
    message(server.address, "a")
    shutil.rmtree(root / "a")
    shutil.copytree(backup, root / "a")
    with connect(f"grpc://{server.address}/a") as source:
        assert source.info().entries == 18
    assert "a" not in server.catalog.damages


def test_a_store_that_a_version_switch_finds_damaged_is_left_out(
    tmp_path: Path, shapes_root: Path, serve, mini
) -> None:
    root = root_of(tmp_path / "root", shapes_root, "a", "b", "c")
    server = serve(root)
    with connect(f"grpc://{server.address}/a") as source:
        assert source.info().version == 1
    delete(root, "a", Selection(keys=[f"{colour}-circle" for colour in ("red", "green", "blue", "yellow")]))
    delete(root, "a", Selection(keys=[f"{colour}-square" for colour in ("red", "green", "blue", "yellow")]))
    delete(root, "a", Selection(keys=[f"{colour}-triangle" for colour in ("red", "green", "blue", "yellow")]))
    file = index_file(root, "a")
    whole = cut(file)
    assert "store 'a' is damaged" in message(server.address, "a")
    # a database that is cut off while it is open is noticed before the pages that it lacks are read
    os.truncate(generation(root / "b") / "data.mdb", 12288)
    message(server.address, "a")
    server.catalog._current.clear()
    assert "store 'b' is damaged" in message(server.address, "b")
    with connect(f"grpc://{server.address}/c") as source:
        assert source.info().entries == 18
    file.write_bytes(whole)
    with administer(f"grpc://{server.address}/a") as admin:
        assert admin.load().version == 4
        with pytest.raises(errors.Damaged):
            administer(f"grpc://{server.address}/b").load()


def test_a_damaged_old_version_does_not_take_the_store_with_it(
    tmp_path: Path, shapes_root: Path, serve
) -> None:
    root = root_of(tmp_path / "root", shapes_root, "a")
    old = index_file(root, "a")
    kept = [f"{colour}-{shape}" for colour in ("red", "green") for shape in ("circle", "square", "triangle")]
    delete(root, "a", Selection(keys=kept))
    delete(root, "a", Selection(keys=["blue-circle", "blue-square", "blue-triangle", "yellow-circle"]))
    assert index_file(root, "a") != old
    cut(old)
    server = serve(root)
    with connect(f"grpc://{server.address}/a@1", retries=0) as pinned, pytest.raises(errors.Damaged):
        pinned.info()
    with connect(f"grpc://{server.address}/a") as source:
        assert source.info().version == 3
