"""A takedown reaches all of a root: what it can it removes, with consent; what it cannot it names."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from tagstore.bundles import export, import_, importing
from tagstore.bundles.root_takedown import Copy, bundle_entries, find_copies, take_down
from tagstore.cli import cli
from tagstore.errors import InvalidInput, NotFound
from tagstore.indexing import faiss_index
from tagstore.storage.generations import writer_lock
from tagstore.storage.staging import Draft
from tagstore.storage.store import DROPPED, Store, dropped_names, store_names
from tagstore.storage.writer import Writer
from tagstore.types import Fingerprint
from tagstore.upkeep.edits import Selection, drop, undrop
from tagstore.upkeep.takedown import Takedown, prove_absent, purge, takedowns
from tagstore.upkeep.verify import verify

D = 8
FINGERPRINT = Fingerprint("toy", "00", {}, False, True, D)
KEY = "photo-to-take-down"
CAPTION = f"the caption of {KEY}"


def draft(key: str) -> Draft:
    digest = sha256(key.encode()).digest()
    return Draft(key, digest, int.from_bytes(digest[:8], "big"), (f"the caption of {key}",))


def put(root: Path, store: str, drafts: list[Draft]) -> None:
    seeds = [int.from_bytes(d.sha256[:4], "big") for d in drafts]
    vectors = np.stack([np.random.default_rng(seed).standard_normal(D) for seed in seeds])
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    with Writer(root, store, FINGERPRINT) as writer:
        writer.append(drafts, vectors)
        writer.commit(operation="ingest", indexer=faiss_index.extend)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three stores, two dropped ones and two bundles; the entry is in all but `other` and its bundle."""
    root = tmp_path / "root"
    (root / "backups").mkdir(parents=True)
    one = draft(KEY)
    put(root, "main", [draft(f"main-{i}") for i in range(5)] + [one, replace(one, key="same-picture-again")])
    flipped = one.perceptual_hash ^ 5
    put(root, "main", [replace(draft("looks-alike"), perceptual_hash=flipped)])
    export(root, "main", root / "backups" / "main.tagstore")
    import_(root, root / "backups" / "main.tagstore", store="copy")
    import_(root, root / "backups" / "main.tagstore", store="old")
    drop(root, "old")
    put(root, "other", [draft(f"other-{i}") for i in range(5)])
    put(root, "other", [replace(draft("other-5"), key=KEY)])  # the same key, another picture and caption
    export(root, "other", root / "other.tagstore")
    (root / "broken.zst").write_bytes(b"\x28\xb5\x2f\xfd and nothing")
    (root / "notes.txt").write_text("no bundle")
    return root


SELECTION = Selection(keys=[KEY])


def holders(root: Path) -> set[str]:
    """Where the picture still is."""
    digest = sha256(KEY.encode()).digest()
    places = {name: Store(root, name).all_entries() for name in store_names(root)}
    places |= {name: Store(root / DROPPED, name).all_entries() for name in dropped_names(root)}
    places |= {path.name: bundle_entries(path) for path in root.rglob("*.tagstore")}
    return {name for name, entries in places.items() if any(e.sha256 == digest for e in entries)}


def test_with_consent_every_copy_under_the_root_is_removed_and_the_record_says_so(root: Path):
    [dropped] = dropped_names(root)
    asked: list[Copy] = []
    takedown = take_down(
        root, "main", SELECTION, reason="asked for", consent=lambda copies: not asked.extend(copies)
    )
    assert holders(root) == set()
    assert [(copy.where, set(copy.keys)) for copy in asked] == [
        ("store 'copy'", {KEY, "same-picture-again"}),
        ("store 'main'", {"same-picture-again"}),
        (f"dropped store '{dropped}'", {KEY, "same-picture-again"}),
        ("bundle 'backups/main.tagstore'", {KEY, "same-picture-again"}),
    ]
    assert takedown.removed == [
        "store 'copy': 2 the same",
        "store 'main': 1 the same",
        f"dropped store '{dropped}': 2 the same",
        "bundle 'backups/main.tagstore': 2 the same",
    ]
    alike = "that look like them"
    assert takedown.left[:3] == [
        f"store 'copy': 1 {alike}",
        f"store 'main': 1 {alike}",
        f"dropped store '{dropped}': 1 {alike}",
    ]
    [broken] = takedown.left[3:]
    assert broken.startswith("bundle 'broken.zst': cannot be searched: ")
    assert takedowns(root, "main") == [takedown]
    assert [t.reason for t in takedowns(root, "copy")] == ["asked for"]
    # the record holds nothing of what was removed
    kept = json.dumps([takedown.removed, takedown.left])
    assert KEY not in kept
    assert CAPTION not in kept
    assert prove_absent(root, "main", keys=[KEY], captions=[CAPTION]) == []
    assert prove_absent(root, "copy", keys=[KEY], captions=[CAPTION]) == []
    for name in store_names(root):
        assert verify(root, name, full=True) == []
    assert Store(root, "other").snapshot().find(KEY) is not None
    # what comes back from the dropped ones comes back without it
    undrop(root, "old")
    assert Store(root, "old").snapshot().version.entries == 6
    assert verify(root, "old", full=True) == []


