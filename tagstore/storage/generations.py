"""The directory of a store: which generation of its database is current, and who may write.

    ROOT/NAME/CURRENT          which generation of the database is the store's, one line
    ROOT/NAME/db-NUMBER-HEX/   that generation: an LMDB environment, and index/ with the files derived from it
    ROOT/NAME/writer.lock      held by the process that writes

A generation is replaced as a whole when a store is compacted: the new one is written beside it, `CURRENT` is
renamed over, and readers of the old one keep it, unlinked, until they let go.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tagstore.errors import Busy, Damaged, NotFound
from tagstore.storage.environments import forget


def generation(store: Path) -> Path:
    """The directory of a store's current generation.

    Raises `NotFound` if there is no store, `Damaged` if its `CURRENT` is lost or names no generation.
    """
    try:
        name = (store / "CURRENT").read_bytes().decode("ascii", "replace").strip()
    except (FileNotFoundError, NotADirectoryError):
        # a generation that never committed has no index directory
        there = sorted(path.parent.name for path in store.glob("db-*/index"))
        if not there:
            raise NotFound(f"no store at {store}") from None
        raise Damaged(
            f"{store}/CURRENT is missing, there is {', '.join(there)}: write into it which of them is the "
            "store's"
        ) from None
    except OSError as error:
        raise Damaged(f"{store}/CURRENT cannot be read: {error.strerror}") from error
    if not re.fullmatch(r"db-[0-9a-f-]+", name):
        raise Damaged(
            f"{store}/CURRENT holds {name[:40]!r}: write into it the name of the db-... directory beside it"
        )
    return store / name


def new_generation(store: Path) -> Path:
    """Make the directory of the generation that comes after the current one."""
    number = int(generation(store).name.split("-")[1]) + 1 if (store / "CURRENT").exists() else 1
    # a name never used before: who holds a store that was dropped and made again must not confuse the two
    path = store / f"db-{number:06d}-{secrets.token_hex(4)}"
    sweep(store)
    path.mkdir()
    return path


def switch(store: Path, new: Path) -> None:
    """Make a generation the current one: durable and atomic."""
    sync_directory(new)
    temporary = store / "CURRENT.tmp"
    with temporary.open("w") as file:
        file.write(new.name + "\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(store / "CURRENT")
    sync_directory(store)


def sweep(store: Path) -> None:
    """Remove the generations that a compaction left behind, interrupted or finished.

    Raises `Damaged` if `CURRENT` names none of those that are there.
    """
    (store / "CURRENT.tmp").unlink(missing_ok=True)
    current = generation(store).name if (store / "CURRENT").exists() else ""
    generations = list(store.glob("db-*"))
    # never take data away because the one line that names it was lost
    if current:
        lost = current not in [path.name for path in generations]
    else:
        lost = any((path / "index").exists() for path in generations)
    if generations and lost:
        names = ", ".join(path.name for path in generations)
        raise Damaged(
            f"{store}/CURRENT names {current or 'nothing'}, there is {names}: write into it which of them is "
            "the store's"
        )
    for path in generations:
        if path.name != current:
            forget(path)
            shutil.rmtree(path)


def sync_directory(path: Path) -> None:
    """Make renames and new names in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def writer_lock(store: Path) -> Iterator[None]:
    """Hold the right to write to a store. Raises `Busy`, naming the process that has it."""
    with (store / "writer.lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise Busy(
                f"store '{store.name}' is being written by process {holder}: wait for it to end, then try "
                "again"
            ) from None
        _name_holder(file.fileno(), str(os.getpid()))
        try:
            yield
        finally:
            _name_holder(file.fileno(), "")
            # a child forked meanwhile has the file open too: closing ours alone would leave the lock with it
            fcntl.flock(file, fcntl.LOCK_UN)


def _name_holder(descriptor: int, holder: str) -> None:
    """Write into a lock who holds it. A full disk is no obstacle: deleting and compacting make room."""
    with suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.write(descriptor, holder.encode())
