"""A row of a table -> a pair, whatever the format: which columns hold the image, the captions and the key."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tagstore.errors import InvalidInput
from tagstore.readers.image_files import (
    MAX_IMAGE_BYTES,
    decoded,
    fetch_inside,
    image_value,
    is_base64,
    key_of_path,
    usable_path,
)
from tagstore.readers.values import RecordError, caption_texts, key_in, metadata_of, rejected
from tagstore.types import Pair, Rejected

# Tried in this order, in upper or lower case. Of the captions, all names of the first group that is there are
# used.
KEY_NAMES = ("key", "id")
IMAGE_NAMES = ("image", "image_path", "file", "filename", "file_name", "filepath", "file_path", "path", "img")
_CAPTION_NAMES = (
    ("caption", "captions"),
    ("text", "texts"),
    ("title", "titles"),
    ("description", "descriptions"),
    ("sentence", "sentences"),
)


@dataclass(frozen=True, slots=True)
class Columns:
    """The columns (fields) of a source; one that is not given is found by the usual names."""

    image: str | None = None
    """A path relative to the source's file, encoded bytes, `{"bytes", "path"}` or base64."""
    caption: str | Sequence[str] = ()
    """One or several columns; each holds a text or a list of texts."""
    key: str | None = None

    @property
    def captions(self) -> tuple[str, ...]:
        return (self.caption,) if isinstance(self.caption, str) else tuple(self.caption)


@dataclass(frozen=True, slots=True)
class Layout:
    """How a source is written, where looking at it does not tell."""

    delimiter: str = ""
    """Between the fields of a CSV; found by looking at its first line if empty."""
    encoding: str = ""
    """Of a table of text; UTF-8 if empty."""
    caption_from: Literal["", "folder"] = ""
    """`folder`: of a picture without a caption file, its folder's name is the caption."""


@dataclass(frozen=True, slots=True)
class Options:
    """Options that all formats share."""

    root: Path
    """The folder that keys are relative to."""
    columns: Columns = Columns()
    max_image_bytes: int = MAX_IMAGE_BYTES
    allow_outside: bool = False
    images: Path | None = None
    """The folder that paths of images are relative to, and may not leave; the source file's own if None."""
    layout: Layout = Layout()
    captions_optional: bool = False
    """Whether a pair without a caption is one too: a miner of pictures needs none."""


class UnknownColumn(InvalidInput):
    """A column that the options name, or that every table needs, does not exist."""


@dataclass(frozen=True, slots=True)
class ChosenColumns:
    """The columns of a table that are read."""

    image: str
    captions: tuple[str, ...]
    key: str | None


def choose_columns(options: Options, names: Iterable[str], where: str) -> ChosenColumns:
    """Choose among the `names` of a table. Raises `UnknownColumn` with the names that are there."""
    names, columns = list(names), options.columns
    for wanted in (columns.image, columns.key, *columns.captions):
        if wanted is not None and wanted not in names:
            raise UnknownColumn(f"{where}: no column '{wanted}'; there are: {_listed(names)}")
    image = columns.image or usual_column(names, IMAGE_NAMES)
    if image is None:
        hint = (
            " (a set of URLs has to be downloaded first, with img2dataset for example)"
            if usual_column(names, ("url",))
            else ""
        )
        raise UnknownColumn(
            f"{where}: which column holds the image? There are: {_listed(names)}{hint}. "
            "Name it with --image-column"
        )
    captions = columns.captions or default_captions(names)
    if not captions and not options.captions_optional:
        raise UnknownColumn(
            f"{where}: which column holds the caption? There are: {_listed(names)}. "
            "Name it with --caption-column"
        )
    return ChosenColumns(image, captions, columns.key or usual_column(names, KEY_NAMES))


def usual_column(names: Iterable[str], usual: Iterable[str]) -> str | None:
    """The first of the `usual` names that is among `names`, in any case; None if none is."""
    lowered = {name.lower(): name for name in reversed(list(names))}
    return next((lowered[name] for name in usual if name in lowered), None)


def default_captions(names: Iterable[str]) -> tuple[str, ...]:
    """The columns that hold captions by their usual names; empty if none does."""
    lowered = {name.lower(): name for name in names}
    for group in _CAPTION_NAMES:
        if columns := tuple(lowered[name] for name in group if name in lowered):
            return columns
    return ()


def row_to_pair(
    row: Mapping[str, Any], chosen: ChosenColumns, file: Path, number: int, options: Options
) -> Pair | Rejected:
    """A row of a table (csv, json lines, parquet) as a pair.

    `number` counts rows from 1; messages, and keys of rows without one, name it.
    """
    origin = f"{file}:{number}"
    key = f"{key_of_path(file.name, file.parent, options.root)}:{number}"
    try:
        if chosen.key is not None:
            key = key_in(row.get(chosen.key), chosen.key)
        image = image_value(row.get(chosen.image))
        folder = options.images or file.parent
        path = image if isinstance(image, str) and not is_base64(image, folder) else None
        if path is not None:
            path = usable_path(path, folder, options.root)
        if chosen.key is None and path is not None:
            key = key_of_path(path, folder, folder if options.images else options.root)
        captions = caption_texts(
            (row.get(name) for name in chosen.captions), optional=options.captions_optional
        )
        limit = options.max_image_bytes
        if path is None:
            data = decoded(image, limit)
        else:
            data = fetch_inside(path, folder, limit, allow_outside=options.allow_outside)
        metadata = metadata_of(row, {chosen.image, chosen.key, *chosen.captions})
        return Pair(key, data, captions, metadata, origin)
    except RecordError as error:
        return rejected(key, str(error), origin)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:40]) + (", …" if len(names) > 40 else "") if names else "none"
