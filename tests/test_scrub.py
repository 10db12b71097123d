"""The scrub finds what changed on disk while a store is served, at its rate, and goes on where it stopped."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from tagstore import errors
from tagstore.serving import scrubber
from tagstore.serving.live_catalog import LiveCatalog
from tagstore.serving.server import Server
from tagstore.serving.settings import Settings
from tagstore.storage.generations import generation
from tagstore.storage.store import Store
from tagstore.upkeep import scrub
from tagstore.upkeep.edits import Selection, delete
from tagstore.upkeep.scrub import STATE_FILE, Scrub, parts_of
from waiting import wait_until


@pytest.fixture
def root(tmp_path: Path, shapes_root: Path) -> Path:
    for name in ("other", "shapes"):
        shutil.copytree(shapes_root / "shapes", tmp_path / name)
    return tmp_path


def change_key(root: Path, store: str) -> None:
    """Change a key in the records of a store, behind LMDB's back."""
    path = generation(root / store) / "data.mdb"
    path.write_bytes(path.read_bytes().replace(b"red-circle", b"bed-circle"))


def looked(root: Path, rate: float = 1e12) -> list[dict[str, Any]]:
    said: list[dict[str, Any]] = []
    Scrub(root, rate, (), lambda message: said.append(dict(message))).look()
    return said


def damaged(said: list[dict[str, Any]]) -> dict[str, str]:
    return {message["damaged"]: message["what"] for message in said if "damaged" in message}


def test_records_and_index_files_that_changed_are_found(root: Path) -> None:
    change_key(root, "shapes")
    [index] = (generation(root / "other") / "index").iterdir()
    index.write_bytes(index.read_bytes()[:-1] + b"?")
    found = damaged(looked(root))
    assert "not what version 1 committed" in found["shapes"]
    assert "does not fit its checksum: `tagstore repair` makes it anew" in found["other"]


def test_a_scrub_goes_on_where_the_last_one_stopped(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scrub, "SAVE_SECONDS", 0.0)
    count = len(parts_of(Store(root, "other")))
    seen = []

    def say(message: Any) -> None:
        if "share" in message:
            seen.append(message)
        if len(seen) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Scrub(root, 1e12, (), say).look()
    assert json.loads((root / STATE_FILE).read_text())["other"]["done"] == 2
    shares = [m["share"] for m in looked(root) if m.get("store") == "other" and "share" in m]
    assert shares == [done / count for done in range(3, count + 1)]
    assert not looked(root)
    delete(root, "other", Selection(keys=["red-circle"]))
    new = [m for m in looked(root) if "share" in m]
    assert {m["store"] for m in new} == {"other"}
    assert len(new) == len(parts_of(Store(root, "other"))) - count < count
    monkeypatch.setattr(scrub, "PERIOD", 0.0)
    assert {m["store"] for m in looked(root) if "share" in m} == {"other", "shapes"}


def test_it_reads_no_faster_than_it_may(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(scrub.time, "sleep", slept.append)
    size = sum(message.get("bytes", 0) for message in looked(root, rate=1000.0))
    start = time.monotonic()
    assert max(slept) + (time.monotonic() - start) >= 0.9 * size / 1000


def test_a_store_that_is_replaced_while_it_is_read_is_not_called_damaged(root: Path) -> None:
    scrubbing = Scrub(root, 1e12, (), lambda message: None)
    part = parts_of(Store(root, "shapes"))[0]
    assert scrubbing._confirmed("shapes", part) is None
    assert scrubbing._confirmed("shapes", part._replace(name="no longer there")) is None


def test_a_server_leaves_out_what_its_scrub_finds(root: Path, mini, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LiveCatalog, "encoder", lambda *_: mini)
    change_key(root, "shapes")
    server = Server(root, "127.0.0.1:0", device="cpu", settings=Settings(scrub=100))
    told: list[dict[str, Any]] = []
    server.announce = lambda message: told.append(dict(message))
    server.start()
    try:
        wait_until(lambda: "shapes" in server.catalog.damages)
        with pytest.raises(errors.Damaged):
            server.catalog.engine("shapes")
        assert server.catalog.engine("other")
        wait_until(lambda: any("leave_out" in message for message in told))
    finally:
        server.stop(0)


def test_a_store_that_brings_its_reader_down_is_left_out(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[tuple[str, str]] = []
    program = """import json, os; print(json.dumps({"store": "shapes"}), flush=True); os.abort()"""
    monkeypatch.setattr(scrubber, "COMMAND", ("-c", program))
    running = scrubber.Scrubber(root, 1, dict, lambda *about: found.append(about))
    wait_until(lambda: found)
    running.stop()
    assert found == [("shapes", "reading it brought the reader down (exit code -6)")]
