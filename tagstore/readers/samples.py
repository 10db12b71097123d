"""Samples of a data set: what a model is trained and tested on, and the images for which a map is recorded.

    data.json           LLaVA's list of {"id", "image", "conversations": [{"from": "human", "value"}, ...]}
    data.jsonl          the same, a record a line
    DIR of .tar, X.tar  WebDataset shards: KEY.jpg with KEY.json or KEY.txt

"<image>" in a turn of the human stands for the next image (`sample_fields.sample_turns`). A conversation
begins with the human; a turn of the system may come before.

`images` (a list) may stand for `image`, and `captions` (a list) or `caption` for `conversations`. Types are
checked strictly. The key of a record is its `key` or `id`, else the path of its (first) image without
extension, as in `tagstore.readers.read`; in a shard it is KEY. So a store, a recorded map and a training run
name an image alike.

Data sets are read as streams. Of an image only the place is kept (file, offset, length), so an epoch may be
walked in any order at the cost of one read an image, also inside a tar.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tagstore.errors import InvalidInput, NotFound
from tagstore.readers import read, read_files
from tagstore.readers.image_files import (
    MAX_IMAGE_BYTES,
    Embedded,
    Place,
    decoded,
    image_value,
    is_base64,
    key_of_path,
    path_inside,
)
from tagstore.readers.json_records import read_lines, read_list
from tagstore.readers.records import Columns
from tagstore.readers.sample_fields import (
    Role,
    Turn,
    image_names,
    sample_captions,
    sample_key,
    sample_metadata,
    sample_turns,
)
from tagstore.readers.sources import SUFFIXES, locate
from tagstore.readers.values import RecordError, kind_of, rejected
from tagstore.readers.webdataset import read_groups
from tagstore.types import Pair, Rejected

__all__ = [
    "Place",
    "Role",
    "Sample",
    "Turn",
    "image_key",
    "image_place",
    "read_images",
    "read_lines",
    "read_samples",
]


@dataclass(frozen=True, slots=True)
class Sample:
    """Images with a conversation, or with captions from which a conversation is made."""

    key: str
    images: tuple[Place, ...]
    turns: tuple[Turn, ...] = ()
    captions: tuple[str, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """The other fields of the record."""

    @property
    def image_keys(self) -> tuple[str, ...]:
        """The key that each image has in a recorded map: the sample's, then KEY#2, KEY#3 ..."""
        return tuple(self.key if i == 0 else f"{self.key}#{i + 1}" for i in range(len(self.images)))


@dataclass(frozen=True, slots=True)
class _Record:
    """A sample, or why it cannot be read, with its place in the data set."""

    sample: Sample | Rejected
    where: str
    """For messages: "data.json, record 3"."""
    origin: str
    """As `Pair.origin`: "data.json#3"."""
    has_text: bool = True
    """False for files of a shard that come without a json or txt."""


def read_samples(
    path: str | Path,
    *,
    images: str | Path | None = None,
    split: str = "",
    limit: int = 0,
    allow_outside: bool = False,
) -> list[Sample]:
    """Read the samples that a model is trained or tested on, in the order of the data set.

    Args:
        path: see the module.
        images: directory that image paths of a JSON file are relative to; by default that of the file.
        split: keep only samples whose field `split` is this.
        limit: keep only so many samples, the first; 0 for all.
        allow_outside: allow image paths, and links, that lead out of `images`.

    Raises:
        NotFound: there is no data set at `path`.
        InvalidInput: a record is no sample (the message has file and number), or there is no sample at all.
    """
    path = Path(path)
    if path.is_dir():
        shards = sorted(path.glob("*.tar"))
        if not shards:
            raise NotFound(
                f"{path} holds no .tar: give a directory of WebDataset shards, or a .json or .jsonl file"
            )
    elif not path.exists():
        raise NotFound(f"there is no data set at {path}")
    else:
        shards = [path] if path.name.lower().endswith(SUFFIXES["webdataset"]) else []
    records: Iterator[_Record]
    if shards:
        records = (record for shard in shards for record in _read_shard(shard, Columns()))
    else:
        records = _read_json(path, Path(images or path.parent), Columns(), allow_outside)
    samples: list[Sample] = []
    for record in records:
        if not record.has_text:
            continue
        sample = _trainable(record)
        if split and _split(sample, record.where) != split:
            continue
        samples.append(sample)
        if len(samples) == limit:
            break
    if not samples:
        raise InvalidInput(f"{path} has no sample" + (f" of split '{split}'" if split else ""))
    return samples


