"""Readers and a writer at the same time: no error, no torn read, and a version never changes."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from multiprocessing.connection import Connection
from multiprocessing.sharedctypes import SynchronizedArray
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest

import crash
from tagstore.bundles import export
from tagstore.retrieval.catalog import Catalog
from tagstore.storage.store import Snapshot, Store
from tagstore.storage.writer import Writer
from tagstore.types import Search
from tagstore.upkeep.compact import compact
from tagstore.upkeep.edits import Selection
from tagstore.upkeep.takedown import prove_absent, purge
from tagstore.upkeep.verify import repair, verify
from waiting import wait_until

SPAWN, FORK = multiprocessing.get_context("spawn"), multiprocessing.get_context("fork")
KEYS = [f"key-{i:05d}" for i in range(20)]


def _write(root: Path, number: int) -> None:
    """Write a version whose entries have the serials number * 100 and up, so that a mix of versions shows."""
    batch = [(key, number * 100 + i) for i, key in enumerate(KEYS)]
    batches = [batch[:10], batch[10:]]
    crash.ingest(root, crash.ingest_of("first", f"source {number}", batches, "batch"))


def _read(snapshot: Snapshot) -> int:
    """Which write a version holds; it must hold that one, all of it, and nothing else."""
    entries = list(snapshot.entries())
    serials = [e.perceptual_hash for e in entries]
    write = serials[0] // 100
    assert serials == [write * 100 + i for i in range(len(KEYS))], serials
    assert [e.key for e in entries] == KEYS
    assert all(e.captions == (f"picture {e.perceptual_hash:08d}",) for e in entries)
    np.testing.assert_array_equal(snapshot.vectors(snapshot.live()), crash.vectors_of("first", serials))
    assert snapshot.counts().sum() == sum(len(e.tags) for e in entries) == snapshot.version.tags
    return write


def _hammer(root: str, seed: int, pipe: Connection, progress: SynchronizedArray[int]) -> None:
    """Read the newest version through the engine, and old ones again, until told to stop.

    `progress[seed]` counts the versions read. The answer is the number of reads and of versions read.
    """
    rng, catalog, seen, reads, last = random.Random(seed), Catalog(root, device="cpu"), {}, 0, 0
    try:
        pipe.send("ready")
        while not pipe.poll():
            engine = catalog.engine(crash.NAME)
            number = engine.version.number
            assert number >= last, f"after version {last} the newest was {number}"
            last = number
            write = _read(engine.snapshot)
            assert seen.setdefault(number, write) == write
            i = rng.randrange(len(KEYS))
            [answer] = engine.retrieve(crash.vectors_of("first", [write * 100 + i]), Search(k=3))
            assert (answer.version, answer.neighbours[0].key) == (number, KEYS[i])
            old = rng.choice(sorted(seen))
            assert _read(Store(root, crash.NAME).snapshot(old)) == seen[old], f"version {old} has changed"
            reads += 1
            progress[seed] = len(seen)
        pipe.send((reads, len(seen)))
    except BaseException as error:  # noqa: BLE001  the parent reports it
        pipe.send(f"{type(error).__name__}: {error}")


@pytest.mark.parametrize("versions", [60, pytest.param(200, marks=pytest.mark.matrix)])
def test_four_readers_hammer_while_versions_are_committed(tmp_path: Path, versions: int):
    _write(tmp_path, 1)
    pipes, children, progress = [], [], SPAWN.Array("q", 4)
    for seed in range(4):
        ours, theirs = SPAWN.Pipe()
        child = SPAWN.Process(target=_hammer, args=(str(tmp_path), seed, theirs, progress))
        child.start()
        pipes.append(ours)
        children.append(child)
    assert [pipe.recv() for pipe in pipes] == ["ready"] * 4
    number = 1
    for number in range(2, versions + 1):
        if number % 50 == 0:
            compact(tmp_path, crash.NAME)
        else:
            _write(tmp_path, number)
        # the readers keep up however slow the machine is
        wait_until(lambda: min(progress) >= number // 20 or any(pipe.poll() for pipe in pipes))  # noqa: B023
        if any(pipe.poll() for pipe in pipes):
            break
    for pipe in pipes:
        pipe.send("stop")
    answers = [pipe.recv() for pipe in pipes]
    for child in children:
        child.join()
    assert all(isinstance(answer, tuple) for answer in answers), answers
    assert Store(tmp_path, crash.NAME).state()["current"] == versions
    assert all(reads >= 3 and seen >= versions // 20 for reads, seen in answers), answers


def _hold(root: str, transactions: int, pipe: Connection) -> None:
    store = Store(root, crash.NAME)
    held = [store.env.begin() for _ in range(transactions)]
    pipe.send(len(held))
    pipe.recv()
    # a transaction sees the store as it was when it began
    pipe.send([len(list(txn.cursor(store.db["versions"]))) for txn in held])
    for txn in held:
        txn.abort()


def test_300_readers_at_once_in_three_processes_and_a_writer_beside_them(tmp_path: Path):
    _write(tmp_path, 1)
    pipes, children = [], []
    for _ in range(3):
        ours, theirs = SPAWN.Pipe()
        child = SPAWN.Process(target=_hold, args=(str(tmp_path), 100, theirs))
        child.start()
        pipes.append(ours)
        children.append(child)
    assert [pipe.recv() for pipe in pipes] == [100] * 3
    env = Store(tmp_path, crash.NAME).env
    assert sum(line.split()[2] != "-" for line in env.readers().splitlines()[1:]) == 300
    for number in range(2, 6):
        _write(tmp_path, number)
    for pipe in pipes:
        pipe.send("go")
    assert [pipe.recv() for pipe in pipes] == [[1] * 100] * 3
    for child in children:
        child.join()
    assert _read(Store(tmp_path, crash.NAME).snapshot()) == 5


def _answer(root: str, pipe: Connection) -> None:
    pipe.send(_read(Store(root, crash.NAME).snapshot()))
    _write(Path(root), 7)


@pytest.mark.parametrize("context", [FORK, SPAWN], ids=["fork", "spawn"])
def test_a_child_opens_the_store_for_itself_reads_and_writes(tmp_path: Path, context: Any):
    _write(tmp_path, 1)
    snapshot = Store(tmp_path, crash.NAME).snapshot()
    assert _read(snapshot) == 1
    ours, theirs = context.Pipe()
    child = context.Process(target=_answer, args=(str(tmp_path), theirs))
    child.start()
    assert ours.recv() == 1
    child.join()
    assert child.exitcode == 0
    assert _read(snapshot) == 1
    assert _read(Store(tmp_path, crash.NAME).snapshot()) == 7
    _write(tmp_path, 8)


def test_what_was_opened_before_a_fork_is_refused_after_it(tmp_path: Path):
    _write(tmp_path, 1)
    snapshot = Store(tmp_path, crash.NAME).snapshot()
    child = os.fork()
    if not child:
        try:
            snapshot.entry(0)
        except lmdb.Error:
            os._exit(0)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert snapshot.entry(0).key == KEYS[0]


def test_a_fork_while_the_store_is_written_does_not_keep_the_writers_lock(tmp_path: Path):
    ours, theirs = FORK.Pipe()
    with Writer(tmp_path, crash.NAME, crash.SPACES["first"]):
        child = FORK.Process(target=theirs.recv)
        child.start()
    _write(tmp_path, 1)
    ours.send("end")
    child.join()


def test_a_reader_that_was_killed_does_not_keep_pages_from_being_used_again(tmp_path: Path):
    _write(tmp_path, 1)
    ours, theirs = SPAWN.Pipe()
    child = SPAWN.Process(target=_hold, args=(str(tmp_path), 5, theirs))
    child.start()
    assert ours.recv() == 5
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    env = Store(tmp_path, crash.NAME).env
    assert str(child.pid) in env.readers()
    _write(tmp_path, 2)
    assert str(child.pid) not in env.readers()


def _write_and_open(root: Path, seconds: float) -> None:
    """Begin and end writing in one thread, again and again, while three others open the store."""
    end = time.monotonic() + seconds

    def write() -> None:
        while time.monotonic() < end:
            with Writer(root, crash.NAME, crash.SPACES["first"]):
                pass

    def read() -> None:
        while time.monotonic() < end:
            Store(root, crash.NAME)

    threads = [threading.Thread(target=write), *(threading.Thread(target=read) for _ in range(3))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_a_store_is_opened_beside_a_writer_of_the_same_process(tmp_path: Path):
    _write(tmp_path, 1)
    # lmdb's own way to open a database waits for the writer and holds the GIL: this froze within a second
    work = "from pathlib import Path; import test_store_concurrency as t; "
    work += f"t._write_and_open(Path({str(tmp_path)!r}), 3.0)"
    subprocess.run([sys.executable, "-c", work], cwd=Path(__file__).parent, check=True, timeout=60)


_TRY_TO_INITIALISE = """
import fcntl, sys
with open(sys.argv[1], "r+b") as file:
    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1)
