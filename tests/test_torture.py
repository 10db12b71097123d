"""The torture of `benchmarks.store.torture`: its readers notice what is lost and what is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import crash
from benchmarks.store.torture import main
from benchmarks.store.torture_readers import Findings, Oracle, read

FIRST = crash.ingest_of("first", "one", [[(f"key-{i}", i) for i in range(1, 20)]])
SECOND = crash.ingest_of("first", "two", [[(f"key-{i}", 100 + i) for i in range(1, 20)]])


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root whose store `toy` has two versions."""
    for operation in (FIRST, SECOND):
        crash.ingest(tmp_path / "root", operation)
    return tmp_path / "root"


def asked(root: Path, *notes: dict[str, object]) -> Findings:
    """What a reader finds if these are the notes of the writer."""
    journal = root.parent / f"{crash.NAME}.journal"
    journal.write_text("".join(json.dumps(note) + "\n" for note in notes))
    return read(f"file://{root}", [journal], seed=0, seconds=0.5)


DONE: dict[str, object] = {"committed": True}


def test_a_store_that_is_what_its_journal_says_has_no_findings(root: Path):
    findings = asked(root, FIRST, DONE, SECOND, DONE)
    assert (findings.lost, findings.wrong, findings.hangs) == ([], [], [])
    assert findings.counts["answers compared, of old versions"] > 0
    # one that was not acknowledged may be seen all the same
    assert asked(root, FIRST, DONE, SECOND).wrong == []


def test_a_version_that_was_acknowledged_and_is_not_there_is_lost(root: Path):
    delete: dict[str, object] = {"operation": "delete", "keys": ["key-1"]}
    findings = asked(root, FIRST, DONE, SECOND, DONE, delete, DONE)
    assert findings.lost
    assert all("acknowledged" in text or "no version 3" in text for text in findings.lost)


def test_an_answer_that_differs_from_its_version_is_wrong(root: Path):
    changed = crash.ingest_of("first", "two", [[(f"key-{i}", 200 + i) for i in range(1, 20)]])
    assert "version 2: its similarities are" in asked(root, FIRST, DONE, changed, DONE).wrong[0]
    gone: dict[str, object] = {"operation": "delete", "keys": ["key-1"]}
    assert asked(root, FIRST, DONE, gone, DONE).wrong


def test_an_operation_that_was_not_committed_leaves_its_number_to_the_next(root: Path):
    other: dict[str, object] = {"operation": "delete", "keys": ["key-1"]}
    assert asked(root, FIRST, DONE, other, {"committed": False}, SECOND, DONE).wrong == []


def test_the_oracle_waits_for_the_rest_of_a_line(tmp_path: Path):
    journal, line = tmp_path / "journal", json.dumps(FIRST) + "\n"
    journal.write_text(line[:20])
    oracle = Oracle(journal)
    oracle.follow()
    assert oracle.version(1) is None
    with journal.open("a") as file:
        file.write(line[20:])
    oracle.follow()
    assert oracle.version(1) == ("first", {f"key-{i}": i for i in range(1, 20)})
    assert not oracle.model.versions


@pytest.mark.matrix
def test_nothing_is_lost_wrong_or_hanging_in_a_minute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    report = tmp_path / "report.md"
    arguments = ["torture", "--minutes", "1", "--directory", str(tmp_path), "--report", str(report)]
    monkeypatch.setattr("sys.argv", arguments)
    main()
    assert "| **wrong** | **0** |" in report.read_text()