def read_images(
    dataset: str,
    *,
    images: str | None = None,
    format: str | None = None,
    columns: Columns = Columns(),  # noqa: B008  frozen
    allow_outside: bool = False,
) -> Iterator[Pair | Rejected]:
    """Read the images of a data set with their keys, to record a map: those of `read_samples` and of `read`.

    Args:
        dataset: JSON, JSON Lines or shards as in the module, or any other source of `tagstore.readers.read`.
        images: directory that image paths of JSON are relative to; by default that of the file.
        format: one of `tagstore.readers.FORMATS`; JSON Lines are then read as `tagstore ingest` reads them.
        columns: fields or columns that hold the key and the image, if they don't have the usual names.
        allow_outside: allow image paths, and links, that lead out of `images`.

    An image that cannot be used is yielded as `Rejected` and the rest goes on. Raises as `read_samples` does;
    text-only samples are passed over.
    """
    path = Path(dataset)
    is_json = path.name.lower().endswith((".json", *SUFFIXES["jsonl"])) and path.is_file()
    if images is not None or (is_json and format is None):
        folder = Path(images or path.parent)
        if not folder.is_dir():
            raise NotFound(f"no directory {folder}: it is what image paths in {path} are relative to")
        return _at_least_one(_images_of(_read_json(path, folder, columns, allow_outside)), dataset)
    located = locate(dataset, format)
    if located.format != "webdataset":
        return read(dataset, format=format, columns=columns, allow_outside=allow_outside)
    return read_files(dataset, located.files, lambda shard: _images_of(_read_shard(shard, columns)))


def image_place(name: str, folder: Path, where: str, *, allow_outside: bool = False) -> Place:
    """Return the place of an image that a record names by its path.

    Raises `InvalidInput` if it leads out of the folder and may not.
    """
    try:
        return _place(name, folder, allow_outside=allow_outside)
    except RecordError as error:
        raise InvalidInput(f"{where}: {error}") from None


def image_key(record: Mapping[str, Any], name: str, folder: Path, where: str) -> str:
    """Return the key of the image `name` of a record: its `key` or `id`, else the path without extension.

    Raises `InvalidInput` for a key of a wrong type.
    """
    try:
        key = sample_key(record, Columns())
        return key if key is not None else key_of_path(name, folder, folder)
    except RecordError as error:
        raise InvalidInput(f"{where}: {error}") from None


def _read_json(path: Path, folder: Path, columns: Columns, allow_outside: bool) -> Iterator[_Record]:
    """The records of a JSON list or of JSON Lines.

    A field of a wrong type ends it, an image that is refused does not.
    """
    is_lines = path.name.lower().endswith(SUFFIXES["jsonl"])
    records: Iterator[tuple[int, Any]] = read_lines(path) if is_lines else read_list(path)
    for number, record in records:
        where, origin = (
            (f"{path}, line {number}", f"{path}:{number}")
            if is_lines
            else (f"{path}, record {number}", f"{path}#{number}")
        )
        try:
            if not isinstance(record, dict):
                raise RecordError(f"a sample is an object, and this is {kind_of(record)}")
            names = image_names(record, columns)
            key = sample_key(record, columns)
            if key is None and names and not is_base64(names[0], folder):
                key = key_of_path(names[0], folder, folder)
            if key is None:
                key = f"{key_of_path(path.name, path.parent, path.parent)}:{number}"
            turns, captions = sample_turns(record, len(names)), sample_captions(record)
        except RecordError as error:
            raise InvalidInput(f"{where}: {error}") from None
        try:
            images = tuple(
                Embedded(path, data=decoded(name, MAX_IMAGE_BYTES))
                if is_base64(name, folder)
                else _place(name, folder, allow_outside=allow_outside)
                for name in names
            )
        except RecordError as error:
            yield _Record(rejected(key, str(error), origin), where, origin)
            continue
        yield _Record(Sample(key, images, turns, captions, sample_metadata(record)), where, origin)


