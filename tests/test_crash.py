"""The store's first promise: a process may die at any instant, and all that it acknowledged is there."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import crash
from pictures import ToyEncoder, write_table
from tagstore.ingestion import batches as batches_of
from tagstore.ingestion import ingest, pipeline
from tagstore.storage.store import Store
from tagstore.upkeep.verify import verify


@pytest.mark.parametrize("deaths", [12, pytest.param(300, marks=pytest.mark.matrix)])
def test_nothing_acknowledged_is_lost_whenever_a_process_dies(tmp_path: Path, deaths: int):
    ways = crash.WAYS if shutil.which("cc") else ("clock",)
    figures = crash.Harness(tmp_path, seed=20_240, ways=ways, rounds_per_store=10).run(deaths)
    assert figures.lost == []
    assert sum(figures.ends.values()) == figures.checks - sum(figures.refused.values()) == deaths
    assert sum(figures.acknowledged.values()) > deaths // 2
    assert sum(figures.in_flight.values()) > deaths // 4


@pytest.mark.skipif(not shutil.which("cc"), reason="needs a C compiler, to build what makes writes fail")
def test_the_harness_notices_a_commit_that_was_not_synced(tmp_path: Path, monkeypatch):
    """A power cut loses what was not synced: if syncs do nothing, the harness must find a loss."""
    monkeypatch.setenv("CRASH_SYNC_NOTHING", "1")
    figures = crash.Harness(tmp_path, seed=1, ways=("POWER",), rounds_per_store=30).run(30)
    assert figures.lost


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_store_on_a_full_disk_goes_on_when_there_is_room_again(tmp_path: Path):
    root = tmp_path / "disk"
    root.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=300k", "none", root], capture_output=True, check=False
    ).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        harness = crash.Harness(tmp_path, seed=3, ways=("clock",))
        model, worker, failed, after = crash.Model(), crash._Child(None), 0, 0
        assert worker.receive(60)
        while after < 5:
            operation = crash.draw(harness.rng, model, harness.serial, root)
            worker.send({**operation, "root": str(root)})
            answer = worker.receive(60)
            assert answer is not None, f"{operation['operation']} brought the process down"
            done = model.after(operation)
            if "failed" in answer:
                # LMDB reports a partial write as an input/output error
                assert "No space left" in answer["failed"] or "Input/output error" in answer["failed"], answer
                failed += 1
                if failed == 8:
                    subprocess.run(["mount", "-o", "remount,size=64m", root], check=True)
                actual, wrong = crash.look(root, close=False)
                assert wrong == []
                assert actual in (model, done)
                model = actual
            else:
                model = done
                after += failed >= 8
        assert failed == 8
        assert crash.look(root, close=True) == (model, [])
        worker.end()
    finally:
        subprocess.run(["umount", "-l", root], check=True)


def ingest_slowly(source: str, root: str) -> None:
    """Run an ingest that prints each batch of 16 and waits for a line: the child of the test below."""
    batches_of.BATCH = pipeline.BATCH = 16

    def said(stage: str, done: int) -> None:
        print(stage, flush=True)
        sys.stdin.readline()

    ingest(source, root=root, store="s", encoder=ToyEncoder(), miner="keywords", progress=said)


def test_an_ingest_killed_again_and_again_ends_as_one_that_was_not(tmp_path: Path, monkeypatch):
    for module in (batches_of, pipeline):
        monkeypatch.setattr(module, "BATCH", 16)
    source = write_table(tmp_path / "source")
    whole = ingest(str(source), root=tmp_path / "whole", store="s", encoder=ToyEncoder(), miner="keywords")
    command = [sys.executable, __file__, str(source), str(tmp_path / "cut")]
    for batches in (1, 3, 6):  # of 13, and one more each time: a run starts where the one before was killed
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
            for _ in range(batches):
                assert child.stdout.readline() == "pairs\n"
                print(file=child.stdin, flush=True)
            assert child.stdout.readline()
            child.send_signal(signal.SIGKILL)
    resumed = ingest(str(source), root=tmp_path / "cut", store="s", encoder=ToyEncoder(), miner="keywords")
    assert resumed.resumed >= 200 - 16
    for name in ("pairs", "added", "unchanged", "entries", "tags", "unique_tags", "quarantined", "reasons"):
        assert getattr(resumed, name) == getattr(whole, name), name
    ours, theirs = (Store(tmp_path / root, "s").snapshot() for root in ("cut", "whole"))
    assert (
        ours.version.ranges == theirs.version.ranges
    )  # checksums of entries, vectors, tags, embeddings, live, counts
    assert list(ours.entries()) == list(theirs.entries())
    assert list(ours.quarantine()) == list(theirs.quarantine())
    assert [f["sha256"] for f in ours.version.index["files"]] == [
        f["sha256"] for f in theirs.version.index["files"]
    ]
    assert verify(tmp_path / "cut", "s", full=True) == []


if __name__ == "__main__":
    ingest_slowly(*sys.argv[1:])
