"""Values of a record's fields: checked, and made fit for JSON and UTF-8.

A value that is not fit is a `RecordError`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from tagstore.plain_text import is_missing
from tagstore.types import Rejected

MAX_TEXT_BYTES = 16 * 2**20
"""Bytes of a caption file, or of the JSON in a shard, beyond which it is refused."""

_MAX_DEPTH = 32
"""Levels of nesting that metadata may have."""
_MAX_INTEGER_BITS = 14_000
"""Bits of an integer in metadata: Python reads and writes no more than 4,300 decimal digits."""


class RecordError(Exception):
    """Why this one record cannot be used.

    The text before the first colon is the same for all records with this trouble, so that rejections can be
    counted by it.
    """


def rejected(key: str, reason: str, origin: str) -> Rejected:
    """A rejection whose texts UTF-8 can hold, whatever the record holds."""
    return Rejected(json_value(key), json_value(reason), json_value(origin))


def kind_of(value: Any) -> str:
    """What a JSON value is, in words for a message."""
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case int() | float():
            return "a number"
        case str():
            return "a text" if value.strip() else "an empty text"
        case Mapping():
            return "an object"
        case list() | tuple():
            return "a list"
    return f"of type {type(value).__name__}"


def caption_texts(values: Iterable[Any], *, optional: bool = False) -> tuple[str, ...]:
    """All captions in texts and lists of texts, stripped, each once, in order.

    At least one must be left, unless captions are `optional`. What an export writes for a missing caption
    ("nan", "N/A") is left out.
    """
    captions: dict[str, None] = {}
    missing = ""
    for value in values:
        for text in value if isinstance(value, list | tuple) else (value,):
            if isinstance(text, Mapping):
                text = _caption_in(text)
            if isinstance(text, bytes):
                text = _decoded(text)
            if text is None:
                continue
            if not isinstance(text, str):
                raise RecordError(f"a caption is not a text: it is {kind_of(text)}")
            if not is_unicode(text):
                raise RecordError("not UTF-8: a caption holds half a surrogate pair, which is no character")
            if is_missing(text := text.strip()):
                missing = text
            elif text:
                captions[text] = None
    if not captions and not optional:
        raise RecordError(f"no caption: '{missing}' stands for a missing one" if missing else "no caption")
    return tuple(captions)


def _caption_in(fields: Mapping[Any, Any]) -> Any:
    """The caption in an object, as data sets write sentences with their tokens."""
    for name in ("raw", "caption", "text", "sentence", "value"):
        if isinstance(fields.get(name), str):
            return fields[name]
    names = ", ".join(map(str, fields)) or "nothing"
    raise RecordError(f"a caption is not a text: it is an object of {names}, make a column of its text")


def _decoded(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise RecordError("not UTF-8: a caption of bytes, convert it") from None


def caption_lines(data: bytes, name: str) -> list[str]:
    """The lines of a caption file, which must be UTF-8."""
    try:
        return data.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise RecordError(
            f"not UTF-8: {name} has byte 0x{data[error.start]:02x} at offset {error.start}, convert it"
        ) from None


def key_in(value: Any, column: str) -> str:
    """The key that a column holds: a text or an integer."""
    if value is None or value == "":
        raise RecordError(f"no key: column '{column}' is empty")
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # pandas writes integers so where one of the column is missing
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise RecordError(
            f"the key is not a text or an integer: column '{column}' is of type {type(value).__name__}"
        )
    if not is_unicode(key := str(value)):
        raise RecordError(f"not UTF-8: the key in column '{column}'")
    return key


def metadata_of(row: Mapping[str, Any], without: Iterable[str | None] = ()) -> dict[str, Any]:
    """The other columns as JSON values; bytes (further images, embeddings) are left out."""
    skipped = set(without)
    return {
        _unicode(str(name)): json_value(value)
        for name, value in row.items()
        if name not in skipped and not isinstance(value, bytes)
    }


def json_value(value: Any, depth: int = 0) -> Any:
    """A value fit for JSON and UTF-8: NaN and infinity become null, dates and other types their text."""
    if depth > _MAX_DEPTH:
        raise RecordError(f"nested too deeply: metadata of more than {_MAX_DEPTH} levels")
    match value:
        case None | bool():
            return value
        case int():
            if value.bit_length() > _MAX_INTEGER_BITS:
                raise RecordError(f"a number is too long: one in the metadata has {value.bit_length()} bits")
            return value
        case float():
            return value if math.isfinite(value) else None
        case str():
            return _unicode(value)
        case Mapping():
            return {
                _unicode(str(name)): json_value(item, depth + 1)
                for name, item in value.items()
                if not isinstance(item, bytes)
            }
        case list() | tuple():
            return [json_value(item, depth + 1) for item in value if not isinstance(item, bytes)]
    return _unicode(str(value))


def _unicode(text: str) -> str:
    return text if is_unicode(text) else text.encode("utf-8", "replace").decode()


def is_unicode(text: str) -> bool:
    """Whether the text has no lone surrogates, which neither UTF-8 nor protobuf can hold."""
    return text.isascii() or not re.search("[\ud800-\udfff]", text)
