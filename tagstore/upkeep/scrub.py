"""Compares the stores under a root with their checksums, over and over, at a bounded rate.

A server runs this in a process of its own: a damaged database can crash the process that maps it. It prints
lines of JSON, and ends when its standard input does. How far it is stands in `ROOT/.scrub.json`, where the
next one goes on.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple

from tagstore.errors import TagstoreError
from tagstore.storage.checksums import file_fault, is_committed, unseen
from tagstore.storage.snapshot import Snapshot
from tagstore.storage.store import Store, store_names
from tagstore.storage.version import Range

PERIOD = 7 * 86400.0
"""Seconds after which a sound store is compared again from its beginning."""
POLL_SECONDS = 10.0
"""Seconds between two looks for new stores and versions, once all are compared."""
SAVE_SECONDS = 5.0
"""Seconds between two records of how far the scrub is."""
STATE_FILE = ".scrub.json"

_Read = Callable[[int], None]


class Part(NamedTuple):
    """What has one checksum."""

    version: int
    """The oldest one that has it."""
    name: str
    """Of a table or an array, or of a file of the index."""
    span: Range | None
    """None for a file."""


def parts_of(store: Store) -> list[Part]:
    """List what has a checksum. A new version only appends to the list."""
    parts: dict[Part, None] = {}
    files: set[str] = set()
    seen: set[object] = set()
    for version in store.versions():
        parts |= {Part(version.number, name, span): None for name, span in unseen(version, seen)}
        for name in {about["file"]: None for about in version.index["files"]}:
            if name not in files:
                files.add(name)
                parts[Part(version.number, name, None)] = None
    return list(parts)


def fault(store: Store, part: Part, read: _Read) -> str | None:
    """Return what is wrong with a part of a store, None if nothing is; `read` as for `is_committed`."""
    snapshot = store.snapshot(part.version)
    if part.span is not None:
        if is_committed(snapshot, part.name, part.span, read):
            return None
        first, last = part.span.first, part.span.end - 1
        return f"{part.name} {first} to {last} are not what version {part.version} committed"
    return _index_fault(snapshot, part.name, read)


def _index_fault(snapshot: Snapshot, name: str, read: _Read) -> str | None:
    about = next(about for about in snapshot.version.index["files"] if about["file"] == name)
    path = snapshot.store.index_directory / name
    what = file_fault(path, about, read)
    return what and f"{path} {what}: `tagstore repair` makes it anew"


class Scrub:
    """Goes round the stores of a root.

    Args:
        rate: bytes a second.
        skip: names of stores that are not read.
        say: called with each message: {"store": NAME}, {"bytes": N}, {"store": NAME, "share": PART_DONE},
            {"damaged": NAME, "what": TEXT}.
    """

    def __init__(
        self, root: Path, rate: float, skip: Collection[str], say: Callable[[Mapping[str, Any]], None]
    ) -> None:
        self._root, self._rate, self._skip, self._say = root, rate, skip, say
        self._free = time.monotonic()
        """When all that was read so far is within the rate."""
        self._saved = 0.0
        self._damaged: dict[str, tuple[Path, int]] = {}
        """Generation and last transaction of each store that was found damaged."""
        try:
            self._state = json.loads((root / STATE_FILE).read_bytes())
        except (OSError, ValueError):
            self._state = {}

    def look(self) -> None:
        """Compare what was not compared yet in all stores."""
        for name in store_names(self._root):
            if name not in self._skip:
                with suppress(TagstoreError):  # whoever opens it says so
                    self._compare(name)
        self._save()

    def _compare(self, name: str) -> None:
        store = Store(self._root, name)
        mark = store.generation, store.last_transaction()
        if self._damaged.get(name) == mark:
            return
        reached = self._state.get(name, {})
        if (
            reached.get("generation") != store.generation.name
            or time.time() - reached.get("began", 0) > PERIOD
        ):
            reached = self._state[name] = {
                "generation": store.generation.name,
                "began": time.time(),
                "done": 0,
            }
        parts = parts_of(store)
        for part in parts[reached["done"] :]:
            self._say({"store": name})
            if (what := self._fault(store, part)) and (what := self._confirmed(name, part)):
                self._damaged[name] = mark
                self._say({"damaged": name, "what": what})
                return
            reached["done"] += 1
            self._say({"store": name, "share": reached["done"] / len(parts)})
            if time.monotonic() > self._saved + SAVE_SECONDS:
                self._save()

    def _fault(self, store: Store, part: Part) -> str | None:
        try:
            return fault(store, part, self._pace)
        except Exception as error:  # noqa: BLE001  damaged records make any error of their reader
            return f"version {part.version} cannot be read: {type(error).__name__}: {error}"

    def _confirmed(self, name: str, part: Part) -> str | None:
        """Compare again what is in the store now: it may have been replaced meanwhile."""
        with suppress(TagstoreError):
            store = Store(self._root, name)
            if part in parts_of(store):
                return self._fault(store, part)
        return None

    def _pace(self, size: int) -> None:
        """Wait until so many bytes are within the rate."""
        self._say({"bytes": size})
        now = time.monotonic()
        self._free = max(self._free, now) + size / self._rate
        time.sleep(self._free - now)

    def _save(self) -> None:
        self._saved = time.monotonic()
        temporary = self._root / f"{STATE_FILE}.tmp"
        with suppress(OSError):  # on a read-only volume every scrub begins anew
            temporary.write_text(json.dumps(self._state))
            temporary.replace(self._root / STATE_FILE)


def main() -> None:
    """Scrub ROOT at BYTES a second, without the stores that follow."""

    def end_with_input() -> None:
        sys.stdin.read()
        os._exit(0)

    Thread(target=end_with_input, daemon=True).start()
    os.nice(19)
    scrub = Scrub(
        Path(sys.argv[1]),
        float(sys.argv[2]),
        sys.argv[3:],
        lambda message: print(json.dumps(message), flush=True),
    )
    while True:
        scrub.look()
        time.sleep(POLL_SECONDS)


if __name__ == "__main__":
    main()
