"""Refuses messages that are small on the wire and large in memory, before they are parsed.

An empty field is two bytes on the wire and up to sixty in memory. So the fields of a message are counted, and
all but those that are large by their nature (images, vectors) are few bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from google.protobuf.message import DecodeError

from tagstore.errors import InvalidInput
from tagstore_proto.v1 import tagstore_pb2 as pb

UNCHECKED_BYTES = 1 << 14
"""Bytes of a message that may hold whatever it likes: that takes a megabyte at most."""
MAX_VARINT = 10
"""Bytes of a number, at most."""


class Bounds(NamedTuple):
    """Limits of a message of more than `UNCHECKED_BYTES`."""

    fields: int = 1 << 14
    """Fields, and those of the submessage `inside`."""
    small: int = 1 << 20
    """Bytes of all fields that are not `large`."""
    large: frozenset[int] = frozenset()
    """Numbers of the fields that only the size of the message bounds."""
    inside: int = 0
    """Number of the submessage that is meant, if it is not the message itself: what is beside it is single
    texts, which take no more in memory than on the wire."""

    def check(self, data: bytes) -> None:
        """Raise `InvalidInput` for a message beyond the limits, `DecodeError` for what is no message."""
        if len(data) <= UNCHECKED_BYTES:
            return
        count = small = 0
        for number, start, end in _fields(data, 0, len(data)):
            count += 1
            if self.inside and number == self.inside:
                for nested, begin, stop in _fields(data, start, end):
                    count += 1
                    small += 0 if nested in self.large else stop - begin
                    self._check(count, small)
            elif not self.inside and number not in self.large:
                small += end - start
            self._check(count, small)

    def _check(self, count: int, small: int) -> None:
        if count > self.fields:
            raise InvalidInput(f"the message has more than {self.fields} fields: send several")
        if small > self.small:
            raise InvalidInput(
                f"the message has more than {self.small >> 10} KiB beside images and vectors: send several"
            )


def _numbers(message: Any, *names: str) -> frozenset[int]:
    return frozenset(message.DESCRIPTOR.fields_by_name[name].number for name in names)


ANY = Bounds()
RETRIEVE = Bounds(small=4 << 20, large=_numbers(pb.RetrieveRequest, "images", "vectors", "texts"))
BOUNDS = {
    "Retrieve": RETRIEVE,
    "RetrieveStream": RETRIEVE,
    "Ingest": Bounds(
        large=_numbers(pb.Pair, "image"), inside=pb.IngestRequest.DESCRIPTOR.fields_by_name["pair"].number
    ),
    "Delete": Bounds(fields=1 << 16, small=1 << 23),
}
"""Limits of messages by method; `ANY` for the others."""


def bounded(method: str, parse: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """Return `parse` for the messages of a method, with its limits checked first."""
    bounds = BOUNDS.get(method, ANY)

    def parse_bounded(data: bytes) -> Any:
        bounds.check(data)
        return parse(data)

    return parse_bounded


def _fields(data: bytes, place: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yield number, start and end of each field. Raises `DecodeError`."""
    while place < end:
        key, start = _varint(data, place)
        match key & 7:
            case 0:
                _, place = _varint(data, start)
            case 1:
                place = start + 8
            case 2:
                length, start = _varint(data, start)
                place = start + length
            case 5:
                place = start + 4
            case _:
                raise DecodeError("groups are not taken")
        if place > end:
            raise DecodeError("a field is cut off")
        yield key >> 3, start, place


def _varint(data: bytes, place: int) -> tuple[int, int]:
    """Read a number; returns it and where it ends."""
    value = shift = 0
    for byte in data[place : place + MAX_VARINT]:
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, place + shift // 7
    raise DecodeError("a number is cut off")
