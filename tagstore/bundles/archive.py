"""One file that holds members in a fixed order: a tar in one zstd frame, the same bytes for the same content.

Nothing of the machine or the time is written. Reading is a stream in bounded memory, whatever the file says,
and strict: each header must equal, byte for byte, the one that the writer gives the next member. So there can
be no escaping path, link, device, sparse file, long name, or extra member; and nothing is ever extracted to a
path that the archive names.
"""

from __future__ import annotations

import fcntl
import os
import tarfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import IO, BinaryIO, cast

import zstandard

from tagstore.errors import Busy, Damaged, InvalidInput, NotFound
from tagstore.storage.generations import sync_directory

LEVEL = 3
"""Compression level of zstd; its bytes are the same on every processor for the same release of the library.
"""
MAX_WINDOW = 8 << 20
"""Bytes of memory that a frame may ask of its reader; what we write asks for 2 MiB."""
MAX_LINE = 16 << 20
"""Bytes of a line at most, its end included."""
PIECE = 1 << 20
"""Bytes read at a time."""

_BLOCK = 512
_END = bytes(2 * _BLOCK)


class ArchiveWriter:
    """Writes an archive, as a context manager; when that ends, the file gets its name, complete and durable.

    After an error there is no file. Raises `Busy` if another process is writing the same file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.sha256 = ""
        """sha256 of the file, hex, once it is complete."""
        self._temporary = self.path.with_name(f".{self.path.name}.partial")
        self._digest = sha256()

    def __enter__(self) -> ArchiveWriter:
        if self.path.is_dir():
            raise InvalidInput(f"{self.path} is a directory: name the file to write")
        try:
            self._file = self._temporary.open("ab")
        except (FileNotFoundError, NotADirectoryError, PermissionError) as error:
            raise NotFound(f"cannot write {self.path}: {error.strerror}") from error
        if not _locked(self._file, self._temporary):
            self._file.close()
            raise Busy(
                f"{self.path} is being written by another process: wait for it to end, or name another file"
            )
        self._file.truncate(0)  # an export that was cut off may have left something
        self._compressor = zstandard.ZstdCompressor(level=LEVEL, write_checksum=True).compressobj()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._file:
            try:
                if kind is None:
                    self._write(_END)
                    self._store(self._compressor.flush())
                    self._file.flush()
                    os.fsync(self._file.fileno())
                    self._temporary.replace(self.path)
                    sync_directory(self.path.parent)
                    self.sha256 = self._digest.hexdigest()
            finally:
                if not self.sha256:
                    self._temporary.unlink(missing_ok=True)

    def put(self, name: str, size: int, pieces: Iterable[bytes]) -> None:
        """Add a member of `size` bytes. Raises `ValueError` if the pieces have another length."""
        self._write(_header(name, size))
        written = 0
        for piece in pieces:
            self._write(piece)
            written += len(piece)
        if written != size:
            raise ValueError(f"{name} has {written} bytes instead of {size}")
        self._write(bytes(-size % _BLOCK))

    def _write(self, data: bytes) -> None:
        self._store(self._compressor.compress(data))

    def _store(self, compressed: bytes) -> None:
        self._digest.update(compressed)
        self._file.write(compressed)


class ArchiveReader:
    """Reads an archive once, from its beginning to its end.

    Raises `Damaged` for missing or changed bytes, `InvalidInput` for an archive of another program.
    """

    def __init__(self, file: BinaryIO, name: str) -> None:
        self._name = name
        decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW)
        self._stream = decompressor.stream_reader(
            cast("IO[bytes]", _WithTail(file)), read_size=PIECE // 8, read_across_frames=True
        )

    def small(self, name: str, limit: int) -> bytes:
        """Read the next member, of any size up to `limit`."""
        size = self._next(name)
        if size > limit:
            raise InvalidInput(f"{self._name}: '{name}' says that it has {size} bytes, {limit} is the most")
        data = self.take(size)
        self._skip_padding(size)
        return data

    @contextmanager
    def member(self, name: str, size: int, digest: str) -> Iterator[Member]:
        """Open the next member as a stream, which must have this size and sha256 (hex).

        An `InvalidInput` raised in the context becomes `Damaged` if the member does not fit the digest.
        """
        actual = self._next(name)
        if actual != size:
            raise InvalidInput(f"{self._name}: '{name}' has {actual} bytes, its manifest says {size}")
        member = Member(self, f"{self._name}: {name}", size)
        try:
            yield member
        except InvalidInput:
            self._finish(member, digest)
            raise
        self._finish(member, digest)
        self._skip_padding(size)

    def end(self) -> None:
        """Check that nothing follows, and that the last frame is whole."""
        if self.take(len(_END)) != _END:
            raise InvalidInput(f"{self._name}: more follows where the archive should end")
        if self._read(2) != _WithTail.SIGN:
            raise Damaged(
                f"{self._name} does not end where it should: it is cut off, or something was added to it"
            )

    def _finish(self, member: Member, digest: str) -> None:
        while member.read(PIECE):
            pass
        if member.sha256.hexdigest() != digest:
            raise Damaged(
                f"{member.name} does not fit the checksum in the manifest: the file was changed or copied "
                "badly; get it again"
            )

    def _next(self, name: str) -> int:
        """Read the header of the next member, which must have this name; returns its size."""
        block = self.take(_BLOCK)
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "replace")
        except tarfile.HeaderError as error:
            raise Damaged(
                f"{self._name}: '{name}' should come next, but there is no header of a tar: {error}"
            ) from error
        if header.size < 0 or block != _header(name, header.size):
            raise InvalidInput(
                f"{self._name}: '{name}' should come next, but there is '{header.name[:100]}' of tar type "
                f"{header.type!r}, mode {header.mode:o}: this is no bundle, or somebody has packed it again"
            )
        return header.size

    def _skip_padding(self, size: int) -> None:
        if any(self.take(-size % _BLOCK)):
            raise InvalidInput(f"{self._name}: there is something between its members")

    def take(self, size: int) -> bytes:
        """Read the next `size` bytes."""
        data = self._read(size)
        if len(data) < size:
            raise Damaged(f"{self._name} ends too early: it is cut off; get it again")
        return data

    def _read(self, size: int) -> bytes:
        """Read `size` bytes, fewer only at the end."""
        pieces = []
        while size:
            try:
                piece = self._stream.read(min(size, PIECE))
            except zstandard.ZstdError as error:
                raise Damaged(
                    f"{self._name} cannot be decompressed: {error}. It is no bundle, or it is damaged: get "
                    "it again"
                ) from error
            if not piece:
                break
            pieces.append(piece)
            size -= len(piece)
        return b"".join(pieces)


class Member:
    """A member that is being read."""

    def __init__(self, archive: ArchiveReader, name: str, size: int) -> None:
        self._archive = archive
        self.name = name
        self.remaining = size
        self.sha256 = sha256()

    def read(self, size: int) -> bytes:
        """Read `size` bytes, fewer only at the member's end."""
        data = self._archive.take(min(size, self.remaining))
        self.remaining -= len(data)
        self.sha256.update(data)
        return data

    def lines(self) -> Iterator[bytes]:
        """Yield the lines, without their ends. Raises `InvalidInput` for more than `MAX_LINE` bytes."""
        rest = b""
        while data := self.read(PIECE):
            *lines, rest = (rest + data).split(b"\n")
            if max(map(len, (*lines, rest))) >= MAX_LINE:  # with its end
                raise InvalidInput(f"{self.name} has a line of more than {MAX_LINE} bytes")
            yield from lines
        if rest:
            raise InvalidInput(f"{self.name} does not end with the end of a line")


class _WithTail:
    """A file followed by a frame of one byte: reading that byte proves that the file was complete."""

    SIGN = b"."

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._tail = zstandard.ZstdCompressor().compress(self.SIGN)

    def read(self, size: int) -> bytes:
        data = self._file.read(size)
        if not data:
            data, self._tail = self._tail, b""
        return data


def _header(name: str, size: int) -> bytes:
    member = tarfile.TarInfo(name)
    member.size = size
    return member.tobuf(tarfile.GNU_FORMAT)  # the older format ends at 8 GiB


def _locked(file: BinaryIO, path: Path) -> bool:
    """Lock an open file; false if another process has the lock, or has just renamed the file."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except (BlockingIOError, FileNotFoundError):
        return False
