"""Whether a database's file is as long as its meta page promises.

LMDB maps the file, and reading beyond its end kills the process with SIGBUS. The last pages may be missing
from a good file, if they were freed in the transaction that made them: after a commit `complete` adds them as
a hole, and before a file without them is mapped here, a process of its own checks that it has all pages in
use, to the last byte: what is missing of a page in part would read as zeros.
"""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from typing import Any, NamedTuple

from tagstore.errors import Damaged

_META_BYTES = 152
"""Bytes of a meta page that are read, from the start of the page."""
_VERIFY = """
import sys, lmdb
from lmdb.verify import verify
try:
    env = lmdb.open(sys.argv[1], readonly=True, max_readers=2048)
except lmdb.Error:  # a read-only volume
    env = lmdb.open(sys.argv[1], readonly=True, lock=False)
with env.begin():  # no writer reuses the pages that are walked
    file = sys.argv[1] + "/data.mdb"
    sys.exit(bool(verify(file) and verify(file)))  # a commit may mislead the first look
"""


class _Meta(NamedTuple):
    transaction: int
    last_page: int
    page_bytes: int


def check_length(path: str) -> None:
    """Raise `Damaged` for a database that was cut off. `path` is its directory."""
    file = os.path.join(path, "data.mdb")
    try:
        with open(file, "rb") as data:
            metas = [_meta(data.read(_META_BYTES))]
            if metas[0] is not None:
                data.seek(metas[0].page_bytes)
                metas.append(_meta(data.read(_META_BYTES)))
            # after the meta pages: a writer that commits meanwhile makes the file longer first
            length = os.fstat(data.fileno()).st_size
    except OSError as error:
        raise Damaged(f"{file} cannot be read: {error.strerror}") from error
    meta = max((meta for meta in metas if meta is not None), default=None)
    if meta is None or length >= (meta.last_page + 1) * meta.page_bytes:
        return  # LMDB says what else is wrong
    child = subprocess.run([sys.executable, "-c", _VERIFY, path], capture_output=True)
    if child.returncode:
        raise Damaged(
            f"{file} has {length} bytes of {(meta.last_page + 1) * meta.page_bytes}: it was cut off. Restore "
            "the store from a bundle or a copy"
        )


def check_open(env: Any, path: str) -> None:
    """Raise `Damaged` if the database of an open environment was cut off. Reads its meta page only.

    Args: path: its directory; `env.path()` is another one once the store was renamed.
    """
    try:
        length = os.stat(os.path.join(path, "data.mdb")).st_size
    except FileNotFoundError:
        return  # a compaction has replaced it, and those who read it keep it
    if length < _promised(env):
        check_length(path)


def _meta(page: bytes) -> _Meta | None:
    """Parse a meta page of LMDB's 64-bit format; None for anything else."""
    if len(page) < _META_BYTES or struct.unpack_from("<II", page, 16) != (0xBEEFC0DE, 1):
        return None
    last_page, transaction = struct.unpack_from("<QQ", page, 136)
    return _Meta(transaction, last_page, struct.unpack_from("<I", page, 40)[0])


def complete(env: Any, path: str) -> None:
    """Make the file of an environment, in directory `path`, as long as its meta page promises.

    What is added is a hole.
    """
    file, promised = os.path.join(path, "data.mdb"), _promised(env)
    if os.stat(file).st_size < promised:
        os.truncate(file, promised)


def _promised(env: Any) -> int:
    """Bytes that the file of an environment should have at least."""
    return int((env.info()["last_pgno"] + 1) * env.stat()["psize"])
