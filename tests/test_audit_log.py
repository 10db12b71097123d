"""The audit log: a write is recorded before it is done, or refused; nobody makes its lines long."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest

from pictures import ingest_shapes
from tagstore import errors
from tagstore.client.admin import administer
from tagstore.serving.audit import MAX_TEXT
from tagstore.serving.live_catalog import LiveCatalog
from tagstore.serving.server import Server
from tagstore.serving.settings import Settings
from tagstore.storage.store import Store
from tagstore_proto.v1 import tagstore_pb2 as pb
from tagstore_proto.v1 import tagstore_pb2_grpc as pb_grpc
from waiting import wait_until


@pytest.fixture
def root(tmp_path: Path, mini, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(LiveCatalog, "encoder", lambda *_: mini)
    return ingest_shapes(tmp_path, mini)


@contextmanager
def audited(root: Path, log: str) -> Iterator[Server]:
    settings = Settings(anonymous="admin", audit=log)
    server = Server(root, "127.0.0.1:0", device="cpu", settings=settings)
    server.start()
    yield server
    server.stop(0)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full to write to")
def test_a_write_that_cannot_be_recorded_is_not_done(root: Path) -> None:
    with audited(root, "/dev/full") as server, administer(f"grpc://{server.address}/shapes") as admin:
        for write in (
            lambda: admin.delete(keys=["red-circle"]),
            lambda: admin.rollback(1),
            lambda: admin.ingest([]),
            lambda: admin.build_index(kind="flat"),
            admin.unload,
            admin.load,
        ):
            with pytest.raises(errors.TagstoreError, match="disk took nothing"):
                write()
        assert [version.number for version in admin.versions()] == [1]
    assert Store(root, "shapes").state()["current"] == 1
    assert server.catalog.engine("shapes")


def test_a_write_is_recorded_when_it_begins_and_when_it_ends(root: Path, tmp_path: Path) -> None:
    log = tmp_path / "audit.jsonl"
    with audited(root, str(log)) as server, administer(f"grpc://{server.address}/shapes") as admin:
        admin.delete(keys=["red-circle"])
        with pytest.raises(errors.NotFound):
            admin.delete(keys=["nobody"])
    events = [json.loads(line) for line in log.read_text().splitlines()]
    assert [event["event"] for event in events] == ["begun", "done", "begun", "failed"]
    assert {(event["method"], event["store"]) for event in events} == {("Delete", "shapes")}


def test_lines_are_short_whatever_callers_send(root: Path, tmp_path: Path) -> None:
    log = tmp_path / "audit.jsonl"
    with audited(root, str(log)) as server, grpc.insecure_channel(server.address) as channel:
        stub = pb_grpc.AdminStub(channel)
        for call in (
            lambda: stub.Delete(pb.DeleteRequest(store="x" * 5_000_000, keys=["a"])),
            lambda: stub.Delete(pb.DeleteRequest(store="shapes", keys=["a" * 900], where={"b" * 900: "c"})),
            lambda: list(stub.Ingest(iter([pb.IngestRequest(start=pb.IngestStart(store="y" * 5_000_000))]))),
        ):
            with pytest.raises(grpc.RpcError):
                call()
        wait_until(lambda: len(log.read_text().splitlines()) == 6)
    for line in log.read_text().splitlines():
        assert len(line) < 8 * MAX_TEXT
    assert "(5000000 characters)" in log.read_text()
