"""LMDB environments of a store: opened once a process, never across a fork, with the writer's lock beside them.

    ROOT/NAME/CURRENT          which generation of the database is the store's, one line
    ROOT/NAME/db-NUMBER-HEX/   that generation: an LMDB environment, and index/ with the files derived from it
    ROOT/NAME/writer.lock      held by the process that writes

A generation is replaced as a whole when a store is compacted: the new one is written beside it, `CURRENT` is renamed over,
and readers of the old one keep it, unlinked, until they let go.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Lock
from typing import Any

import lmdb

from tagstore.errors import Busy, Damaged, NotFound, TagstoreError, WriteFailed

# Address space, not disk: the file grows as data comes, and no reader ever has to follow a resized map.
MAP_SIZE = int(os.environ.get("TAGSTORE_MAP_SIZE", 1 << 38))
MAX_READERS = 2048
_MADV_DONTNEED = 4  # Linux

_lock = Lock()
_open: dict[tuple[int, int], Any] = {}
"""By device and inode of data.mdb: a store that is renamed keeps its environment, one made anew under its name gets another."""


def _close_inherited() -> None:
    global _lock
    _lock = Lock()  # another thread of the parent may have held it
    for env in _open.values():
        env.close()  # of the child's copy; the parent's readers are not touched, LMDB knows them by process id
    _open.clear()


os.register_at_fork(after_in_child=_close_inherited)


def generation(store: Path) -> Path:
    """The directory of a store's current database. Raises `NotFound` if there is no store, `Damaged` if its `CURRENT` names none."""
    try:
        name = (store / "CURRENT").read_bytes().decode("ascii", "replace").strip()
    except (FileNotFoundError, NotADirectoryError):
        raise NotFound(f"no store at {store}") from None
    if not re.fullmatch(r"db-[0-9a-f-]+", name):
        raise Damaged(
            f"{store}/CURRENT holds {name[:40]!r}: write into it the name of the db-... directory beside it"
        )
    return store / name


def new_generation(store: Path) -> Path:
    """The directory that comes after the current one, made anew."""
    number = int(generation(store).name.split("-")[1]) + 1 if (store / "CURRENT").exists() else 1
    # a name that was never used: whoever holds a store that was dropped and made again must not take one for the other
    path = store / f"db-{number:06d}-{secrets.token_hex(4)}"
    sweep(store)
    path.mkdir()
    return path


