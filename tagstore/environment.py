"""LMDB environments: opened once a process, never across a fork, with the writer's lock beside them."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any

import lmdb

from tagstore.errors import Busy, Damaged, NotFound

# Address space, not disk: the file grows as data comes, and no reader ever has to follow a resized map.
MAP_SIZE = int(os.environ.get("TAGSTORE_MAP_SIZE", 1 << 40))
MAX_READERS = 2048

_lock = Lock()
_open: dict[tuple[int, str], Any] = {}


def _close_inherited() -> None:
    global _lock
    _lock = Lock()  # another thread of the parent may have held it
    for env in _open.values():
        env.close()  # of the child's copy; the parent's readers are not touched, LMDB knows them by process id
    _open.clear()


os.register_at_fork(after_in_child=_close_inherited)


def environment(directory: Path, *, create: bool = False) -> Any:
    """The process's one `lmdb.Environment` of a directory.

    Raises `NotFound` if there is none and `create` is false, `Damaged` if the file is no LMDB database.
    """
    path = os.path.realpath(directory)
    with _lock:
        env = _open.get((os.getpid(), path))
        if env is None:
            if not create and not os.path.exists(os.path.join(path, "data.mdb")):
                raise NotFound(f"no store at {path}")
            try:
                env = lmdb.open(path, map_size=MAP_SIZE, max_readers=MAX_READERS, max_dbs=16, create=create)
            except (lmdb.InvalidError, lmdb.CorruptedError, lmdb.VersionMismatchError) as error:
                raise Damaged(f"{path}/data.mdb is not a readable LMDB database: {error}. Restore it from a copy.") from error
            env.reader_check()
            _open[os.getpid(), path] = env
        return env


def forget(directory: Path) -> None:
    """Close the process's environment of a directory, if it is open; nothing may be reading from it."""
    with _lock:
        env = _open.pop((os.getpid(), os.path.realpath(directory)), None)
    if env is not None:
        env.close()


@contextmanager
def writer_lock(directory: Path) -> Iterator[None]:
    """Hold the right to write to a store. Raises `Busy`, naming the process that has it."""
    with (directory / "writer.lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise Busy(f"store '{directory.name}' is being written by process {holder}: wait for it to end, then try again") from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)
