"""Find the files and the format of a source. An ambiguous one is an error that lists what it matches."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tagstore.errors import InvalidInput, NotFound
from tagstore.readers.arrow import saved_files
from tagstore.readers.folder import has_images
from tagstore.readers.image_files import IMAGE_SUFFIXES

FORMATS = ("folder", "csv", "tsv", "jsonl", "json", "parquet", "arrow", "webdataset")

SUFFIXES = {
    "csv": (".csv", ".csv.gz"),
    "tsv": (".tsv", ".tsv.gz"),
    "jsonl": (".jsonl", ".jsonl.gz", ".ndjson", ".ndjson.gz"),
    "json": (".json",),
    "parquet": (".parquet", ".pq"),
    "arrow": (".arrow",),
    "webdataset": (".tar", ".tar.gz", ".tgz"),
}
CAPTION_TABLES = ("captions.txt",)
"""Names under which tables of images and captions come that end as texts do."""
_MAX_EXPANDED = 1_000_000


@dataclass(frozen=True, slots=True)
class Located:
    """The files of a source."""

    format: str
    root: Path
    """The folder that keys are relative to.

    The folder given, the folder of the file, or the part of a pattern before its first wildcard.
    """
    files: tuple[Path, ...]
    """For format `folder` the folder itself."""


def detect_format(source: str) -> str:
    """The format of a source, one of `FORMATS`, found by looking.

    Raises `NotFound` or `InvalidInput` with what is there.
    """
    return locate(source).format


def locate(source: str, format: str | None = None) -> Located:
    """Find the files of a source: a folder, a file, or a pattern as a shell expands it, also `**`."""
    if format is not None and format not in FORMATS:
        raise InvalidInput(f"no format '{format}'; there are: {', '.join(FORMATS)}")
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", source):
        raise InvalidInput(f"{source}: sources are files and folders on this machine: download it first")
    path = Path(source)
    if os.path.isdir(path):
        return _locate_folder(path, format)
    if format == "folder":
        raise InvalidInput(f"{source}: no folder, which is what format 'folder' reads")
    if os.path.exists(path):
        return Located(format or _format_of([path]), path.parent, (path,))
    if not re.search(r"[*?\[{]", source):
        raise NotFound(f"{source}: no such file or folder")
    files = _expand(source)
    folders = [str(file) for file in files if file.is_dir()]
    if folders:
        raise InvalidInput(
            f"{source}: the pattern matches folders ({', '.join(folders[:3])}): "
            "give one folder, or a pattern of files"
        )
    return Located(format or _format_of(files), _fixed_part(source), tuple(files))


def _locate_folder(folder: Path, format: str | None) -> Located:
    saved = saved_files(folder) if format in (None, "arrow") else None
    if saved is not None:
        return Located("arrow", folder, tuple(saved))
    try:
        names = sorted(
            entry.name
            for entry in os.scandir(folder)
            if not entry.name.startswith(".") and not entry.is_dir()
        )
    except OSError as error:
        raise InvalidInput(f"{folder}: the folder cannot be read ({error.strerror})") from None
    tables = {
        kind: [folder / name for name in names if name.lower().endswith(suffixes)]
        for kind, suffixes in SUFFIXES.items()
        if format in (None, kind)
    }
    if format is None:  # beside other files, JSON describes; only alone it may be the source
        if any(map(_is_image, names)) or len(tables["json"]) != 1:
            tables["json"] = []
        tables["csv"] += [folder / name for name in names if name.lower() in CAPTION_TABLES]
    sources = {kind: files for kind, files in tables.items() if files}
    if "json" in sources and len(sources) > 1:
        del sources["json"]
    if format is not None and format != "folder":
        if not sources:
            raise NotFound(f"{folder}: no file of format {format} ({', '.join(SUFFIXES[format])}) in it")
        return Located(format, folder, tuple(sources[format]))
    if format == "folder":
        return Located(format, folder, (folder,))
    if "webdataset" in sources and "parquet" in sources:
        # img2dataset writes a table of the same name beside each shard.
        shards = {file.name.split(".")[0] for file in sources["webdataset"]}
        if all(file.name.split(".")[0] in shards for file in sources["parquet"]):
            del sources["parquet"]
    captioned = _captioned(names)
    if not sources and (captioned or has_images(folder)):
        return Located("folder", folder, (folder,))
    if not sources:
        raise NotFound(f"{folder}: no images, no tables ({', '.join(FORMATS[1:7])}) and no .tar shards in it")
    kind, files = next(iter(sources.items()))
    # Shards come in numbers; two tables of text are two different things until somebody says otherwise.
    if len(sources) > 1 or captioned or (len(files) > 1 and kind not in ("webdataset", "parquet")):
        listed = [file.name for of_kind in sources.values() for file in of_kind]
        also = [f"images with caption files such as {captioned}"] if captioned else []
        listing = ", ".join([*listed[:10], *(["…"] if len(listed) > 10 else []), *also])
        raise InvalidInput(
            f"{folder}: there is more than one source in it ({listing}): "
            "give the file itself, or name one with --format"
        )
    return Located(kind, folder, tuple(files))


def _captioned(names: list[str]) -> str | None:
    """The first image that has a caption file beside it."""
    texts = {os.path.splitext(name)[0] for name in names if name.lower().endswith(".txt")}
    return next((name for name in names if _is_image(name) and os.path.splitext(name)[0] in texts), None)


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1][1:].lower() in IMAGE_SUFFIXES


def _format_of(files: list[Path]) -> str:
    formats = {
        next(
            (kind for kind, suffixes in SUFFIXES.items() if file.name.lower().endswith(suffixes)), None
        ): file
        for file in reversed(files)
    }
    if len(formats) > 1:
        raise InvalidInput(
            f"files of different formats ({', '.join(file.name for file in formats.values())}): "
            "name one with --format"
        )
    ((kind, file),) = formats.items()
    if kind is None and file.name.lower() in CAPTION_TABLES:
        return "csv"
    if kind is None:
        hint = (
            "give the folder it lies in"
            if _is_image(file.name)
            else f"name one of {', '.join(FORMATS)} with --format"
        )
        raise InvalidInput(f"{file}: its format isn't known by its name: {hint}")
    return kind


def _expand(source: str) -> list[Path]:
    files: list[Path] = []
    missing: list[str] = []
    for count, pattern in enumerate(_braces(source)):
        if count == _MAX_EXPANDED:
            raise InvalidInput(f"{source}: the braces stand for more than {_MAX_EXPANDED:,} names")
        names = sorted(glob.glob(pattern, recursive=True))
        missing += [] if names else [pattern]
        files += map(Path, names)
    if missing:
        raise NotFound(
            f"{source}: nothing there for {', '.join(missing[:5])}{', …' if len(missing) > 5 else ''}"
        )
    return list(dict.fromkeys(files))


def _braces(pattern: str) -> Iterator[str]:
    """Expand braces as a shell does: `a-{08..10}{x,y}` -> a-08x a-08y a-09x …; others stay as they are."""
    match = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", pattern)
    if match is None:
        yield pattern
        return
    first, last, listed = match.groups()
    if listed is not None:
        choices: Iterator[str] = iter(listed.split(","))
    else:
        width = max(len(first), len(last)) if first.startswith("0") or last.startswith("0") else 0
        step = 1 if int(last) >= int(first) else -1
        choices = (f"{number:0{width}d}" for number in range(int(first), int(last) + step, step))
    for choice in choices:
        yield from _braces(pattern[: match.start()] + choice + pattern[match.end() :])


def _fixed_part(source: str) -> Path:
    """The folder before the first wildcard."""
    return Path(os.path.dirname(re.split(r"[*?\[{]", source, maxsplit=1)[0]))
