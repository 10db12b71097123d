"""One record of a source -> a pair, whatever the format: which columns, which bytes, which captions, which key."""

from __future__ import annotations

import base64
import math
import os
import re
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tagstore.errors import InvalidInput
from tagstore.types import Pair, Rejected

MAX_IMAGE_BYTES = 256 * 2**20
MAX_DEPTH = 32
MAX_TEXT_BYTES = 16 * 2**20
"""Of a caption file or a shard's json: more than that is no caption."""

IMAGE_SUFFIXES = frozenset({"jpg", "jpeg", "jpe", "png", "webp", "gif", "bmp", "tif", "tiff"})

# Tried in this order, in any case; all names of the first group of captions that is there are taken.
_IMAGE_NAMES = (
    "image",
    "image_path",
    "file",
    "filename",
    "file_name",
    "filepath",
    "file_path",
    "path",
    "img",
)
_CAPTION_NAMES = (
    ("caption", "captions"),
    ("text", "texts"),
    ("title", "titles"),
    ("description", "descriptions"),
    ("sentence", "sentences"),
)
_KEY_NAMES = ("key", "id")


@dataclass(frozen=True, slots=True)
class Columns:
    """Which columns (fields) of a source hold what; what is left out is found by the usual names."""

    image: str | None = None
    """A path relative to the source's file, encoded bytes, `{"bytes", "path"}` or base64."""
    caption: str | Sequence[str] = ()
    """One or several columns; each holds a text or a list of texts."""
    key: str | None = None

    @property
    def captions(self) -> tuple[str, ...]:
        return (self.caption,) if isinstance(self.caption, str) else tuple(self.caption)


@dataclass(frozen=True, slots=True)
class Options:
    """What all formats share."""

    root: Path
    """The folder that keys are relative to."""
    columns: Columns = Columns()
    max_image_bytes: int = MAX_IMAGE_BYTES
    allow_outside: bool = False


class UnknownColumn(InvalidInput):
    """The options, not the data, are wrong."""


class RecordError(Exception):
    """Why this one record cannot be used; ends as its `Rejected`.

    What stands before the first colon is the same for all records of that trouble, so that rejections can be counted by it.
    """


@dataclass(frozen=True, slots=True)
class Chosen:
    """The columns of a table, found."""

    image: str
    captions: tuple[str, ...]
    key: str | None


def choose(columns: Columns, names: Iterable[str], where: str) -> Chosen:
    """Find the columns among `names`. Raises `UnknownColumn` with the names that are there."""
    names = list(names)
    lowered = {name.lower(): name for name in reversed(names)}
    for asked in (columns.image, columns.key, *columns.captions):
        if asked is not None and asked not in names:
            raise UnknownColumn(f"{where}: no column '{asked}'; there are: {_listed(names)}")
    image = columns.image or next((lowered[name] for name in _IMAGE_NAMES if name in lowered), None)
    if image is None:
        hint = (
            " (a set of URLs has to be downloaded first, with img2dataset for example)"
            if "url" in lowered
            else ""
        )
        raise UnknownColumn(
            f"{where}: which column holds the image? There are: {_listed(names)}{hint}. Name it with --image-column"
        )
    captions = columns.captions or default_captions(names)
    if not captions:
        raise UnknownColumn(
            f"{where}: which column holds the caption? There are: {_listed(names)}. Name it with --caption-column"
        )
    return Chosen(
        image, captions, columns.key or next((lowered[name] for name in _KEY_NAMES if name in lowered), None)
    )


def default_captions(names: Iterable[str]) -> tuple[str, ...]:
    """The columns that hold captions by their usual names; empty if none does."""
    lowered = {name.lower(): name for name in names}
    return next(
        (
            found
            for group in _CAPTION_NAMES
            if (found := tuple(lowered[name] for name in group if name in lowered))
        ),
        (),
    )


def row_to_pair(
    row: Mapping[str, Any], chosen: Chosen, file: Path, number: int, options: Options
) -> Pair | Rejected:
    """A row of a table (csv, json lines, parquet) as a pair; `number` counts from 1 and is what messages and keyless rows are called by."""
    origin = f"{file}:{number}"
    key = f"{key_of_path(file.name, file.parent, options.root)}:{number}"
    try:
        if chosen.key is not None:
            key = key_in(row.get(chosen.key), chosen.key)
        image = _unwrapped(row.get(chosen.image))
        path = image if isinstance(image, str) and not _is_embedded(image, file.parent) else None
        if chosen.key is None and path is not None:
            key = key_of_path(path, file.parent, options.root)
        captions = caption_texts(row.get(name) for name in chosen.captions)
        data = (
            _embedded(image, options.max_image_bytes)
            if path is None
            else _fetch_inside(path, file.parent, options)
        )
        return Pair(
            key, data, captions, metadata_of(row, {chosen.image, chosen.key, *chosen.captions}), origin
        )
    except RecordError as error:
        return rejected(key, str(error), origin)


def caption_texts(values: Iterable[Any]) -> tuple[str, ...]:
    """All captions in texts and lists of texts, stripped, each once, in order. Raises `RecordError` if none is left."""
    captions: dict[str, None] = {}
    for value in values:
        for text in value if isinstance(value, list | tuple) else (value,):
            if text is None:
                continue
            if not isinstance(text, str):
                raise RecordError(f"a caption is not a text: it is of type {type(text).__name__}")
            if not _is_unicode(text):
                raise RecordError("not UTF-8: a caption holds half a surrogate pair, which is no character")
            if text := text.strip():
                captions[text] = None
    if not captions:
        raise RecordError("no caption")
    return tuple(captions)