"""
"""What LMDB does to find out whether it is the first to open a database, and may initialise `lock.mdb`."""


@pytest.mark.parametrize("work", ["purge", "prove_absent", "verify", "repair", "compact", "export", "ingest"])
def test_this_process_keeps_its_lock_on_a_database(tmp_path: Path, work: str) -> None:
    # closing any descriptor of lock.mdb would drop it, and the next process to open the database would
    # initialise the table of readers, and the mutexes in it, under those who use them
    for number in (1, 2):
        _write(tmp_path, number)
    held = Store(tmp_path, crash.NAME).env  # closed if nothing holds it
    match work:
        case "purge":
            purge(tmp_path, crash.NAME, Selection(keys=["key-00003"]), reason="asked for")
        case "prove_absent":
            assert prove_absent(tmp_path, crash.NAME, keys=["no such key"]) == []
        case "verify":
            assert verify(tmp_path, crash.NAME, full=True) == []
        case "repair":
            assert repair(tmp_path, crash.NAME) == []
        case "compact":
            compact(tmp_path, crash.NAME)
        case "export":
            export(tmp_path, crash.NAME, tmp_path / "bundle")
        case "ingest":
            _write(tmp_path, 3)
    store = Store(tmp_path, crash.NAME)
    assert (store.env is held) == (work not in ("purge", "compact"))
    command = [sys.executable, "-c", _TRY_TO_INITIALISE, str(store.generation / "lock.mdb")]
    child = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    assert "BlockingIOError" in child.stderr
