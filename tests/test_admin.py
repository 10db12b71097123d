"""Changing stores over gRPC: the same as on the machine itself."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from click.testing import CliRunner

from pictures import ingest_shapes, picture, write_shapes
from tagstore import errors
from tagstore.client import connect
from tagstore.client.admin import administer
from tagstore.serving.server import Server
from tagstore.serving.settings import Settings
from tagstore.storage.generations import writer_lock
from tagstore.storage.store import Store
from tagstore.types import Pair, Rejected
from tagstore.upkeep.edits import Selection, delete
from tagstore_proto.v1 import tagstore_pb2 as pb
from tagstore_proto.v1 import tagstore_pb2_grpc as pb_grpc


@pytest.fixture(scope="module")
def root(tmp_path_factory, mini) -> Path:
    return ingest_shapes(tmp_path_factory.mktemp("admin"), mini)


@pytest.fixture(scope="module")
def address(root: Path) -> Iterator[str]:
    server = Server(root, "127.0.0.1:0", device="cpu", settings=Settings(anonymous="admin"))
    server.start()
    yield server.address
    server.stop(0)


def pairs(n: int) -> Iterator[Pair | Rejected]:
    for i in range(n):
        captions = (f"A black hole in place {i}.",)
        yield Pair(f"new-{i}", picture("black", "circle", shift=i), captions, {"n": i}, f"pairs:{i}")


def test_pairs_become_a_version_and_each_is_answered(address: str, root: Path):
    def some() -> Iterator[Pair | Rejected]:
        yield from pairs(3)
        yield Pair("bad", b"no image", ("A caption.",))
        yield Rejected("unread", "image: not found", "pairs:4")
        yield next(pairs(1))

    with administer(f"grpc://{address}/fresh") as admin:
        report = admin.ingest(some(), encoder="mini", source="test")
        assert (report.version, report.pairs, report.added, report.entries) == (1, 6, 3, 3)
        assert [r.key for r in report.quarantined] == ["bad", "unread", "new-0"]
        assert report.quarantined[1].reason == "image: not found"
        again = admin.ingest(pairs(3))
        assert (again.version, again.added, again.unchanged) == (1, 0, 3)
    with connect(f"grpc://{address}/fresh") as source:
        assert source.retrieve([picture("black", "circle")], k=1)[0].neighbours[0].key == "new-0"
    assert {r.key for r in Store(root, "fresh").snapshot().quarantine()} >= {"bad", "unread"}


def test_an_ingest_that_breaks_off_leaves_no_trace(address: str, root: Path):
    def broken() -> Iterator[Pair | Rejected]:
        yield from pairs(3)
        raise OSError("the source is gone")

    with administer(f"grpc://{address}/broken") as admin, pytest.raises(OSError, match="the source is gone"):
        admin.ingest(broken(), encoder="mini")
    before = Store(root, "shapes").state()["current"]
    with administer(f"grpc://{address}/shapes") as admin, pytest.raises(OSError, match="the source is gone"):
        admin.ingest(broken())
    assert Store(root, "shapes").state()["current"] == before
    with administer(f"grpc://{address}/shapes") as admin, pytest.raises(errors.NotFound, match="no encoder"):
        admin.ingest(pairs(1), encoder="no such encoder")


def test_an_ingest_must_say_first_where_to(address: str):
    with grpc.insecure_channel(address) as channel, pytest.raises(grpc.RpcError) as caught:
        list(pb_grpc.AdminStub(channel).Ingest(iter([pb.IngestRequest(pair=pb.Pair(key="x"))])))
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "send `start`" in caught.value.details()


def test_delete_rollback_versions_and_diff(address: str, root: Path):
    with administer(f"grpc://{address}/shapes") as admin, connect(f"grpc://{address}/shapes") as source:
        first = admin.versions()[-1].number
        version, keys = admin.delete(keys=["red-circle"])
        assert (version.number, version.entries, keys) == (first + 1, source.info().entries, ["red-circle"])
        assert source.retrieve([picture("red", "circle")], k=1)[0].neighbours[0].key != "red-circle"
        assert admin.diff(first, first + 1).removed == ["red-circle"]
        assert ("red circle", "attribute", 1, 0) in admin.diff(first, first + 1).tags
        rolled = admin.rollback(first)
        assert (rolled.number, rolled.entries) == (first + 2, version.entries + 1)
        assert rolled.fingerprint == source.info().fingerprint
        assert source.retrieve([picture("red", "circle")], k=1)[0].neighbours[0].key == "red-circle"
        with pytest.raises(errors.NotFound, match="no entry"):
            admin.delete(keys=["nobody"])
        with pytest.raises(errors.InvalidInput, match="nothing is selected"):
            admin.delete()
        for near in [(0, 65), (0, 2**32 - 1)]:
            with pytest.raises(errors.InvalidInput, match="perceptual hashes have 64 bits"):
                admin.delete(near=[near])
            with pytest.raises(errors.InvalidInput, match="perceptual hashes have 64 bits"):
                delete(root, "shapes", Selection(near=[near]))
        assert [v.operation for v in admin.versions()][-2:] == ["delete", f"rollback to {first}"]


def test_an_index_is_built_with_progress_and_its_report(address: str, root: Path):
    messages: list[str] = []
    with administer(f"grpc://{address}/shapes") as admin, connect(f"grpc://{address}/shapes") as source:
        before = source.retrieve([picture("red", "circle")], k=3)[0]
        version, report = admin.build_index(progress=messages.append, kind="hnsw", recall=0.9)
        assert (version.operation, report["index"]["kind"]) == ("build-index", "hnsw")
        assert report["version"] == version.number
        assert messages
        after = source.retrieve([picture("red", "circle")], k=3)[0]
        assert (after.version, after.neighbours) == (version.number, before.neighbours)
        with pytest.raises(errors.InvalidInput, match="budget"):
            admin.build_index(recall=1.0, memory_bytes=1)
        with pytest.raises(errors.InvalidInput, match="recall is 7"):
            admin.build_index(recall=7)


def test_another_writer_is_busy(address: str, root: Path):
    with administer(f"grpc://{address}/shapes") as admin, writer_lock(root / "shapes"):
        with pytest.raises(errors.Busy, match="is being written by process"):
            admin.delete(keys=["red-circle"])
        with pytest.raises(errors.Busy):
            admin.ingest(pairs(1))


def test_a_store_that_is_unloaded_is_not_served_until_it_is_loaded(address: str):
    with (
        administer(f"grpc://{address}/shapes") as admin,
        connect(f"grpc://{address}/shapes", retries=0) as source,
    ):
        entries = source.info().entries
        admin.unload()
        with pytest.raises(errors.NotFound, match="not loaded"):
            source.info()
        assert admin.load().entries == entries
        assert source.info().entries == entries
    with administer(f"grpc://{address}/nothing") as admin, pytest.raises(errors.NotFound):
        admin.unload()


def test_results_come_while_pairs_are_still_sent(address: str, monkeypatch):
    monkeypatch.setattr("tagstore.serving.admin_service.INGEST_BATCH", 8)
    go = threading.Event()

    def many() -> Iterator[pb.IngestRequest]:
        yield pb.IngestRequest(start=pb.IngestStart(store="flow", encoder="mini", miner="keywords"))
        data = picture("black", "circle", size=32)
        for i in range(30):
            if i == 25:
                assert go.wait(60)  # the first batch must be answered before the last pairs are sent
            yield pb.IngestRequest(pair=pb.Pair(key=str(i), image=data, captions=["a hole"]))

    with grpc.insecure_channel(address) as channel:
        outcomes = []
        for response in pb_grpc.AdminStub(channel).Ingest(many(), timeout=120):
            outcomes += [result.outcome for result in response.results]
            go.set()
    assert outcomes == [pb.OUTCOME_ADDED] * 30
    assert response.report.entries == 30


def test_the_commands_take_a_servers_url(address: str, root: Path, tmp_path: Path):
    from tagstore.cli import cli

    def run(*arguments: str) -> str:
        result = CliRunner().invoke(cli, arguments, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.stdout

    url = f"grpc://{address}/typed"
    source = write_shapes(tmp_path / "shapes")
    (source / "bad.png").write_bytes(b"no image")
    (source / "bad.txt").write_text("A caption.")
    report = json.loads(run("ingest", str(source), "--to", url, "--encoder", "mini", "--json"))
    assert (report["version"], report["pairs"], report["entries"]) == (1, 19, 18)
    assert report["quarantined"][0]["key"] == "bad"
    assert "0 added, 18 unchanged, 1 quarantined" in run("ingest", str(source), "--to", url)
    assert "deleted 1 entries" in run("delete", url, "--key", "red-circle")
    assert "red-circle" in run("diff", url, "1", "2")
    assert "holds what typed@1 held" in run("rollback", url, "1")
    assert run("versions", url, "--json") == run(
        "versions", f"file://{root}/typed", "--json"
    ) or "rollback" in run("versions", url)
    run("unload", url)
    assert "typed@3 is served" in run("load", url)
