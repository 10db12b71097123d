"""The images of a bundle, for those who ask for them: from where they were ingested into it, and out of it into a folder.

A store keeps no images, only their sha256; nothing goes in or out that does not fit it. In a bundle an image is called by its entry's
id, and so it is in the folder: no name that somebody chose becomes a path.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from tagstore.bundles.archive import ArchiveReader
from tagstore.bundles.manifest import BundleInfo
from tagstore.encoding.images import suffix_of
from tagstore.errors import AlreadyExists, Damaged, InvalidInput, NotFound
from tagstore.readers import MAX_IMAGE_BYTES, Columns
from tagstore.storage.store import Snapshot
from tagstore.types import Entry
from tagstore.upkeep.edits import originals

PAIRS = "pairs.jsonl"
COLUMNS = Columns(image="image", caption="caption", key="key")


class Pictures:
    """The images of a version, as a context manager: gathered in a file without a name, since sources have an order of their own."""

    def __init__(self, snapshot: Snapshot, sources: Sequence[str], directory: Path) -> None:
        self._ids = snapshot.live()
        self._places = np.zeros((len(self._ids), 2), np.int64)
        with ExitStack() as stack:
            self._file = stack.enter_context(tempfile.TemporaryFile(dir=directory))
            for entry, image in originals(snapshot, sources):
                self._places[np.searchsorted(self._ids, entry.entry_id)] = self._file.tell(), len(image)
                self._file.write(image)
            stack.pop_all()

    def __enter__(self) -> Pictures:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    @property
    def size(self) -> int:
        """Bytes of all of them."""
        return int(self._places[:, 1].sum())

    def __iter__(self) -> Iterator[tuple[str, bytes]]:
        """Name in the archive and bytes of each, ids ascending."""
        for entry_id, (at, size) in zip(self._ids.tolist(), self._places.tolist(), strict=True):
            self._file.seek(at)
            yield member_name(entry_id), self._file.read(size)


def member_name(entry_id: int) -> str:
    """What the image of an entry is called in an archive."""
    return f"images/{entry_id}"


class Folder:
    """A folder in the making: `DIR/ID.jpg` and so on, and `DIR/pairs.jsonl`, which `ingest` and `reembed --source` read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.partial = path.with_name(f".{path.name}.partial")
        self._pairs = (self.partial / PAIRS).open("w", encoding="utf-8")

    def put(self, entry: Entry, image: bytes) -> None:
        """Write one image and its line."""
        name = f"{entry.entry_id}.{suffix_of(image)}"
        (self.partial / name).write_bytes(image)
        line = {**entry.metadata, "key": entry.key, "image": name, "caption": entry.captions}
        self._pairs.write(json.dumps(line, ensure_ascii=False) + "\n")

    def finish(self) -> None:
        """Make it durable and give it its name."""
        self._pairs.close()
        os.sync()  # one call, where syncing files one by one would take longer than everything else
        if self.path.exists():
            self.path.rmdir()  # it is empty
        self.partial.rename(self.path)

    def source(self) -> dict[str, Any]:
        """How a store says that it can be read."""
        return {
            "path": os.path.abspath(self.path / PAIRS),
            "format": "jsonl",
            "columns": asdict(COLUMNS),
            "allow_outside": False,
        }

    def close(self) -> None:
        """Remove what was not finished."""
        self._pairs.close()
        shutil.rmtree(self.partial, ignore_errors=True)


@contextmanager
def folder(path: str | Path | None, info: BundleInfo) -> Iterator[Folder | None]:
    """The folder to unpack images to, or None if they are not asked for; what is not finished is removed at the end.

    Raises `InvalidInput` if the bundle has none, `AlreadyExists` if something is there, `NotFound` if nothing can be made there.
    """
    if path is None:
        yield None
        return
    path = Path(path)
    if not info.images:
        raise InvalidInput(
            "the bundle holds no images: import it without asking for them, or get one that was exported with images"
        )
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise AlreadyExists(f"{path} is there already: name a new or an empty folder for the images")
    partial = path.with_name(f".{path.name}.partial")
    if not path.parent.is_dir():
        raise NotFound(f"there is no folder {path.parent} to make {path.name} in")
    shutil.rmtree(partial, ignore_errors=True)  # of an import that was cut off
    partial.mkdir()
    made = Folder(path)
    try:
        yield made
    finally:
        made.close()


def unpack(archive: ArchiveReader, info: BundleInfo, entries: Iterator[Entry], to: Folder | None) -> None:
    """Read and check the images of a bundle, and write them to a folder if there is one."""
    left = info.image_bytes
    for entry in entries if info.images else ():
        image = archive.small(member_name(entry.entry_id), min(left, MAX_IMAGE_BYTES))
        left -= len(image)
        if sha256(image).digest() != entry.sha256:
            raise Damaged(
                f"the image of entry {entry.entry_id} ({entry.key[:100]}) is not the one that was ingested: get the bundle again"
            )
        if to:
            to.put(entry, image)
    if left:
        raise InvalidInput(
            f"the images have {info.image_bytes - left} bytes in all, the manifest says {info.image_bytes}"
        )
