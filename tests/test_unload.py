"""Unloading a store gives back its memory: mapped files, tables of tags, blocks that the allocator keeps."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from benchmarks import synthetic
from serving import serve_command
from tagstore.client import connect
from tagstore.client.admin import administer

ENTRIES, DIMENSION = 20_000, 512
VECTORS = ENTRIES * DIMENSION * 2
"""Bytes of them."""


def resident(pid: int) -> int:
    """Bytes of a process in memory, pages of mapped files included."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def mapped(pid: int, store: Path) -> list[str]:
    """Files of a store in the address space of a process."""
    return [line for line in Path(f"/proc/{pid}/maps").read_text().splitlines() if f"{store}/" in line]


def answers(address: str, store: str) -> list:
    queries = synthetic.queries(256, ENTRIES, DIMENSION)
    with connect(f"grpc://{address}/{store}") as source:
        # all at once, which reads the whole store; and one by one, which goes through the index
        parts = [queries, *(row[None] for row in queries[:32])]
        return [source.retrieve(vectors=rows, fingerprint=synthetic.fingerprint(DIMENSION)) for rows in parts]


@pytest.mark.skipif(
    not Path("/proc/self/statm").exists(), reason="no /proc to read the memory of a process from"
)
def test_unloading_gives_the_memory_back(tmp_path: Path):
    root = tmp_path / "root"
    for store, entries in (("bench", ENTRIES), ("small", 2_000)):  # of an encoder that cannot be loaded
        synthetic.build(root, entries, DIMENSION, store)
    command = serve_command(root, "--workers", "1", "--anonymous", "admin")
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        address = process.stdout.readline().strip()
        with administer(f"grpc://{address}/bench") as admin:
            admin.unload()
            answers(address, "small")  # what any search takes: threads and their buffers
            found, unloaded = [], []
            for _ in range(3):
                admin.load()
                found.append(answers(address, "bench"))
                assert mapped(process.pid, root / "bench")
                loaded = resident(process.pid)
                admin.unload()
                assert not mapped(process.pid, root / "bench")
                unloaded.append(resident(process.pid))
                # its rows in LMDB and in the index, and the tags that were kept at hand
                assert loaded - unloaded[-1] > 2 * VECTORS
            assert unloaded[-1] - unloaded[0] < VECTORS / 4
        assert found[0] == found[1] == found[2]
    finally:
        process.terminate()
        process.wait(60)
        process.stdout.close()
