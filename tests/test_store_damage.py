"""A flipped bit anywhere: `verify` names the file, or the bit was in unused space and no record changed.

Each flip is read in a forked process, since a damaged database file can crash the process that maps it.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections import Counter
from pathlib import Path

import pytest
from lmdb.verify import verify as verify_pages

import crash
from tagstore.errors import Damaged
from tagstore.retrieval.catalog import Catalog
from tagstore.storage.environments import environment, forget
from tagstore.storage.file_length import complete
from tagstore.storage.store import Store
from tagstore.storage.tables import TABLES
from tagstore.storage.writer import Writer
from tagstore.types import Rejected
from tagstore.upkeep.edits import Selection
from tagstore.upkeep.takedown import purge
from tagstore.upkeep.verify import _problems, verify


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    """A root with a store that has every kind of record, and that no process has open."""
    root = tmp_path_factory.mktemp("sound")
    rng, model, serial = random.Random(5), crash.Model(), iter(range(1, 1 << 40))
    purged = False
    while model.current < 12:
        operation = crash.draw(rng, model, serial, tmp_path_factory.getbasetemp())
        crash.OPERATIONS[operation["operation"]](root, operation)
        model = model.after(operation)
        if model.current >= 8 and not purged:
            purge(root, crash.NAME, Selection(keys=[next(iter(model.content[1]))]), reason="asked for")
            model, purged = crash.look(root, close=False)[0], True
    with Writer(root, crash.NAME) as writer:
        writer.append([], None, rejected=[Rejected("bad-key", "no image", "row 3")])
        writer.commit(operation="ingest", indexer=crash.faiss_index.extend)
    store = Store(root, crash.NAME)
    store.env.close()
    forget(store.generation)
    return root


def _records(root: Path) -> str:
    """A digest over every record of every table."""
    store, digest = Store(root, crash.NAME), hashlib.sha256()
    with store.env.begin() as txn:
        for name in TABLES:
            digest.update(name.encode())
            with txn.cursor(store.db[name]) as cursor:
                for key, value in cursor:
                    digest.update(b"%d %d " % (len(key), len(value)) + key + value)
    return digest.hexdigest()


def _look(root: Path) -> tuple[list[str], str]:
    """What `verify` finds, and the digest of the records, read in another process."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.close(read)
            problems = [f"{p.file}: {p.what}" for p in _problems(str(root), crash.NAME, True)]
            answer = problems, "" if problems else _records(root)
        except BaseException as error:  # noqa: BLE001  as `verify` does: whatever damage does to the reader is the finding
            answer = [f"{type(error).__name__}: {error}"], ""
        os.write(write, json.dumps(answer).encode()[:60_000])
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        data = pipe.read()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return tuple(json.loads(data)) if code == 0 else ([f"the reader died of {-code}"], "")


