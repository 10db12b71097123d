"""How a writer behaves when something fails, and what it need not read when nothing does."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import crash
from tagstore.bundles import export, import_
from tagstore.errors import BadVector, WriteFailed
from tagstore.indexing import faiss_index
from tagstore.storage import environments
from tagstore.storage.staging import Draft
from tagstore.storage.store import Store
from tagstore.storage.version import Version
from tagstore.storage.writer import Writer
from tagstore.types import Fingerprint
from tagstore.upkeep.compact import compact
from tagstore.upkeep.edits import Selection, drop, rename, undrop
from tagstore.upkeep.takedown import purge
from tagstore.upkeep.verify import repair, verify

needs_compiler = pytest.mark.skipif(
    not shutil.which("cc"), reason="needs a C compiler, to build what makes writes fail"
)


def put(root: Path, first: int, n: int, space: str = "first") -> Version:
    batches = [[(f"key-{i}", i) for i in range(first, first + n)]]
    crash.ingest(root, crash.ingest_of(space, f"{first}", batches))
    return Store(root, crash.NAME).snapshot().version


def staged(n: int) -> tuple[list[Draft], np.ndarray]:
    serials = list(range(1000, 1000 + n))
    return [crash.draft(f"new-{i - 1000}", i) for i in serials], crash.vectors_of("first", serials)


def test_after_a_step_that_failed_a_writer_does_nothing_more(tmp_path: Path):
    put(tmp_path, 0, 5)
    drafts, vectors = staged(3)
    with Writer(tmp_path, crash.NAME, crash.SPACES["first"]) as writer:
        with pytest.raises(AttributeError):
            writer.append([drafts[0], "no draft"], vectors[:2])
        uses = [
            lambda: writer.append(drafts, vectors),
            lambda: writer.append([], None),
            lambda: writer.admit(drafts, same_miner=True),
            lambda: writer.confirm(["key-1"]),
            lambda: writer.delete([0]),
            lambda: writer.put_vectors([0], vectors[:1]),
            lambda: writer.embed_tags(vectors[:1]),
            lambda: writer.rollback(1),
        ]
        for use in uses:
            with pytest.raises(WriteFailed, match=r"earlier step .* open a new Writer"):
                use()
    assert put(tmp_path, 5, 2).entries == 7
    assert verify(tmp_path, crash.NAME, full=True) == []


def test_a_commit_that_failed_is_not_tried_again_by_the_same_writer(tmp_path: Path):
    put(tmp_path, 0, 5)

    def full(*_: object) -> dict[str, object]:
        raise OSError(errno.ENOSPC, "No space left on device")

    with Writer(tmp_path, crash.NAME) as writer:
        writer.delete([0])
        with pytest.raises(WriteFailed, match=r"No space left.*stays; free space"):
            writer.commit(operation="delete", indexer=full)
        with pytest.raises(WriteFailed, match="open a new Writer"):
            writer.commit(operation="delete", indexer=faiss_index.extend)
    assert Store(tmp_path, crash.NAME).snapshot().version.entries == 5


def test_a_mistake_of_the_caller_that_changed_nothing_does_not_stop_a_writer(tmp_path: Path):
    put(tmp_path, 0, 5)
    drafts, vectors = staged(3)
    with Writer(tmp_path, crash.NAME, crash.SPACES["first"]) as writer:
        for wrong in (vectors[:2], vectors[:, :4], None, np.where(vectors > 0, np.nan, vectors)):
            with pytest.raises(BadVector, match=f"'{crash.NAME}'"):
                writer.append(drafts, wrong)
        writer.append(drafts, vectors)
        with pytest.raises(ValueError, match="tags have no embedding"):
            writer.commit(operation="ingest", indexer=faiss_index.extend)
        with pytest.raises(LookupError, match="no version 9"):
            writer.rollback(9)
        crash._embed_tags(writer, "first")
        assert writer.commit(operation="ingest", indexer=faiss_index.extend).entries == 8


def test_a_reembedding_that_was_cut_off_does_not_stand_in_the_way_of_one_with_another_dimension(
    tmp_path: Path,
):
    put(tmp_path, 0, 300)
    with Writer(tmp_path, crash.NAME, crash.SPACES["second"], new_space=True) as writer:
        writer.put_vectors(list(range(300)), crash.vectors_of("second", list(range(300))))
    wider = Fingerprint("wider", "w", {}, False, True, 5)
    with Writer(tmp_path, crash.NAME, wider, new_space=True) as writer:
        writer.put_vectors(range(299, -1, -1), np.eye(5, dtype=np.float32)[np.arange(299, -1, -1) % 5])
        while texts := writer.new_tags(limit=100):
            writer.embed_tags(np.eye(5, dtype=np.float32)[[0] * len(texts)])
        writer.commit(operation="reembed", indexer=faiss_index.extend)
    snapshot = Store(tmp_path, crash.NAME).snapshot()
    np.testing.assert_array_equal(snapshot.vectors(snapshot.live()), np.eye(5)[np.arange(300) % 5])
    assert verify(tmp_path, crash.NAME, full=True) == []


def test_a_commit_reads_no_other_version_than_the_one_before(tmp_path: Path, monkeypatch):
    for i in range(6):
        put(tmp_path, i, 2)
    read: list[int] = []
    from_json = Version.from_json

    def counted(data: bytes | str) -> Version:
        read.append(from_json(data).number)
        return from_json(data)

    monkeypatch.setattr(Version, "from_json", counted)
    assert put(tmp_path, 9, 2).number == 7
    assert set(read) <= {6, 7}


def test_a_leftover_of_the_index_is_swept_and_what_versions_name_is_not(tmp_path: Path):
    for i in range(4):
        put(tmp_path, 2 * i, 2)
    directory = Store(tmp_path, crash.NAME).index_directory
    named = {f["file"] for v in Store(tmp_path, crash.NAME).versions() for f in v.index["files"]}
    for name in (
        "00000005-000000000008-000000000010.faiss",
        "00000003-000000000000-000000000006.tmp",
        "else",
    ):
        (directory / name).write_bytes(b"")
    with Writer(tmp_path, crash.NAME):
        pass
    assert {path.name for path in directory.iterdir()} == named


def test_a_compacted_store_rolled_back_to_another_encoder_and_ingested_into_is_sound(tmp_path: Path):
    """The first encoder has not embedded the second one's tags: no checksum may cover them yet."""
    put(tmp_path, 0, 20)
    crash.reembed(tmp_path, {"space": "second"})
    put(tmp_path, 200, 20, space="second")
    for step in range(2):
        compact(tmp_path, crash.NAME)
        assert verify(tmp_path, crash.NAME, full=True) == []
        crash.rollback(tmp_path, {"to": 1})
        compact(tmp_path, crash.NAME)
        assert verify(tmp_path, crash.NAME, full=True) == []
        put(tmp_path, 400 + 20 * step, 20)
        assert crash.look(tmp_path, close=False)[1] == []
    compact(tmp_path, crash.NAME, keep=1)
    assert crash.look(tmp_path, close=False)[1] == []


