"""The catalog of a server: it checks cheaply which version is current, and loads and unloads stores."""

from __future__ import annotations

import gc
import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

from tagstore.encoding.decode_memory import SHARED, MemoryBudget
from tagstore.encoding.encoder import Encoder
from tagstore.errors import Damaged, NotFound, TagstoreError, Unavailable
from tagstore.retrieval.catalog import Catalog
from tagstore.retrieval.engine import Engine
from tagstore.serving import allocator, metrics
from tagstore.serving.damages import Damages
from tagstore.storage.store import check_name
from tagstore.types import Fingerprint, StoreInfo

log = logging.getLogger(__name__)

PINNED = 32
"""Largest number of old versions held open; beyond it the least recently used one is closed."""


class LiveCatalog(Catalog):
    """A catalog for many concurrent callers. Takes what `Catalog` does."""

    def __init__(
        self, root: str | Path, *, device: str = "auto", decode_memory: MemoryBudget = SHARED
    ) -> None:
        super().__init__(root, device=device, decode_memory=decode_memory)
        self._current: dict[str, tuple[tuple[int, int], int, Engine]] = {}
        """Engine of each store's current version, after the mark of the store at the time of the look-up."""
        self._used: dict[tuple[str, int], float] = {}
        """When each pinned version was last used."""
        self._unloaded: set[str] = set()
        self.damages = Damages(self.root)
        self._warming = 0
        """Id of the thread that loads the encoders at start-up; 0 when none does."""

    def ready(self, store: str, version: int = 0) -> Engine | None:
        """Return the engine that `engine` would return, or None if that takes a lock or reading.

        Raises `NotFound` if the store is unloaded, `LeftOut` if it is damaged.
        """
        if store in self._unloaded:
            raise NotFound(f"store '{store}' is not loaded here: an administrator can load it")
        if store in self.damages:
            self.damages.check(store)
        if version:
            engine = self._engines.get((store, version))
            if engine is None or (store, version) not in self._used or not engine.snapshot.store.is_current():
                return None
            self._used[store, version] = time.monotonic()
            return engine
        current = self._current.get(store)
        return current[2] if current and current[:2] == self._mark(store, current[2]) else None

    def engine(self, store: str, version: int = 0) -> Engine:
        """Return an engine as `Catalog.engine` does, without reading if nothing was written since."""
        if (engine := self.ready(store, version)) is not None:
            return engine
        try:
            return self._opened(store, version)
        except (TagstoreError, OSError, MemoryError) as error:
            if not isinstance(error, Damaged) or (version and self._serves(store)):
                raise
            self.leave_out(store, str(error))
            raise self.damages.left_out(store) from error
        except Exception as error:  # lmdb, json, struct: whatever damaged records make of their reader
            log.exception("store '%s' cannot be read", store)
            self.leave_out(store, f"it cannot be read: {type(error).__name__}: {error}")
            raise self.damages.left_out(store) from error

    def _serves(self, store: str) -> bool:
        """Tell whether the current version answers; leaves the store out if it is damaged, too."""
        try:
            self.engine(store)
        except Damaged:
            return False
        return True

    def leave_out(self, store: str, what: str) -> None:
        """Stop serving a store that is damaged. Requests in flight keep what they hold."""
        self.damages.report(store, what)
        self._close(store)

    def _opened(self, store: str, version: int) -> Engine:
        if version:
            engine = super().engine(store, version)
            self._pin(store, version)
            return engine
        engine = super().engine(store)
        # the mark is taken before the second look-up: a write in between makes it stale, never wrong
        mark = self._mark(store, engine)
        if super().engine(store) is engine and mark is not None:
            self._current[store] = (*mark, engine)
            metrics.child(metrics.VERSION, store).set(engine.version.number)
        return engine

    def _mark(self, store: str, engine: Engine) -> tuple[tuple[int, int], int] | None:
        """Return a mark that changes when a store is written; None if it is gone or replaced."""
        try:
            status = os.stat(f"{self.root}/{store}/CURRENT")
        except OSError:
            return None
        if not engine.snapshot.store.in_place():
            return None
        return (status.st_mtime_ns, status.st_ino), engine.snapshot.store.last_transaction()

    def _pin(self, store: str, version: int) -> None:
        """Keep a version open, and close the least recently used one if there are more than `PINNED`."""
        self._used[store, version] = time.monotonic()
        if len(self._used) > PINNED:
            with self._lock:
                oldest = min(list(self._used), key=lambda key: self._used[key])
                self._used.pop(oldest, None)
                if self._current.get(oldest[0], (None, None, None))[2] is not self._engines.get(oldest):
                    self._engines.pop(oldest, None)

    def warm(self, opened: Callable[[], None] = lambda: None) -> list[StoreInfo]:
        """Warm as `Catalog.warm` does; meanwhile `encoder` raises `Unavailable` instead of waiting."""
        self._warming = threading.get_ident()
        try:
            return super().warm(opened)
        finally:
            self._warming = 0

    def encoder(self, fingerprint: Fingerprint) -> Encoder:
        if self._warming not in (0, threading.get_ident()) and fingerprint.digest not in self._encoders:
            raise Unavailable("the server is loading its encoders: try again in a moment")
        return super().encoder(fingerprint)

    def load(self, store: str) -> StoreInfo:
        """Serve an unloaded or new store, once it is open and its encoder loaded. Raises `NotFound`."""
        self._unloaded.discard(check_name(store))
        self.damages.forget(store)
        info = self.engine(store).info()
        self._warm_encoder(info)
        return info

    def unload(self, store: str) -> None:
        """Stop serving a store and free its memory; calls in flight finish normally. Raises `NotFound`."""
        if not (self.root / check_name(store) / "CURRENT").exists():
            raise NotFound(f"no store '{store}'")
        self._unloaded.add(store)
        self.damages.forget(store)
        self._close(store)
        with self._lock:
            used = {engine.fingerprint.digest for engine in self._engines.values()}
        with self._loading:
            for digest in [digest for digest in self._encoders if digest not in used]:
                del self._encoders[digest]
        gc.collect()
        allocator.trim()
        log.info("unloaded %s", store)

    def _close(self, store: str) -> None:
        with self._lock:
            self._current.pop(store, None)
            if store in self._stores:
                self._let_go(store)
            for key in [key for key in self._used if key[0] == store]:
                del self._used[key]

    def stores(self) -> list[StoreInfo]:
        return [info for info in super().stores() if info.store not in self._unloaded]
