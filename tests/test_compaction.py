"""Compaction frees space without changing an answer; a takedown leaves no byte behind."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from tagstore.errors import Damaged, InvalidInput, NotFound
from tagstore.indexing import faiss_index
from tagstore.mining import MergedTag
from tagstore.retrieval.engine import Engine
from tagstore.storage.staging import Draft
from tagstore.storage.store import Store
from tagstore.storage.tables import U64
from tagstore.storage.writer import Writer
from tagstore.types import Fingerprint, Rejected, Search
from tagstore.upkeep.compact import compact
from tagstore.upkeep.edits import Selection, delete, rollback
from tagstore.upkeep.takedown import prove_absent, purge, takedowns
from tagstore.upkeep.verify import verify

D = 16
FINGERPRINT = Fingerprint("toy", "00", {}, False, True, D)


def draft(name: str) -> Draft:
    digest, captions = hashlib.sha256(name.encode()).digest(), (f"the caption of {name}",)
    tags = tuple(MergedTag(text, "object", text, 1.0, 1, ()) for text in (f"tag {name}", "all"))
    return Draft(name, digest, 7, captions, tags, {"colour": name[0]})


def put(root: Path, names: list[str], seed: int = 0) -> None:
    rng = np.random.default_rng(seed)
    vectors = rng.standard_normal((len(names), D), dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    with Writer(root, "toy", FINGERPRINT) as writer:
        writer.append([draft(name) for name in names], vectors, rejected=[Rejected("refused-key", "bad")])
        while texts := writer.new_tags(limit=100):
            rng = np.random.default_rng(len(texts))
            embeddings = np.abs(rng.standard_normal((len(texts), D), dtype=np.float32))
            writer.embed_tags(embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True))
        writer.commit(operation="ingest", indexer=faiss_index.extend)


def names(prefix: str, n: int) -> list[str]:
    return [f"{prefix}-long-key-{i:04d}" for i in range(n)]


def answers(root: Path, version: int | None = None):
    engine = Engine(Store(root, "toy").snapshot(version))
    retrievals = engine.retrieve(np.random.default_rng(9).standard_normal((20, D)), Search(k=7))
    return [(a.neighbours, a.tags) for a in retrievals]


def size(root: Path) -> int:
    return sum(p.stat().st_size for p in (root / "toy").rglob("*") if p.is_file())


def test_a_small_store_does_not_grow_by_compaction(tmp_path: Path):
    put(tmp_path, names("a", 2000))
    expected, before = answers(tmp_path), size(tmp_path)
    for keep in (2, 2, None, 1):
        compact(tmp_path, "toy", keep=keep)
        assert size(tmp_path) <= before + 8192  # a second version's record and pages; not a second index
        assert answers(tmp_path) == expected
        assert verify(tmp_path, "toy", full=True) == []
    delete(tmp_path, "toy", Selection(keys=names("a", 100)))
    assert compact(tmp_path, "toy", keep=2).index["files"][0]["rows"] == 1900


def test_an_index_file_that_was_changed_is_not_taken_into_the_new_version(tmp_path: Path):
    put(tmp_path, names("a", 300))
    [about] = Store(tmp_path, "toy").snapshot().version.index["files"]
    path = Store(tmp_path, "toy").index_directory / about["file"]
    data = bytearray(path.read_bytes())
    data[-50] ^= 1
    path.write_bytes(data)
    compact(tmp_path, "toy", keep=1)
    assert verify(tmp_path, "toy", full=True) == []


def test_compaction_keeps_every_answer_and_reclaims_space(tmp_path: Path):
    put(tmp_path, names("a", 800))
    put(tmp_path, names("b", 300), seed=1)
    delete(tmp_path, "toy", Selection(keys=names("a", 700)))
    expected = {v: answers(tmp_path, v) for v in (1, 2, 3)}
    version = compact(tmp_path, "toy")
    assert (version.number, version.operation, version.entries) == (4, "compact", 400)
    assert len(version.index["files"]) == 1
    assert {v: answers(tmp_path, v) for v in (1, 2, 3)} == expected
    assert answers(tmp_path) == expected[3]
    assert verify(tmp_path, "toy", full=True) == []
    before = size(tmp_path)
    version = compact(tmp_path, "toy", keep=1)
    assert answers(tmp_path) == expected[3]
    assert size(tmp_path) < before * 0.7
    assert [v.number for v in Store(tmp_path, "toy").versions()] == [5]
    assert verify(tmp_path, "toy", full=True) == []
    put(tmp_path, names("a", 3), seed=2)
    snapshot = Store(tmp_path, "toy").snapshot()
    assert (snapshot.version.number, snapshot.version.entries) == (6, 403)
    assert snapshot.find("a-long-key-0000") == 1100  # an id is never used again
    assert verify(tmp_path, "toy", full=True) == []
    with pytest.raises(InvalidInput, match="keep is 0"):
        compact(tmp_path, "toy", keep=0)


def test_a_reader_of_the_old_database_keeps_it(tmp_path: Path):
    put(tmp_path, names("a", 50))
    engine = Engine(Store(tmp_path, "toy").snapshot())
    before = engine.retrieve(np.ones((1, D)))
    compact(tmp_path, "toy", keep=1)
    assert engine.retrieve(np.ones((1, D))) == before
    assert not engine.snapshot.store.is_current()
    assert len(list((tmp_path / "toy").glob("db-*"))) == 1


def test_versions_after_a_rollback_survive_compaction(tmp_path: Path):
    put(tmp_path, names("a", 40))
    delete(tmp_path, "toy", Selection(keys=names("a", 39)))
    rollback(tmp_path, "toy", 1)
    put(tmp_path, names("b", 3))
    expected = {v: answers(tmp_path, v) for v in (1, 2, 3, 4)}
    compact(tmp_path, "toy")
    assert {v: answers(tmp_path, v) for v in (1, 2, 3, 4)} == expected
    assert answers(tmp_path) == expected[4]
    assert verify(tmp_path, "toy", full=True) == []


def test_a_takedown_removes_bytes_and_history_and_is_recorded_without_them(tmp_path: Path):
    put(tmp_path, names("a", 60))
    put(tmp_path, ["b-the-one-to-take-down", *names("b", 30)], seed=1)
    put(tmp_path, names("c", 30), seed=2)
    keys, captions = ["b-the-one-to-take-down"], ["the caption of b-the-one-to-take-down"]
    images = [hashlib.sha256(keys[0].encode()).hexdigest()]
    snapshot = Store(tmp_path, "toy").snapshot()
    vector = snapshot.vectors(np.array([snapshot.find(keys[0])]))[0].astype(np.float16).tobytes()
    delete(tmp_path, "toy", Selection(keys=keys))
    everything = {"keys": keys, "captions": captions, "images": images, "vectors": [vector]}
    assert prove_absent(tmp_path, "toy", **everything), "a deleted entry is still on disk"
    takedown = purge(tmp_path, "toy", Selection(keys=keys), reason="asked for", who="me")
    assert prove_absent(tmp_path, "toy", **everything) == []
    assert (takedown.entries, takedown.versions_dropped) == (1, [2, 3])
    assert (takedown.version, takedown.who) == (5, "me")
    assert takedown.keys_sha256 == images
    assert "1 image hashes and 1 vectors" in takedown.proof, "deleted before it was taken down"
    assert takedowns(tmp_path, "toy") == [takedown]
    assert [v.number for v in Store(tmp_path, "toy").versions()] == [1, 4, 5]
    assert Store(tmp_path, "toy").snapshot().version.entries == 120
    assert verify(tmp_path, "toy", full=True) == []
    assert "tag b-the-one-to-take-down" not in {
        t.text for t in Engine(Store(tmp_path, "toy").snapshot()).tags(limit=1000)
    }
    with pytest.raises(NotFound, match="nothing was taken down"):
        purge(tmp_path, "toy", Selection(keys=keys), reason="again")
    compact(tmp_path, "toy", keep=1)
    assert takedowns(tmp_path, "toy") == [takedown]


def test_what_another_entry_shares_stays(tmp_path: Path):
    put(tmp_path, names("a", 5))
    before = [e for e in Store(tmp_path, "toy").snapshot().entries() if e.key != "a-long-key-0002"]
    takedown = purge(
        tmp_path, "toy", Selection(sha256=[hashlib.sha256(b"a-long-key-0002").hexdigest()]), reason="r"
    )
    assert takedown.entries == 1
    assert list(Store(tmp_path, "toy").snapshot().entries()) == before


def test_an_entry_whose_key_and_caption_are_part_of_anothers_is_taken_down(tmp_path: Path):
    put(tmp_path, ["photo-1234", "photo-12345", "other-key-1"])
    assert purge(tmp_path, "toy", Selection(keys=["photo-1234"]), reason="asked for").entries == 1
    assert prove_absent(tmp_path, "toy", keys=["photo-1234"], captions=["the caption of photo-1234"]) == []
    assert prove_absent(tmp_path, "toy", keys=["photo-12345"])


def test_a_takedown_that_is_cut_off_after_its_commit_is_on_record(tmp_path: Path, monkeypatch):
    put(tmp_path, ["photo-1234", "other-key-1"])

    class Interrupted(BaseException):
        pass

    def die(*_: object, **__: object) -> list[str]:
        raise Interrupted

    monkeypatch.setattr("tagstore.upkeep.takedown.prove_absent", die)
    with pytest.raises(Interrupted):
        purge(tmp_path, "toy", Selection(keys=["photo-1234"]), reason="asked for")
    [takedown] = takedowns(tmp_path, "toy")
    assert (takedown.version, takedown.entries, takedown.reason) == (2, 1, "asked for")
    assert "cut off" in takedown.proof
    assert [e.key for e in Store(tmp_path, "toy").snapshot().entries()] == ["other-key-1"]


def test_damage_is_not_laundered_by_a_copy(tmp_path: Path):
    put(tmp_path, names("a", 5))
    store = Store(tmp_path, "toy")
    with store.env.begin(write=True) as txn:
        key = U64.pack(2)
        record = txn.get(key, db=store.db["entries"])
        txn.put(key, record.replace(b"the caption of", b"the capture of"), db=store.db["entries"])
    with pytest.raises(Damaged, match="entries 0 to 4"):
        compact(tmp_path, "toy")
    assert Store(tmp_path, "toy").snapshot().version.number == 1
