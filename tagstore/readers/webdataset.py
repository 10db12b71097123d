"""WebDataset shards, as img2dataset writes them.

Files of a tar that follow one another and share a name up to its first dot are a group: KEY.jpg, KEY.txt,
KEY.json.
"""

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

from tagstore.errors import InvalidInput, NotFound
from tagstore.readers.image_files import IMAGE_SUFFIXES, Embedded, Place, check_size
from tagstore.readers.records import Options, UnknownColumn, default_captions
from tagstore.readers.values import (
    MAX_TEXT_BYTES,
    RecordError,
    caption_lines,
    caption_texts,
    key_in,
    metadata_of,
    rejected,
)
from tagstore.types import Pair, Rejected

_DAMAGED = (tarfile.TarError, OSError, EOFError, zlib.error, LZMAError)


class Group:
    """The files of one key."""

    def __init__(self, key: str) -> None:
        self.key = key
        self.suffixes: list[str] = []
        self.images: list[Place] = []
        """Where each image stands in the shard; the bytes themselves if the shard is compressed."""
        self._text: bytes = b""
        self._json: bytes | None = None
        self._problem: RecordError | None = None

    def add(self, member: tarfile.TarInfo, suffix: str, shard: _Shard, max_image_bytes: int) -> None:
        """Take in the next file. Raises `ReadError` if the shard ends before it does."""
        is_image = suffix in IMAGE_SUFFIXES
        if is_image or suffix in ("txt", "json"):
            try:
                check_size(member.size, max_image_bytes if is_image else MAX_TEXT_BYTES, member.name)
                if is_image:
                    self.images.append(shard.image(member))
                elif suffix == "txt":
                    self._text = shard.read(member)
                else:
                    self._json = shard.read(member)
            except RecordError as error:
                self._problem = error
        self.suffixes.append(suffix)

    def check(self) -> None:
        """Raise `RecordError` if one of the files is too large."""
        if self._problem is not None:
            raise self._problem

    def lines(self) -> list[str]:
        """The lines of the `txt`; none without one."""
        return caption_lines(self._text, f"{self.key}.txt")

    def fields(self) -> dict[str, Any]:
        """The fields of the `json`; none without one. Raises `RecordError` if it is no JSON object."""
        if self._json is None:
            return {}
        try:
            value = json.loads(self._json.decode("utf-8-sig"))
        except UnicodeDecodeError:
            raise RecordError(f"not UTF-8: {self.key}.json") from None
        except (ValueError, RecursionError) as error:
            raise RecordError(f"not JSON: {self.key}.json ({error})") from None
        if not isinstance(value, dict):
            raise RecordError(f"not a JSON object: {self.key}.json is of type {type(value).__name__}")
        return value


def read_webdataset(file: Path, options: Options) -> Iterator[Pair | Rejected]:
    """Captions are the lines of `txt` and the caption fields of `json`; its other fields are metadata.

    A shard that is cut off gives what came before and one `Rejected` for the rest.
    """
    first = True
    for group in read_groups(file, options.max_image_bytes):
        if isinstance(group, Rejected):
            yield group
        else:
            yield _pair(group, file, options, first)
            # every picture is accounted for, also those that share a name up to its first dot
            dotted = [] if group.images else _dotted(group)[1:]
            yield from (rejected(name, f"no image: {_dot_hint(name)}", f"{file}!{name}") for name in dotted)
            first = False


def read_groups(file: Path, max_image_bytes: int) -> Iterator[Group | Rejected]:
    """The groups of a shard in their order; the last item is a `Rejected` if the shard is damaged or cut off.

    Images of a plain tar are passed over, not read. Raises `InvalidInput` for a file that is no tar.
    """
    try:
        shard = _Shard(file)
    except _DAMAGED as error:
        raise InvalidInput(f"{file}: not a tar file, or cut off ({error})") from None
    group, previous_suffixes, reason = Group(""), [""], ""
    with shard.tar:
        while not reason:
            try:
                member = shard.next_member()
                if member is None:
                    break
                key, suffix = _split(member.name)
                if key is None or not member.isfile():
                    continue
                if key == group.key and suffix not in group.suffixes:
                    group.add(member, suffix, shard, max_image_bytes)
                    continue
                complete, group = group, Group(key)
                if complete.suffixes:
                    previous_suffixes = complete.suffixes
                    yield complete
                group.add(member, suffix, shard, max_image_bytes)
            except _DAMAGED as error:
                reason = f"damaged or cut off: what came before is used ({error})"
    # At a cut, the last group counts as whole if it has the files that the one before it had.
    if group.suffixes and (not reason or sorted(group.suffixes) == sorted(previous_suffixes)):
        yield group
    if reason:
        yield rejected(f"{file.name}:{group.key}", reason, f"{file}!{group.key}")


