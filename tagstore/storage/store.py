"""A store on disk, to read from.

One LMDB environment holds everything that is true of a store (`tables.py`). Entries, tags and vectors are
only ever appended. A version says which of them are its own; it becomes visible when the one transaction that
writes its record commits, and that is the only commit point of a store. What was appended behind the last
version is invisible, and the next writer takes it up again or sweeps it away. A space is one encoder's
vectors.
"""

from __future__ import annotations

import re
from pathlib import Path

from tagstore.errors import Damaged, InvalidInput, NotFound
from tagstore.storage.database import Database
from tagstore.storage.environments import LOCK_FILE, environment
from tagstore.storage.generations import generation
from tagstore.storage.snapshot import Snapshot as Snapshot
from tagstore.storage.tables import U64
from tagstore.storage.version import Version

OPEN_ATTEMPTS = 3
"""Times to try to open a store, which a compaction may replace meanwhile."""
DROPPED = ".dropped"
"""Folder of the dropped stores, under the root; each is `NAME@TIME` there."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_DROPPED_NAME = re.compile(_NAME.pattern + r"@[0-9]{1,18}")


class Store(Database):
    """The current generation of a store, to read from: its versions."""

    def __init__(self, root: str | Path, name: str) -> None:
        directory = store_directory(root, name)
        for attempt in range(1, OPEN_ATTEMPTS + 1):
            try:
                path = generation(directory)
                env = environment(path)
                break
            except NotFound:
                if not (directory / "CURRENT").exists():
                    existing = ", ".join(store_names(root)) or "none"
                    raise NotFound(f"no store '{name}'; those there are: {existing}") from None
                # between reading CURRENT and opening what it names, a compaction may have ended
                if attempt == OPEN_ATTEMPTS:
                    raise Damaged(f"{directory}/CURRENT names {path.name}, which is not there") from None
        super().__init__(name, directory, path, env)

    def files(self) -> list[Path]:
        """List the files of the store, of all generations, except `lock.mdb`.

        That one holds no data, and closing any descriptor of it drops this process's locks on the database.
        """
        paths = self.directory.rglob("*")
        return sorted(path for path in paths if path.name != LOCK_FILE and path.is_file())

    def versions(self) -> list[Version]:
        """All versions, oldest first."""
        with self.env.begin() as txn, txn.cursor(self.db["versions"]) as cursor:
            versions = [(U64.unpack(key)[0], Version.from_json(value)) for key, value in cursor]
        for number, version in versions:
            if number != version.number:
                raise Damaged(
                    f"the record of version {version.number} of store '{self.name}' stands under number "
                    f"{number}"
                )
        return [version for _, version in versions]

    def snapshot(self, version: int | None = None) -> Snapshot:
        """Open a version to read from; the current one if no number is given. Raises `NotFound`."""
        number = version or self.state()["current"]
        if not number:
            raise NotFound(
                f"store '{self.name}' has no version yet: its first ingest did not finish; run it again"
            )
        with self.env.begin() as txn:
            data = txn.get(U64.pack(number), db=self.db["versions"])
        if data is None:
            raise NotFound(
                f"store '{self.name}' has no version {number}; its current one is {self.state()['current']}"
            )
        return Snapshot(self, Version.from_json(data))


def check_name(name: str) -> str:
    """Return the name if a store may have it. Raises `InvalidInput`."""
    if not _NAME.fullmatch(name):
        raise InvalidInput(
            f"'{name}' is no name for a store: use letters, digits, '_', '-' and '.', not first, at most 64 "
            "of them"
        )
    return name


def store_directory(root: str | Path, name: str) -> Path:
    """The directory of a store, or of a dropped one if the root is the folder of these.

    Raises `InvalidInput` for a name that no store can have.
    """
    root = Path(root)
    if root.name == DROPPED and _DROPPED_NAME.fullmatch(name):
        return root / name
    return root / check_name(name)


def dropped_names(root: str | Path) -> list[str]:
    """Names of the dropped stores under a directory, each `NAME@TIME`, sorted."""
    folders = (path.parent.name for path in Path(root).glob(f"{DROPPED}/*/CURRENT"))
    return sorted(name for name in folders if _DROPPED_NAME.fullmatch(name))


def store_names(root: str | Path) -> list[str]:
    """Names of the stores under a directory, sorted."""
    return sorted(
        path.parent.name for path in Path(root).glob("*/CURRENT") if _NAME.fullmatch(path.parent.name)
    )
