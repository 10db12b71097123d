"""Count what a source does, over all processes that share it: a trainer and its DataLoader workers.

The counters are a row of 64-bit integers in a file that every process maps; a source that travels to a worker
takes the name of the file with it. A process adds under a record lock of the kernel, which ends with the
process that holds it.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import tempfile
import weakref
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np

from tagstore.client.forks import ForkSafe

_FILE_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Stats:
    """Counts of a run, over all its processes."""

    queries: int = 0
    """Images, vectors and captions that tags were retrieved for."""
    degraded: int = 0
    """Queries answered without tags because no server answered (`on_failure="empty"`)."""
    excluded: int = 0
    """Nearer entries that the leak guard kept out, over all queries."""
    guarded: int = 0
    """Queries for which the leak guard kept an entry out."""
    requests: int = 0
    """Calls sent to a server, retries and hedges included."""
    retries: int = 0
    """Calls sent again after one that failed."""
    hedges: int = 0
    """Calls sent to a second address because the first was slow."""
    failures: int = 0
    """Calls that failed: no server, no answer in time, an overloaded server."""
    skipped: int = 0
    """Requests not sent because every circuit was open."""
    cache_hits: int = 0
    """Queries answered from the cache on disk."""
    cache_misses: int = 0
    """Queries that the cache on disk did not hold."""
    embedding_hits: int = 0
    """Tags whose embedding was in the memory of the process."""
    embedding_misses: int = 0
    """Tags whose embedding was fetched."""
    addresses: dict[str, str] = field(default_factory=dict)
    """State of the circuit of each address in this process: `closed`, `open` or `half-open`."""
    last_error: str = ""
    """Why the newest degraded answer of this process has no tags."""

    @property
    def cache_hit_rate(self) -> float:
        """Share of cacheable queries answered from the cache on disk; 0 if there were none."""
        return self.cache_hits / max(1, self.cache_hits + self.cache_misses)

    @property
    def embedding_hit_rate(self) -> float:
        """Share of tags whose embedding was in memory; 0 if none was asked for."""
        return self.embedding_hits / max(1, self.embedding_hits + self.embedding_misses)


COUNTED = tuple(f.name for f in fields(Stats) if f.type == "int")

_registry = ForkSafe()
_mapped: weakref.WeakValueDictionary[str, Counters] = weakref.WeakValueDictionary()
"""One mapping for each file: closing any other descriptor of it would drop this process's record lock."""


def counters(path: str = "") -> Counters:
    """Open the counters of a file, or new ones.

    A file that does not exist, as on another machine, is replaced by a new one: that machine then counts
    alone.
    """
    with _registry.lock:
        counters = _mapped.get(path)
        if counters is None:
            counters = Counters(path)
            _mapped[counters.path] = counters
        return counters


class Counters(ForkSafe):
    """The counters of one run, opened by `counters`. Safe for threads and processes."""

    def __init__(self, path: str) -> None:
        super().__init__()
        descriptor = -1
        if path:
            with suppress(FileNotFoundError):
                descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        if descriptor < 0:
            descriptor, path = tempfile.mkstemp(prefix="tagstore-stats-")
            os.ftruncate(descriptor, _FILE_BYTES)
            weakref.finalize(self, _unlink, path, os.getpid())
        # not at the end of the process: daemon threads may count until then
        weakref.finalize(self, os.close, descriptor).atexit = False
        self.path = path
        self._descriptor = descriptor
        self._map = mmap.mmap(descriptor, _FILE_BYTES)
        self._row = np.frombuffer(self._map, np.int64, len(COUNTED))

    def add(self, **counts: int) -> None:
        """Add to counters by name."""
        with self.lock:
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX)
            try:
                for name, count in counts.items():
                    self._row[COUNTED.index(name)] += count
            finally:
                fcntl.lockf(self._descriptor, fcntl.LOCK_UN)

    def read(self) -> dict[str, int]:
        """Return all counters by name."""
        return dict(zip(COUNTED, self._row.tolist(), strict=True))


def _unlink(path: str, pid: int) -> None:
    if os.getpid() == pid:
        Path(path).unlink(missing_ok=True)
