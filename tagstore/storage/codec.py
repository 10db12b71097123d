"""Entries and tags as bytes: compact, versioned by the store's format number, readable from any language.

Integers are LEB128 varints unless said otherwise; strings are UTF-8 behind their length. An entry:

    key · n tags · their ids                             what a query needs, first
    sha256 (32 bytes) · perceptual hash (8, big endian)
    n captions · captions
    for each tag: score (1 byte, 0..255) · n mentions · for each: caption + 1, start, end - start
    metadata (JSON, empty if there is none) · origin, with a NUL in place of the key
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import sha256
from typing import Any

from tagstore.errors import Damaged
from tagstore.types import KINDS, Entry, EntryTag, Kind


def encode_entry(entry: Entry) -> bytes:
    """Encode an entry without its id, which is the key of the record."""
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
    """Decode a record of `encode_entry`."""
    key, offset = _get_text(data, 0)
    tag_ids, offset = _get_ints(data, offset)
    digest, offset = data[offset : offset + 32], offset + 32
    perceptual_hash, offset = int.from_bytes(data[offset : offset + 8], "big"), offset + 8
    n, offset = _get_int(data, offset)
    captions = []
    for _ in range(n):
        caption, offset = _get_text(data, offset)
        captions.append(caption)
    tags = []
    for tag_id in tag_ids:
        score, offset = data[offset] / 255, offset + 1
        n, offset = _get_int(data, offset)
        mentions = []
        for _ in range(n):
            caption_index, offset = _get_int(data, offset)
            start, offset = _get_int(data, offset)
            length, offset = _get_int(data, offset)
            mentions.append((caption_index - 1, start, start + length))
        tags.append(EntryTag(tag_id, score, tuple(mentions)))
    metadata, offset = _get_text(data, offset)
    origin, offset = _get_text(data, offset)
    origin = origin.replace("\0", key) if "\0" not in key else origin
    return Entry(
        entry_id,
        key,
        bytes(digest),
        perceptual_hash,
        tuple(captions),
        tuple(tags),
        json.loads(metadata) if metadata else {},
        origin,
    )


def decode_hot(data: bytes) -> tuple[str, list[int]]:
    """Decode only the key and the tag ids of an entry: what a query needs."""
    n, offset = (data[0], 1) if data[0] < 128 else _get_int(data, 0)
    end = offset + n
    key = str(data[offset:end], "utf-8")
    n, offset = (data[end], end + 1) if data[end] < 128 else _get_int(data, end)
    tag_ids = []
    for _ in range(n):
        # this runs about five times a neighbour; nearly all ids take one byte or two
        value = data[offset]
        if value < 128:
            offset += 1
        elif (high := data[offset + 1]) < 128:
            value, offset = value & 127 | high << 7, offset + 2
        else:
            value, offset = _get_int(data, offset)
        tag_ids.append(value)
    return key, tag_ids


def decode_hashes(data: bytes) -> tuple[bytes, bytes]:
    """Decode only the sha256 (32 bytes) and the perceptual hash (8 bytes, big endian) of an entry."""
    n, offset = _get_int(data, 0)
    n, offset = _get_int(data, offset + n)
    for _ in range(n):
        while data[offset] > 127:
            offset += 1
        offset += 1
    return bytes(data[offset : offset + 32]), bytes(data[offset + 32 : offset + 40])


def decode_metadata(data: bytes) -> dict[str, Any]:
    """Decode only the metadata of an entry."""
    n, offset = _get_int(data, 0)
    tags, offset = _get_ints(data, offset + n)
    captions, offset = _get_int(data, offset + 40)
    for _ in range(captions):
        n, offset = _get_int(data, offset)
        offset += n
    for _ in tags:
        n, offset = _get_int(data, offset + 1)
        for _ in range(3 * n):
            while data[offset] > 127:
                offset += 1
            offset += 1
    metadata, _ = _get_text(data, offset)
    return dict(json.loads(metadata)) if metadata else {}


def encode_tag(text: str, kind: Kind, canonical: str) -> bytes:
    """Encode a tag of the vocabulary: kind (1 byte), text, canonical form if it differs."""
    out = bytearray([KINDS.index(kind)])
    _put_text(out, text)
    _put_text(out, "" if canonical == text else canonical)
    return bytes(out)


def decode_tag(data: bytes) -> tuple[str, Kind, str]:
    """Decode a tag: text, kind and canonical form."""
    text, offset = _get_text(data, 1)
    canonical, _ = _get_text(data, offset)
    return text, KINDS[data[0]], canonical or text


def seal(key: bytes, value: Mapping[str, Any]) -> bytes:
    """Encode a JSON record under a key: sha256 of key and JSON (64 hexadecimal digits), a space, the JSON."""
    body = json.dumps(value, ensure_ascii=False, sort_keys=True).encode("utf-8", "replace")
    return sha256(key + body).hexdigest().encode() + b" " + body


def unseal(key: bytes, data: bytes) -> dict[str, Any]:
    """Decode a record of `seal`. Raises `Damaged` if it or its key is not what was written."""
    digest, _, body = data.partition(b" ")
    if sha256(key + body).hexdigest().encode() != digest:
        raise Damaged(
            f"the record under {key!r} does not fit its checksum: run `tagstore verify`, restore the store "
            "from a copy"
        )
    return dict(json.loads(body))


def _put_int(out: bytearray, value: int) -> None:
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)


def _get_int(data: bytes, offset: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[offset]
        offset += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, offset
        shift += 7


def _get_ints(data: bytes, offset: int) -> tuple[list[int], int]:
    n, offset = _get_int(data, offset)
    values = []
    for _ in range(n):
        value, offset = _get_int(data, offset)
        values.append(value)
    return values, offset


def _put_text(out: bytearray, text: str) -> None:
    data = text.encode("utf-8", "replace")  # a lone surrogate, from a broken escape, becomes "?"
    _put_int(out, len(data))
    out += data


def _get_text(data: bytes, offset: int) -> tuple[str, int]:
    n, offset = _get_int(data, offset)
    return str(data[offset : offset + n], "utf-8"), offset + n


def _compact_json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), sort_keys=True)
