"""Memory that a server has freed goes back to the system."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tagstore.serving import allocator
from tagstore.serving.allocator import TRIM_BYTES, Trimmer

BLOCKS = """
import sys
from pathlib import Path
from tagstore.serving import allocator

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) << 12

if sys.argv[1] == "configured":
    allocator.configure()
bytes(20 << 20)  # glibc learns from a mapped block that is freed: the next ones are not mapped
before = resident()
blocks = [bytearray(size) for _ in range(20) for size in (16 << 20, 200_000)]
del blocks[::2]  # what is between keeps the heap from shrinking
print(resident() - before)
"""


@pytest.mark.parametrize(("way", "kept"), [("configured", False), ("plain", True)])
def test_large_blocks_are_given_back_when_they_are_freed(way: str, kept: bool) -> None:
    run = subprocess.run([sys.executable, "-c", BLOCKS, way], capture_output=True, text=True, check=True)
    assert (int(run.stdout) > 100 << 20) == kept


def test_trims_after_much_and_when_all_is_still(monkeypatch: pytest.MonkeyPatch) -> None:
    trims = []
    monkeypatch.setattr(allocator, "trim", lambda: trims.append(1))
    moved = 0
    trimmer = Trimmer(lambda: moved)
    assert not trimmer.look()
    moved += 1000
    assert not trimmer.look()
    assert trimmer.look()
    assert not trimmer.look()
    moved += TRIM_BYTES
    assert trimmer.look()
    assert not trimmer.look()
    assert len(trims) == 2
