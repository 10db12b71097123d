"""The one check of a pair before it is ingested, from a file, over the network or from a program.

What passes can be stored, answered, and exported to a bundle, whose lines have 16 MiB at most.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace

from tagstore.readers.values import RecordError, caption_texts, is_unicode, json_value, kind_of, metadata_of
from tagstore.types import Pair, Rejected

MAX_KEY_BYTES = 4096
"""Bytes of a key in UTF-8, at most: a path of any length that Linux opens can be a key."""
MAX_CAPTION_BYTES = 256 << 10
"""Bytes of all captions of a pair in UTF-8, at most."""
MAX_METADATA_BYTES = 1 << 20
"""Bytes of a pair's metadata as JSON in UTF-8, at most."""
MAX_NOTE_CHARS = 4096
"""Characters that are kept of an origin, and of why a pair was refused."""


def checked(item: Pair | Rejected, *, captions_optional: bool = False) -> Pair | Rejected:
    """Return the pair that can be stored, its captions stripped and its metadata plain JSON, or why none can.

    It has a caption, unless they are optional: a miner of pictures needs none. NaN and infinity in metadata
    become null, and types that JSON does not have their text. A pair that passed once passes unchanged.
    """
    if isinstance(item, Rejected):
        return _rejected(item.key, item.reason, item.origin)
    try:
        _check_key(item.key)
        captions = caption_texts(item.captions, optional=captions_optional)
        _check_size("the captions are too long", sum(map(_size, captions)), MAX_CAPTION_BYTES)
        if not isinstance(item.metadata, Mapping):
            raise RecordError(f"the metadata is no JSON object: it is {kind_of(item.metadata)}")
        metadata = metadata_of(item.metadata)
        if metadata:
            size = _size(json.dumps(metadata, ensure_ascii=False))
            _check_size("the metadata is too large", size, MAX_METADATA_BYTES)
    except RecordError as error:
        return _rejected(item.key, str(error), item.origin)
    return replace(item, captions=captions, metadata=metadata, origin=_note(item.origin))


def _check_key(key: str) -> None:
    if not isinstance(key, str):
        raise RecordError(f"the key is not a text: it is of type {type(key).__name__}")
    if not key:
        raise RecordError("no key: it is empty")
    if not is_unicode(key):
        raise RecordError("not UTF-8: the key holds half a surrogate pair, which is no character")
    _check_size("the key is too long", _size(key), MAX_KEY_BYTES)


def _check_size(what: str, size: int, limit: int) -> None:
    if size > limit:
        raise RecordError(f"{what}: {size} bytes, {limit} is the most")


def _rejected(key: str, reason: str, origin: str) -> Rejected:
    return Rejected(_note(key), _note(reason), _note(origin))


def _note(text: object) -> str:
    """A text that UTF-8 can hold, cut to `MAX_NOTE_CHARS`."""
    return str(json_value(str(text)[:MAX_NOTE_CHARS]))


def _size(text: str) -> int:
    return len(text.encode())
