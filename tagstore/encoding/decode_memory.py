"""Bounds the memory of all pictures that a process decodes at a time.

A small file may be a large picture: 389 KB of PNG become 400 MB of pixels. What a picture takes is estimated
from its bytes and its header, generously, before it is read; `MemoryBudget.hold` waits until there is so much
room.
`tests/test_decode_memory.py` compares the estimates with what decoding takes.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Condition
from typing import Any

from tagstore.errors import BadImage

PIXEL_BYTES = 4
"""Bytes of a pixel in Pillow, whatever the mode, at most."""
WEBP_PIXEL_BYTES = 16
"""libwebp's two canvases, a frame as bytes, and the picture; decoders of AVIF and HEIC take no more."""
BAND_PIXELS = 1 << 18
"""Pixels that are converted to RGB at a time."""
STEP_BYTES = 40
"""Bytes that each of them takes between the steps, at most: those of float grey."""
OBJECT_BYTES = 400
"""What Pillow keeps of a segment of a JPEG, a chunk of a PNG or a fraction of a TIFF, beside its bytes."""
ORDINARY_METADATA = 1 << 18
"""Bytes of metadata that are not worth counting."""
NUMBER_BYTES = 48
"""Bytes of a number of a TIFF as Python's, in a tuple."""
MAX_PNG_TEXT, DEFLATE_RATIO = 64 << 20, 1032
"""Bytes of inflated text at which Pillow stops, and how much larger than the file it can be."""
MAX_PARTS = 10_000
"""Segments of a JPEG, or chunks of a PNG beside those with pixels, above which it is no picture."""
_TIFF_FRACTIONS, _TIFF_BYTES = (5, 10), (1, 2, 6, 7)
"""Types of numbers in a TIFF that become objects, and of those that stay bytes."""


