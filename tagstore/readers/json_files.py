"""JSON files: a list of records, or captions as COCO has them (`images` and `annotations`)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tagstore.errors import InvalidInput
from tagstore.readers.json_records import read_list
from tagstore.readers.records import Options, choose_columns, row_to_pair
from tagstore.readers.values import rejected
from tagstore.types import Pair, Rejected

_WINDOW = 100
"""Records at the beginning whose fields are taken for those of all."""


def read_json(file: Path, options: Options) -> Iterator[Pair | Rejected]:
    """A pair for each record of a list, or for each image of COCO's captions.

    A list is read as a stream; COCO's file, whose captions stand apart from its images, is held in memory.
    """
    with file.open("rb") as source:
        start = source.read(1 << 16).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    records = enumerate(_coco(file), start=1) if start == b"{" else _numbered(file)
    window = [numbered for numbered, _ in zip(records, range(_WINDOW), strict=False)]
    names = dict.fromkeys(name for _, record in window if isinstance(record, dict) for name in record)
    if not names:
        raise InvalidInput(f"{file}: a list without records")
    chosen = choose_columns(options, names, str(file))
    for part in (window, records):
        for number, record in part:
            if isinstance(record, dict):
                yield row_to_pair(record, chosen, file, number, options)
            else:
                reason = f"not a JSON object: it is of type {type(record).__name__}"
                yield rejected(f"{file.name}:{number}", reason, f"{file}:{number}")


def _numbered(file: Path) -> Iterator[tuple[int, Any]]:
    return ((number + 1, record) for number, record in read_list(file))


def _coco(file: Path) -> Iterator[dict[str, Any]]:
    try:
        content = json.loads(file.read_bytes())
        captions: dict[Any, list[str]] = {}
        for annotation in content["annotations"]:
            captions.setdefault(annotation["image_id"], []).append(annotation["caption"])
        images = [
            {"file_name": image["file_name"], "captions": captions.get(image["id"], [])}
            for image in content["images"]
        ]
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"{file}: no JSON: {error}") from None
    except (LookupError, TypeError) as error:
        raise InvalidInput(
            f"{file}: neither a list of records nor COCO's captions, which have images (id, file_name) and "
            f"annotations (image_id, caption); missing: {error}"
        ) from None
    return iter(images)
