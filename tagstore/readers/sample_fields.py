"""The fields of a sample's record. A value of an unexpected type is a `RecordError`, never reinterpreted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from tagstore.readers.records import IMAGE_NAMES, KEY_NAMES, Columns, usual_column
from tagstore.readers.values import RecordError, is_unicode, key_in, kind_of

Role = Literal["system", "user", "assistant"]
_ROLES: dict[str, Role] = {
    "human": "user",
    "gpt": "assistant",
    "user": "user",
    "assistant": "assistant",
    "system": "system",
}
_CONTENT_FIELDS = ("conversations", "captions", "caption", "image", "images")
"""Fields that are not metadata."""
_TURN_FORMAT = "a turn is {'from': 'human' or 'gpt', 'value': text}"


@dataclass(frozen=True, slots=True)
class Turn:
    """The text of one side, without markers of images: they come first in the first turn of the user."""

    role: Role
    text: str


def image_names(record: Mapping[str, Any], columns: Columns) -> tuple[str, ...]:
    """The paths of a record's images, which may also be base64."""
    if columns.image is None and "images" in record:
        if "image" in record:
            raise RecordError("both 'image' and 'images' are given: leave one out")
        return _texts(record, "images", list_only=True)
    # A conversation may be about anything: only a captioned picture has its path under other names.
    usual = ("image",) if "conversations" in record else IMAGE_NAMES
    name = columns.image or usual_column(record, usual)
    return _texts(record, name, list_only=False) if name is not None and name in record else ()


def sample_key(record: Mapping[str, Any], columns: Columns) -> str | None:
    """The key that a record gives; None if it gives none."""
    name = columns.key or usual_column(record, KEY_NAMES)
    if name is None:
        return None
    if name not in record:
        raise RecordError(f"no '{name}': name the field that holds the key")
    return key_in(record[name], name)


def sample_captions(record: Mapping[str, Any]) -> tuple[str, ...]:
    """The captions of a record, or else its one caption."""
    captions = _texts(record, "captions", list_only=True) if "captions" in record else ()
    if not captions and "caption" in record:
        return _texts(record, "caption", list_only=False)
    return captions


def sample_turns(record: Mapping[str, Any]) -> tuple[Turn, ...]:
    """The turns of a record's conversation."""
    turns = record.get("conversations", [])
    if not isinstance(turns, list):
        raise RecordError(f"'conversations' is {kind_of(turns)}: a list of turns is expected")
    return tuple(map(_turn, turns))


def _turn(turn: Any) -> Turn:
    if not isinstance(turn, dict):
        raise RecordError(f"{_TURN_FORMAT}, and this is {kind_of(turn)}")
    speaker, text = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
    if not isinstance(speaker, str) or speaker not in _ROLES:
        raise RecordError(f"{_TURN_FORMAT}, not {turn!r:.200}")
    if not isinstance(text, str) or not text.strip():
        raise RecordError(f"the text of a turn is {kind_of(text)}: {_TURN_FORMAT}")
    return Turn(_ROLES[speaker], text.replace("<image>", "").strip())


def sample_metadata(record: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a record that are neither image nor text."""
    return {name: value for name, value in record.items() if name not in _CONTENT_FIELDS}


def _texts(record: Mapping[str, Any], name: str, *, list_only: bool) -> tuple[str, ...]:
    """The texts of a field as they are written: a list of texts or, unless `list_only`, a single text."""
    value = record[name]
    texts = [value] if isinstance(value, str) and not list_only else value
    expected = "a list of texts" if list_only else "a text or a list of texts"
    if not isinstance(texts, list):
        raise RecordError(f"'{name}' is {kind_of(value)}: {expected} is expected")
    for text in texts:
        if not isinstance(text, str) or not text.strip():
            verb = "is" if texts is not value else "holds"
            raise RecordError(f"'{name}' {verb} {kind_of(text)}: {expected} is expected")
        if not is_unicode(text):
            raise RecordError(f"not UTF-8: '{name}' holds half a surrogate pair, which is no character")
    return tuple(texts)