def test_what_was_read_is_known_after_the_versions_that_read_it_are_gone(tmp_path: Path):
    put(tmp_path, 0, 20)
    put(tmp_path, 20, 20)
    crash.delete(tmp_path, {"keys": ["key-3"]})
    before = export(tmp_path, crash.NAME, tmp_path / "before")
    assert [source["identity"] for source in before.sources] == ["0", "20"]
    compact(tmp_path, crash.NAME, keep=2)
    assert [v.number for v in Store(tmp_path, crash.NAME).versions()] == [3, 4]
    assert export(tmp_path, crash.NAME, tmp_path / "after", version=3).sha256 == before.sha256
    purge(tmp_path, crash.NAME, Selection(keys=["key-5"]), reason="asked for")
    assert [s["identity"] for s in Store(tmp_path, crash.NAME).snapshot().sources()] == ["0", "20"]
    rest = crash.rollback(tmp_path, {"to": 5})["version"]
    assert [s["identity"] for s in Store(tmp_path, crash.NAME).snapshot(rest).sources()] == ["0", "20"]


def test_what_was_read_of_a_database_does_not_stay_in_memory(tmp_path: Path):
    rows = np.eye(1, 512, dtype=np.float32).repeat(2000, 0)
    with Writer(tmp_path, "wide", Fingerprint("wide", "w", {}, False, True, 512)) as writer:
        for start in range(0, 40_000, 2000):
            writer.append([Draft(f"{start + i}", bytes(32), 0, ("c",)) for i in range(2000)], rows)
        writer.commit(operation="ingest", indexer=lambda *_: {})

    def mapped() -> int:
        text = Path("/proc/self/smaps").read_text()
        [found] = re.findall(rf"{writer.env.path()}/data.mdb\n(?:.*\n)*?Rss: +(\d+) kB", text)
        return int(found) << 10

    snapshot = Store(tmp_path, "wide").snapshot()
    expected = snapshot.vectors(snapshot.live()[::100])
    assert mapped() > 20 << 20
    with writer.env.begin(buffers=True) as txn:
        held = txn.get(b"state", db=writer.db["meta"])
        environments.trim(writer.env, 1 << 40)
        assert mapped() > 20 << 20
        environments.trim(writer.env, 1)
        assert mapped() < 4 << 20
        assert json.loads(bytes(held).partition(b" ")[2])["current"] == 1
    np.testing.assert_array_equal(snapshot.vectors(snapshot.live()[::100]), expected)


def put_plain(root: Path, first: int, n: int) -> Version:
    """Write entries without tags, in one append."""
    with Writer(root, crash.NAME, crash.SPACES["first"]) as writer:
        drafts = [Draft(f"{i:09d}", bytes(32), 0, ("c" * 200,)) for i in range(first, first + n)]
        writer.append(drafts, np.full((n, crash.D), 0.25))
        return writer.commit(operation="ingest", indexer=faiss_index.extend)


