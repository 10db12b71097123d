"""WebDataset shards, as img2dataset writes them: files of a tar that follow one another and share a name up to its first dot are a pair."""

from __future__ import annotations

import json
import os
import tarfile
import zlib
from collections.abc import Iterator
from lzma import LZMAError
from pathlib import Path
from tarfile import HeaderError, ReadError
from typing import IO, Any, Self, cast

from tagstore.errors import InvalidInput
from tagstore.readers.records import (
    IMAGE_SUFFIXES,
    MAX_TEXT_BYTES,
    Options,
    RecordError,
    UnknownColumn,
    caption_lines,
    caption_texts,
    check_size,
    default_captions,
    key_in,
    metadata_of,
    rejected,
)
from tagstore.types import Pair, Rejected

_DAMAGED = (tarfile.TarError, OSError, EOFError, zlib.error, LZMAError)


def read_webdataset(file: Path, options: Options) -> Iterator[Pair | Rejected]:
    """Captions are the lines of `txt` and the caption fields of `json`; the other fields of `json` are metadata; other files are ignored.

    A shard that is cut off gives what came before and one `Rejected` for the rest.
    """
    first = True
    for sample in _samples(file, options):
        if isinstance(sample, Rejected):
            yield sample
        else:
            yield sample.pair(file, options, first)
            first = False


def _samples(file: Path, options: Options) -> Iterator[_Sample | Rejected]:
    try:
        shard = tarfile.open(file, "r|*", tarinfo=_Member)  # noqa: SIM115  closed below; "r|" reads forward only
    except _DAMAGED as error:
        raise InvalidInput(f"{file}: not a tar file, or cut off ({error})") from None
    sample, before, reason = _Sample(""), [""], ""
    with shard:
        while not reason:
            try:
                member = shard.next()
                cast(Any, shard).members.clear()  # tarfile remembers every member, and a set has millions
                if member is None:
                    break
                key, suffix = _split(member.name)
                if key is None or not member.isfile():
                    continue
                if key == sample.key and suffix not in sample.names:
                    sample.add(member, suffix, shard, options)
                    continue
                complete, sample = sample, _Sample(key)
                if complete.names:
                    before = complete.names
                    yield complete
                sample.add(member, suffix, shard, options)
            except _DAMAGED as error:
                reason = f"damaged or cut off: what came before is used ({error})"
    # At a cut, the last sample counts as whole if it has the files that the one before it had.
    if sample.names and (not reason or sorted(sample.names) == sorted(before)):
        yield sample
    if reason:
        yield rejected(f"{file.name}:{sample.key}", reason, f"{file}!{sample.key}")


class _Member(tarfile.TarInfo):
    """tarfile takes a damaged or missing header for the end of the archive; only the end marker is one."""

    @classmethod
    def fromtarfile(cls, tarfile: tarfile.TarFile) -> Self:
        try:
            return super().fromtarfile(tarfile)
        except HeaderError as error:
            if type(error).__name__ == "EOFHeaderError":
                raise
            raise ReadError(str(error)) from None


class _Sample:
    """The files of one pair, as they come."""

    def __init__(self, key: str) -> None:
        self.key = key
        self.names: list[str] = []
        self.image: bytes | None = None
        self.text: bytes = b""
        self.json: bytes | None = None
        self.problem = ""

    def add(self, member: tarfile.TarInfo, suffix: str, shard: tarfile.TarFile, options: Options) -> None:
        is_image = suffix in IMAGE_SUFFIXES and self.image is None
        if is_image or suffix in ("txt", "json"):
            try:
                check_size(member.size, options.max_image_bytes if is_image else MAX_TEXT_BYTES, member.name)
                data = cast(IO[bytes], shard.extractfile(member)).read()
            except RecordError as error:
                self.problem, data = str(error), b""
            if is_image:
                self.image = data
            elif suffix == "txt":
                self.text = data
            else:
                self.json = data
        self.names.append(suffix)

    def pair(self, file: Path, options: Options, first: bool) -> Pair | Rejected:
        """The pair that the files make. A column that isn't even in the `first` sample is a mistake in the options."""
        origin, key = f"{file}!{self.key}", self.key
        try:
            if self.problem:
                raise RecordError(self.problem)
            if self.image is None:
                raise RecordError(f"no image: its files are {', '.join(self.names)}")
            fields = self._fields()
            asked = options.columns.captions
            for name in (*asked, *([options.columns.key] if options.columns.key else [])):
                if name not in fields and name not in self.names:
                    message = f"no field '{name}': the json of '{key}' has {', '.join(fields) or 'none'}"
                    raise UnknownColumn(f"{file}: {message}") if first else RecordError(message)
            # A title is a caption only where nothing calls itself one.
            captions = asked or default_captions(
                {"caption", "captions"} & fields.keys() if self.text else fields
            )
            lines = caption_lines(self.text, f"{key}.txt") if not asked or "txt" in asked else []
            texts = caption_texts([lines, *(fields.get(name) for name in captions)])
            if options.columns.key:
                key = key_in(fields.get(options.columns.key), options.columns.key)
            return Pair(
                key, self.image, texts, metadata_of(fields, {*captions, "key", options.columns.key}), origin
            )
        except RecordError as error:
            return rejected(key, str(error), origin)

    def _fields(self) -> dict[str, Any]:
        if self.json is None:
            return {}
        try:
            value = json.loads(self.json.decode("utf-8-sig"))
        except UnicodeDecodeError:
            raise RecordError(f"not UTF-8: {self.key}.json") from None
        except (ValueError, RecursionError) as error:
            raise RecordError(f"not JSON: {self.key}.json ({error})") from None
        if not isinstance(value, dict):
            raise RecordError(f"not a JSON object: {self.key}.json is of type {type(value).__name__}")
        return value


def _split(name: str) -> tuple[str | None, str]:
    """(key, lower-case suffix) by WebDataset's rule; no key for hidden and private files."""
    folder, base = os.path.split(name.removeprefix("./"))
    stem, _, suffix = base.partition(".")
    if not stem or stem.startswith("__"):
        return None, ""
    return (f"{folder}/{stem}" if folder else stem), suffix.lower()
