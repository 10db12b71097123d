"""A folder of images, each with a text file of the same name: every line that isn't empty is a caption."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from tagstore.readers.image_files import IMAGE_SUFFIXES, fetch, key_of_path
from tagstore.readers.records import Options
from tagstore.readers.values import MAX_TEXT_BYTES, RecordError, caption_lines, caption_texts, rejected
from tagstore.types import Pair, Rejected


def read_folder(folder: Path, options: Options) -> Iterator[Pair | Rejected]:
    """Read the folder and all folders within, in the order of names, holding one folder's names at a time.

    Links are followed, except one that leads back to a folder it lies in.
    """
    for inner, entries in _walk(folder, (os.path.realpath(folder),)):
        if isinstance(entries, str):
            yield rejected(os.path.relpath(inner, options.root).replace(os.sep, "/"), entries, str(inner))
            continue
        for stem, group in groupby(sorted(map(os.path.splitext, entries)), lambda split: split[0]):
            names = [stem + suffix for _, suffix in group]
            yield from _pairs_of(
                inner, [name for name in names if _suffix(name) in IMAGE_SUFFIXES], names, options
            )


def has_images(folder: Path) -> bool:
    """Whether there is an image in the folder or anywhere within."""
    listings = (
        names for _, names in _walk(folder, (os.path.realpath(folder),)) if not isinstance(names, str)
    )
    return any(_suffix(name) in IMAGE_SUFFIXES for names in listings for name in names)


def _walk(folder: Path, above: tuple[str, ...]) -> Iterator[tuple[Path, list[str] | str]]:
    """Every folder with the names of its files, or with the reason why it isn't entered.

    Hidden ones are left out.
    """
    files: list[str] = []
    folders: list[str] = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if not entry.name.startswith("."):
                    (folders if entry.is_dir() else files).append(entry.name)
    except OSError as error:
        yield folder, f"a folder cannot be read: {error.strerror}"
        return
    yield folder, files
    for name in sorted(folders):
        real = os.path.realpath(folder / name)
        if real in above:
            yield folder / name, "a link leads back to a folder that it lies in"
        else:
            yield from _walk(folder / name, (*above, real))


def _pairs_of(
    folder: Path, images: list[str], names: list[str], options: Options
) -> Iterator[Pair | Rejected]:
    """The pairs, and rejections, of the files that share a stem."""
    captions = next((name for name in names if _suffix(name) == "txt"), None)
    if not images and captions is not None:
        path = folder / captions
        yield rejected(
            key_of_path(captions, folder, options.root), "no image: a caption file stands alone", str(path)
        )
    for image in images:
        path, key = folder / image, key_of_path(image, folder, options.root)
        try:
            if image != images[0]:
                raise RecordError(
                    f"two images have the same key: {images[0]} is used, {image} is not, rename one"
                )
            lines: list[str] = []
            if captions is not None:
                lines = caption_lines(fetch(folder / captions, MAX_TEXT_BYTES), captions)
            elif options.layout.caption_from == "folder":
                lines = [re.sub(r"[_\W]+", " ", folder.name)]
            elif not options.captions_optional:
                raise RecordError(
                    "no caption file: a .txt of the image's name is expected; give a table of images and "
                    "captions (CSV, JSON ...) as the source itself, or say --caption-from folder"
                )
            texts = caption_texts([lines], optional=options.captions_optional)
            key.encode()
            yield Pair(key, fetch(path, options.max_image_bytes), texts, {}, str(path))
        except RecordError as error:
            yield rejected(key, str(error), str(path))
        except UnicodeEncodeError:
            yield rejected(key, "not UTF-8: the file's name, rename it", str(path))


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1][1:].lower()