def run_this_file(env: dict[str, str], *arguments: str) -> list:
    """Run this file as a process and return the JSON that it prints."""
    command = [sys.executable, __file__, *arguments]
    return json.loads(subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout)


def fill(root: str) -> None:
    """Ingest until a small map is full: the child of the test below."""
    for i in range(1, 1000):
        try:
            put_plain(Path(root), 500 * i, 500)
        except WriteFailed as error:
            print(json.dumps([i, str(error)]))
            return


def test_a_map_that_is_full_is_said_and_a_process_with_a_larger_one_goes_on(tmp_path: Path):
    put_plain(tmp_path, 0, 500)
    reader = Store(tmp_path, crash.NAME)
    env = {**os.environ, "TAGSTORE_MAP_SIZE": str(1 << 20)}
    commits, error = run_this_file(env, str(tmp_path))
    assert "set TAGSTORE_MAP_SIZE to more than 1048576 bytes" in error
    assert commits > 1
    # a process with the larger map, which had the store open all the time, sees everything and can write
    assert reader.snapshot().version.entries == 500 * commits
    assert put_plain(tmp_path, 500 * commits, 3000).entries == 500 * commits + 3000
    assert (reader.generation / "data.mdb").stat().st_size > 1 << 20
    assert verify(tmp_path, crash.NAME, full=True) == []


# Each write of every operation fails in turn, in a child process under the shim of the crash harness.

OPERATIONS = {
    "ingest": lambda root, to: put(root, 100, 30),
    "delete": lambda root, to: crash.delete(root, {"keys": ["key-1", "key-2"]}),
    "reembed": lambda root, to: crash.reembed(root, {"space": "second"}),
    "rollback": lambda root, to: crash.rollback(root, {"to": 1}),
    "compact": lambda root, to: compact(root, crash.NAME, keep=1),
    "purge": lambda root, to: purge(root, crash.NAME, Selection(keys=["key-3"]), reason="asked", who="me"),
    "repair": lambda root, to: repair(root, crash.NAME),
    "rename": lambda root, to: rename(root, crash.NAME, "other"),
    "drop": lambda root, to: drop(root, crash.NAME),
    "undrop": lambda root, to: undrop(root, "gone"),
    "export": lambda root, to: export(root, crash.NAME, to / "new.bundle"),
    "import": lambda root, to: import_(to / "new", root / "bundle"),
}


# Operations that write much, or verify, skip some writes; odd steps, so that ENOSPC and EIO alternate.
STRIDES = {"ingest": 3, "reembed": 3, "compact": 5, "purge": 3, "repair": 9, "import": 7}


def fail_everywhere(root: str, operation: str, stride: str) -> None:
    """Fail the first write of an operation, then its second and so on: the child of the test below."""
    scratch, shim, outcomes = Path(root).parent / "scratch", ctypes.CDLL(None), []
    for number in range(0, 10_000, int(stride)):
        shutil.copytree(root, scratch / "root")
        if operation == "repair":
            next((scratch / "root").glob("*/db-*/index/*.faiss")).unlink()
        shim.crash_arm(*map(ctypes.c_long, (3, number, 1, errno.EIO if number % 2 else errno.ENOSPC, 0)))
        error = None
        try:
            OPERATIONS[operation](scratch / "root", scratch)
        except Exception as raised:  # noqa: BLE001  the test checks which one it is
            error = raised
        unreached = bool(shim.crash_disarm())
        wrong = crash.look(scratch / "root", close=True)[1] if operation != "repair" else []
        outcomes.append([number, unreached, type(error).__name__ if error else None, str(error), wrong])
        environments._close_inherited()
        shutil.rmtree(scratch)
        if unreached:
            break
    print(json.dumps(outcomes))


@needs_compiler
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_write_that_fails_becomes_write_failed_whichever_it_is(tmp_path: Path, operation: str):
    root = tmp_path / "root"
    put(root, 0, 20)
    put(root, 20, 5)
    export(root, crash.NAME, root / "bundle")
    shutil.copytree(root / crash.NAME, root / ".dropped" / f"gone@{int(time.time())}")
    env = {**os.environ, "LD_PRELOAD": str(crash.build_shim(tmp_path))}
    *failed, last = run_this_file(env, str(root), operation, str(STRIDES.get(operation, 1)))
    assert failed
    assert (last[1], last[2], last[4]) == (True, None, [])
    for number, _, error, text, wrong in failed:
        assert error in ("WriteFailed", None), f"write {number}: {error}: {text}"
        assert wrong == [], f"after write {number} failed"


if __name__ == "__main__":
    fail_everywhere(*sys.argv[1:]) if len(sys.argv) > 2 else fill(*sys.argv[1:])
