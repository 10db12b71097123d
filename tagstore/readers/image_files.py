"""Images that records name: a file, a member of a tar, or base64.

Every path that a record gives passes one guard.
"""

from __future__ import annotations

import base64
import io
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tagstore.errors import InvalidInput, NotFound
from tagstore.readers.values import RecordError

IMAGE_SUFFIXES = frozenset({
    "jpg", "jpeg", "jpe", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "heic", "heif",
    "jp2", "jxl", "svg", "cr2", "nef", "arw", "dng", "psd", "ico",
})  # fmt: skip
"""Endings of files that are pictures. Some cannot be decoded; their pairs are refused for that reason, and
not as if there were no picture."""
MAX_IMAGE_BYTES = 256 * 2**20


@dataclass(frozen=True, slots=True)
class Place:
    """Bytes in a file: a whole one, or a member of a tar."""

    path: Path
    offset: int = 0
    length: int = -1
    """Bytes from `offset` on; -1 for all that follow."""
    folder: Path | None = None
    """Folder that the file must lie in after links are followed; None for anywhere."""

    def read(self) -> bytes:
        """Read the bytes.

        Raises `NotFound` if they are not there, `InvalidInput` if a link leads out of `folder`.
        """
        try:
            if self.folder is not None:
                check_links(self.path, self.folder)
            with self.path.open("rb") as file:
                file.seek(self.offset)
                data = file.read(self.length)
        except RecordError as error:
            raise InvalidInput(str(error)) from None
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise NotFound(f"cannot read {self.path}: {reason}") from error
        if self.length >= 0 and len(data) < self.length:
            end = self.offset + self.length
            raise NotFound(f"{self.path} ends before byte {end}: it was changed or cut since it was indexed")
        return data


@dataclass(frozen=True, slots=True)
class Embedded(Place):
    """An image that stands in a record, or in a compressed shard, of the file `path`; its bytes are here."""

    data: bytes = b""

    def read(self) -> bytes:
        """The bytes."""
        return self.data


def path_inside(name: str, folder: Path, *, allow_outside: bool = False) -> Path:
    """The file that a record names, below `folder`; raises `RecordError` if the path leads out of it.

    Only the path is looked at, not the disk: `check_links` follows the links.
    """
    if allow_outside:
        return folder / name
    relative = os.path.normpath(name)
    if os.path.isabs(name):
        relative = os.path.relpath(_real(name), _real(folder))
    if relative.split(os.sep)[0] == os.pardir:
        raise _leads_out(name)
    return folder / relative


def check_links(path: Path, folder: Path) -> None:
    """Raise `RecordError` if the file, with all links followed, lies outside the folder."""
    home = _real(folder)
    if os.path.commonpath((_real(path), home)) != home:
        raise _leads_out(str(path))


def _real(path: str | Path) -> str:
    try:
        return os.path.realpath(path)
    except ValueError as error:
        raise RecordError(f"the image's path cannot be used: {error}") from None


def _leads_out(path: str) -> RecordError:
    return RecordError(
        f"the image's path leads out of the folder of the images: {path[-80:]}, allow it with "
        "--allow-outside (in a recipe data.allow_outside) if you trust it"
    )


def fetch(path: Path, limit: int) -> bytes:
    """Read a regular file of at most `limit` bytes; anything else is a `RecordError`."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for ever
            raise RecordError(f"not a regular file: {path.name}")
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except FileNotFoundError:
        raise RecordError(f"a file is missing: {path.name}") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RecordError(f"a file cannot be read: {path.name} ({reason})") from None
    check_size(len(data), limit, path.name)
    return data


def fetch_inside(name: str, folder: Path, limit: int, *, allow_outside: bool) -> bytes:
    """Read the image that a record names by a path relative to `folder`."""
    path = path_inside(name, folder, allow_outside=allow_outside)
    if not allow_outside:
        check_links(path, folder)
    return fetch(path, limit)


def usable_path(name: str, folder: Path, root: Path) -> str:
    """The path that a record means, where it is not written as this machine writes paths.

    Backslashes become slashes, and a path that begins at the root of the data set ("/images/1.jpg") is taken
    from there, if nothing is where the path as written leads.
    """
    if os.path.exists(os.path.join(folder, name)):
        return name
    if re.match(r"[A-Za-z]:[\\/]", name):
        raise RecordError(
            f"the image's path is one of another machine: {name[-80:]}, write it relative to the table's "
            "folder"
        )
    name = name.replace("\\", "/")
    if os.path.isabs(name) and os.path.exists(below := os.path.join(root, name.lstrip("/"))):
        return os.path.relpath(below, folder)
    return name


def check_size(size: int, limit: int, name: str) -> None:
    """Raise `RecordError` if a file of that name is too large."""
    if size > limit:
        raise RecordError(f"larger than the limit: {name} has more than {limit:,} bytes")


def key_of_path(path: str, folder: Path, root: Path) -> str:
    """The path without its extension, relative to the source; the path as written if it lies outside."""
    relative = os.path.relpath(os.path.join(folder, path), root)
    kept = path if relative.startswith("..") else relative
    return os.path.splitext(kept)[0].replace(os.sep, "/")


def image_value(image: Any) -> str | bytes:
    """The path, base64 or bytes in the image column of a table, also as Hugging Face's datasets write it."""
    if isinstance(image, Mapping) and ("bytes" in image or "path" in image):
        image = image["bytes"] if image.get("bytes") is not None else image.get("path")
    if image is None or image == "":
        raise RecordError("no image")
    if not isinstance(image, str | bytes):
        raise RecordError(f"the image is not a path, bytes or base64: it is of type {type(image).__name__}")
    if isinstance(image, str) and re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", image):
        raise RecordError(
            f"the image is a URL: {image[:80]}, download it first, with img2dataset for example"
        )
    return image


def is_base64(text: str, folder: Path) -> bool:
    """Whether an image column's text is the image itself and not a path."""
    # A path has a dot before its extension, base64 has none; a file named by its hash has none either, but
    # exists.
    if text.startswith("data:"):
        return True
    if len(text) < 64 or re.fullmatch(r"[A-Za-z0-9+/\s]+={0,2}\s*", text) is None:
        return False
    return len(text) > 4096 or not os.path.exists(os.path.join(folder, text))


def decoded(image: str | bytes, limit: int) -> bytes:
    """The bytes of an image that is given as bytes, as base64 or as a data URL."""
    if isinstance(image, str):
        encoded = image.partition(",")[2] if image.startswith("data:") else image
        try:
            image = base64.b64decode("".join(encoded.split()), validate=True)
        except ValueError as error:
            raise RecordError(f"the image is not valid base64: {error}") from None
    check_size(len(image), limit, "the image")
    return image


def png_of(image: Any) -> bytes:
    """A PIL image as PNG, which keeps its pixels as they are."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
