"""The images of a bundle, on demand: gathered from where they were ingested, and unpacked into a folder.

A store keeps no images, only their sha256; an image that does not fit it goes neither in nor out. In a bundle
and in a folder an image is named by its entry's id: no name that somebody chose becomes a path.
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
from tagstore.storage.snapshot import Snapshot
from tagstore.types import Entry
from tagstore.upkeep.reprocessing import originals

PAIRS = "pairs.jsonl"
COLUMNS = Columns(image="image", caption="caption", key="key")


class GatheredImages:
    """The images of a version, as a context manager: gathered in an unnamed file, in the order of the
    sources.
    """

    def __init__(self, snapshot: Snapshot, sources: Sequence[str], directory: Path) -> None:
        self._ids = snapshot.live()
        self._places = np.zeros((len(self._ids), 2), np.int64)
        with ExitStack() as stack:
            self._file = stack.enter_context(tempfile.TemporaryFile(dir=directory))
            for entry, image in originals(snapshot, sources):
                self._places[np.searchsorted(self._ids, entry.entry_id)] = self._file.tell(), len(image)
                self._file.write(image)
            stack.pop_all()

    def __enter__(self) -> GatheredImages:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    @property
    def size(self) -> int:
        """Bytes of all images."""
        return int(self._places[:, 1].sum())

    def __iter__(self) -> Iterator[tuple[str, bytes]]:
        """Yield the name in the archive and the bytes of each image, ids ascending."""
        for entry_id, (offset, size) in zip(self._ids.tolist(), self._places.tolist(), strict=True):
            self._file.seek(offset)
            yield member_name(entry_id), self._file.read(size)


def member_name(entry_id: int) -> str:
    """The name of an entry's image in an archive."""
    return f"images/{entry_id}"


class ImageFolder:
    """Writes a folder of `ID.jpg` and so on, and `pairs.jsonl`, which `ingest` and `reembed` read."""

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
        """Make the folder durable and give it its name."""
        self._pairs.close()
        os.sync()  # one call: syncing files one by one would take longer than everything else
        if self.path.exists():
            self.path.rmdir()  # it is empty
        self.partial.rename(self.path)

    def source(self) -> dict[str, Any]:
        """The folder as the source that a store records."""
        return {
            "path": os.path.abspath(self.path / PAIRS),
            "format": "jsonl",
            "columns": asdict(COLUMNS),
            "allow_outside": False,
        }

    def close(self) -> None:
        """Remove the folder if it was not finished."""
        self._pairs.close()
        shutil.rmtree(self.partial, ignore_errors=True)


@contextmanager
def image_folder(path: str | Path | None, info: BundleInfo) -> Iterator[ImageFolder | None]:
    """The folder to unpack images to, or None without a path; an unfinished one is removed at the end.

    Raises `InvalidInput` if the bundle has no images, `AlreadyExists` if something is in the folder,
    `NotFound` if its parent is not there.
    """
    if path is None:
        yield None
        return
    path = Path(path)
    if not info.images:
        raise InvalidInput(
            "the bundle holds no images: import it without asking for them, or get one that was exported "
            "with images"
        )
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise AlreadyExists(f"{path} is there already: name a new or an empty folder for the images")
    partial = path.with_name(f".{path.name}.partial")
    if not path.parent.is_dir():
        raise NotFound(f"there is no folder {path.parent} to make {path.name} in")
    shutil.rmtree(partial, ignore_errors=True)  # of an import that was cut off
    partial.mkdir()
    folder = ImageFolder(path)
    try:
        yield folder
    finally:
        folder.close()


def unpack(
    archive: ArchiveReader, info: BundleInfo, entries: Iterator[Entry], folder: ImageFolder | None
) -> None:
    """Read and check the images of a bundle; write them to the folder, if any."""
    remaining = info.image_bytes
    for entry in entries if info.images else ():
        image = archive.small(member_name(entry.entry_id), min(remaining, MAX_IMAGE_BYTES))
        remaining -= len(image)
        if sha256(image).digest() != entry.sha256:
            raise Damaged(
                f"the image of entry {entry.entry_id} ({entry.key[:100]}) is not the one that was ingested: "
                "get the bundle again"
            )
        if folder:
            folder.put(entry, image)
    if remaining:
        raise InvalidInput(
            f"the images have {info.image_bytes - remaining} bytes in all, the manifest says "
            f"{info.image_bytes}"
        )
