"""Data sets to record: whatever `tagstore ingest` reads, and the JSON that LLaVA trains on. Images with keys; captions don't matter."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tagstore.errors import InvalidInput, MissingExtra, NotFound
from tagstore.types import Pair, Rejected

_CHUNK = 1 << 20
_BETWEEN = re.compile(r"[ \t\r\n,]*")


def samples(
    dataset: str,
    *,
    images: str | None = None,
    format: str | None = None,
    key: str | None = None,
    image: str | None = None,
) -> Iterator[Pair | Rejected]:
    """The samples of a data set, in an order that stays.

    Args:
        dataset: what `tagstore.readers.read` takes; or, with `images`, a JSON list or JSON Lines of objects.
        images: the directory that image paths of LLaVA-style JSON are relative to.
        format: of the former, if it isn't to be found by looking.
        key: field or column with the unique key; of LLaVA-style JSON `id`.
        image: field or column with the image's path; of LLaVA-style JSON `image`.
    """
    if images is not None:
        return _llava(Path(dataset), Path(images), key or "id", image or "image")
    try:
        from tagstore.readers import Columns, read
    except ModuleNotFoundError as error:
        raise MissingExtra(
            f"reading {dataset} needs {error.name}: pip install 'tagstore[server]', or pass LLaVA-style JSON"
        ) from error
    return read(dataset, format=format, columns=Columns(image=image, key=key))


def _llava(path: Path, images: Path, key: str, image: str) -> Iterator[Pair | Rejected]:
    """One sample for each object with an image; text-only ones have nothing to look up."""
    root = images.resolve()
    if not root.is_dir():
        raise NotFound(f"no directory {images}: it is what image paths in {path} are relative to")
    for number, record in enumerate(_objects(path)):
        origin = f"{path}#{number}"
        if not isinstance(record, dict):
            raise InvalidInput(
                f"{origin} is no object: a list of objects with '{key}' and '{image}' is expected"
            )
        name = record.get(image)
        if not name:
            continue
        if key not in record:
            raise InvalidInput(f"{origin} has no '{key}': name the field that holds the key")
        own = str(record[key])
        file = Path(os.path.normpath(root / str(name)))
        if not file.is_relative_to(root):
            yield Rejected(own, f"its image {name} leads out of {images}", origin)
            continue
        try:
            yield Pair(own, file.read_bytes(), (), origin=origin)
        except OSError as error:
            yield Rejected(own, f"cannot read {file}: {error.strerror}", origin)


def _objects(path: Path) -> Iterator[Any]:
    """The elements of a JSON list, or the lines of JSON Lines, without holding all of them."""
    try:
        file = path.open(encoding="utf-8")
    except OSError as error:
        raise NotFound(f"cannot read {path}: {error.strerror}") from error
    with file:
        if path.suffix == ".jsonl":
            for number, line in enumerate(file):
                if line.strip():
                    yield _decoded(path, number, line)
            return
        decoder = json.JSONDecoder()
        buffer = file.read(_CHUNK).lstrip("\ufeff \t\r\n")
        if not buffer.startswith("["):
            raise InvalidInput(
                f"{path} is no JSON list: LLaVA-style data is [{{...}}, ...], or .jsonl with an object a line"
            )
        at = 1
        while True:
            at = _BETWEEN.match(buffer, at).end()  # type: ignore[union-attr]  # it fits nothing as well
            if buffer.startswith("]", at):
                return
            problem: json.JSONDecodeError | None = None
            try:
                value, end = decoder.raw_decode(buffer, at)
            except json.JSONDecodeError as error:
                problem, end = error, len(buffer)
            if end < len(buffer):  # a number at the end of the buffer may go on
                yield value
                at = end
                continue
            more = file.read(max(_CHUNK, len(buffer) - at))
            if not more:
                raise InvalidInput(f"{path} ends before its list does: {problem or 'no ]'}")
            buffer, at = buffer[at:] + more, 0


def _decoded(path: Path, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise InvalidInput(f"{path}, line {number + 1} is no JSON: {error}") from error
