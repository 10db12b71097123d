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
_MARKER = "<image>"
"""What stands for a picture in the text of a turn."""
_TURN_FORMAT = "a turn is {'from': 'human' or 'gpt', 'value': text}"


@dataclass(frozen=True, slots=True)
class Turn:
    """The text of one side."""

    role: Role
    text: str
    pictures: tuple[int, ...] = ()
    """Offsets in `text` at which the next pictures of the sample stand. If no turn has any, all pictures come
    first in the first turn of the user."""


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


def sample_turns(record: Mapping[str, Any], pictures: int) -> tuple[Turn, ...]:
    """The turns of a record's conversation.

    "<image>" in a turn of the user stands for the next picture: at the beginning or the end of a turn for one
    that comes first, elsewhere for one at that place. If there are fewer of these markers than pictures, all
    pictures come first of all. What looks like a marker and has no picture is text.

    Args:
        pictures: of the record.
    """
    turns = record.get("conversations", [])
    if not isinstance(turns, list):
        raise RecordError(f"'conversations' is {kind_of(turns)}: a list of turns is expected")
    written = [_written(turn) for turn in turns]
    markers = sum(text.count(_MARKER) for role, text in written if role == "user")
    if markers < pictures:
        without = {"user": lambda text: text.replace(_MARKER, "")}
        return tuple(Turn(role, without.get(role, str)(text).strip()) for role, text in written)
    placed, left = [], pictures
    for role, text in written:
        turn = _placed(text, left) if role == "user" else Turn(role, text.strip())
        placed.append(turn)
        left -= len(turn.pictures)
    first = next((i for i, turn in enumerate(placed) if turn.role == "user"), 0)
    if all(turn.pictures == ((0,) * pictures if i == first else ()) for i, turn in enumerate(placed)):
        return tuple(Turn(turn.role, turn.text) for turn in placed)
    return tuple(placed)


def _written(turn: Any) -> tuple[Role, str]:
    """The role and the text of a turn, with its markers."""
    if not isinstance(turn, dict):
        raise RecordError(f"{_TURN_FORMAT}, and this is {kind_of(turn)}")
    speaker, text = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
    if not isinstance(speaker, str) or speaker not in _ROLES:
        raise RecordError(f"{_TURN_FORMAT}, not {turn!r:.200}")
    if not isinstance(text, str) or not text.strip():
        raise RecordError(f"the text of a turn is {kind_of(text)}: {_TURN_FORMAT}")
    return _ROLES[speaker], text


def _placed(text: str, pictures: int) -> Turn:
    """A turn of the user whose first markers stand for pictures, at most so many."""
    pieces = text.split(_MARKER, pictures)
    joined, offsets = pieces[0], []
    for piece in pieces[1:]:
        offsets.append(len(joined))
        joined += piece
    begin, end = len(joined) - len(joined.lstrip()), len(joined.rstrip())
    # LLaVA's data has a picture at either end of a turn, and shows it first
    places = [offset - begin if begin < offset < end else 0 for offset in offsets]
    return Turn("user", joined.strip(), tuple(sorted(places)))


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
