"""LMDB environments: opened once a process, never across a fork."""

from __future__ import annotations

import ctypes
import errno
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any
from weakref import WeakValueDictionary

import lmdb

from tagstore.errors import Damaged, InvalidInput, NotFound, TagstoreError, WriteFailed
from tagstore.storage.file_length import check_length, check_open


def _map_size() -> int:
    text = os.environ.get("TAGSTORE_MAP_SIZE", str(1 << 38))
    if not text.isdecimal() or int(text) < 1 << 20:
        raise InvalidInput(f"TAGSTORE_MAP_SIZE is {text[:40]!r}: give it in bytes, at least {1 << 20}")
    return int(text)


MAP_SIZE = _map_size()
"""Bytes of address space, not of disk.

The file grows as data comes, and no reader has to follow a resized map.
"""
MAX_READERS = 2048
"""Transactions that read from a database at once, over all processes."""
LOCK_FILE = "lock.mdb"
"""LMDB's table of readers and mutexes.

POSIX drops a process's locks on a file when it closes any descriptor of it. Without them the next process
initialises the file anew, under those who use it. So nobody opens this file while its database is open here.
"""
_MADV_DONTNEED = 4  # Linux

log = logging.getLogger(__name__)

_lock = Lock()
_open: WeakValueDictionary[tuple[int, int], Any] = WeakValueDictionary()
"""Environments of this process, by device and inode of data.mdb: a renamed store keeps its own, a new one of
its name gets another. None is opened twice, because closing the one would drop the locks of the other."""
_kept: dict[tuple[int, int], Any] = {}
"""Those that stay open although nobody uses them."""


def _close_inherited() -> None:
    global _lock
    _lock = Lock()  # another thread of the parent may have held it
    for env in _open.values():
        env.close()  # the child's copy; LMDB knows the parent's readers by process id, they stay
    _open.clear()
    _kept.clear()


os.register_at_fork(after_in_child=_close_inherited)


@contextmanager
def writing(what: str) -> Iterator[None]:
    """Turn an error of the system or of LMDB into `WriteFailed`, which names what was being written."""
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


def environment(directory: Path, *, create: bool = False) -> Any:
    """The process's one `lmdb.Environment` of a directory.

    Raises `NotFound` if there is none and `create` is false, `Damaged` if the file is no LMDB database.
    """
    path = os.path.realpath(directory)
    with _lock:
        env = _open.get(identity_of(path))
        if env is not None and _failed(env):
            env.close()
            env = None
        if env is not None:
            check_open(env, path)
        else:
            if not create and not os.path.exists(os.path.join(path, "data.mdb")):
                raise NotFound(f"no database at {path}")
            if not create:
                check_length(path)
            try:
                env = _opened(path, create)
            except (lmdb.InvalidError, lmdb.CorruptedError, lmdb.VersionMismatchError) as error:
                raise Damaged(
                    f"{path}/data.mdb is not a readable LMDB database: {error}. Restore it from a copy."
                ) from error
            except lmdb.MemoryError as error:
                raise WriteFailed(
                    f"no address space left to map {path}/data.mdb ({MAP_SIZE >> 30} GiB each): set "
                    "TAGSTORE_MAP_SIZE to fewer bytes"
                ) from error
            except (lmdb.Error, OSError) as error:
                raise WriteFailed(
                    f"{path} cannot be opened: {error}. LMDB needs to write to lock.mdb there, to read as "
                    "well"
                ) from error
            env.reader_check()
            _open[identity_of(path)] = env
        _kept[identity_of(path)] = env
        return env


def _opened(path: str, create: bool) -> Any:
    # metasync=False: a commit syncs only the data, `env.sync(True)` the commit itself
    options = {"map_size": MAP_SIZE, "max_readers": MAX_READERS, "max_dbs": 16, "metasync": False}
    try:
        _reserve(path)
        return lmdb.open(path, create=create, **options)
    except (lmdb.Error, OSError) as error:
        if create or not _is_read_only(path, error):
            raise
    log.warning("%s is read-only here, and read without LMDB's lock: nobody may write to it meanwhile", path)
    return lmdb.open(path, create=False, readonly=True, lock=False, **options)


def _is_read_only(path: str, error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno in (errno.EROFS, errno.EACCES, errno.EPERM)
    return bool(os.statvfs(path).f_flag & os.ST_RDONLY) or not os.access(path, os.W_OK)


def identity_of(path: str | Path) -> tuple[int, int]:
    """Device and inode of a directory's data.mdb; (-1, -1) if there is none."""
    try:
        status = os.stat(os.path.join(path, "data.mdb"))
    except OSError:
        return (-1, -1)
    return status.st_dev, status.st_ino


def _reserve(path: str) -> None:
    """Allocate the table of readers on disk. Raises `OSError` if there is no room.

    LMDB makes a file with holes and maps it: on a full disk the first reader would die of SIGBUS.
    """
    os.makedirs(path, exist_ok=True)
    file = os.path.join(path, LOCK_FILE)
    if os.path.exists(file) and os.stat(file).st_size:
        return
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        os.posix_fallocate(descriptor, 0, 64 * MAX_READERS + 128)
    finally:
        os.close(descriptor)


def _failed(env: Any) -> bool:
    """Whether an environment was closed, or given up by LMDB, as it is if writing a meta page fails.

    Opened again it holds what was committed.
    """
    try:
        env.begin().abort()
    except lmdb.PanicError:
        return True
    except lmdb.Error as error:
        return type(error) is lmdb.Error  # closed; others, such as a full table of readers, have a class
    return False


def forget(directory: Path) -> None:
    """Drop the process's hold of a directory's environment, which closes when its last reader lets go."""
    with _lock:
        _kept.pop(identity_of(os.path.realpath(directory)), None)


def release(env: Any) -> None:
    """As `forget`, for an environment whose files may be gone because a compaction has replaced it."""
    with _lock:
        for identity in [identity for identity, kept in _kept.items() if kept is env]:
            del _kept[identity]


def trim(env: Any, beyond: int = 256 << 20) -> None:
    """Let go of the pages of a database that were read, if this process takes more than `beyond` bytes.

    They are the kernel's cache, which it takes back when it has to, but until then they count as memory of
    the process that mapped them: for an ingest, the whole database. Reading one again is a page fault. Does
    nothing without /proc.
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
