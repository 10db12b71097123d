"""A catalog for many callers at once: it checks cheaply which version is current, and lets go of stores."""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

from tagstore.encoding.encoder import Encoder
from tagstore.errors import NotFound, Unavailable
from tagstore.retrieval.catalog import Catalog
from tagstore.retrieval.engine import Engine
from tagstore.serving import metrics
from tagstore.storage.store import check_name
from tagstore.types import Fingerprint, StoreInfo

log = logging.getLogger(__name__)

PINNED = 32
"""Versions other than the current ones that stay open, the least recently used one goes first."""


class LiveCatalog(Catalog):
    """The catalog of a server.

    Args:
        root: directory of the stores.
        device: of the encoders.
    """

    def __init__(self, root: str | Path, *, device: str = "auto") -> None:
        super().__init__(root, device=device)
        self._hot: dict[str, tuple[tuple[int, int], int, Engine]] = {}
        self._used: dict[tuple[str, int], float] = {}
        self._unloaded: set[str] = set()
        self._warming = 0
        """The thread that loads the encoders at start-up."""

    def ready(self, store: str, version: int = 0) -> Engine | None:
        """The engine that `engine` would return, if that is seen at once and without a lock; else None. Raises `NotFound` if unloaded."""
        if store in self._unloaded:
            raise NotFound(f"store '{store}' is not loaded here: an administrator can load it")
        if version:
            engine = self._engines.get((store, version))
            if engine is None or (store, version) not in self._used or not engine.snapshot.store.is_current():
                return None
            self._used[store, version] = time.monotonic()
            return engine
        hot = self._hot.get(store)
        return hot[2] if hot is not None and hot[:2] == self._mark(store, hot[2]) else None

    def engine(self, store: str, version: int = 0) -> Engine:
        """As the catalog's; but where nothing was written since the last time, that is seen without reading anything."""
        if (found := self.ready(store, version)) is not None:
            return found
        if version:
            engine = super().engine(store, version)
            self._pin(store, version)
            return engine
        engine = super().engine(store)
        # the mark is of before a look at which version is current: what is written meanwhile makes it stale, never wrong
        mark = self._mark(store, engine)
        if super().engine(store) is engine and mark is not None:
            self._hot[store] = (*mark, engine)
            metrics.child(metrics.VERSION, store).set(engine.version.number)
        return engine

    def _mark(self, store: str, engine: Engine) -> tuple[tuple[int, int], int] | None:
        """Changes whenever something was written to a store, or another store has its name."""
        try:
            status = os.stat(f"{self.root}/{store}/CURRENT")
        except OSError:
            return None
        return (status.st_mtime_ns, status.st_ino), engine.snapshot.store.last_transaction()

    def _pin(self, store: str, version: int) -> None:
        self._used[store, version] = time.monotonic()
        if len(self._used) > PINNED:
            with self._lock:
                oldest = min(list(self._used), key=lambda key: self._used[key])
                self._used.pop(oldest, None)
                if self._hot.get(oldest[0], (None, None, None))[2] is not self._engines.get(oldest):
                    self._engines.pop(oldest, None)

    def warm(self, opened: Callable[[], None] = lambda: None) -> list[StoreInfo]:
        """As the catalog's; meanwhile, who asks for an encoder that is not there yet is refused with `Unavailable`, not kept waiting."""
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
        """Serve a store that was unloaded, or that came since; returns once it is open and its encoder there. Raises `NotFound`."""
        self._unloaded.discard(check_name(store))
        info = self.engine(store).info()
        self._warm_encoder(info)
        return info

    def unload(self, store: str) -> None:
        """Serve a store no more and give its memory back; calls in flight end as they would have. Raises `NotFound`."""
        if not (self.root / check_name(store) / "CURRENT").exists():
            raise NotFound(f"no store '{store}'")
        self._unloaded.add(store)
        with self._lock:
            self._hot.pop(store, None)
            if store in self._stores:
                self._let_go(store)
            for key in [key for key in self._used if key[0] == store]:
                del self._used[key]
            used = {engine.fingerprint.digest for engine in self._engines.values()}
        with self._loading:
            for digest in [digest for digest in self._encoders if digest not in used]:
                del self._encoders[digest]
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        log.info("unloaded %s", store)

    def stores(self) -> list[StoreInfo]:
        return [info for info in super().stores() if info.store not in self._unloaded]
