"""A store that is unloaded gives its memory back: mapped files, tables of tags, and what the allocator holds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import synthetic

ENTRIES, DIMENSION = 20_000, 512

PROGRAM = """
import json, os, sys
from benchmarks import synthetic
from tagstore.serving.live import LiveCatalog

root, entries, dimension = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
catalog = LiveCatalog(root, device="cpu")
queries = synthetic.queries(256, entries, dimension)

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

def answers(store):
    engine = catalog.engine(store)
    found = []
    for rows in (queries, *(row[None] for row in queries[:32])):  # through the store's rows, and through the index
        found += catalog.retrieve(engine, vectors=rows, fingerprint=engine.digest)
    return found

catalog.load("small")  # torch, which is looked for the encoder with
answers("small")  # what any search takes: threads and their buffers
seen, first = [resident()], None
for _ in range(3):
    catalog.load("bench")
    found = answers("bench")
    assert found == (first or found)
    first = found
    seen.append(resident())
    catalog.unload("bench")
    seen.append(resident())
print(json.dumps(seen))
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc to read the memory of a process from")
def test_unloading_gives_the_memory_back(tmp_path: Path) -> None:
    synthetic.build(tmp_path, ENTRIES, DIMENSION)
    synthetic.build(tmp_path, 2_000, DIMENSION, "small")
    command = [sys.executable, "-c", PROGRAM, str(tmp_path), str(ENTRIES), str(DIMENSION)]
    run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent.parent)
    assert run.returncode == 0, run.stderr
    start, *rest = json.loads(run.stdout.splitlines()[-1])
    vectors = ENTRIES * DIMENSION * 2
    for loaded, unloaded in zip(rest[::2], rest[1::2], strict=True):
        assert loaded - start > vectors  # the store's pages were in memory
        assert unloaded - start < 0.2 * (loaded - start)
