"""Entries and tags as bytes: compact, versioned by the store's format number, readable from any language.

Integers are LEB128 varints unless said otherwise; strings are UTF-8 behind their length. An entry:

    key · n tags · their ids                             what a query needs, first
    sha256 (32 bytes) · perceptual hash (8, big endian)
    n captions · captions
    for each tag: score (1 byte, 0..255) · n mentions · for each: caption + 1, start, end - start
    metadata (JSON, empty if there is none) · origin, with a NUL where the key stands in it
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import sha256
from typing import Any

from tagstore.errors import Damaged
from tagstore.types import KINDS, Entry, EntryTag, Kind


def encode_entry(entry: Entry) -> bytes:
    """Bytes of an entry; its id is not among them, it is the key under which they stand."""
    out = bytearray()
    _put_text(out, entry.key)
    _put_int(out, len(entry.tags))
    for tag in entry.tags:
        _put_int(out, tag.tag_id)
    out += entry.sha256
    out += entry.perceptual_hash.to_bytes(8, "big")
    _put_int(out, len(entry.captions))
    for caption in entry.captions:
        _put_text(out, caption)
    for tag in entry.tags:
        out.append(round(tag.score * 255))
        _put_int(out, len(tag.mentions))
        for caption_index, start, end in tag.mentions:
            _put_int(out, caption_index + 1)
            _put_int(out, start)
            _put_int(out, end - start)
    _put_text(out, _compact_json(entry.metadata) if entry.metadata else "")
    origin = entry.origin.replace("\0", "")  # no path holds one
    _put_text(out, origin.replace(entry.key, "\0", 1) if entry.key and "\0" not in entry.key else origin)
    return bytes(out)


def decode_entry(entry_id: int, data: bytes) -> Entry:
    """The entry that `encode_entry` wrote."""
    key, at = _get_text(data, 0)
    tag_ids, at = _get_ints(data, at)
    sha256, at = data[at : at + 32], at + 32
    perceptual_hash, at = int.from_bytes(data[at : at + 8], "big"), at + 8
    n, at = _get_int(data, at)
    captions = []
    for _ in range(n):
        caption, at = _get_text(data, at)
        captions.append(caption)
    tags = []
    for tag_id in tag_ids:
        score, at = data[at] / 255, at + 1
        n, at = _get_int(data, at)
        mentions = []
        for _ in range(n):
            caption_index, at = _get_int(data, at)
            start, at = _get_int(data, at)
            length, at = _get_int(data, at)
            mentions.append((caption_index - 1, start, start + length))
        tags.append(EntryTag(tag_id, score, tuple(mentions)))
    metadata, at = _get_text(data, at)
    origin, at = _get_text(data, at)
    origin = origin.replace("\0", key) if "\0" not in key else origin
    return Entry(
        entry_id,
        key,
        bytes(sha256),
        perceptual_hash,
        tuple(captions),
        tuple(tags),
        json.loads(metadata) if metadata else {},
        origin,
    )


def decode_hot(data: bytes) -> tuple[str, list[int]]:
    """Only the key and the tag ids of an entry: what a query needs."""
    n, at = (data[0], 1) if data[0] < 128 else _get_int(data, 0)
    end = at + n
    key = str(data[at:end], "utf-8")
    n, at = (data[end], end + 1) if data[end] < 128 else _get_int(data, end)
    tag_ids = []
    for _ in range(n):
        # this runs five times a neighbour, and nearly all of them take one byte or two
        value = data[at]
        if value < 128:
            at += 1
        elif (high := data[at + 1]) < 128:
            value, at = value & 127 | high << 7, at + 2
        else:
            value, at = _get_int(data, at)
        tag_ids.append(value)
    return key, tag_ids


def decode_hashes(data: bytes) -> tuple[bytes, bytes]:
    """Only the sha256 (32 bytes) and the perceptual hash (8 bytes, big endian) of an entry."""
    n, at = _get_int(data, 0)
    n, at = _get_int(data, at + n)
    for _ in range(n):
        while data[at] > 127:
            at += 1
        at += 1
    return bytes(data[at : at + 32]), bytes(data[at + 32 : at + 40])


def decode_metadata(data: bytes) -> dict[str, Any]:
    """Only the metadata of an entry."""
    n, at = _get_int(data, 0)
    tags, at = _get_ints(data, at + n)
    captions, at = _get_int(data, at + 40)
    for _ in range(captions):
        n, at = _get_int(data, at)
        at += n
    for _ in tags:
        n, at = _get_int(data, at + 1)
        for _ in range(3 * n):
            while data[at] > 127:
                at += 1
            at += 1
    metadata, _ = _get_text(data, at)
    return dict(json.loads(metadata)) if metadata else {}


def metadata_needle(value: str) -> bytes:
    """Bytes that the record of an entry with this metadata value must hold.

    Empty where Python's text of a value is not its JSON.
    """
    if value in ("True", "False", "None", "nan", "inf", "-inf") or value.startswith(("[", "{")):
        return b""
    return json.dumps(value, ensure_ascii=False)[1:-1].encode("utf-8", "replace")


def encode_tag(text: str, kind: Kind, canonical: str) -> bytes:
    """Bytes of a tag of the vocabulary: kind (1 byte), text, canonical form if it differs."""
    out = bytearray([KINDS.index(kind)])
    _put_text(out, text)
    _put_text(out, "" if canonical == text else canonical)
    return bytes(out)


def decode_tag(data: bytes) -> tuple[str, Kind, str]:
    """Text, kind and canonical form."""
    text, at = _get_text(data, 1)
    canonical, _ = _get_text(data, at)
    return text, KINDS[data[0]], canonical or text


def seal(key: bytes, value: Mapping[str, Any]) -> bytes:
    """A record that is JSON, for a key: sha256 (64 hexadecimal digits) over key and JSON, a space, the JSON."""
    body = json.dumps(value, ensure_ascii=False, sort_keys=True).encode("utf-8", "replace")
    return sha256(key + body).hexdigest().encode() + b" " + body


def unseal(key: bytes, data: bytes) -> dict[str, Any]:
    """What was sealed. Raises `Damaged` if the record, or the key it stands under, is not what was written."""
    digest, _, body = data.partition(b" ")
    if sha256(key + body).hexdigest().encode() != digest:
        raise Damaged(
            f"the record under {key!r} does not fit its checksum: run `tagstore verify`, restore the store from a copy"
        )
    return dict(json.loads(body))


def _put_int(out: bytearray, value: int) -> None:
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)


def _get_int(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7


def _get_ints(data: bytes, at: int) -> tuple[list[int], int]:
    n, at = _get_int(data, at)
    values = []
    for _ in range(n):
        value, at = _get_int(data, at)
        values.append(value)
    return values, at


def _put_text(out: bytearray, text: str) -> None:
    data = text.encode(
        "utf-8", "replace"
    )  # a lone surrogate, from a broken escape, is no text: it becomes "?"
    _put_int(out, len(data))
    out += data


def _get_text(data: bytes, at: int) -> tuple[str, int]:
    n, at = _get_int(data, at)
    return str(data[at : at + n], "utf-8"), at + n


def _compact_json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), sort_keys=True)
