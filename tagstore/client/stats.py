"""What a source has done, counted over all processes that share it: a trainer and its DataLoader workers, however they were started.

The counters are one row of 64-bit integers in a file that is mapped by every process; a source that travels to a worker takes the
file's name with it. Every process adds under a record lock of the kernel, which ends with the process that holds it.
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

from tagstore.client.forks import Lock

_SIZE = 4096


@dataclass(frozen=True, slots=True)
class Stats:
    """Counts of a run, over all its processes."""

    queries: int = 0
    """Images and vectors asked about."""
    degraded: int = 0
    """Queries that were answered with no tags because no server did (`on_failure="empty"`)."""
    excluded: int = 0
    """Nearer entries that the leak guard kept out, over all queries."""
    guarded: int = 0
    """Queries of which the leak guard kept anything out."""
    requests: int = 0
    """Calls sent to a server, retries and hedges included."""
    retries: int = 0
    """Calls sent again after one that failed."""
    hedges: int = 0
    """Calls sent to a second address because the first was slow."""
    failures: int = 0
    """Calls that failed: no server, no answer in time, too much to do."""
    skipped: int = 0
    """Requests that were not sent because every circuit was open."""
    cache_hits: int = 0
    """Queries answered by the node's cache."""
    cache_misses: int = 0
    embedding_hits: int = 0
    """Tags answered by the process's cache of embeddings."""
    embedding_misses: int = 0
    addresses: dict[str, str] = field(default_factory=dict)
    """Of this process: each address with the state of its circuit, `closed`, `open` or `half-open`."""
    last_error: str = ""
    """Of this process: why the newest degraded answer has no tags."""

    @property
    def cache_hit_rate(self) -> float:
        """Share of cacheable queries that the node's cache answered; 0 where there were none."""
        return self.cache_hits / max(1, self.cache_hits + self.cache_misses)

    @property
    def embedding_hit_rate(self) -> float:
        """Share of tags that the cache of embeddings answered."""
        return self.embedding_hits / max(1, self.embedding_hits + self.embedding_misses)


COUNTED = tuple(f.name for f in fields(Stats) if f.type == "int")

_lock = Lock()
_mapped: weakref.WeakValueDictionary[str, Counters] = weakref.WeakValueDictionary()
"""One mapping a process and file: closing any other descriptor of the file would drop this process's record lock."""


def counters(path: str = "") -> Counters:
    """The counters of a file, or new ones. A file that is gone, as on another machine, is made anew: then that machine counts alone."""
    with _lock:
        found = _mapped.get(path)
        if found is None:
            found = Counters(path)
            _mapped[found.path] = found
        return found


class Counters:
    """The counters of one run. Safe for threads and processes. Made by `counters`."""

    def __init__(self, path: str) -> None:
        descriptor = -1
        if path:
            with suppress(FileNotFoundError):
                descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        if descriptor < 0:
            descriptor, path = tempfile.mkstemp(prefix="tagstore-stats-")
            os.ftruncate(descriptor, _SIZE)
            weakref.finalize(self, _unlink, path, os.getpid())
        # not at the end of the process: daemon threads may be counting until then
        weakref.finalize(self, os.close, descriptor).atexit = False
        self.path = path
        self._descriptor = descriptor
        self._map = mmap.mmap(descriptor, _SIZE)
        self._row = np.frombuffer(self._map, np.int64, len(COUNTED))
        self._threads = Lock()

    def add(self, **counts: int) -> None:
        """Add to counters by name."""
        with self._threads:
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX)
            try:
                for name, count in counts.items():
                    self._row[COUNTED.index(name)] += count
            finally:
                fcntl.lockf(self._descriptor, fcntl.LOCK_UN)

    def read(self) -> dict[str, int]:
        """All counters by name."""
        return dict(zip(COUNTED, self._row.tolist(), strict=True))


def _unlink(path: str, pid: int) -> None:
    if os.getpid() == pid:
        Path(path).unlink(missing_ok=True)