def test_without_consent_the_copies_stay_and_are_named(root: Path):
    [dropped] = dropped_names(root)
    takedown = take_down(root, "main", SELECTION, reason="asked for")
    assert holders(root) == {"main", "copy", dropped, "main.tagstore"}  # "main": under its other key
    assert takedown.removed == []
    for place in ("store 'main': 1", "store 'copy': 2", f"dropped store '{dropped}': 2"):
        assert f"{place} the same: not agreed to" in takedown.left
    assert Store(root, "main").snapshot().find(KEY) is None


def test_what_cannot_be_removed_is_named_and_the_rest_goes(root: Path, monkeypatch):
    with writer_lock(root / "copy"):
        unlink = Path.unlink

        def refuse(path: Path, **options: bool) -> None:
            if path.name == "main.tagstore":
                raise PermissionError(13, "Permission denied", str(path))
            unlink(path, **options)

        monkeypatch.setattr(Path, "unlink", refuse)
        takedown = take_down(root, "main", SELECTION, reason="asked for", consent=lambda copies: True)
    left = "\n".join(takedown.left)
    assert f"store 'copy': 2 the same: store 'copy' is being written by process {os.getpid()}" in left
    assert "bundle 'backups/main.tagstore': 2 the same: " in left
    assert "Permission denied" in left
    assert holders(root) == {"copy", "main.tagstore"}
    assert takedowns(root, "main") == [takedown]


def test_a_store_that_is_damaged_is_named(root: Path):
    store = Store(root, "other")
    data = store.generation / "data.mdb"
    os.truncate(shutil.copyfile(data, data.with_name("cut")), 5000)
    data.with_name("cut").replace(data)
    [fault] = [c.fault for c in find_copies(root, "main", SELECTION) if c.where == "store 'other'"]
    assert "5000" in fault


def test_a_takedown_that_is_cut_off_finds_everything_again(root: Path, monkeypatch):
    class Interrupted(BaseException):
        pass

    def die(place: Path, name: str, *args: object, **options: object) -> Takedown:
        if name == "main":
            raise Interrupted
        return purge(place, name, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr("tagstore.bundles.root_takedown.purge", die)
        with pytest.raises(Interrupted):
            take_down(root, "main", SELECTION, reason="asked for", consent=lambda copies: True)
    assert holders(root) == {"main"}
    take_down(root, "main", SELECTION, reason="asked for", consent=lambda copies: True)
    assert holders(root) == set()
    with pytest.raises(NotFound, match="nothing was taken down"):
        take_down(root, "main", SELECTION, reason="asked for")


def test_what_an_import_left_goes_and_an_import_under_way_is_named(root: Path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(importing, "_empty", lambda folder: None)
        patch.setattr(importing, "verify", lambda *_, **__: [1 / 0])
        with pytest.raises(ZeroDivisionError):
            import_(root, root / "backups" / "main.tagstore", store="half")
    assert (root / ".importing" / "half").exists()
    with writer_lock(root / ".importing"):
        takedown = take_down(root, "main", SELECTION, reason="asked for")
    assert takedown.left[0].startswith("an unfinished import: another import into")
    take_down(root, "main", Selection(keys=["same-picture-again"]), reason="asked for")
    assert os.listdir(root / ".importing") == ["writer.lock"]


def test_records_of_takedowns_that_did_not_look_further_are_still_read(root: Path):
    purge(root, "main", SELECTION, reason="before")
    with Writer(root, "main") as writer:
        [record] = writer.store.takedowns()
        old = {name: value for name, value in record.items() if name not in ("removed", "left")}
        writer.put_takedown(record["version"], old)
    assert [(t.reason, t.removed, t.left) for t in takedowns(root, "main")] == [("before", [], [])]


def test_the_command_asks_for_nothing_where_nobody_can_answer(root: Path):
    def run(*options: str) -> dict:
        arguments = ["delete", f"file://{root}/main", "--purge", "--reason", "r", "--json", *options]
        result = CliRunner().invoke(cli, arguments, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        assert "store 'copy' holds" in result.stderr
        return json.loads(result.stdout)

    assert "store 'copy': 2 the same: not agreed to" in run("--key", KEY)["left"]
    assert "copy" in holders(root)
    assert "store 'copy': 2 the same" in run("--key", "same-picture-again", "--everywhere")["removed"]
    assert holders(root) == set()
    result = CliRunner().invoke(cli, ["delete", f"file://{root}/main", "--key", "main-1", "--everywhere"])
    assert isinstance(result.exception, InvalidInput)
    assert Store(root, "main").snapshot().find("main-1") is not None
