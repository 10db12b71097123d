"""Checks that a store is what was committed, and repair of what can be derived from the rest.

`verify` reads in a process of its own: a damaged database file can crash the process that maps it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from tagstore.errors import Damaged, TagstoreError
from tagstore.indexing import faiss_index, plans
from tagstore.storage.checksums import broken, file_fault
from tagstore.storage.consistency import json_faults, lookup_faults, page_faults, rebuild_lookups
from tagstore.storage.generations import generation
from tagstore.storage.rows import Allowed
from tagstore.storage.snapshot import Snapshot
from tagstore.storage.store import Store
from tagstore.storage.writer import Writer

SAMPLE_SIZE = 1000
"""Entries of an index file whose vectors are compared with the store's, unless all are."""
END_LINE = "{}"
"""Last line that the reading process prints: without it, the process crashed."""


@dataclass(frozen=True, slots=True)
class Problem:
    """Something in a store that is not what was committed."""

    file: str
    what: str
    derived: bool
    """Whether `repair` can rebuild it."""


def verify(root: str | Path, store: str, *, full: bool = False) -> list[Problem]:
    """List everything that is wrong with a store; nothing if it is sound.

    Compares every checksum of every version, the lookup tables and the tag counts with the records, and the
    vectors in the index with the stored ones: those of `SAMPLE_SIZE` entries of each index file, or of all if
    `full`.

    Raises `NotFound` if there is no such store.
    """
    try:
        database = str(generation(Path(root) / store) / "data.mdb")
    except Damaged as error:
        return [Problem(str(Path(root) / store / "CURRENT"), str(error), False)]
    command = [sys.executable, "-m", __name__, str(root), store, *(["--full"] if full else [])]
    child = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    lines = [json.loads(line) for line in child.stdout.splitlines() if line.endswith("}")]
    problems = [Problem(**line) for line in lines if line]
    if not child.stdout.endswith(f"{END_LINE}\n"):
        problems.append(
            Problem(database, f"reading it brought the reader down (exit code {child.returncode})", False)
        )
    return problems


def repair(root: str | Path, store: str) -> list[str]:
    """Rebuild lookup tables and index files that are wrong; returns what was done.

    Raises `Damaged`, and changes nothing, if something else is wrong.
    """
    problems = verify(root, store)
    fatal = [p for p in problems if not p.derived]
    if fatal:
        raise Damaged(
            f"{len(fatal)} problems can't be repaired, the first: {fatal[0].file}: {fatal[0].what}. "
            "Restore the store from a bundle or a copy"
        )
    done: list[str] = []
    if any("data.mdb" in p.file for p in problems):
        with Writer(root, store) as writer:
            rebuild_lookups(writer)
        done.append("rebuilt the look-up tables of keys and tags")
    if any(p.file.endswith(".faiss") for p in problems):
        with Writer(root, store) as writer:
            bad_files = {Path(p.file).name for p in problems}
            for version in writer.store.versions():
                if bad_files & {f["file"] for f in version.index.get("files", [])}:
                    snapshot = Snapshot(writer.store, version)
                    with writer.step():
                        index = faiss_index.extend(snapshot, None, writer.store.index_directory, whole=True)
                    writer.replace_index(version, index)
                    done.append(f"rebuilt the index of version {version.number}")
            with writer.step():
                _sweep_index(writer.store)
    return done


def _sweep_index(store: Store) -> None:
    """Remove index files that no version names: a writer does not recognise leftovers of older versions."""
    named = {about["file"] for version in store.versions() for about in version.index["files"]}
    for path in store.index_directory.iterdir():
        if path.name not in named:
            path.unlink()


def _print_problems(root: str, name: str, full: bool) -> None:
    """Print each problem as a line of JSON, then `END_LINE`; this is what the reading process does."""
    try:
        for problem in _problems(root, name, full):
            print(json.dumps(asdict(problem)), flush=True)
    except TagstoreError as error:
        print(json.dumps(asdict(Problem(str(generation(Path(root) / name) / "data.mdb"), str(error), False))))
    except Exception as error:  # noqa: BLE001  any error that damage causes is a problem to report
        what = f"cannot be read: {type(error).__name__}: {error}"
        print(json.dumps(asdict(Problem(str(generation(Path(root) / name) / "data.mdb"), what, False))))
    print(END_LINE)