def _read_shard(path: Path, columns: Columns) -> Iterator[_Record]:
    for group in read_groups(path, MAX_IMAGE_BYTES):
        if isinstance(group, Rejected):
            yield _Record(group, group.origin, group.origin)
            continue
        origin = f"{path}!{group.key}"
        sample: Sample | Rejected
        try:
            group.check()
            fields = group.fields()
            key = (sample_key(fields, columns) if columns.key else None) or group.key
            captions = sample_captions(fields) or tuple(
                line.strip() for line in group.lines() if line.strip()
            )
            turns = sample_turns(fields, len(group.images))
            sample = Sample(key, tuple(group.images), turns, captions, sample_metadata(fields))
        except RecordError as error:
            sample = rejected(group.key, str(error), origin)
        has_text = not {"json", "txt"}.isdisjoint(group.suffixes)
        yield _Record(sample, origin, origin, has_text)


def _place(name: str, folder: Path, *, allow_outside: bool) -> Place:
    path = path_inside(str(image_value(name)), folder, allow_outside=allow_outside)
    return Place(path, folder=None if allow_outside else folder)


def _trainable(record: _Record) -> Sample:
    """The sample of a record. Raises `InvalidInput` if nothing can be learnt from it."""
    sample = record.sample
    if isinstance(sample, Rejected):
        raise InvalidInput(f"{record.where}: {sample.reason}")
    if sample.turns and not any(turn.role == "assistant" for turn in sample.turns):
        raise InvalidInput(
            f"{record.where}: the conversation has no answer ('from': 'gpt'), "
            "so there is nothing to learn from it"
        )
    first = next((turn.role for turn in sample.turns if turn.role != "system"), "user")
    if first != "user":
        raise InvalidInput(
            f"{record.where}: the conversation begins with an answer ('from': 'gpt'): "
            "it must begin with the user ('from': 'human'), whom the picture belongs to"
        )
    if not sample.turns and not sample.captions:
        raise InvalidInput(f"{record.where}: neither conversations nor captions")
    if any(isinstance(image, Embedded) for image in sample.images):
        raise InvalidInput(
            f"{record.where}: the image stands in the record or in a compressed shard, and images are read "
            "from their place in a file: write it to a file, or decompress the shard"
        )
    return sample


def _split(sample: Sample, where: str) -> str | None:
    """The split that a sample says it belongs to."""
    split = sample.metadata.get("split")
    if "split" in sample.metadata and not isinstance(split, str):
        raise InvalidInput(f"{where}: 'split' is {kind_of(split)}: a text is expected")
    return split


def _images_of(records: Iterator[_Record]) -> Iterator[Pair | Rejected]:
    for record in records:
        if isinstance(record.sample, Rejected):
            yield record.sample
            continue
        for key, image in zip(record.sample.image_keys, record.sample.images, strict=True):
            item: Pair | Rejected
            try:
                item = Pair(key, image.read(), (), origin=record.origin)
            except (NotFound, InvalidInput) as error:
                item = rejected(key, str(error), record.origin)
            yield item


def _at_least_one(items: Iterator[Pair | Rejected], dataset: str) -> Iterator[Pair | Rejected]:
    empty = True
    for item in items:
        empty = False
        yield item
    if empty:
        raise InvalidInput(f"{dataset}: no sample in it has an image")
