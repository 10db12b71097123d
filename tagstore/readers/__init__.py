"""Sources of pairs: folders, tables and shards, read as streams. Images are fetched here and decoded later.

source ──sources──▶ format and files ──folder | tables | parquet | webdataset──▶ records ──▶ Pair or Rejected

`tagstore.readers.samples` reads what a model is trained on. Importing either loads neither torch nor pyarrow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tagstore.errors import InvalidInput
from tagstore.readers.arrow import read_arrow
from tagstore.readers.folder import read_folder
from tagstore.readers.image_files import MAX_IMAGE_BYTES
from tagstore.readers.json_files import read_json
from tagstore.readers.merging import rows_together
from tagstore.readers.parquet import read_parquet
from tagstore.readers.records import Columns, Layout, Options, UnknownColumn
from tagstore.readers.sources import FORMATS, detect_format, locate
from tagstore.readers.tables import read_csv, read_jsonl, read_tsv
from tagstore.readers.values import rejected
from tagstore.readers.webdataset import read_webdataset
from tagstore.types import Pair, Rejected

__all__ = ["FORMATS", "MAX_IMAGE_BYTES", "Columns", "Layout", "detect_format", "read", "read_files"]

_READERS: dict[str, Callable[[Path, Options], Iterator[Pair | Rejected]]] = {
    "folder": read_folder,
    "csv": read_csv,
    "tsv": read_tsv,
    "jsonl": read_jsonl,
    "json": read_json,
    "parquet": read_parquet,
    "arrow": read_arrow,
    "webdataset": read_webdataset,
}

_TABLES = ("csv", "tsv", "jsonl", "json", "parquet", "arrow")


def read(
    source: str,
    *,
    format: str | None = None,
    columns: Columns = Columns(),  # noqa: B008  frozen
    max_image_bytes: int = MAX_IMAGE_BYTES,
    allow_outside: bool = False,
    captions_optional: bool = False,
    images: str | Path | None = None,
    layout: Layout = Layout(),  # noqa: B008  frozen
) -> Iterator[Pair | Rejected]:
    """Read the pairs of a source, always in the same order, with memory that does not grow with the source.

    `source` is a folder, a file or a pattern (`train-{000..005}.tar`, `data/*.parquet`). The key of a pair is
    its `key` or `id` column; without one it is the image's path without extension relative to the source, the
    stem of a shard's member, or `FILE:ROW` for embedded images. Rows of a table that follow one another and
    have the same key and image are one pair with all their captions. Other keys are not compared here, which
    would take memory for all of them. Image paths in tables are relative to the table's folder, or to
    `images`; only `allow_outside` lets them leave it.

    A pair has a caption, unless `captions_optional`. A record that cannot be used is yielded as `Rejected`,
    and reading continues. Raises `NotFound` or `InvalidInput`, at the call where possible, if the whole
    source cannot be used: nothing there, an unknown format or column, or no readable file.
    """
    located = locate(source, format)
    if located.format == "folder" and columns != Columns():
        raise InvalidInput(f"{source}: a folder of images has no columns to name")
    options = Options(
        located.root,
        columns,
        max_image_bytes,
        allow_outside,
        None if images is None else Path(images),
        layout,
        captions_optional,
    )
    read_file = _READERS[located.format]
    if located.format not in _TABLES:
        return read_files(source, located.files, lambda file: read_file(file, options))
    return read_files(source, located.files, lambda file: rows_together(read_file(file, options)))


def read_files(
    source: str, files: Sequence[Path], read_file: Callable[[Path], Iterator[Pair | Rejected]]
) -> Iterator[Pair | Rejected]:
    """Read the files of a source in turn; one that cannot be used, among others that can, is a `Rejected`."""
    count = failed = 0
    for file in files:
        try:
            for item in read_file(file):
                count += 1
                yield item
        except InvalidInput as error:
            failed += 1
            # If no file is good, or the first good one lacks a column, the source or the options are wrong.
            if failed == len(files) or (isinstance(error, UnknownColumn) and not count):
                raise
            yield rejected(file.name, str(error).removeprefix(f"{file}: "), str(file))
    if not count:
        raise InvalidInput(f"{source}: no pair in it")