def _flipped(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def _copy(sound: Path, to: Path) -> Path:
    shutil.copytree(sound, to)
    return to


def test_a_sound_store_is_sound_and_its_records_digest_is_stable(sound: Path, tmp_path: Path):
    first, second = _look(_copy(sound, tmp_path / "a")), _look(_copy(sound, tmp_path / "b"))
    assert first == second
    assert first[0] == []
    assert len(first[1]) == 64


@pytest.mark.parametrize("flips", [40, pytest.param(1000, marks=pytest.mark.matrix)])
def test_a_bit_flipped_in_the_database_is_found_or_stood_where_nothing_is(
    sound: Path, tmp_path: Path, flips: int
):
    root = _copy(sound, tmp_path / "root")
    [database] = root.glob("*/db-*/data.mdb")
    data, expected = database.read_bytes(), _look(root)[1]
    rng, outcome = random.Random(9), Counter()
    for _ in range(flips):
        bit = rng.randrange(len(data) * 8)
        _flipped(database, bit)
        problems, records = _look(root)
        # a free page, or the gap between keys and values of a page: nothing to find
        outcome[
            "found"
            if problems
            else "nothing there"
            if records == expected
            else f"missed: byte {bit // 8} bit {bit % 8}"
        ] += 1
        database.write_bytes(data)
    assert set(outcome) == {"found", "nothing there"}, outcome
    assert outcome["found"] > flips // 5


def test_a_bit_flipped_in_a_record_is_found_in_every_table(sound: Path, tmp_path: Path):
    """Flip bits in the values of every table, wherever they are in the file."""
    root = _copy(sound, tmp_path / "root")
    [database] = root.glob("*/db-*/data.mdb")
    data, rng = database.read_bytes(), random.Random(4)
    for table, values in _values(root).items():
        value = rng.choice(values)
        places = [at for at in range(len(data)) if data.startswith(value, at)]
        assert places
        bit = rng.randrange(len(value) * 8)
        for at in places:  # one is the record, the others are copies in pages that were freed
            _flipped(database, at * 8 + bit)
        assert _look(root)[0], f"{table}: bit {bit} of {value!r}"
        database.write_bytes(data)


def _values(root: Path) -> dict[str, list[bytes]]:
    store = Store(root, crash.NAME)
    with store.env.begin() as txn:
        values = {name: [value for _, value in txn.cursor(store.db[name])] for name in TABLES}
    store.env.close()
    forget(store.generation)
    assert all(values.values())
    return values


@pytest.mark.parametrize("kind", ["*/db-*/index/*.faiss", "*/CURRENT"])
def test_a_bit_flipped_in_any_other_file_is_found_and_the_file_named(sound: Path, tmp_path: Path, kind: str):
    root, rng = _copy(sound, tmp_path / "root"), random.Random(1)
    for path in sorted(root.glob(kind)):
        data = path.read_bytes()
        for _ in range(12):
            _flipped(path, rng.randrange(len(data) * 8))
            problems = _look(root)[0]
            # the end of the line of CURRENT means nothing: any white space will do
            assert (
                any(path.name in problem for problem in problems) or path.read_bytes().strip() == data.strip()
            )
            path.write_bytes(data)


def test_verify_reads_in_a_process_of_its_own_and_says_the_same(sound: Path, tmp_path: Path):
    root = _copy(sound, tmp_path / "root")
    assert verify(root, crash.NAME, full=True) == []
    [current] = root.glob("*/CURRENT")
    line = current.read_text()
    for damaged in ("", "db-000099-00000000\n", "\0" * len(line), line[:-3]):
        current.write_text(damaged)
        assert any("CURRENT" in p.what or "CURRENT" in p.file for p in verify(root, crash.NAME))
    with pytest.raises(Damaged, match="CURRENT"), Writer(root, crash.NAME, crash.SPACES["first"]):
        pass
    current.unlink()
    with pytest.raises(Damaged, match="CURRENT"), Writer(root, crash.NAME, crash.SPACES["first"]):
        pass
    current.write_text(line)
    assert verify(root, crash.NAME, full=True) == []


@pytest.mark.parametrize("share", [0.5, 0.02])
@pytest.mark.parametrize("name", ["index", "database"])
def test_a_file_that_was_cut_off_is_damage(tmp_path: Path, sound: Path, name: str, share: float) -> None:
    root = Path(shutil.copytree(sound, tmp_path / "root"))
    store = Store(root, crash.NAME)
    index = store.index_directory / store.snapshot().version.index["files"][0]["file"]
    path = index if name == "index" else store.generation / "data.mdb"
    store.env.close()
    forget(store.generation)
    os.truncate(path, int(share * path.stat().st_size))
    with pytest.raises(Damaged, match=r"cut off"):
        Catalog(root, device="cpu").engine(crash.NAME)
    assert [problem for problem in verify(root, crash.NAME) if str(path) in problem.file]


def test_a_database_cut_off_within_its_last_page_in_use_is_damage(tmp_path: Path, sound: Path) -> None:
    root = Path(shutil.copytree(sound, tmp_path / "root"))
    [path] = (root / crash.NAME).glob("db-*/data.mdb")
    before, page = _look(root), 4096
    cuts = range(path.stat().st_size // page * page, 0, -page)
    # LMDB's own check, on a file that ends with a page
    last = next(end for end in cuts if os.truncate(path, end) or verify_pages(str(path)))
    for end, damaged in ((last + page, False), (last + page - 16, True)):
        shutil.copytree(sound, root, dirs_exist_ok=True)
        os.truncate(path, end)
        if damaged:  # the rest of the page would read as zeros
            assert "cut off" in _look(root)[0][0]
        else:
            assert _look(root) == before


def test_a_database_without_its_last_free_pages_is_sound(tmp_path: Path) -> None:
    directory, rng = tmp_path / "db", random.Random(1)
    env = environment(directory, create=True)
    table = env.open_db(b"table")
    for _ in range(20):  # LMDB does not write a page that was freed in the transaction that made it
        with env.begin(table, write=True) as txn:
            for _ in range(rng.randrange(50)):
                txn.put(rng.randbytes(8), rng.randbytes(rng.randrange(5000)))
            for _ in range(rng.randrange(50)):
                key = rng.randbytes(8)
                txn.put(key, bytes(20_000))
                txn.delete(key)
    with env.begin(table) as txn:
        records = list(txn.cursor())
    promised = (env.info()["last_pgno"] + 1) * env.stat()["psize"]
    assert (directory / "data.mdb").stat().st_size < promised
    env.close()
    env = environment(directory)
    with env.begin(env.open_db(b"table")) as txn:
        assert list(txn.cursor()) == records
    complete(env, str(directory))
    assert (directory / "data.mdb").stat().st_size == promised