def _problems(root: str, name: str, full: bool) -> Iterator[Problem]:
    store = Store(root, name)
    database = str(store.generation / "data.mdb")
    yield from (Problem(database, what, False) for what in page_faults(store))
    state, versions = store.state(), store.versions()
    numbers = [v.number for v in versions]
    if state["current"] not in (numbers or [0]):
        yield Problem(
            database, f"its state names version {state['current']}, its versions are {numbers}", False
        )
    bad_files: dict[str, bool] = {}
    compared: set[object] = set()
    for version in versions:
        snapshot = Snapshot(store, version)
        yield from _ranges(snapshot, database, compared)
        yield from _counts(snapshot, database)
        yield from _files(snapshot, bad_files)
        yield from _agreement(snapshot, full, bad_files)
    yield from (Problem(database, what, True) for what in lookup_faults(store))
    yield from (Problem(database, what, False) for what in json_faults(store))
    read = Snapshot(store, versions[-1]).sources() if versions else []
    for version in versions:
        if version.source and version.source not in read:
            yield Problem(
                database, f"the source of version {version.number} is not among those of the store", False
            )


def _ranges(snapshot: Snapshot, database: str, seen: set[object]) -> Iterator[Problem]:
    for name, r in broken(snapshot, seen):
        yield Problem(
            database,
            f"{name} {r.first} to {r.end - 1} are not what version {snapshot.version.number} committed",
            False,
        )


def _counts(snapshot: Snapshot, database: str) -> Iterator[Problem]:
    version, counts = snapshot.version, np.zeros(snapshot.version.next_tag_id, np.int32)
    live = snapshot.live()
    for start in range(0, len(live), 1024):
        batch = live[start : start + 1024].tolist()
        for entry_id, (_, ids) in zip(batch, snapshot.keys_and_tags(batch), strict=True):
            if ids and max(ids) >= len(counts):
                yield Problem(
                    database,
                    f"entry {entry_id} of version {version.number} carries tag {max(ids)}, which is not "
                    "there",
                    False,
                )
                return
            counts[ids] += 1
    if len(live) != version.entries:
        yield Problem(
            database,
            f"version {version.number} has {len(live)} entries, its record says {version.entries}",
            False,
        )
    if not np.array_equal(counts, snapshot.counts()):
        yield Problem(
            database, f"the tag counts of version {version.number} are not those of its entries", False
        )
    carried = np.flatnonzero(counts)
    snapshot.tags(carried.tolist())  # raises for a tag that is not there


def _files(snapshot: Snapshot, bad: dict[str, bool]) -> Iterator[Problem]:
    """Check the index files that are not in `bad` yet, and enter there whether each is bad."""
    for about in snapshot.version.index["files"]:
        if about["file"] in bad:
            continue
        path = snapshot.store.index_directory / about["file"]
        fault = file_fault(path, about)
        bad[about["file"]] = fault is not None
        if fault:
            yield Problem(str(path), fault, True)


def _agreement(snapshot: Snapshot, full: bool, bad: dict[str, bool]) -> Iterator[Problem]:
    """Check that the index holds, under every id, the stored vector."""
    live = snapshot.live()
    allowed = Allowed(snapshot.array("live", np.uint8), len(live))
    for about in snapshot.version.index["files"]:
        if bad[about["file"]]:
            continue
        path = snapshot.store.index_directory / about["file"]
        part = faiss_index.Part(path, about, allowed, snapshot.dimension)
        ids = plans.ids_of(part.plan, part.index)
        rows = (
            np.arange(len(ids)) if full else np.unique(np.linspace(0, len(ids) - 1, SAMPLE_SIZE).astype(int))
        )
        checked = ids[rows][np.isin(ids[rows], live)]
        # of lists only the ids: their codes are not the stored numbers, and the checksum covers them
        for start in range(0, len(checked) if part.holds_vectors else 0, 1 << 15):
            batch = checked[start : start + (1 << 15)]
            wrong = batch[(part.vectors(batch) != snapshot.vectors(batch)).any(axis=1)]
            if len(wrong):
                fault = f"holds another vector for entry {wrong[0]} than the store ({len(wrong)} such)"
                yield Problem(str(path), fault, True)
                break
        if not np.isin(live[(live >= about["first"]) & (live < about["end"])], ids).all():
            yield Problem(str(path), "lacks entries of its run", True)


if __name__ == "__main__":
    _print_problems(sys.argv[1], sys.argv[2], "--full" in sys.argv[3:])