def caption_lines(data: bytes, name: str) -> list[str]:
    """The lines of a caption file. Raises `RecordError` if it isn't UTF-8."""
    try:
        return data.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise RecordError(
            f"not UTF-8: {name} has byte 0x{data[error.start]:02x} at offset {error.start}, convert it"
        ) from None


def rejected(key: str, reason: str, origin: str) -> Rejected:
    """A rejection whose texts are sound, whatever it was that made them unsound."""
    return Rejected(json_value(key), json_value(reason), json_value(origin))


def fetch(path: Path, limit: int) -> bytes:
    """The bytes of a file. Raises `RecordError` if it is missing, unreadable, larger than `limit` or no regular file."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for ever
            raise RecordError(f"not a regular file: {path.name}")
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except (OSError, ValueError) as error:
        if isinstance(error, FileNotFoundError):
            raise RecordError(f"a file is missing: {path.name}") from None
        raise RecordError(
            f"a file cannot be read: {path.name} ({getattr(error, 'strerror', None) or error})"
        ) from None
    check_size(len(data), limit, path.name)
    return data


def check_size(size: int, limit: int, name: str) -> None:
    if size > limit:
        raise RecordError(f"larger than the limit: {name} has more than {limit:,} bytes")


def key_of_path(path: str, folder: Path, root: Path) -> str:
    """The path without its extension, relative to the source; the path as written if it lies outside."""
    relative = os.path.relpath(os.path.join(folder, path), root)
    kept = path if relative.startswith("..") else relative
    return os.path.splitext(kept)[0].replace(os.sep, "/")


def metadata_of(row: Mapping[str, Any], without: Iterable[str | None] = ()) -> dict[str, Any]:
    """The other columns as JSON values; bytes (further images, embeddings) are left out."""
    skipped = set(without)
    return {
        name: json_value(value)
        for name, value in row.items()
        if name not in skipped and not isinstance(value, bytes)
    }


def json_value(value: Any, depth: int = 0) -> Any:
    """A value that JSON and UTF-8 can hold: NaN and infinity become null, dates and other types their text. Raises `RecordError`."""
    if depth > MAX_DEPTH:
        raise RecordError(f"nested too deeply: metadata of more than {MAX_DEPTH} levels")
    match value:
        case None | bool() | int():
            return value
        case float():
            return value if math.isfinite(value) else None
        case str():
            return value if _is_unicode(value) else value.encode("utf-8", "replace").decode()
        case Mapping():
            return {
                str(name): json_value(item, depth + 1)
                for name, item in value.items()
                if not isinstance(item, bytes)
            }
        case list() | tuple():
            return [json_value(item, depth + 1) for item in value if not isinstance(item, bytes)]
    return str(value)


def _unwrapped(image: Any) -> str | bytes:
    """The path, base64 or bytes of an image column's value."""
    if isinstance(image, Mapping) and (
        "bytes" in image or "path" in image
    ):  # as Hugging Face's datasets write images
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


def _is_embedded(text: str, folder: Path) -> bool:
    # A path to an image has a dot before its extension, base64 has none; a file named by its hash has none either, but it is there.
    if text.startswith("data:"):
        return True
    if len(text) < 64 or re.fullmatch(r"[A-Za-z0-9+/\s]+={0,2}\s*", text) is None:
        return False
    return len(text) > 4096 or not os.path.exists(os.path.join(folder, text))


def _embedded(image: str | bytes, limit: int) -> bytes:
    if isinstance(image, str):
        encoded = image.partition(",")[2] if image.startswith("data:") else image
        try:
            image = base64.b64decode("".join(encoded.split()), validate=True)
        except ValueError as error:
            raise RecordError(f"the image is not valid base64: {error}") from None
    check_size(len(image), limit, "the image")
    return image


def _fetch_inside(path: str, folder: Path, options: Options) -> bytes:
    try:
        target, home = os.path.realpath(os.path.join(folder, path)), os.path.realpath(folder)
    except ValueError as error:
        raise RecordError(f"the image's path cannot be used: {error}") from None
    if not options.allow_outside and os.path.commonpath((target, home)) != home:
        raise RecordError(
            f"the image's path leads out of the source's folder: {path[:80]}, allow it with --allow-outside if you trust it"
        )
    return fetch(Path(target), options.max_image_bytes)


def key_in(value: Any, column: str) -> str:
    """The key that a column gives. Raises `RecordError` if it gives none."""
    if value is None or value == "":
        raise RecordError(f"no key: column '{column}' is empty")
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise RecordError(
            f"the key is not a text or an integer: column '{column}' is of type {type(value).__name__}"
        )
    if not _is_unicode(key := str(value)):
        raise RecordError(f"not UTF-8: the key in column '{column}'")
    return key


def _is_unicode(text: str) -> bool:
    """No lone surrogates: neither UTF-8 nor protobuf can hold them."""
    return text.isascii() or not re.search("[\ud800-\udfff]", text)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:40]) + (", …" if len(names) > 40 else "") if names else "none"