class _Shard:
    """A tar, read forwards.

    A plain one is a regular file with random access; a compressed one is a stream.
    """

    def __init__(self, file: Path) -> None:
        self._path = file
        self._size = file.stat().st_size
        self._random_access = file.is_file()
        if self._random_access:
            try:
                self.tar = tarfile.open(file, "r:", tarinfo=_Member)  # noqa: SIM115  the caller closes it
                return
            except tarfile.TarError:  # compressed, or no tar: the stream tells
                self._random_access = False
        self.tar = tarfile.open(file, "r|*", tarinfo=_Member)  # noqa: SIM115

    def next_member(self) -> tarfile.TarInfo | None:
        member = self.tar.next()
        cast(Any, self.tar).members.clear()  # tarfile remembers every member, and a data set has millions
        return member

    def read(self, member: tarfile.TarInfo) -> bytes:
        return cast(IO[bytes], self.tar.extractfile(member)).read()

    def image(self, member: tarfile.TarInfo) -> Place:
        if not self._random_access:
            return Embedded(self._path, data=self.read(member))
        if member.offset_data + member.size > self._size:
            raise ReadError("unexpected end of data")
        return Place(self._path, member.offset_data, member.size)


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


def _pair(group: Group, file: Path, options: Options, first: bool) -> Pair | Rejected:
    """The pair that the files make.

    A column that isn't even in the `first` group is a mistake in the options.
    """
    origin, key, columns = f"{file}!{group.key}", group.key, options.columns
    try:
        group.check()
        if not group.images:
            raise RecordError(f"no image: its files are {', '.join(group.suffixes)}{_hint(group)}")
        fields = group.fields()
        for name in (*columns.captions, *([columns.key] if columns.key else [])):
            if name not in fields and name not in group.suffixes:
                message = f"no field '{name}': the json of '{key}' has {', '.join(fields) or 'none'}"
                raise UnknownColumn(f"{file}: {message}") if first else RecordError(message)
        lines = group.lines() if not columns.captions or "txt" in columns.captions else []
        # A title is a caption only where nothing calls itself one.
        captions = columns.captions or default_captions(
            {"caption", "captions"} & fields.keys() if lines else fields
        )
        texts = caption_texts(
            [lines, *(fields.get(name) for name in captions)],
            optional=options.captions_optional or not {"txt", "json"} & set(group.suffixes),
        )
        if not texts and not options.captions_optional:
            raise RecordError(f"no caption: its files are {', '.join(group.suffixes)}{_hint(group)}")
        if columns.key:
            key = key_in(fields.get(columns.key), columns.key)
        metadata = metadata_of(fields, {*captions, "key", columns.key})
        return Pair(key, group.images[0].read(), texts, metadata, origin)
    except (RecordError, NotFound) as error:
        return rejected(key, str(error), origin)


def _hint(group: Group) -> str:
    """What a sample that lacks a file most likely suffers from."""
    if dotted := _dotted(group):
        return f"; {_dot_hint(dotted[0])}"
    return "; files of a sample must follow one another, so write the shard sorted (tar --sort=name)"


def _dotted(group: Group) -> list[str]:
    """Pictures of the group whose names have another dot."""
    return [f"{group.key}.{s}" for s in group.suffixes if "." in s and s.rpartition(".")[2] in IMAGE_SUFFIXES]


def _dot_hint(name: str) -> str:
    stem, _, suffix = name.rpartition(".")
    return f"a key ends at the first dot of a name, so rename {name} to {stem.replace('.', '_')}.{suffix}"


def _split(name: str) -> tuple[str | None, str]:
    """(key, lower-case suffix) by WebDataset's rule; no key for hidden and private files."""
    folder, base = os.path.split(name.removeprefix("./"))
    stem, _, suffix = base.partition(".")
    if not stem or stem.startswith("__"):
        return None, ""
    return (f"{folder}/{stem}" if folder else stem), suffix.lower()