def switch(store: Path, to: Path) -> None:
    """Make a generation the current one: durable and atomic."""
    sync_directory(to)
    temporary = store / "CURRENT.tmp"
    with temporary.open("w") as file:
        file.write(to.name + "\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(store / "CURRENT")
    sync_directory(store)


def sweep(store: Path) -> None:
    """Remove generations that are not the current one: leftovers of an interrupted or a finished compaction.

    Raises `Damaged` if `CURRENT` names none of those that are there.
    """
    (store / "CURRENT.tmp").unlink(missing_ok=True)
    current = generation(store).name if (store / "CURRENT").exists() else ""
    found = list(store.glob("db-*"))
    # never take data away because the one line that names it was lost
    if found and (
        current not in [path.name for path in found]
        if current
        else any((path / "index").exists() for path in found)
    ):
        names = ", ".join(path.name for path in found)
        raise Damaged(
            f"{store}/CURRENT names {current or 'nothing'}, there is {names}: write into it which of them is the store's"
        )
    for path in found:
        if path.name != current:
            forget(path)
            shutil.rmtree(path)


@contextmanager
def writing(what: str) -> Iterator[None]:
    """The one place where what the system and LMDB say of a write that failed becomes `WriteFailed`; errors of our own pass."""
    try:
        yield
    except TagstoreError:
        raise
    except (lmdb.Error, OSError) as error:
        advice = "free space or make it writable, then try again"
        if isinstance(error, lmdb.MapFullError):
            advice = f"set TAGSTORE_MAP_SIZE to more than {MAP_SIZE} bytes for every process that opens it"
        raise WriteFailed(
            f"{what} could not be written: {error}. What was there before stays; {advice}"
        ) from error


def sync_directory(path: Path) -> None:
    """Make renames and new names in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def environment(directory: Path, *, create: bool = False) -> Any:
    """The process's one `lmdb.Environment` of a directory.

    Raises `NotFound` if there is none and `create` is false, `Damaged` if the file is no LMDB database.
    """
    path = os.path.realpath(directory)
    with _lock:
        env = _open.get(_identity(path))
        if env is not None and _failed(env):
            env.close()
            env = None
        if env is None:
            if not create and not os.path.exists(os.path.join(path, "data.mdb")):
                raise NotFound(f"no database at {path}")
            try:
                _reserve(path)
                # metasync=False: a commit syncs the data; `env.sync(True)` after it makes the commit itself durable
                env = lmdb.open(
                    path,
                    map_size=MAP_SIZE,
                    max_readers=MAX_READERS,
                    max_dbs=16,
                    create=create,
                    metasync=False,
                )
            except (lmdb.InvalidError, lmdb.CorruptedError, lmdb.VersionMismatchError) as error:
                raise Damaged(
                    f"{path}/data.mdb is not a readable LMDB database: {error}. Restore it from a copy."
                ) from error
            except lmdb.MemoryError as error:
                raise WriteFailed(
                    f"no address space left to map {path}/data.mdb ({MAP_SIZE >> 30} GiB each): set TAGSTORE_MAP_SIZE to fewer bytes"
                ) from error
            except (lmdb.Error, OSError) as error:
                raise WriteFailed(
                    f"{path} cannot be opened: {error}. LMDB needs to write to lock.mdb there, to read as well"
                ) from error
            env.reader_check()
            _open[_identity(path)] = env
        return env


def _identity(path: str) -> tuple[int, int]:
    try:
        status = os.stat(os.path.join(path, "data.mdb"))
    except OSError:
        return (-1, -1)
    return status.st_dev, status.st_ino


def _reserve(path: str) -> None:
    """Give the table of readers its blocks: LMDB makes a file with holes and maps it, and on a full disk the first reader dies of SIGBUS.

    Raises `OSError` if there is no room.
    """
    os.makedirs(path, exist_ok=True)
    descriptor = os.open(os.path.join(path, "lock.mdb"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        if not os.fstat(descriptor).st_size:
            os.posix_fallocate(descriptor, 0, 64 * MAX_READERS + 128)
    finally:
        os.close(descriptor)


def _failed(env: Any) -> bool:
    """Whether LMDB gave an environment up, as it does when the write of a meta page fails; opened again it is what was committed."""
    try:
        env.begin().abort()
    except lmdb.PanicError:
        return True
    return False


def forget(directory: Path) -> None:
    """Drop the process's hold of an environment; it is closed when the last one who reads from it lets go."""
    with _lock:
        _open.pop(_identity(os.path.realpath(directory)), None)


def release(env: Any) -> None:
    """As `forget`, of an environment whose files may be gone: a compaction elsewhere has replaced it."""
    with _lock:
        for identity in [identity for identity, held in _open.items() if held is env]:
            del _open[identity]


def trim(env: Any, beyond: int = 256 << 20) -> None:
    """Let go of the pages of a database that were read, if this process has more than so many bytes of files in its memory.

    They are the kernel's cache, which it takes back when it has to; but until then they count as memory of whoever mapped them: of an
    ingest, the whole database. Reading one again costs a page fault. Does nothing where there is no /proc.
    """
    try:
        resident = int(Path("/proc/self/statm").read_text().split()[2]) * os.sysconf("SC_PAGE_SIZE")
        if resident < beyond:
            return
        inode = str(os.stat(os.path.join(env.path(), "data.mdb")).st_ino)
        maps = [
            line.split()
            for line in Path("/proc/self/maps").read_text().splitlines()
            if line.endswith("data.mdb")
        ]
    except OSError:
        return
    for span, *_ in (fields for fields in maps if fields[4] == inode):
        start, end = (int(address, 16) for address in span.split("-"))
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_DONTNEED)


def _say(descriptor: int, holder: str) -> None:
    """Name the holder of a lock. A full disk must not keep anyone from the lock: deleting and compacting make room."""
    with suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.write(descriptor, holder.encode())


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
                f"store '{store.name}' is being written by process {holder}: wait for it to end, then try again"
            ) from None
        _say(file.fileno(), str(os.getpid()))
        try:
            yield
        finally:
            _say(file.fileno(), "")
            # a child forked meanwhile has the file open too: closing ours alone would leave the lock with it
            fcntl.flock(file, fcntl.LOCK_UN)
