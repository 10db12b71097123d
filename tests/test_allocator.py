"""Memory that a server has freed goes back to the system."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tagstore.serving import allocator
from tagstore.serving.allocator import TRIM_BYTES, TRIM_SECONDS, Trimmer
from waiting import Clock

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


def test_trims_when_memory_has_grown_and_again_while_it_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, sizes, trims = Clock(), [1000], []
    monkeypatch.setattr(allocator, "time", clock)
    monkeypatch.setattr(allocator, "trim", lambda: trims.append(sizes[0]))
    trimmer = Trimmer(lambda: sizes[0])
    assert not trimmer.look()
    sizes[0] += TRIM_BYTES + 1
    assert trimmer.look()
    assert not trimmer.look()  # it was in use
    clock.ahead += 2 * TRIM_SECONDS
    assert trimmer.look()
    sizes[0] = 2000
    clock.ahead += 2 * TRIM_SECONDS
    assert not trimmer.look()
    assert len(trims) == 2