class MemoryBudget:
    """Memory that threads share, first come, first served.

    Args:
        limit: bytes in all.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.held = limit, 0
        self._changed = Condition()
        self._queue: deque[object] = deque()

    @contextmanager
    def hold(self, size: int) -> Iterator[None]:
        """Wait for `size` bytes and hold them. Raises `BadImage` if there are never so many."""
        if size > self.limit:
            raise BadImage(
                f"the image is too large: decoding it takes {size >> 20} MiB, more than the limit of "
                f"{self.limit >> 20} MiB for all images together; shrink it"
            )
        self.take(size)
        try:
            yield
        finally:
            self.give_back(size)

    def take(self, size: int) -> None:
        """Wait for `size` bytes, or until nobody holds any."""
        ticket = object()
        with self._changed:
            self._queue.append(ticket)
            try:
                self._changed.wait_for(
                    lambda: self._queue[0] is ticket and (not self.held or self.held + size <= self.limit)
                )
                self.held += size
            finally:
                self._queue.remove(ticket)
                self._changed.notify_all()  # the next may fit as well

    def give_back(self, size: int) -> None:
        with self._changed:
            self.held -= size
            self._changed.notify_all()


SHARED = MemoryBudget(2 << 30)
"""For the images that a process decodes at a time, unless it says otherwise: room for any one."""


def reading_bytes(data: bytes, format: str) -> int:
    """Estimate the memory that a picture takes without its pixels: its metadata, as Pillow reads it.

    Returns 0 for the little that is ordinary. Raises `BadImage` for one with more parts than a picture has.
    """
    match format:
        case "JPEG":
            needed = OBJECT_BYTES * _jpeg_segments(data)
        case "PNG":
            needed = _png_metadata(data)
        case "TIFF":
            needed = _tiff_tags(data)
        case _:
            needed = 0
    return needed if needed > ORDINARY_METADATA else 0


def decoding_bytes(image: Any) -> int:
    """Estimate the memory that an opened picture takes while its pixels are decoded and made upright RGB."""
    pixels: int = image.width * image.height
    match image.format:
        case "WEBP" | "AVIF" | "HEIF":
            needed = WEBP_PIXEL_BYTES * pixels
        case "JPEG":
            # the coefficients of a progressive one, two bytes each, are all in memory
            needed = pixels * (PIXEL_BYTES + max(PIXEL_BYTES, 2 * len(image.getbands())))
        case "TIFF":
            needed = PIXEL_BYTES * pixels + max(PIXEL_BYTES * pixels, _tiff_buffer(image))
        case _:
            needed = 2 * PIXEL_BYTES * pixels
    return needed + STEP_BYTES * min(pixels, BAND_PIXELS)


def _jpeg_segments(data: bytes) -> int:
    """Count the segments before the pixels."""
    count, place = 0, 2
    while place + 4 <= len(data) and data[place] == 0xFF and data[place + 1] != 0xDA:
        if data[place + 1] == 0xFF:
            place += 1  # a fill byte
        elif 0xD0 <= data[place + 1] <= 0xD9 or data[place + 1] == 0x01:
            place += 2
        else:
            place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
        count += 1
        _check_parts(count)
    return count


def _png_metadata(data: bytes) -> int:
    count, text, place = 0, 0, 8
    while place + 8 <= len(data):
        length, name = int.from_bytes(data[place : place + 4], "big"), data[place + 4 : place + 8]
        place += 12 + length
        if name in (b"IDAT", b"fdAT"):
            continue
        count += 1
        _check_parts(count)
        if name in (b"zTXt", b"iTXt"):
            text += DEFLATE_RATIO * length
    # a text is bytes and then characters, of which each may take four bytes
    return OBJECT_BYTES * count + 5 * min(text, MAX_PNG_TEXT)


def _tiff_tags(data: bytes) -> int:
    """Estimate the memory of the numbers in the tags of the first picture."""
    order = "<" if data[:1] == b"I" else ">"
    if data[2:4] in (b"+\0", b"\0+"):
        head, entry, counts = "Q", "HHQ8x", "Q"
        [place] = struct.unpack_from(order + head, data, 8) if len(data) >= 16 else (len(data),)
    else:
        head, entry, counts = "L", "HHL4x", "H"
        [place] = struct.unpack_from(order + head, data, 4) if len(data) >= 8 else (len(data),)
    total, width = 0, struct.calcsize(order + entry)
    if place + 8 > len(data):
        return 0
    [entries] = struct.unpack_from(order + counts, data, place)
    place += struct.calcsize(order + counts)
    for start in range(place, min(place + entries * width, len(data) - width), width):
        _, kind, count = struct.unpack_from(order + entry, data, start)
        if kind in _TIFF_FRACTIONS:
            total += OBJECT_BYTES * min(count, len(data) // 8)
        elif kind not in _TIFF_BYTES:
            total += NUMBER_BYTES * min(count, len(data) // 2)
    return total


def _tiff_buffer(image: Any) -> int:
    """Estimate the memory of libtiff: a strip or tile, which may be as large as the picture, or larger."""
    tags = image.tag_v2

    def numbers(tag: int, default: int) -> tuple[int, ...]:
        value = tags.get(tag, default)
        return value if isinstance(value, tuple) else (value,)

    width, height = image.size
    bits = max(numbers(258, 8)) * max(*numbers(277, 1), len(numbers(258, 8)))
    if 322 in tags or 323 in tags:
        pixels = numbers(322, width)[0] * numbers(323, height)[0]
    else:
        pixels = width * min(height, numbers(278, height)[0])
    # of a progressive JPEG the coefficients, two bytes each, are all in memory
    coefficients = bits // 8 * 2 if "jpeg" in image.info.get("compression", "") else 0
    return int(pixels * (bits // 8 + 1 + coefficients))


def _check_parts(count: int) -> None:
    if count > MAX_PARTS:
        raise BadImage(f"the image has more than {MAX_PARTS} segments beside its pixels: export it again")
