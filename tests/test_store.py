"""The store's basic promises: versions are immutable, a commit is all or nothing, one writer at a time."""

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

import tagstore
from tagstore.errors import Busy, Damaged, FingerprintMismatch, InvalidInput, NotFound, WriteFailed
from tagstore.mining import MergedTag
from tagstore.storage.codec import seal
from tagstore.storage.rows import BLOCK_ROWS
from tagstore.storage.staging import Draft
from tagstore.storage.store import Store, check_name, store_names
from tagstore.storage.tables import FORMAT
from tagstore.storage.writer import Writer
from tagstore.types import Fingerprint

D = 8
DOCS = Path(__file__).parent.parent / "docs" / "architecture.md"
FINGERPRINT = Fingerprint("toy", "00", {"size": [8, 8]}, False, True, D)


def unit(rng: np.random.Generator, n: int) -> np.ndarray:
    vectors = rng.standard_normal((n, D), dtype=np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def draft(key: str, *tags: str, caption: str = "a caption") -> Draft:
    merged = tuple(MergedTag(t, "object", t, 0.9, 1, ((0, 0, len(t)),)) for t in tags)
    return Draft(key, key.encode().ljust(32, b"\0")[:32], 7, (caption,), merged, {"n": 1}, f"file of {key}")


def no_index(*_: object) -> dict[str, object]:
    return {"kind": "none", "files": []}


def put(root: Path, drafts: list[Draft], vectors: np.ndarray, indexer=no_index):
    with Writer(root, "toy", FINGERPRINT) as writer:
        writer.append(drafts, vectors)
        while texts := writer.new_tags(limit=3):
            writer.embed_tags(np.eye(D, dtype=np.float32)[: len(texts)])
        return writer.commit(operation="ingest", miner={"name": "none"}, indexer=indexer)


def output_of(code: str) -> str:
    """Return what a Python process prints that runs `code`."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_what_is_committed_is_read_back(tmp_path: Path, rng):
    vectors = unit(rng, 3)
    version = put(tmp_path, [draft("a", "dog", "sky"), draft("b", "dog"), draft("c")], vectors)
    snapshot = Store(tmp_path, "toy").snapshot()
    assert (version.number, version.entries, version.tags, version.unique_tags) == (1, 3, 3, 2)
    assert [e.key for e in snapshot.entries()] == ["a", "b", "c"]
    assert snapshot.live().tolist() == [0, 1, 2]
    assert snapshot.counts().tolist() == [2, 1]
    assert snapshot.tags([0, 1]) == [("dog", "object", "dog"), ("sky", "object", "sky")]
    np.testing.assert_array_equal(snapshot.vectors(np.array([2, 0])), vectors[[2, 0]].astype(np.float16))
    entry = snapshot.entry(0)
    assert (entry.captions, entry.metadata) == (("a caption",), {"n": 1})
    assert (entry.origin, entry.tags[1].mentions) == ("file of a", ((0, 0, 3),))


def test_a_key_that_comes_again_replaces_its_entry_and_the_old_version_stays(tmp_path: Path, rng):
    put(tmp_path, [draft("a", "dog"), draft("b", "sky")], unit(rng, 2))
    put(tmp_path, [draft("a", "cat", caption="another")], unit(rng, 1))
    store = Store(tmp_path, "toy")
    old, new = store.snapshot(1), store.snapshot()
    assert [e.captions[0] for e in old.entries()] == ["a caption", "a caption"]
    assert {e.key: e.captions[0] for e in new.entries()} == {"a": "another", "b": "a caption"}
    assert (old.counts().tolist(), new.counts().tolist()) == ([1, 1], [0, 1, 1])
    assert (old.version.unique_tags, new.version.unique_tags, new.version.parent) == (2, 2, 1)
    assert new.live().tolist() == [1, 2]
    with pytest.raises(NotFound, match="no entry 2"):
        old.entry(2)


def test_vectors_cross_blocks(tmp_path: Path, rng):
    vectors = unit(rng, 3 * BLOCK_ROWS + 5)
    with Writer(tmp_path, "toy", FINGERPRINT) as writer:
        for start in range(0, len(vectors), 100):
            part = vectors[start : start + 100]
            writer.append([draft(f"{start + i}") for i in range(len(part))], part)
        writer.commit(operation="ingest", miner={}, indexer=lambda s, p, d: {})
    snapshot = Store(tmp_path, "toy").snapshot()
    ids = rng.permutation(len(vectors))
    np.testing.assert_array_equal(snapshot.vectors(ids), vectors[ids].astype(np.float16))
    [(piece, block)] = snapshot.vector_blocks(snapshot.live())
    np.testing.assert_array_equal(piece, np.arange(len(vectors)))
    np.testing.assert_array_equal(block, vectors.astype(np.float16))


def test_versions_share_the_pages_that_did_not_change(tmp_path: Path, rng):
    put(tmp_path, [draft("a", "dog")], unit(rng, 1))
    put(tmp_path, [draft("b", "dog")], unit(rng, 1))
    with Writer(tmp_path, "toy", FINGERPRINT) as writer:
        again = writer.commit(operation="ingest", miner={}, indexer=lambda s, p, d: {})
    assert again.pages == Store(tmp_path, "toy").snapshot(2).version.pages


def test_what_was_not_committed_is_gone_for_the_next_writer(tmp_path: Path, rng):
    put(tmp_path, [draft("a", "dog")], unit(rng, 1))
    with Writer(tmp_path, "toy", FINGERPRINT) as writer:
        writer.append([draft("a", "cat"), draft("lost", "whale")], unit(rng, 2))
    orphan = Store(tmp_path, "toy").index_directory / "00000002.tmp"
    orphan.parent.mkdir()
    orphan.write_bytes(b"half an index")
    assert Store(tmp_path, "toy").snapshot().version.entries == 1
    put(tmp_path, [draft("b", "owl")], unit(rng, 1))
    snapshot = Store(tmp_path, "toy").snapshot()
    assert {e.key: e.entry_id for e in snapshot.entries()} == {"a": 0, "b": 1}
    assert [t[0] for t in snapshot.tags(range(2))] == ["dog", "owl"]
    assert not orphan.exists()
    with Writer(tmp_path, "toy", FINGERPRINT) as writer:
        admitted, _, unchanged = writer.admit([draft("a"), draft("lost")], same_miner=True)
    assert ([d.key for d in admitted], unchanged) == (["lost"], 1)


def test_a_duplicate_key_in_one_ingest_is_rejected_an_unchanged_one_counted(tmp_path: Path, rng):
    put(tmp_path, [draft("a")], unit(rng, 1))
    with Writer(tmp_path, "toy", FINGERPRINT) as writer:
        admitted, rejected, unchanged = writer.admit([draft("a"), draft("b"), draft("b")], same_miner=True)
        assert ([d.key for d in admitted], [r.key for r in rejected], unchanged) == (["b"], ["b"], 1)
        writer.append(admitted, unit(rng, 1))
        _, rejected, _ = writer.admit([draft("b")], same_miner=True)
        assert "duplicate key" in rejected[0].reason
        _, rejected, unchanged = writer.admit([draft("a", caption="another")], same_miner=True)
        # the first of this key was unchanged, this is its duplicate
        assert ([r.key for r in rejected], unchanged) == (["a"], 0)
    with Writer(tmp_path, "toy", FINGERPRINT) as writer:
        admitted, _, _ = writer.admit([draft("a")], same_miner=False)
        assert len(admitted) == 1


def test_a_long_key_and_one_that_is_its_prefix_are_two(tmp_path: Path, rng):
    keys = ["k" * 2000, "k" * 1999]
    put(tmp_path, [draft(k) for k in keys], unit(rng, 2))
    assert [e.key for e in Store(tmp_path, "toy").snapshot().entries()] == keys


def test_a_second_writer_is_refused_and_told_who_writes(tmp_path: Path):
    with Writer(tmp_path, "toy", FINGERPRINT):
        code = textwrap.dedent(f"""
            from tagstore.errors import Busy
            from tagstore.types import Fingerprint
            from tagstore.storage.writer import Writer
            try:
                fingerprint = Fingerprint("toy", "00", {{"size": [8, 8]}}, False, True, {D})
                Writer({str(tmp_path)!r}, "toy", fingerprint).__enter__()
            except Busy as error:
                print(error)
        """)
        out = output_of(code)
    assert f"being written by process {os.getpid()}" in out


def test_another_writer_of_this_process_is_refused_too(tmp_path: Path):
    with Writer(tmp_path, "toy", FINGERPRINT), pytest.raises(Busy), Writer(tmp_path, "toy", FINGERPRINT):
        pass


def test_vectors_of_another_encoder_are_refused_with_both_fingerprints(tmp_path: Path, rng):
    put(tmp_path, [draft("a")], unit(rng, 1))
    other = Fingerprint("other", "01", {"size": [8, 8]}, False, True, D)
    with pytest.raises(FingerprintMismatch) as caught, Writer(tmp_path, "toy", other):
        pass
    assert FINGERPRINT.digest in str(caught.value)
    assert other.digest in str(caught.value)
    put(tmp_path, [draft("b")], unit(rng, 1))


def test_a_writer_killed_at_any_instant_leaves_the_last_version(tmp_path: Path, rng):
    put(tmp_path, [draft("a", "dog")], unit(rng, 1))
    code = textwrap.dedent(f"""
        import numpy as np
        from tagstore.mining import MergedTag
        from tagstore.types import Fingerprint
        from tagstore.storage.staging import Draft
        from tagstore.storage.writer import Writer
        fingerprint = Fingerprint("toy", "00", {{"size": [8, 8]}}, False, True, {D})
        with Writer({str(tmp_path)!r}, "toy", fingerprint) as writer:
            n = 0
            while True:
                tags = (MergedTag(f"t{{n}}", "object", f"t{{n}}", 1.0, 1, ()),)
                draft = Draft(f"k{{n}}", bytes(32), 0, ("c",), tags)
                writer.append([draft], np.eye({D}, dtype=np.float32)[:1])
                n += 1
                print(n, flush=True)
    """)
    for kill_after in (1, 40):
        child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        while int(child.stdout.readline()) < kill_after:
            pass
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        assert [e.key for e in Store(tmp_path, "toy").snapshot().entries()] == ["a"]
    version = put(tmp_path, [draft("b", "owl")], unit(rng, 1))
    assert (version.number, version.entries, version.next_entry_id, version.next_tag_id) == (2, 2, 2, 2)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../x", "-x", "a b", "é", "x" * 65, "a\0"])
def test_names_that_could_leave_the_root_are_refused(name: str):
    with pytest.raises(InvalidInput, match="no name for a store"):
        check_name(name)


def test_what_is_not_there_is_said(tmp_path: Path, rng):
    put(tmp_path, [draft("a")], unit(rng, 1))
    with pytest.raises(NotFound, match="no store 'nope'; those there are: toy"):
        Store(tmp_path, "nope")
    with pytest.raises(NotFound, match="no version 9; its current one is 1"):
        Store(tmp_path, "toy").snapshot(9)
    with pytest.raises(NotFound, match="no tag 5"):
        Store(tmp_path, "toy").snapshot().tags([5])
    assert store_names(tmp_path) == ["toy"]


def test_a_store_whose_first_ingest_never_finished_says_so(tmp_path: Path):
    with Writer(tmp_path, "toy", FINGERPRINT):
        pass
    with pytest.raises(NotFound, match="first ingest did not finish"):
        Store(tmp_path, "toy").snapshot()


def test_a_file_that_is_no_database_is_named(tmp_path: Path):
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "CURRENT").write_text("db-000001\n")
    (tmp_path / "toy" / "db-000001").mkdir()
    (tmp_path / "toy" / "db-000001" / "data.mdb").write_bytes(b"not LMDB" * 2000)
    with pytest.raises(Damaged, match=r"data\.mdb"):
        Store(tmp_path, "toy")


def test_a_store_in_another_releases_format_is_refused_by_readers_and_writers(tmp_path: Path, rng):
    put(tmp_path, [draft("a")], unit(rng, 1))
    store = Store(tmp_path, "toy")
    with store.env.begin(write=True) as txn:
        txn.put(b"state", seal(b"state", store.state() | {"format": FORMAT - 1}), db=store.db["meta"])
    for use in (lambda: Store(tmp_path, "toy"), lambda: put(tmp_path, [draft("b")], unit(rng, 1))):
        message = f"format {FORMAT - 1}, this release reads {FORMAT}: use the release that wrote it"
        with pytest.raises(Damaged, match=message):
            use()


def test_the_record_of_a_version_is_json_with_a_checksum(tmp_path: Path, rng):
    version = put(tmp_path, [draft("a")], unit(rng, 1))
    record = json.loads(version.to_json())
    assert json.loads(record["version"])["fingerprint"]["model"] == "toy"
    assert type(version).from_json(version.to_json()) == version
    with pytest.raises(Damaged, match="checksum"):
        type(version).from_json(version.to_json().replace("toy", "tog"))


def test_a_disk_that_fails_is_said_and_the_store_stays(tmp_path: Path, rng):
    put(tmp_path, [draft("a")], unit(rng, 1))

    def full(*_: object) -> dict[str, object]:
        raise OSError(28, "No space left on device")

    with pytest.raises(WriteFailed, match=r"No space left.*stays"):
        put(tmp_path, [draft("b")], unit(rng, 1), indexer=full)
    assert put(tmp_path, [draft("b")], unit(rng, 1)).number == 2


def test_the_reader_in_the_documentation_reads_a_store(tmp_path: Path, rng):
    put(tmp_path, [draft(f"{i}", f"tag {i % 9}", "all") for i in range(600)], unit(rng, 600))
    put(tmp_path, [draft("7", "new", caption="Ça va 👍 " * 30), draft("x")], unit(rng, 2))
    [code] = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    code = f"path = {str(tmp_path / 'toy')!r}\n{code}\n"
    code += "names = 'key', 'tags', 'perceptual_hash', 'captions'\n"
    code += "rows = [[i, e['sha256'].hex(), *(e[name] for name in names)] for i, e in entries.items()]\n"
    code += "print(json.dumps(rows))\n"
    code += "print(json.dumps(vectors.tolist()))"
    out = output_of(code).splitlines()
    snapshot = Store(tmp_path, "toy").snapshot()
    entries, vectors = map(json.loads, out)
    assert entries == [
        [e.entry_id, e.sha256.hex(), e.key, [t.tag_id for t in e.tags], e.perceptual_hash, list(e.captions)]
        for e in snapshot.entries()
    ]
    np.testing.assert_array_equal(np.array(vectors, np.float16), snapshot.vectors(snapshot.live()))


def test_a_forked_child_opens_the_store_for_itself(tmp_path: Path, rng):
    put(tmp_path, [draft("a")], unit(rng, 1))
    snapshot = Store(tmp_path, "toy").snapshot()
    assert snapshot.entry(0).key == "a"
    child = os.fork()
    if child == 0:
        try:
            key = Store(tmp_path, "toy").snapshot().entry(0).key
            os._exit(0 if key == "a" else 1)
        except BaseException:  # noqa: BLE001  the child must not run the rest of the test session
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_no_other_room_knows_lmdb_or_the_tables():
    package = Path(tagstore.__file__).parent
    secrets = re.compile(r"\b(import|from) lmdb\b|\bU64\b|\.db\[|\.env\b|\.begin\(|storage\.(codec|tables)\b")
    offenders = [
        f"{path.relative_to(package)}:{number}: {line.strip()}"
        for path in sorted(package.rglob("*.py"))
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if secrets.search(line)
        and path.parent.name != "storage"
        and path.parent.name != "client"  # its cache of answers is a database of its own
    ]
    assert not offenders
