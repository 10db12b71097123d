"""Deleting, rolling back, comparing, dropping; verify finds damage, and repair rebuilds what is derived."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from pictures import picture, write_shapes
from tagstore.client import connect
from tagstore.encoding.images import decode, perceptual_hash
from tagstore.errors import AlreadyExists, Damaged, InvalidInput, NotFound
from tagstore.ingestion import ingest
from tagstore.mining import load_rules
from tagstore.storage.store import Store, store_names
from tagstore.upkeep.edits import Selection, delete, diff, drop, rename, rollback, undrop
from tagstore.upkeep.reprocessing import reembed, retag
from tagstore.upkeep.verify import repair, verify


@pytest.fixture
def root(tmp_path: Path, mini) -> Path:
    ingest(str(write_shapes(tmp_path / "shapes")), root=tmp_path / "root", store="s", encoder=mini)
    return tmp_path / "root"


def keys(root: Path, version: int | None = None) -> set[str]:
    return {e.key for e in Store(root, "s").snapshot(version).entries()}


def test_a_deleted_entry_is_gone_from_every_answer_at_once(root: Path):
    with connect(f"file://{root}/s") as source, connect(f"file://{root}/s@1") as old:
        assert source.retrieve([picture("red", "circle")], k=1)[0].neighbours[0].key == "red-circle"
        version, deleted = delete(root, "s", Selection(keys=["red-circle", "not there"]))
        assert (version.number, version.entries, deleted) == (2, 17, ["red-circle"])
        [answer] = source.retrieve([picture("red", "circle")], k=18)
        assert "red-circle" not in {n.key for n in answer.neighbours}
        assert len(answer.neighbours) == 17
        assert "red circle" not in {t.tag for t in answer}
        assert old.retrieve([picture("red", "circle")], k=1)[0].neighbours[0].key == "red-circle"


def test_entries_are_selected_by_image_hash_and_metadata(root: Path, tmp_path: Path, mini):
    snapshot = Store(root, "s").snapshot()
    entry = snapshot.entry(snapshot.find("blue-square"))
    near = perceptual_hash(decode(picture("blue", "square")))
    assert [e.key for e in Selection(sha256=[entry.sha256.hex()]).find(snapshot)] == ["blue-square"]
    assert "blue-square" in {e.key for e in Selection(near=[(near, 2)]).find(snapshot)}
    with pytest.raises(InvalidInput, match="nothing is selected"):
        list(Selection().find(snapshot))
    with pytest.raises(NotFound, match="nothing was deleted"):
        delete(root, "s", Selection(where={"colour": "blue"}))
    (tmp_path / "shapes" / "more.jsonl").write_text(
        '{"image": "red-circle.png", "caption": "A dot.", "key": "dot", "colour": "red"}\n'
    )
    ingest(str(tmp_path / "shapes" / "more.jsonl"), root=root, store="s", encoder=mini)
    assert delete(root, "s", Selection(where={"colour": "red"}))[1] == ["dot"]


def test_rollback_brings_back_what_was_and_ids_are_never_used_again(root: Path, tmp_path: Path, mini):
    delete(root, "s", Selection(keys=["red-circle"]))
    (tmp_path / "shapes" / "new.png").write_bytes(picture("black", "circle"))
    (tmp_path / "shapes" / "new.txt").write_text("A black hole.")
    ingest(str(tmp_path / "shapes"), root=root, store="s", encoder=mini)
    third = Store(root, "s").snapshot().version
    version = rollback(root, "s", 1)
    assert (version.number, version.parent, version.entries, version.operation) == (4, 3, 18, "rollback to 1")
    assert version.next_entry_id == third.next_entry_id
    with connect(f"file://{root}/s") as now, connect(f"file://{root}/s@1") as first:
        ours, theirs = (s.retrieve([picture("red", "circle")], k=18)[0] for s in (now, first))
        assert (ours.neighbours, ours.tags) == (theirs.neighbours, theirs.tags)
    report = ingest(str(tmp_path / "shapes"), root=root, store="s", encoder=mini)
    assert (report.version, report.added, report.entries) == (5, 1, 19)
    assert Store(root, "s").snapshot().find("new") >= third.next_entry_id
    assert verify(root, "s", full=True) == []
    with pytest.raises(NotFound, match="no version 99"):
        rollback(root, "s", 99)


def test_diff_says_what_lies_between(root: Path, tmp_path: Path, mini):
    (tmp_path / "shapes" / "new.png").write_bytes(picture("black", "circle"))
    (tmp_path / "shapes" / "new.txt").write_text("A black hole.")
    (tmp_path / "shapes" / "red-circle.txt").write_text("A tomato.")
    ingest(str(tmp_path / "shapes"), root=root, store="s", encoder=mini)
    delete(root, "s", Selection(keys=["blue-square"]))
    d = diff(root, "s", 1, 3)
    assert (d.added, d.removed, d.changed) == (["new"], ["blue-square"], ["red-circle"])
    changes = {text: (before, after) for text, _, before, after in d.tags}
    assert changes["tomato"] == (0, 1)
    assert changes["red circle"] == (1, 0)
    assert changes["circle"] == (6, 5)
    back = diff(root, "s", 3, 1)
    assert (back.added, back.removed, back.changed) == (d.removed, d.added, d.changed)
    assert {text: (a, b) for text, _, b, a in back.tags} == changes


def test_reembedding_makes_a_version_of_another_encoder(root: Path, tmp_path: Path, mini):
    from tagstore.encoding.encoder import load_encoder

    other = load_encoder("RN50/random", device="cpu")
    version = reembed(root, "s", other)
    assert (version.number, version.fingerprint.digest, version.entries) == (2, other.fingerprint.digest, 18)
    ids = Store(root, "s").snapshot().live()
    expected = other.encode_images(
        [decode(picture(*e.key.split("-"))) for e in Store(root, "s").snapshot().entries()]
    )
    np.testing.assert_allclose(Store(root, "s").snapshot().vectors(ids), expected, atol=2e-3)
    assert verify(root, "s", full=True) == []
    rollback(root, "s", 1)
    (tmp_path / "shapes" / "red-circle.txt").write_text("A tomato.")
    assert ingest(str(tmp_path / "shapes"), root=root, store="s", encoder=mini).version == 4
    assert verify(root, "s", full=True) == []
    (tmp_path / "shapes" / "red-circle.png").unlink()
    with pytest.raises(InvalidInput, match=r"1 of 18 entries.*red-circle"):
        reembed(root, "s", other)
    assert Store(root, "s").snapshot().version.number == 4


def test_retagging_changes_tags_and_no_vector(root: Path, tmp_path: Path, mini, monkeypatch):
    monkeypatch.setattr(type(mini), "encode_images", lambda *_: pytest.fail("an image was embedded"))
    before = Store(root, "s").snapshot()
    stoplist = tmp_path / "stop.txt"
    stoplist.write_text("table\n")
    synonyms = tmp_path / "synonyms.tsv"
    synonyms.write_text("circle\tdisc\n")
    version = retag(root, "s", vocabulary=load_rules(stoplist, synonyms))
    after = Store(root, "s").snapshot()
    texts = {t[0] for t in after.tags(after.vocabulary())}
    assert (version.number, version.operation, version.entries) == (2, "retag", 18)
    assert {"red disc", "white table", "Paris"} <= texts
    assert not {"red circle", "table"} & texts
    np.testing.assert_array_equal(before.vectors(before.live()), after.vectors(after.live()))
    assert verify(root, "s", full=True) == []
    with pytest.raises(InvalidInput, match="already"):
        retag(root, "s", vocabulary=load_rules(stoplist, synonyms))
    retag(root, "s", vocabulary=load_rules(minimum=4))
    counts = Store(root, "s").snapshot().counts()
    assert counts[counts > 0].min() >= 4


def test_a_store_is_renamed_dropped_and_brought_back(root: Path):
    rename(root, "s", "t")
    assert store_names(root) == ["t"]
    drop(root, "t")
    assert store_names(root) == []
    undrop(root, "t")
    assert store_names(root) == ["t"]
    (root / ".dropped" / f"old@{int(time.time()) - 8 * 86400}").mkdir()
    (root / ".dropped" / f"new@{int(time.time()) - 6 * 86400}").mkdir()
    drop(root, "t")
    assert {path.name.partition("@")[0] for path in (root / ".dropped").iterdir()} == {"t", "new"}
    undrop(root, "t")
    rename(root, "t", "s")
    assert len(keys(root)) == 18
    with pytest.raises(NotFound, match="no dropped store"):
        undrop(root, "s")
    with pytest.raises(AlreadyExists):
        rename(root, "s", "s")
    with pytest.raises(InvalidInput):
        rename(root, "s", "../s")


def test_a_store_that_is_open_under_its_old_name_is_written_under_the_new_one(root: Path):
    with connect(f"file://{root}/s") as source:
        source.info()
        rename(root, "s", "t")
        version, _ = delete(root, "t", Selection(keys=["red-circle"]))
    assert version.entries == 17


def test_a_store_dropped_and_made_again_is_not_taken_for_the_old_one(root: Path, tmp_path: Path, mini):
    with connect(f"file://{root}/s") as source:
        assert source.info().entries == 18
        drop(root, "s")
        with pytest.raises(NotFound):
            source.info()
        (tmp_path / "one").mkdir()
        (tmp_path / "one" / "a.png").write_bytes(picture("red", "circle"))
        (tmp_path / "one" / "a.txt").write_text("A dot.")
        ingest(str(tmp_path / "one"), root=root, store="s", encoder=mini)
        assert source.info().entries == 1
        assert source.retrieve([picture("red", "circle")])[0].neighbours[0].key == "a"


def test_a_sound_store_verifies(root: Path):
    delete(root, "s", Selection(keys=["red-circle"]))
    assert verify(root, "s") == verify(root, "s", full=True) == []
    with pytest.raises(NotFound):
        verify(root, "nope")


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "swap"])
def test_a_damaged_index_file_is_named_and_mended(root: Path, tmp_path: Path, mini, damage: str):
    (tmp_path / "shapes" / "new.png").write_bytes(picture("black", "circle"))
    (tmp_path / "shapes" / "new.txt").write_text("A black hole.")
    ingest(str(tmp_path / "shapes"), root=root, store="s", encoder=mini)
    with connect(f"file://{root}/s") as source:
        expected = source.retrieve([picture("black", "circle")])
    first, second = sorted(Store(root, "s").index_directory.iterdir())
    data = bytearray(first.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
        first.write_bytes(data)
    elif damage == "truncate":
        first.write_bytes(data[:-100])
    elif damage == "remove":
        first.unlink()
    else:
        other = second.read_bytes()
        second.write_bytes(data)
        first.write_bytes(other)
    assert first.name in {Path(p.file).name for p in verify(root, "s")}
    assert repair(root, "s")
    assert verify(root, "s", full=True) == []
    with connect(f"file://{root}/s") as source:
        assert source.retrieve([picture("black", "circle")]) == expected


def test_a_damaged_record_is_found_and_not_papered_over(root: Path):
    database = Store(root, "s").generation / "data.mdb"
    data = bytearray(database.read_bytes())
    offset = data.index(b"A red circle on a white table in Paris.")
    data[offset + 3] ^= 1
    from tagstore.storage.environments import environment, forget

    environment(database.parent).close()
    forget(database.parent)
    database.write_bytes(data)
    assert any("data.mdb" in p.file and "entries" in p.what for p in verify(root, "s"))
    with pytest.raises(Damaged, match="can't be repaired"):
        repair(root, "s")


def test_a_lost_current_is_said_and_not_taken_for_no_store(root: Path) -> None:
    current = root / "s" / "CURRENT"
    name = current.read_text().strip()
    current.unlink()
    for ask in (lambda: Store(root, "s"), lambda: delete(root, "s", Selection(keys=["x"]))):
        with pytest.raises(Damaged, match=f"CURRENT is missing, there is {name}: write into it"):
            ask()
    [problem] = verify(root, "s")
    assert "CURRENT is missing" in problem.what
    current.symlink_to("CURRENT")
    with pytest.raises(Damaged, match="CURRENT cannot be read: Too many levels of symbolic links"):
        Store(root, "s")


def test_strange_paths_among_the_dropped_do_no_harm(root: Path) -> None:
    for _ in range(2):  # within a second
        shutil.copytree(root / "s", root / "t")
        drop(root, "t")
    for stray in ("notes", "t@yesterday", "t@"):
        (root / ".dropped" / stray).mkdir()
    shutil.copytree(root / "s", root / "t")
    drop(root, "t")
    assert len(list((root / ".dropped").glob("t@[0-9]*"))) == 3
    undrop(root, "t")
    assert verify(root, "t") == []


@pytest.mark.parametrize("size", ["abc", "", "-1", "1000"])
def test_a_map_size_that_is_none_is_said(root: Path, size: str) -> None:
    command = [sys.executable, "-m", "tagstore.cli", "info", f"file://{root}/s"]
    child = subprocess.run(
        command, env={**os.environ, "TAGSTORE_MAP_SIZE": size}, capture_output=True, text=True
    )
    assert child.returncode == 1
    assert child.stderr.startswith(f"error: TAGSTORE_MAP_SIZE is '{size}': give it in bytes")


_READ_ONLY = """
mount --bind "$1" "$1" && mount -o remount,ro,bind "$1" || exit 77
"$2" -m tagstore.cli info "file://$1/s" && "$2" -m tagstore.cli verify "file://$1/s" || exit 1
"$2" -m tagstore.cli delete "file://$1/s" --key red-circle
"""


def test_a_read_only_volume_is_read_and_verified(root: Path) -> None:
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", _READ_ONLY, "sh"]
    try:
        child = subprocess.run([*command, root, sys.executable], capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("needs unshare")
    if child.returncode == 77 or "unshare:" in child.stderr:
        pytest.skip(f"needs a mount of its own: {child.stderr}")
    assert "s is sound" in child.stdout, child.stderr
    assert "read without LMDB's lock: nobody may write to it meanwhile" in child.stderr
    assert child.returncode == 1
    assert "Read-only file system" in child.stderr
