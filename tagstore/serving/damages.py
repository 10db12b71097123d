"""The damaged stores of a server, which it leaves out while the others serve.

A damage is found when a version is opened or by the scrub. It is logged once, stays in the metrics and in the
details of health, and every request to the store gets it as an error. It is forgotten once the store's files
change or an administrator loads the store again.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import NamedTuple

from tagstore.errors import Damaged, TagstoreError
from tagstore.serving import metrics
from tagstore.storage.generations import generation

log = logging.getLogger(__name__)

_Mark = tuple[tuple[int, int, int], ...]


class LeftOut(Damaged):
    """A request to a store that is left out. The text is for callers and names no file."""


class Damage(NamedTuple):
    """What is wrong with a store."""

    what: str
    """For operators; it may name files."""
    since: float
    """Seconds since the epoch."""
    mark: _Mark


class Damages:
    """The damaged stores under a root. Safe for threads."""

    def __init__(self, root: Path) -> None:
        self._root, self._lock = root, Lock()
        self._stores: dict[str, Damage] = {}
        self.changed: Callable[[Mapping[str, str]], None] = lambda stores: None
        """Called with `stores()` after each change."""

    def __contains__(self, store: str) -> bool:
        return store in self._stores

    def stores(self) -> dict[str, str]:
        """Return what is wrong with each damaged store."""
        return {store: damage.what for store, damage in sorted(self._stores.items())}

    def report(self, store: str, what: str) -> None:
        """Leave a store out from now on."""
        with self._lock:
            if store in self._stores:
                return
            self._stores[store] = Damage(what, time.time(), self._mark(store))
        log.error("store '%s' is damaged and left out, the others serve: %s", store, what)
        metrics.child(metrics.DAMAGED, store).set(1)
        self.changed(self.stores())

    def forget(self, store: str) -> None:
        """Serve a store again."""
        with self._lock:
            if self._stores.pop(store, None) is None:
                return
        metrics.child(metrics.DAMAGED, store).set(0)
        self.changed(self.stores())

    def check(self, store: str) -> None:
        """Raise `LeftOut` for a damaged store whose files are the same as when the damage was found."""
        damage = self._stores.get(store)
        if damage is None:
            return
        if damage.mark != self._mark(store):
            log.warning("the files of store '%s' have changed: it is opened again", store)
            self.forget(store)
            return
        raise self.left_out(store)

    @staticmethod
    def left_out(store: str) -> LeftOut:
        """Make the error of a request to a damaged store."""
        return LeftOut(
            f"store '{store}' is damaged and not served, the server's log says how: restore it from a bundle "
            "or a copy, then `tagstore load` it"
        )

    def _mark(self, store: str) -> _Mark:
        """Return a mark that changes when the store is replaced or its database is written."""
        files = [self._root / store / "CURRENT"]
        with suppress(TagstoreError):  # CURRENT may be what is damaged
            files.append(generation(self._root / store) / "data.mdb")
        return tuple(_identity(file) for file in files)


def _identity(file: Path) -> tuple[int, int, int]:
    try:
        status = os.stat(file)
    except OSError:
        return (0, 0, 0)
    return status.st_ctime_ns, status.st_ino, status.st_size  # a copy may keep the time of its content
